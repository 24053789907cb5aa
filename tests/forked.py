"""`hpt` in a process of its own, within milliseconds: forked from a server that has loaded torch and trained
nothing. (A process that has trained cannot be forked: autograd's threads are missing in the copy.)"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["hpt_torch.cli", "hpt_torch.result", "hpt_torch.observers.tensorboard", "hpt_torch.report.page"]
)


class Hpt:
    """`hpt` with these arguments, in a process group of its own. prepare: called there, before all else; like
    all that goes to another process it must be one that pickle can name."""

    def __init__(self, *arguments: str, prepare: Callable[[], Any] | None = None) -> None:
        # A pipe, because a file would fill up with the disks of the tests. What is written fits into it.
        self._output, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_main, args=(arguments, theirs, prepare))
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 60.0) -> tuple[int, str]:
        """The exit status (negative: the signal) and what it has written."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join()
        with os.fdopen(os.dup(self._output.fileno())) as file:
            said = file.read()
        self._output.close()
        assert code is not None, f"still runs after {seconds} s:\n{said}"
        return code, said


def _main(arguments: tuple[str, ...], output: Connection, prepare: Callable[[], Any] | None) -> None:
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.argv = ["hpt", *arguments]
    if prepare is not None:
        prepare()
    from hpt_torch import cli

    cli.main()
