"""Schedulers decide at a boundary what becomes of the members: pure functions of what was measured."""

from hpt_torch.schedulers.base import Pruner, Scheduler
from hpt_torch.schedulers.exploit import Member
from hpt_torch.schedulers.halving import Halving
from hpt_torch.schedulers.pbt import PBT, PORTABLE, check_space
from hpt_torch.schedulers.pruning import Pruning
from hpt_torch.schedulers.schedule import Schedule, parse_changes

__all__ = [
    "PBT",
    "PORTABLE",
    "Halving",
    "Member",
    "Pruner",
    "Pruning",
    "Schedule",
    "Scheduler",
    "check_space",
    "parse_changes",
]
