"""New rows in the units of a data set, and the data as a run's best model saw it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hpt_torch
from hpt_torch.data import Rows, split


@pytest.mark.parametrize("shape", [(5,), (4, 3)])
@pytest.mark.parametrize("standardise", [False, True, (True, False, True, True, False)])
def test_new_rows_are_prepared_as_those_of_the_data_set_were(
    shape: tuple[int, ...], standardise: Any
) -> None:
    standardise = standardise if isinstance(standardise, bool) else standardise[: shape[-1]]
    x = np.random.default_rng(0).normal(50, 3, (60, *shape))
    data = split(x, np.arange(60) % 2, standardise=standardise, holdout_fraction=0)
    rows = torch.cat([part.tensors["inputs"] for part in (data.train, data.valid)])  # type: ignore[union-attr]
    found = data.prepared(x)
    order = [row.flatten()[0] for row in rows], [row.flatten()[0] for row in found]
    assert torch.equal(rows[np.argsort(order[0])], found[np.argsort(order[1])])
    assert data.prepared(x, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("more", [{"folds": 3}, {"confirm": 2}, {}], ids=["folds", "confirm", "plain"])
def test_the_best_model_gives_the_recorded_holdout_figure_on_the_results_data(
    more: dict[str, Any], tmp_path: Path
) -> None:
    from hpt_torch.models import Linear

    x = np.random.default_rng(0).normal(size=(90, 3)) + np.linspace(0, 6, 90)[:, None]
    data = split(x, x @ np.array([1.0, -2.0, 3.0]), ordered=True, standardise=True)
    task = hpt_torch.Regression(Linear, data)
    result = hpt_torch.tune(
        task, {"lr": hpt_torch.Float(0.03, 0.1)}, trials=2, epochs=5, run_dir=tmp_path / "run",
        executor="inline", progress=False, tensorboard=False, **more,
    )  # fmt: skip
    model, holdout = result.best_model(), result.data.holdout
    assert isinstance(holdout, Rows)
    with torch.no_grad():
        error = model(holdout.tensors["inputs"]).flatten() - holdout.tensors["targets"]
        new = model(result.data.prepared(x[-18:])).flatten() - torch.from_numpy(x[-18:] @ [1.0, -2.0, 3.0])
    assert float(error.square().mean()) == pytest.approx(result.holdout["holdout/mse"], rel=1e-5)
    assert float(new.square().mean()) == pytest.approx(result.holdout["holdout/mse"], rel=1e-4)
