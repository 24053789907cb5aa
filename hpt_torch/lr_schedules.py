"""Learning-rate schedules as factors of `lr`: functions of how many epochs a member has trained.

Time is counted in epochs, fractions included, so that a schedule means the same for every batch size and
goes on where it was when a member changes its own.
"""

# S steps of an epoch; every hyperparameter may be a float or a tensor that broadcasts against (S,)

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def factors(name: str, epoch: int, batches: int, epochs: int, h: Mapping[str, Any]) -> Tensor:
    """The factors of lr at the steps of one epoch: float64, shape (S,), or (P, S) for h of shape (P, 1).

    epoch: epochs trained before, batches: steps an epoch (S), epochs: of the whole trial.

    Equal, step for step and with N = epochs * S, to torch.optim.lr_scheduler's StepLR(step_epochs * S,
    step_gamma), CosineAnnealingLR(N, cosine_min * lr), ExponentialLR(exponential_gamma ** (1 / S)),
    OneCycleLR(lr, total_steps=N + 1, pct_start=(one_cycle_start * N + 1) / (N + 1),
    div_factor=one_cycle_div, final_div_factor=one_cycle_final_div), whose peak lies one step early, and for
    warm-up over W steps to LinearLR(1 / W, total_iters=W - 1).
    """
    done_S = epoch + torch.arange(batches, dtype=torch.float64) / batches
    match name:
        case "constant":
            factor = torch.ones_like(done_S)
        case "step":
            # A step that falls on a drop up to rounding belongs behind it.
            factor = h["step_gamma"] ** torch.floor(done_S / h["step_epochs"] + 1e-9)
        case "exponential":
            factor = h["exponential_gamma"] ** done_S
        case "cosine":
            low = h["cosine_min"]
            factor = low + (1 - low) * (1 + torch.cos(math.pi * done_S / epochs)) / 2
        case "one_cycle":
            factor = _one_cycle(done_S / epochs, h)
        case _:
            raise ValueError(
                f"schedule must be constant, step, cosine, exponential or one_cycle, got {name!r}"
            )
    warmup = torch.as_tensor(h["warmup_epochs"], dtype=torch.float64)
    risen = (done_S + 1 / batches) / torch.where(warmup > 0, warmup, 1.0)
    return torch.where((warmup > 0) & (risen < 1), risen * factor, factor)


def _one_cycle(position_S: Tensor, h: Mapping[str, Any]) -> Tensor:
    """Smith & Topin 2017 ("Super-convergence"), with cosine annealing as torch's OneCycleLR."""
    start, first = h["one_cycle_start"], 1 / h["one_cycle_div"]
    last = first / h["one_cycle_final_div"]
    rise = _anneal(first, 1.0, position_S / start)
    fall = _anneal(1.0, last, (position_S - start) / (1 - start))
    return torch.where(position_S <= start, rise, fall)


def _anneal(begin: Any, end: Any, share: Tensor) -> Tensor:
    value: Tensor = end + (begin - end) / 2 * (1 + torch.cos(math.pi * share))
    return value
