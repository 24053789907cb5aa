"""The page's section about two objectives: every trial's place in both, and the Pareto set."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hpt_torch.report.plots import View
from hpt_torch.report.svg import Frame, Scale, linear, logarithmic, polyline, robust
from hpt_torch.report.terminal import show_score, show_value
from hpt_torch.types import SIZES, Objective, Trial


def section(view: View) -> str:
    """A plot and a table; "" where there is one objective."""
    summary, second = view.summary, view.summary.second
    if second is None:
        return ""
    if not summary.pareto:
        return '<p class="note">No trial is complete yet.</p>'
    figure, cut = _plot(view, second)
    note = (
        f"No other trial is at least as good as one of these {len(summary.pareto)} in both objectives and "
        f"better in one. What is best, with the ring, is decided by {summary.objective.metric} alone."
    )
    note += f" {cut} trials are beyond the axes and drawn small at their edges." if cut else ""
    keys = (
        '<p class="legend"><span class="key s-complete">Pareto set</span>'
        '<span class="key s-waiting">other complete trials</span></p>'
    )
    return f'<p class="note">{escape(note)}</p>{keys}{figure}{_table(view, second)}'


def _plot(view: View, second: Objective) -> tuple[str, int]:
    """The first objective against the second, the line being what the set reaches; and how many trials are
    beyond the axes."""
    first, front = view.summary.objective, view.summary.pareto
    trials = [trial for trial in view.summary.ranked if second.score(trial) is not None]
    frame = Frame(_scale(second, trials, front), _scale(first, trials, front))
    dots, cut = {True: "", False: ""}, 0  # by whether it is in the set, which is drawn above the others
    for trial in reversed(trials):
        x, y = second.score(trial) or 0.0, first.score(trial) or 0.0
        within = 0 <= frame.x.at(x) <= 1 and 0 <= frame.y.at(y) <= 1
        cut += not within
        style = "s-complete big" if trial in front else "s-waiting" if within else "s-waiting off"
        style += " best" if view.is_best(trial) else ""
        dot = frame.dot(x, y, style, trial.number)
        dots[trial in front] += f'<a href="#t{trial.number}" tabindex="-1">{dot}</a>'
    better = "higher" if second.direction == "maximize" else "lower"
    figure = frame.draw(
        polyline(_steps(frame, front, first, second), "so-far", None) + dots[False] + dots[True],
        label=f"{first.metric} against {second.metric}, and the Pareto set",
        x_label=f"{second.metric}, {better} is better",
        y_label=f"{first.metric}, {view.better}",
        height=320,
    )
    return figure, cut


def _scale(objective: Objective, trials: Sequence[Trial], front: Sequence[Trial]) -> Scale:
    """Of the whole set, and of the others but for values of a metric that are far worse."""
    values = [objective.score(trial) or 0.0 for trial in trials]
    if objective.metric not in SIZES:
        usual, _ = robust(values, objective.direction)
        values = [value for value in values if 0 <= usual.at(value) <= 1]
        values += [objective.score(trial) or 0.0 for trial in front]
    low, high = min(values), max(values)
    if low > 0 and high > 10 * low:
        room = (high / low) ** 0.04
        return logarithmic(low / room, high * room)
    room = (high - low) * 0.05
    return linear(low - room, high + room)


def _steps(
    frame: Frame, front: Sequence[Trial], first: Objective, second: Objective
) -> list[tuple[int, int]]:
    """The edge of what some trial of the set is at least as good as, in both: a staircase."""
    points: list[tuple[int, int]] = []
    for trial in front:  # from the best in `first` to the best in `second`
        x, y = frame.px(second.score(trial) or 0.0), frame.py(first.score(trial))
        if points and points[-1] != (x, y):
            points.append((points[-1][0], y))
        points.append((x, y))
    return points


def _table(view: View, second: Objective) -> str:
    summary = view.summary
    names = list(summary.space)
    heads = ["trial", summary.objective.metric, second.metric, *names]
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    rows = []
    for trial in summary.pareto:
        values = [show_score(summary.objective, trial), show_score(second, trial)]
        values += [show_value(trial.hparams[n]) if n in trial.hparams else "–" for n in names]
        cells = "".join(f"<td>{escape(text)}</td>" for text in values)
        rows.append(f'<tr><th scope="row"><a href="#t{trial.number}">{trial.number}</a></th>{cells}</tr>')
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="best compared">{table}</table></div>'
