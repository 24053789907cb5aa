"""The comparison of runs on a terminal, as markdown and as an HTML page with overlaid curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from hpt_torch.report.compare import Run, Table, tables, verdict
from hpt_torch.report.markdown import plain
from hpt_torch.report.shell import document
from hpt_torch.report.svg import Frame, Scale, linear, polyline, robust, seconds
from hpt_torch.types import printable

COLOURS = 6  # of lines; then they repeat


def print_comparison(runs: Sequence[Run], console: Console | None = None) -> None:
    console = console or Console()
    for line in verdict(runs):
        console.print(Text(printable(line)))
    for table in tables(runs):
        shown = RichTable(title=table.title, title_justify="left", title_style="bold")
        shown.add_column("", overflow="fold")
        for run in runs:
            shown.add_column(Text(printable(run.name)), overflow="fold")
        for label, cells in table.rows:
            shown.add_row(Text(printable(label)), *(Text(printable(cell)) for cell in cells))
        console.print()
        console.print(shown, highlight=False)


def markdown(runs: Sequence[Run]) -> str:
    lines = [f"### {plain(' / '.join(run.name for run in runs))}", ""]
    lines += [f"- {plain(line)}" for line in verdict(runs)]
    for table in tables(runs):
        lines += ["", f"**{table.title}**", "", _row(["", *(plain(run.name) for run in runs)])]
        lines.append(_row(["---", *("--:" for _ in runs)]))
        lines += [_row([plain(label), *map(plain, cells)]) for label, cells in table.rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# -- HTML ----------------------------------------------------------------------------------------------


def html(runs: Sequence[Run]) -> str:
    """One page without a script; every text of the runs is escaped."""
    first, *rest = tables(runs)
    lines = "".join(f"<p>{escape(line)}</p>" for line in verdict(runs))
    sections = [f"{lines}{_table(runs, first)}", _curves(runs)]
    sections += [_table(runs, table) for table in rest]
    title = " / ".join(run.name for run in runs)
    body = "".join(f"<section>{section}</section>" for section in sections if section)
    return document(title=title, body=f"<header><h1>{escape(title)}</h1></header>\n<main>\n{body}\n</main>")


def _table(runs: Sequence[Run], table: Table) -> str:
    heads = "".join(
        f'<th scope="col"><span class="key line b{i % COLOURS}">{escape(run.name)}</span></th>'
        for i, run in enumerate(runs)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for label, cells in table.rows
    )
    head = f"<thead><tr><th></th>{heads}</tr></thead>"
    body = f'<table class="pairs sides">{head}<tbody>{rows}</tbody></table>'
    return f'<h2>{escape(table.title)}</h2><div class="scroll">{body}</div>'


def _curves(runs: Sequence[Run]) -> str:
    """The best score so far by trials and by wall-clock, a line a run."""
    if len({run.summary.objective for run in runs}) > 1:
        return ""
    last = max(len(run.summary.trials) for run in runs)
    ended = [at for run in runs for at in run.ended.values()]
    figures = [
        _figure(runs, [run.by_trial for run in runs], [float(len(r.summary.trials)) for r in runs],
                lambda: linear(0, max(last, 1) * 1.01, whole=True), "trials"),
        _figure(runs, [run.by_time for run in runs], [max(run.ended.values(), default=0.0) for run in runs],
                lambda: seconds(max(ended, default=1.0) * 1.01), "wall-clock, interruptions cut out"),
    ]  # fmt: skip
    keys = "".join(
        f'<span class="key line b{i % COLOURS}">{escape(run.name)}</span>' for i, run in enumerate(runs)
    )
    drawn = "".join(f"<figure>{figure}</figure>" for figure in figures if figure)
    legend = f'<h2>Best score so far</h2><p class="legend">{keys}</p>'
    return f'{legend}<div class="grid two">{drawn}</div>' if drawn else ""


def _figure(
    runs: Sequence[Run],
    steps: Sequence[Sequence[tuple[float, float]]],
    ends: Sequence[float],
    x: Callable[[], Scale],
    label: str,
) -> str:
    objective = runs[0].summary.objective
    scores = [score for each in steps for _, score in each]
    if not scores:
        return ""
    frame = Frame(x(), robust(scores, objective.direction)[0])
    marks = []
    for i, (each, end) in reversed(list(enumerate(zip(steps, ends, strict=True)))):
        points: list[tuple[int, int]] = []
        for when, score in each:
            if points:
                points.append((frame.px(when), points[-1][1]))
            points.append((frame.px(when), frame.py(score, keep=False)))
        if points:
            points.append((frame.px(end), points[-1][1]))
        marks.append(polyline(points, f"b{i % COLOURS}", None))
    better = "higher is better" if objective.direction == "maximize" else "lower is better"
    return frame.draw(
        "".join(marks),
        label=f"The best score of each run over its {label}",
        x_label=label,
        y_label=f"best {objective.metric} so far, {better}",
        style="clip",
    )
