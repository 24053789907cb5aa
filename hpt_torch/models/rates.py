"""Dropout rates among the arguments of a user's model: found by building it with numbers that leave a trace.

An argument that only is a rate of dropout, in layers or in calls of `F.dropout` and the like, may differ
between models that train as one program. One that also decides which layers there are, or what is computed,
may not.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

_MOST = 100_000  # numbers, and containers, objects and functions that are looked into
_LEAVES = (str, bytes, int, float, complex, torch.Tensor, np.ndarray, np.generic, type(None))
_OPAQUE = (type, types.ModuleType)


class Rate(float):
    """A number that knows the argument that it is, and whether it was used to compute or to decide anything.

    Comparisons that say the same of every rate (``p < 0``, ``p > 1``) decide nothing.
    """

    argument: str
    used: bool
    reached: bool  # dropout was called with it
    tensor: torch.Tensor | None  # instead of the number, where many models are computed as one; shape ()

    def __new__(cls, value: float, argument: str) -> Rate:
        made = super().__new__(cls, value)
        made.argument, made.used, made.reached, made.tensor = argument, False, False, None
        return made

    def __lt__(self, other: float) -> bool:
        self.used = self.used or other not in (0, 1)
        return float.__lt__(self, other)

    def __ge__(self, other: float) -> bool:
        self.used = self.used or other not in (0, 1)
        return float.__ge__(self, other)

    def __gt__(self, other: float) -> bool:
        self.used = self.used or other != 1
        return float.__gt__(self, other)

    def __le__(self, other: float) -> bool:
        self.used = self.used or other != 1
        return float.__le__(self, other)

    def __copy__(self) -> Rate:
        return self

    def __deepcopy__(self, memo: Any) -> Rate:
        return self  # as layers are copied, it stays what it is

    def __reduce__(self) -> tuple[Any, ...]:
        self.used = True
        return float, (number(self),)

    @property
    def real(self) -> float:
        self.used = True
        return number(self)


def number(rate: float) -> float:
    """The plain number."""
    return float.__add__(rate, 0.0) if isinstance(rate, Rate) else rate


def _tracing(name: str) -> Any:
    def method(self: Rate, *others: Any) -> Any:
        self.used = True
        return getattr(float, name)(self, *others)

    return method


for _name in ("is_integer", "as_integer_ratio", "hex", "conjugate"):
    setattr(Rate, _name, _tracing(_name))
for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod"),
    *("rmod", "divmod", "rdivmod", "pow", "rpow", "neg", "pos", "abs", "bool", "int", "float", "round"),
    *("trunc", "floor", "ceil", "eq", "ne", "hash", "format", "repr", "str"),
):
    setattr(Rate, f"__{_name}__", _tracing(f"__{_name}__"))


def is_rate(build: Callable[[float], nn.Module], run: Callable[[nn.Module], Any]) -> bool:
    """Whether the argument of `build`, a number in [0, 1), is a rate of dropout and nothing else, as far as
    can be seen: it has left no other trace in the model, and dropout gets it.

    build: returns the model, with the same initial weights at each call. run: a step of it, in which whatever
    gets a `Rate` notes that.
    """
    marked = Rate(0.25, "it"), Rate(0.5, "it")
    try:
        first, second, plain = (build(value) for value in (*marked, 0.25))
        alike = are_alike(first, second) and are_alike(first, plain)
        run(first)
    except Exception:  # of the user's model: it will say so again when it is trained
        return False
    return alike and marked[0].reached and not any(rate.used for rate in marked)


def are_alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models are the same but for their rates. Raises ValueError where they are too large to
    tell."""
    a, b = list(_traces(first)), list(_traces(second))
    return len(a) == len(b) and all(map(_same, a, b))


def kept_in(model: nn.Module) -> list[Any] | None:
    """What numbers, text and tensors the model has besides its parameters and buffers. None: too many to
    tell."""
    seen = {id(module) for module in model.modules()}
    modules = len(seen)
    waiting = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    ]
    found = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, _LEAVES):
            found.append(value)
        elif id(value) not in seen and not isinstance(value, _OPAQUE):
            seen.add(id(value))
            waiting += islice(_inside(value), _MOST)
        if len(seen) + len(found) > modules + _MOST:
            return None
    return found


def kept_rates(model: nn.Module) -> list[Rate]:
    """The rates that the model has, and that its forward may read; each object once."""
    return list({id(value): value for value in kept_in(model) or () if isinstance(value, Rate)}.values())


@contextlib.contextmanager
def given(rates: Iterable[Rate], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block the rates are these tensors, of shape (), by argument."""
    for rate in rates:
        rate.tensor = values[rate.argument]
    try:
        yield
    finally:
        for rate in rates:
            rate.tensor = None


def _inside(value: Any) -> Iterator[Any]:
    """What a container, an object or a function holds."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    else:
        yield from getattr(value, "__dict__", {}).values()
        yield from (getattr(value, name, None) for name in getattr(type(value), "__slots__", ()))


def _traces(model: nn.Module) -> Iterator[Any]:
    """What must be the same whatever the rate is, and the rates."""
    kept = kept_in(model)
    if kept is None:
        raise ValueError("too large to tell")
    yield from ((name, type(module)) for name, module in model.named_modules())
    yield from (*model.named_parameters(), *model.named_buffers(), *kept)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(map(_same, a, b))
    if isinstance(a, Rate) and isinstance(b, float):
        return isinstance(b, Rate) or number(a) == b
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return is_lazy(a) or torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)
