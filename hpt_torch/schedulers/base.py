"""What a scheduler is: pure decisions at boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hpt_torch.schedulers.exploit import Member
from hpt_torch.space import Space
from hpt_torch.types import Exploit, Objective, Stop, Trial


class Scheduler(Protocol):
    """When the members of a population meet, and what becomes of them then. Functions of their arguments."""

    def next_boundary(self, epoch: int, epochs: int) -> int:
        """The epoch to which a member of `epoch` epochs trains before the next decision, at most `epochs`."""

    def decide(
        self, members: Sequence[Member], *, objective: Objective, space: Space, seed: int, generation: int
    ) -> list[Exploit]:
        """Whom each member copies, and with which hyperparameters it goes on, for those that change."""


class Pruner(Protocol):
    """When the trials of a round are compared, and which of them stop then. Functions of their arguments."""

    def next_boundary(self, epoch: int, epochs: int) -> int:
        """The epoch to which a trial of `epoch` epochs trains before the next decision, at most `epochs`."""

    def decide(
        self,
        members: Sequence[Member],
        *,
        history: Sequence[Trial],
        objective: Objective,
        epochs: int,
        seed: int,
    ) -> list[Stop]:
        """Who stops now. members: the round's trials that have trained to this boundary and could go on.
        history: all other trials. epochs: of a whole trial."""
