"""Worker processes: the same results for any number of them, and whatever happens to one of them."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpt_torch.executors import processes
from hpt_torch.models import MLP
from hpt_torch.record import Record
from hpt_torch.tasks import Classification
from hpt_torch.types import Interrupted, RecipeError, RunError, TrialState

pytestmark = pytest.mark.skipif(not processes.supported(), reason="workers are forked, on Linux only")
RunQuick = Callable[..., str]
FUSED = ("trainer.engine=fused", "search.trials=6", "search.round_size=6", "batch_size=64")


def children(thread: int | None = None) -> list[int]:
    """The process ids of the children that run of this thread, or of another one."""
    mine = f"/proc/self/task/{thread or threading.get_native_id()}/children"
    return [int(pid) for pid in Path(mine).read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, run_quick: RunQuick, engine: str) -> None:
    settings = (*FUSED, f"trainer.engine={engine}")
    inline = run_quick(tmp_path / "inline", *settings)
    for workers in (1, 3):
        forked = ("executor=processes", f"run.workers={workers}")
        assert run_quick(tmp_path / f"workers-{workers}", *settings, *forked) == inline
        assert children() == []
    with Record(tmp_path / "workers-3" / "run.db", readonly=True) as record:
        plan = record.of_kind("plan")[0].body["chunks"]
    assert engine in {chunk["engine"] for chunk in plan}


class _Killer(Classification):
    """Its loss ends the worker that computes it: once, if a file with a name of its own is not there yet;
    always, for a model with tanh."""

    once: Path | None = None
    always = False
    coordinator = os.getpid()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        if self.once is not None and not self.once.exists() and os.getpid() != self.coordinator:
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.always and hparams["activation"] == "tanh" and os.getpid() != self.coordinator:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch, hparams)


def test_a_worker_that_is_killed_is_replaced(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    task = _Killer(MLP, digits_task.data())
    settings = ("search.trials=4", "executor=processes", "run.workers=2", "trainer.engine=loop")
    expected = json.loads(run_quick(tmp_path / "calm", *settings))
    task.once = tmp_path / "killed"
    assert json.loads(run_quick(tmp_path / "killed-once", *settings, task=task)) == expected
    assert task.once.exists()


@pytest.mark.slow
def test_a_trial_that_kills_its_workers_ends_alone(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    """Also where its trials were to be trained together: they are then tried in halves."""
    task = _Killer(MLP, digits_task.data())
    task.always = True
    settings = (*FUSED, "executor=processes", "run.workers=2")
    got = json.loads(run_quick(tmp_path / "run", *settings, task=task))
    calm = json.loads(run_quick(tmp_path / "calm", *settings, "trainer.engine=loop"))
    activations = [trial["hparams"]["activation"] for trial in got["trials"]]
    assert sorted(set(activations)) == ["relu", "tanh"]
    for trial, other, activation in zip(got["trials"], calm["trials"], activations, strict=True):
        assert trial["state"] == ("FAILED" if activation == "tanh" else "COMPLETE")
        if activations.count("relu") == 1 and activation == "relu":
            assert trial["weights_sha256"] == other["weights_sha256"]
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        reasons = [trial.reason for trial in record.in_order() if trial.state is TrialState.FAILED]
    assert reasons == ["the worker process was killed by SIGKILL, 3 times"] * activations.count("tanh")


@pytest.mark.slow
def test_a_stop_saves_and_the_next_session_goes_on_to_the_same_end(
    tmp_path: Path, run_quick: RunQuick
) -> None:
    settings = (*FUSED, "trainer.epochs=60", "executor=processes", "run.workers=2")
    expected = run_quick(tmp_path / "whole", *settings)
    timer = threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(Interrupted):
            run_quick(tmp_path / "stopped", *settings)
    finally:
        timer.cancel()
    with Record(tmp_path / "stopped" / "run.db", readonly=True) as record:
        assert record.of_kind("state")
        assert any(not trial.state.is_finished for trial in record.trials.values())
    assert run_quick(tmp_path / "stopped", *settings) == expected


class _Greedy(Classification):
    """Its loss wants more memory than there is, for a model with tanh."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        if hparams["activation"] == "tanh":
            limits = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, limits[1]))
            try:
                bytearray(2**30)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
        return super().loss(model, batch, hparams)


@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_a_trial_that_runs_out_of_memory_ends_alone(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification, engine: str
) -> None:
    task = _Greedy(MLP, digits_task.data())
    settings = (*FUSED, f"trainer.engine={engine}", "executor=processes", "run.workers=2")
    got = json.loads(run_quick(tmp_path / "run", *settings, task=task))
    calm = json.loads(run_quick(tmp_path / "calm", *settings))
    activations = [trial["hparams"]["activation"] for trial in got["trials"]]
    assert sorted(set(activations)) == ["relu", "tanh"]
    for trial, other, activation in zip(got["trials"], calm["trials"], activations, strict=True):
        if activation == "tanh":
            assert trial["state"] == "FAILED"
        else:
            assert trial == other
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        failed = [trial for trial in record.in_order() if trial.state is TrialState.FAILED]
        assert all(trial.reason.endswith("MemoryError\n") for trial in failed)


@pytest.mark.slow
def test_a_halted_worker_does_not_hold_up_a_stop(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    """A worker under SIGSTOP hears nothing: it is given up, and its work is done in the next session."""
    settings = (*FUSED, "trainer.epochs=60", "executor=processes", "run.workers=2")
    expected = run_quick(tmp_path / "whole", *settings)
    main, path = threading.get_native_id(), tmp_path / "run" / "run.db"

    def reports() -> int:
        if not path.exists():
            return 0
        with Record(path, readonly=True) as record:
            return len(record.of_kind("report"))

    def halt_and_stop() -> None:
        while not reports():
            time.sleep(0.02)
        os.kill(children(main)[0], signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=halt_and_stop)
    thread.start()
    with pytest.raises(Interrupted):
        run_quick(tmp_path / "run", *settings)
    thread.join()
    assert children() == []
    assert run_quick(tmp_path / "run", *settings) == expected


class _Slow(Classification):
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        time.sleep(0.05)
        return super().loss(model, batch, hparams)


def test_workers_die_with_the_coordinator(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    """`kill -9` of the coordinator alone leaves no worker behind."""
    coordinator = os.fork()
    if not coordinator:
        task = _Slow(MLP, digits_task.data())
        run_quick(tmp_path / "run", "executor=processes", "run.workers=2", "trainer.epochs=999", task=task)
        os._exit(1)
    workers: list[int] = []
    deadline = time.monotonic() + 30
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        of_coordinator = Path(f"/proc/{coordinator}/task/{coordinator}/children")
        workers = [int(pid) for pid in of_coordinator.read_text().split()]
    os.kill(coordinator, signal.SIGKILL)
    os.waitpid(coordinator, 0)
    assert len(workers) == 2
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


class _Stuck(Classification):
    """Never ends a step of one trial, at dropout 0.4."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        while bool((hparams["label_smoothing"] > 0.2).any()):
            time.sleep(0.01)
        return super().loss(model, batch, hparams)


@pytest.mark.slow
def test_a_trial_that_hangs_fails_and_the_others_do_not(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    settings = ["executor=processes", "run.workers=2", "activation=relu", "search.trials=4"]
    settings += ["run.epoch_timeout=4s", "search.start_with_defaults=false", "trainer.engine=loop"]
    points = "[" + ", ".join(f"{{label_smoothing = {value}}}" for value in (0.0, 0.3, 0.1, 0.15)) + "]"
    settings += ["space.label_smoothing={float = [0.0, 0.5]}", f"search.points={points}"]
    run_quick(tmp_path / "run", *settings, task=_Stuck(MLP, digits_task.data()))
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        trials = record.in_order()
    assert [trial.state.value for trial in trials] == ["COMPLETE", "FAILED", "COMPLETE", "COMPLETE"]
    assert trials[1].reason == "no epoch was done within 4 s"


def test_too_many_failures_stop_the_run(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    class Broken(Classification):
        def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
            raise ValueError("a typo")

    task = Broken(MLP, digits_task.data())
    with pytest.raises(RunError, match=r"2 trials have failed.*The first, trial 0(.|\n)*ValueError: a typo"):
        run_quick(tmp_path / "run", "run.max_failures=2", "search.trials=50", task=task)
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        failed = [t for t in record.in_order() if t.state.value == "FAILED"]
    assert len(failed) == 2
    run_quick(tmp_path / "run", "run.max_failures=99", "search.trials=4", task=task)


_COMPILES = """
import sys
import torch
torch.compile(lambda x: x * 2)(torch.ones(3))
torch.ones((), requires_grad=True).backward()
import hpt_torch as hpt
from hpt_torch.executors import processes
assert not processes.can_train()
from sklearn.datasets import load_digits
from hpt_torch.models import Linear
task = hpt.Classification(Linear, hpt.split(*load_digits(return_X_y=True), seed=0))
what = {"trials": 3, "epochs": 1, "device": "cpu", "tensorboard": False, "progress": False}
space = {"lr": hpt.Float(0.001, 0.1)}
result = hpt.tune(task, space, **what, run_dir=sys.argv[1])
print(sorted(trial.state.value for trial in result.trials))
try:
    hpt.tune(task, space, **what, executor="processes", run_dir=sys.argv[1] + "-2")
except hpt.RecipeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_process_whose_forks_cannot_train_trains_inline(tmp_path: Path) -> None:
    """One that has used torch.compile first, and then autograd."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILES, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "['COMPLETE', 'COMPLETE', 'COMPLETE']" in done.stdout
    assert "executor: processes are forked, and forks of this one cannot train" in done.stdout


def test_several_threads_train_in_one_process(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    """In a fork of a process that has used OpenMP they would wait for each other for ever."""
    torch.set_num_threads(2)
    torch.rand(2000, 2000).sum().item()
    run_quick(tmp_path / "run", *FUSED, "executor=auto", "trainer.threads=2")
    with pytest.raises(RecipeError, match=r"trainer.threads: must be 1 .* got 2; leave it out, or set"):
        run_quick(tmp_path / "no", *FUSED, "executor=processes", "trainer.threads=2")
