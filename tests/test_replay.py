"""The schedule that a population ends with, taken away and trained again; and what pbt is compared with."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import canonical_of
from test_evolution import POPULATION, record_of
from test_resume import Killed, PowerSwitch
from typer.testing import CliRunner

from hpt_torch import baselines, session
from hpt_torch import recipe as recipes
from hpt_torch.cli import app
from hpt_torch.replay import Replay, replay
from hpt_torch.report.population import BASELINES
from hpt_torch.result import Result
from hpt_torch.tasks import Task
from hpt_torch.types import Objective, RecipeError, RunError

LOOP: dict[str, Any] = {**POPULATION, "trainer": {**POPULATION["trainer"], "engine": "loop"}}
HIGHER = Objective(metric="valid/accuracy", direction="maximize")


def _run(raw: dict[str, Any], task: Task, path: Path) -> Result:
    baselines.run(session.check(recipes.build(raw, source="test"), task, source="test"), path)
    return Result(path, task)


@pytest.mark.slow
def test_the_exported_schedule_gives_the_winners_weights_bit_for_bit(
    tmp_path: Path, digits_task: Task
) -> None:
    """Trained by the member with which the winner's lineage began, alone and without a single copy: the
    lineage, its export and its replay say the same. Batch sizes change on the way."""
    result = _run({**LOOP, "trainer": {**LOOP["trainer"], "epochs": 6}}, digits_task, tmp_path / "pbt")
    exported = tomllib.loads((tmp_path / "pbt/best/schedule.toml").read_text())
    changes = exported["scheduler"]["changes"]
    assert len(changes) >= 2
    assert any("batch_size" in change for change in changes)
    rows = (tmp_path / "pbt/best/schedule.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", *map(str, range(1, 7))]
    ancestor = int(rows[1].split(",")[1])
    replayed = _run({**exported, "search": {"trials": ancestor + 1}}, digits_task, tmp_path / "schedule")
    twin = replayed.trials[ancestor]
    assert twin.weights_sha256 == result.best.weights_sha256
    assert dict(twin.metrics) == dict(result.best.metrics)
    assert twin.hparams == {name: result.hparams()[name] for name in twin.hparams}


@pytest.mark.slow
def test_replays_differ_in_their_seeds_and_share_the_split(tmp_path: Path, digits_task: Task) -> None:
    result = _run(LOOP, digits_task, tmp_path / "run")
    before = canonical_of(tmp_path / "run")
    found = replay(tmp_path / "run", digits_task, seeds=3)
    assert found.score == HIGHER.score(result.best)
    assert len(found.scores) == len(found.holdouts) == 3
    folders = sorted((tmp_path / "run/replays").iterdir())
    weights, data = set(), set()
    for folder in folders:
        with record_of(folder) as record:
            weights.add(record.trials[0].weights_sha256)
            data.add(json.dumps(record.of_kind("run")[0].body["data"]))
    assert len(weights) == 3
    with record_of(tmp_path / "run") as record:
        assert data == {json.dumps(record.of_kind("run")[0].body["data"])}
    again = {folder: (folder / "run.db").stat().st_mtime_ns for folder in folders}
    assert result.replay(3, progress=False) == found  # nothing is trained again
    with record_of(folders[0]) as record:
        assert record.trials[0].epoch == 4
    assert set(again) == set((tmp_path / "run/replays").iterdir())
    assert canonical_of(tmp_path / "run") == before


@pytest.mark.slow
def test_a_killed_replay_goes_on(tmp_path: Path, digits_task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = PowerSwitch(monkeypatch)
    _run(LOOP, digits_task, tmp_path / "run")
    first = switch.count
    expected = replay(tmp_path / "run", digits_task, seeds=2)
    for step in range(2, switch.count - first, 15):
        other = tmp_path / str(step)
        _run(LOOP, digits_task, other)
        switch.arm(step, bool(step % 2))
        with pytest.raises(Killed):
            replay(other, digits_task, seeds=2)
        assert replay(other, digits_task, seeds=2) == expected


def test_replay_of_what_has_no_best(tmp_path: Path, digits_task: Task) -> None:
    raw = {
        **LOOP,
        "hparams": {"hidden_sizes": [8], "optimizer": "sgd"},
        "space": {"lr": {"choice": [1e5, 1e6]}},
    }
    _run(raw, digits_task, tmp_path / "run")
    with pytest.raises(RunError, match="no complete trial to replay"):
        replay(tmp_path / "run", digits_task)


def test_what_only_another_optimizer_reads_is_left_out(tmp_path: Path, digits_task: Task) -> None:
    """A run that searches the optimizer records sgd's momentum, and adam may be the best."""
    point = {"optimizer": "adam"}
    raw = {
        **LOOP,
        "scheduler": {},
        "space": {"optimizer": {"choice": ["sgd", "adam"]}, "lr": {"float": [1e-9, 1e-8]}},
        "hparams": {"hidden_sizes": [8], "batch_size": 256, "momentum": 0.5},
        "search": {"trials": 2, "start_with_defaults": False, "points": [point, point]},
        "trainer": {**LOOP["trainer"], "epochs": 1},
    }
    _run(raw, digits_task, tmp_path / "run")
    assert len(replay(tmp_path / "run", digits_task, seeds=1).scores) == 1
    (folder,) = (tmp_path / "run/replays").iterdir()
    with record_of(folder) as record:
        hparams = record.of_kind("run")[0].body["recipe"]["hparams"]
    assert hparams["optimizer"] == "adam"
    assert "beta1" in hparams
    assert not {"momentum", "nesterov"} & set(hparams)


def _replay(score: float, scores: list[float], objective: Objective = HIGHER) -> Replay:
    return Replay(objective=objective, score=score, holdout=None, scores=scores, holdouts=[], failed=0)


def test_the_verdict_is_students_t() -> None:
    found = _replay(0.9, [0.8, 0.9, 1.0])
    assert found.interval == pytest.approx((0.9 - 4.302653 * 0.1 / 3**0.5, 0.9 + 4.302653 * 0.1 / 3**0.5))
    assert found.reaching == 2
    assert "made the run's figure" in found.verdict
    assert "flattered" in _replay(0.99, [0.90, 0.91, 0.92]).verdict
    lower = Objective(metric="valid/loss", direction="minimize")
    assert "flattered" in _replay(0.1, [0.30, 0.31, 0.32], lower).verdict
    assert _replay(0.5, [0.30, 0.31, 0.32], lower).reaching == 3
    assert "0 of 1 replays" in _replay(0.9, [0.8]).verdict
    assert "failed" in _replay(0.9, []).verdict


@pytest.mark.slow
def test_baselines_are_ordinary_runs_at_equal_compute(tmp_path: Path, digits_task: Task) -> None:
    with_baselines = {**LOOP, "scheduler": {**LOOP["scheduler"], "baseline": True}}
    _run(with_baselines, digits_task, tmp_path / "run")
    _run(LOOP, digits_task, tmp_path / "alone")
    assert canonical_of(tmp_path / "run") == canonical_of(tmp_path / "alone")
    folder = tmp_path / "run" / BASELINES
    raw: dict[str, Any] = {**LOOP, "scheduler": {}}
    _run(raw, digits_task, tmp_path / "random")
    assert canonical_of(folder / "random") == canonical_of(tmp_path / "random")
    trials = json.loads(canonical_of(folder / "exploit_only"))["trials"]
    assert sum(trial["epoch"] for trial in trials) == 6 * 4
    first = {
        json.dumps(trial["phases"][0]["hparams"] if trial["phases"] else trial["hparams"]) for trial in trials
    }
    assert {json.dumps(p["hparams"]) for trial in trials for p in trial["phases"]} <= first
    text = (tmp_path / "run/report.html").read_text()
    assert "At equal compute" in text
    assert "pbt without explore" in text
    assert "Lineage and schedules" in text
    assert "At equal compute" not in (tmp_path / "alone/report.html").read_text()


@pytest.mark.slow
def test_baselines_can_be_asked_for_later(tmp_path: Path, digits_task: Task) -> None:
    _run(LOOP, digits_task, tmp_path / "run")
    before = canonical_of(tmp_path / "run")
    _run({**LOOP, "scheduler": {**LOOP["scheduler"], "baseline": True}}, digits_task, tmp_path / "run")
    assert canonical_of(tmp_path / "run") == before
    assert {folder.name for folder in (tmp_path / "run" / BASELINES).iterdir()} == {"random", "exploit_only"}


def test_the_command_says_whether_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'name = "small"\n[hparams]\nhidden_sizes = [8]\n[space]\nlr = { float = [1e-3, 1e-1] }\n'
        '[search]\nsampler = "random"\ntrials = 3\n[trainer]\nepochs = 2\n[run]\ntensorboard = false\n'
    )
    assert CliRunner().invoke(app, ["run", "small.toml", "--quiet"]).exit_code == 0
    shown = CliRunner().invoke(app, ["replay", "runs/small", "--seeds", "2", "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert "of 2 replays reach the run's valid/accuracy" in shown.output
    assert shown.output.count("hold-out") == 1


@pytest.mark.parametrize(
    ("scheduler", "where", "what"),
    [
        ({"kind": "schedule"}, "scheduler.changes", "must be given"),
        ({"changes": [{"after": 1, "lr": 0.1}]}, "scheduler.changes", "kind = schedule"),
        ({"kind": "schedule", "changes": [{"lr": 0.1}]}, "scheduler.changes.0.after", "above 0"),
        (
            {"kind": "schedule", "changes": [{"after": 1}]},
            "scheduler.changes.0",
            "must name a hyperparameter",
        ),
        (
            {"kind": "schedule", "changes": [{"after": 4, "lr": 0.1}]},
            "changes.0.after",
            "below trainer.epochs (4)",
        ),
        (
            {"kind": "schedule", "changes": [{"after": 2, "lr": 0.1}, {"after": 2, "lr": 0.2}]},
            "scheduler.changes.1.after",
            "above 2",
        ),
        ({"kind": "schedule", "changes": [{"after": 1, "lr": -0.1}]}, "scheduler.changes.0.lr", "-0.1"),
        ({"kind": "schedule", "changes": [{"after": 1, "l_r": 0.1}]}, "changes.0.l_r", "did you mean lr"),
        (
            {"kind": "schedule", "changes": [{"after": 1, "hidden_sizes": [4]}]},
            "hidden_sizes",
            "cannot change",
        ),
        ({"baseline": True}, "scheduler.baseline", "needs kind = pbt"),
    ],
)
def test_wrong_schedules_are_named(digits_task: Task, scheduler: Any, where: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        session.check(
            recipes.build({**LOOP, "scheduler": scheduler}, source="test"), digits_task, source="test"
        )
    text = "\n".join(map(str, caught.value.problems))
    assert where in text
    assert what in text
