"""Every schedule is torch.optim.lr_scheduler's own, step for step, and counts in epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from hpt_torch.hparams import SCHEDULES, TRAINING
from hpt_torch.lr_schedules import factors

LR = 0.3
SIZES = [(1, 7), (3, 5), (4, 1), (7, 11), (30, 3)]  # (epochs, batches an epoch)
DEFAULTS = {spec.name: spec.default for spec in TRAINING}

Scheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)


def _theirs(scheduler: Scheduler, steps: int) -> torch.Tensor:
    """The factors of torch's scheduler at the first `steps` steps."""
    optimizer = _optimizer()
    schedule, seen = scheduler(optimizer), []
    for step in range(steps):
        seen.append(float(optimizer.param_groups[0]["lr"]) / LR)
        optimizer.step()
        if step + 1 < steps:
            schedule.step()
    return torch.tensor(seen, dtype=torch.float64)


def _mine(name: str, epochs: int, batches: int, **given: Any) -> torch.Tensor:
    h = {**DEFAULTS, **given}
    return torch.cat([factors(name, epoch, batches, epochs, h) for epoch in range(epochs)])


def _cases() -> Iterator[Any]:
    """(schedule, its hyperparameters, torch's scheduler for S batches and E epochs)."""
    yield "constant", {}, lambda S, E: lambda o: lr_scheduler.ConstantLR(o, factor=1.0)
    for epochs, gamma in ((1, 0.5), (2, 0.1), (10, 0.9)):
        yield (
            "step",
            {"step_epochs": epochs, "step_gamma": gamma},
            lambda S, E, n=epochs, g=gamma: lambda o: lr_scheduler.StepLR(o, n * S, g),
        )
    for gamma in (0.95, 0.2, 1.0):
        yield (
            "exponential",
            {"exponential_gamma": gamma},
            lambda S, E, g=gamma: lambda o: lr_scheduler.ExponentialLR(o, g ** (1 / S)),
        )
    for low in (0.0, 0.1, 1.0):
        yield (
            "cosine",
            {"cosine_min": low},
            lambda S, E, c=low: lambda o: lr_scheduler.CosineAnnealingLR(o, E * S, c * LR),
        )


@pytest.mark.parametrize(("epochs", "batches"), SIZES)
@pytest.mark.parametrize(("name", "given", "theirs"), list(_cases()))
def test_equals_torch(name: str, given: dict[str, Any], theirs: Any, epochs: int, batches: int) -> None:
    expected = _theirs(theirs(batches, epochs), epochs * batches)
    torch.testing.assert_close(_mine(name, epochs, batches, **given), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("epochs", "batches"), SIZES)
@pytest.mark.parametrize(
    ("start", "div", "final_div"), [(0.3, 25.0, 1e4), (0.5, 4.0, 10.0), (0.11, 1.0, 1.0)]
)
def test_one_cycle_equals_torch(
    start: float, div: float, final_div: float, epochs: int, batches: int
) -> None:
    """torch takes a step from both its total and its peak: total_steps * pct_start - 1 is where lr peaks."""
    given = {"one_cycle_start": start, "one_cycle_div": div, "one_cycle_final_div": final_div}
    steps = epochs * batches

    def scheduler(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.OneCycleLR(
            optimizer,
            LR,
            total_steps=steps + 1,
            pct_start=(start * steps + 1) / (steps + 1),
            div_factor=div,
            final_div_factor=final_div,
            cycle_momentum=False,
        )

    mine = _mine("one_cycle", epochs, batches, **given)
    torch.testing.assert_close(mine, _theirs(scheduler, steps), rtol=1e-9, atol=1e-9)
    assert float(mine[0]) == pytest.approx(1 / div)


@pytest.mark.parametrize(("epochs", "batches"), SIZES)
@pytest.mark.parametrize("warmup", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_torchs_linear_rise_times_the_schedule(
    name: str, warmup: int, epochs: int, batches: int
) -> None:
    steps = warmup * batches
    rise = _theirs(
        lambda o: lr_scheduler.LinearLR(o, start_factor=1 / steps, total_iters=steps - 1), epochs * batches
    )
    expected = rise * _mine(name, epochs, batches)
    torch.testing.assert_close(
        _mine(name, epochs, batches, warmup_epochs=warmup), expected, rtol=1e-9, atol=1e-9
    )


def test_warmup_of_a_part_of_an_epoch() -> None:
    rise = _mine("constant", 2, 8, warmup_epochs=0.5)
    assert rise.tolist() == [0.25, 0.5, 0.75, *[1.0] * 13]


@pytest.mark.parametrize("name", SCHEDULES)
def test_members_with_their_own_hyperparameters_equal_each_alone(name: str) -> None:
    """Hyperparameters of shape (P, 1) give (P, S)."""
    own: dict[str, list[float]] = {
        "warmup_epochs": [0.0, 1.5, 3.0],
        "step_epochs": [1.0, 2.0, 0.5],
        "step_gamma": [0.5, 0.1, 1.0],
        "exponential_gamma": [0.5, 0.9, 1.0],
        "cosine_min": [0.0, 0.5, 1.0],
        "one_cycle_start": [0.2, 0.3, 0.9],
        "one_cycle_div": [1.0, 25.0, 10.0],
        "one_cycle_final_div": [1.0, 1e4, 7.0],
    }
    stacked = {k: torch.tensor(v, dtype=torch.float64).unsqueeze(1) for k, v in own.items()}
    for epoch in range(4):
        together = factors(name, epoch, 6, 4, stacked)
        assert together.dtype == torch.float64
        for i in range(3):
            alone = factors(name, epoch, 6, 4, {k: v[i] for k, v in own.items()})
            assert alone.shape == (6,)
            torch.testing.assert_close(together.expand(3, 6)[i], alone, rtol=0, atol=1e-14)
    assert together.shape == (3, 6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_batch_size_keeps_the_position_in_epochs(name: str) -> None:
    """4 or 12 steps an epoch: the same factor wherever both have a step, so a member may change between."""
    h = {**DEFAULTS, "step_epochs": 2}
    for epoch in range(6):
        few, many = (factors(name, epoch, batches, 6, h) for batches in (4, 12))
        torch.testing.assert_close(few, many[::3], rtol=0, atol=1e-12)


def test_a_drop_falls_on_its_step_in_spite_of_rounding() -> None:
    """0.1 is no binary fraction: 3 drops of 0.1 epochs must lie at step 3 of 10, not at step 4."""
    dropped = _mine("step", 1, 10, step_epochs=0.1, step_gamma=0.5)
    assert dropped.tolist() == [0.5**k for k in range(10)]


def test_factors_are_those_of_an_epoch_that_training_enters_anew() -> None:
    """Nothing is carried from epoch to epoch: a resumed trial asks for the epoch it stands in."""
    whole = _mine("cosine", 5, 6, warmup_epochs=2)
    torch.testing.assert_close(factors("cosine", 3, 6, 5, {**DEFAULTS, "warmup_epochs": 2}), whole[18:24])


def test_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="schedule must be constant, .* or one_cycle, got 'plateau'"):
        factors("plateau", 0, 1, 1, DEFAULTS)
