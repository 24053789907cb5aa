"""Programs: traced functions, kept by what they depend on, and checked before they are relied on."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpt_torch.seeding import bookmark
from hpt_torch.trainers.traced import trace

TRACE_FROM = 8  # calls that are left: tracing and its check cost as much as two of them
_MOST_PROGRAMS = 64
_MOST_WATCHED = 1000  # of a list or dict
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)


class Programs:
    """The programs of a trainer, by what they depend on."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, ...], Program] = {}

    def of(self, what: str) -> list[Program]:
        """The programs that are kept, of keys that begin with `what`."""
        return [program for key, program in self._kept.items() if key[0] == what]

    def get(
        self,
        key: tuple[Hashable, ...],
        calls_left: int,
        *,
        constants: Iterable[Tensor] = (),
        watched: Iterable[object] = (),
        steady: Iterable[Tensor] = (),
    ) -> Callable[..., Any]:
        """What runs a function (the first argument) under this key: traced where that pays, to the same
        bits. constants, watched, steady: as `Program` has them."""
        if key not in self._kept:
            if calls_left < TRACE_FROM:
                return _untraced
            if len(self._kept) == _MOST_PROGRAMS:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = Program(constants, watched, steady)
        return self._kept[key]


def _untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def shapes(batch: Mapping[str, Tensor]) -> Hashable:
    """What of a batch a program depends on."""
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items())


class Program:
    """Runs a function ``(params, buffers, *rest)``, which writes into `buffers`: traced at the first call,
    compared with the function itself at the second.

    Code that changes what it does between calls shows there, and is never traced again.

    constants: tensors of which the function may read the values. watched: objects, such as a user's module,
    in which the function must not change a number, as one that counts its calls does. steady: of the first
    call's tensors, those that are mostly the same from call to call, as hyperparameters are.
    """

    def __init__(
        self,
        constants: Iterable[Tensor] = (),
        watched: Iterable[object] = (),
        steady: Iterable[Tensor] = (),
    ) -> None:
        self._run: Callable[..., Any] | None = None
        self._calls = 0
        self._constants, self._watched, self._steady = list(constants), list(watched), list(steady)

    @property
    def traced(self) -> bool:
        return self._run is not None

    def __call__(
        self, function: Callable[..., Any], params: Any, buffers: dict[str, Tensor], *rest: Any
    ) -> Any:
        self._calls += 1
        if self._calls == 1:
            return self._trace(function, params, buffers, *rest)
        if self._calls > 2 or self._run is None:
            return (self._run or function)(params, buffers, *rest)
        scratch = _copies(buffers)
        # It may write into all that it is given.
        own = [_copies(one) if isinstance(one, dict) else one.clone() for one in (params, *rest)]
        repeat_draws = bookmark(_devices(params))
        found = self._run(own[0], scratch, *own[1:])
        repeat_draws()
        expected = function(params, buffers, *rest)
        if not _same((found, scratch), (expected, buffers)):
            self._run = None
        return expected

    def _trace(
        self, function: Callable[..., Any], params: Any, buffers: dict[str, Tensor], *rest: Any
    ) -> Any:
        saved, before = _copies(buffers), plain(self._watched)
        repeat_draws = bookmark(_devices(params))
        try:
            run, outputs = trace(
                function, params, buffers, *rest, constants=self._constants, steady=self._steady
            )
        except (torch.OutOfMemoryError, MemoryError):  # tracing holds on to everything that is computed
            repeat_draws()
            for name, tensor in saved.items():
                buffers[name].copy_(tensor)
            return function(params, buffers, *rest)
        self._steady = []
        self._run = run if plain(self._watched) == before else None
        return outputs


def _copies(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in buffers.items()}


def plain(watched: Iterable[object]) -> list[dict[str, Any]]:
    """The objects' attributes that are numbers and the like, also in dicts, lists and objects; and where the
    generators stand that are global in the modules of their classes."""
    watched = list(watched)
    modules = dict.fromkeys(type(one).__module__ for one in watched)
    own = [vars(one) for one in watched if hasattr(one, "__dict__")]
    around = [vars(sys.modules[name]) for name in modules if name in sys.modules]
    generators = [{n: v for n, v in names.items() if isinstance(v, _GENERATORS)} for names in around]
    return [{name: _plain(value) for name, value in one.items()} for one in (*own, *generators)]


def _plain(value: Any, depth: int = 3) -> Any:
    """A copy of what of the value can be compared; None for the rest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False))
    if isinstance(value, random.Random):
        return value.getstate()
    if depth == 0 or isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return None
    if isinstance(value, Mapping):
        return [(name, _plain(one, depth - 1)) for name, one in islice(value.items(), _MOST_WATCHED)]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [_plain(one, depth - 1) for one in islice(value, _MOST_WATCHED)]
    own = vars(value) if hasattr(value, "__dict__") else {}
    return {name: _plain(one, depth - 1) for name, one in own.items()}


def _devices(tensors: Any) -> list[torch.device]:
    return list({tensor.device for tensor in tree_leaves(tensors) if tensor.is_cuda})


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)
