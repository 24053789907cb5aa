"""The made-up tasks are what their docstrings promise."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from hpt_torch.data import DATASETS, Data, adding, copying, teacher_student
from hpt_torch.types import TaskError


def parts_of(data: Data) -> list[dict[str, torch.Tensor]]:
    return [dict(part.tensors) for part in (data.train, data.valid, data.holdout) if part is not None]


def test_adding() -> None:
    data = adding(rows=3000, length=21)
    assert (data.input_shape, data.out_features) == ((21, 2), 1)
    for part in parts_of(data):
        values, marks = part["inputs"].unbind(dim=-1)
        assert part["targets"].dtype == torch.float32
        assert marks[:, :10].sum(dim=1).unique().tolist() == [1.0]
        assert marks[:, 10:].sum(dim=1).unique().tolist() == [1.0]
        torch.testing.assert_close((values * marks).sum(dim=1), part["targets"])
        assert 0 <= float(values.min()) <= float(values.max()) < 1
    assert float((data.train.tensors["targets"] - 1).square().mean()) == pytest.approx(1 / 6, rel=0.1)


def test_copying() -> None:
    data = copying(rows=500, symbols=4, copied=3, delay=6)
    assert (data.input_shape, data.out_features) == ((12,), 6)
    for part in parts_of(data):
        x, y = part["inputs"], part["targets"]
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, :3], y[:, -3:])
        assert x[:, :3].unique().tolist() == [1, 2, 3, 4]
        assert y[:, :-3].abs().sum() == 0
        assert x[:, 8].unique().tolist() == [5]
        assert x[:, [3, 4, 5, 6, 7, 9, 10, 11]].abs().sum() == 0


@pytest.mark.parametrize("outputs", [1, 3])
def test_teacher_student(outputs: int) -> None:
    data = teacher_student(rows=4000, outputs=outputs, noise=0.3)
    clean = teacher_student(rows=4000, outputs=outputs, noise=0.0)
    assert (data.input_shape, data.out_features) == ((16,), outputs)
    for noisy, pure in zip(parts_of(data), parts_of(clean), strict=True):
        assert torch.equal(noisy["inputs"], pure["inputs"])
        assert noisy["targets"].shape == (
            (len(noisy["inputs"]),) if outputs == 1 else (len(noisy["inputs"]), 3)
        )
        error = noisy["targets"] - pure["targets"]
        assert float(error.square().mean()) == pytest.approx(0.3**2, rel=0.15)
        assert float(pure["targets"].std()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", ["adding", "copying", "teacher_student"])
def test_the_seed_decides(name: str) -> None:
    make = DATASETS[name]
    torch.manual_seed(1)
    first = make(rows=200, seed=8).fingerprint()
    torch.manual_seed(2)
    assert make(rows=200, seed=8).fingerprint() == first
    assert make(rows=200, seed=9).fingerprint() != first
    assert math.isclose(len(make(rows=200, valid_fraction=0.1).valid), 20)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adding", {"rows": 2}, "rows must be at least 3, got 2"),
        ("adding", {"length": 1}, "length must be at least 2, got 1"),
        ("copying", {"symbols": 1}, "symbols must be at least 2, got 1"),
        ("copying", {"delay": 0}, "delay must be at least 1, got 0"),
        ("teacher_student", {"hidden": 0}, "hidden must be at least 1, got 0"),
        ("teacher_student", {"noise": -1.0}, "noise must be a finite standard deviation from 0, got -1.0"),
        (
            "teacher_student",
            {"noise": float("nan")},
            "noise must be a finite standard deviation from 0, got nan",
        ),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        DATASETS[name](**options)


def test_every_data_set_takes_the_same_options() -> None:
    for name, make in DATASETS.items():
        parameters = inspect.signature(make).parameters
        assert make.__name__ == name
        for option, default in (("valid_fraction", 0.2), ("holdout_fraction", 0.2), ("seed", 0)):
            assert parameters[option].default == default, (name, option)
            assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY, (name, option)
