"""Segments one after another in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from hpt_torch.executors.segment import Boundary, Segment, Training


class InlineExecutor:
    """No processes: for CUDA, for streams, and where one worker is all there is."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def run(self, segments: Iterable[Segment], should_stop: Callable[[], bool]) -> Iterator[Boundary]:
        for segment in segments:
            if should_stop():
                return
            yield from self.training.run(segment, should_stop)

    def close(self) -> None:
        pass
