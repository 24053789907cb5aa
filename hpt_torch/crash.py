"""`crash.log`: what a run's own process was doing when it crashed, so that its next session can leave it out.

A segfault in this process ends the run. Python's faulthandler still writes the stack; beside it lies what was
being trained. A kill leaves no stack, and is no reason to give anything up.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hpt_torch.types import writing

_STDERR = 2
MOST = 20_000  # bytes that are read of a log
_watching: list[IO[Any]] = []  # of the sessions inside each other


class CrashLog:
    """Of the run in this directory. It is read when it is made, and written while `watching`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "crash.log"
        self._file: IO[bytes] | None = None
        self._crashed, self._stack = _read(self.path)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """From now on a crash is written down; without one nothing is left of it."""
        before = faulthandler.is_enabled()
        with writing(self.path):
            file = self.path.open("wb", buffering=0)
        with file:
            self._file = file
            _watching.append(file)
            faulthandler.enable(file, all_threads=False)
            try:
                yield
            finally:
                _watching.pop()
                faulthandler.disable()
                if _watching or before:
                    faulthandler.enable(_watching[-1] if _watching else _STDERR)
                self._file = None
                self.path.unlink(missing_ok=True)

    def note(self, doing: str) -> str:
        """Says what comes next, on one line. Where the session before crashed at it, returns its stack; else
        an empty string."""
        if doing == self._crashed:
            return self._stack
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: then a crash would be repeated
                self._file.truncate(0)
                self._file.seek(0)
                self._file.write(f"{doing}\n".encode())
        return ""


def stack_in(log: str) -> str:
    """What faulthandler wrote; empty if it wrote nothing."""
    start = log.find("Fatal Python error")
    return log[start:].partition("\nExtension modules")[0].strip() if start >= 0 else ""


def _read(path: Path) -> tuple[str, str]:
    try:
        with open(path, "rb") as file:
            log = file.read(MOST).decode(errors="replace")
    except FileNotFoundError:
        return "", ""
    doing, _, rest = log.partition("\n")
    return (doing, stack) if (stack := stack_in(rest)) else ("", "")
