"""The page's section about the choice: the folds of the best trial, and the best trials under new seeds."""

from __future__ import annotations

from html import escape

from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import number


def section(summary: Summary) -> str:
    """Two tables, each where there is something to show; "" where there is neither."""
    return _confirmation(summary) + _folds(summary)


def _confirmation(summary: Summary) -> str:
    found = summary.confirmation
    if found is None:
        return ""
    rows = []
    before = {trial.number: summary.objective.score(trial) for trial in summary.trials}
    for trial, scores in found.scores.items():
        mean = deviation = told = "–"
        if scores:
            mean, deviation = number(found.mean(trial)), number(found.deviation(trial))
            told = "chosen" if trial == found.winner else number(found.p_value(trial))
        rows.append(
            [f"trial {trial}", number(before[trial] or 0.0), mean, deviation, told, _listed(list(scores))]
        )
    heads = ["", "in the search", "mean over new seeds", "standard deviation", "p (paired t-test)", "scores"]
    return f'<p class="note">{found.verdict}</p>{_table(heads, rows)}'


def _folds(summary: Summary) -> str:
    best = summary.best
    if best is None or not best.folds:
        return ""
    metric = summary.objective.metric
    rows = [
        [str(i), number(summary.objective.score(fold) or 0.0), str(fold.kept_epoch)]
        for i, fold in enumerate(best.folds, start=1)
    ]
    error = summary.objective.standard_error(best)
    note = f"Trial {best.number} on its {len(rows)} folds"
    if error is not None:
        note += f": mean {number(summary.objective.score(best) or 0.0)}, standard error {number(error)}"
    return f'<p class="note">{note}.</p>{_table(["fold", metric, "kept epoch"], rows)}'


def _listed(scores: list[float]) -> str:
    return ", ".join(map(number, scores)) or "failed"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="best compared">{table}</table></div>'
