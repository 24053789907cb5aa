"""Optuna's pruners at boundaries: their rules on our history."""

from __future__ import annotations

import statistics

from hpt_torch.schedulers import Member, Pruning
from hpt_torch.types import Objective, Report, Trial, TrialState

LOSS = Objective(metric="valid/loss", direction="minimize")


def _trial(number: int, losses: list[float], state: TrialState = TrialState.COMPLETE) -> Trial:
    reports = tuple(
        Report(trial=number, epoch=i + 1, metrics={"valid/loss": loss}, seconds=0.0)
        for i, loss in enumerate(losses)
    )
    return Trial(number=number, round=0, hparams={}, signature="", reports=reports, state=state)


def _member(number: int, losses: list[float]) -> Member:
    scores = [(i + 1, loss) for i, loss in enumerate(losses)]
    return Member(number=number, epoch=len(losses), hparams={}, scores=scores)


def _stopped(pruning: Pruning, members: list[Member], history: list[Trial]) -> list[int]:
    stops = pruning.decide(members, history=history, objective=LOSS, epochs=9, seed=0)
    return [stop.trial for stop in stops]


HISTORY = [_trial(n, [1.0 + n, 0.5 + n, 0.1 + n]) for n in range(6)]
MEMBERS = [_member(10 + n, [1.1 + n, 0.6 + n]) for n in range(6)]


def test_the_median_of_complete_trials_at_the_same_epoch() -> None:
    limit = statistics.median(0.5 + n for n in range(6))
    worse = [member.number for member in MEMBERS if member.scores[-1][1] > limit]
    assert _stopped(Pruning(kind="median"), MEMBERS, HISTORY) == worse == [13, 14, 15]
    pruned = [_trial(50 + n, [0.0, 0.0], TrialState.PRUNED) for n in range(20)]
    assert _stopped(Pruning(kind="median"), MEMBERS, HISTORY + pruned) == worse


def test_nothing_is_stopped_before_there_are_enough_trials() -> None:
    assert _stopped(Pruning(kind="median"), MEMBERS, HISTORY[:4]) == []
    assert _stopped(Pruning(kind="median", startup_trials=4), MEMBERS, HISTORY[:4]) != []


def test_a_percentile() -> None:
    assert _stopped(Pruning(kind="percentile", percentile=20.0), MEMBERS, HISTORY) == [11, 12, 13, 14, 15]
    assert _stopped(Pruning(kind="percentile", percentile=100.0), MEMBERS, HISTORY) == [15]


def test_thresholds() -> None:
    assert _stopped(Pruning(kind="threshold", upper=3.0), MEMBERS, []) == [13, 14, 15]
    assert _stopped(Pruning(kind="threshold", lower=2.0), MEMBERS, []) == [10, 11]


def test_only_those_that_do_not_improve() -> None:
    patient = Pruning(kind="threshold", upper=0.5, patience_epochs=1)
    improving, stuck = _member(1, [3.0, 2.0, 1.0]), _member(2, [1.0, 2.0, 3.0])
    assert _stopped(patient, [improving, stuck], []) == [2]


def test_boundaries() -> None:
    pruning = Pruning(kind="median", interval_epochs=2, burn_in_epochs=5)
    assert [pruning.next_boundary(epoch, 9) for epoch in (0, 5, 6, 8)] == [6, 6, 8, 9]
