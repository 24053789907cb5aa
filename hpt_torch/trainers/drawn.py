"""What torch's random functions, and some that torch.func cannot map, are written out as.

Each is a function of a `Noise` and of its original's arguments. It returns NotImplemented where torch is to
do it: where nothing is drawn, and where the arguments are wrong, so that torch says what is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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

_FIRST_STREAM = 2**16  # those before are of layers
_MOST_DRAWS = 2**24


def seed_torch(seed: int) -> None:
    """Begins torch's generator of the CPU with 32 bits, far from any seed that a user would choose."""
    torch.default_generator.manual_seed(2**62 + seed)


class Noise:
    """Draws one after another: noise of `key` (int32, shape ()) and of the number of the draw, which is kept
    as the seed of torch's generator, counted from where that is now."""

    def __init__(self, key: Tensor) -> None:
        self._key, self._start = key, torch.default_generator.initial_seed()

    @property
    def goes_on(self) -> bool:
        """False where somebody else has seeded torch's generator since."""
        return 0 <= torch.default_generator.initial_seed() - self._start < _MOST_DRAWS

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


_Drawn = Callable[..., Any]


def _new(draw: Callable[[Noise, Tensor], Tensor]) -> _Drawn:
    """Of ``torch.rand(2, 3)``, ``torch.rand((2, 3))``: a tensor of a shape."""

    def drawn(noise: Noise, *size: Any, requires_grad: bool = False, **options: Any) -> Any:
        like = torch.empty(*size, **options)
        return _wanted(draw(noise, like), requires_grad) if like.dtype in FLOATS else NotImplemented

    return drawn


def _like(draw: Callable[[Noise, Tensor], Tensor]) -> _Drawn:
    """Of ``torch.rand_like(x)``: a tensor like another one."""

    def drawn(noise: Noise, input: Tensor, requires_grad: bool = False, **options: Any) -> Any:
        like = torch.empty_like(input, **options)
        if like.dtype not in FLOATS:
            return NotImplemented
        found = draw(noise, like)  # laid out as torch's
        return _wanted(found if found.stride() == like.stride() else like.copy_(found), requires_grad)

    return drawn


def _wanted(drawn: Tensor, requires_grad: bool) -> Tensor:
    return drawn.requires_grad_() if requires_grad else drawn


def _into(draw: _Drawn) -> _Drawn:
    """Of ``x.normal_()``: into a tensor that is there."""

    def drawn(noise: Noise, x: Tensor, *arguments: Any, **named: Any) -> Any:
        if x.dtype not in FLOATS:
            return NotImplemented
        found = draw(noise, x, *arguments, **named)
        return found if found is NotImplemented else x.copy_(found)

    return drawn


def _uniform_(noise: Noise, x: Tensor, low: float = 0.0, high: float = 1.0, **named: float) -> Any:
    low, high = named.get("from", low), named.get("to", high)
    return noise.uniform(x) * (high - low) + low if low <= high else NotImplemented


def _normal_(noise: Noise, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Any:
    return noise.normal(x) * std + mean if std >= 0 else NotImplemented


def _exponential_(noise: Noise, x: Tensor, lambd: float = 1.0) -> Any:
    # Never 0, as torch's: gumbel_softmax takes its logarithm.
    if lambd <= 0:
        return NotImplemented
    return (-torch.log1p(-noise.uniform(x))).clamp_(min=torch.finfo(x.dtype).tiny) / lambd


def _normal(noise: Noise, mean: Any, std: Any = 1.0, *size: Any, **more: Any) -> Any:
    if isinstance(std, (int, float)) and std < 0:
        return NotImplemented
    if size or "size" in more:
        shape = size[0] if size else more.pop("size")
        return _new(Noise.normal)(noise, shape, **more) * std + mean
    like: Tensor = mean + std if isinstance(mean, Tensor) or isinstance(std, float) else std
    if like.dtype not in FLOATS or (isinstance(mean, Tensor) and mean.dtype not in FLOATS):
        return NotImplemented
    return noise.normal(torch.empty_like(like)) * std + mean


def _bernoulli(noise: Noise, input: Tensor, p: float | None = None) -> Any:
    if input.dtype not in FLOATS or not 0 <= (0 if p is None else p) <= 1:
        return NotImplemented
    return _below(noise, input if p is None else p, input).to(input.dtype)


def _bernoulli_(noise: Noise, x: Tensor, p: Any = 0.5) -> Any:
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        return NotImplemented
    return x.copy_(_below(noise, p, x).to(x.dtype))


def _below(noise: Noise, p: Tensor | float, like: Tensor) -> Tensor:
    """True with probability p, by more bits than half precision has."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    return uniform(noise.key(), like.shape, exact, like.device)[0] < p


def _randint(noise: Noise, *arguments: Any, requires_grad: bool = False, **options: Any) -> Any:
    *bounds, size = [*arguments, *(options.pop(n) for n in ("low", "high", "size") if n in options)]
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return noise.whole(torch.empty(size, **{"dtype": torch.int64, **options}), low, high)


def _randint_like(noise: Noise, input: Tensor, *bounds: int, **options: Any) -> Any:
    if len(bounds) not in (1, 2) or {"low", "high"} & options.keys():
        return NotImplemented
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return noise.whole(torch.empty_like(input, **options), low, high)


def _randperm(noise: Noise, n: int, **options: Any) -> Any:
    like = torch.empty(n, **{"dtype": torch.int64, **options})
    return hash_words(noise.key(), n, like.device).argsort(stable=True).to(like.dtype)


def _multinomial(noise: Noise, input: Tensor, num_samples: int, replacement: bool = False) -> Any:
    """By inversion; without replacement the first of exponential arrivals with these rates (Efraimidis and
    Spirakis 2006)."""
    *rows, kinds = input.shape
    if input.dtype not in FLOATS or len(rows) > 1 or num_samples < 1:
        return NotImplemented
    p = input if input.dtype == torch.float64 else input.float()
    if replacement:
        whole = p.cumsum(-1)
        at = uniform(noise.key(), (*rows, num_samples), p.dtype, p.device)[0] * whole[..., -1:]
        return torch.searchsorted(whole, at, right=True).clamp(max=kinds - 1)
    if num_samples > kinds:
        return NotImplemented
    return (_exponential_(noise, p) / p).topk(num_samples, largest=False).indices


# -- dropout -------------------------------------------------------------------------------------------


def _rate(p: float) -> Tensor | float:
    """The rate of the member, where each has its own."""
    if not isinstance(p, Rate):
        return p
    p.reached = True
    return number(p) if p.tensor is None else p.tensor


def _mask(noise: Noise, like: Tensor, p: Tensor | float, shape: torch.Size) -> Tensor:
    """1 where a unit is kept, 0 elsewhere."""
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    bits = hash_bits(noise.key(), math.prod(shape), like.device).view(shape).to(dtype)
    if isinstance(p, Tensor):  # as in `models.layers.Dropout`
        return (bits - ((p * 2**16).floor().to(dtype) - 1)).clamp(0.0, 1.0).to(like.dtype)
    return bits.ge_(int(p * 2**16)).to(like.dtype)


def _dropout(*, features: bool = False, alpha: bool = False, inplace: bool = False) -> _Drawn:
    """features: whole channels (N, C, ...) are kept or dropped; alpha: mean and variance are kept."""

    def drawn(noise: Noise, input: Tensor, p: float, train: bool) -> Any:
        x, rate = input, _rate(p)
        if not train or x.dtype not in FLOATS or (features and x.dim() < 2):
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
    noise: Noise,
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
    if is_causal and attn_mask is not None:
        return NotImplemented  # so that torch says what is wrong
    q, k, v = query, key, value
    if enable_gqa:
        k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -math.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask.to(scores.dtype)
        )
        nothing = (scores == -math.inf).all(-1, keepdim=True)  # may be attended to: then 0, as torch has it
        weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    else:
        weights = scores.softmax(-1)
    return (_dropped(noise, weights, dropout_p) if drops else weights) @ v


def _dropped(noise: Noise, x: Tensor, p: float) -> Tensor:
    dropped: Tensor = _dropout()(noise, x, p, True)
    return dropped


def _recurrent(cell: str, noise: Noise, *arguments: Any) -> Any:
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


DROPOUTS: dict[Any, _Drawn] = {
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


def _out_of_place(name: str) -> _Drawn:
    """``x.lerp_(...)`` and others which torch.func does member after member, though not ``x.lerp(...)``."""

    def written(noise: Noise, x: Tensor, *arguments: Any, **named: Any) -> Any:
        if not inside_transform():
            return NotImplemented
        return x.copy_(getattr(x, name)(*arguments, **named))

    return written


_CELLS = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}
WRITTEN_OUT: dict[Any, _Drawn] = {
    torch.rand: _new(Noise.uniform),
    torch.randn: _new(Noise.normal),
    torch.rand_like: _like(Noise.uniform),
    torch.randn_like: _like(Noise.normal),
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
    **DROPOUTS,
    **{
        getattr(Tensor, f"{name}_"): _out_of_place(name)
        for name in ("scatter", "index_copy", "lerp", "addcmul", "addcdiv")
    },
    **{function: functools.partial(_recurrent, cell) for cell, function in _CELLS.items()},
}
