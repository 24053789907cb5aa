"""`run.head`: how many events a record had, in a file beside it that nothing waits for.

A record whose end is lost (a log that was cut, a disk that had not written what it said) is a good record of
an earlier time: its hash chain cannot tell. This file can, where it was not lost as well.
"""

from __future__ import annotations

import os
from pathlib import Path

_LENGTH = 21


class Head:
    """Beside the record at `path`. What it says is a hint: a missing or damaged one says nothing."""

    def __init__(self, path: Path) -> None:
        self.path, self._fd = path.with_suffix(".head"), -1

    def read(self) -> int:
        """The number of events that the record had; 0 where it is not known."""
        try:
            text = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return int(text) if len(text) == _LENGTH and text[:-1].isdigit() else 0

    def write(self, events: int) -> None:
        """Notes it, unsynced: a write of some bytes in place, after each commit."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.pwrite(self._fd, f"{events:020d}\n".encode(), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
