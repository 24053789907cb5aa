"""What of Python's state a user's code may keep between calls: a recorded step would not see it change."""

from __future__ import annotations

import functools
import itertools
import random
import types
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

from hpt_torch.reach import Reach

_MOST = 10_000  # values that are looked at
_MOST_ITEMS = 1000  # of a container
_MOST_BYTES = 1 << 16  # of an array
_DEEPEST = 12
_OF_MODULES = frozenset(vars(nn.Module()))  # of which only hooks can keep anything
_OPAQUE = ("logging", "threading", "_thread", "re", "io", "_io", "weakref", "concurrent", "asyncio")


def state_of(watched: Iterable[object]) -> list[Any]:
    """A copy of what these objects, modules and a task, keep besides tensors, and of what their classes' code
    reaches: globals, class attributes, closures. Equal as long as nothing of it has changed."""
    watched, walk = list(watched), _Walk()
    own = [[walk.copy(value) for value in _kept(one)] for one in watched]
    walk.with_tensors = True
    reached = Reach(watched)
    values = [(name, walk.copy(value)) for name, value in reached.values]
    return [own, values, [walk.copy(vars(function)) for _, function in reached.functions]]


@dataclass(frozen=True)
class _This:
    """A tensor itself, as long as nothing writes into it."""

    tensor: Tensor
    version: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _This) and (self.tensor is other.tensor and self.version == other.version)


class _Walk:
    def __init__(self) -> None:
        self.with_tensors = False
        self._seen: dict[int, Any] = {}  # keeps them, so that their ids stay theirs
        self._left = _MOST

    def copy(self, value: Any, depth: int = 0) -> Any:
        """A copy of what of the value can be compared; None for the rest, and for what was seen before."""
        self._left -= 1
        if self._left < 0:
            return None
        if value is None or isinstance(value, (bool, int, str, bytes)):
            return value
        if isinstance(value, (float, complex, np.generic, itertools.count)):
            return repr(value)  # NaN, too, is what it was
        if isinstance(value, Tensor):
            counts = self.with_tensors and not value.is_inference()
            return _This(value, value._version) if counts else None
        if depth > _DEEPEST or id(value) in self._seen:
            return None
        self._seen[id(value)] = value
        if isinstance(value, np.random.Generator):
            return str(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return str(value.get_state(legacy=False))
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, np.ndarray):
            few = value.nbytes <= _MOST_BYTES and not value.dtype.hasobject
            return (value.shape, value.tobytes()) if few else None
        if hasattr(type(value), "__next__") and type(value).__module__ not in _OPAQUE:
            return object()  # where an iterator stands cannot be told: equal to nothing
        try:
            inside = list(_inside(value))
        except Exception:  # of an object that minds being looked at
            return None
        return [self.copy(one, depth + 1) for one in inside]


def _inside(value: Any) -> Iterable[Any]:
    """What a container, an object or a function holds."""
    if isinstance(value, (dict, types.MappingProxyType)):
        return itertools.chain.from_iterable(islice(value.items(), _MOST_ITEMS))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return islice(value, _MOST_ITEMS)
    if isinstance(value, (type, types.ModuleType, nn.Module)) or type(value).__module__ in _OPAQUE:
        return ()
    if isinstance(value, types.FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        return (*cells, *(value.__defaults__ or ()), vars(value))
    return _attributes(value)


def _kept(one: object) -> Iterable[Any]:
    """What a module or a task keeps, but for a module's parameters, buffers and modules."""
    if not isinstance(one, nn.Module):
        return _attributes(one)
    own = vars(one).items()
    return [v for n, v in own if n not in _OF_MODULES or (v and n.endswith("_hooks"))]


def _attributes(value: Any) -> list[Any]:
    """What an object keeps, in a dictionary or in slots."""
    slots = [getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)]  # type: ignore[arg-type]
    return [*getattr(value, "__dict__", {}).values(), *slots]


@functools.cache
def _slots(cls: type) -> tuple[str, ...]:
    given = (vars(base).get("__slots__", ()) for base in cls.__mro__)
    names = (name for slots in given for name in ((slots,) if isinstance(slots, str) else slots))
    return tuple(name for name in names if not name.startswith("__"))
