"""Schedulers decide at a boundary what becomes of the members: pure functions of what was measured."""

from hpt_torch.schedulers.exploit import Member
from hpt_torch.schedulers.pbt import PBT, check_space

__all__ = ["PBT", "Member", "check_space"]
