"""How much memory a run uses: this process and its workers, with what they share counted once."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def tree_memory(pid: int | None = None) -> int | None:
    """Bytes of a process (default: this one) and of all its descendants; None where the system does not tell.

    Linux's proportional set size: forked workers share the data set and torch itself, and adding up their
    resident sizes would count those once a worker.
    """
    if not sys.platform.startswith("linux"):
        return None
    sizes = [_proportional(process) for process in _tree(os.getpid() if pid is None else pid)]
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None


def _tree(pid: int) -> list[int]:
    """The process and its descendants that are there now."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for task in Path(f"/proc/{found[-1]}/task").glob("*/children"):  # of each of its threads
            text = _read(task)
            waiting += [int(child) for child in (text or "").split()]
    return found


def _proportional(pid: int) -> int | None:
    for line in (_read(Path(f"/proc/{pid}/smaps_rollup")) or "").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def _read(path: Path) -> str | None:
    """None where the process has ended since, is not ours, or the kernel does not have this file."""
    try:
        return path.read_text()
    except OSError:
        return None
