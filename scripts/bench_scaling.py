"""`scripts/bench scaling`: what a further member of a population costs, and a further trial of a search."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import bench_search
import torch
import typer

import hpt_torch as hpt
from hpt_torch import machine, tasks
from hpt_torch.trainers import inductor
from hpt_torch.trainers.compiled import CompiledTrainer
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer


def _members(count: int, batch_size: int) -> tuple[hpt.Task, list[dict[str, Any]]]:
    """The digits MLP 64-64-64-10 and `count` members that differ in what a group may differ in. It is
    evaluated on 16 rows: what is timed is training."""
    digits = hpt.data.digits(seed=0)
    data = hpt.Data(train=digits.train, valid=hpt.Rows(digits.valid.slice(0, 16)), out_features=10)
    task = hpt.Classification(tasks.MODELS["mlp"], data)
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    fixed = {"hidden_sizes": (64, 64), "batch_norm": True, "batch_size": batch_size}
    own = [
        {"lr": 10 ** (-3 + i % 9 / 8), "dropout": 0.4 * (i % 5) / 4, "weight_decay": 1e-5 * (i % 3)}
        for i in range(count)
    ]
    return task, [{**defaults, **fixed, **h} for h in own]


def _epoch_seconds(engine: type[LoopTrainer], count: int, batch_size: int, repeats: int) -> tuple[float, int]:
    """Seconds an epoch of `count` members (the median after a first one that warms up), and its steps."""
    task, hparams = _members(count, batch_size)
    cpu = torch.device("cpu")
    data = task.data().to(cpu, torch.float32)
    trainer = engine(task, data, device=cpu, dtype=torch.float32, seed=0, epochs=repeats + 2)
    population = trainer.init(list(range(count)), hparams)
    times = []
    for epoch in range(1, repeats + 2):
        started = time.perf_counter()
        result = trainer.train(population, epoch, should_pause=lambda: False)
        times.append(time.perf_counter() - started)
        if result.failed:
            raise RuntimeError(f"members failed: {result.failed}")
    return statistics.median(times[1:]), trainer.order.batches(batch_size)


def _population(largest: int, batch_size: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    _epoch_seconds(LoopTrainer, 1, batch_size, 3)  # the process's first steps
    alone, steps = _epoch_seconds(LoopTrainer, 1, batch_size, repeats)
    rows = [{"engine": "loop", "members": 1, "ms_a_step": 1e3 * alone / steps, "marginal": None}]
    sizes = [2**k for k in range(largest.bit_length())]
    compiled = [size for size in sizes if size >= 8][::2] if inductor.missing("cpu") is None else []
    cases = [("fused", FusedTrainer, size) for size in sizes]
    for name, engine, size in (*cases, *(("compiled", CompiledTrainer, size) for size in compiled)):
        seconds, _ = _epoch_seconds(engine, size, batch_size, repeats)
        row = {"engine": name, "members": size, "ms_a_step": 1e3 * seconds / steps}
        row["marginal"] = (seconds - alone) / (size - 1) / alone if size > 1 else None
        rows.append(row)
    alone_again, _ = _epoch_seconds(LoopTrainer, 1, batch_size, repeats)
    return {"rows": rows, "alone_ms": [1e3 * alone / steps, 1e3 * alone_again / steps]}


def _noop(trials: int, tensorboard: bool) -> dict[str, Any]:
    """A search of no-op trials in a process of its own: seconds of `tune`, and peak memory in MB."""
    command = [sys.executable, __file__, str(trials), str(int(tensorboard))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        typer.echo(done.stdout[-2000:] + done.stderr[-4000:], err=True)
        raise typer.Exit(1)
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def _peak_mb(children: bool = False) -> float:
    """The most memory that this process, or the largest of its ended children, had resident so far."""
    import resource

    status = Path("/proc/self/status")
    if not children and status.is_file():  # ru_maxrss counts what stood in the process before it was ours
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    used = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e6  # KiB, on macOS bytes


def _noop_here(trials: int, tensorboard: bool) -> dict[str, Any]:
    from bench import NoTask

    with tempfile.TemporaryDirectory() as folder:
        before, started = _peak_mb(), time.perf_counter()
        hpt.tune(
            NoTask(), {"lr": hpt.Float(1e-4, 1e-1)}, trials=trials, epochs=1, sampler="random",
            run_dir=Path(folder) / "run", progress=False, tensorboard=tensorboard,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    own, worker = _peak_mb(), _peak_mb(children=True)
    return {"trials": trials, "seconds": seconds, "before_mb": before, "peak_mb": own, "worker_mb": worker}


def scaling(
    largest: Annotated[int, typer.Option(help="members of the largest population; a power of two")] = 256,
    batch_size: int = 64,
    repeats: Annotated[int, typer.Option(help="epochs that are timed")] = 10,
    trials: Annotated[str, typer.Option(help="sizes of the no-op searches")] = "100,1000,10000",
    tensorboard: bool = True,
    json_path: Path | None = None,
) -> None:
    """Cost of a population's further members (one thread) and of a search's further no-op trials."""
    before = bench_search.load()
    members = _population(largest, batch_size, repeats) if largest else {"rows": []}
    if largest:
        print(
            f"| MLP 64-64-64-10 on digits, batch {batch_size}, one thread | ms a step | ms a member |", end=""
        )
        print(" a further member / one alone |\n|---|---|---|---|")
        for row in members["rows"]:
            label = f"{row['members']} member{'s'[: row['members'] > 1]}, {row['engine']}"
            marginal = "" if row["marginal"] is None else f"1/{1 / row['marginal']:.1f}"
            each = row["ms_a_step"] / row["members"]
            print(f"| {label} | {row['ms_a_step']:.3f} | {each:.4f} | {marginal} |")
        first, last = members["alone_ms"]
        print(f"\nOne alone, measured first and last: {first:.3f} and {last:.3f} ms a step.\n")
    sizes = [int(size) for size in trials.split(",") if size]
    rows = [_noop(size, tensorboard) for size in sizes]
    if rows:
        print("| no-op trials (random) | s | ms a trial | ratio | peak MB | of it before | worker MB |")
        print("|---|---|---|---|---|---|---|")
    for row in rows:
        row["ms_a_trial"] = 1e3 * row["seconds"] / row["trials"]
        row["ratio"] = row["ms_a_trial"] / rows[0]["ms_a_trial"]
        cells = [f"{row['trials']:,}", f"{row['seconds']:.1f}", f"{row['ms_a_trial']:.2f}"]
        cells += [f"{row['ratio']:.2f} x", *(f"{row[k]:.0f}" for k in ("peak_mb", "before_mb", "worker_mb"))]
        print(f"| {' | '.join(cells)} |")
    bench_search.say_load(before)
    if json_path is not None:
        json_path.write_text(json.dumps({"population": members, "trials": rows, "load": before}, indent=1))


if __name__ == "__main__":
    print(json.dumps(_noop_here(int(sys.argv[1]), bool(int(sys.argv[2])))))
