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

from hpt_torch.types import HParams, HParamValue, is_int, is_number

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("constant", "step", "cosine", "exponential", "one_cycle")


@dataclass(frozen=True, kw_only=True)
class HParamSpec:
    """What is known of one hyperparameter."""

    name: str
    type: Literal["float", "int", "bool", "str", "ints", "strs", "any"]
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
        if value is None and self.default is None:
            return None
        if self.type == "any":  # bounds, if there are any, are of numbers
            good = not is_number(value) or math.isinf(self.high) or self._inside(value)
            return None if good else f"must be in {self.interval()}, got {value!r}"
        if self.type == "bool":
            return None if isinstance(value, bool) else f"must be true or false, got {value!r}"
        if self.type == "str":
            if isinstance(value, str) and (not self.choices or value in self.choices):
                return None
            return f"must be one of {', '.join(self.choices)}, got {value!r}"
        if self.type == "strs":
            good = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
            return None if good else f"must be a list of texts, got {value!r}"
        if self.type == "ints":
            if not isinstance(value, (list, tuple)) or not all(map(is_int, value)):
                return f"must be a list of integers, got {value!r}"
            bad = [v for v in value if not self._inside(v)]
            return f"every entry must be in {self.interval()}, got {bad[0]}" if bad else None
        if self.type == "int" and not is_int(value):
            return f"must be an integer, got {value!r}"
        if not is_number(value) and not (isinstance(value, float) and math.isinf(value)):
            return f"must be a number, got {value!r}"
        return None if self._inside(value) else f"must be in {self.interval()}, got {value!r}"

    def _inside(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


def _spec(name: str, type: Any, default: Any = None, **rest: Any) -> HParamSpec:
    return HParamSpec(name=name, type=type, default=default, **rest)


_SGD = {"optimizer": ("sgd",)}
_ADAM = {"optimizer": ("adam", "adamw")}
_SQUARED = {"optimizer": ("adam", "adamw", "rmsprop")}
_UNIT = {"low": 0.0, "high": 1.0}


def _schedule(name: str) -> Mapping[str, tuple[HParamValue, ...]]:
    return {"schedule": (name,)}


TRAINING: tuple[HParamSpec, ...] = (
    _spec("optimizer", "str", "adam", choices=OPTIMIZERS, doc="update rule, as torch.optim's of that name"),
    _spec("lr", "float", 1e-3, low=0, high=1e6, open_low=True, dynamic=True, log=True, doc="learning rate"),
    _spec("batch_size", "int", 64, low=1, high=10**9,
          doc="samples an optimizer step; above the train rows: full batch"),
    _spec("accumulation_steps", "int", 1, low=1,
          doc="parts in which a batch is processed, their gradients added up: the same step in less memory"),
    _spec("weight_decay", "float", 0.0, low=0, dynamic=True, log=True,
          doc="as torch's optimizer of that name: in the gradient (sgd, adam, rmsprop), decoupled (adamw)"),
    _spec("l1", "float", 0.0, low=0, dynamic=True, log=True, doc="penalty l1 * sum |W| in the loss"),
    _spec("l2", "float", 0.0, low=0, dynamic=True, log=True, doc="penalty l2 * sum W**2 in the loss"),
    _spec("decay_norm_and_bias", "bool", True,
          doc="false: weight_decay, l1 and l2 leave parameters of one dimension (biases, norms) alone"),
    _spec("momentum", "float", 0.9, **_UNIT, open_high=True, dynamic=True, needs=_SGD, doc="sgd's"),
    _spec("nesterov", "bool", False, needs=_SGD, doc="sgd with Nesterov's momentum"),
    _spec("beta1", "float", 0.9, **_UNIT, open_high=True, dynamic=True, needs=_ADAM,
          doc="decay of the first moment"),
    _spec("beta2", "float", 0.999, **_UNIT, open_high=True, dynamic=True, needs=_ADAM,
          doc="decay of the second moment"),
    _spec("alpha", "float", 0.99, **_UNIT, open_high=True, dynamic=True, needs={"optimizer": ("rmsprop",)},
          doc="rmsprop's decay of the second moment"),
    _spec("eps", "float", 1e-8, low=0, open_low=True, dynamic=True, log=True, needs=_SQUARED,
          doc="added to the root of the second moment"),
    _spec("grad_clip_norm", "float", math.inf, low=0, open_low=True, dynamic=True,
          doc="largest 2-norm of the whole gradient; inf: not clipped"),
    _spec("grad_clip_value", "float", math.inf, low=0, open_low=True, dynamic=True,
          doc="largest absolute value in the gradient; inf: not clipped"),
    _spec("schedule", "str", "constant", choices=SCHEDULES, doc="of the learning rate over a trial's epochs"),
    _spec("warmup_epochs", "float", 0.0, low=0, dynamic=True, doc="epochs of linear rise to the schedule"),
    _spec("step_epochs", "float", 10.0, low=0, open_low=True, dynamic=True, needs=_schedule("step"),
          doc="step: epochs between drops"),
    _spec("step_gamma", "float", 0.1, **_UNIT, open_low=True, dynamic=True, needs=_schedule("step"),
          doc="step: factor of each drop"),
    _spec("exponential_gamma", "float", 0.95, **_UNIT, open_low=True, dynamic=True,
          needs=_schedule("exponential"), doc="exponential: factor an epoch"),
    _spec("cosine_min", "float", 0.0, **_UNIT, dynamic=True, needs=_schedule("cosine"),
          doc="cosine: the last learning rate as a share of lr"),
    _spec("one_cycle_start", "float", 0.3, **_UNIT, open_low=True, open_high=True, dynamic=True,
          needs=_schedule("one_cycle"), doc="one_cycle: share of the training that rises to lr"),
    _spec("one_cycle_div", "float", 25.0, low=1, dynamic=True, needs=_schedule("one_cycle"),
          doc="one_cycle: lr divided by the first learning rate"),
    _spec("one_cycle_final_div", "float", 1e4, low=1, dynamic=True, needs=_schedule("one_cycle"),
          doc="one_cycle: first learning rate divided by the last"),
    _spec("ema", "bool", False, doc="score and keep an exponential moving average of the weights"),
    _spec("ema_decay", "float", 0.999, **_UNIT, open_high=True, dynamic=True, needs={"ema": (True,)},
          doc="share of the average that a step keeps"),
    _spec("freeze", "strs", (), doc='what is not trained: patterns of parameters or modules, ["backbone"]'),
    _spec("head", "strs", (), doc='what has a learning rate of its own: patterns likewise, ["head"]'),
    _spec("head_lr_factor", "float", 1.0, low=0, open_low=True, dynamic=True,
          doc="learning rate of `head` divided by lr"),
)  # fmt: skip

CLASSIFICATION: tuple[HParamSpec, ...] = (
    _spec("loss", "str", "cross_entropy", choices=("cross_entropy", "bce"),
          doc="cross_entropy over the classes, or bce: one yes-or-no question a class"),
    _spec("label_smoothing", "float", 0.0, **_UNIT, open_high=True, dynamic=True,
          doc="share of the target spread over all classes"),
    _spec("class_weights", "str", "none", choices=("none", "balanced"),
          doc="balanced: a class counts as much as any other, however rare (rows / (classes * its rows))"),
)  # fmt: skip

REGRESSION: tuple[HParamSpec, ...] = (
    _spec("loss", "str", "mse", choices=("mse", "mae", "huber"), doc="squared, absolute or Huber error"),
    _spec("huber_delta", "float", 1.0, low=0, open_low=True, dynamic=True, needs={"loss": ("huber",)},
          doc="error from which Huber's loss is linear"),
)  # fmt: skip

RECONSTRUCTION: tuple[HParamSpec, ...] = (
    _spec("loss", "str", "mse", choices=("mse", "mae", "huber"), doc="of the reconstruction"),
    REGRESSION[1],
)  # fmt: skip

AUGMENTATION: tuple[HParamSpec, ...] = (
    _spec("augment", "bool", False, doc="change train images at random: the three below"),
    _spec("crop_padding", "float", 4.0, low=0, dynamic=True, needs={"augment": (True,)},
          doc="largest shift in pixels, in each direction"),
    _spec("flip_probability", "float", 0.5, **_UNIT, dynamic=True, needs={"augment": (True,)},
          doc="of mirroring an image left to right"),
    _spec("cutout_size", "float", 0.0, low=0, dynamic=True, needs={"augment": (True,)},
          doc="side in pixels of a square that is blanked"),
)  # fmt: skip

# What a model's constructor argument of one of these names must be. Which of them a model has, and their
# defaults, its signature says; which are dynamic, its `dynamic_hparams` says.
MODEL: tuple[HParamSpec, ...] = (
    _spec("hidden_sizes", "ints", low=1, high=10**6, doc="units of each hidden layer"),
    _spec("depth", "int", low=0, high=1000, doc="hidden layers; with width, instead of hidden_sizes"),
    _spec("width", "int", low=1, high=10**6, doc="units of every hidden layer; goes with depth"),
    _spec("activation", "str", choices=ACTIVATIONS, doc="non-linearity"),
    _spec("dropout", "float", **_UNIT, open_high=True, doc="share of units set to zero in training"),
    _spec("batch_norm", "bool", doc="batch normalisation before the activation"),
    _spec("batch_norm_momentum", "float", **_UNIT, open_low=True,
          doc="share of the new batch in the running statistics, as torch's momentum"),
    _spec("init", "str", choices=("default", "kaiming", "xavier", "orthogonal", "zeros"),
          doc="initial weights"),
    _spec("channels", "ints", low=1, doc="cnn: output channels of each block"),
    _spec("kernel_size", "int", low=1, doc="cnn: side of every convolution's kernel"),
    _spec("stride", "int", low=1, doc="cnn: of every convolution"),
    _spec("padding", "any", doc='cnn: pixels, "same" or "valid"'),
    _spec("pooling", "str", choices=("max", "avg", "none"), doc="cnn: after each block"),
    _spec("pool_kernel", "int", low=1, doc="cnn: side of the pooling window"),
    _spec("pool_stride", "int", low=1, doc="cnn: step of the pooling window (default: its side)"),
    _spec("global_pooling", "bool", doc="cnn: mean over the pixels before the head, else flatten"),
    _spec("head_sizes", "ints", low=1, doc="cnn: hidden layers of the head"),
    _spec("cell", "str", choices=("rnn", "gru", "lstm"), doc="rnn: the recurrent cell"),
    _spec("hidden_size", "int", low=1, high=10**6, doc="rnn: units of each recurrent layer"),
    _spec("num_layers", "int", low=1, high=1000, doc="rnn: recurrent layers"),
    _spec("bidirectional", "bool", doc="rnn: read forwards and backwards"),
    _spec("readout", "str", choices=("last", "mean", "all"), doc="rnn: last valid step, mean, or all"),
    _spec("embedding_size", "int", low=1, doc="rnn: of tokens"),
    _spec("latent_dim", "int", low=1, high=10**6, doc="autoencoder: size of the code"),
    _spec("output_activation", "str", choices=("none", "sigmoid"), doc="autoencoder: of the reconstruction"),
    _spec("bias", "bool", doc="linear: with a constant term"),
)  # fmt: skip

ALWAYS_LOG = frozenset({"lr", "weight_decay", "l1", "l2", "eps"})


def by_name(specs: Iterable[HParamSpec]) -> dict[str, HParamSpec]:
    return {spec.name: spec for spec in specs}


def signature(hparams: HParams, dynamic: Iterable[str]) -> str:
    """The sorted static items as JSON: equal signatures train the same program. (A dynamic one that is no
    number, such as None, has no value that it could share.)"""
    hidden = frozenset(dynamic)
    static = {n: v for n, v in hparams.items() if n not in hidden or not isinstance(v, (int, float))}
    return json.dumps(static, sort_keys=True, separators=(",", ":"))
