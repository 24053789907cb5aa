"""Segments one after another in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from hpt_torch.crash import CrashLog
from hpt_torch.executors.segment import Boundary, Segment, Training, gave_up


class InlineExecutor:
    """No processes: for CUDA, for streams, and where one worker is all there is."""

    def __init__(self, training: Training, crash: CrashLog) -> None:
        self.training, self.crash = training, crash

    def run(self, segments: Iterable[Segment], should_stop: Callable[[], bool]) -> Iterator[Boundary]:
        for segment in segments:
            if should_stop():
                return
            if stack := self.crash.note(segment.key):
                yield gave_up(segment, f"the process that trained it crashed:\n{stack}")
            else:
                yield from self.training.run(segment, should_stop)
        self.crash.note("")

    def close(self) -> None:
        pass
