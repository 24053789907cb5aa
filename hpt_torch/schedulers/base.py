"""What a scheduler is: pure decisions at boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hpt_torch.schedulers.exploit import Member
from hpt_torch.space import Space
from hpt_torch.types import Exploit, Objective


class Scheduler(Protocol):
    """When the members of a population meet, and what becomes of them then. Functions of their arguments."""

    def next_boundary(self, epoch: int, epochs: int) -> int:
        """The epoch to which a member of `epoch` epochs trains before the next decision, at most `epochs`."""

    def decide(
        self, members: Sequence[Member], *, objective: Objective, space: Space, seed: int, generation: int
    ) -> list[Exploit]:
        """Whom each member copies, and with which hyperparameters it goes on, for those that change."""
