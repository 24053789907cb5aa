"""Segments in worker processes, forked once: they share the data, the task and its code with this process.

Forking needs no pickling, so a task from a script's ``__main__`` or a notebook works; it needs Linux. Workers
train on as many threads as this process. They hold nothing that is not in the record: one that dies is
replaced, and its segment is run again. A CUDA context does not survive a fork: workers for CUDA are forked
before this process has one, the spare ones too.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from hpt_torch.crash import MOST, stack_in
from hpt_torch.executors.segment import Boundary, Segment, Training, gave_up
from hpt_torch.types import RunError

DEATHS = 3  # of workers with the same segment, before the segment counts as the cause
SPARES = 8  # that wait to replace others, where none can be forked later
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def supported() -> bool:
    """Whether workers can be forked here."""
    return sys.platform.startswith("linux")


def can_train() -> bool:
    """Whether a fork of this process can train: not where autograd has threads for devices, which is so once
    a process has trained on a machine with CUDA, or with torch.compile."""

    def train() -> bool:
        torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
        return True

    return _in_fork(train)


def can_use_cuda() -> bool:
    """Whether a fork of this process can use CUDA: not once the process has, were it to count the devices."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return _in_fork(lambda: not torch.cuda._is_in_bad_fork())


def _in_fork(holds: Callable[[], bool]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if holds() else 1
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if supported() else os.cpu_count() or 1


@dataclass
class _Worker:
    process: Any
    connection: Connection
    crash: int  # a file in memory, for the stack of a segfault


@dataclass
class _Restart:
    """How to run a segment again: from the newest state that its worker had sent."""

    segment: Segment
    deaths: int = 0
    heard: float = 0.0  # when it was sent, or when its worker last brought a boundary


class ProcessExecutor:
    """`workers` processes, started at the first run, or by `start` before other threads exist.

    training: what trains in the worker at a position from 0 on, made there. spares: how many more are forked
    at the start, to replace those that die; None: a new one is forked for each. patience_seconds: one that
    brings no boundary for so long is killed, and its segment not run again.
    """

    def __init__(
        self,
        training: Callable[[int], Training],
        workers: int,
        *,
        spares: int | None = None,
        patience_seconds: float | None = None,
    ) -> None:
        self.training, self.count, self.patience = training, workers, patience_seconds
        self._context = multiprocessing.get_context("fork")
        self._stop = self._context.RawValue(ctypes.c_bool, False)
        self._workers: list[_Worker] = []
        self._spares: list[_Worker] | None = None if spares is None else []
        self._keeps = spares or 0

    def start(self) -> None:
        while len(self._workers) < self.count:
            self._workers.append(self._fork())
        while self._spares is not None and self._keeps:
            self._spares.append(self._fork())
            self._keeps -= 1

    def run(self, segments: Iterable[Segment], should_stop: Callable[[], bool]) -> Iterator[Boundary]:
        self.start()
        self._stop.value = False
        waiting, again = iter(segments), list[_Restart]()
        running: dict[int, _Restart] = {}  # by the worker's position
        exhausted = False
        while True:
            if not self._stop.value and should_stop():
                self._stop.value = True
            for position, worker in enumerate(self._workers):
                if position in running or self._stop.value:
                    continue
                if again:
                    running[position] = again.pop()
                elif not exhausted and (segment := next(waiting, None)) is not None:
                    running[position] = _Restart(segment)
                else:
                    exhausted = True
                    break
                running[position].heard = time.monotonic()
                with contextlib.suppress(OSError):  # it died while it waited: reading from it will tell
                    _send(worker.connection, (position, running[position].segment))
            if not running:
                if again and not self._stop.value:
                    continue
                return
            by_connection = {self._workers[p].connection: p for p in running}
            for ready in wait(list(by_connection), timeout=_POLL_SECONDS):
                position = by_connection[ready]  # type: ignore[index]
                restart = running[position]
                try:
                    message = _receive(self._workers[position].connection)
                except (EOFError, OSError):
                    del running[position]
                    how, stack = self._replace(position)
                    restart.deaths += 1
                    if restart.deaths < DEATHS:
                        again.append(restart)
                    else:
                        yield gave_up(restart.segment, f"the worker process {how}, {DEATHS} times{stack}")
                    continue
                if isinstance(message, str):
                    raise RunError(f"a worker failed in hpt_torch itself:\n{message}")
                self._note(restart, message)
                restart.heard = time.monotonic()
                if message.over:
                    del running[position]
                yield message
            for position in [p for p in running if self._is_stuck(running[p])]:
                self._workers[position].process.kill()
                self._replace(position)
                yield gave_up(running.pop(position).segment, f"no epoch was done within {self.patience:g} s")
            if self._stop.value:  # a halted worker (SIGSTOP) cannot stop; what it holds is trained again
                for position in [p for p in running if _is_halted(self._workers[p].process.pid)]:
                    self._workers[position].process.kill()
                    self._replace(position)
                    del running[position]

    def _is_stuck(self, restart: _Restart) -> bool:
        return self.patience is not None and time.monotonic() - restart.heard > self.patience

    def close(self) -> None:
        for worker in (*self._workers, *(self._spares or ())):
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
            os.close(worker.crash)
        self._workers.clear()
        if self._spares is not None:
            self._spares.clear()

    def _note(self, restart: _Restart, boundary: Boundary) -> None:
        """A restart goes on from the newest state: what was reported after it is trained and told again."""
        if boundary.state is not None:
            restart.segment = replace(restart.segment, state=boundary.state)
            restart.deaths = 0

    def _fork(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        others = [ours, *(worker.connection for worker in (*self._workers, *(self._spares or ())))]
        crash = os.memfd_create("hpt_torch crash")
        arguments = (theirs, others, self.training, self._stop, torch.get_num_threads(), os.getpid(), crash)
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings():
            # Python warns of forks beside threads: the child touches none of what they might hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        return _Worker(process, ours, crash)

    def _replace(self, position: int) -> tuple[str, str]:
        """Puts a new worker in the place of a dead one. Returns how the old one died and, if known, where."""
        old = self._workers[position]
        old.connection.close()
        old.process.join()
        stack = stack_in(os.pread(old.crash, MOST, 0).decode(errors="replace"))
        os.close(old.crash)
        code = old.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        del self._workers[position]
        self._workers.insert(position, self._fresh(how))
        return how, f":\n{stack}" if stack else ""

    def _fresh(self, how: str) -> _Worker:
        if self._spares is None:
            return self._fork()
        if not self._spares:
            raise RunError(
                f"a worker process {how}, and as many as can be replaced had died before; nothing is lost, "
                "and the same command goes on"
            )
        return self._spares.pop()


def _is_halted(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")


class _Pickler(pickle.Pickler):
    """Tensors arrive on the CPU, whatever device they come from."""

    def reducer_override(self, one: Any) -> Any:
        if isinstance(one, torch.Tensor) and one.device.type != "cpu":
            return one.detach().cpu().__reduce_ex__(5)  # type: ignore[no-untyped-call]
        return NotImplemented


def _send(connection: Connection, message: tuple[int, Segment] | Boundary | str) -> None:
    """With plain pickle: multiprocessing's own would move each tensor through a shared file."""
    written = io.BytesIO()
    _Pickler(written, protocol=5).dump(message)
    connection.send_bytes(written.getbuffer())


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _serve(
    connection: Connection,
    others: list[Connection],
    training: Callable[[int], Training],
    stop: Any,
    threads: int,
    parent: int,
    crash: int,
) -> None:
    """A worker's life: segments in, boundaries out, until the other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the coordinator's to handle; it tells us by `stop`
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before we asked to be told
    for other in others:
        other.close()
    faulthandler.enable(crash, all_threads=False)
    torch.set_num_threads(threads)
    mine = None
    try:
        while True:
            position, segment = _receive(connection)
            mine = mine or training(position)
            for boundary in mine.run(segment, lambda: bool(stop.value)):
                _send(connection, boundary)
    except (EOFError, OSError):
        os._exit(0)  # the coordinator is gone
    except BaseException:
        with contextlib.suppress(OSError):
            _send(connection, traceback.format_exc())
        os._exit(1)
