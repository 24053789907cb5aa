"""`run.head`: how many events a record had, in a file beside it that nothing waits for.

A record whose end is lost (a log that was cut, a disk that had not written what it said) is a good record of
an earlier time: its hash chain cannot tell. This file can, where it was not lost as well: it is a hint, and a
missing or damaged one says nothing.
"""

from __future__ import annotations

from pathlib import Path

_LENGTH = 21


def read(record: Path) -> int:
    """The number of events that the record at this path had; 0 where it is not known."""
    try:
        text = _beside(record).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return int(text) if len(text) == _LENGTH and text[:-1].isdigit() else 0


def write(record: Path, events: int) -> None:
    """Notes it, after each commit, unsynced."""
    _beside(record).write_bytes(f"{events:020d}\n".encode())


def _beside(record: Path) -> Path:
    return record.with_suffix(".head")
