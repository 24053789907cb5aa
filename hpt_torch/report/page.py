"""`report.html`: a run as one page that needs no network, no server and, but for hovering, no script."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import tomli_w

from hpt_torch.record import Record
from hpt_torch.report import advice, choice, findings, pareto, plots, population
from hpt_torch.report.diagnosis import of_run
from hpt_torch.report.plots import View
from hpt_torch.report.shell import document
from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import number
from hpt_torch.report.table import trial_table
from hpt_torch.report.terminal import show_seconds, show_value
from hpt_torch.space import Choice, is_log
from hpt_torch.types import Trial, TrialState

_MANY = 300  # trials: from here on dots are smaller and fainter
_MOST_FAILURES = 40  # kinds of them with their traceback
_MOST_TEXT = 6000  # characters of a traceback: its end tells most
_FOLDER = Path(__file__).parent


def page(record: Record, summary: Summary) -> str:
    """The whole page. Equal records give equal pages; every text of the run is escaped."""
    summary = summary.as_searched
    view = View(summary)
    importance = findings.importance(summary)
    shares = importance.best
    found = of_run(record.path.parent, summary)
    sections = [
        ("answer", "", _answer(view)),
        ("findings", "What to look at", advice.as_html(found)),
        ("choice", "The choice", choice.section(summary)),
        ("pareto", "Two objectives", pareto.section(view)),
        ("compared", "At equal compute", _compared(record, summary)),
        ("progress", "Progress", _progress(view)),
        ("curves", "Learning curves", _curves(view)),
        ("population", "Lineage and schedules", _population(view)),
        ("parallel", "All hyperparameters at once", _parallel(view)),
        ("slices", "One hyperparameter at a time", _slices(view, shares)),
        ("importance", "Importance", advice.shares(importance)),
        ("interaction", "Two hyperparameters together", _interaction(view, shares)),
        ("timeline", "Timeline", _timeline(view, record)),
        ("trials", "Trials", trial_table(view)),
        ("failures", "Failed and infeasible trials", _failures(summary)),
        ("origin", "Environment and recipe", _origin(record, summary)),
    ]
    sections = [section for section in sections if section[2]]
    body = "".join(
        f'<section id="{key}">{f"<h2>{title}</h2>" if title else ""}{content}</section>'
        for key, title, content in sections
    )
    links = "".join(f'<a href="#{key}">{_SHORT[key]}</a>' for key, _, _ in sections)
    many = ' class="many"' if len(summary.trials) > _MANY else ""
    return document(
        title=summary.name,
        body=f"<header>{_header(record, summary)}</header>\n"
        f'<nav aria-label="Sections">{links}</nav>\n<main{many}>\n{body}\n</main>',
        script=(_FOLDER / "page.js").read_text(encoding="utf-8"),
    )


_SHORT = {
    "choice": "Choice",
    "pareto": "Pareto",
    "answer": "Answer", "findings": "Findings", "compared": "Compared", "progress": "Progress",
    "curves": "Curves", "population": "Lineage", "parallel": "Parallel",
    "slices": "Slices", "importance": "Importance", "interaction": "Pairs", "timeline": "Timeline",
    "trials": "Trials", "failures": "Failures", "origin": "Recipe",
}  # fmt: skip


def _header(record: Record, summary: Summary) -> str:
    done = findings.is_finished(summary)
    planned = "" if summary.planned is None else f" of {summary.planned:,}"
    at = record.events[-1].at if record.events else 0.0
    when = datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    state = "finished" if done else "not finished"
    objective, many = summary.objective, "" if (summary.planned or len(summary.trials)) == 1 else "s"
    also = f", {summary.second.direction} {escape(summary.second.metric)}" if summary.second else ""
    return (
        f'<h1>{escape(summary.name)} <span class="pill {"done" if done else "open"}">{state}</span></h1>'
        f"<p>{objective.direction} {escape(objective.metric)}{also} · "
        f"{len(summary.trials):,}{planned} trial{many} · as recorded by {when}</p>"
    )


# -- the answer ----------------------------------------------------------------------------------------


def _answer(view: View) -> str:
    summary, best = view.summary, view.summary.best
    metric = summary.objective.metric.removeprefix("valid/")
    cards = []
    if best is None:
        cards.append(_card(f"Best {metric}", "–", escape(summary.without_best)))
    else:
        train = best.metrics.get(f"train/{metric}")
        parts = [f"{_link(best.number)}, {best.epoch} epochs"]
        if best.kept_epoch and best.kept_epoch != best.epoch:
            parts[0] += f", weights of epoch {best.kept_epoch}"
        if train is not None and summary.gap is not None:
            sign = "+" if summary.gap >= 0 else ""
            parts.append(f"train {number(train)}, gap {sign}{number(summary.gap)}")
        first = findings.defaults_trial(summary)
        if first is not None and first is not best:
            parts.append(f"declared defaults ({_link(first.number)}): {_score(view, first)}")
        cards.append(_card(f"Best {summary.objective.metric}", _score(view, best), "<br>".join(parts)))
    cards.append(_card(f"Hold-out {metric}", *_holdout(summary, metric)))
    cards.append(_card("Trials", f"{len(summary.trials):,}", _legend(view)))
    training = sum(report.seconds for trial in summary.trials for report in trial.reports)
    epochs = sum(trial.epoch for trial in summary.trials)
    sessions = "one session" if summary.sessions == 1 else f"{summary.sessions} sessions"
    cards.append(
        _card(
            "Cost",
            show_seconds(summary.seconds),
            f"wall-clock, {sessions}<br>of it training: {show_seconds(training)} for {epochs:,} epochs"
            if summary.sessions
            else "nothing was run yet",
        )
    )
    return f'<div class="cards">{"".join(cards)}</div>{_best_hparams(summary)}'


def _card(title: str, value: str, about: str) -> str:
    """`about` is HTML."""
    head = f'<h3>{escape(title)}</h3><p class="value">{escape(value)}</p>'
    return f'<div class="card">{head}<p>{about}</p></div>'


def _holdout(summary: Summary, metric: str) -> tuple[str, str]:
    reads = "read once" if summary.holdout_reads == 1 else f"read {summary.holdout_reads} times"
    value = summary.holdout.get(f"holdout/{metric}")
    if value is None:
        if summary.holdout:
            return "–", f"{summary.holdout_rows:,} rows, {reads}; they have no {escape(metric)}."
        if summary.holdout_reads:
            return "–", f"{reads}, for an earlier best trial: it says nothing about this one."
        if findings.is_finished(summary):
            return "–", "No hold-out rows were read. The valid score chose the best trial, so it flatters it."
        return "–", "It is read once, when the search has ended."
    text = f"{summary.holdout_rows:,} rows that no decision saw, {reads}, after the search."
    if (bounds := summary.holdout_bounds) is not None:
        text += f"<br>95 % interval {number(bounds[0])} to {number(bounds[1])}"
    others = {name.removeprefix("holdout/"): v for name, v in summary.holdout.items()}
    shown = [f"{escape(name)} {number(v)}" for name, v in others.items() if name != metric]
    text += f"<br>{', '.join(shown[:4])}" if shown else ""
    if summary.holdout_reads > 1:
        text += "<br>Every further reading makes this figure a little less honest."
    return number(value), text


def _best_hparams(summary: Summary) -> str:
    best = summary.best
    if best is None:
        return ""
    rows = []
    for name, dimension in summary.space.items():
        if name not in best.hparams:
            rows.append((name, "–", "not used by this trial"))
            continue
        if isinstance(dimension, Choice):
            about = "one of " + ", ".join(show_value(option) for option in dimension.options)
        else:
            kind = " (log scale)" if is_log(name, dimension) else ""
            about = f"{dimension.low:g} to {dimension.high:g}{kind}"
            edge = findings.at_edge(summary, name)
            about += f"; at its {edge}" if edge else ""
        rows.append((name, show_value(best.hparams[name]), about))
    searched = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_cut(value, 48))}</td>'
        f"<td>{escape(_cut(about, 300))}</td></tr>"
        for name, value, about in rows
    )
    head = "<thead><tr><th>hyperparameter</th><th>best value</th><th>searched</th></tr></thead>"
    table = f'<div class="scroll"><table class="best">{head}<tbody>{searched}</tbody></table></div>'
    fixed = _pairs({name: show_value(value) for name, value in summary.fixed.items()})
    hidden = f"<details><summary>Fixed hyperparameters ({len(summary.fixed)})</summary>{fixed}</details>"
    return (table if rows else "") + (hidden if summary.fixed else "")


# -- the figures' sections -----------------------------------------------------------------------------


def _progress(view: View) -> str:
    if not view.begun:
        return _note("No trial has begun yet.")
    notes = ["Each dot is a trial, the line is the best so far, the ring is the best."]
    if view.rail:
        notes.append("Trials without a score are at the bottom.")
    if view.cut:
        scores = "score is" if view.cut == 1 else "scores are"
        notes.append(f"{view.cut} {scores} beyond the axis and drawn small at its edge.")
    return f"{_note(' '.join(notes))}<p class=legend>{_legend(view)}</p>{plots.progress(view)}"


def _curves(view: View) -> str:
    objective = view.summary.objective
    metric = objective.metric.removeprefix("valid/")
    figures, notes = [], []
    for name, direction in {metric: objective.direction, "loss": "minimize"}.items():
        figure, note = plots.curves(view, name, direction)
        figures.append(f"<figure>{figure}</figure>" if figure else "")
        notes += [f"{name}: {note}."] if note else []
    if not any(figures):
        return _note("No trial has reported a finite value yet.")
    bold = [t.number for t in view.summary.ranked[: plots.BOLD_CURVES]]
    keys = "".join(f'<span class="key line b{i}">{_link(n)}</span>' for i, n in enumerate(bold))
    keys += '<span class="key line train">dashed: train</span>'
    keys += '<span class="key line faint">other trials</span>'
    key = f'<p class="legend">{keys}</p>'
    return f'{_note(" ".join(notes))}{key}<div class="grid two">{"".join(figures)}</div>'


def _compared(record: Record, summary: Summary) -> str:
    others = population.baselines(record)
    if not others:
        return ""
    note = (
        "As many members, trained as long: random search keeps what each began with; pbt without explore "
        "copies weights and never changes a hyperparameter."
    )
    return f"{_note(note)}{population.comparison(summary, others)}"


def _population(view: View) -> str:
    if not population.was_changed(view.summary):
        return ""
    note = (
        "A lane is a member, coloured by its final rank; where one copied another, a line joins them. Bold: "
        "how the best weights came about, and the schedule that trained them."
    )
    figures = "".join(f"<figure>{figure}</figure>" for figure in population.schedules(view))
    return f'{_note(note)}{_ranks(view)}{population.lineage(view)}<div class="grid">{figures}</div>'


def _parallel(view: View) -> str:
    if not view.summary.space or len(view.begun) < 2:
        return ""
    note = "A line is a trial. Drag along an axis to keep the trials that pass there; click it to let go."
    return f'{_note(note)}{_ranks(view)}<p class="brushed" aria-live="polite"></p>{plots.parallel(view)}'


def _slices(view: View, shares: Mapping[str, float]) -> str:
    if not view.summary.space or not view.begun:
        return ""
    names = sorted(view.summary.space, key=lambda name: -shares.get(name, 0.0))
    figures = "".join(f"<figure>{plots.slice_plot(view, name)}</figure>" for name in names)
    order = "The most important first. " if shares else ""
    return f'{_note(order + "A bar is the median at that value.")}<div class="grid">{figures}</div>'


def _interaction(view: View, shares: dict[str, float]) -> str:
    names = findings.most_important_numbers(view.summary, shares)
    if len(names) < 2 or not view.begun:
        return ""
    which = "The two most important numeric hyperparameters." if shares else "The first two numeric ones."
    return f"{_note(which)}{_ranks(view)}{plots.interaction(view, *names)}"


def _timeline(view: View, record: Record) -> str:
    when = plots.times(record)
    figure = plots.timeline(view, when)
    if not figure:
        return ""
    note = "When each trial ran. Bars side by side were trained together or by turns."
    if len(when.sessions) > 1:
        note += f" Dashed lines: the run was stopped and continued ({len(when.sessions) - 1} ×)."
    return f"{_note(note)}{figure}"


def _failures(summary: Summary) -> str:
    found = findings.failures(summary)
    parts = []
    for failure in found[:_MOST_FAILURES]:
        count = len(failure.trials)
        links = ", ".join(f'<a href="#t{n}">{n}</a>' for n in failure.trials[:20])
        more = f" and {count - 20} more" if count > 20 else ""
        whole = failure.reason if len(failure.reason) <= _MOST_TEXT else f"…{failure.reason[-_MOST_TEXT:]}"
        whose = f"The first of them, trial {failure.trials[0]}:" if count > 1 else ""
        parts.append(
            f'<details class="failure"><summary><span class="key s-{failure.state.lower()}">'
            f"{failure.state.lower()} {count} ×</span> <code>{escape(_cut(failure.line, 300))}</code>"
            f"</summary><p>Trial{'s' if count > 1 else ''} {links}{more}. {whose}</p>"
            f"<pre>{escape(whole)}</pre></details>"
        )
    left = len(found) - _MOST_FAILURES
    return "".join(parts) + (_note(f"{left} further kinds of failure are in trials.csv.") if left > 0 else "")


def _origin(record: Record, summary: Summary) -> str:
    where = {name: value for name, value in summary.environment.items() if name not in ("budget", "pid")}
    packages = where.pop("packages", {})
    rows = {**where, **packages} if isinstance(packages, Mapping) else where
    begun = record.last("run")
    recipe = tomli_w.dumps(begun.body["recipe"]) if begun is not None else ""
    return (
        f"<details><summary>Environment of the last session</summary>"
        f"{_pairs({name: str(value) for name, value in rows.items()})}</details>"
        f"<details><summary>Recipe</summary><pre>{escape(recipe)}</pre></details>"
    )


# -- small pieces --------------------------------------------------------------------------------------


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _link(trial: int) -> str:
    return f'<a href="#t{trial}">trial {trial}</a>'


def _score(view: View, trial: Trial) -> str:
    score = view.summary.objective.score(trial)
    return "–" if score is None else number(score)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


_ORDER = (
    TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.INFEASIBLE, TrialState.RUNNING,
    TrialState.PAUSED, TrialState.WAITING,
)  # fmt: skip


def _legend(view: View) -> str:
    states = view.summary.states
    return "".join(
        f'<span class="key s-{state.value.lower()}">{states[state.value]:,} {state.value.lower()}</span>'
        for state in _ORDER
        if state.value in states
    )


def _ranks(view: View) -> str:
    """The colours of the ranks, with the scores that they begin and end at."""
    ranked, styles = view.summary.ranked, {view.by_rank(trial) for trial in view.begun}
    if len(ranked) < 2:
        return ""
    steps = "".join(f'<i class="q{i}"></i>' for i in range(plots.RANK_CLASSES))
    ends = [_score(view, ranked[-1]), _score(view, ranked[len(ranked) // 2]), _score(view, ranked[0])]
    return (
        f'<p class="ranks"><span>worst {ends[0]}</span><span class="ramp">{steps}</span>'
        f"<span>best {ends[2]}</span><span>colour by rank, median {ends[1]}</span>"
        + ('<span class="key q-none">not complete</span>' if "q-none" in styles else "")
        + ('<span class="key q-none s-failed">failed</span>' if "q-none s-failed" in styles else "")
        + "</p>"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_cut(str(value), 500))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="pairs"><tbody>{rows}</tbody></table></div>'
