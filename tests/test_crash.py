"""A segfault in the run's own process ends the run; the same command then leaves out what did it."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpt_torch.crash import CrashLog
from hpt_torch.executors import processes
from hpt_torch.models import MLP
from hpt_torch.record import Record
from hpt_torch.tasks import Classification
from hpt_torch.types import TrialState

pytestmark = pytest.mark.skipif(not processes.supported(), reason="the tests fork")
RunQuick = Callable[..., str]


class _Crashes(Classification):
    """Reads address 0 when it trains a model with tanh; or already where its members are mapped."""

    when_mapped = False

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        mapped = torch._C._functorch.is_functorch_wrapped_tensor(next(model.parameters()))
        if hparams["activation"] == "tanh" and mapped == self.when_mapped:
            ctypes.string_at(0)
        return super().loss(model, batch, hparams)


def ends(run: Callable[[], object]) -> int:
    """The exit code of a process that does this."""
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_a_segfault_in_this_process(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification, engine: str
) -> None:
    settings = ("search.trials=6", "search.round_size=6", "executor=inline", f"trainer.engine={engine}")
    calm = json.loads(run_quick(tmp_path / "calm", *settings))
    task = _Crashes(MLP, digits_task.data())
    task.when_mapped = engine == "fused"
    path, sessions = tmp_path / "run", 0
    while (code := ends(lambda: run_quick(path, *settings, task=task))) != 0:
        assert code == -signal.SIGSEGV
        sessions += 1
        assert sessions < 10
    with Record(path / "run.db", readonly=True) as record:
        trials = record.in_order()
    tanh = [trial.hparams["activation"] == "tanh" for trial in trials]
    assert 0 < sum(tanh) < 6
    if engine == "loop":
        assert sessions == sum(tanh)
        assert [trial.state is TrialState.FAILED for trial in trials] == tanh
        for trial in trials:
            stack = "the process that trained it crashed:\nFatal Python error: Segmentation fault"
            assert trial.reason.startswith(stack) == (trial.state is TrialState.FAILED)
        assert "in string_at" in next(trial.reason for trial in trials if trial.reason)
    else:  # found when the plan was made: one by one they do not crash
        assert sessions == 1
        assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    for trial, other, crashes in zip(trials, calm["trials"], tanh, strict=True):
        assert crashes or trial.weights_sha256 == other["weights_sha256"]
    assert not (path / "crash.log").exists()


def test_a_segfault_in_a_worker_leaves_its_stack(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    settings = ("search.trials=4", "executor=processes", "run.workers=2", "trainer.engine=loop")
    run_quick(tmp_path / "run", *settings, task=_Crashes(MLP, digits_task.data()))
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        reasons = [trial.reason for trial in record.in_order() if trial.state is TrialState.FAILED]
    assert reasons
    for reason in reasons:
        assert reason.startswith(
            "the worker process was killed by SIGSEGV, 3 times:\nFatal Python error: Seg"
        )
        assert "in loss" in reason


def test_a_kill_is_no_crash(tmp_path: Path) -> None:
    def killed() -> None:
        log = CrashLog(tmp_path)
        with log.watching():
            log.note("chunk-3")
            os.kill(os.getpid(), signal.SIGKILL)

    def crashed() -> None:
        log = CrashLog(tmp_path)
        with log.watching():
            log.note("a longer name that is gone")
            log.note("chunk-3")
            ctypes.string_at(0)

    assert ends(killed) == -signal.SIGKILL
    assert CrashLog(tmp_path).note("chunk-3") == ""
    assert ends(crashed) == -signal.SIGSEGV
    again = CrashLog(tmp_path)
    assert again.note("chunk-4") == ""
    assert "in crashed" in again.note("chunk-3")
    with again.watching():
        assert "in crashed" in again.note("chunk-3")
    assert CrashLog(tmp_path).note("chunk-3") == ""
    assert not list(tmp_path.iterdir())


def test_sessions_inside_each_other(tmp_path: Path) -> None:
    """As a confirmation's. Each crash is in the log of the innermost."""

    def crashed() -> None:
        outer, inner = CrashLog(tmp_path), CrashLog(tmp_path / "inner")
        with outer.watching():
            outer.note("outer")
            with inner.watching():
                inner.note("inner")
            ctypes.string_at(0)

    (tmp_path / "inner").mkdir()
    assert ends(crashed) == -signal.SIGSEGV
    assert CrashLog(tmp_path).note("outer")
    before = faulthandler.is_enabled()
    with CrashLog(tmp_path).watching():
        assert faulthandler.is_enabled()
    assert faulthandler.is_enabled() == before
