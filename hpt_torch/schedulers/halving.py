"""Successive halving and its kin: at rungs of ever more epochs only the better trials of a round go on.

Jamieson and Talwalkar 2016 (arXiv 1502.07943): successive halving. Li et al. 2018, "Hyperband" (arXiv
1603.06560): brackets of it that begin later, for when early scores mislead. Li et al. 2020, "A System for
Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934): ASHA, which compares with all that ever reached
the rung, so that rounds may be small, and promotes who was stopped too early. Ours decide at boundaries, on
what is recorded: a function of the history, whatever the order in which workers came back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpt_torch.schedulers.exploit import Member
from hpt_torch.seeding import derive_seed, generator
from hpt_torch.types import Objective, Stop, Trial

HalvingName = Literal["successive_halving", "hyperband", "asha"]


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Which trials stop at which rung."""

    kind: HalvingName
    """successive_halving: of each round's trials the best 1 / reduction_factor pass each rung.
    hyperband: the same within brackets, to which trials belong by chance, in Hyperband's proportions.
    asha: a trial passes if it is among the best 1 / reduction_factor of all that ever reached the rung. One
    that was stopped and is so later, for others did worse, goes on from there in the next round."""

    min_epochs: int = 1
    """The first rung."""

    reduction_factor: int = 3
    """Each rung has so many times the epochs of the one before, and lets one in so many trials pass."""

    def next_boundary(self, epoch: int, epochs: int) -> int:
        """The next rung of any bracket after `epoch`, or the end."""
        return min([rung for rung in self.rungs(epochs) if rung > epoch], default=epochs)

    def rungs(self, epochs: int, bracket: int = 0) -> list[int]:
        """Epochs at which trials of the bracket stop; each bracket begins one rung later than the last."""
        rung, found = self.min_epochs * self.reduction_factor**bracket, []
        while rung < epochs:
            found.append(rung)
            rung *= self.reduction_factor
        return found

    def bracket(self, number: int, epochs: int, seed: int) -> int:
        """The bracket of a trial: 0 unless this is Hyperband, which has one more bracket than rungs."""
        if self.kind != "hyperband":
            return 0
        last = len(self.rungs(epochs))
        sizes = {b: last - b for b in range(last + 1)}  # reductions that are ahead
        shares = [math.ceil((last + 1) / (s + 1) * self.reduction_factor**s) for s in sizes.values()]
        at = generator(seed, "hyperband", number).random() * sum(shares)
        return next((b for b in range(last + 1) if at < sum(shares[: b + 1])), last)

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
        history: all other trials, of which ASHA reads what they scored at this rung."""
        stops = []
        for bracket in sorted({self.bracket(member.number, epochs, seed) for member in members}):
            racing = [m for m in members if self.bracket(m.number, epochs, seed) == bracket]
            if not racing or racing[0].epoch not in self.rungs(epochs, bracket):
                continue
            stops += self._slowest(racing, history, objective, seed)
        return sorted(stops, key=lambda stop: stop.trial)

    def _slowest(
        self, racing: Sequence[Member], history: Sequence[Trial], objective: Objective, seed: int
    ) -> list[Stop]:
        epoch = racing[0].epoch
        scores = {member.number: member.score for member in racing}
        if self.kind == "asha":
            scores |= _at_rung(history, epoch, objective)
        ranked = _ranked(scores, epoch, objective, seed)
        passing = math.ceil(len(ranked) / self.reduction_factor)
        if self.kind == "asha":
            passing = self.passing(len(ranked))
        rank = {number: i + 1 for i, number in enumerate(ranked)}
        return [
            Stop(
                trial=member.number,
                reason=f"{self.kind}: place {rank[member.number]} of {len(ranked)} after epoch {epoch}, "
                f"where {passing} go on",
            )
            for member in racing
            if rank[member.number] > passing
        ]

    def passing(self, reached: int) -> int:
        """ASHA: how many of those that ever reached a rung pass it; all, where too few have to tell."""
        return max(1, reached // self.reduction_factor) if reached >= self.reduction_factor else reached

    def ranked(self, trials: Sequence[Trial], epoch: int, objective: Objective, seed: int) -> list[int]:
        """The numbers of the trials that have reached this rung, best first."""
        return _ranked(_at_rung(trials, epoch, objective), epoch, objective, seed)

    def promoted(
        self, waiting: Collection[int], trials: Sequence[Trial], epoch: int, objective: Objective, seed: int
    ) -> list[int]:
        """Who of those that wait at this rung is among the best by now, and goes on."""
        ranked = self.ranked(trials, epoch, objective, seed)
        return [number for number in ranked[: self.passing(len(ranked))] if number in waiting]


def _at_rung(trials: Sequence[Trial], epoch: int, objective: Objective) -> dict[int, float | None]:
    """What trials scored after this epoch, of those that came so far."""
    return {
        trial.number: report.metrics.get(objective.metric)
        for trial in trials
        for report in trial.reports
        if report.epoch == epoch
    }


def _ranked(scores: Mapping[int, float | None], epoch: int, objective: Objective, seed: int) -> list[int]:
    sign = -1.0 if objective.direction == "maximize" else 1.0

    def place(number: int) -> tuple[float, int]:
        score = scores[number]
        known = score is not None and math.isfinite(score)
        # Ties are broken by chance, not by the order in which trials were proposed.
        return sign * score if known else math.inf, derive_seed(seed, "halving", epoch, number)  # type: ignore[operator]

    return sorted(scores, key=place)
