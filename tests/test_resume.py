"""Killed at any durable step, or at any instant, and continued: the same canonical report."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Ear, canonical_of

from hpt_torch import checkpoint, recipe, rundir, session
from hpt_torch.record import Record
from hpt_torch.tuner import Tuner
from hpt_torch.types import Interrupted, RunError, TrialState

RunQuick = Callable[..., str]
HPT = [sys.executable, "-c", "from hpt_torch.cli import main; main()"]


class Killed(BaseException):
    """Stands for the power going off: nothing of hpt_torch may catch it and go on."""


class PowerSwitch:
    """Counts durable steps (commits, atomic files) and cuts the power before or after the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.after, self.count = -1, False, 0
        append, write = Record.append, checkpoint.write_atomic
        monkeypatch.setattr(
            Record, "append", lambda record, *events: self._step(lambda: append(record, *events))
        )
        for module in (checkpoint, rundir):
            monkeypatch.setattr(
                module, "write_atomic", lambda path, data: self._step(lambda: write(path, data))
            )

    def arm(self, step: int, after: bool) -> None:
        self.left, self.after = step, after

    def cut(self, step: int, after: bool, run: Callable[[], str]) -> str:
        """What `run` gives when it is run again after the power went off at this step."""
        self.arm(step, after)
        with pytest.raises(Killed):
            run()
        self.arm(-1, after)
        return run()

    def _step(self, action: Callable[[], Any]) -> None:
        self.count += 1
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        action()
        if self.left == 0:
            raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "engine"), [("tpe", "loop"), ("random", "loop"), ("random", "fused"), ("gp", "loop")]
)
def test_power_cut_at_durable_steps(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch, sampler: str, engine: str
) -> None:
    """Before and after commits and files: cut, continue, compare. State is saved at every step."""
    settings = [f"search.sampler={sampler}", "run.checkpoint_every_seconds=0", "batch_size=512"]
    settings += [f"trainer.engine={engine}", "activation=relu"]  # then all trials have one signature
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *settings)
    steps = switch.count
    assert steps > (20 if engine == "loop" else 12)
    if engine == "fused":
        with Record(tmp_path / "whole" / "run.db", readonly=True) as record:
            plan = record.of_kind("plan")[0].body["chunks"]
        assert [(chunk["trials"], chunk["engine"]) for chunk in plan] == [([0, 1], "fused")]
    stride = 11 if sampler != "random" else 3
    for step in range(1, steps + 1, stride):
        for after in (False, True):
            path = tmp_path / f"{step}-{after}"
            got = switch.cut(step, after, functools.partial(run_quick, path, *settings))
            assert got == expected, (step, after)
            files = sorted(p.name for p in (path / "checkpoints").iterdir())
            assert len(files) == 1, files
            assert files[0].startswith("best-")


def test_stopped_at_any_training_step_and_continued(
    tmp_path: Path, run_quick: RunQuick, digits_task: Any
) -> None:
    """A graceful stop (what Ctrl-C asks for) after k polls, for many k, until the run is done."""
    expected = run_quick(tmp_path / "whole")
    for every in (1, 2, 5, 11):
        path = tmp_path / f"every-{every}"
        sessions = 0
        while True:
            sessions += 1
            try:
                with _stop_after(every + 3):
                    got = run_quick(path)
                break
            except Interrupted as stop:
                assert stop.signal == signal.SIGINT
        assert sessions > 1
        assert got == expected


class _stop_after:
    """Sends this process SIGINT at the n-th training step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> None:
        from hpt_torch.trainers.member import Member

        self.original = original = Member.step

        def step(member: Any, *arguments: Any) -> None:
            original(member, *arguments)
            self.steps -= 1
            if self.steps == 0:
                os.kill(os.getpid(), signal.SIGINT)

        Member.step = step  # type: ignore[method-assign]

    def __exit__(self, *details: object) -> None:
        from hpt_torch.trainers.member import Member

        Member.step = self.original  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_killed_processes(tmp_path: Path, sampler: str) -> None:
    """The real command, `kill -9` at random instants until it ends by itself."""
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(f"""
        [hparams]
        optimizer = "adam"
        batch_size = 128
        [space]
        lr = {{ choice = [0.001, 0.01, 0.1] }}
        dropout = {{ choice = [0.0, 0.2] }}
        activation = {{ choice = ["relu", "tanh"] }}
        [search]
        sampler = "{sampler}"
        trials = 12
        round_size = 4
        [trainer]
        epochs = 8
        threads = 1
        [run]
        checkpoint_every_seconds = 0.02
    """)

    def start(path: Path) -> subprocess.Popen[bytes]:
        command = [*HPT, "run", str(recipe_file), "--run-dir", str(path), "--quiet"]
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=120) == 0
    expected = canonical_of(tmp_path / "whole")
    draw, kills, path = random.Random(0), 0, tmp_path / "killed"
    while True:
        process = start(path)
        while not (path / "run.db").exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            # The kill may fall anywhere: into the first commit, a file, an epoch, the end.
            code = process.wait(timeout=draw.uniform(0.0, 0.6) if kills < 8 else 120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert kills >= 2
    assert canonical_of(path) == expected
    with Record(path / "run.db", readonly=True) as record:
        assert {trial.state for trial in record.trials.values()} == {TrialState.COMPLETE}
        assert len(record.of_kind("trial")) == 12
        assert len(record.of_kind("finish")) == 12
        assert len(record.of_kind("report")) == 12 * 8
    assert not [p for p in path.rglob("*.tmp")]


@pytest.mark.slow
def test_a_damaged_state_file_falls_back_to_the_one_before(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("run.checkpoint_every_seconds=0", "trainer.epochs=3")
    expected = run_quick(tmp_path / "whole", *settings)
    for harm in ("flip", "cut", "remove", "remove both"):
        path = tmp_path / harm
        switch = PowerSwitch(monkeypatch)
        switch.arm(26, True)
        with pytest.raises(Killed):
            run_quick(path, *settings)
        monkeypatch.undo()
        with Record(path / "run.db", readonly=True) as record:
            committed = [file for key, files in record.state_files.items() if key != "best" for file in files]
        states = [path / "checkpoints" / file.name for file in committed[-2:]]
        data = states[-1].read_bytes()
        if harm == "flip":
            states[-1].write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
        elif harm == "cut":
            states[-1].write_bytes(data[: len(data) // 2])
        else:
            for file in (path / "checkpoints").iterdir() if harm == "remove both" else states[-1:]:
                file.unlink()
        ear = Ear()
        assert run_quick(path, *settings, observers=[ear]) == expected
        assert any("going back to the state before it" in line for line in ear.said)


def test_training_that_does_not_repeat_is_an_error_not_a_silent_mix(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = PowerSwitch(monkeypatch)
    switch.arm(5, True)  # run, session, two files, plan, … : a report is recorded, no state saved
    with pytest.raises(Killed):
        run_quick(tmp_path / "run", "trainer.epochs=9", "run.checkpoint_every_seconds=1e6")
    switch.arm(4, True)
    with pytest.raises(Killed):
        run_quick(tmp_path / "run", "trainer.epochs=9", "run.checkpoint_every_seconds=1e6")
    monkeypatch.undo()
    from hpt_torch.trainers import base

    monkeypatch.setattr(base, "batch_key", lambda noise, batch: 12345)
    monkeypatch.setattr(base.DataOrder, "epoch", lambda order, epoch: __import__("torch").arange(order.rows))
    with pytest.raises(RunError, match="trial 0 did not repeat: .* after epoch 1 was recorded as"):
        run_quick(tmp_path / "run", "trainer.epochs=9", "run.checkpoint_every_seconds=1e6")


def test_an_extended_run_equals_one_that_was_longer_from_the_start(
    tmp_path: Path, run_quick: RunQuick
) -> None:
    """3 trials cut a round of 2 in half; 7 finish it and go on."""
    for sampler in ("random", "tpe"):
        longer = run_quick(tmp_path / f"long-{sampler}", "search.trials=7", f"search.sampler={sampler}")
        path = tmp_path / f"extended-{sampler}"
        run_quick(path, "search.trials=3", f"search.sampler={sampler}")
        with pytest.raises(RunError, match="--reopen-holdout"):
            run_quick(path, "search.trials=7", f"search.sampler={sampler}")
        got = run_quick(path, "search.trials=7", f"search.sampler={sampler}", reopen_holdout=True)
        assert got == longer


def test_a_finished_run_does_nothing_more(tmp_path: Path, run_quick: RunQuick) -> None:
    first = run_quick(tmp_path / "run")
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        count = len(record.events)
    assert run_quick(tmp_path / "run") == first
    assert run_quick(tmp_path / "run", "search.trials=2") == first  # a smaller budget takes nothing back
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        assert [e.kind for e in record.events[count:]] == ["session", "session"]


def test_the_same_recipe_file_of_a_run_gives_the_same_run(
    tmp_path: Path, run_quick: RunQuick, digits_task: Any
) -> None:
    first = run_quick(tmp_path / "run")
    again = recipe.load(tmp_path / "run" / "recipe.toml")
    session.run(session.check(again, digits_task, source="again"), tmp_path / "again")
    assert canonical_of(tmp_path / "again") == first


def test_a_kill_after_the_last_commit_of_a_population(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of its states, which were to be removed then, are removed by the next session."""
    settings = ("scheduler.kind=pbt", "activation=relu", "run.checkpoint_every_seconds=0")

    def killed(*_: object, ended: bool = False) -> None:
        if ended:
            raise Killed

    monkeypatch.setattr(Tuner, "drop_old_states", killed)
    with pytest.raises(Killed):
        run_quick(tmp_path / "run", *settings)
    monkeypatch.undo()
    assert list((tmp_path / "run" / "checkpoints").glob("population-*"))
    assert run_quick(tmp_path / "run", *settings) == run_quick(tmp_path / "whole", *settings)
    left = [path.name[:5] for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == ["best-"]
