"""The standard hyperparameters: names, types, ranges, defaults, and whether a training step can read them
as tensors (dynamic). One table, so that recipes, models, optimizers and the documentation agree.

A *dynamic* hyperparameter reaches the training step as a tensor, one value a member; every other one is
*static* and part of a trial's signature: trials train together only where all static values are equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hpt_torch.types import HParams, HParamValue

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")
OPTIMIZERS = ("sgd", "adam", "adamw")


@dataclass(frozen=True, kw_only=True)
class HParamSpec:
    """What is known of one hyperparameter."""

    name: str
    type: Literal["float", "int", "bool", "str", "ints", "any"]
    default: Any = None  # None: not used unless given
    required: bool = False  # a recipe must fix it or search it
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # the bound itself is not allowed
    open_high: bool = False
    choices: tuple[str, ...] = ()
    dynamic: bool = False
    log: bool = False  # searched on a log scale unless the recipe says otherwise
    needs: Mapping[str, tuple[HParamValue, ...]] | None = (
        None  # read only where these others have these values
    )
    doc: str = ""

    def interval(self) -> str:
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def problem(self, value: Any) -> str | None:
        """Why `value` cannot be this hyperparameter's, or None."""
        if self.type == "any" or (value is None and self.default is None):
            return None
        if self.type == "bool":
            return None if isinstance(value, bool) else f"must be true or false, got {value!r}"
        if self.type == "str":
            if isinstance(value, str) and (not self.choices or value in self.choices):
                return None
            return f"must be one of {', '.join(self.choices)}, got {value!r}"
        if self.type == "ints":
            if not isinstance(value, (list, tuple)) or not all(map(_is_int, value)):
                return f"must be a list of integers, got {value!r}"
            bad = [v for v in value if not self._inside(v)]
            return f"every entry must be in {self.interval()}, got {bad[0]}" if bad else None
        if self.type == "int" and not _is_int(value):
            return f"must be an integer, got {value!r}"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            return f"must be a number, got {value!r}"
        return None if self._inside(value) else f"must be in {self.interval()}, got {value!r}"

    def _inside(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _spec(name: str, type: Any, default: Any = None, **rest: Any) -> HParamSpec:
    return HParamSpec(name=name, type=type, default=default, **rest)


_SGD = {"optimizer": ("sgd",)}
_ADAM = {"optimizer": ("adam", "adamw")}

TRAINING: tuple[HParamSpec, ...] = (
    _spec("optimizer", "str", "adam", choices=OPTIMIZERS, doc="update rule, as torch.optim's of that name"),
    _spec("lr", "float", 1e-3, low=0, open_low=True, dynamic=True, log=True, doc="learning rate"),
    _spec("batch_size", "int", 64, low=1, doc="samples an optimizer step; above the train rows: full batch"),
    _spec("weight_decay", "float", 0.0, low=0, dynamic=True, log=True,
          doc="as torch's optimizer of that name: in the gradient (sgd, adam), decoupled (adamw)"),
    _spec("momentum", "float", 0.9, low=0, high=1, open_high=True, dynamic=True, needs=_SGD, doc="sgd's"),
    _spec("nesterov", "bool", False, needs=_SGD, doc="sgd with Nesterov's momentum"),
    _spec("beta1", "float", 0.9, low=0, high=1, open_high=True, dynamic=True, needs=_ADAM,
          doc="decay of the first moment"),
    _spec("beta2", "float", 0.999, low=0, high=1, open_high=True, dynamic=True, needs=_ADAM,
          doc="decay of the second moment"),
    _spec("eps", "float", 1e-8, low=0, open_low=True, dynamic=True, log=True, needs=_ADAM,
          doc="added to the root of the second moment"),
    _spec("grad_clip_norm", "float", math.inf, low=0, open_low=True, dynamic=True,
          doc="largest 2-norm of the whole gradient; inf: not clipped"),
)  # fmt: skip

CLASSIFICATION: tuple[HParamSpec, ...] = (
    _spec("label_smoothing", "float", 0.0, low=0, high=1, open_high=True, dynamic=True,
          doc="share of the target spread over all classes"),
)  # fmt: skip

# What a model's constructor argument of one of these names must be. Which of them a model has, and their
# defaults, its signature says; which are dynamic, its `dynamic_hparams` says.
MODEL: tuple[HParamSpec, ...] = (
    _spec("hidden_sizes", "ints", low=1, doc="units of each hidden layer"),
    _spec("depth", "int", low=0, doc="number of hidden layers; with width, instead of hidden_sizes"),
    _spec("width", "int", low=1, doc="units of every hidden layer; with depth, instead of hidden_sizes"),
    _spec("activation", "str", choices=ACTIVATIONS, doc="non-linearity"),
    _spec("dropout", "float", low=0, high=1, open_high=True, doc="share of units set to zero in training"),
    _spec("batch_norm", "bool", doc="batch normalisation before the activation"),
    _spec("batch_norm_momentum", "float", low=0, high=1, open_low=True,
          doc="share of the new batch in the running statistics, as torch's momentum"),
    _spec("init", "str", choices=("default", "kaiming", "xavier", "orthogonal"), doc="initial weights"),
)  # fmt: skip

ALWAYS_LOG = frozenset({"lr", "weight_decay", "l1", "l2", "eps"})


def by_name(specs: Iterable[HParamSpec]) -> dict[str, HParamSpec]:
    return {spec.name: spec for spec in specs}


def signature(hparams: HParams, dynamic: Iterable[str]) -> str:
    """The sorted static items as JSON: equal signatures train the same program."""
    hidden = frozenset(dynamic)
    static = {name: value for name, value in hparams.items() if name not in hidden}
    return json.dumps(static, sort_keys=True, separators=(",", ":"))
