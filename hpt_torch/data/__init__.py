"""Data sets as tensors: materialised once, kept on the device, split before anything is learned from them."""

from hpt_torch.data.base import Data, Rows, split
from hpt_torch.data.tabular import digits

DATASETS = {"digits": digits}

__all__ = ["DATASETS", "Data", "Rows", "digits", "split"]
