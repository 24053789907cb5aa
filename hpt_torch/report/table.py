"""The page's table of all trials: a row each, which the dots of the figures lead to."""

from __future__ import annotations

from html import escape

from hpt_torch.report.findings import last_line
from hpt_torch.report.plots import View
from hpt_torch.report.svg import number
from hpt_torch.report.terminal import show_value
from hpt_torch.types import Trial

_MOST = 60  # characters of a cell; the rest is its title


def trial_table(view: View) -> str:
    """Every trial in any state; the script sorts it by a click on a column's head."""
    summary = view.summary
    if not summary.trials:
        return ""
    metric = summary.objective.metric
    train = "train/" + metric.removeprefix("valid/")
    has_train = any(train in trial.metrics for trial in summary.trials)
    names = list(summary.space)
    metrics = [metric, *([train] if has_train else [])]
    if summary.second is not None and summary.second.metric not in (*summary.sizes, train):
        metrics.append(summary.second.metric)
    labels = ["trial", "state", *metrics, *names, *summary.sizes, "epochs", "seconds"]
    head = "".join(f'<th scope="col"><button type="button">{escape(label)}</button></th>' for label in labels)
    rows = "".join(_row(view, trial, names, metrics) for trial in summary.trials)
    return (
        '<p class="note">Click a column’s head to sort; again to turn it round.</p>'
        f'<div class="scroll tall"><table class="trials"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(view: View, trial: Trial, names: list[str], metrics: list[str]) -> str:
    state = trial.state.value.lower()
    cells = [f'<td class="key s-{state}"{_title(last_line(trial.reason))}>{state}</td>']
    for metric in metrics:
        value = trial.metrics.get(metric)
        # the whole number too: what is shown may tie where the values do not
        cells.append("<td>–</td>" if value is None else f'<td data-v="{value!r}">{number(value)}</td>')
    for name in names:
        text = show_value(trial.hparams[name]) if name in trial.hparams else "–"
        if len(text) > _MOST:
            cells.append(f"<td{_title(text)}>{escape(text[: _MOST - 1])}…</td>")
        else:
            cells.append(f"<td>{escape(text)}</td>")
    for name in view.summary.sizes:
        size = getattr(trial, name)
        cells.append("<td>–</td>" if size is None else f'<td data-v="{size}">{size:,}</td>')
    seconds = sum(report.seconds for report in trial.reports)
    best = ' class="best"' if view.is_best(trial) else ""
    return (
        f'<tr id="t{trial.number}"{best}><th scope="row">{trial.number}</th>{"".join(cells)}'
        f"<td>{trial.epoch}</td><td>{seconds:.2f}</td></tr>"
    )


def _title(text: str) -> str:
    return f' title="{escape(text[:300])}"' if text else ""
