"""Points that the user brings, by hand or from another run, are tried first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK

from hpt_torch.record import Record
from hpt_torch.types import RecipeError, Trial

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
