"""Reads the record of a finished or running run; never trains."""

from hpt_torch.report.summary import Summary, canonical, summarise

__all__ = ["Summary", "canonical", "summarise"]
