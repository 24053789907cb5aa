"""Successive halving, Hyperband and ASHA: who passes a rung, by the papers' arithmetic."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from hpt_torch.schedulers import Halving, Member
from hpt_torch.types import Objective, Report, Stop, Trial

LOSS = Objective(metric="valid/loss", direction="minimize")
ACCURACY = Objective(metric="valid/accuracy", direction="maximize")


def _members(scores: dict[int, float], epoch: int = 3) -> list[Member]:
    return [Member(number=n, epoch=epoch, hparams={}, scores=[(epoch, s)]) for n, s in scores.items()]


def _past(number: int, epoch: int, loss: float) -> Trial:
    report = Report(trial=number, epoch=epoch, metrics={"valid/loss": loss}, seconds=0.0)
    return Trial(number=number, round=0, hparams={}, signature="", reports=(report,))


def _stopped(
    halving: Halving, members: list[Member], history: tuple[Trial, ...] = (), objective: Objective = LOSS
) -> list[int]:
    stops: list[Stop] = halving.decide(members, history=history, objective=objective, epochs=81, seed=0)
    return [stop.trial for stop in stops]


def test_rungs_and_boundaries() -> None:
    halving = Halving(kind="successive_halving", min_epochs=2, reduction_factor=3)
    assert halving.rungs(54) == [2, 6, 18]  # 54 is the end, not a rung
    assert halving.rungs(55) == [2, 6, 18, 54]
    assert [halving.next_boundary(e, 20) for e in (0, 1, 2, 6, 17, 18)] == [2, 2, 6, 18, 18, 20]
    assert Halving(kind="asha", min_epochs=30).next_boundary(0, 20) == 20


def test_the_best_share_of_the_round_passes() -> None:
    halving, scores = Halving(kind="successive_halving"), {n: float(n % 7) for n in range(7)}
    assert _stopped(halving, _members(scores)) == [3, 4, 5, 6]  # 7 / 3 is rounded up: three pass
    assert _stopped(halving, _members(scores), objective=ACCURACY) == [0, 1, 2, 3]
    assert _stopped(halving, _members({4: 0.1})) == []
    assert _stopped(halving, _members(scores, epoch=4)) == []  # no rung
    past = tuple(_past(n, 3, 0.0) for n in range(10, 40))
    assert _stopped(halving, _members(scores), past) == [3, 4, 5, 6]  # other rounds do not count


def test_no_score_is_the_worst() -> None:
    halving = Halving(kind="successive_halving", reduction_factor=2)
    assert _stopped(halving, _members({1: math.nan, 2: 5.0, 3: math.inf, 4: 9.0}, epoch=2)) == [1, 3]


def test_ties_are_broken_by_chance_and_the_same_every_time() -> None:
    halving = Halving(kind="successive_halving", reduction_factor=2)
    members = _members(dict.fromkeys(range(6), 1.0), epoch=2)

    def stopped(members: list[Member], seed: int) -> list[int]:
        stops = halving.decide(members, history=(), objective=LOSS, epochs=9, seed=seed)
        return [stop.trial for stop in stops]

    found = {seed: stopped(members, seed) for seed in range(20)}
    assert all(len(stops) == 3 for stops in found.values())
    assert len({tuple(stops) for stops in found.values()}) > 5
    assert stopped(members[::-1], 7) == found[7]


def test_asha_compares_with_all_that_ever_reached_the_rung() -> None:
    asha = Halving(kind="asha")
    assert _stopped(asha, _members({20: 0.5, 21: 0.6})) == []  # two results tell nothing yet
    assert _stopped(asha, _members({20: 0.5, 21: 0.6, 22: 0.7})) == [21, 22]
    past = tuple(_past(n, 3, 0.1 * (n + 1)) for n in range(9))  # 0.1 … 0.9
    # of 12 the best four pass: 0.05, 0.1, 0.2, 0.25
    assert _stopped(asha, _members({20: 0.05, 21: 0.25, 22: 0.35}), past) == [22]
    elsewhere = tuple(_past(n, 9, 0.0) for n in range(9))  # another rung
    assert _stopped(asha, _members({20: 0.5, 21: 0.6, 22: 0.7}), elsewhere) == [21, 22]


def test_hyperband_has_brackets_in_its_proportions() -> None:
    hyperband = Halving(kind="hyperband", min_epochs=1)
    assert [hyperband.rungs(27, bracket) for bracket in range(4)] == [[1, 3, 9], [3, 9], [9], []]
    counts = Counter(hyperband.bracket(n, 27, seed=1) for n in range(4000))
    # n_s = ceil((s_max + 1) / (s + 1) * eta ** s) for s = 3, 2, 1, 0: 27, 12, 6, 4
    assert {b: counts[b] / 4000 for b in range(4)} == pytest.approx(
        {0: 27 / 49, 1: 12 / 49, 2: 6 / 49, 3: 4 / 49}, abs=0.03
    )


def test_hyperband_halves_within_each_bracket() -> None:
    hyperband = Halving(kind="hyperband", min_epochs=1)
    members = _members({n: float(n) for n in range(60)})
    stops = set(_stopped(hyperband, members))
    for bracket in range(5):
        mine = [m.number for m in members if hyperband.bracket(m.number, 81, 0) == bracket]
        passing = mine[: math.ceil(len(mine) / 3)] if bracket <= 1 else mine  # epoch 3 is a rung of those two
        assert stops & set(mine) == set(mine) - set(passing)
