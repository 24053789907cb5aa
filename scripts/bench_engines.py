"""`scripts/bench engines` and `planner`: what each engine takes, and whether the planner takes the best."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import bench_search
import torch
import typer

import hpt_torch as hpt
from hpt_torch import tasks
from hpt_torch.engines import ENGINES, make_deterministic
from hpt_torch.machine import keep_freed_memory
from hpt_torch.record import Record
from hpt_torch.trainers import inductor

_MODELS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "MLP 64-32-32": ("mlp", (64,), {"hidden_sizes": (32, 32), "batch_norm": True}),
    "MLP 64-128-128": ("mlp", (64,), {"hidden_sizes": (128, 128), "batch_norm": True}),
    "MLP 784-128-128": ("mlp", (784,), {"hidden_sizes": (128, 128), "batch_norm": True}),
    "CNN 16-32": ("cnn", (1, 28, 28), {"channels": (16, 32), "batch_norm": True}),
    "GRU 64": ("rnn", (28, 28), {"cell": "gru", "hidden_size": 64}),
    "LSTM 64": ("rnn", (28, 28), {"cell": "lstm", "hidden_size": 64}),
}
_BATCH = 64


def _task(name: str, rows: int) -> tuple[hpt.Task, dict[str, Any]]:
    model, shape, own = _MODELS[name]
    inputs = torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0))
    train = hpt.Rows({"inputs": inputs, "targets": torch.arange(rows) % 10})
    task = hpt.Classification(
        tasks.MODELS[model], hpt.Data(train=train, valid=hpt.Rows(train.slice(0, 64)), out_features=10)
    )
    return task, {**own, "batch_size": _BATCH}


def _epoch(
    engine: str, name: str, members: int, device: torch.device, rows: int
) -> tuple[Callable[[], float], float]:
    """(what trains an epoch and returns its milliseconds a step, the seconds of the first epoch)."""
    task, own = _task(name, rows)
    defaults = {n: spec.default for n, spec in task.hparam_specs().items()}
    trainer = ENGINES[engine](
        task, task.data().to(device, torch.float32), device=device, dtype=torch.float32, seed=0, epochs=10_000
    )
    values = [{**defaults, **own, "dropout": 0.1, "lr": 1e-4 * (1 + i)} for i in range(members)]
    population = trainer.init(list(range(members)), values)
    done = 0

    def train() -> float:
        nonlocal done
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = trainer.train(population, done, should_pause=lambda: False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert not result.failed, result.failed
        return (time.perf_counter() - started) / (rows // _BATCH) * 1e3

    first = train() * (rows // _BATCH) / 1e3
    train()
    return train, first


def engines(
    members: int = 8,
    rows: int = 2048,
    repeats: int = 5,
    device: str = "cpu",
    only: Annotated[str, typer.Option(help="models that begin so")] = "MLP",
    json_path: Path | None = None,
) -> None:
    """Milliseconds a step of so many members, batch 64, Adam, dropout, one thread: one by one, fused,
    compiled; medians, alternating. With what compiling takes, and after how many steps it has paid."""
    keep_freed_memory()
    torch.set_num_threads(1)
    on, before, table = torch.device(device), bench_search.load(), []
    if on.type == "cuda":
        make_deterministic()
    print(
        f"| {members} members, {device} | loop, ms | fused, ms | compiled, ms | compiled / fused | ", end=""
    )
    print("first epoch, s | pays after, steps |\n|---|---|---|---|---|---|---|")
    for name in (name for name in _MODELS if name.lower().startswith(only.lower())):
        runs, firsts = {}, {}
        for engine in ENGINES:
            count = 1 if engine == "loop" else members
            with inductor.nothing_cached(on):
                runs[engine], firsts[engine] = _epoch(engine, name, count, on, rows)
        times = [{engine: run() for engine, run in runs.items()} for _ in range(repeats)]
        loop, fused, compiled = (statistics.median(t[engine] for t in times) for engine in ENGINES)
        ratio = statistics.median(t["fused"] / t["compiled"] for t in times)
        pays = firsts["compiled"] * 1e3 / (fused - compiled) if fused > compiled else float("inf")
        row = {"loop": loop * members, "fused": fused, "compiled": compiled, "ratio": ratio}
        table.append({"model": name, **row, "first": firsts["compiled"], "pays_after": pays})
        print(f"| {name} | {loop * members:.2f} | {fused:.2f} | {compiled:.2f} | {ratio:.1f} x ", end="")
        print(f"| {firsts['compiled']:.1f} | {pays:,.0f} |", flush=True)
    bench_search.say_load(before)
    bench_search._write(json_path, table)


@dataclasses.dataclass(frozen=True)
class _Work:
    """A search in lr alone."""

    model: str
    trials: int
    rows: int
    epochs: int
    engines: tuple[str, ...] = ("loop", "fused", "compiled")


_WORK = (
    _Work("MLP 64-32-32", 32, 1400, 10),
    _Work("MLP 64-32-32", 32, 6400, 120, ("fused", "compiled")),  # one by one: minutes
    _Work("MLP 64-128-128", 16, 6400, 100, ("fused", "compiled")),
    _Work("MLP 784-128-128", 16, 6400, 10),
    # To compile the step of these takes longer than the whole line.
    _Work("CNN 16-32", 8, 3200, 2, ("loop", "fused")),
    _Work("GRU 64", 16, 3200, 3, ("loop", "fused")),
    _Work("LSTM 64", 16, 3200, 3, ("loop", "fused")),
)


def planner(repeats: int = 3, json_path: Path | None = None) -> None:
    """Seconds of whole searches in two worker processes, as the planner has it (auto) and with each engine
    forced; medians, alternating, nothing compiled in the cache. Bar: auto within 15 % of the best."""
    from torch._inductor.utils import fresh_cache

    before, table = bench_search.load(), []
    print("| search | loop, s | fused, s | compiled, s | auto, s | auto chose | auto / best |")
    print("|---|---|---|---|---|---|---|")
    for work in _WORK:
        times: dict[str, list[float]] = {engine: [] for engine in (*work.engines, "auto")}
        for _ in range(repeats):
            for engine, seconds in times.items():
                with fresh_cache():
                    taken, chosen = _search(work, engine)
                seconds.append(taken)
        medians = {engine: statistics.median(seconds) for engine, seconds in times.items()}
        best = min(medians[engine] for engine in work.engines)
        label = f"{work.trials} x {work.model}, {work.epochs} epochs of {work.rows} rows"
        cells = [f"{medians[e]:.1f}" if e in medians else "" for e in ("loop", "fused", "compiled", "auto")]
        print(f"| {label} | {' | '.join(cells)} | {chosen} | {medians['auto'] / best:.2f} |", flush=True)
        table.append({"search": label, **medians, "chose": chosen})
    bench_search.say_load(before)
    bench_search._write(json_path, table)


def _search(work: _Work, engine: str) -> tuple[float, str]:
    """(seconds, the engine of its first trials)."""
    task, hparams = _task(work.model, work.rows)
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "run", time.perf_counter()
        hpt.tune(
            task, {"lr": hpt.Float(1e-4, 1e-2)}, trials=work.trials, epochs=work.epochs, engine=engine,
            hparams={**hparams, "dropout": 0.1}, sampler="random", round_size=work.trials, run_dir=path,
            progress=False, tensorboard=False,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        with Record(path / "run.db", readonly=True) as record:
            return seconds, record.of_kind("plan")[0].body["chunks"][0]["engine"]
