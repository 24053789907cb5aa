"""Schedulers decide at a boundary what becomes of the members: pure functions of what was measured."""

from hpt_torch.schedulers.base import Scheduler
from hpt_torch.schedulers.exploit import Member
from hpt_torch.schedulers.pbt import PBT, PORTABLE, check_space
from hpt_torch.schedulers.schedule import Schedule, parse_changes

__all__ = ["PBT", "PORTABLE", "Member", "Schedule", "Scheduler", "check_space", "parse_changes"]
