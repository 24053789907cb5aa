"""Random numbers that a user's own code draws, as noise of a key.

`F.dropout`, attention with dropout, `torch.randn_like`, ``torch.distributions`` and the like draw from
torch's generator, which no batched program may do: what a member gets would depend on its company. In their
place each draw is a hash of (the batch's key, how many draws came before it in this call), the same for all
members, as the order of the data is. So such modules train together, are recorded, and are resumed.

Attention and recurrent layers, which torch.func cannot map, are written out where it maps them.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hpt_torch.models.rates import Rate
from hpt_torch.seeding import seed_others
from hpt_torch.trainers.drawn import DROPOUTS, WRITTEN_OUT, Noise, seed_torch

_OTHERS = frozenset({"generator", "out"})  # what of the user's own a draw may use


class Draws(TorchFunctionMode):
    """Within the block, what is drawn is noise of `key` (int32, shape ()).

    The number of a draw is kept as the seed of torch's generator, so that what puts its state back to run
    code again (activation checkpointing) sees the same noise. Functions that are not in `WRITTEN_OUT`, and
    draws from a generator of the user's own, or after a `torch.manual_seed` of his, are torch's.

    seed: 32 bits with which torch's, NumPy's and Python's generators begin. Mapping and recording are blind
    to the last two; where they have drawn anything `drew_elsewhere` is counted up.
    """

    drew_elsewhere = 0
    watching = False  # whether rates of dropout are looked for where they should not be

    def __init__(self, key: Tensor, seed: int) -> None:
        super().__init__()
        self._key, self._seed, self._depth = key, seed, 0

    def __enter__(self) -> Draws:
        if not self._depth:
            seed_torch(self._seed)
            self._noise, self._drew = Noise(self._key), seed_others(self._seed)
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        self._depth -= 1
        Draws.drew_elsewhere += not self._depth and self._drew()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Draws.watching and func not in _RATED:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Rate):
                    leaf.used = True
        if func in _WRITTEN_IN_PYTHON:
            with self:
                return _body(func)(*args, **kwargs)
        if func in WRITTEN_OUT and self._noise.goes_on:
            named = {n: value for n, value in kwargs.items() if value is not None or n not in _OTHERS}
            if _OTHERS.isdisjoint(named):
                found = WRITTEN_OUT[func](self._noise, *args, **named)
                if found is not NotImplemented:
                    return found
        return func(*args, **kwargs)


@contextlib.contextmanager
def watching(key: Tensor) -> Iterator[None]:
    """As `Draws`, and rates of dropout are marked as used where anything else is called with one."""
    Draws.watching = True
    try:
        with Draws(key, 0):
            yield
    finally:
        Draws.watching = False


@functools.cache
def _body(function: Any) -> Any:
    """A function of torch as it runs where no mode is on, so that ours sees what it calls."""
    names = {name: (lambda *_: False) for name in function.__code__.co_names if "has_torch_function" in name}
    own = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


_PYTHONS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.multi_head_attention_forward, F.gumbel_softmax, torch.autograd.grad,
)  # fmt: skip
_WRITTEN_IN_PYTHON = frozenset(function for function in _PYTHONS if hasattr(function, "__code__"))
_RATED = _WRITTEN_IN_PYTHON | DROPOUTS.keys()  # they may be given the rate of each member
