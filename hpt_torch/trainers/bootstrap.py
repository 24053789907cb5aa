"""How far a metric could have come out otherwise with as many other rows: bootstrap intervals."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from hpt_torch.data import Part
from hpt_torch.models.layers import stateless_layers
from hpt_torch.seeding import generator
from hpt_torch.task import Task
from hpt_torch.trainers.base import cast, evaluation_noise
from hpt_torch.trainers.draws import Draws

BLOCKS = 500  # of rows; whole ones are drawn, which is nearly as good as single rows, for any task's metrics
_RESAMPLES, _RESAMPLES_OF_ROWS = 1000, 200  # the second where a metric needs each row again
_LEVEL = 0.95


def intervals(
    task: Task, model: nn.Module, rows: Part, seed: int, autocast: torch.dtype | None = None
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the task's metrics, for rows that are independent of each other.

    Resamples blocks of neighbouring rows with replacement and finishes their sums. A metric that is not
    finite in any resample is left out, as everything is with fewer than 20 rows.
    """
    if len(rows) < 20:
        return {}
    was_training = model.training
    model.eval()
    blocks: list[dict[str, Tensor]] = []
    layers = stateless_layers(model)
    for index, batch in rows.batches(None, -(-len(rows) // BLOCKS)):
        noise = Draws(*evaluation_noise(index, rows.device, layers))
        with torch.no_grad(), noise, cast(rows, autocast):
            sums = task.metrics(model, batch)
            blocks.append({name: torch.as_tensor(value).detach().cpu() for name, value in sums.items()})
    model.train(was_training)
    each = {n: [block[n] for block in blocks] for n in blocks[0] if n.startswith("each_")}
    sums = {n: torch.stack([block[n] for block in blocks]) for n in blocks[0] if n not in each}
    draw, found = generator(seed, "bootstrap"), dict[str, list[float]]()
    for _ in range(_RESAMPLES_OF_ROWS if each else _RESAMPLES):
        drawn = torch.from_numpy(draw.integers(len(blocks), size=len(blocks)))
        again = {name: torch.cat([parts[i] for i in drawn]) for name, parts in each.items()}
        again |= {name: stacked[drawn].sum(0) for name, stacked in sums.items()}
        for name, value in task.finalize(again).items():
            if math.isfinite(value):
                found.setdefault(name, []).append(value)
    tails = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
    bounds = {name: np.quantile(values, tails) for name, values in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
