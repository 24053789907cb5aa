"""SIGINT, SIGTERM and SIGUSR1: the first saves and stops, the second stops at once; both say how to go on."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import canonical_of
from forked import Hpt

from hpt_torch.executors import processes
from hpt_torch.record import Record
from hpt_torch.trainers.member import Member

pytestmark = pytest.mark.skipif(not processes.supported(), reason="SIGUSR1 and process groups")
ALL = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text("""
        [hparams]
        hidden_sizes = [16]
        batch_size = 512
        [space]
        lr = { float = [1e-4, 1e-1], default = 1e-3 }
        [search]
        sampler = "random"
        trials = 3
        [trainer]
        engine = "loop"
        epochs = 3
        threads = 1
        [run]
        checkpoint_every_seconds = 0.0
    """)
    return path


def started(recipe: Path, run: Path, *overrides: str) -> list[str]:
    return ["run", str(recipe), *overrides, "--run-dir", str(run)]


def _slow_steps() -> None:
    """Each training step of this process takes ten seconds."""
    step = Member.step

    def slow(member: Member, *arguments: Any) -> None:
        time.sleep(10)
        step(member, *arguments)

    Member.step = slow  # type: ignore[method-assign,assignment]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), ALL)
def test_a_signal_stops_within_five_seconds(
    tmp_path: Path, recipe: Path, number: signal.Signals, code: int
) -> None:
    path = tmp_path / "run"
    run = Hpt(*started(recipe, path, "trainer.epochs=9999", "executor=processes", "batch_size=32"))
    _wait_for(run, lambda: list((path / "checkpoints").glob("chunk*")))
    os.killpg(run.pid, number)  # as a terminal does: to the workers, too
    status, said = run.wait(5)
    assert status == code, said
    assert said.count("everything is saved") == 1
    assert re.search(r"The same command goes on: hpt run \S+ trainer.epochs=9999 .*--run-dir", said)
    assert "Traceback" not in said
    with Record(path / "run.db", readonly=True) as record:
        assert record.events[-1].kind == "state"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), ALL)
def test_a_second_signal_stops_at_once(
    tmp_path: Path, recipe: Path, number: signal.Signals, code: int
) -> None:
    """In the middle of a step that takes long; the line that says how to go on is there all the same."""
    path = tmp_path / "run"
    run = Hpt(*started(recipe, path, "executor=inline"), prepare=_slow_steps)
    _wait_for(run, lambda: (path / "recipe.toml").exists())
    time.sleep(0.5)  # it is in its first step
    for _ in range(2):
        os.kill(run.pid, number)
        time.sleep(0.2)
    status, said = run.wait(5)
    assert status == code, said
    assert "hpt: stopped at once; everything recorded is intact. The same command goes on: hpt run " in said
    assert "Traceback" not in said
    status, said = Hpt(*started(recipe, path, "executor=inline")).wait()
    assert status == 0, said
    assert Hpt(*started(recipe, tmp_path / "whole", "executor=inline")).wait()[0] == 0
    assert canonical_of(path) == canonical_of(tmp_path / "whole")


def _in_the_start(number: int) -> None:
    """A signal arrives while the recipe is read, before a session could listen to it."""
    from hpt_torch import recipe

    load = recipe.load

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return load(*arguments)

    recipe.load = interrupted


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), ALL)
def test_a_signal_during_the_start(tmp_path: Path, recipe: Path, number: signal.Signals, code: int) -> None:
    run = Hpt(*started(recipe, tmp_path / "run"), prepare=partial(_in_the_start, number))
    status, said = run.wait(5)
    assert (status, said.count("\n")) == (code, 1), said
    assert "hpt: stopped at once; everything recorded is intact. The same command goes on: hpt run " in said


def _wait_for(run: Hpt, condition: Callable[[], Any]) -> None:
    while not condition():
        assert run.process.is_alive()
        time.sleep(0.01)
