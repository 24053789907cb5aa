"""`scripts/bench members`: many models of one kind against the ordinary loop, one after another."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import bench_search
import torch
import typer
from torch import nn

import hpt_torch as hpt
from hpt_torch import tasks
from hpt_torch.record import Record


class PlainMLP(nn.Sequential):
    def __init__(self, features: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs in (features, 128):
            layers += [nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2)]
        super().__init__(*layers, nn.Linear(128, 10))


class PlainCNN(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class PlainRNN(nn.Module):
    def __init__(self, cell: str = "gru", hidden: int = 64) -> None:
        super().__init__()
        kind = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[cell]
        self.cell, self.head = kind(28, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])  # type: ignore[no-any-return]


def ordinary_epoch(model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer) -> None:
    """One epoch as PyTorch's tutorials write it."""
    model.train()
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


_CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], Callable[[], nn.Module]]] = {
    "CNN 16-32, 3 x 3, batch norm": (
        "cnn", (1, 28, 28), {"channels": [16, 32], "batch_norm": True}, PlainCNN,
    ),
    **{
        f"{cell.upper()} {hidden}, 28 rows of 28": (
            "rnn", (28, 28), {"cell": cell, "hidden_size": hidden},
            lambda cell=cell, hidden=hidden: PlainRNN(cell, hidden),  # type: ignore[misc]
        )
        for cell in ("gru", "rnn", "lstm") for hidden in (32, 64)
    },
}  # fmt: skip


def members(
    count: int = 16,
    rows: int = 6400,
    epochs: int = 2,
    repeats: int = 3,
    only: Annotated[str, typer.Option(help="cases that begin so")] = "",
    json_path: Path | None = None,
) -> None:
    """Seconds to train so many models for some epochs: the training phase of a search that differs in lr,
    against a DataLoader loop of the same models with the better of one thread and all; alternating."""
    before, table = bench_search.load(), []
    print(f"| {count} models, {epochs} epochs of {rows} rows | ours, s | ordinary loop, s | ratio | engine |")
    print("|---|---|---|---|---|")
    for label, (name, shape, hparams, plain) in _CASES.items():
        if not label.lower().startswith(only.lower()):
            continue
        torch.manual_seed(0)
        part = hpt.Rows({"inputs": torch.rand(rows, *shape), "targets": torch.randint(10, (rows,))})
        times: list[tuple[float, float]] = []
        for _ in range(repeats):
            ours, engine = _ours(name, part, hparams, count, epochs)
            times.append((ours, _ordinary(part, plain, count, epochs)))
        mine, others = (statistics.median(pair[i] for pair in times) for i in (0, 1))
        ratio = statistics.median(b / a for a, b in times)
        print(f"| {label} | {mine:.1f} | {others:.1f} | {ratio:.1f} x | {engine} |")
        table.append({"case": label, "ours": mine, "ordinary": others, "ratio": ratio, "engine": engine})
    bench_search.say_load(before)
    bench_search._write(json_path, table)


def _ours(name: str, part: hpt.Rows, hparams: dict[str, Any], count: int, epochs: int) -> tuple[float, str]:
    """From the plan to the last trial's end, as the record has it; evaluation is on 64 rows."""
    data = hpt.Data(train=part, valid=hpt.Rows(part.slice(0, 64)), out_features=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        hpt.tune(
            hpt.Classification(tasks.MODELS[name], data), {"lr": hpt.Float(1e-4, 1e-2)}, trials=count,
            epochs=epochs, hparams={**hparams, "batch_size": 64}, sampler="random", round_size=count,
            run_dir=path, progress=False, tensorboard=False,
        )  # fmt: skip
        with Record(path / "run.db", readonly=True) as record:
            (plan,), last = record.of_kind("plan"), record.of_kind("finish")[-1]
            return last.elapsed - plan.elapsed, plan.body["chunks"][0]["engine"]


def _ordinary(part: hpt.Rows, plain: Callable[[], nn.Module], count: int, epochs: int) -> float:
    """Seconds of the faster of one thread and all cores; each trains a quarter of the models, times four."""
    from torch.utils.data import DataLoader, TensorDataset

    threads, times = torch.get_num_threads(), []
    for used in (1, bench_search._cores()):
        torch.set_num_threads(used)
        started = time.perf_counter()
        for _ in range(max(count // 4, 1)):
            model = plain()
            optimizer = torch.optim.Adam(model.parameters())
            loader = DataLoader(
                TensorDataset(*part.tensors.values()), batch_size=64, shuffle=True, drop_last=True
            )
            for _ in range(epochs):
                ordinary_epoch(model, loader, optimizer)
        times.append((time.perf_counter() - started) * count / max(count // 4, 1))
    torch.set_num_threads(threads)
    return min(times)
