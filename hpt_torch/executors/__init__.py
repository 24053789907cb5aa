"""Executors run segments: in this process, or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from hpt_torch.executors.inline import InlineExecutor
from hpt_torch.executors.processes import ProcessExecutor
from hpt_torch.executors.segment import Boundary, Finished, Segment, Training

__all__ = ["Boundary", "Executor", "Finished", "InlineExecutor", "ProcessExecutor", "Segment", "Training"]


class Executor(Protocol):
    """Results do not depend on which executor it is, nor on how many workers it has."""

    def run(self, segments: Iterable[Segment], should_stop: Callable[[], bool]) -> Iterator[Boundary]:
        """Runs all segments, each taken from the iterable when a worker is free for it; yields what comes of
        them in the order in which it comes. After `should_stop()` no more are begun, and those that run end
        with their state."""
        ...

    def close(self) -> None:
        """Ends the workers, if there are any."""
        ...
