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
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hpt_torch.models.noise import (
    FLOATS,
    hash_bits,
    hash_words,
    inside_transform,
    normal,
    stream_key_of,
    uniform,
)
from hpt_torch.models.rates import Rate, number
from hpt_torch.models.rnn import run_layer
from hpt_torch.seeding import seed_others

_FIRST_STREAM = 2**16  # those before are of layers
_MOST_DRAWS = 2**24
_OTHERS = frozenset({"generator", "out"})  # what of the user's own a draw may use


class Draws(TorchFunctionMode):
    """Within the block, what is drawn is noise of `key` (int32, shape ()).

    The number of a draw is kept as the seed of torch's generator, so that what puts its state back to run
    code again (activation checkpointing) sees the same noise. Functions that are not in `_WRITTEN_OUT`, and
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
            self._start, self._drew = torch.default_generator.initial_seed(), seed_others(self._seed)
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
        if func in _WRITTEN_OUT and 0 <= torch.default_generator.initial_seed() - self._start < _MOST_DRAWS:
            named = {n: value for n, value in kwargs.items() if value is not None or n not in _OTHERS}
            if _OTHERS.isdisjoint(named):
                found = _WRITTEN_OUT[func](self, *args, **named)
                if found is not NotImplemented:
                    return found
        return func(*args, **kwargs)

    def key(self) -> Tensor:
        """The key of the next draw."""
        return stream_key_of(self._key, _FIRST_STREAM + self.count())

    def count(self) -> int:
        """How many draws came before the next one, which counts from now on."""
        place = torch.default_generator.initial_seed()
        torch.default_generator.manual_seed(place + 1)
        return place - self._start

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1), of the shape, dtype and device of `like`."""
        return uniform(self.key(), like.shape, like.dtype, like.device)[0]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, of the shape, dtype and device of `like`."""
        return normal(self.key(), like.shape, like.dtype, like.device)

    def whole(self, like: Tensor, low: int, high: int) -> Any:
        """Whole numbers in [low, high), of the shape, dtype and device of `like`."""
        if high <= low:
            return NotImplemented  # so that torch says what is wrong
        drawn = uniform(self.key(), like.shape, torch.float64, like.device)[0]
        return (drawn.mul_(high - low).floor_() + low).to(like.dtype)


@contextlib.contextmanager
def watching(key: Tensor) -> Iterator[None]:
    """As `Draws`, and rates of dropout are marked as used where anything else is called with one."""
    Draws.watching = True
    try:
        with Draws(key, 0):
            yield
    finally:
        Draws.watching = False


def seed_torch(seed: int) -> None:
    """Begins torch's generator of the CPU with 32 bits, far from any seed that a user would choose."""
    torch.default_generator.manual_seed(2**62 + seed)


_Drawn = Callable[..., Any]


def _new(draw: Callable[[Draws, Tensor], Tensor]) -> _Drawn:
    """Of ``torch.rand(2, 3)``, ``torch.rand((2, 3))``: a tensor of a shape."""

    def drawn(noise: Draws, *size: Any, requires_grad: bool = False, **options: Any) -> Any:
        like = torch.empty(*size, **options)
        return _wanted(draw(noise, like), requires_grad) if like.dtype in FLOATS else NotImplemented

    return drawn


def _like(draw: Callable[[Draws, Tensor], Tensor]) -> _Drawn:
    """Of ``torch.rand_like(x)``: a tensor like another one."""

    def drawn(noise: Draws, input: Tensor, requires_grad: bool = False, **options: Any) -> Any:
        like = torch.empty_like(input, **options)
        return _wanted(draw(noise, like), requires_grad) if like.dtype in FLOATS else NotImplemented

    return drawn


def _wanted(drawn: Tensor, requires_grad: bool) -> Tensor:
    return drawn.requires_grad_() if requires_grad else drawn


def _into(draw: Callable[..., Tensor]) -> _Drawn:
    """Of ``x.normal_()``: into a tensor that is there."""

    def drawn(noise: Draws, x: Tensor, *arguments: Any, **named: Any) -> Any:
        return x.copy_(draw(noise, x, *arguments, **named)) if x.dtype in FLOATS else NotImplemented

    return drawn


def _uniform_(noise: Draws, x: Tensor, low: float = 0.0, high: float = 1.0, **named: float) -> Tensor:
    low = named.get("from", low)
    return noise.uniform(x) * (named.get("to", high) - low) + low


def _normal_(noise: Draws, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return noise.normal(x) * std + mean


def _exponential_(noise: Draws, x: Tensor, lambd: float = 1.0) -> Tensor:
    # Never 0, as torch's: gumbel_softmax takes its logarithm.
    return (-torch.log1p(-noise.uniform(x))).clamp_(min=torch.finfo(x.dtype).tiny) / lambd


def _normal(noise: Draws, mean: Any, std: Any = 1.0, *size: Any, **more: Any) -> Any:
    if size or "size" in more:
        shape = size[0] if size else more.pop("size")
        return _new(Draws.normal)(noise, shape, **more) * std + mean
    like = torch.empty_like(mean + std if isinstance(mean, Tensor) or isinstance(std, Tensor) else mean)
    return noise.normal(like) * std + mean if like.dtype in FLOATS else NotImplemented


def _bernoulli(noise: Draws, input: Tensor, p: float | None = None) -> Any:
    if input.dtype not in FLOATS:
        return NotImplemented
    return (noise.uniform(input) < (input if p is None else p)).to(input.dtype)


def _bernoulli_(noise: Draws, x: Tensor, p: Any = 0.5) -> Tensor:
    drawn = uniform(noise.key(), x.shape, torch.float32, x.device)[0]
    return x.copy_((drawn < p).to(x.dtype))


def _randint(noise: Draws, *arguments: Any, requires_grad: bool = False, **options: Any) -> Any:
    *bounds, size = [*arguments, *(options.pop(n) for n in ("low", "high", "size") if n in options)]
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return noise.whole(torch.empty(size, **{"dtype": torch.int64, **options}), low, high)


def _randint_like(noise: Draws, input: Tensor, *bounds: int, **options: Any) -> Any:
    if len(bounds) not in (1, 2) or {"low", "high"} & options.keys():
        return NotImplemented
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return noise.whole(torch.empty_like(input, **options), low, high)


def _randperm(noise: Draws, n: int, **options: Any) -> Any:
    like = torch.empty(n, **{"dtype": torch.int64, **options})
    return hash_words(noise.key(), n, like.device).argsort(stable=True).to(like.dtype)


def _multinomial(noise: Draws, input: Tensor, num_samples: int, replacement: bool = False) -> Any:
    """The first of exponential arrivals with these rates (Efraimidis and Spirakis 2006)."""
    *rows, kinds = input.shape
    if input.dtype not in FLOATS or (num_samples > kinds and not replacement):
        return NotImplemented
    if replacement:
        rates = input.unsqueeze(-2).expand(*rows, num_samples, kinds)
        return (_exponential_(noise, rates) / rates).argmin(-1)
    return (_exponential_(noise, input) / input).topk(num_samples, largest=False).indices


# -- dropout -------------------------------------------------------------------------------------------


def _rate(p: float) -> Tensor | float:
    """The rate of the member, where each has its own."""
    return p.tensor if isinstance(p, Rate) and p.tensor is not None else number(p)


def _mask(noise: Draws, like: Tensor, p: Tensor | float, shape: torch.Size) -> Tensor:
    """1 where a unit is kept, 0 elsewhere."""
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    bits = hash_bits(noise.key(), math.prod(shape), like.device).view(shape).to(dtype)
    if isinstance(p, Tensor):  # as in `models.layers.Dropout`
        return (bits - ((p * 2**16).floor().to(dtype) - 1)).clamp(0.0, 1.0).to(like.dtype)
    return bits.ge_(int(p * 2**16)).to(like.dtype)


def _dropout(*, features: bool = False, alpha: bool = False, inplace: bool = False) -> _Drawn:
    """features: whole channels (N, C, ...) are kept or dropped; alpha: mean and variance are kept."""

    def drawn(noise: Draws, x: Tensor, p: float, train: bool) -> Any:
        rate = _rate(p)
        if not train or x.dtype not in FLOATS:
            return NotImplemented
        if not (isinstance(rate, Tensor) or 0 < rate < 1):
            noise.count()  # for other members it may be another rate
            return NotImplemented
        shape = torch.Size([*x.shape[:2], *[1] * (x.dim() - 2)]) if features else x.shape
        kept = _mask(noise, x, rate, shape)
        if not alpha:
            kept = kept * _like_input(1 / (1 - rate), x)
            return x.mul_(kept) if inplace else x * kept
        scale = _like_input(((_SATURATED**2 * rate + 1) * (1 - rate)) ** -0.5, x)
        shift = (kept - 1) * (_SATURATED * scale) + _SATURATED * scale * _like_input(rate, x)
        return x.mul_(kept * scale).add_(shift) if inplace else x * (kept * scale) + shift

    return drawn


def _like_input(value: Tensor | float, x: Tensor) -> Tensor | float:
    return value.to(x.dtype) if isinstance(value, Tensor) else value


_SATURATED = 1.7580993408473766  # Klambauer et al. 2017, "Self-Normalizing Neural Networks"


def _attention(
    noise: Draws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """As torch's documentation writes it out. (..., L, E), (..., S, E), (..., S, Ev) -> (..., L, Ev)."""
    rate = _rate(dropout_p)
    drops = isinstance(rate, Tensor) or 0 < rate < 1
    if isinstance(dropout_p, Rate) and not drops:
        noise.count()
    if query.is_nested or not (drops or (inside_transform() and query.device.type == "cpu")):
        return NotImplemented
    q, k, v = query, key, value
    if enable_gqa:
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        )
        nothing = (scores == -math.inf).all(-1, keepdim=True)  # may be attended to: then 0, as torch has it
        weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    else:
        weights = scores.softmax(-1)
    return (_dropped(noise, weights, dropout_p) if drops else weights) @ v


def _dropped(noise: Draws, x: Tensor, p: float) -> Tensor:
    dropped: Tensor = _dropout()(noise, x, p, True)
    return dropped


def _recurrent(cell: str, noise: Draws, *arguments: Any) -> Any:
    """`torch.lstm` and its like, layer by layer, with dropout between them."""
    if len(arguments) != 9 or isinstance(arguments[3], (list, tuple)):
        return NotImplemented  # a packed sequence
    x, start, weights, biases, layers, p, train, both, batch_first = arguments
    drops, mapped = train and 0 < p < 1 and layers > 1, inside_transform()
    if not drops and not mapped:
        return NotImplemented
    run: Any = functools.partial(run_layer, cell) if mapped else _CELLS[cell]
    directions, each, ends = 2 if both else 1, len(weights) // layers, []
    for layer in range(layers):
        if layer and drops:
            x = _dropped(noise, x, p)
        rows = slice(layer * directions, (layer + 1) * directions)
        mine = tuple(s[rows] for s in start) if cell == "lstm" else start[rows]
        here = weights[layer * each : (layer + 1) * each]
        found = run(x, mine, here, biases, 1, 0.0, train, both, batch_first)
        if found is NotImplemented:
            return found
        x, *end = found
        ends.append(end)
    return (x, *(torch.cat(parts) for parts in zip(*ends, strict=True)))


@functools.cache
def _body(function: Any) -> Any:
    """A function of torch as it runs where no mode is on, so that ours sees what it calls."""
    names = {name: (lambda *_: False) for name in function.__code__.co_names if "has_torch_function" in name}
    own = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


_WRITTEN_IN_PYTHON = frozenset(
    (
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        F.multi_head_attention_forward, F.gumbel_softmax, torch.autograd.grad,
    )
)  # fmt: skip


_DROPOUTS: dict[Any, _Drawn] = {
    torch.dropout: _dropout(),
    torch.dropout_: _dropout(inplace=True),
    torch.feature_dropout: _dropout(features=True),
    torch.feature_dropout_: _dropout(features=True, inplace=True),
    torch.alpha_dropout: _dropout(alpha=True),
    torch.alpha_dropout_: _dropout(alpha=True, inplace=True),
    torch.feature_alpha_dropout: _dropout(features=True, alpha=True),
    torch.feature_alpha_dropout_: _dropout(features=True, alpha=True, inplace=True),
    F.scaled_dot_product_attention: _attention,
}
_RATED = _WRITTEN_IN_PYTHON | _DROPOUTS.keys()  # they may be given the rate of each member


def _out_of_place(name: str) -> _Drawn:
    """``x.lerp_(...)`` and others which torch.func does member after member, though not ``x.lerp(...)``."""

    def written(noise: Draws, x: Tensor, *arguments: Any, **named: Any) -> Any:
        if not inside_transform():
            return NotImplemented
        return x.copy_(getattr(x, name)(*arguments, **named))

    return written


_CELLS = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}
_WRITTEN_OUT: dict[Any, _Drawn] = {
    torch.rand: _new(Draws.uniform),
    torch.randn: _new(Draws.normal),
    torch.rand_like: _like(Draws.uniform),
    torch.randn_like: _like(Draws.normal),
    torch.normal: _normal,
    torch.randint: _randint,
    torch.randint_like: _randint_like,
    torch.randperm: _randperm,
    torch.multinomial: _multinomial,
    Tensor.multinomial: _multinomial,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _into(_uniform_),
    Tensor.normal_: _into(_normal_),
    Tensor.exponential_: _into(_exponential_),
    **_DROPOUTS,
    **{
        getattr(Tensor, f"{name}_"): _out_of_place(name)
        for name in ("scatter", "index_copy", "lerp", "addcmul", "addcdiv")
    },
    **{function: functools.partial(_recurrent, cell) for cell, function in _CELLS.items()},
}
