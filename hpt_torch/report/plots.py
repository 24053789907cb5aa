"""The page's figures: each takes plain data and gives HTML with an SVG in it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from hpt_torch.record import Record
from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import Frame, Scale, linear, logarithmic, options, polyline, robust, seconds
from hpt_torch.space import Choice, Dimension, Int, encode, is_log
from hpt_torch.types import HParamValue, Trial, TrialState

RANK_CLASSES = 7  # colours from the worst (0) to the best
BOLD_CURVES = 3
_MOST_CURVES = 240  # what the eye and the file's size allow
_MOST_POINTS = 60  # of one curve
_FEW_VALUES = 12  # of a whole number: drawn like options
_LABEL = 14  # characters of an option


@dataclass
class View:
    """What the figures have in common: the score's scale and every trial's place among the others."""

    summary: Summary
    scores: dict[int, float] = field(init=False)  # of every trial that has one, also a running one's so far
    scale: Scale = field(init=False)
    cut: int = field(init=False)  # scores beyond the scale
    rank: dict[int, int] = field(init=False)  # complete trials: 0 is the best

    def __post_init__(self) -> None:
        objective = self.summary.objective
        dead = (TrialState.FAILED, TrialState.INFEASIBLE)  # their last score is not of anything kept
        found = {t.number: objective.score(t) for t in self.summary.trials if t.state not in dead}
        self.scores = {n: score for n, score in found.items() if score is not None}
        self.scale, self.cut = robust(list(self.scores.values()), objective.direction)
        self.rank = {t.number: place for place, t in enumerate(self.summary.ranked)}

    @property
    def better(self) -> str:
        return "higher is better" if self.summary.objective.direction == "maximize" else "lower is better"

    @property
    def rail(self) -> str:
        return "none" if len(self.scores) < len(self.begun) else ""

    def is_best(self, trial: Trial) -> bool:
        return self.summary.best is not None and trial.number == self.summary.best.number

    def style(self, trial: Trial) -> str:
        """The dot's classes: its state, and a ring around the best."""
        score = self.scores.get(trial.number)
        off = score is not None and not -1e-9 <= self.scale.at(score) <= 1 + 1e-9
        return f"s-{trial.state.value.lower()}{' off' if off else ''}{' best' if self.is_best(trial) else ''}"

    def by_rank(self, trial: Trial) -> str:
        """The colour class of a trial's rank; one of two others where it has none."""
        if trial.number not in self.rank:
            dead = trial.state in (TrialState.FAILED, TrialState.INFEASIBLE)
            return "q-none s-failed" if dead else "q-none"
        share = 1 - self.rank[trial.number] / max(1, len(self.rank) - 1)
        return f"q{min(RANK_CLASSES - 1, int(share * RANK_CLASSES))}"

    @property
    def begun(self) -> list[Trial]:
        return [t for t in self.summary.trials if t.state is not TrialState.WAITING]

    def worst_first(self) -> list[Trial]:
        """The order in which to draw, so that the best are on top."""
        return sorted(self.begun, key=lambda t: -self.rank.get(t.number, len(self.summary.trials)))


# -- dimensions as axes --------------------------------------------------------------------------------


def axis(name: str, dimension: Dimension) -> Scale:
    """The dimension's whole range, with a little room at its ends."""
    if isinstance(dimension, Choice):
        return options([option_label(option) for option in dimension.options])
    low, high = float(dimension.low), float(dimension.high)
    if is_log(name, dimension):
        room = (high / low) ** 0.03
        return logarithmic(low / room, high * room)
    room = _room(name, dimension) / 2 or (high - low) * 0.03
    return linear(low - room, high + room, count=4, whole=isinstance(dimension, Int))


def _room(name: str, dimension: Dimension) -> float:
    """The distance between values of a dimension with few of them; 0 where there are many."""
    if isinstance(dimension, Choice):
        return 1.0
    few = isinstance(dimension, Int) and 1 < dimension.count() <= _FEW_VALUES and not is_log(name, dimension)
    return float(dimension.step or 0) if few else 0.0


def placer(dimension: Dimension) -> Callable[[HParamValue | None], float | None]:
    """What turns a value into its axis' count; None where the trial does not have one."""
    if isinstance(dimension, Choice):
        known = {encode(option): float(i) for i, option in enumerate(dimension.options)}
        return lambda value: None if value is None else known.get(encode(value))
    return lambda value: float(value) if isinstance(value, (int, float)) else None


def option_label(value: HParamValue) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"


def breakable(name: str) -> str:
    """The escaped name, with places where a line may end."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _spread(trial: Trial, width: float) -> float:
    """A shift that keeps trials with the same option from hiding each other; the same on every page."""
    return width * ((trial.number * 0.618034) % 1 - 0.5)


# -- figures -------------------------------------------------------------------------------------------


def progress(view: View) -> str:
    """Every trial's score, and the best so far."""
    trials = view.begun
    last = max((t.number for t in trials), default=0)
    frame = Frame(linear(-0.02 * last - 0.5, last * 1.02 + 0.5, whole=True, count=6), view.scale, view.rail)
    steps: list[tuple[int, int]] = []
    best: float | None = None
    for trial in trials:
        score = view.scores.get(trial.number)
        if trial.state is not TrialState.COMPLETE or score is None:
            continue
        if best is None or view.summary.objective.better(score, best):
            if best is not None:
                steps.append((frame.px(trial.number), frame.py(best)))
            best = score
            steps.append((frame.px(trial.number), frame.py(best)))
    if best is not None:
        steps.append((frame.px(last), frame.py(best)))
    dots = (
        f'<a href="#t{t.number}" tabindex="-1">'
        f"{frame.dot(t.number, view.scores.get(t.number), view.style(t), t.number)}</a>"
        for t in trials
    )
    return frame.draw(
        polyline(steps, "so-far", None) + "".join(dots),
        label="The score of each trial, and the best so far",
        x_label="trial",
        y_label=f"{view.summary.objective.metric}, {view.better}",
        height=320,
    )


def curves(view: View, metric: str, direction: str) -> tuple[str, str]:
    """(figure, what it leaves out) of a metric over epochs: "accuracy" shows train/ and valid/accuracy."""
    valid = {t.number: _curve(t, f"valid/{metric}") for t in view.summary.trials}
    order = [t.number for t in view.summary.ranked]
    order += [t.number for t in view.summary.trials if t.number not in view.rank]
    bold, rest = order[:BOLD_CURVES], order[BOLD_CURVES:]
    rest = [n for n in rest if valid[n]]
    every = max(1, math.ceil(len(rest) / _MOST_CURVES))
    faint = rest[::every]
    train = {n: _curve(t, f"train/{metric}") for t in view.summary.trials if (n := t.number) in bold}
    shown = [*(valid[n] for n in (*bold, *faint)), *train.values()]
    values = [value for curve in shown for _, value in curve]
    if not values:
        return "", ""
    scale, cut = robust(values, direction)
    last = max(epoch for curve in shown for epoch, _ in curve)
    frame = Frame(linear(0, last * 1.01, whole=True), scale)

    def line(curve: Sequence[tuple[int, float]], style: str, trial: int) -> str:
        return polyline([(frame.px(e), frame.py(v, keep=False)) for e, v in curve], style, trial)

    marks = [line(valid[n], "faint", n) for n in reversed(faint)]
    for i, n in reversed(list(enumerate(bold))):
        marks += [line(train[n], f"b{i} train", n), line(valid[n], f"b{i}", n)]
    drawn = frame.draw(
        "".join(marks),
        label=f"{metric} over the epochs of each trial",
        x_label="epoch",
        y_label=f"{metric}, {'higher' if direction == 'maximize' else 'lower'} is better",
        height=280,
        style="clip",
    )
    notes = []
    if every > 1:
        notes.append(f"{len(faint)} of {len(rest)} faint curves are drawn, evenly by rank")
    if any(len(curve) >= _MOST_POINTS for curve in shown):
        notes.append(f"of long curves, {_MOST_POINTS} epochs")
    if cut:
        notes.append(f"{cut} of {len(values):,} points are beyond the axis")
    return drawn, "; ".join(notes)


def _curve(trial: Trial, metric: str) -> list[tuple[int, float]]:
    """(epoch, value) where it is finite; of many epochs some, the first and last among them."""
    points = [
        (report.epoch, value)
        for report in trial.reports
        if (value := report.metrics.get(metric)) is not None and math.isfinite(value)
    ]
    if len(points) <= _MOST_POINTS:
        return points
    picked = sorted({round(i * (len(points) - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)})
    return [points[i] for i in picked]


def slice_plot(view: View, name: str) -> str:
    """The score against one hyperparameter; where it has few values, also the median of each."""
    dimension = view.summary.space[name]
    frame = Frame(axis(name, dimension), view.scale, view.rail)
    marks, groups = [], dict[float, list[float]]()
    width, place = _room(name, dimension), placer(dimension)
    for trial in view.worst_first():
        x, score = place(trial.hparams.get(name)), view.scores.get(trial.number)
        if x is None:
            continue
        if width:
            if score is not None and trial.state is TrialState.COMPLETE:
                groups.setdefault(x, []).append(score)
            x += _spread(trial, 0.5 * width)
        marks.append(frame.dot(x, score, view.style(trial), trial.number))
    for x, scores in sorted(groups.items()):
        y = frame.py(statistics.median(scores))
        left, right = frame.px(x - 0.38 * width), frame.px(x + 0.38 * width)
        marks.append(f'<path class="median" d="M{left} {y}H{right}"/>')
    log = not isinstance(dimension, Choice) and is_log(name, dimension)
    return frame.draw(
        "".join(marks),
        label=f"score against {name}",
        x_label=f"{name}{' (log scale)' if log else ''}",
        y_label=view.summary.objective.metric,
        height=200,
        may_tilt=isinstance(dimension, Choice),
    )


def interaction(view: View, first: str, second: str) -> str:
    """Two hyperparameters at once; the colour is the score's rank."""
    space = view.summary.space
    frame = Frame(axis(first, space[first]), axis(second, space[second]))
    marks, places = [], {name: placer(space[name]) for name in (first, second)}
    for trial in view.worst_first():
        x, y = (place(trial.hparams.get(name)) for name, place in places.items())
        if x is not None and y is not None:
            style = f"{view.by_rank(trial)} big{' best' if view.is_best(trial) else ''}"
            marks.append(frame.dot(x, y, style, trial.number))
    return frame.draw(
        "".join(marks),
        label=f"score by {first} and {second}",
        x_label=first,
        y_label=second,
        height=340,
    )


def parallel(view: View) -> str:
    """One line a trial through all its hyperparameters to its score; the script lets axes be brushed."""
    space, metric = view.summary.space, view.summary.objective.metric
    scales = [*(axis(name, dimension) for name, dimension in space.items()), view.scale]
    names = [*space, metric]
    missing = any(name not in t.hparams for t in view.begun for name in space)
    rail = "none" if missing or view.rail else ""
    frames = [Frame(linear(0, len(scales) - 1), scale, rail) for scale in scales]
    placers = [placer(dimension) for dimension in space.values()]
    lines, lacking = [], set[int]()
    for trial in view.worst_first():
        places = [place(trial.hparams.get(name)) for name, place in zip(space, placers, strict=True)]
        places = [
            x + _spread(trial, 0.2) if x is not None and isinstance(dimension, Choice) else x
            for x, dimension in zip(places, space.values(), strict=True)
        ]
        places.append(view.scores.get(trial.number))
        lacking |= {i for i, value in enumerate(places) if value is None}
        points = [
            (round(1000 * i / max(1, len(scales) - 1)), frame.py(value))
            for i, (frame, value) in enumerate(zip(frames, places, strict=True))
        ]
        style = f"{view.by_rank(trial)}{' best' if view.is_best(trial) else ''}"
        lines.append(polyline(points, style, trial.number))
    axes = []
    for i, (name, frame) in enumerate(zip(names, frames, strict=True)):
        marks = [(frame.py(v) / 10, text) for v, text in frame.y.ticks]
        marks += [(frame.py(None) / 10, rail)] if i in lacking else []
        ticks = "".join(f'<span style="top:{at:g}%">{escape(text)}</span>' for at, text in marks)
        side = " end" if i == len(names) - 1 else ""
        axes.append(
            f'<div class="axis{side}" data-axis="{i}" style="left:{100 * i / max(1, len(names) - 1):g}%">'
            f"<b>{breakable(name)}</b>{ticks}</div>"
        )
    svg = (
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="Parallel coordinates">{"".join(lines)}</svg>'
    )
    faint = min(0.55, 5 / math.sqrt(max(1, len(lines))))
    return (
        f'<div class="scroll"><div class="parallel" style="--axes:{len(names)};--o:{faint:.2f}">'
        f'<div class="area">{svg}{"".join(axes)}</div></div></div>'
    )


# -- time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """When trials ran, in seconds of the run's sessions laid end to end: interruptions are cut out."""

    spans: dict[int, tuple[float, float]]
    sessions: list[float]  # where each began
    total: float


def times(record: Record) -> Times:
    """From each trial's first commit, less what that commit's reports took to train, to its last."""
    spans: dict[int, tuple[float, float]] = {}
    sessions: list[float] = []
    offset = last = before = 0.0
    pending: list[tuple[int, float]] = []  # (trial, seconds) of the reports of one commit

    def close(at: float) -> None:
        nonlocal before
        began = max(before, at - sum(took for _, took in pending))
        for trial, _ in pending:
            spans[trial] = (spans.get(trial, (began, at))[0], at)
        before = max(before, at)
        pending.clear()

    for event in record.events:
        now = offset + event.elapsed
        if event.kind == "session":
            close(last)
            offset = last if sessions else 0.0
            now = before = offset + event.elapsed
            sessions.append(now)
        elif now != last:
            close(last)
        if event.kind == "report":
            pending.append((event.body["trial"], event.body["seconds"]))
        last = now
    close(last)
    return Times(spans, sessions, last)


def timeline(view: View, when: Times) -> str:
    """A bar a trial, from its first epoch to its last report."""
    numbers = [t.number for t in view.summary.trials if t.number in when.spans]
    if not numbers:
        return ""
    height = min(420, max(120, 9 * len(numbers)))
    low, high = min(numbers), max(numbers)
    ticks = [(v, text) for v, text in linear(low, high, whole=True).ticks if low <= v <= high]
    frame = Frame(seconds(when.total * 1.01), Scale(high + 0.7, low - 0.7, ticks))
    states = {t.number: t.state.value.lower() for t in view.summary.trials}
    width = max(1.0, min(8.0, 0.7 * height / (high - low + 1)))
    bars = [
        f'<path class="bar s-{states[n]}" data-t="{n}" style="stroke-width:{width:.1f}px" '
        f'd="M{frame.px(when.spans[n][0])},{frame.py(n)} {frame.px(when.spans[n][1]) + 1},{frame.py(n)}"/>'
        for n in numbers
    ]
    breaks = "".join(f'<path class="break" d="M{frame.px(at)} 0V1000"/>' for at in when.sessions[1:])
    return frame.draw(
        "".join(bars) + breaks,
        label="When each trial ran",
        x_label="time of the run, interruptions cut out",
        y_label="trial",
        height=height,
    )
