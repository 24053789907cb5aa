"""What a user's code keeps between calls, wherever it keeps it: the loop computes as plain autograd does."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from test_trainers_fused import CASES, _same_bits, _train
from torch import Tensor, nn

from hpt_torch.tasks import Classification
from hpt_torch.trainers import programs
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.trainers.watching import state_of

CALLS = 0
KEPT: dict[str, Any] = {"deep": [[{"calls": [0]}]]}
STEPS = torch.zeros(())


def _counted() -> Callable[[], int]:
    calls = [0]

    def count() -> int:
        calls[0] += 1
        return calls[0]

    return count


def _generated() -> Any:
    yield from range(10**6)


class _Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class _Model(nn.Module):
    """Counts its steps, somewhere, and does something else from the 21st on."""

    of_class: ClassVar[int] = 0
    counted = staticmethod(_counted())

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(*input_shape, out_features)
        self.array, self.scalar, self.slots = np.zeros(1), np.int64(0), _Slots()
        self.counter = itertools.count()

    def step(self) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return 2 * y if self.training and self.step() > 20 else y


class _Global(_Model):
    def step(self) -> float:
        global CALLS
        CALLS += 1
        return CALLS


class _OfClass(_Model):
    def step(self) -> float:
        _OfClass.of_class += 1
        return self.of_class


class _Closure(_Model):
    def step(self) -> float:
        return self.counted()


class _Array(_Model):
    def step(self) -> float:
        self.array += 1
        return float(self.array[0])


class _Scalar(_Model):
    def step(self) -> float:
        self.scalar = self.scalar + 1
        return float(self.scalar)


class _Slotted(_Model):
    def step(self) -> float:
        self.slots.calls += 1
        return self.slots.calls


class _Counter(_Model):
    def step(self) -> float:
        return next(self.counter)


class _Generator(_Model):
    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__(input_shape, out_features)
        self.generated = _generated()

    def step(self) -> float:
        return float(next(self.generated))


class _Deep(_Model):
    def step(self) -> float:
        calls = KEPT["deep"][0][0]["calls"]
        calls[0] += 1
        return float(calls[0])


class _Function(_Model):
    def step(self) -> float:
        _plus_one.calls = getattr(_plus_one, "calls", 0) + 1  # type: ignore[attr-defined]
        return float(_plus_one.calls)  # type: ignore[attr-defined]


def _plus_one() -> None: ...


def _count_in_a_list() -> int:
    HELD[0] += 1
    return HELD[0]


HELD = [0]
FUNCTIONS = {"count": _count_in_a_list}


class _InADictionary(_Model):
    def step(self) -> float:
        return FUNCTIONS["count"]()


class _OfAnAttribute(_Model):
    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__(input_shape, out_features)
        self.count = _count_in_a_list

    def step(self) -> float:
        return self.count()


class _OtherModule(_Model):
    def step(self) -> float:
        return float(elsewhere.count())


class _ReplacedTensor(_Model):
    def forward(self, x: Tensor) -> Tensor:
        global STEPS
        if self.training:
            STEPS = STEPS + 1
        y: Tensor = self.linear(x) * torch.where(STEPS > 20, 2.0, 1.0)
        return y


elsewhere = types.ModuleType("elsewhere_of_test_watching")
exec("CALLS = 0\ndef count():\n    global CALLS\n    CALLS += 1\n    return CALLS\n", vars(elsewhere))


def _reset() -> None:
    global CALLS, STEPS
    CALLS, STEPS, _OfClass.of_class, KEPT["deep"][0][0]["calls"] = 0, torch.zeros(()), 0, [0]
    _Model.counted = staticmethod(_counted())  # type: ignore[assignment]
    _plus_one.__dict__.clear()
    HELD[0] = 0
    vars(elsewhere)["CALLS"] = 0


def _trained(task: Classification, monkeypatch: pytest.MonkeyPatch, trace_from: int) -> Any:
    _reset()
    monkeypatch.setattr(programs, "TRACE_FROM", trace_from)
    defaults = {n: spec.default for n, spec in task.hparam_specs().items()}
    return _train(LoopTrainer, task, [0], [defaults | {"batch_size": 16}], torch.float32, epochs=4)


@pytest.mark.parametrize(
    "model",
    [
        *(_Global, _OfClass, _Closure, _Array, _Scalar, _Slotted, _Counter, _Generator, _Deep, _Function),
        *(_OtherModule, _ReplacedTensor, _InADictionary, _OfAnAttribute),
    ],
)
def test_a_step_that_counts_its_calls_is_not_recorded(
    model: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, elsewhere.__name__, elsewhere)
    task = Classification(model, CASES["mlp"][2]())
    plain, _, _ = _trained(task, monkeypatch, 10**9)
    replayed, reports, trainer = _trained(task, monkeypatch, 0)
    assert len(reports[0]) == 4
    assert [program.traced for program in trainer.module_programs.of("step")] == [False]
    assert _same_bits(plain, 0, replayed, 0)


class _Epochs(Classification):
    """Weighs its loss by the epochs that it has measured."""

    epochs = 0

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        return super().loss(model, batch, hparams) * (1 + self.epochs)

    def finalize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        self.epochs += 1
        return super().finalize(sums)


class _Setup(_Model):
    """Sets up at its first call what later ones find."""

    scale: float | None = None

    def step(self) -> float:
        if self.scale is None:
            self.scale = 0.5
        return self.scale


def test_what_changes_between_epochs_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = _trained(_Epochs(_Setup, CASES["mlp"][2]()), monkeypatch, 10**9)
    replayed, _, trainer = _trained(_Epochs(_Setup, CASES["mlp"][2]()), monkeypatch, 0)
    assert [program.traced for program in trainer.module_programs.of("step")] == [True] * 4
    assert _same_bits(plain, 0, replayed, 0)


def test_what_is_set_up_at_the_first_call_is_no_change_of_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Classification(_Setup, CASES["mlp"][2]())
    plain, _, _ = _trained(task, monkeypatch, 10**9)
    replayed, _, trainer = _trained(task, monkeypatch, 0)
    assert all(program.traced for program in trainer.module_programs.of("step"))
    assert _same_bits(plain, 0, replayed, 0)


class _Outputs(NamedTuple):
    y: Tensor


class _Dotted(dict[str, Any]):
    __getattr__ = dict.get


class _Ordinary(_Model):
    """Reaches what looks like an iterator and is none."""

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__(input_shape, out_features)
        self.settings = _Dotted(scale=2.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Outputs(self.linear(x) * self.settings["scale"]).y
        return y


def test_named_tuples_and_the_like_keep_no_step_from_being_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, trainer = _trained(Classification(_Ordinary, CASES["mlp"][2]()), monkeypatch, 0)
    assert [program.traced for program in trainer.module_programs.of("step")] == [True]


def test_the_state_is_equal_as_long_as_nothing_has_changed() -> None:
    model = _Model((4,), 2)
    model.register_buffer("mean", torch.zeros(2))
    model.scalar = np.float64("nan")
    before = state_of([model])
    assert state_of([model]) == before
    model.linear.weight.data.add_(1)  # what it computes with is not meant
    model.get_buffer("mean").add_(1)
    assert state_of([model]) == before
    model.array[0] = 1
    assert state_of([model]) != before
