"""Benchmarks, each printing a markdown table; ratios are of figures measured in the same run."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench_durability
import bench_engines
import bench_members
import bench_pbt
import bench_quality
import bench_reach
import bench_scaling
import bench_search
import bench_torture
import torch
import typer
from bench_members import PlainCNN, PlainMLP, PlainRNN, ordinary_epoch
from torch import nn

import hpt_torch as hpt
from hpt_torch.task import Batch

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


class _OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


class NoTask(hpt.Task):
    """Trains one number on two rows for one step: what is left is the framework."""

    name = "nothing"
    objective = hpt.Objective(metric="valid/value", direction="minimize")

    def data(self) -> hpt.Data:
        rows = hpt.Rows({"inputs": torch.zeros(2, 1)})
        return hpt.Data(train=rows, valid=rows)

    def build_model(self, hparams: Mapping[str, Any]) -> nn.Module:
        return _OneNumber()

    def loss(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any]) -> torch.Tensor:
        return model.value * hparams["lr"]  # type: ignore[operator,return-value]

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        return {"value": model.value.detach()}  # type: ignore[operator,dict-item]

    def finalize(self, sums: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return {"value": float(sums["value"])}


def _fsync_ms(folder: Path) -> float:
    """Milliseconds of one small append and fsync where the runs lie: the floor of a durable trial."""
    times = []
    with open(folder / "fsync", "wb") as file:
        import os

        for _ in range(50):
            start = time.perf_counter()
            file.write(b"x" * 300)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@app.command()
def overhead(trials: int = 1000, repeats: int = 3, json_path: Path | None = None) -> None:
    """Milliseconds of framework time a trial that does nothing, recorded durably (random sampler)."""
    rows = []
    for tensorboard in (False, True):
        costs = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                floor = _fsync_ms(Path(folder))
                start = time.perf_counter()
                hpt.tune(
                    NoTask(), {"lr": hpt.Float(1e-4, 1e-1)}, trials=trials, epochs=1, sampler="random",
                    run_dir=Path(folder) / "run", progress=False, tensorboard=tensorboard,
                )  # fmt: skip
                costs.append(1e3 * (time.perf_counter() - start) / trials)
        rows.append({"tensorboard": tensorboard, "ms_a_trial": statistics.median(costs), "fsync_ms": floor})
    print(f"| {trials} no-op trials | ms a trial (median of {repeats}) | one fsync here, ms |\n|---|---|---|")
    for row in rows:
        label = "with TensorBoard" if row["tensorboard"] else "without TensorBoard"
        print(f"| {label} | {row['ms_a_trial']:.2f} | {row['fsync_ms']:.2f} |")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))


# -- throughput ----------------------------------------------------------------------------------------


_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden_sizes": (128, 128), "batch_norm": True, "dropout": 0.2},
    "cnn": {"channels": (16, 32), "batch_norm": True},
    "rnn": {"cell": "gru", "hidden_size": 64},
}


@app.command()
def throughput(
    rows: int = 6400, batch_size: int = 64, repeats: int = 5, json_path: Path | None = None
) -> None:
    """Samples a second: the loop trainer against DataLoader + nn.Module + torch.optim, the same model,
    alternating in one run. Inputs are random numbers; evaluation is left out of both."""
    from torch.utils.data import DataLoader, TensorDataset

    from hpt_torch import machine, tasks
    from hpt_torch.trainers import loop
    from hpt_torch.trainers.member import Member

    torch.manual_seed(0)
    results = []
    cases: list[tuple[str, str, tuple[int, ...], Any]] = [
        ("MLP 64-128-128-10 (digits)", "mlp", (64,), lambda: PlainMLP(64)),
        ("MLP 784-128-128-10 (Fashion-MNIST)", "mlp", (784,), lambda: PlainMLP(784)),
        ("CNN 16-32, 3 x 3, batch norm (28 x 28)", "cnn", (1, 28, 28), PlainCNN),
        ("GRU 64 (28 rows of 28)", "rnn", (28, 28), PlainRNN),
    ]
    for label, name, shape, plain in cases:
        inputs, labels = torch.rand(rows, *shape), torch.randint(10, (rows,))
        part = hpt.Rows({"inputs": inputs, "targets": labels})
        data = hpt.Data(train=part, valid=hpt.Rows(part.slice(0, 64)), out_features=10)
        task = hpt.Classification(tasks.MODELS[name], data)
        hparams = {n: spec.default for n, spec in task.hparam_specs().items()}
        hparams |= {**_OPTIONS[name], "batch_size": batch_size}
        cpu = torch.device("cpu")
        trainer = loop.LoopTrainer(
            task, data.to(cpu, torch.float32), device=cpu, dtype=torch.float32, seed=0, epochs=repeats + 1
        )
        population = trainer.init([0], [hparams])
        member = Member(trainer, population, 0)
        member.batches = rows // batch_size
        member.steps_left = repeats * member.batches
        model = plain()
        optimizer = torch.optim.Adam(model.parameters())
        loader = DataLoader(
            TensorDataset(inputs, labels), batch_size=batch_size, shuffle=True, drop_last=True
        )

        def ours(member: Any = member, trainer: Any = trainer, epoch: int = 0) -> None:
            order = trainer.order.epoch(epoch)
            whole = rows // batch_size * batch_size
            for index, batch in trainer.data.train.batches(order[:whole], batch_size):
                member.step(batch, 1.0, index)

        times: dict[str, list[float]] = {"ordinary": [], "ours": []}
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            ordinary_epoch(model, loader, optimizer)
            middle = time.perf_counter()
            ours(epoch=repeat)
            if repeat:  # the first pass warms up
                times["ordinary"].append(middle - start)
                times["ours"].append(time.perf_counter() - middle)
        row: dict[str, Any] = {"model": label} | {k: rows / statistics.median(v) for k, v in times.items()}
        pairs = zip(times["ordinary"], times["ours"], strict=True)
        row["ratio"] = statistics.median(a / b for a, b in pairs)
        results.append(row)
    print(f"{torch.get_num_threads()} threads, freed memory kept: {machine.keep_freed_memory()}\n")
    print(f"| batch {batch_size} | ordinary loop, samples/s | loop trainer, samples/s | ratio |")
    print("|---|---|---|---|")
    for row in results:
        print(f"| {row['model']} | {row['ordinary']:,.0f} | {row['ours']:,.0f} | {row['ratio']:.2f} x |")
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1))


for _command in (
    *(bench_search.grid, bench_search.fashion, bench_scaling.scaling),
    *(bench_pbt.pbt, bench_pbt.decisions, bench_quality.quality, bench_torture.torture),
    bench_durability.durability,
    bench_reach.reach,
    bench_members.members,
    bench_engines.engines,
    bench_engines.planner,
):
    app.command()(_command)


if __name__ == "__main__":
    app()
