"""Benchmarks, each printing a markdown table; ratios are of figures measured in the same run."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
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


@app.callback()
def _main() -> None:
    pass


if __name__ == "__main__":
    app()
