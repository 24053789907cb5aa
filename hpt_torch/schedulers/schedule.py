"""A schedule known beforehand: every member changes hyperparameters at the same epochs.

What Population Based Training ends with is such a schedule, by way of its winner's ancestors; trained again
from scratch it shows whether the schedule did it, or the selection among many members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpt_torch.schedulers.exploit import Member
from hpt_torch.space import Space, freeze
from hpt_torch.types import Exploit, HParams, Objective


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """After `changes[i][0]` epochs members go on with the hyperparameters `changes[i][1]`, and keep those
    that it does not name. Ascending epochs, each at least 1."""

    changes: tuple[tuple[int, HParams], ...]

    def next_boundary(self, epoch: int, epochs: int) -> int:
        return min([after for after, _ in self.changes if after > epoch] + [epochs])

    def decide(
        self, members: Sequence[Member], *, objective: Objective, space: Space, seed: int, generation: int
    ) -> list[Exploit]:
        """Every member as a copy of itself with what changes now."""
        changes = dict(self.changes)
        return [
            Exploit(target=m.number, source=m.number, hparams={**m.hparams, **changes[m.epoch]})
            for m in sorted(members, key=lambda member: member.number)
            if m.alive and m.epoch in changes
        ]


def parse_changes(raw: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, HParams], ...]:
    """``Schedule.changes`` from a recipe's ``{after = 2, lr = 0.01}``."""
    return tuple(
        (int(change["after"]), {name: freeze(value) for name, value in change.items() if name != "after"})
        for change in raw
    )
