"""`derive_seed` is the only source of randomness: a seed for every purpose, derived from the run's seed.

No generator lives longer than the purpose it was made for, so no generator state is ever stored: what a
run draws is a function of (seed, path), on any machine, in any process, after any number of restarts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np


def derive_seed(seed: int, *path: str | int, bits: int = 63) -> int:
    """A seed of `bits` bits for the purpose named by `path`, e.g. ``derive_seed(0, "init", trial)``.

    BLAKE2b of the JSON of seed and path: equal on every platform, unrelated for different paths.
    """
    text = json.dumps([seed, *path], separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - bits)


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """NumPy's PCG64 for one purpose. Its streams are stable across NumPy versions for what is used here."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *path)))


@contextlib.contextmanager
def torch_seeded(seed: int, *path: str | int) -> Iterator[None]:
    """Within the block, torch's global CPU generator is the one of this purpose; after it, as before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *path))
        yield


def bookmark(devices: Iterable[Any] = ()) -> Callable[[], None]:
    """A function that puts the global generators of torch (the CPU's and those of CUDA `devices`), NumPy and
    Python back to where they are now, so that the same numbers are drawn again."""
    import torch

    cpu, others = torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in devices]
    numpys, pythons = np.random.get_state(), random.getstate()

    def go_back() -> None:
        np.random.set_state(numpys)
        random.setstate(pythons)
        torch.set_rng_state(cpu)
        for device, state in others:
            torch.cuda.set_rng_state(state, device)

    return go_back


def seed_others(seed: int) -> Callable[[], bool]:
    """Seeds the global generators of NumPy and Python with 32 bits. Returns what says whether they have drawn
    anything since."""
    np.random.seed(seed)
    random.seed(seed)
    before = _places()
    return lambda: _places() != before


def _places() -> tuple[Any, ...]:
    """Where they stand."""
    numpys, pythons = np.random.get_state(legacy=False), random.getstate()
    inner = numpys["state"]
    return inner["pos"], inner["key"][0], numpys["has_gauss"], pythons[1][-1], pythons[1][0], pythons[2]


@contextlib.contextmanager
def globally_seeded(seed: int, *path: str | int) -> Iterator[None]:
    """Within the block, the global generators of torch (CPU), NumPy and Python are those of this purpose;
    after it, as before. For code of the user that draws from them."""
    numpys, pythons, derived = np.random.get_state(), random.getstate(), derive_seed(seed, *path)
    try:
        np.random.seed(derived & 0xFFFFFFFF)
        random.seed(derived)
        with torch_seeded(seed, *path):
            yield
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)
