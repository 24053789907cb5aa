"""Augmentation against an image-by-image reference, and what its noise may depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hpt_torch.models.augment import augment

BITS = 0xFFFFFFFF
STREAM = 0x3C6EF35F


def _mix(x: int) -> int:
    """lowbias32 on unsigned 32-bit integers, as published."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & BITS
    return x ^ (x >> 16)


def _noise(key: int, count: int) -> list[float]:
    """`count` numbers in [0, 1) from a key, in Python's integers: the lower halves of words come first."""
    mixed = (key ^ STREAM) & BITS
    words = [_mix((i * 0x9E3779B1 & BITS) ^ mixed) for i in range((count + 1) // 2)]
    return [half / 2**16 for half in (*(w & 0xFFFF for w in words), *(w >> 16 for w in words))][:count]


def _reference(x: Tensor, key: int, padding: float, flip: float, cutout: float) -> Tensor:
    """Pixel by pixel: where each comes from, and whether it is blanked."""
    B, C, H, W = x.shape
    noise, reach = _noise(key, 5 * B), math.floor(padding)
    out = torch.zeros_like(x)
    for b in range(B):
        shift_y, shift_x, mirror, centre_y, centre_x = (noise[k * B + b] for k in range(5))
        down = math.floor(shift_y * (2 * reach + 1)) - reach
        right = math.floor(shift_x * (2 * reach + 1)) - reach
        padded = torch.zeros(C, H + 2 * reach, W + 2 * reach, dtype=x.dtype)
        padded[:, reach : reach + H, reach : reach + W] = x[b]
        image = padded[:, reach + down : reach + down + H, reach + right : reach + right + W].clone()
        if mirror < flip:
            image = image.flip(2)
        for row in range(H):
            for column in range(W):
                near_y = abs(row + 0.5 - centre_y * H) < cutout / 2
                near_x = abs(column + 0.5 - centre_x * W) < cutout / 2
                if near_y and near_x:
                    image[:, row, column] = 0
        out[b] = image
    return out


def _images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _augment(x: Tensor, key: int, padding: float = 0, flip: float = 0, cutout: float = 0) -> Tensor:
    strengths = (torch.tensor(float(value), dtype=x.dtype) for value in (padding, flip, cutout))
    return augment(x, torch.tensor(key, dtype=torch.int32), *strengths)


@pytest.mark.parametrize("key", [0, 1, -1, 2**31 - 1, -(2**31), 123456789])
@pytest.mark.parametrize(
    ("padding", "flip", "cutout"),
    [(2, 0, 0), (2.9, 0, 0), (0, 0.5, 0), (0, 1, 0), (0, 0, 3), (0, 0, 4.5), (3, 0.5, 4), (9, 0.5, 0)],
)
def test_equals_the_reference(key: int, padding: float, flip: float, cutout: float) -> None:
    x = _images(6, 3, 7, 5)
    assert torch.equal(_augment(x, key, padding, flip, cutout), _reference(x, key, padding, flip, cutout))


def test_strengths_of_zero_change_no_bit() -> None:
    x = _images(8, 2, 6, 6)
    x[0, 0, 0] = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, 3e38, -3e38])
    for key in range(20):
        assert torch.equal(_augment(x, key).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_probability_of_flips(probability: float) -> None:
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(5000, 1, 1, 4)
    flipped = (_augment(x, 7, flip=probability)[:, 0, 0, 0] == 3).double().mean()
    assert float(flipped) == pytest.approx(probability, abs=0.03 if 0 < probability < 1 else 0)


@pytest.mark.parametrize("padding", [0.0, 0.9, 1.0, 2.0, 2.5])
def test_range_of_shifts(padding: float) -> None:
    """Every whole shift up to the padding, each way and each equally often, and no other."""
    reach, size = math.floor(padding), 11
    x = torch.zeros(6000, 1, size, size)
    x[:, :, 5, 5] = 1  # where the lit pixel goes is the shift
    at = _augment(x, 3, padding=padding).flatten(1).argmax(1)
    for shifts in (at // size - 5, at % size - 5):
        seen, counts = shifts.unique(return_counts=True)
        assert seen.tolist() == list(range(-reach, reach + 1))
        torch.testing.assert_close(counts / 6000, torch.full((len(seen),), 1 / len(seen)), rtol=0, atol=0.03)


def test_size_of_the_blank() -> None:
    """A square of `cutout_size` where it does not hang over the edge, wherever its centre is."""
    x = torch.ones(3000, 1, 9, 9)
    blanked = 1 - _augment(x, 5, cutout=3)[:, 0]
    rows, columns = (blanked.amax(d).sum(-1) for d in (2, 1))
    assert torch.equal(blanked.sum((1, 2)), rows * columns)  # a rectangle
    assert set(rows.tolist()) == set(columns.tolist()) == {2.0, 3.0}  # 2 at an edge
    assert float((rows == 3).double().mean()) == pytest.approx(7 / 9, abs=0.05)
    assert bool((blanked.amax(0) == 1).all())  # every pixel may be hit


def test_another_key_is_another_draw_and_neighbours_share_none() -> None:
    x = _images(1, 1, 8, 8).expand(64, 1, 8, 8)
    first, second = (_augment(x, key, padding=3, flip=0.5, cutout=2) for key in (1, 2))
    assert not torch.equal(first, second)
    assert len(first.flatten(1).unique(dim=0)) > 55
    assert float((first == second).flatten(1).all(1).double().mean()) < 0.1


def test_the_same_key_gives_the_same_whatever_stands_around() -> None:
    """Neither other images in the batch nor torch's generator nor earlier calls have a say."""
    x = _images(6, 1, 8, 8)
    torch.manual_seed(1)
    first = _augment(x, 11, padding=2, flip=0.5, cutout=3)
    torch.manual_seed(2)
    _augment(x, 12, padding=2)
    other = x.clone()
    other[1:] = torch.nan
    assert torch.equal(_augment(other, 11, padding=2, flip=0.5, cutout=3)[0], first[0])
    assert torch.equal(_augment(x, 11, padding=2, flip=0.5, cutout=3), first)


def test_the_strength_of_one_kind_leaves_the_draws_of_the_others() -> None:
    """A neighbouring value of one hyperparameter is compared on the same noise of the rest."""
    x = _images(32, 1, 8, 8)
    flips = _augment(x, 4, flip=0.5)
    cut = _augment(x, 4, flip=0.5, cutout=3)
    assert torch.equal(torch.where(cut == 0, 0.0, flips), cut)


def test_maps_over_members_with_their_own_keys_and_strengths() -> None:
    x = _images(5, 2, 8, 8)
    keys = torch.tensor([3, -9, 3, 2**31 - 1], dtype=torch.int32)
    padding, flip, cutout = (
        torch.tensor(v) for v in ([0.0, 2.0, 3.7, 1.0], [0.0, 0.5, 1.0, 0.3], [0.0, 0.0, 4.0, 2.0])
    )
    shared = torch.func.vmap(augment, in_dims=(None, 0, 0, 0, 0))(x, keys, padding, flip, cutout)
    own = torch.stack([x + i for i in range(4)])
    mapped = torch.func.vmap(augment)(own, keys, padding, flip, cutout)
    for i in range(4):
        assert torch.equal(shared[i], augment(x, keys[i], padding[i], flip[i], cutout[i]))
        assert torch.equal(mapped[i], augment(own[i], keys[i], padding[i], flip[i], cutout[i]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_channels_last_and_other_dtypes(dtype: torch.dtype) -> None:
    x = _images(6, 3, 7, 5).to(dtype)
    strengths = {"padding": 2, "flip": 0.5, "cutout": 3}
    expected = _augment(x, 21, **strengths)
    assert expected.dtype == dtype
    assert torch.equal(_augment(x.to(memory_format=torch.channels_last), 21, **strengths), expected)
    assert torch.equal(_augment(x.to(memory_format=torch.channels_last), 21), x)


def test_the_input_is_left_as_it_is() -> None:
    x = _images(4, 1, 6, 6)
    before = x.clone()
    _augment(x, 1, padding=2, flip=1, cutout=3)
    assert torch.equal(x, before)
