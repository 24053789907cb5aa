"""Made-up tasks whose best possible result is known."""

# N rows, T steps, F features, K symbols

from __future__ import annotations

import dataclasses

import numpy as np

from hpt_torch.data.base import Data
from hpt_torch.data.splits import split
from hpt_torch.seeding import generator
from hpt_torch.types import TaskError


def adding(
    *,
    rows: int = 5000,
    length: int = 50,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """The adding problem (Hochreiter and Schmidhuber 1997, in the form of Le et al. 2015): a regression.

    inputs (N, length, 2): a value in [0, 1) a step, and a mark that is 1 at one step of each half; targets
    (N,): the sum of the two marked values. The error can be 0; who ignores the inputs and says 1 has a mean
    squared error of 1/6.
    """
    _at_least(rows=(rows, 3), length=(length, 2))
    draw = generator(seed, "adding", rows, length)
    inputs = np.zeros((rows, length, 2), dtype=np.float32)
    inputs[..., 0] = draw.random((rows, length), dtype=np.float32)
    half, every = length // 2, np.arange(rows)
    first, second = draw.integers(half, size=rows), draw.integers(half, length, size=rows)
    inputs[every, first, 1] = inputs[every, second, 1] = 1
    targets = inputs[every, first, 0] + inputs[every, second, 0]
    return split(
        inputs,
        targets,
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        seed=seed,
        name="adding",
    )


def copying(
    *,
    rows: int = 5000,
    symbols: int = 8,
    copied: int = 10,
    delay: int = 20,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """The copy task (Hochreiter and Schmidhuber 1997, in the form of Arjovsky et al. 2016): keep and repeat.

    inputs int64 (N, T), T = delay + 2 * copied: `copied` symbols 1 … K, blanks (0), and K + 1 one step before
    repeating begins; targets int64 (N, T): blank but for the last `copied` steps, which are the symbols
    in order. Inputs and targets share one vocabulary of `out_features` = K + 2. The cross-entropy can be 0;
    a model without memory has copied * ln(K) / T a step.
    """
    _at_least(rows=(rows, 3), symbols=(symbols, 2), copied=(copied, 1), delay=(delay, 1))
    draw = generator(seed, "copying", rows, symbols, copied, delay)
    sequence = draw.integers(1, symbols + 1, size=(rows, copied))
    inputs = np.zeros((rows, delay + 2 * copied), dtype=np.int64)
    targets = np.zeros_like(inputs)
    inputs[:, :copied] = targets[:, -copied:] = sequence
    inputs[:, -copied - 1] = symbols + 1
    data = split(
        inputs,
        targets,
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        seed=seed,
        name="copying",
    )
    return dataclasses.replace(data, out_features=symbols + 2)


def teacher_student(
    *,
    rows: int = 2000,
    features: int = 16,
    hidden: int = 8,
    outputs: int = 1,
    noise: float = 0.1,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """A regression whose targets come from a random network with one layer of `hidden` tanh units.

    inputs (N, features) standard normal; targets (N,), or (N, outputs) for more than one: the teacher's
    answers, scaled to variance 1, plus normal noise of standard deviation `noise`. So no model's mean squared
    error is below noise² on many rows (0.01 by default), nor its R² above 1 / (1 + noise²).
    """
    _at_least(rows=(rows, 3), features=(features, 1), hidden=(hidden, 1), outputs=(outputs, 1))
    if not 0 <= noise < float("inf"):
        raise TaskError(f"noise must be a finite standard deviation from 0, got {noise}")
    draw = generator(seed, "teacher_student", rows, features, hidden, outputs)
    x = draw.standard_normal((rows, features)).astype(np.float32)
    into = draw.standard_normal((features, hidden)) * (1.5 / np.sqrt(features))
    out = draw.standard_normal((hidden, outputs))
    answers = np.tanh(x.astype(np.float64) @ into) @ out
    answers = (answers - answers.mean(axis=0)) / answers.std(axis=0)
    answers += noise * draw.standard_normal(answers.shape)
    # matmul and tanh differ in their last bits between processors; the data set must not
    targets = np.round(answers * 2**16) / 2**16
    return split(
        x,
        targets[:, 0] if outputs == 1 else targets,
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        seed=seed,
        name="teacher_student",
    )


def _at_least(**options: tuple[int, int]) -> None:
    for name, (value, least) in options.items():
        if value < least:
            raise TaskError(f"{name} must be at least {least}, got {value}")
