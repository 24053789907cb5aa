"""Progress in the terminal: a live view where there is one, plain log lines where output is piped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.markup import escape

from hpt_torch.observers.live import LiveView
from hpt_torch.record import Event
from hpt_torch.report.terminal import show_seconds, show_value
from hpt_torch.tuner import Tuner
from hpt_torch.types import printable

_PLAIN_EVERY_SECONDS = 5.0
_REFRESHES_A_SECOND = 4.0


class ProgressObserver:
    """Trials done, the best so far with its hyperparameters, speed, time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live: Live | None = None
        self._view: LiveView | None = None
        self._epochs = 0
        self._began = self._told = 0.0

    def started(self, tuner: Tuner) -> None:
        self._began = self._told = time.monotonic()
        self._epochs = 0
        if len(tuner.record.of_kind("session")) > 1:
            self.say(f"continuing {tuner.dir.path}: {tuner.finished} trials were finished before")
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            total = "as many as fit" if tuner.total is None else tuner.total
            self.say(
                f"{tuner.dir.path}: {total} trials of {tuner.recipe.trainer.epochs} epochs "
                f"on {tuner.trainer.device}"
            )
            return
        self._view = LiveView(tuner)
        self._live = Live(
            self._view,
            console=self.console,
            refresh_per_second=_REFRESHES_A_SECOND,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # where it is a file, what the task prints belongs there
        )
        self._live.start()
        # rich hides the cursor. A process that is killed could not bring it back, so it stays.
        self.console.show_cursor(True)

    def recorded(self, tuner: Tuner, events: Sequence[Event]) -> None:
        self._epochs += sum(event.kind == "report" for event in events)
        finished = [event.body["trial"] for event in events if event.kind == "finish"]
        if self._view is not None:
            self._view.standing.note(events)
        for number in finished:
            trial = tuner.record.trials[number]
            if trial.reason:
                self.say(f"trial {number} {trial.state.value}: {trial.reason.strip().splitlines()[-1]}")
            if self._live is None and tuner.best is not None and tuner.best.number == number:
                self.say(f"trial {number}: {_best(tuner)}")
        if self._live is None and finished and time.monotonic() - self._told >= _PLAIN_EVERY_SECONDS:
            self._told = time.monotonic()
            self.say(f"{tuner.finished}/{tuner.total or '?'} trials, {self._rate(tuner)}, {_best(tuner)}")

    def ended(self, tuner: Tuner) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = self._view = None

    def say(self, line: str) -> None:
        shown = "\n".join(printable(part, 3000) for part in line.split("\n"))
        self.console.print(escape(shown), highlight=False, soft_wrap=True)

    def _rate(self, tuner: Tuner) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        text = f"{self._epochs / seconds:.0f} epochs/s"
        if tuner.total is not None and self._epochs:
            left = (tuner.total - tuner.finished) * tuner.recipe.trainer.epochs
            text += f", {show_seconds(left * seconds / self._epochs)} left"
        return text


def _best(tuner: Tuner) -> str:
    if tuner.best is None:
        return "no result yet"
    score = tuner.objective.score(tuner.best)
    hparams = ", ".join(f"{name}={show_value(value)}" for name, value in tuner.best.hparams.items())
    return f"best {tuner.objective.metric}={score:.4f} ({hparams})"


def _restore_streams() -> None:
    """In a forked worker: printing must not wait for a lock that the drawing thread held at the fork."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, stream.rich_proxied_file)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_restore_streams)
