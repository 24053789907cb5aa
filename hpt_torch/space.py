"""The search space: dimensions, their conditions, and how a point is read and written.

lr          = {float = [1e-4, 1e-1], default = 1e-3}        # log scale: see hparams.ALWAYS_LOG
width       = {int = [16, 256], log = true}
hidden_sizes = {choice = [[64], [64, 64]]}
momentum    = {float = [0.0, 0.99], when = {optimizer = ["sgd"]}}
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpt_torch.hparams import ALWAYS_LOG
from hpt_torch.types import HParamValue, Problem, SpaceError, is_int, is_number

When = Mapping[str, Sequence[HParamValue]]


def freeze(value: Any) -> HParamValue:
    """Lists become tuples, all the way down, so that values can be compared and hashed."""
    return tuple(freeze(item) for item in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Float:
    """A real number in [low, high], on a linear or log scale, or on a grid of `step`.

    >>> import hpt_torch as hpt
    >>> hpt.Float(0.0, 0.5, step=0.25).values()
    [0.0, 0.25, 0.5]
    """

    low: float
    high: float
    log: bool | None = None  # None: log for lr, weight_decay, l1, l2, eps; linear for every other name
    step: float | None = None
    default: float | None = None
    when: When | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "step", "default"):
            value = getattr(self, name)
            if value is None and name in ("step", "default"):
                continue
            if not is_number(value):
                raise SpaceError(f"{name} must be a finite number, got {value!r}"[:200])
            object.__setattr__(self, name, float(value))
        _check_range(self.low, self.high, self.log, self.step)
        _check_conditions(self)

    def contains(self, value: HParamValue) -> bool:
        if not is_number(value) or not self.low <= float(value) <= self.high:  # type: ignore[arg-type]
            return False
        steps = (float(value) - self.low) / self.step if self.step else 0.0  # type: ignore[arg-type]
        return abs(steps - round(steps)) < 1e-6

    def count(self) -> int | None:
        """How many values there are; None: they cannot be counted."""
        return None if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def values(self) -> Sequence[float]:
        """Every value; only where there is a step."""
        assert self.step is not None
        return [min(self.low + i * self.step, self.high) for i in range(self.count() or 0)]

    def distribution(self, name: str) -> Any:
        from optuna.distributions import FloatDistribution

        if self.step is None:
            return FloatDistribution(self.low, self.high, log=is_log(name, self))
        # Optuna cuts the range at its last step, reckoning in decimals, and warns where it has cut something:
        # from half a step beyond, rounding cannot cost the last value.
        beyond = self.low + ((self.count() or 1) - 0.5) * self.step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return FloatDistribution(self.low, beyond, step=self.step)


@dataclass(frozen=True)
class Int:
    """A whole number in [low, high], both included.

    >>> import hpt_torch as hpt
    >>> hpt.Int(1, 9, step=4).values()
    range(1, 10, 4)
    """

    low: int
    high: int
    log: bool | None = None
    step: int = 1
    default: int | None = None
    when: When | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high", "step", "default"):
            value = getattr(self, name)
            if not is_int(value) and not (name == "default" and value is None):
                raise SpaceError(f"{name} must be an integer of at most 2**53, got {value!r}"[:200])
        _check_range(self.low, self.high, self.log, self.step if self.step != 1 else None)
        _check_conditions(self)

    def contains(self, value: HParamValue) -> bool:
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return self.low <= value <= self.high and (value - self.low) % self.step == 0

    def count(self) -> int:
        return len(range(self.low, self.high + 1, self.step))

    def values(self) -> Sequence[int]:
        return range(self.low, self.high + 1, self.step)

    def distribution(self, name: str) -> Any:
        from optuna.distributions import IntDistribution

        high = self.low + (self.count() - 1) * self.step
        return IntDistribution(self.low, high, log=is_log(name, self), step=self.step)


@dataclass(frozen=True)
class Choice:
    """One of the options; an option may be a list (``hidden_sizes``).

    >>> import hpt_torch as hpt
    >>> hpt.Choice([[64], [64, 64]]).contains((64, 64))
    True
    """

    options: Sequence[Any]
    default: Any = None
    when: When | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, (list, tuple)) or not self.options:
            raise SpaceError(f"choice must be a list of at least one option, got {self.options!r}")
        options = tuple(freeze(option) for option in self.options)
        for option in options:
            _check_value(option, "an option")
        encoded = [encode(option) for option in options]
        twice = next((e for i, e in enumerate(encoded) if e in encoded[:i]), None)
        if twice is not None:
            raise SpaceError(f"choice has the option {twice} twice")
        object.__setattr__(self, "options", options)
        if self.default is not None:
            object.__setattr__(self, "default", freeze(self.default))
        _check_conditions(self)

    def contains(self, value: HParamValue) -> bool:
        return encode(value) in {encode(option) for option in self.options}

    def count(self) -> int:
        return len(self.options)

    def values(self) -> Sequence[HParamValue]:
        return self.options

    def distribution(self, name: str) -> Any:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([encode(option) for option in self.options])


Dimension = Float | Int | Choice
Space = Mapping[str, Dimension]


def encode(value: HParamValue) -> str:
    """A choice as Optuna sees it: JSON text, so that lists are allowed and 1, 1.0 and true differ."""
    return json.dumps(value)


def to_optuna(dimension: Dimension, value: Any) -> Any:
    """The user's value as the dimension's distribution contains it, whatever rounding did to it."""
    if isinstance(dimension, Float) and dimension.step is not None:
        nearest = dimension.low + round((value - dimension.low) / dimension.step) * dimension.step
        return min(nearest, dimension.distribution("").high)
    return encode(value) if isinstance(dimension, Choice) else value


def decode(dimension: Dimension, value: Any) -> HParamValue:
    """From Optuna's value back to the user's."""
    if isinstance(dimension, Choice):
        return freeze(json.loads(value))
    return min(float(value), dimension.high) if isinstance(dimension, Float) else int(value)


def is_log(name: str, dimension: Float | Int) -> bool:
    if dimension.log is not None:
        return dimension.log
    has_step = dimension.step is not None if isinstance(dimension, Float) else dimension.step != 1
    return name in ALWAYS_LOG and not has_step


def _check_range(low: float, high: float, log: Any, step: float | None) -> None:
    if low > high:
        raise SpaceError(f"low must be at most high, got [{low:g}, {high:g}]")
    if log is not None and not isinstance(log, bool):
        raise SpaceError(f"log must be true or false, got {log!r}")
    if log and low <= 0:
        raise SpaceError(f"a log scale needs low > 0, got {low:g}; raise low or set log = false")
    if step is not None and step <= 0:
        raise SpaceError(f"step must be above 0, got {step:g}")
    if step is not None and log:
        raise SpaceError("step and log cannot be combined; leave one out or list the values as a choice")
    if step is not None and step > high - low:
        raise SpaceError(f"step must be at most high - low = {high - low:g}, got {step:g}")
    if step is not None and (high - low) / step > 1e9:
        raise SpaceError(f"step must leave at most a billion values, got {step:g}; leave it out")


def _check_conditions(dimension: Dimension) -> None:
    for parent, values in (dimension.when or {}).items():
        for value in values:
            _check_value(value, f"a value of when.{parent}")
    if dimension.default is not None:
        _check_value(dimension.default, "default")
    if dimension.default is not None and not dimension.contains(dimension.default):
        raise SpaceError(f"default must lie in the dimension, got {dimension.default!r}")


def _check_value(value: HParamValue, what: str) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_value(item, what)
    elif not isinstance(value, (bool, str)) and not is_number(value):
        rule = "must be a finite number (an integer: at most 2**53), a text, true, false or a list of these"
        raise SpaceError(f"{what} {rule}, got {value!r}"[:200])


# -- recipe form ---------------------------------------------------------------------------------------

_KINDS = ("float", "int", "choice")
_OPTIONS = {
    "float": ("log", "step", "default", "when"),
    "int": ("log", "step", "default", "when"),
    "choice": ("default", "when"),
}


def parse_dimension(raw: Any) -> Dimension:
    """A dimension from its recipe form; SpaceError says what is wrong with it."""
    if isinstance(raw, Dimension):
        return raw
    if not isinstance(raw, Mapping):
        raise SpaceError(
            f"must be a table such as {{float = [0.1, 1.0]}}, got {raw!r}; a fixed value belongs in [hparams]"
        )
    kinds = [kind for kind in _KINDS if kind in raw]
    if len(kinds) != 1:
        raise SpaceError(
            f"must have exactly one of float, int, choice; got {', '.join(map(str, raw)) or 'nothing'}"
        )
    kind = kinds[0]
    unknown = [key for key in raw if key != kind and key not in _OPTIONS[kind]]
    if unknown:
        raise SpaceError(f"unknown option {unknown[0]!r}; {kind} takes {', '.join(_OPTIONS[kind])}")
    rest = {key: raw[key] for key in raw if key != kind}
    if "when" in rest:
        rest["when"] = _parse_when(rest["when"])
    if kind == "choice":
        return Choice(raw[kind], **rest)
    bounds = raw[kind]
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        raise SpaceError(f"{kind} must be [low, high], got {bounds!r}")
    return (Float if kind == "float" else Int)(bounds[0], bounds[1], **rest)


def _parse_when(raw: Any) -> When:
    if not isinstance(raw, Mapping) or not raw:
        raise SpaceError(f'when must be a table such as {{optimizer = ["sgd"]}}, got {raw!r}')
    for name, values in raw.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise SpaceError(f"when.{name} must be a list of values, got {values!r}")
    return {name: tuple(freeze(value) for value in values) for name, values in raw.items()}


def dump_dimension(dimension: Dimension) -> dict[str, Any]:
    """The recipe form of a dimension; `parse_dimension` of it gives the same dimension."""
    raw: dict[str, Any]
    if isinstance(dimension, Choice):
        raw = {"choice": thaw(dimension.options)}
    else:
        raw = {"float" if isinstance(dimension, Float) else "int": [dimension.low, dimension.high]}
        if dimension.log is not None:
            raw["log"] = dimension.log
        if dimension.step != (None if isinstance(dimension, Float) else 1):
            raw["step"] = dimension.step
    if dimension.default is not None:
        raw["default"] = thaw(dimension.default)
    if dimension.when is not None:
        raw["when"] = {name: thaw(values) for name, values in dimension.when.items()}
    return raw


def thaw(value: Any) -> Any:
    """Tuples become lists, all the way down, as TOML and JSON write them."""
    return [thaw(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- the space as a whole ------------------------------------------------------------------------------


def check_space(space: Space, fixed: Collection[str] = ()) -> list[Problem]:
    """What is wrong between the dimensions: log scales and conditions. `fixed`: names outside the space."""
    problems = []
    for name, dimension in space.items():
        if not isinstance(dimension, Choice) and is_log(name, dimension) and dimension.low <= 0:
            problems.append(Problem(
                f"space.{name}", f"{name} is searched on a log scale, which needs low > 0, got "
                f"{dimension.low:g}; raise low or set log = false"))  # fmt: skip
        for parent, values in (dimension.when or {}).items():
            where = f"space.{name}.when.{parent}"
            if parent == name:
                problems.append(Problem(where, "a dimension cannot depend on itself"))
            elif parent not in space and parent in fixed:
                remedy = f"leave the when out, or move {parent} to [space]"
                problems.append(Problem(where, f"{parent} is fixed in [hparams]; {remedy}"))
            elif parent not in space:
                known = ", ".join(sorted(set(space) - {name})) or "none"
                problems.append(
                    Problem(where, f"must name another dimension of the space (there are: {known})")
                )
            else:
                for value in values:
                    if not space[parent].contains(value):
                        problems.append(Problem(where, f"{parent} can never be {value!r}"))
    if not problems:
        try:
            ordered(space)
        except SpaceError as error:
            problems.append(Problem("space", str(error)))
    return problems


def ordered(space: Space) -> list[str]:
    """The names, every dimension after those that its condition reads; otherwise in the given order."""
    done: list[str] = []
    left = list(space)
    while left:
        ready = [name for name in left if all(p in done or p not in space for p in space[name].when or {})]
        if not ready:
            raise SpaceError(f"the conditions of {', '.join(left)} depend on each other in a circle")
        done.append(ready[0])
        left.remove(ready[0])
    return done


def is_active(dimension: Dimension, point: Mapping[str, HParamValue]) -> bool:
    """Whether the dimension's condition holds at a point that has its parents' values."""
    for parent, values in (dimension.when or {}).items():
        if parent not in point or not any(_same(point[parent], value) for value in values):
            return False
    return True


def _same(a: HParamValue, b: HParamValue) -> bool:
    """Equal as a user means it: 1 and 1.0 are, 1 and true are not."""
    if is_number(a) and is_number(b):
        return a == b
    return encode(a) == encode(b)


def defaults(space: Space) -> dict[str, HParamValue]:
    """The declared defaults."""
    return {name: d.default for name, d in space.items() if d.default is not None}
