"""The report as a few lines of markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from hpt_torch.report import findings
from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import number
from hpt_torch.report.terminal import show_score, show_seconds, show_value
from hpt_torch.types import Trial, printable

TOP = 5
_JOINER = "\u2060"  # has no width; after @ and # it keeps GitHub from making a mention or a link of them
_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>|~!&$"} | {"@": f"@{_JOINER}", "#": f"#{_JOINER}"})


def markdown(summary: Summary) -> str:
    """The answer, the best few trials, and what failed. Texts of the run are escaped."""
    summary = summary.as_searched
    metric = summary.objective.metric.removeprefix("valid/")
    states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(summary.states.items()))
    done = "" if findings.is_finished(summary) else " (not finished)"
    lines = [
        f"### {plain(summary.name)}{done}",
        "",
        f"{states or 'no trials yet'} in {show_seconds(summary.seconds)}.",
        "",
    ]
    best = summary.best
    if best is None:
        return "\n".join([*lines, summary.without_best, *_failed(summary)]) + "\n"
    answer = [f"**Best: trial {best.number}**, {plain(summary.objective.metric)} = {_score(summary, best)}"]
    held = summary.holdout.get(f"holdout/{metric}")
    if held is not None:
        reads = "once" if summary.holdout_reads == 1 else f"{summary.holdout_reads} times"
        rows = f"{summary.holdout_rows:,} rows that no decision saw"
        bounds = summary.holdout_bounds
        within = f" ({number(bounds[0])} to {number(bounds[1])})" if bounds is not None else ""
        answer.append(f"**hold-out {number(held)}**{within} on {rows}, read {reads}")
    first = findings.defaults_trial(summary)
    if first is not None and first is not best:
        answer.append(f"declared defaults {_score(summary, first)}")
    lines.append(f"{'; '.join(answer)}.")
    lines += _table(summary, summary.ranked[:TOP])
    if summary.second is not None:
        both = f"{plain(summary.objective.metric)} and {plain(summary.second.metric)}"
        lines += ["", f"Pareto set of {both}:", *_table(summary, summary.pareto)]
    return "\n".join([*lines, *_failed(summary)]) + "\n"


def _table(summary: Summary, trials: Sequence[Trial]) -> list[str]:
    objectives = [summary.objective, *([] if summary.second is None else [summary.second])]
    heads = [plain(name) for name in (*(one.metric for one in objectives), *summary.space)]
    lines = ["", _row(["trial", *heads, "epochs", "seconds"]), _row(["--:"] * (3 + len(heads)))]
    for trial in trials:
        values = [plain(show_value(trial.hparams[n])) if n in trial.hparams else "–" for n in summary.space]
        seconds = sum(report.seconds for report in trial.reports)
        scores = [show_score(one, trial) for one in objectives]
        lines.append(_row([str(trial.number), *scores, *values, str(trial.epoch), f"{seconds:.2f}"]))
    return lines


def _failed(summary: Summary) -> list[str]:
    found = findings.failures(summary)
    lines = [
        f"- {len(failure.trials)} {failure.state.lower()}: {plain(failure.line[:200])}"
        for failure in found[:TOP]
    ]
    more = [f"- and {len(found) - TOP} other kinds"] if len(found) > TOP else []
    return ["", *lines, *more] if lines else []


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _score(summary: Summary, trial: Trial) -> str:
    score = summary.objective.score(trial)
    return "–" if score is None else number(score)


def plain(text: str) -> str:
    """On one line, with nothing in it that markdown, HTML or a terminal would read, and without mentions."""
    return printable(" ".join(text.split()), 5000).translate(_SPECIAL)
