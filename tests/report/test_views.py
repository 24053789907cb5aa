"""What the views of a run say alike: text, markdown, JSON and the Python API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK
from test_page import Run
from typer.testing import CliRunner

from hpt_torch.cli import app
from hpt_torch.record import Event
from hpt_torch.report import summarise
from hpt_torch.report.figures import Plots
from hpt_torch.report.terminal import show_value
from hpt_torch.result import Result
from hpt_torch.types import TrialState

SPACE = {"lr": {"float": [1e-4, 1e-1], "log": True}}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", SPACE)


def report(path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["report", str(path), *options], catch_exceptions=False)
    return " ".join(done.stdout.split())


def test_the_interval_of_the_holdout_figure_is_the_same_everywhere(run: Run) -> None:
    """Wilson's for a share of rows, whatever the bootstrap has; the bootstrap's for what is no share."""
    run.trial(0, [0.9], lr=0.01)
    run.end(0)
    run.best_file()
    body: dict[str, Any] = {
        "trial": 0,
        "metrics": {"holdout/accuracy": 0.9, "holdout/loss": 0.3},
        "rows": 100,
    }
    bootstrap = {"holdout/accuracy": [0.7, 0.71], "holdout/loss": [0.2, 0.4]}
    run.record.append(Event(kind="holdout", body=body | {"interval": bootstrap}))
    told = json.loads(report(run.path, "--json"))["holdout"]["interval"]
    low, high = told["holdout/accuracy"]
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert (low, high) == summarise(run.record).holdout_bounds
    assert f"95 % interval {low:.4f} to {high:.4f}" in report(run.path)
    assert f"({low:.4f} to {high:.4f})" in report(run.path, "--format", "md")
    assert told["holdout/loss"] == [0.2, 0.4]


def test_only_what_failed_or_was_infeasible_ended_badly(run: Run) -> None:
    """A pruned trial has a reason too, and nothing is wrong with it."""
    for number in range(4):
        run.trial(number, [0.9], lr=0.01)
    run.end(0)
    run.best_file()
    run.end(1, TrialState.PRUNED, "below the median")
    assert "ended badly" not in report(run.path)
    run.end(2, TrialState.FAILED, "Traceback:\nValueError: loss is nan")
    assert "1 trial ended badly; the first, trial 2: ValueError: loss is nan" in report(run.path)
    run.end(3, TrialState.INFEASIBLE, "kernel larger than input")
    assert "2 trials ended badly; the first, trial 2: ValueError: loss is nan" in report(run.path)


@pytest.mark.slow
def test_that_the_time_was_used_up_is_told_where_no_trial_is_complete(tmp_path: Path) -> None:
    """And no model is named where there is none."""
    recipe, run = tmp_path / "short.toml", tmp_path / "run"
    recipe.write_text(
        'name = "short"\nexecutor = "inline"\n[task]\nmodel = "linear"\ndata = "iris"\n'
        '[space]\nlr = { float = [0.01, 0.1] }\n[search]\nsampler = "random"\ntimeout = "0.1s"\n'
        '[trainer]\nepochs = 1000000\ndevice = "cpu"\n[run]\ntensorboard = false\n'
    )
    told = "No trial is complete yet: search.timeout is used up. Go on with a larger one"
    done = CliRunner().invoke(app, ["run", str(recipe), "--run-dir", str(run), "--quiet"])
    assert done.exit_code == 0, done.output
    assert told in done.stdout
    assert "Best model" not in done.stdout
    assert told in report(run, "--format", "md")
    assert told in (run / "report.html").read_text(encoding="utf-8")


def test_a_schedule_leaves_the_searched_values_in_sight(
    run_quick: Callable[..., str], tmp_path: Path
) -> None:
    """What all trials change to on the way may lie outside of the space, and tells no trial from another."""
    path, scheduler = tmp_path / "run", {"kind": "schedule", "changes": [{"after": 1, "lr": 0.5}]}
    raw = {**QUICK, "space": {"lr": {"float": [0.01, 0.1]}}, "scheduler": scheduler}
    run_quick(path, raw=raw)
    result = Result(path)
    searched = [trial.phases[0].hparams["lr"] for trial in result.trials]
    assert len(set(searched)) == len(searched)
    assert [trial.hparams["lr"] for trial in result.trials] == [0.5] * len(searched)
    assert [trial.params["lr"] for trial in result.study.trials] == searched
    assert isinstance(result.plot, Plots)  # which has a study of its own
    best = show_value(searched[result.best.number])
    table, page = report(path, "--format", "md"), (path / "report.html").read_text(encoding="utf-8")
    for lr in map(show_value, searched):
        assert f" {lr} " in table
        assert f" {lr} " in report(path)
        assert f"<td>{lr}</td>" in page
    assert f"lr = {best}" in report(path)
    assert [row.split(",")[2] for row in result.to_csv().splitlines()[1:]] == [str(lr) for lr in searched]
    assert result.hparams()["lr"] == 0.5  # what its weights were trained with last
