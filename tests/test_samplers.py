"""What every sampler must do, for every kind of space; and what TPE must be good at.

Run as a script it prints what it suggests, so that another process can be compared with this one.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hpt_torch import grids, samplers
from hpt_torch.points import queue
from hpt_torch.samplers import make_study, suggest
from hpt_torch.space import (
    Choice,
    Dimension,
    Float,
    Int,
    dump_dimension,
    is_active,
    ordered,
    thaw,
)
from hpt_torch.types import HParams, Objective, Report, Trial, TrialState

Space = dict[str, Dimension]
OBJECTIVE = Objective(metric="valid/accuracy", direction="maximize")
SECOND = Objective(metric="parameters", direction="minimize")

SPACES: dict[str, Space] = {
    "floats": {"dropout": Float(0, 0.6), "label_smoothing": Float(0, 0.2), "fixed": Float(0.5, 0.5)},
    "log": {"lr": Float(1e-5, 1e-1), "weight_decay": Float(1e-6, 1e-2), "x": Float(1e-3, 1, log=True)},
    "ints": {"width": Int(16, 256, log=True), "depth": Int(1, 9, step=4), "batch_size": Int(1, 100)},
    "steps": {"x": Float(0, 1, step=0.25), "y": Float(1, 2, step=0.5), "n": Int(0, 6, step=3)},
    "choices": {
        "hidden_sizes": Choice([[64], [64, 64], [[1], "a"]]),
        "mixed": Choice([1, 1.5, True, "1", False]),
        "one": Choice(["only"]),
    },
    "conditions": {
        "momentum": Float(0, 0.9, when={"optimizer": ("sgd",)}),
        "optimizer": Choice(["adam", "sgd", "adamw"]),
        "beta1": Float(0.5, 0.99, when={"optimizer": ("adam", "adamw")}),
        "nesterov": Choice([True, False], when={"optimizer": ("sgd",)}),
        "lr": Float(1e-4, 1e-1),
    },
    "conditions and steps": {
        "kind": Choice(["a", "b"]),
        "n": Int(2, 8, step=2, when={"kind": ("a",)}),
        "x": Float(0, 1, step=0.25, when={"kind": ("b",)}),
        "y": Float(1, 2, step=0.5, when={"kind": ("a", "b")}),
        "deep": Choice([[1], [2]], when={"n": (2, 4)}),
    },
}
COUNTABLE = ["steps", "choices", "conditions and steps"]
# The GP fits a model for every suggestion after its first ten trials, about a second each
GP_SPACES = ["log", "choices", "conditions"]


def cases(kinds: Sequence[str], gp_spaces: Sequence[str] = GP_SPACES) -> Any:
    found = []
    for kind in kinds:
        spaces = {"grid": COUNTABLE, "gp": gp_spaces, "gp, two": ["log"]}
        for name in spaces.get(kind, list(SPACES)):
            marks = [pytest.mark.slow] if kind.startswith("gp") else []
            found.append(pytest.param(kind, name, id=f"{kind}-{name}", marks=marks))
    return pytest.mark.parametrize(("kind", "name"), found)


# With a second objective beside the first: "tpe, two"
KINDS = ["tpe", "random", "grid", "gp", "qmc", "nsga2", "tpe, two", "nsga2, two", "gp, two"]
conformance = cases(KINDS)


def score(point: HParams) -> float:
    """Any deterministic function of a point, so that histories have good and bad trials."""
    text = json.dumps(thaw(sorted((name, repr(value)) for name, value in point.items())))
    return random.Random(text).random()


def trial(
    number: int,
    round: int,
    point: HParams,
    value: float | None,
    state: TrialState = TrialState.COMPLETE,
) -> Trial:
    reports: tuple[Report, ...] = ()
    if value is not None:
        reports = (Report(trial=number, epoch=1, metrics={OBJECTIVE.metric: value}, seconds=0.0),)
    parameters = 100 + 37 * number % 50
    return Trial(
        number=number,
        round=round,
        hparams=point,
        signature="",
        state=state,
        reports=reports,
        parameters=parameters,
    )


def ask(
    kind: str,
    space: Space,
    history: Sequence[Trial],
    numbers: Sequence[int],
    round: int,
    seed: int = 0,
    start_with_defaults: bool = True,
    points: Sequence[HParams] = (),
) -> list[HParams]:
    return suggest(
        space,
        history,
        numbers,
        round=round,
        kind=kind.removesuffix(", two"),  # type: ignore[arg-type]
        objective=OBJECTIVE,
        second=SECOND if kind.endswith(", two") else None,
        size=6,
        seed=seed,
        queue=queue(space, points, start_with_defaults=start_with_defaults),
    )


def history_of(space: Space, count: int = 12, per_round: int = 6) -> list[Trial]:
    """Finished rounds of random points; as many as make TPE and the GP leave their random start."""
    points = ask("random", space, [], range(count), 0, seed=99)
    return [trial(n, n // per_round, point, score(point)) for n, point in enumerate(points)]


def numbers_for(space: Space, kind: str, count: int = 6) -> range:
    count = min(count, 3) if kind.startswith("gp") else count
    return range(min(count, grids.size(space))) if kind == "grid" else range(12, 12 + count)


def plain(points: Sequence[HParams]) -> list[str]:
    return [repr(dict(point)) for point in points]


# -- conformance ---------------------------------------------------------------------------------------


@cases(KINDS, gp_spaces=list(SPACES))
def test_points_lie_in_the_space_and_have_its_types(kind: str, name: str) -> None:
    space = SPACES[name]
    for history in ([], history_of(space)):
        for point in ask(kind, space, history, numbers_for(space, kind, 30), 2):
            assert set(point) == {n for n in ordered(space) if is_active(space[n], point)}
            for n, value in point.items():
                dimension = space[n]
                assert dimension.contains(value), (n, value)
                if isinstance(dimension, Choice):
                    assert repr(value) in map(repr, dimension.options)
                else:
                    assert type(value) is (float if isinstance(dimension, Float) else int)


@conformance
def test_asking_in_two_parts_is_asking_once(kind: str, name: str) -> None:
    space = SPACES[name]
    history, numbers = history_of(space), numbers_for(space, kind)
    once = ask(kind, space, history, numbers, 2)
    first = ask(kind, space, history, numbers[:2], 2)
    # better than anything before, so that a sampler that saw it would notice
    begun = [trial(n, 2, p, 2.0) for n, p in zip(numbers, first, strict=False)]
    rest = ask(kind, space, [*history, *begun], numbers[2:], 2)
    assert plain([*first, *rest]) == plain(once)


@conformance
def test_what_became_of_the_same_round_does_not_matter(kind: str, name: str) -> None:
    space = SPACES[name]
    history, numbers = history_of(space), numbers_for(space, kind)
    begun = ask(kind, space, history, numbers[:2], 2)
    found = []
    for state, value in [
        (TrialState.WAITING, None),
        (TrialState.RUNNING, 0.1),
        (TrialState.COMPLETE, 2.0),
        (TrialState.COMPLETE, 0.0),
        (TrialState.PRUNED, 0.2),
        (TrialState.FAILED, None),
        (TrialState.INFEASIBLE, None),
    ]:
        same_round = [trial(n, 2, p, value, state) for n, p in zip(numbers, begun, strict=False)]
        found.append(plain(ask(kind, space, [*history, *same_round], numbers[2:4], 2)))
        if kind == "gp" and len(found) == 3:
            break  # each of them is a model to fit
    assert found == [found[0]] * len(found)


@conformance
def test_later_rounds_are_not_seen(kind: str, name: str) -> None:
    space = SPACES[name]
    history, numbers = history_of(space), numbers_for(space, kind, 2)
    later = [replace(t, number=t.number + 50, round=3) for t in history]
    assert plain(ask(kind, space, [*history, *later], numbers, 2)) == plain(
        ask(kind, space, history, numbers, 2)
    )


@conformance
def test_other_seeds_give_other_points(kind: str, name: str) -> None:
    space = SPACES[name]
    history, numbers = history_of(space), numbers_for(space, kind)

    # From a history a sampler may know the best of a few points for sure; without one it has to draw
    def draw(seed: int) -> tuple[str, ...]:
        return tuple(plain(ask(kind, space, [], numbers, 2, seed=seed)))

    assert len({draw(seed) for seed in range(4)}) > 1
    assert draw(0) == draw(0)
    if name in ("floats", "log") and kind != "gp":
        found = {tuple(plain(ask(kind, space, history, numbers, 2, seed=seed))) for seed in (0, 1, 2)}
        assert len(found) == 3


@conformance
def test_the_process_is_left_as_it_was(kind: str, name: str) -> None:
    import torch

    space = SPACES[name]
    torch.set_num_threads(2)  # the GP sets it to 1 while it fits

    def states() -> list[Any]:
        return [
            random.getstate(),
            repr(np.random.get_state()),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
        ]

    before = states()
    ask(kind, space, history_of(space), numbers_for(space, kind, 2), 2)
    assert states() == before


UNUSUAL: list[tuple[TrialState, float | None]] = [
    (TrialState.WAITING, None),
    (TrialState.RUNNING, None),
    (TrialState.RUNNING, 0.5),
    (TrialState.PAUSED, 0.5),
    (TrialState.PRUNED, 0.5),
    (TrialState.PRUNED, None),
    (TrialState.FAILED, None),
    (TrialState.FAILED, 0.5),
    (TrialState.FAILED, math.nan),
    (TrialState.FAILED, math.inf),
    (TrialState.INFEASIBLE, None),
]


@conformance
@pytest.mark.parametrize("others", ["among finished trials", "alone"])
def test_no_state_of_a_trial_is_an_error(kind: str, name: str, others: str) -> None:
    space = SPACES[name]
    history = history_of(space)
    odd = [
        trial(20 + n, 1, history[n % len(history)].hparams, value, state)
        for n, (state, value) in enumerate(UNUSUAL)
    ]
    history = [*history, *odd] if others == "among finished trials" else odd
    assert len(ask(kind, space, history, numbers_for(space, kind, 2), 2)) == 2


@pytest.mark.parametrize(
    "kind",
    [
        *("tpe", "random", "nsga2", "tpe, two", "nsga2, two"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gp", "gp, two")),
    ],
)
def test_a_complete_trial_may_lack_the_metric(kind: str) -> None:
    space = SPACES["log"]
    history = [*history_of(space), trial(20, 1, history_of(space)[0].hparams, None)]
    assert len(ask(kind, space, history, [30, 31], 2)) == 2


@pytest.mark.parametrize("kind", ["tpe", "random", "nsga2"])
@pytest.mark.parametrize("when", [None, {"kind": ("a",)}], ids=["always", "conditional"])
@pytest.mark.parametrize("name", ["x", "lr"])
def test_a_real_step_of_one_is_a_step(kind: str, when: Any, name: str) -> None:
    space: Space = {"kind": Choice(["a"]), name: Float(1, 5, step=1.0, when=when)}
    for point in ask(kind, space, [], range(10), 0):
        assert point[name] in (1.0, 2.0, 3.0, 4.0, 5.0)


@pytest.mark.parametrize("state", list(TrialState))
@pytest.mark.parametrize("kind", ["tpe", "gp", "nsga2", "tpe, two", "gp, two", "nsga2, two"])
def test_a_history_of_one_state_only(kind: str, state: TrialState) -> None:
    space = SPACES["log"]
    history = [replace(t, state=state, reports=()) for t in history_of(space)]
    if state is TrialState.COMPLETE:
        history = history_of(space, 3)
    assert len(ask(kind, space, history, [12, 13], 2)) == 2


@pytest.mark.parametrize("complete", range(4))
@pytest.mark.parametrize("kind", ["tpe", "gp", "nsga2", "tpe, two", "gp, two", "nsga2, two"])
def test_a_history_of_which_few_are_complete(kind: str, complete: int) -> None:
    """Of nsga2's two parents there may be one."""
    space = SPACES["log"]
    history = [
        t if t.number < complete else replace(t, state=TrialState.PRUNED) for t in history_of(space, 6)
    ]
    assert len(ask(kind, space, history, [12, 13], 1)) == 2


@pytest.mark.parametrize("kind", ["tpe", "random", "grid", "gp", "nsga2"])
def test_an_empty_space_has_one_point(kind: str) -> None:
    assert ask(kind, {}, [], [0], 0) == [{}]


# -- another process -----------------------------------------------------------------------------------


def everything(kinds: Sequence[str]) -> dict[str, list[str]]:
    return {
        f"{kind} {name}": plain(ask(kind, space, history_of(space), numbers_for(space, kind, 3), 2))
        for kind in kinds
        for name, space in SPACES.items()
        if kind != "grid" or name in COUNTABLE
    }


@pytest.mark.parametrize(
    "kinds",
    [
        [k for k in KINDS if not k.startswith(("gp", "qmc"))],
        pytest.param(["gp", "gp, two"], marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_another_process_suggests_the_same(kinds: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, __file__, *kinds],
        env={**os.environ, "PYTHONHASHSEED": "42"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == everything(kinds)


# -- defaults ------------------------------------------------------------------------------------------

WITH_DEFAULTS: Space = {
    "lr": Float(1e-4, 1e-1, default=1e-3),
    "width": Int(16, 256, log=True, default=64),
    "hidden_sizes": Choice([[32], [64, 64]], default=[64, 64]),
    "batch_norm": Choice([True, False], default=False),  # a default that is false is one
    "dropout": Float(0, 0.6),
}
CONDITIONAL_DEFAULTS: Space = {
    "momentum": Float(0, 0.9, default=0.5, when={"optimizer": ("sgd",)}),
    "optimizer": Choice(["adam", "sgd"], default="adam"),
    "beta1": Float(0.5, 0.99, default=0.9, when={"optimizer": ("adam",)}),
    "lr": Float(1e-4, 1e-1),
}


@pytest.mark.parametrize("kind", ["tpe", "random", "gp", "qmc", "nsga2"])
def test_trial_0_is_the_defaults_and_the_rest_is_sampled(kind: str) -> None:
    seeds = [ask(kind, WITH_DEFAULTS, [], [0, 1], 0, seed=seed) for seed in range(4)]
    for first, second in seeds:
        declared = {n: v for n, v in first.items() if n != "dropout"}
        assert repr(declared) == repr(
            {"lr": 1e-3, "width": 64, "hidden_sizes": (64, 64), "batch_norm": False}
        )
        assert second["lr"] != 1e-3
    assert len({first["dropout"] for first, _ in seeds}) == 4


@pytest.mark.parametrize("kind", ["tpe", "random", "gp", "qmc", "nsga2"])
def test_defaults_whose_condition_fails_are_left_out(kind: str) -> None:
    (point,) = ask(kind, CONDITIONAL_DEFAULTS, [], [0], 0)
    assert set(point) == {"optimizer", "beta1", "lr"}
    assert (point["optimizer"], point["beta1"]) == ("adam", 0.9)


@pytest.mark.parametrize("kind", ["tpe", "random", "gp", "qmc", "nsga2"])
def test_start_with_defaults_can_be_switched_off(kind: str) -> None:
    (point,) = ask(kind, WITH_DEFAULTS, [], [0], 0, start_with_defaults=False)
    assert point["lr"] != 1e-3


@pytest.mark.parametrize("kind", ["tpe", "random", "gp", "qmc", "nsga2"])
def test_points_come_first_and_what_they_leave_open_is_sampled(kind: str) -> None:
    given = [{"lr": 0.01}, {"lr": 0.02, "width": 32}]
    first, one, two, three = ask(kind, WITH_DEFAULTS, [], [0, 1, 2, 3], 0, points=given)
    assert first["lr"] == 1e-3  # the defaults
    assert one["lr"] == 0.01
    assert (two["lr"], two["width"]) == (0.02, 32)
    assert three["lr"] not in (0.01, 0.02)
    assert set(one) == set(two) == set(WITH_DEFAULTS)
    (alone,) = ask(kind, WITH_DEFAULTS, [], [0], 0, points=given, start_with_defaults=False)
    assert alone["lr"] == 0.01


def test_a_whole_number_is_a_real_one_where_the_space_has_those() -> None:
    assert [type(p["x"]) for p in queue({"x": Float(0, 2)}, [{"x": 1}], start_with_defaults=False)] == [float]


# -- quasi-random --------------------------------------------------------------------------------------


def test_quasi_random_points_fill_every_sixteenth() -> None:
    """Of 16 points in a row (from a multiple of 16 on) one lies in each sixteenth of each dimension."""
    space = {
        "lr": Float(1e-4, 1e-1), "dropout": Float(0, 1), "width": Int(1, 16),
        "activation": Choice(["relu", "tanh"]), "depth": Int(1, 256, log=True),
    }  # fmt: skip
    points = ask("qmc", space, [], range(16, 32), 0)
    assert sorted(int((math.log10(p["lr"]) + 4) / 3 * 16) for p in points) == list(range(16))  # type: ignore[arg-type]
    assert sorted(int(p["dropout"] * 16) for p in points) == list(range(16))  # type: ignore[operator]
    assert sorted(p["width"] for p in points) == list(range(1, 17))  # type: ignore[type-var]
    assert sum(p["activation"] == "relu" for p in points) == 8
    assert sum(p["depth"] <= 16 for p in points) in (7, 8, 9)  # type: ignore[operator]
    assert points != ask("qmc", space, [], range(16, 32), 0, seed=1)


# -- grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTABLE)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_grid_visits_every_point_once_in_any_rounds(name: str, seed: int) -> None:
    space = SPACES[name]
    size, visited = grids.size(space), []
    for round, start in enumerate(range(0, size, 7)):
        numbers = range(start, min(start + 7, size))
        visited += ask("grid", space, history_of(space), numbers, round, seed=seed)
    assert sorted(plain(visited)) == sorted(plain(list(grids.points(space))))
    assert len(set(plain(visited))) == size


def test_the_grid_knows_no_defaults() -> None:
    space: Space = {"n": Int(1, 50, default=25)}
    assert {ask("grid", space, [], [0], 0, seed=seed)[0]["n"] for seed in range(5)} != {25}


# -- what TPE is for -----------------------------------------------------------------------------------


def search(kind: str, space: Space, f: Callable[[HParams], float], trials: int, seed: int) -> list[Trial]:
    history: list[Trial] = []
    for round, start in enumerate(range(0, trials, 10)):
        numbers = range(start, start + 10)
        points = ask(kind, space, history, numbers, round, seed=seed)
        history += [trial(n, round, p, f(p)) for n, p in zip(numbers, points, strict=True)]
    return history


def test_tpe_finds_the_top_of_a_parabola_better_than_random_search() -> None:
    space: Space = {name: Float(-5, 5) for name in ("x", "y", "z")}

    def f(point: Mapping[str, Any]) -> float:
        return -((point["x"] - 2) ** 2 + (point["y"] + 1) ** 2 + (point["z"] - 3) ** 2)

    best = {
        kind: [max(map(f, (t.hparams for t in search(kind, space, f, 60, seed)))) for seed in range(4)]
        for kind in ("tpe", "random")
    }
    assert np.median(best["tpe"]) > np.median(best["random"]) / 2  # half as far below the top, which is 0
    assert np.mean(best["tpe"]) > np.mean(best["random"])


def test_minimizing_is_the_other_way_round() -> None:
    space: Space = {"x": Float(-5, 5)}
    points = ask("random", space, [], range(40), 0)
    low = Objective(metric=OBJECTIVE.metric, direction="minimize")
    history = [trial(n, 0, p, p["x"]) for n, p in enumerate(points)]  # type: ignore[arg-type]
    suggested = {
        objective.direction: suggest(
            space, history, range(40, 50), round=1, kind="tpe", objective=objective, seed=0
        )
        for objective in (OBJECTIVE, low)
    }
    assert np.mean([point["x"] for point in suggested["minimize"]]) < -2  # type: ignore[arg-type]
    assert np.mean([point["x"] for point in suggested["maximize"]]) > 2  # type: ignore[arg-type]


def share_in_dead_region(state: TrialState | None) -> float:
    """How much of TPE's next round lies at x > 0.6, when every trial above 0.5 ended in `state` (None: none
    did). Between the two its kernels spill over, as they do for trials that are merely bad.

    The finished trials are better the nearer they are to 0.5, so that there is every reason to try beyond.
    """
    space: Space = {"x": Float(0, 1), "y": Float(0, 1)}
    history = []
    for n, point in enumerate(ask("random", space, [], range(80), 0, seed=5)):
        x = point["x"]
        assert isinstance(x, float)
        if x <= 0.5:
            history.append(trial(n, n // 10, point, x))
        elif state is not None:
            history.append(trial(n, n // 10, point, None, state))
    points = ask("tpe", space, history, range(80, 110), 8)
    return float(np.mean([point["x"] > 0.6 for point in points]))  # type: ignore[operator]


@pytest.mark.parametrize("state", [TrialState.FAILED, TrialState.INFEASIBLE, TrialState.PRUNED])
def test_tpe_keeps_away_from_where_every_trial_failed(state: TrialState) -> None:
    assert share_in_dead_region(state) <= 0.1
    assert share_in_dead_region(None) >= 0.2  # so it is the dead trials that keep it away


def test_that_test_sees_a_sampler_that_learns_nothing_from_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(samplers._OPTUNA_STATES, TrialState.FAILED, "FAIL")  # type: ignore[arg-type]
    assert share_in_dead_region(TrialState.FAILED) > 0.1


def test_parts_are_told_apart_from_once_without_the_rule_on_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of parts with the whole must notice a round that sees its own results."""
    monkeypatch.setattr(samplers.dataclasses, "replace", lambda trial, **changes: trial)
    with pytest.raises(AssertionError):
        test_asking_in_two_parts_is_asking_once("tpe", "log")
    with pytest.raises(AssertionError):
        test_what_became_of_the_same_round_does_not_matter("tpe", "log")


# -- the study -----------------------------------------------------------------------------------------


def test_make_study_shows_every_trial_with_its_values() -> None:
    import optuna

    space = SPACES["conditions"]
    history = [*history_of(space), trial(12, 2, history_of(space)[0].hparams, None, TrialState.FAILED)]
    study = make_study(space, history, OBJECTIVE)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert [t.user_attrs["hpt_torch/number"] for t in study.trials] == [t.number for t in history]
    assert [t.value for t in study.trials] == [OBJECTIVE.score(t) for t in history]
    assert [set(t.params) for t in study.trials] == [set(t.hparams) for t in history]
    assert study.best_value == max(t.value for t in study.trials if t.value is not None)


def test_imputed_failures_have_the_worst_score() -> None:
    space = SPACES["log"]
    history = history_of(space)
    history.append(trial(12, 1, history[0].hparams, None, TrialState.FAILED))
    study = make_study(space, history, OBJECTIVE, impute=True)
    assert study.trials[-1].value == min(t.value for t in study.trials[:-1])


def test_every_space_here_can_be_written_in_a_recipe() -> None:
    assert all(dump_dimension(dimension) for space in SPACES.values() for dimension in space.values())


if __name__ == "__main__":
    print(json.dumps(everything(sys.argv[1:])))
