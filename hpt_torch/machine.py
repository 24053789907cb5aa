"""What this machine needs to train fast: set once a process, before the first large tensor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import sys
from collections.abc import Iterator

import torch

from hpt_torch.seeding import bookmark

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP_BYTES = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of giving it back to the kernel at every step, where each step
    would then pay for page faults. True where it was set: Linux with glibc."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_THRESHOLD, _KEEP_BYTES), (_M_TRIM_THRESHOLD, _KEEP_BYTES), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Afterwards torch is set in this process as it was: threads, generators, which kernels."""
    go_back, threads = bookmark(), torch.get_num_threads()
    deterministic, benchmark = _deterministic(), torch.backends.cudnn.benchmark
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # as of torch 2.9
    try:
        yield
    finally:
        go_back()
        torch.set_num_threads(threads)
        if _deterministic() != deterministic:  # the call imports all of torch.compile: a second
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.benchmark = benchmark
        if precision is not None:
            torch.backends.cuda.matmul.fp32_precision = precision


def _deterministic() -> tuple[bool, bool]:
    """Whether only kernels are used that repeat bit for bit; whether others only give a warning."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns


@contextlib.contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Numbers nearer to 0 than 1.2e-38 (float64: 2.2e-308) count as 0: on this thread, and any it starts.

    A processor takes some hundred times as long for each such number, and weight decay makes them: of weights
    whose input is always 0, like a picture's corners. Afterwards all is as before. Usable as a decorator.
    """
    before = are_denormals_zero()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def are_denormals_zero() -> bool:
    """Whether they count as 0 on this thread now."""
    return not float(torch.full((), 1e-300, dtype=torch.float64) * 1e-10)


@denormals_are_zero()
def use_threads(count: int) -> None:
    """Computes on so many threads from now on, and starts them: a thread treats denormals for its life as the
    one that started it did then."""
    torch.set_num_threads(count)
    if count > 1:
        torch.zeros(1 << 20).add_(1)
