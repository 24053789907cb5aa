"""Programs: traced functions, kept by what they depend on, and checked before they are relied on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hpt_torch.seeding import bookmark
from hpt_torch.trainers.traced import trace
from hpt_torch.trainers.watching import state_of

TRACE_FROM = 8  # calls that are left: tracing and its check cost as much as two of them
_MOST_PROGRAMS = 64
_MOST_TRIES = 2  # a first call may set up what later ones find


class Programs:
    """The programs of a trainer, by what they depend on."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Hashable, ...], Program] = {}
        self._states: list[tuple[int, list[Any]]] = []
        self._restless = False  # the code changes what it keeps in every call

    def of(self, what: str) -> list[Program]:
        """The programs that are kept, of keys that begin with `what`."""
        return [program for key, program in self._kept.items() if key[0] == what]

    def state(self, watched: Iterable[object]) -> int:
        """A number for what these objects and their code keep now (`watching.state_of`): the same as long as
        that is the same. It belongs into the key of a program, which would not see it change."""
        if self._restless:
            return -1  # nothing is traced
        now = state_of(watched)
        for number, known in self._states:
            if known == now:
                return number
        number = self._states[-1][0] + 1 if self._states else 0
        self._states = [*self._states[1 - _MOST_PROGRAMS :], (number, now)]
        return number

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
            self._restless = self._restless or any(one.restless for one in self._kept.values())
            if calls_left < TRACE_FROM or self._restless:
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
    of which the function must not change what they keep, as one that counts its calls does. steady: of the
    first call's tensors, those that are mostly the same from call to call, as hyperparameters are.
    """

    def __init__(
        self,
        constants: Iterable[Tensor] = (),
        watched: Iterable[object] = (),
        steady: Iterable[Tensor] = (),
    ) -> None:
        self._run: Callable[..., Any] | None = None
        self._tries, self._checked, self.restless = 0, False, False
        self._constants, self._watched, self._steady = list(constants), list(watched), list(steady)

    @property
    def traced(self) -> bool:
        return self._run is not None

    def __call__(
        self, function: Callable[..., Any], params: Any, buffers: dict[str, Tensor], *rest: Any
    ) -> Any:
        if self._run is None and self._tries < _MOST_TRIES:
            return self._trace(function, params, buffers, *rest)
        if self._checked or self._run is None:
            return (self._run or function)(params, buffers, *rest)
        self._checked = True
        scratch = _copies(buffers)
        # It may write into all that it is given.
        own = [_copies(one) if isinstance(one, dict) else one.clone() for one in (params, *rest)]
        repeat_draws = bookmark(_devices(params))
        found = self._run(own[0], scratch, *own[1:])
        repeat_draws()
        expected = function(params, buffers, *rest)
        if not _same((found, scratch), (expected, buffers)):
            self._run, self._tries = None, _MOST_TRIES
        return expected

    def _trace(
        self, function: Callable[..., Any], params: Any, buffers: dict[str, Tensor], *rest: Any
    ) -> Any:
        self._tries += 1
        saved, before = _copies(buffers), state_of(self._watched)
        repeat_draws = bookmark(_devices(params))
        try:
            run, outputs = trace(
                function, params, buffers, *rest, constants=self._constants, steady=self._steady
            )
        except (torch.OutOfMemoryError, MemoryError):  # tracing holds on to everything that is computed
            repeat_draws()
            for name, tensor in saved.items():
                buffers[name].copy_(tensor)
            self._tries = _MOST_TRIES
            return function(params, buffers, *rest)
        if run is None:
            self._tries = _MOST_TRIES
        elif state_of(self._watched) == before:
            self._run, self._steady = run, []
        else:
            self.restless = self._tries == _MOST_TRIES
        return outputs


def _copies(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in buffers.items()}


def _devices(tensors: Any) -> list[torch.device]:
    return list({tensor.device for tensor in tree_leaves(tensors) if tensor.is_cuda})


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)
