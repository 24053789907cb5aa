"""Explore: a child's hyperparameters from its parent's, always inside the search space.

Every hyperparameter of the child is, in this order,
1. its parent's value, or with `crossover_probability` that of another good member;
2. with `resample_probability` a fresh draw from the prior, otherwise perturbed:
   a number without steps is multiplied by a factor; one with steps, or a choice among numbers, moves to a
   neighbour; any other choice keeps its value;
3. cut to the bounds of its dimension.

Perturbing and resampling are those of Jaderberg et al. 2017 (arXiv 1711.09846), sections 3 and 4.1.1. Steps,
choices, conditions and crossover are not in the paper. Where the paper says nothing of bounds, we cut: a
child at a bound whose perturbation points outside keeps its value, and the next one may turn back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hpt_torch import space as spaces
from hpt_torch.space import Choice, Dimension, Float, Int, Space
from hpt_torch.types import HParams, HParamValue, is_number

# A number near 0 on a linear scale moves as if it were this share of its range: multiplied it would stay 0.
NEAR_ZERO = 0.1


def explore(
    parent: HParams,
    space: Space,
    *,
    rng: np.random.Generator,
    mates: Sequence[HParams] = (),
    resample_probability: float = 0.25,
    perturbation_factors: tuple[float, float] = (0.8, 1.2),
    crossover_probability: float = 0.0,
) -> dict[str, HParamValue]:
    """The child's hyperparameters. `mates`: other good members' hyperparameters, for the crossover.

    Conditions hold in the child: a dimension that is no longer active is left out, and one that has become
    active is drawn from its prior. So is a value that its dimension does not contain. The result does not
    depend on the order in which the space names its dimensions, but where conditions demand one.
    """
    start = dict(parent)
    if mates and crossover_probability > 0:
        mate = mates[int(rng.integers(len(mates)))]
        start = crossover(parent, mate, crossover_probability, rng)
    child: dict[str, HParamValue] = {}
    for name in spaces.ordered(dict(sorted(space.items()))):
        dimension = space[name]
        if not spaces.is_active(dimension, child):
            continue
        again = rng.random() < resample_probability
        if again or name not in start or not dimension.contains(start[name]):
            child[name] = resample(name, dimension, rng)
        else:
            child[name] = perturb(name, dimension, start[name], perturbation_factors, rng)
    return child


def crossover(
    first: HParams, second: HParams, probability: float, rng: np.random.Generator
) -> dict[str, HParamValue]:
    """`first`, with each value taken from `second`, where that has one, with the given probability."""
    return {
        name: second[name] if rng.random() < probability and name in second else first[name]
        for name in sorted(first)
    }


def perturb(
    name: str,
    dimension: Dimension,
    value: HParamValue,
    factors: tuple[float, float],
    rng: np.random.Generator,
) -> HParamValue:
    """A value beside `value`: one of the two factors, at even odds, says whether it goes down or up.

    An integer is rounded up or down at random, in the mean to the product, and always by at least one: 1 x
    1.2 becomes 2, and with the paper's factors no integer of the range is out of reach.
    """
    up = bool(rng.integers(2))
    if isinstance(dimension, Choice):
        return _neighbour_option(dimension, value, up)
    assert is_number(value), f"{name} must be a number, got {value!r}"
    number: float = value  # type: ignore[assignment]
    if _has_steps(dimension):
        return _nth(dimension, _index(dimension, number) + (1 if up else -1))
    moved = _multiplied(name, dimension, number, factors[up])
    if isinstance(dimension, Float):
        return clip(dimension, moved)
    whole = math.floor(moved) + int(rng.random() < moved - math.floor(moved))
    if whole == number:
        whole += 1 if moved > number else -1
    return clip(dimension, whole)


def resample(name: str, dimension: Dimension, rng: np.random.Generator) -> HParamValue:
    """A draw from the prior: uniform, log-uniform on a log scale, even odds for steps and options."""
    if isinstance(dimension, Choice):
        option: HParamValue = dimension.options[int(rng.integers(len(dimension.options)))]
        return option
    if spaces.is_log(name, dimension):
        # an integer owns the half on both sides of it, so that the ends are drawn as often as the rest
        half = 0.5 if isinstance(dimension, Int) else 0.0
        ends = math.log(dimension.low - half), math.log(dimension.high + half)
        return clip(dimension, math.exp(_between(*ends, rng)))
    if isinstance(dimension, Int) or dimension.step is not None:
        return _nth(dimension, int(rng.integers(dimension.count() or 1)))
    return clip(dimension, _between(dimension.low, dimension.high, rng))


def clip(dimension: Float | Int, value: float) -> float | int:
    """The number of the dimension that is nearest to `value`."""
    if _has_steps(dimension):
        return _nth(dimension, _index(dimension, value))
    inside = min(max(value, dimension.low), dimension.high)
    return round(inside) if isinstance(dimension, Int) else float(inside)


def is_ordered(dimension: Choice) -> bool:
    """Whether every option is a number, so that an option has neighbours. true and false are none."""
    return all(is_number(option) for option in dimension.options)


def _neighbour_option(dimension: Choice, value: HParamValue, up: bool) -> HParamValue:
    if not is_ordered(dimension):
        return value
    options: list[HParamValue] = sorted(dimension.options)
    here = [spaces.encode(option) for option in options].index(spaces.encode(value))
    return options[min(max(here + (1 if up else -1), 0), len(options) - 1)]


def _multiplied(name: str, dimension: Float | Int, value: float, factor: float) -> float:
    """`value * factor`. On a linear scale that includes 0 a small value moves as one of a tenth of the range
    would, and away from 0 as well as towards it."""
    if spaces.is_log(name, dimension) or not dimension.low <= 0 <= dimension.high:
        return value * factor
    near = NEAR_ZERO * dimension.high - NEAR_ZERO * dimension.low
    return value + (factor - 1) * (value if abs(value) >= near else near)


def _has_steps(dimension: Float | Int) -> bool:
    return dimension.step is not None if isinstance(dimension, Float) else dimension.step != 1


def _index(dimension: Float | Int, value: float) -> int:
    steps = (value - dimension.low) / (dimension.step or 1)
    return round(min(max(steps, 0), (dimension.count() or 1) - 1))


def _nth(dimension: Float | Int, index: int) -> float | int:
    """The value number `index` of a dimension that can be counted, cut to the first and the last."""
    inside = min(max(index, 0), (dimension.count() or 1) - 1)
    return min(dimension.low + inside * (dimension.step or 1), dimension.high)


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """Uniform in [low, high], written so that no range overflows."""
    share = float(rng.random())
    return low * (1 - share) + high * share
