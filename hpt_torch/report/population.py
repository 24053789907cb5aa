"""The page's sections about a population that a scheduler changed: lineage, schedules, baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from hpt_torch.record import Record
from hpt_torch.report.plots import View, axis, placer
from hpt_torch.report.schedule import best_schedule
from hpt_torch.report.summary import Summary, summarise
from hpt_torch.report.svg import Frame, Scale, linear, number, options, polyline, robust
from hpt_torch.report.terminal import show_seconds
from hpt_torch.schedulers.lineage import Stretch, phases
from hpt_torch.types import Trial

BASELINES = "baselines"  # the folder of a run in which its baselines are runs
_MOST_LABELS = 24  # of lanes
_NAMES = {"random": "random search", "exploit_only": "pbt without explore"}


def baselines(record: Record) -> dict[str, Summary]:
    """The runs that this one is compared with, by what they are; those that have begun."""
    found = {}
    for folder in sorted((record.path.parent / BASELINES).glob("*/run.db")):
        with Record(folder, readonly=True) as other:
            if other.last("run") is not None:
                name = folder.parent.name
                found[_NAMES.get(name, name)] = summarise(other)
    return found


def was_changed(summary: Summary) -> bool:
    """Whether a scheduler changed a trial on its way."""
    return any(trial.phases for trial in summary.trials)


# -- what it is compared with --------------------------------------------------------------------------


def comparison(summary: Summary, others: Mapping[str, Summary]) -> str:
    """A table of the run and its baselines, and the best score of each by epoch; "" without baselines."""
    if not others:
        return ""
    runs = {"pbt": summary, **others}
    metric = summary.objective.metric.removeprefix("valid/")
    rows = []
    for i, (name, run) in enumerate(runs.items()):
        score = None if run.best is None else run.objective.score(run.best)
        held = run.holdout.get(f"holdout/{metric}")
        epochs = sum(trial.epoch for trial in run.trials)
        cells = ("–" if value is None else number(value) for value in (score, held))
        values = [*cells, f"{epochs:,}", show_seconds(run.seconds)]
        key = f'<th scope="row"><span class="key line b{i}">{escape(name)}</span></th>'
        rows.append(f"<tr>{key}{''.join(f'<td>{value}</td>' for value in values)}</tr>")
    heads = ("", f"best {summary.objective.metric}", f"hold-out {metric}", "epochs trained", "wall-clock")
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    figure = _best_by_epoch(runs)
    return f'<div class="scroll"><table class="best compared">{table}</table></div>{figure}'


def _best_by_epoch(runs: Mapping[str, Summary]) -> str:
    """The best member's score after each epoch, one line a run."""
    first = next(iter(runs.values()))
    objective = first.objective
    choose = max if objective.direction == "maximize" else min
    curves = {}
    for name, run in runs.items():
        scores: dict[int, list[float]] = {}
        for trial in run.trials:
            for report in trial.reports:
                value = report.metrics.get(objective.metric)
                if value is not None and math.isfinite(value):
                    scores.setdefault(report.epoch, []).append(value)
        curves[name] = [(epoch, choose(values)) for epoch, values in sorted(scores.items())]
    values = [value for curve in curves.values() for _, value in curve]
    if not values:
        return ""
    frame = Frame(_epochs(max(epoch for curve in curves.values() for epoch, _ in curve)),
                  robust(values, objective.direction)[0])  # fmt: skip
    marks = [
        polyline([(frame.px(e), frame.py(v, keep=False)) for e, v in curve], f"b{i}", None)
        for i, curve in reversed(list(enumerate(curves.values())))
    ]
    better = "higher is better" if objective.direction == "maximize" else "lower is better"
    return frame.draw(
        "".join(marks),
        label="The best member's score after each epoch, of the run and of its baselines",
        x_label="epoch",
        y_label=f"{objective.metric} of the best member, {better}",
        style="clip",
    )


# -- who copied whom, and what that changed ------------------------------------------------------------


def lineage(view: View) -> str:
    """A lane for each member, a line down or up for each copy, bold the way to the best weights."""
    summary = view.summary
    lanes = {trial.number: lane for lane, trial in enumerate(summary.trials)}
    every = math.ceil(len(lanes) / _MOST_LABELS)
    scale = options([str(n) for n in lanes])
    ticks = [tick for i, tick in enumerate(scale.ticks) if i % every == 0]
    frame = Frame(_epochs(_last(summary)), Scale(scale.high, scale.low, ticks))
    marks = []
    for trial in view.worst_first():
        lane = lanes[trial.number]
        ends = [(frame.px(0), frame.py(lane)), (frame.px(trial.epoch), frame.py(lane))]
        marks.append(polyline(ends, view.by_rank(trial), trial.number))
    for trial in view.begun:
        for phase in phases(trial)[1:]:
            if phase.source is not None and phase.source != trial.number:
                x = frame.px(phase.epoch)
                copy = [(x, frame.py(lanes[phase.source])), (x, frame.py(lanes[trial.number]))]
                marks.append(polyline(copy, "faint", trial.number))
                marks.append(frame.dot(phase.epoch, lanes[trial.number], view.by_rank(trial), trial.number))
    if summary.best is not None:
        way = []
        for stretch in best_schedule(summary):
            y = frame.py(lanes[stretch.trial])
            way += [(frame.px(stretch.after), y), (frame.px(stretch.until), y)]
        marks.append(polyline(way, "b0", summary.best.number))
    return frame.draw(
        "".join(marks),
        label="Which member copied which, and the lineage of the best weights",
        x_label="epoch",
        y_label="member",
        height=60 + 16 * min(len(lanes), 40),
    )


def schedules(view: View) -> list[str]:
    """For each hyperparameter, its value over the epochs: every member faint, the best weights' bold."""
    return [_schedule(view, name) for name in view.summary.space]


def _schedule(view: View, name: str) -> str:
    summary, dimension = view.summary, view.summary.space[name]
    frame, place = Frame(_epochs(_last(summary)), axis(name, dimension)), placer(dimension)

    def steps(stretches: list[Stretch], style: str, trial: int) -> str:
        points = []
        for stretch in stretches:
            value = place(stretch.hparams.get(name))
            if value is not None:
                points += [(frame.px(e), frame.py(value)) for e in (stretch.after, stretch.until)]
        return polyline(points, style, trial)

    marks = [steps(_own(trial), "faint", trial.number) for trial in view.begun]
    if summary.best is not None:
        marks.append(steps(best_schedule(summary), "b0", summary.best.number))
    about = f"{name} of each member over the epochs"
    return frame.draw("".join(marks), label=about, x_label="epoch", y_label=name, height=190)


def _own(trial: Trial) -> list[Stretch]:
    """What the member itself was trained with, whomever it copied."""
    parts = phases(trial)
    ends = [*(phase.epoch for phase in parts[1:]), trial.epoch]
    return [
        Stretch(trial=trial.number, after=phase.epoch, until=end, hparams=phase.hparams)
        for phase, end in zip(parts, ends, strict=True)
        if end > phase.epoch
    ]


def _last(summary: Summary) -> int:
    return max((trial.epoch for trial in summary.trials), default=1)


def _epochs(last: int) -> Scale:
    return linear(0, last * 1.01, whole=True)
