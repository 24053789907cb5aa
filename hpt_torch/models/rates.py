"""Dropout rates among the arguments of a user's model: found by building it with numbers that leave a trace.

An argument that becomes the rate of ``nn.Dropout`` layers, and nothing else, may differ between models that
train as one program. One that also decides which layers there are, or that ``forward`` reads, may not.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

_MOST = 10_000  # containers, objects and functions that are looked into
_LEAVES = (torch.Tensor, type, types.ModuleType, str, bytes, int, float, complex, type(None))


class Rate(float):
    """A number that knows the argument that it is, and whether it was used to compute or to decide anything.

    Comparisons that say the same of every rate (``p < 0``, ``p > 1``) decide nothing.
    """

    argument: str
    used: bool

    def __new__(cls, value: float, argument: str) -> Rate:
        made = super().__new__(cls, value)
        made.argument, made.used = argument, False
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

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float.__add__(self, 0.0),)


def _tracing(name: str) -> Any:
    def method(self: Rate, *others: Any) -> Any:
        self.used = True
        return getattr(float, name)(self, *others)

    return method


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod"),
    *("rmod", "divmod", "rdivmod", "pow", "rpow", "neg", "pos", "abs", "bool", "int", "float", "round"),
    *("trunc", "floor", "ceil", "eq", "ne", "hash", "format", "repr", "str"),
):
    setattr(Rate, f"__{_name}__", _tracing(f"__{_name}__"))


def rates_of(build: Callable[[Any], nn.Module]) -> bool:
    """Whether the argument of `build`, a number in [0, 1), is the rate of ``nn.Dropout`` layers and nothing
    else. build: returns the model, with the same initial weights at each call."""
    low, high = Rate(0.25, "it"), Rate(0.5, "it")
    try:
        first, second = build(low), build(high)
    except Exception:  # of the user's model: it will say so again when it is trained
        return False
    try:
        build(None)
    except Exception:
        pass
    else:
        return False  # then None is a value of it, and none of a rate
    marked = any(isinstance(layer.p, Rate) for layer in dropouts(first))
    used = low.used or high.used or is_kept(first) or is_kept(second)
    return marked and not used and _are_alike(first, second)


def dropouts(model: nn.Module) -> Iterator[nn.Dropout]:
    """The layers whose rates can be told apart."""
    return (module for module in model.modules() if type(module) is nn.Dropout)


def is_kept(model: nn.Module) -> bool:
    """Whether a rate is anywhere in the model but as that of ``nn.Dropout``; also where it is too large to
    tell."""
    known, seen = {id(layer) for layer in dropouts(model)}, {id(module) for module in model.modules()}
    waiting = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules") and (name != "p" or id(module) not in known)
    ]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Rate) or len(seen) > _MOST:
            return True
        if id(value) not in seen and not isinstance(value, _LEAVES):
            seen.add(id(value))
            waiting += islice(_inside(value), _MOST)
    return False


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


def _are_alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same modules and the same tensors."""
    modules = [[(name, type(module)) for name, module in m.named_modules()] for m in (first, second)]
    tensors = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (first, second)]
    names = tensors[0].keys()
    return (
        modules[0] == modules[1]
        and names == tensors[1].keys()
        and all(torch.equal(tensors[0][name], tensors[1][name]) for name in names)
    )
