"""Noise as a function of a key: hashes in place of a generator's state.

What is drawn so is the same for a model that is trained alone, in a group, or resumed, and can be recorded
as a part of a training step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def hash_words(key: Tensor, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` elements: int32, shape (count,). key: int32, shape ().

    A counter-based generator in the manner of Salmon et al. 2011 ("Parallel random numbers: as easy as 1,
    2, 3"), with the 32-bit finaliser "lowbias32" (C. Wellons, hash-prospector) as its mixing function.
    """
    words = _mixed(key, count, device)
    return words.bitwise_xor_((words >> _word(16, device)).bitwise_and_(_word(0xFFFF, device)))


def hash_bits(key: Tensor, count: int, device: torch.device) -> Tensor:
    """16 random bits for each of `count` elements, of `hash_words`: int32 in [0, 2**16), shape (count,)."""
    words, low = _mixed(key, (count + 1) // 2, device), _word(0xFFFF, device)  # each gives two their bits
    high = (words >> _word(16, device)).bitwise_and_(low)
    return torch.cat((words.bitwise_xor_(high).bitwise_and_(low), high))[:count]


def _mixed(key: Tensor, count: int, device: torch.device) -> Tensor:
    """`hash_words` but for its last shift."""
    words, c = _counters(count, device) ^ key, _word
    # The masks make an arithmetic shift a logical one.
    for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B)):
        words.bitwise_xor_((words >> c(shift, device)).bitwise_and_(c(mask, device))).mul_(c(factor, device))
    return words


def uniform(
    key: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, streams: int = 1
) -> Tensor:
    """Uniform in [0, 1), with as many random bits as `dtype` holds: (streams, *shape)."""
    bits, count = _BITS[dtype], streams * math.prod(shape)
    if bits <= 32:
        words = (hash_words(key, count, device) >> (32 - bits)).bitwise_and_((1 << bits) - 1)
        drawn = words.to(torch.float32).mul_(2.0**-bits).to(dtype)
    else:
        high, low = hash_words(key, 2 * count, device).chunk(2)
        drawn = (high >> 5).bitwise_and_((1 << 27) - 1).to(dtype).mul_(2.0**26)
        drawn = drawn.add_((low >> 6).bitwise_and_((1 << 26) - 1)).mul_(2.0**-bits)
    return drawn.view(streams, *shape)


_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
FLOATS = frozenset(_BITS)


def normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal (Box and Muller 1958): shape `shape`."""
    exact = dtype if dtype == torch.float64 else torch.float32
    radius, angle = uniform(key, shape, exact, device, streams=2)
    return (-2 * torch.log1p(-radius)).sqrt_().mul_((2 * math.pi * angle).cos_()).to(dtype)


def _counters(count: int, device: torch.device) -> Tensor:
    return _plain(_make_counters, count, device)


def _word(value: int, device: torch.device) -> Tensor:
    """A constant as a tensor: a Python number would be converted again at every operation."""
    return _plain(_make_word, value, device)


def _plain(make: Any, *arguments: Any) -> Tensor:
    """From the cache; inside a transform made anew, since what is made there does not outlive it."""
    fresh = torch.compiler.is_compiling() or inside_transform()
    made: Tensor = make.__wrapped__(*arguments) if fresh else make(*arguments)
    return made


@functools.lru_cache(maxsize=64)
def _make_counters(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device) * _signed(0x9E3779B1)


@functools.lru_cache(maxsize=64)
def _make_word(value: int, device: torch.device) -> Tensor:
    return torch.tensor(_signed(value), dtype=torch.int32, device=device)


def _signed(value: int) -> int:
    """The signed 32-bit integer with these bits."""
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def stream_key(key: int, stream: int) -> int:
    """The key of one stream of noise (a layer, say) from that of the whole step: a signed 32-bit integer."""
    x = (key + 0x9E3779B9 * (stream + 1)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return _signed(x ^ (x >> 16))


def stream_key_of(key: Tensor, stream: int) -> Tensor:
    """`stream_key` of a key that is a tensor: int32, shape ()."""
    x, device = key + _word(0x9E3779B9 * (stream + 1), key.device), key.device
    for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B)):
        x = (x ^ ((x >> _word(shift, device)) & _word(mask, device))) * _word(factor, device)
    return x ^ ((x >> _word(16, device)) & _word(0xFFFF, device))


def inside_transform() -> bool:
    """Whether torch.func (vmap, grad, ...) is transforming the running code."""
    functorch = getattr(torch._C, "_functorch", None)
    # torch has no public way to ask. Of the private ones this is the one that torch.compile can trace; should
    # it go, the forms that can be mapped are right everywhere.
    if functorch is None or not hasattr(functorch, "get_dynamic_layer_stack_depth"):
        return True
    return bool(functorch.get_dynamic_layer_stack_depth())
