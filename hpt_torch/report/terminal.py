"""The report as text on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpt_torch.report.findings import failures
from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import number
from hpt_torch.space import thaw
from hpt_torch.types import SIZES, Objective, Trial

TOP = 10


def show_value(value: Any) -> str:
    """A hyperparameter or metric in few characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(thaw(value))


def show_score(objective: Objective, trial: Trial) -> str:
    """A trial's value of an objective; sizes as whole numbers."""
    score = objective.score(trial)
    if score is None:
        return "–"
    return f"{score:,.0f}" if objective.metric in SIZES else number(score)


def show_seconds(seconds: float) -> str:
    """12.3 s, 4 min 5 s, 2 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def render(summary: Summary, width: int = 100) -> RenderableType:
    """The answer first: the best trial and its figures, then the top ten, then what went wrong."""
    summary = summary.as_searched
    parts: list[RenderableType] = [*_answer(summary)]
    if summary.ranked:
        title = f"Top {len(summary.ranked[:TOP])} of {len(summary.ranked)} complete trials"
        parts.append(_table(summary, summary.ranked[:TOP], width, title))
    if summary.second is not None and summary.pareto:
        title = f"Pareto set of {summary.objective.metric} and {summary.second.metric}"
        parts.append(_table(summary, list(summary.pareto), width, title))
    if kinds := failures(summary):
        count = sum(len(kind.trials) for kind in kinds)
        first = min(kinds, key=lambda kind: kind.trials[0])
        text = f"{count} trial{'' if count == 1 else 's'} ended badly; the first, trial {first.trials[0]}: "
        parts.append(Text(text + first.line, style="yellow"))
    return Group(*parts)


def _answer(summary: Summary) -> list[Text]:
    states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(summary.states.items()))
    lines = [Text(f"{summary.name}: {states or 'no trials yet'} in {show_seconds(summary.seconds)}")]
    best = summary.best
    if best is None:
        lines.append(Text(summary.without_best, style="yellow"))
        return lines
    metric = summary.objective.metric
    score = summary.objective.score(best)
    lines.append(
        Text.assemble(
            ("Best: ", "bold"), f"trial {best.number} with {metric} = ", (f"{score:.4f}", "bold green")
        )
    )
    error = summary.objective.standard_error(best)
    if error is not None:
        scores = [summary.objective.score(fold) or 0.0 for fold in best.folds]
        spread = f"{min(scores):.4f} to {max(scores):.4f}"
        lines.append(Text(f"  mean of {len(scores)} folds, standard error {error:.4f}; {spread}"))
    if summary.confirmation is not None:
        lines.append(Text(f"  {summary.confirmation.verdict}"))
    searched = ", ".join(f"{name} = {show_value(value)}" for name, value in best.hparams.items())
    if searched:
        lines.append(Text(f"  {searched}"))
    train = best.metrics.get("train/" + metric.removeprefix("valid/"))
    if summary.gap is not None and train is not None:
        lines.append(Text(f"  train {train:.4f}, valid {score:.4f}: gap {summary.gap:+.4f}"))
    held = summary.holdout.get("holdout/" + metric.removeprefix("valid/"))
    if held is not None:
        reads = "once" if summary.holdout_reads == 1 else f"{summary.holdout_reads} times"
        bounds = summary.holdout_bounds
        within = f" (95 % interval {bounds[0]:.4f} to {bounds[1]:.4f})" if bounds is not None else ""
        rows = f"{summary.holdout_rows} rows that no decision saw"
        lines.append(Text(f"  hold-out {held:.4f}{within} on {rows}, read {reads}"))
    again = summary.holdout_refit.get("holdout/" + metric.removeprefix("valid/"))
    if again is not None:
        lines.append(Text(f"  trained again on train and valid rows: hold-out {again:.4f}"))
    return lines


def _table(summary: Summary, trials: list[Trial], width: int, title: str) -> Table:
    """A column a hyperparameter where they fit, else one column with all of them."""
    metric, names = summary.objective.metric, list(summary.space)
    cells = [[show_value(t.hparams[n]) if n in t.hparams else "–" for n in names] for t in trials]
    widths = [max(len(text) for text in column) for column in zip(names, *cells, strict=True)]
    second = [] if summary.second is None else [summary.second]
    heads = [metric, *(one.metric for one in second)]
    wide = sum(widths) + 3 * len(names) + sum(map(len, heads)) + 30 <= width
    table = Table(title=title, title_justify="left")
    for label in ("trial", *heads):
        table.add_column(label, justify="right")
    for label in names if wide else ["hyperparameters"]:
        table.add_column(label, justify="right" if wide else "left", overflow="fold")
    table.add_column("epochs", justify="right")
    table.add_column("seconds", justify="right")
    for trial, values in zip(trials, cells, strict=True):
        seconds = sum(report.seconds for report in trial.reports)
        score = summary.objective.score(trial)
        joined = [", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True))]
        table.add_row(
            str(trial.number),
            f"{score:.4f}",
            *(show_score(one, trial) for one in second),
            *(values if wide else joined),
            str(trial.epoch),
            f"{seconds:.2f}",
        )
    return table


def print_report(summary: Summary, console: Console | None = None) -> None:
    console = console or Console()
    console.print(render(summary, console.width), highlight=False, soft_wrap=False)
