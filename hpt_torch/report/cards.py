"""What a notebook shows for `Trial` and `Result`: small HTML without a script, for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import number
from hpt_torch.report.terminal import show_seconds, show_value
from hpt_torch.types import Trial, TrialState

_TOP = 5
_COLOURS = {TrialState.COMPLETE: "#2f9e44", TrialState.FAILED: "#e03131", TrialState.INFEASIBLE: "#ae3ec9"}
_OTHER = "#e8890c"
_WIDTH, _HEIGHT = 220, 44  # of a sparkline, in pixels


def trial_card(trial: Trial) -> str:
    """Number and state, hyperparameters, the metrics that belong to its weights, its curves."""
    colour = _COLOURS.get(trial.state, _OTHER)
    head = (
        f'<div style="margin-bottom:.4em"><b>Trial {trial.number}</b> '
        f'<span style="color:{colour};font-weight:600">{trial.state.value.lower()}</span> '
        f'<span style="opacity:.65">{_about(trial)}</span></div>'
    )
    reason = trial.reason.strip().splitlines()
    why = f'<div style="color:{colour}">{escape(reason[-1])}</div>' if reason else ""
    hparams = _pairs("hyperparameters", {name: show_value(v) for name, v in trial.hparams.items()})
    metrics = _pairs("metrics", {name: number(value) for name, value in trial.metrics.items()})
    return _box(f'{head}{why}<div style="display:flex;flex-wrap:wrap;gap:1.5em">{hparams}{metrics}</div>')


def result_card(summary: Summary, path: Path) -> str:
    """The answer first: the best score, what the hold-out rows say, then the best five."""
    summary = summary.as_searched
    states = ", ".join(f"{count} {state.lower()}" for state, count in summary.states.items()) or "no trials"
    below = f"{states} in {show_seconds(summary.seconds)} · {path}"
    parts = [f'<div style="opacity:.65">{escape(below)}</div>']
    best, metric = summary.best, summary.objective.metric
    if best is None:
        return _box(f"<b>{escape(summary.name)}</b>: no trial is complete yet{''.join(parts)}")
    score = summary.objective.score(best)
    held = summary.holdout.get("holdout/" + metric.removeprefix("valid/"))
    figures = [(metric, "–" if score is None else number(score))]
    if held is not None:
        bounds = summary.holdout_bounds
        within = f" ({number(bounds[0])} to {number(bounds[1])})" if bounds is not None else ""
        figures.append((f"hold-out{within}, {summary.holdout_rows} rows", number(held)))
    if summary.gap is not None:
        figures.append(("gap to train", f"{summary.gap:+.4f}"))
    cells = "".join(
        f'<div><div style="font-size:1.5em;font-weight:600">{escape(value)}</div>'
        f'<div style="opacity:.65">{escape(label)}</div></div>'
        for label, value in figures
    )
    row = f'<div style="display:flex;flex-wrap:wrap;gap:2em;margin:.5em 0">{cells}</div>'
    line = _sparkline(summary)
    return _box(f"<b>{escape(summary.name)}</b>{parts[0]}{row}{line}{_table(summary)}")


def _table(summary: Summary) -> str:
    """The best trials, a column a hyperparameter."""
    names = list(summary.space)
    rows = []
    for trial in summary.ranked[:_TOP]:
        score = summary.objective.score(trial)
        values = [show_value(trial.hparams[n]) if n in trial.hparams else "–" for n in names]
        rows.append([str(trial.number), "–" if score is None else number(score), *values])
    return _grid(["trial", summary.objective.metric, *names], rows)


def _sparkline(summary: Summary) -> str:
    """The best score so far, trial by trial."""
    best: list[float] = []
    for trial in summary.trials:
        score = summary.objective.score(trial)
        if trial.state is not TrialState.COMPLETE or score is None:
            continue
        keep = best and not summary.objective.better(score, best[-1])
        best.append(best[-1] if keep else score)
    if len(set(best)) < 2:
        return ""
    low, high = min(best), max(best)
    points = " ".join(
        f"{2 + i * (_WIDTH - 4) / (len(best) - 1):.1f},"
        f"{2 + (_HEIGHT - 4) * (1 - (value - low) / (high - low)):.1f}"
        for i, value in enumerate(best)
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="best so far">'
        f'<polyline points="{points}" fill="none" stroke="#1971c2" stroke-width="2"/></svg>'
        '<div style="opacity:.65;margin-bottom:.5em">best so far, by trial</div>'
    )


def _about(trial: Trial) -> str:
    seconds = math.fsum(report.seconds for report in trial.reports)
    kept = f", weights of epoch {trial.kept_epoch}" if trial.kept_epoch not in (0, trial.epoch) else ""
    return f"{trial.epoch} epochs in {show_seconds(seconds)}{kept}"


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    rows = [[name, value] for name, value in values.items()]
    return _grid([title, ""], rows) if rows else ""


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cell = "padding:.15em .8em .15em 0;text-align:left;white-space:nowrap"
    head = "".join(f'<th style="{cell};opacity:.65;font-weight:400">{escape(text)}</th>' for text in heads)
    lines = ("".join(f'<td style="{cell}">{escape(text)}</td>' for text in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div style="overflow-x:auto"><table style="border:0"><tr>{head}</tr>{body}</table></div>'


def _box(inner: str) -> str:
    style = "border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:.7em 1em;max-width:60em"
    return f'<div style="{style};font-family:system-ui,sans-serif;font-size:.9em">{inner}</div>'
