"""The same trials on CUDA: the engines agree, runs repeat and go on bit for bit."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, canonical_of
from test_resume import PowerSwitch
from test_trainers_fused import CASES, _task, _tensors, _varied, never
from torch import Tensor

from hpt_torch.checkpoint import weights_sha256
from hpt_torch.population import Population
from hpt_torch.record import Record
from hpt_torch.tasks import Supervised
from hpt_torch.trainers.compiled import CompiledTrainer
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import TrialState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE = "cuda"
ENGINES = {"loop": LoopTrainer, "fused": FusedTrainer, "compiled": CompiledTrainer}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _trained(
    engine: str, device: str, task: Supervised, values: list[dict[str, Any]], dtype: torch.dtype,
    should_pause: Callable[[], bool] = never, state: Any = None,
) -> tuple[Population, Any]:  # fmt: skip
    to = torch.device(device)
    data = task.data().to(to, dtype)
    trainer = ENGINES[engine](task, data, device=to, dtype=dtype, seed=3, epochs=3, keep=task.objective)
    population = trainer.init(list(range(len(values))), values)
    if state is not None:
        population.restore(*state)
    return population, trainer.train(population, 3, should_pause=should_pause)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_loop_on_the_cpu(name: str, engine: str) -> None:
    """Float64, to 1e-9: weights, buffers, moments, the kept weights."""
    task = _task(name)
    values = _varied(task, name, 5, schedule="cosine")
    loop, expected = _trained("loop", "cpu", task, values, torch.float64)
    mine, got = _trained(engine, DEVICE, task, values, torch.float64)
    for i in range(5):
        for key, tensor in _tensors(loop, i).items():
            torch.testing.assert_close(_tensors(mine, i)[key].cpu(), tensor, rtol=1e-9, atol=1e-9, msg=key)
    metrics = {(r.trial, r.epoch): r.metrics for r in expected.reports}
    for report in got.reports:
        assert report.metrics == pytest.approx(metrics[report.trial, report.epoch], rel=1e-8, abs=1e-8)
    assert len(got.reports) == len(metrics) == 15


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "gru"])
def test_stopped_and_continued_is_bit_equal(name: str, engine: str) -> None:
    task = _task(name)
    values = _varied(task, name, 3, ema=True, schedule="one_cycle")
    whole, _ = _trained(engine, DEVICE, task, values, torch.float32)
    taken, state, sessions = 0, None, 0

    def stop() -> bool:
        nonlocal taken
        taken += 1
        return taken % 2 == 0

    while True:
        population, result = _trained(engine, DEVICE, task, values, torch.float32, stop, state)
        sessions += 1
        if not result.paused:
            break
        tensors, meta = population.state()
        state = {n: t.clone().cpu() for n, t in tensors.items()}, meta
    assert sessions > 2
    assert [_sha(whole, i) for i in range(3)] == [_sha(population, i) for i in range(3)]


def _sha(population: Population, i: int) -> str:
    tensors: dict[str, Tensor] = {n: t.cpu() for n, t in _tensors(population, i).items()}
    return weights_sha256(tensors)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_compiled(optimizer: str) -> None:
    task, name = _task("mlp without batch norm"), "mlp without batch norm"
    values = _varied(task, name, 3, optimizer=optimizer, nesterov=True, accumulation_steps=3, ema=True)
    loop, _ = _trained("loop", "cpu", task, values, torch.float64)
    mine, _ = _trained("compiled", DEVICE, task, values, torch.float64)
    for i in range(3):
        for key, tensor in _tensors(loop, i).items():
            torch.testing.assert_close(_tensors(mine, i)[key].cpu(), tensor, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("scheduler", ["fifo", "pbt", "successive_halving"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_repeats_and_goes_on_bit_for_bit(
    engine: str,
    scheduler: str,
    run_quick: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw: dict[str, Any] = {**QUICK, "space": {n: v for n, v in QUICK["space"].items() if n != "activation"}}
    raw["trainer"] = {"epochs": 4, "device": DEVICE, "threads": 1, "engine": engine}
    raw["run"] = {"tensorboard": False, "checkpoint_every_seconds": 0}
    raw["scheduler"] = {"kind": scheduler}
    if scheduler == "pbt":
        raw["search"] = {"sampler": "random", "trials": 4}
        raw["scheduler"] = {"kind": "pbt", "interval_epochs": 1, "quantile": 0.34}
    switch = PowerSwitch(monkeypatch)
    whole = run_quick(tmp_path / "whole", raw=raw)
    steps = switch.count
    assert run_quick(tmp_path / "again", raw=raw) == whole
    with Record(tmp_path / "whole" / "run.db", readonly=True) as record:
        chunks = [chunk for plan in record.of_kind("plan") for chunk in plan.body["chunks"]]
    assert {chunk["engine"] for chunk in chunks} == {engine}
    for step in range(3, steps + 1, max(steps // 4, 1)):
        path = tmp_path / f"cut-{step}"
        assert switch.cut(step, step % 2 == 0, functools.partial(run_quick, path, raw=raw)) == whole, step


def test_what_does_not_fit_the_memory_is_trained_in_halves(
    run_quick: Callable[..., str], tmp_path: Path
) -> None:
    """Eight members of some 200 MB each, their gradients and moments included, in 600 MB."""
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + (600 << 20)
    raw = {
        **QUICK,
        "hparams": {"hidden_sizes": [2048, 4096], "batch_size": 256},
        "space": {"lr": {"float": [1e-4, 1e-2]}},
        "search": {"sampler": "random", "trials": 8, "round_size": 8},
        "trainer": {**QUICK["trainer"], "epochs": 1, "engine": "fused", "device": DEVICE},
    }
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        run_quick(tmp_path / "run", raw=raw)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        halved = [event.body for event in record.of_kind("fallback")]
        states = [trial.state for trial in record.trials.values()]
    assert halved
    assert all(body["out_of_memory"] for body in halved)
    assert states == [TrialState.COMPLETE] * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "numbers",
    [
        [0, 0],
        pytest.param(
            [0, 1],
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device on this machine"),
        ),
    ],
    ids=str,
)
def test_workers_of_devices_change_nothing(tmp_path: Path, numbers: list[int]) -> None:
    """In processes of their own: this one has used CUDA, after which it forks none for it."""
    settings = ("trainer.engine=fused", "search.trials=12", "search.round_size=12", "trainer.epochs=3")
    reports = []
    for name, more in (("one", "trainer.device=cuda"), ("workers", f"trainer.devices={numbers}")):
        run = tmp_path / name
        command = [sys.executable, "-m", "hpt_torch", "run", "digits_mlp_tpe", *settings, more]
        done = subprocess.run([*command, "--run-dir", str(run)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "workers of other devices" not in done.stdout + done.stderr
        reports.append(canonical_of(run))
    assert reports[0] == reports[1]
