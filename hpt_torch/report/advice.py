"""The findings of a run as HTML, on a terminal and as markdown: the most important first, and few."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpt_torch.report.findings import Finding, Importance
from hpt_torch.report.markdown import plain
from hpt_torch.types import printable

SHOWN = 6  # on a terminal and in markdown; the page and --json have them all
LABELS = {
    "seed_noise": "Noise", "selection": "Selection", "divergence": "Divergence", "infeasible": "Infeasible",
    "edge": "Edge of the space", "overfitting": "Overfitting", "underfitting": "Underfitting",
    "still_improving": "Too short", "saturated": "Longer than needed", "confounded": "Confounded",
    "interaction": "Interaction", "importance": "Importance",
}  # fmt: skip


def as_html(found: Sequence[Finding]) -> str:
    """A list with a label each; what the check is called in the playbook is the label's title."""
    items = "".join(
        f'<li><b title="{escape(finding.check)}">{LABELS[finding.kind]}</b> {escape(finding.text)}</li>'
        for finding in found
    )
    return f'<ul class="findings">{items}</ul>' if found else ""


def shares(importance: Importance) -> str:
    """A bar a hyperparameter for PED-ANOVA's share, and fANOVA's as a number."""
    note = importance.note
    if importance.whole:
        note += " In brackets fANOVA: its part in all differences, between bad trials too."
    bars = "".join(
        f'<div class="share"><span>{escape(name)}</span><div><i style="--share:{100 * share:.1f}%"></i>'
        f"<b>{100 * share:.0f} %{_bracket(importance.whole.get(name))}</b></div></div>"
        for name, share in importance.best.items()
    )
    return f'<p class="note">{escape(note)}</p>{f"<div class=shares>{bars}</div>" if bars else ""}'


def _bracket(share: float | None) -> str:
    return "" if share is None else f" ({100 * share:.0f} %)"


def as_text(found: Sequence[Finding]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in found[:SHOWN]:
        style = "" if finding.kind in ("interaction", "importance") else "yellow"
        table.add_row(Text(f"  {LABELS[finding.kind]}", style=style), Text(printable(finding.text, 2000)))
    more = [Text(f"  and {len(found) - SHOWN} more in report.html")] if len(found) > SHOWN else []
    return Group(Text("What to look at", style="bold"), table, *more)


def print_findings(found: Sequence[Finding], console: Console | None = None) -> None:
    if found:
        (console or Console()).print(as_text(found), highlight=False)


def as_markdown(found: Sequence[Finding]) -> str:
    lines = [f"- **{LABELS[finding.kind]}**: {plain(finding.text)}" for finding in found[:SHOWN]]
    return "\n".join(["", "**What to look at**", "", *lines]) + "\n" if found else ""
