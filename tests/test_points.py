"""Points that the user brings, by hand or from another run, are tried first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK

from hpt_torch.points import check_points, queue
from hpt_torch.record import Record
from hpt_torch.space import Choice, Float
from hpt_torch.types import Problem, RecipeError, Trial

RunQuick = Callable[..., str]


def trials_of(path: Path) -> list[Trial]:
    with Record(path / "run.db", readonly=True) as record:
        return record.in_order()


def test_points_of_a_recipe_are_tried_after_the_defaults(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run", "search.points=[{lr = 0.02}, {lr = 0.03, activation = 'tanh'}]")
    trials = trials_of(tmp_path / "run")
    assert [t.hparams["lr"] for t in trials[:3]] == [1e-3, 0.02, 0.03]
    assert trials[2].hparams["activation"] == "tanh"
    assert trials[3].hparams["lr"] not in (1e-3, 0.02, 0.03)


def test_a_run_starts_with_the_best_of_another(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "old")
    ranked = sorted(trials_of(tmp_path / "old"), key=lambda t: (-t.metrics["valid/accuracy"], t.number))
    settings = [f"search.warm_start={tmp_path / 'old'}", "search.warm_start_trials=2"]
    expected = run_quick(tmp_path / "new", *settings)
    trials = trials_of(tmp_path / "new")
    assert [t.hparams for t in trials[1:3]] == [t.hparams for t in ranked[:2]]
    recipe = (tmp_path / "new" / "recipe.toml").read_text()
    assert "warm_start =" not in recipe  # it stands for itself: the other run may go
    assert run_quick(tmp_path / "new", *settings) == expected
    run_quick(tmp_path / "old", "search.trials=20", reopen_holdout=True)
    assert run_quick(tmp_path / "new", *settings) == expected
    shutil.rmtree(tmp_path / "old")
    assert run_quick(tmp_path / "new", *settings) == expected
    for other in ("search.warm_start_trials=1", "search.points=[{lr = 0.02}]"):
        with pytest.raises(RecipeError, match="search.warm_start: .*old is not a run directory"):
            run_quick(tmp_path / "new", *settings, other)


def test_what_this_space_has_no_room_for_is_left_open(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "old")
    narrow = ["space.lr={float = [1.0, 2.0]}", f"search.warm_start={tmp_path / 'old'}"]
    run_quick(tmp_path / "new", *narrow, "search.start_with_defaults=false")
    old = {t.hparams["dropout"] for t in trials_of(tmp_path / "old")}
    trials = trials_of(tmp_path / "new")
    assert {t.hparams["dropout"] for t in trials} == old
    assert all(1 <= t.hparams["lr"] <= 2 for t in trials)  # type: ignore[operator]


def test_another_run_without_anything_to_take(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "old", "search.trials=1")
    other = {**QUICK, "space": {"label_smoothing": {"float": [0.0, 0.1]}}}
    with pytest.raises(RecipeError, match=r"search.warm_start: must have complete trials"):
        run_quick(tmp_path / "new", f"search.warm_start={tmp_path / 'old'}", raw=other)
    assert not (tmp_path / "new").exists()


def test_without_declared_defaults_the_points_are_first(tmp_path: Path, run_quick: RunQuick) -> None:
    space = "space.lr={float = [1e-4, 1e-1]}"
    run_quick(tmp_path / "run", space, "search.points=[{lr = 0.02}]", "search.trials=1")
    assert [t.hparams["lr"] for t in trials_of(tmp_path / "run")] == [0.02]


CONDITIONAL = {
    "nesterov": Choice([True, False], when={"momentum": (0.5, 0.9)}),
    "momentum": Choice([0.5, 0.7, 0.9], when={"optimizer": ("sgd",)}),
    "optimizer": Choice(["adam", "sgd", "rmsprop"]),
    "lr": Float(1e-3, 1e-1),
}


def test_a_point_is_completed_by_what_its_values_are_read_under() -> None:
    points = [{"nesterov": True}, {"momentum": 0.7}, {"lr": 0.01}, {"nesterov": True, "momentum": 0.9}]
    assert check_points(points, CONDITIONAL) == []
    assert queue(CONDITIONAL, points, start_with_defaults=True) == [
        {"nesterov": True, "momentum": 0.5, "optimizer": "sgd"},
        {"momentum": 0.7, "optimizer": "sgd"},
        {"lr": 0.01},
        {"nesterov": True, "momentum": 0.9, "optimizer": "sgd"},
    ]


@pytest.mark.parametrize(
    ("point", "where", "what"),
    [
        (
            {"momentum": 0.5, "optimizer": "adam"},
            "search.points.0.momentum",
            "is read only where optimizer is sgd, and the point has adam; leave one of them out",
        ),
        (
            {"nesterov": True, "momentum": 0.7},
            "search.points.0.nesterov",
            "is read only where momentum is 0.5 or 0.9, and the point has 0.7; leave one of them out",
        ),
    ],
)
def test_a_point_with_a_value_that_nothing_reads_is_refused(
    point: dict[str, Any], where: str, what: str
) -> None:
    assert check_points([point], CONDITIONAL) == [Problem(where, what)]


def test_more_points_than_trials_are_refused(tmp_path: Path, run_quick: RunQuick) -> None:
    with pytest.raises(RecipeError, match=r"search.trials: must be at least 3, so that the points"):
        run_quick(tmp_path / "run", "search.points=[{lr = 0.02}, {lr = 0.03}]", "search.trials=2")
    assert not (tmp_path / "run").exists()
