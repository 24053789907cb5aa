"""The live view of a run in a terminal: what `Standing` has counted, drawn by rich four times a second.

rich redraws from a thread of its own. That thread only reads numbers which the run's own thread has counted:
it touches neither torch nor the record's database.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpt_torch.observers.memory import tree_memory
from hpt_torch.record import Event
from hpt_torch.report.terminal import show_seconds, show_value
from hpt_torch.tuner import Tuner
from hpt_torch.types import HParams, Objective, TrialState, printable

_WINDOW_SECONDS = 30.0  # over which the speed is measured
_MEMORY_EVERY_SECONDS = 5.0  # the kernel takes about 10 ms a process to add it up
_FRAMED, _ROOMY = 70, 56  # columns from which the view has a frame; a column of labels
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_STYLES = {
    TrialState.COMPLETE: "green",
    TrialState.RUNNING: "cyan",
    TrialState.WAITING: "dim",
    TrialState.PRUNED: "yellow",
    TrialState.PAUSED: "yellow",
    TrialState.INFEASIBLE: "magenta",
    TrialState.FAILED: "red",
}


@dataclass
class Standing:
    """Where a run stands: a fold of its events, so that a continued run begins with what was there."""

    objective: Objective
    epochs: int  # of a trial, in all its folds
    folds: int = 0
    states: Counter[TrialState] = field(default_factory=Counter)
    trained: int = 0  # epochs of all trials
    round: int = -1
    generation: int = 0
    boundary: int = 0  # the epoch of the last decision of a scheduler or a pruner
    curve: list[tuple[int, float]] = field(default_factory=list)  # (epochs trained, best of a finished trial)
    reported: list[tuple[int, float]] = field(default_factory=list)  # the same of any trial's report
    leading: dict[int, float] = field(default_factory=dict)  # the scores of trials that have not ended
    _state: dict[int, TrialState] = field(default_factory=dict)
    _begun: dict[int, int] = field(default_factory=dict)  # epochs of trials that have not ended
    _scores: dict[int, tuple[int, float, float]] = field(default_factory=dict)  # (epoch, its score, best)

    @property
    def finished(self) -> int:
        return sum(count for state, count in list(self.states.items()) if state.is_finished)

    @property
    def begun(self) -> int:
        """Epochs of trials that have not ended."""
        return sum(list(self._begun.values()))

    def note(self, events: Sequence[Event]) -> None:
        for event in events:
            body = event.body
            match event.kind:
                case "trial":
                    self._enter(body["trial"], TrialState.WAITING)
                    self.round = max(self.round, body["round"])
                case "report":
                    if not self.folds:
                        self._train(body["trial"])
                    self._score(body["trial"], body["epoch"], body["metrics"].get(self.objective.metric))
                case "fold_report":
                    self._train(body["trial"])
                case "finish":
                    self._finish(body["trial"], TrialState(body["state"]), body["kept_epoch"])
                case "pause":
                    for number in body["trials"]:
                        self._enter(number, TrialState.PAUSED)
                case "promotion":
                    for number, epoch in body["trials"]:
                        self._enter(number, TrialState.RUNNING)
                        self._begun[number] = epoch * max(1, self.folds)
                case "generation":
                    self.generation, self.boundary = body["generation"], body["epoch"]
                case "pruning":
                    self.boundary = body["epoch"]

    def _enter(self, number: int, state: TrialState) -> None:
        if number in self._state:
            self.states[self._state[number]] -= 1
        self._state[number] = state
        self.states[state] += 1

    def _train(self, number: int) -> None:
        self._enter(number, TrialState.RUNNING)
        self._begun[number] = self._begun.get(number, 0) + 1
        self.trained += 1

    def _score(self, number: int, epoch: int, score: float | None) -> None:
        if score is None or not math.isfinite(score):
            return
        best = self._scores[number][2] if number in self._scores else score
        self._scores[number] = epoch, score, score if self.objective.better(score, best) else best
        self.leading[number] = score
        self._extend(self.reported, score)

    def _finish(self, number: int, state: TrialState, kept_epoch: int) -> None:
        self._enter(number, state)
        self._begun.pop(number, None)
        self.leading.pop(number, None)
        if state is TrialState.COMPLETE and number in self._scores:
            epoch, last, best = self._scores[number]  # a trial keeps its last epoch or its best one
            self._extend(self.curve, last if kept_epoch == epoch else best)

    def _extend(self, curve: list[tuple[int, float]], score: float) -> None:
        if not curve or self.objective.better(score, curve[-1][1]):
            curve.append((self.trained, score))


class LiveView:
    """Draws a run. A rich renderable: it fits itself to the width and the time at which it is drawn."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner
        epochs = tuner.recipe.trainer.epochs * max(1, tuner.folds)
        self.standing = Standing(tuner.objective, epochs, tuner.folds)
        self.standing.note(tuner.record.events)
        self._used_before = tuner.record.seconds_used()
        self._samples: deque[tuple[float, int, int]] = deque()  # (clock, epochs trained, trials finished)
        self._memory: tuple[float, int | None] = (-math.inf, None)
        self._sample(time.monotonic())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = time.monotonic()
        self._sample(now)
        if now - self._memory[0] >= _MEMORY_EVERY_SECONDS:
            self._memory = now, tree_memory()
        width, low = options.max_width, console.size.height < 12
        framed = width >= _FRAMED and not low
        inner = width - 4 if framed else width
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        if inner >= _ROOMY:
            grid.add_column(style="bold", no_wrap=True)
        grid.add_column(ratio=1)
        for label, content in self._rows(inner, ascii_only=options.ascii_only, short=low):
            grid.add_row(*([label] if inner >= _ROOMY else []), content)
        if not framed:
            yield grid
            return
        name, path = printable(self.tuner.recipe.name), printable(str(self.tuner.dir.path))
        title = Text.assemble((f" {name} ", "bold"), no_wrap=True, overflow="ellipsis")
        below = Text(f" {path} ", style="dim", no_wrap=True, overflow="ellipsis")
        yield Panel(
            grid, title=title, title_align="left", subtitle=below, subtitle_align="right", border_style="dim"
        )

    # -- rows ------------------------------------------------------------------------------------------

    def _rows(self, width: int, *, ascii_only: bool, short: bool) -> list[tuple[str, RenderableType]]:
        rows: list[tuple[str, RenderableType]] = [("trials", self._bar(width)), ("", self._states())]
        rows.append(("best", self._best(width, ascii_only)))
        if not short:
            rows.append(("", self._hparams()))
        rows += [("speed", self._speed()), ("time", self._time())]
        if self._memory[1] is not None and not short:
            rows.append(("memory", Text(f"{_bytes(self._memory[1])}{'' if width >= _ROOMY else ' memory'}")))
        return rows

    def _bar(self, width: int) -> RenderableType:
        done, total = self.standing.finished, self.tuner.total
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        count = Text(f"{done}" if total is None else f"{done} of {total}", style="bold")
        stage = self._stage()
        if stage and width >= _ROOMY:
            count.append(f" · {stage}", style="not bold")
        # A trial counts with the share of its epochs that it has: a population ends all at once.
        share = done + self.standing.begun / self.standing.epochs
        bar = ProgressBar(total=total, completed=share, pulse=total is None)
        grid.add_row(bar, count)
        return grid

    def _stage(self) -> str:
        standing, tuner = self.standing, self.tuner
        if tuner.scheduler is not None:
            epochs = tuner.recipe.trainer.epochs
            return f"generation {standing.generation}, epoch {standing.boundary} of {epochs}"
        if standing.round < 0:
            return ""
        text = f"round {standing.round + 1}"
        if tuner.total is not None:
            text += f" of {math.ceil(tuner.total / tuner.round_size)}"
        return text if tuner.pruner is None else f"{text}, last rung at epoch {standing.boundary}"

    def _states(self) -> Text:
        text = Text()
        for state, style in _STYLES.items():
            if count := self.standing.states[state]:
                text.append(" · " if text else "", style="dim")
                text.append(f"{count} {state.value.lower()}", style=style)
        return text

    def _leader(self) -> tuple[int, float, bool] | None:
        """(trial, score, whether it has ended) of the best; while none has ended, of the one that leads."""
        tuner = self.tuner
        best = tuner.best
        if best is not None and (score := tuner.objective.score(best)) is not None:
            return best.number, score, True
        found: tuple[int, float] | None = None
        for number, score in list(self.standing.leading.items()):
            if found is None or tuner.objective.better(score, found[1]):
                found = number, score
        return None if found is None else (*found, False)

    def _best(self, width: int, ascii_only: bool) -> Text:
        leader = self._leader()
        if leader is None:
            return Text("no result yet", style="dim")
        number, score, ended = leader
        text = Text.assemble(
            (show_value(score), "bold green"), f" {self.tuner.objective.metric}, trial {number}"
        )
        if not ended:
            text.append(" so far", style="dim")
        curve = self.standing.curve if ended else self.standing.reported
        room = min(40, width - text.cell_len - 12)
        line = sparkline(curve, self.standing.trained, room, _ASCII_BARS if ascii_only else _BARS)
        return text.append(f"  {line}", style="green") if line else text

    def _hparams(self) -> Text:
        leader = self._leader()
        hparams: HParams = {} if leader is None else self.tuner.record.trials[leader[0]].hparams
        text = Text(overflow="fold")
        for name, value in hparams.items():
            text.append("  " if text else "")
            shown = printable(show_value(value), 60).replace(", ", ",")  # no line break inside
            text.append(f"{printable(name, 60)}=", style="dim").append(shown)
        return text

    def _speed(self) -> Text:
        epochs, trials = self._rates()
        return Text(f"{_rate(epochs)} epochs/s · {_rate(trials * 60)} trials/min")

    def _time(self) -> Text:
        text = Text(show_seconds(round(self.tuner.record.elapsed())).replace(".0 s", " s"))
        left, most = self._left()
        if left is not None:
            about = "at most" if most else "about"
            text.append(f" · {about} {show_seconds(round(left)).replace('.0 s', ' s')} left")
        return text

    # -- speed -----------------------------------------------------------------------------------------

    def _sample(self, now: float) -> None:
        self._samples.append((now, self.standing.trained, self.standing.finished))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()

    def _rates(self) -> tuple[float, float]:
        """Epochs and trials a second, lately."""
        (began, epochs, trials), (now, more, others) = self._samples[0], self._samples[-1]
        seconds = max(now - began, 1e-9)
        return (more - epochs) / seconds, (others - trials) / seconds

    def _left(self) -> tuple[float | None, bool]:
        """(seconds until the end, whether trials may end earlier than that); None where nobody knows."""
        tuner, standing = self.tuner, self.standing
        limits = []
        if tuner.total is not None and (rate := self._rates()[0]) > 0:
            epochs = (tuner.total - standing.finished) * standing.epochs - standing.begun
            limits.append(max(0.0, epochs / rate))
        if tuner.recipe.search.timeout is not None:
            used = self._used_before + tuner.record.elapsed()
            limits.append(max(0.0, tuner.recipe.search.timeout - used))
        most = tuner.pruner is not None or tuner.recipe.trainer.patience is not None
        return (min(limits) if limits else None), most


def sparkline(curve: Sequence[tuple[int, float]], end: int, width: int, bars: str = _BARS) -> str:
    """Steps (x, value) from the first x to `end` in one line of characters; "" where nothing changed."""
    if len(curve) < 2 or width < 4:
        return ""
    first, low, high = curve[0][0], *sorted((curve[0][1], curve[-1][1]))
    text, at = "", 0
    for column in range(width):
        x = first + (end - first) * column / (width - 1)
        while at + 1 < len(curve) and curve[at + 1][0] <= x:
            at += 1
        text += bars[min(len(bars) - 1, int((curve[at][1] - low) / (high - low) * len(bars)))]
    return text


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
