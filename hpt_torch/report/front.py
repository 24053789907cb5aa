"""The Pareto set: of two objectives, the trials that no other one beats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hpt_torch.types import Objective, Trial, TrialState


def front(trials: Sequence[Trial], first: Objective, second: Objective) -> tuple[Trial, ...]:
    """The complete trials with a finite score in both than which no other one is at least as good in both and
    better in one; the best in `first` first. Those that are equal in both are in it together."""
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    scored = [trial for trial in first.ranked(complete) if second.score(trial) is not None]
    found: list[Trial] = []
    bar: float | None = None  # the best in `second` of those that are better in `first`
    for _, level in itertools.groupby(scored, key=first.score):
        ranked = second.ranked(list(level))
        best = second.score(ranked[0])
        assert best is not None
        if bar is None or second.better(best, bar):
            found += [trial for trial in ranked if second.score(trial) == best]
            bar = best
    return tuple(found)
