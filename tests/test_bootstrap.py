"""Bootstrap intervals of hold-out figures, against closed forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from hpt_torch.data import Data, Rows
from hpt_torch.models import MLP
from hpt_torch.record import Record
from hpt_torch.report.summary import wilson
from hpt_torch.seeding import generator
from hpt_torch.tasks import Classification, Regression
from hpt_torch.trainers.bootstrap import intervals


class _Inputs(nn.Module):
    """Predicts what it is given; gradients have something to be of."""

    def __init__(self, input_shape: tuple[int, ...] = (), out_features: int = 0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def _rows(inputs: Any, targets: Any) -> Rows:
    return Rows({"inputs": torch.as_tensor(inputs), "targets": torch.as_tensor(targets)})


@pytest.mark.parametrize("count", [300, 4000])
def test_a_mean_has_the_interval_of_the_normal_distribution(count: int) -> None:
    """mse is a mean of squares: its standard error is known. 4,000 rows are drawn in blocks of eight."""
    errors = generator(0, "test", count).standard_normal((count, 1), dtype="float32")
    rows = _rows(errors, torch.zeros(count, 1))
    found = intervals(Regression(_Inputs, Data(train=rows, valid=rows)), _Inputs(), rows, seed=0)
    squares = errors[:, 0].astype(np.float64) ** 2
    half = 1.96 * squares.std() / math.sqrt(count)
    low, high = found["mse"]
    assert (low + high) / 2 == pytest.approx(squares.mean(), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.slow
def test_accuracy_and_auc() -> None:
    """Accuracy near Wilson's interval; ROC-AUC, which is no sum, near that of resampled rows."""
    draw, count = generator(0, "test"), 600
    targets = draw.integers(2, size=count)
    scores = targets + 1.2 * draw.standard_normal(count)
    logits = np.stack([np.zeros(count), scores - 0.5], axis=1).astype(np.float32)
    rows = _rows(logits, targets)
    data = Data(train=rows, valid=rows, out_features=2)
    task = Classification(_Inputs, data, metrics=["accuracy", "roc_auc"])
    found = intervals(task, _Inputs(), rows, seed=0)
    accuracy = float(((logits[:, 1] > 0) == targets).mean())
    assert found["accuracy"] == pytest.approx(wilson(accuracy, count), abs=0.012)
    samples = [draw.integers(count, size=count) for _ in range(400)]
    again = np.quantile([roc_auc_score(targets[i], scores[i]) for i in samples], [0.025, 0.975])
    assert found["roc_auc"] == pytest.approx(tuple(again), abs=0.008)
    assert found == intervals(task, _Inputs(), rows, seed=0)
    assert found != intervals(task, _Inputs(), rows, seed=1)


class _Odd(Regression):
    """A metric that is never finite, and the mode that its model was in."""

    modes: list[bool]

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.modes.append(model.training)
        return super().metrics(model, batch)

    def finalize(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return {"nan": math.nan, **super().finalize(sums)}


def test_what_has_no_interval() -> None:
    rows = _rows(torch.linspace(-1, 1, 40).unsqueeze(1), torch.zeros(40, 1))
    task, model = _Odd(_Inputs, Data(train=rows, valid=rows)), _Inputs()
    task.modes = []
    assert "nan" not in intervals(task, model, rows, seed=0)
    assert set(task.modes) == {False}
    assert model.training
    assert intervals(task, model, Rows(rows.slice(0, 19)), seed=0) == {}


class _OneClass(Classification):
    """Whose metric cannot be had of rows that are all of one class."""

    def finalize(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        if len(sums["each_target"].unique()) < 10:
            raise ValueError("one class is missing")
        return {"loss": 0.0, "accuracy": 0.5}

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"each_target": batch["targets"], "rows": len(batch["targets"])}  # type: ignore[dict-item]


def test_a_figure_without_an_interval(
    tmp_path: Path, run_quick: Callable[..., str], digits_task: Classification
) -> None:
    data = digits_task.data()
    assert data.holdout is not None
    ten = torch.tensor([int((data.holdout.tensors["targets"] == i).nonzero()[0]) for i in range(10)])
    few = Rows({name: torch.cat([tensor[ten]] * 2) for name, tensor in data.holdout.tensors.items()})
    task = _OneClass(MLP, dataclasses.replace(data, holdout=few))
    run_quick(tmp_path / "run", "trainer.engine=loop", task=task)
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        (reading,) = record.of_kind("holdout")
    assert reading.body["metrics"]["holdout/accuracy"] == 0.5
    assert reading.body["interval"] == {}
