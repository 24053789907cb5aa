"""Points added to a run, trials stopped, budgets extended: while it runs, and between its sessions."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, canonical_of
from test_race import RACE
from test_resume import PowerSwitch
from torch import Tensor, nn
from typer.testing import CliRunner

from hpt_torch.cli import app
from hpt_torch.executors import processes
from hpt_torch.models import MLP
from hpt_torch.record import Record
from hpt_torch.steering import STOPPED, ask
from hpt_torch.tasks import Classification
from hpt_torch.types import RunError, RunMismatchError, TrialState

RunQuick = Callable[..., str]


def trials_of(path: Path) -> list[Any]:
    with Record(path / "run.db", readonly=True) as record:
        return record.in_order()


def hpt(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


class _At:
    """Asks something of the run, once, when a trial has so many reports."""

    def __init__(self, trial: int, epoch: int, asks: Callable[[], object]) -> None:
        self.trial, self.epoch, self.asks, self.said = trial, epoch, asks, list[str]()

    def started(self, tuner: object) -> None: ...
    def ended(self, tuner: object) -> None: ...
    def recorded(self, tuner: object, events: Any) -> None:
        for event in events:
            body, asks = event.body, self.asks
            if event.kind.endswith("report") and (body["trial"], body["epoch"]) == (self.trial, self.epoch):
                self.asks = lambda: None
                asks()

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpt_torch.steering._POLL_SECONDS", 0.0)


class _Slow(Classification):
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        time.sleep(0.02)
        return super().loss(model, batch, hparams)


# -- add -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
def test_an_added_point_is_tried_next_and_takes_nobodys_place(
    tmp_path: Path, run_quick: RunQuick, sampler: str
) -> None:
    space = "{choice=[0.001, 0.002, 0.004, 0.008]}" if sampler == "grid" else "{float=[1e-4, 0.1]}"
    settings = (f"search.sampler={sampler}", "search.round_size=2", "search.trials=4", f"space.lr={space}")
    settings += ("dropout=0.0", "activation=relu") if sampler == "grid" else ()
    lr = 0.004 if sampler == "grid" else 0.07
    run_quick(tmp_path / "calm", *settings)
    path = tmp_path / "run"
    at = _At(0, 1, lambda: ask(path, "add", {"point": {"lr": lr}}))
    run_quick(path, *settings, observers=[at])
    calm, steered = trials_of(tmp_path / "calm"), trials_of(path)
    assert [t.state for t in steered] == [TrialState.COMPLETE] * 5
    assert steered[2].hparams["lr"] == lr
    assert set(steered[2].hparams) == set(calm[0].hparams)
    if sampler != "tpe":  # which learns from it
        assert [t.hparams for t in steered[:2] + steered[3:]] == [t.hparams for t in calm]
    assert [t.round for t in steered] == [0, 0, 0, 1, 1]
    assert f"a point is added: lr = {lr}" in at.said
    assert not list((path / "requests").iterdir())


def test_a_run_that_has_ended_goes_on_for_what_is_asked(tmp_path: Path, run_quick: RunQuick) -> None:
    path = tmp_path / "run"
    before = run_quick(path, "search.trials=3")
    ask(path, "add", {"point": {"lr": 0.05}})
    with pytest.raises(RunMismatchError, match="its hold-out rows were read"):
        run_quick(path, "search.trials=3")
    assert canonical_of(path) == before
    run_quick(path, "search.trials=3", reopen_holdout=True)
    assert len(trials_of(path)) == 4
    ask(path, "extend", {"trials": 2, "seconds": 0.0})
    run_quick(path, "search.trials=3", reopen_holdout=True)
    assert len(trials_of(path)) == 6
    whole = canonical_of(path)
    assert run_quick(path, "search.trials=3") == whole  # nothing is left to do, and it knows


@pytest.mark.slow
def test_power_cuts_while_a_run_is_steered(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("search.trials=3", "search.round_size=3", "trainer.engine=loop", "trainer.epochs=2")

    def run(path: Path) -> str:
        def asks() -> None:
            if not (path / "requests").exists():
                ask(path, "add", {"point": {"lr": 0.05}})
                ask(path, "stop", {"trial": 2})
                ask(path, "extend", {"trials": 1, "seconds": 0.0})

        if (path / "run.db").exists() and any(trial.reports for trial in trials_of(path)):
            asks()  # the power went off just before
        return run_quick(path, *settings, observers=[_At(0, 1, asks)])

    switch = PowerSwitch(monkeypatch)
    expected = run(tmp_path / "whole")
    assert len(json.loads(expected)["trials"]) == 5
    for step in range(1, switch.count + 1, 2):
        for after in (False, True):  # after a commit, and before the request that it records is put away
            path = tmp_path / f"{step}-{after}"
            got = switch.cut(step, after, functools.partial(run, path))
            assert not list((path / "requests").iterdir()), step
            assert got == expected, (step, after)


# -- stop ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_a_stopped_trial_leaves_and_the_others_do_not_notice(
    tmp_path: Path, run_quick: RunQuick, engine: str, workers: int
) -> None:
    if workers and not processes.supported():
        pytest.skip("workers are forked, on Linux only")
    settings = [
        "search.trials=4", "search.round_size=4", f"trainer.engine={engine}", "activation=relu",
        "trainer.epochs=40", "hidden_sizes=[16]", "search.sampler=random",
    ]  # fmt: skip
    settings += ["executor=processes", f"run.workers={workers}"] if workers else ["executor=inline"]
    calm = json.loads(run_quick(tmp_path / "calm", *settings))
    path = tmp_path / "run"
    at = _At(1, 2, lambda: ask(path, "stop", {"trial": 1}))
    run_quick(path, *settings, observers=[at])
    trials = trials_of(path)
    assert trials[1].state is TrialState.PRUNED
    assert trials[1].reason == STOPPED
    assert 2 <= trials[1].epoch < 40
    for number in (0, 2, 3):
        assert trials[number].weights_sha256 == calm["trials"][number]["weights_sha256"]
    assert "trial 1 is stopped" in at.said


@pytest.mark.slow
def test_a_stop_in_a_race_and_with_folds(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "calm", "trainer.engine=fused", raw=RACE)
    best = next(t for t in trials_of(tmp_path / "calm") if t.state is TrialState.COMPLETE)
    folds = ("evaluation.folds=3", "trainer.epochs=20", "search.trials=3")
    for name, number, settings, raw in (
        ("race", best.number, ("trainer.engine=fused",), RACE),
        ("folds", 2, folds, QUICK),
    ):
        path = tmp_path / name
        at = _At(number, 2, functools.partial(ask, path, "stop", {"trial": number}))
        run_quick(path, *settings, raw=raw, observers=[at])
        trials = trials_of(path)
        assert (trials[number].state, trials[number].reason) == (TrialState.PRUNED, STOPPED), name
        assert all(trial.state.is_finished for trial in trials)
        assert any(trial.state is TrialState.COMPLETE for trial in trials)


@pytest.mark.slow
def test_more_time_for_a_run_whose_time_is_used_up(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    settings = ("search.trials=3", "trainer.epochs=20", "executor=inline", "search.timeout=1s")
    task, path = _Slow(MLP, digits_task.data()), tmp_path / "run"
    run_quick(path, *settings, task=task)
    assert any(trial.state is TrialState.PAUSED for trial in trials_of(path))
    ask(path, "extend", {"trials": 0, "seconds": 60.0})
    run_quick(path, *settings, task=task, reopen_holdout=True)
    assert [trial.state for trial in trials_of(path)] == [TrialState.COMPLETE] * 3


# -- what is refused -----------------------------------------------------------------------------------


def test_what_cannot_be_asked(tmp_path: Path, run_quick: RunQuick) -> None:
    path = tmp_path / "run"
    run_quick(path, "search.trials=2")
    for kind, body, why in (
        ("stop", {"trial": 9}, "there is no trial 9 among its 2"),
        ("stop", {"trial": 1}, "trial 1 has ended: it is COMPLETE"),
        ("add", {"point": {"depth": 3}}, "depth is not searched; [space] has"),
        ("add", {"point": {"lr": 70.0}}, "lr must lie in"),
        ("add", {"point": {}}, "must name at least one hyperparameter"),
        ("extend", {"trials": 0, "seconds": 9.0}, "it has no search.timeout to extend"),
    ):
        with pytest.raises(RunError) as error:
            ask(path, kind, body)
        assert why in str(error.value)
    grid = {**QUICK, "space": {"lr": {"choice": [0.1, 0.2]}}, "search": {"sampler": "grid"}}
    run_quick(tmp_path / "grid", raw=grid)
    with pytest.raises(RunError, match="all points of its space are in it"):
        ask(tmp_path / "grid", "extend", {"trials": 2, "seconds": 0.0})
    with pytest.raises(RunError, match="not a run directory"):
        ask(tmp_path / "nothing", "stop", {"trial": 0})
    assert not (path / "requests").exists()


def test_a_request_that_is_none_is_put_away(tmp_path: Path, run_quick: RunQuick) -> None:
    expected = run_quick(tmp_path / "run", "search.trials=2")
    requests = tmp_path / "run" / "requests"
    requests.mkdir()
    bodies = {
        "1.add": b"{}", "2.add": b'{"point": 3}', "3.stop": b'{"trial": true}', "4.stop": b"\xff", "5": b"{}",
        "6.extend": b'{"trials": -5, "seconds": 0}', "7.extend": b'{"trials": 1, "seconds": NaN}',
        "8.add": b"[" * 9000, "9.add": b'{"point": {"lr": 0.01}}' + b" " * 10_000, "10.stop": b'{"trial": 0}',
        "11.add": b'{"point": {"lr": "x"}}', "12.run": b"{}",
    }  # fmt: skip
    (requests / "13.stop").mkdir()
    for name, body in bodies.items():
        (requests / name).write_bytes(body)
    at = _At(0, 0, lambda: None)
    assert run_quick(tmp_path / "run", "search.trials=2", observers=[at], reopen_holdout=True) == expected
    assert sum("is no request" in line for line in at.said) == 10
    assert sum("is refused" in line for line in at.said) == 2
    assert [file.name for file in requests.iterdir()] == ["13.stop"]  # a folder is nobody's request


# -- the command line ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands(tmp_path: Path, run_quick: RunQuick, digits_task: Classification) -> None:
    path = tmp_path / "run"
    said: dict[str, tuple[int, str]] = {}

    def steers() -> None:
        while not any(trial.reports for trial in trials_of(path)):
            time.sleep(0.02)
        said["stop"] = hpt("stop", str(path), "0")
        said["extend"] = hpt("extend", str(path), "trials=+1")

    thread = threading.Thread(target=steers)
    path.mkdir()
    Record(path / "run.db").close()
    thread.start()
    settings = ("search.trials=2", "search.round_size=1", "trainer.epochs=8", "executor=inline")
    task = _Slow(MLP, digits_task.data())
    run_quick(path, *settings, task=task)
    thread.join()
    assert said["stop"] == (0, f"{path}: taken up\n")
    assert said["extend"][0] == 0
    assert [t.state.value for t in trials_of(path)] == ["PRUNED", "COMPLETE", "COMPLETE"]
    code, text = hpt("add", str(path), "lr=0.02", "activation=tanh")
    assert code == 0
    command = f"hpt run {path / 'recipe.toml'} --run-dir {path} --reopen-holdout"
    assert text == f"{path}: nobody runs it now; it is taken up by: {command}\n"
    run_quick(path, *settings, task=task, reopen_holdout=True)
    assert trials_of(path)[3].hparams.items() >= {"lr": 0.02, "activation": "tanh"}.items()
    for arguments, why in (
        (["add", "lr"], "must look like lr=0.01"),
        (["extend", "trials=50"], "must be trials=+N or timeout=+TIME"),
        (["extend", "trials=+0"], "must be trials=+N"),
        (["extend", "timeout=+soon"], "must be a duration"),
        (["stop", "17"], "there is no trial 17"),
    ):
        code, text = hpt(arguments[0], str(path), *arguments[1:])
        assert code != 0
        assert why in " ".join(text.split()), text
