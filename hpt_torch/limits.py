"""How much memory and CPU time this process may use: the machine's, or less where a cgroup allows less."""

from __future__ import annotations

import os
from pathlib import Path


def memory_bytes() -> int | None:
    """The memory of this machine, or less where a cgroup allows less; None where the system does not tell."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return min([whole, *(int(text) for text in _cgroup("memory.max") if text != "max")])


def free_bytes() -> int | None:
    """The memory that is free, or is at once where it is asked for (files that the system caches); less where
    a cgroup allows less. None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    limits, used, statistics = (_cgroup(f"memory.{name}") for name in ("max", "current", "stat"))
    for limit, use, text in zip(limits, used, statistics, strict=False):
        cached = dict(line.split() for line in text.splitlines()).get("inactive_file", 0)
        if limit != "max":
            free = min(free, int(limit) - int(use) + int(cached))
    return max(free, 0)


def cpu_quota() -> float | None:
    """How many cores' time a cgroup allows, or None: affinity, which names cores, does not tell."""
    pairs = [text.split() for text in _cgroup("cpu.max")]
    return min((int(most) / int(period) for most, period in pairs if most != "max"), default=None)


def _cgroup(name: str, mounted: Path = Path("/sys/fs/cgroup")) -> list[str]:
    """What this file says in the process's cgroup (version 2) and in those that it lies in."""
    try:
        own = mounted / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        files = [folder / name for folder in (own, *own.parents) if folder.is_relative_to(mounted)]
        return [file.read_text().strip() for file in files if file.is_file()]
    except OSError:
        return []
