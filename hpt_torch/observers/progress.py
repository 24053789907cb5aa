"""Progress in the terminal: a live line where there is one, plain log lines where output is piped."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hpt_torch.record import Event
from hpt_torch.report.terminal import show_seconds, show_value
from hpt_torch.tuner import Tuner

_PLAIN_EVERY_SECONDS = 5.0


class ProgressObserver:
    """Trials done, the best so far with its hyperparameters, epochs a second, time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._epochs = 0
        self._began = self._told = 0.0

    def started(self, tuner: Tuner) -> None:
        self._began = self._told = time.monotonic()
        self._epochs = 0
        if len(tuner.record.of_kind("session")) > 1:
            self.say(f"continuing {tuner.dir.path}: {tuner.finished} trials were finished before")
        if not self.console.is_terminal:
            total = "as many as fit" if tuner.total is None else tuner.total
            self.say(
                f"{tuner.dir.path}: {total} trials of {tuner.recipe.trainer.epochs} epochs "
                f"on {tuner.trainer.device}"
            )
            return
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[best]}"),
            console=self.console,
            transient=True,
            expand=True,
        )
        self._live.start()
        self._live.add_task(
            "trials", total=tuner.total, completed=tuner.finished, rate="", best=_best(tuner, escaped=True)
        )

    def recorded(self, tuner: Tuner, events: Sequence[Event]) -> None:
        self._epochs += sum(event.kind == "report" for event in events)
        finished = [event.body["trial"] for event in events if event.kind == "finish"]
        for number in finished:
            trial = tuner.record.trials[number]
            if trial.reason:
                self.say(f"trial {number} {trial.state.value}: {trial.reason.strip().splitlines()[-1]}")
            if self._live is None and tuner.best is not None and tuner.best.number == number:
                self.say(f"trial {number}: {_best(tuner)}")
        if self._live is not None:
            self._live.update(
                self._live.task_ids[0],
                completed=tuner.finished,
                rate=self._rate(tuner),
                best=_best(tuner, escaped=True),
            )
        elif finished and time.monotonic() - self._told >= _PLAIN_EVERY_SECONDS:
            self._told = time.monotonic()
            self.say(f"{tuner.finished}/{tuner.total or '?'} trials, {self._rate(tuner)}, {_best(tuner)}")

    def ended(self, tuner: Tuner) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        (self._live.console if self._live is not None else self.console).print(
            escape(line), highlight=False, soft_wrap=True
        )

    def _rate(self, tuner: Tuner) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        text = f"{self._epochs / seconds:.0f} epochs/s"
        if tuner.total is not None and self._epochs:
            left = (tuner.total - tuner.finished) * tuner.recipe.trainer.epochs
            text += f", {show_seconds(left * seconds / self._epochs)} left"
        return text


def _best(tuner: Tuner, *, escaped: bool = False) -> str:
    if tuner.best is None:
        return "no result yet"
    score = tuner.objective.score(tuner.best)
    hparams = ", ".join(f"{name}={show_value(value)}" for name, value in tuner.best.hparams.items())
    text = f"best {tuner.objective.metric}={score:.4f} ({hparams})"
    return escape(text) if escaped else text
