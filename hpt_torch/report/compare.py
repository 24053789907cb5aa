"""Runs side by side: what their recipes differ in, what each reached, and how soon.

Plain tables, which a terminal, markdown and an HTML page show alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpt_torch import recipe as recipes
from hpt_torch.record import Record
from hpt_torch.report import plots
from hpt_torch.report.diagnosis import standard_error
from hpt_torch.report.summary import Summary, summarise
from hpt_torch.report.svg import number
from hpt_torch.report.terminal import show_seconds, show_value
from hpt_torch.space import thaw
from hpt_torch.types import RunError, TrialState

_MOST_ROWS = 8  # of "best so far"
_HIDDEN = ("run", "executor", "name")  # settings that change no result


@dataclass(frozen=True)
class Run:
    """One of the runs: a name among the others, what it found, and when each trial ended."""

    name: str
    summary: Summary
    recipe: Mapping[str, Any]
    data: str  # fingerprint of the tensors
    ended: Mapping[int, float]  # trial -> seconds of the run, interruptions cut out

    def so_far(self, when: Callable[[int], float]) -> list[tuple[float, float]]:
        """(when, the best score so far) at each trial that raised it; `when` is of a trial's number."""
        complete = [t for t in self.summary.trials if t.state is TrialState.COMPLETE]
        steps: list[tuple[float, float]] = []
        for trial in sorted(complete, key=lambda t: (when(t.number), t.number)):
            score = self.summary.objective.score(trial)
            if score is not None and (not steps or self.summary.objective.better(score, steps[-1][1])):
                steps.append((when(trial.number), score))
        return steps

    @property
    def by_trial(self) -> list[tuple[float, float]]:
        places = {trial.number: i for i, trial in enumerate(self.summary.trials, start=1)}
        return self.so_far(lambda n: float(places[n]))

    @property
    def by_time(self) -> list[tuple[float, float]]:
        return self.so_far(lambda n: self.ended.get(n, math.inf))


@dataclass(frozen=True)
class Table:
    """A title, and a row a property: its name, then a cell a run."""

    title: str
    rows: Sequence[tuple[str, Sequence[str]]]


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs at these paths. Raises RunError where one is none, or has not begun."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunError("name each run once; two of them are the same directory")
    names = [path.resolve().name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        with Record(path / "run.db", readonly=True) as record:
            summary, begun, times = summarise(record), record.of_kind("run")[0].body, plots.times(record)
        ended = {trial: end for trial, (_, end) in times.spans.items()}
        label = name if names.count(name) == 1 else str(path)
        runs.append(Run(label, summary, begun["recipe"], begun.get("data", ""), ended))
    return runs


def tables(runs: Sequence[Run]) -> list[Table]:
    """Those that have something to say."""
    made = [_reached(runs), _recipes(runs), _best_hparams(runs)]
    made.append(_so_far("Best score so far, by trials", [r.by_trial for r in runs], lambda n: f"{n:,.0f}"))
    made.append(_so_far("Best score so far, by wall-clock", [r.by_time for r in runs], show_seconds))
    return [table for table in made if table.rows]


# -- what may be concluded -----------------------------------------------------------------------------


def verdict(runs: Sequence[Run]) -> list[str]:
    """Which run is best, and whether that can be told; what stands against comparing them."""
    lines = []
    objective = runs[0].summary.objective
    if any(run.summary.objective != objective for run in runs):
        return ["The runs optimise different metrics, so their scores are not compared."]
    if len({run.data for run in runs}) > 1:
        lines.append(
            "Not all runs are scored on the same rows (other data, split or seed): compare with care."
        )
    scored = [
        (score, run)
        for run in runs
        if run.summary.best is not None and (score := objective.score(run.summary.best)) is not None
    ]
    if len(scored) < 2:
        return lines
    scored.sort(key=lambda pair: pair[0], reverse=objective.direction == "maximize")
    (top, best), (second, other) = scored[:2]
    lead = abs(top - second)
    if lead == 0:
        lines.append(f"{best.name} and {other.name} share the best {objective.metric}, {number(top)}.")
    else:
        text = f"{best.name} has the best {objective.metric}, {number(top)}: {number(lead)} better than "
        text += other.name
        assert best.summary.best is not None
        known = standard_error(best.summary, best.summary.best)
        if known is not None and lead < known[0]:
            text += f", which is less than one standard error of a score ({number(known[0])}, {known[1]})"
        lines.append(f"{text}.")
    lines += _held(runs, objective.metric.removeprefix("valid/"), objective.direction)
    return lines


def _held(runs: Sequence[Run], metric: str, direction: str) -> list[str]:
    """What the hold-out rows say, and whether the runs were chosen between with them."""
    held = [(value, r) for r in runs if (value := r.summary.holdout.get(f"holdout/{metric}")) is not None]
    if len(held) < 2:
        return []
    value, best = (max if direction == "maximize" else min)(held, key=lambda pair: pair[0])
    names = [run.name for other, run in held if other == value]
    if len(names) > 1:
        return [f"On hold-out rows {' and '.join(names)} share the best value, {number(value)}."]
    return [
        f"On hold-out rows {best.name} is best, with {number(value)}; to choose between runs by this figure "
        "is a choice, too, and flatters it."
    ]


# -- the tables ----------------------------------------------------------------------------------------


def _reached(runs: Sequence[Run]) -> Table:
    rows: list[tuple[str, list[str]]] = []

    def add(label: str, cell: Callable[[Run], str]) -> None:
        cells = [cell(run) for run in runs]
        if any(text not in ("", "–") for text in cells):
            rows.append((label, cells))

    for objective in dict.fromkeys(run.summary.objective for run in runs):
        metric = objective.metric.removeprefix("valid/")

        def value(run: Run, name: str, of: Any = objective) -> str:
            best = run.summary.best
            if best is None or run.summary.objective != of:
                return "–"
            found = run.summary.holdout.get(name) if name.startswith("holdout/") else best.metrics.get(name)
            return "–" if found is None else number(found)

        add(f"best {objective.metric}", lambda run, name=objective.metric: value(run, name))  # type: ignore[misc]
        add(f"its train/{metric}", lambda run, name=f"train/{metric}": value(run, name))  # type: ignore[misc]
        add(f"its hold-out {metric}", lambda run, name=f"holdout/{metric}": value(run, name))  # type: ignore[misc]
    add("best trial", lambda run: "–" if run.summary.best is None else str(run.summary.best.number))
    add("trials", _states)
    add("epochs trained", lambda run: f"{sum(t.epoch for t in run.summary.trials):,}")
    add("wall-clock", lambda run: show_seconds(run.summary.seconds))
    add("hold-out readings", lambda run: str(run.summary.holdout_reads or "–"))
    return Table("What each run reached", rows)


def _states(run: Run) -> str:
    counts = sorted(run.summary.states.items())
    return ", ".join(f"{count} {state.lower()}" for state, count in counts) or "none yet"


def _recipes(runs: Sequence[Run]) -> Table:
    """Every setting that is not the same in all of them, budgets too."""
    flat = [recipes.flatten(run.recipe) for run in runs]
    keys = [key for key in sorted({k for f in flat for k in f}) if key.split(".")[0] not in _HIDDEN]
    rows = [(key, [_setting(f.get(key)) for f in flat]) for key in keys]
    return Table("What the recipes differ in", [(key, cells) for key, cells in rows if len(set(cells)) > 1])


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):  # a dimension
        return ", ".join(f"{key} {json.dumps(item)}" for key, item in value.items()) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _best_hparams(runs: Sequence[Run]) -> Table:
    found = [{} if r.summary.best is None else r.summary.full_hparams(r.summary.best) for r in runs]
    names = list(dict.fromkeys(name for hparams in found for name in hparams))
    rows = [(n, [show_value(thaw(h[n])) if n in h else "–" for h in found]) for n in names]
    return Table("What their best trials differ in", [(n, cells) for n, cells in rows if len(set(cells)) > 1])


def _so_far(
    title: str, steps: Sequence[Sequence[tuple[float, float]]], label: Callable[[float], str]
) -> Table:
    """The best score at 1, 2, 5, 10, … up to where the last one rose; nothing after that changes."""
    ends = [when for each in steps for when, _ in each if math.isfinite(when)]
    if not ends:
        return Table(title, [])
    marks = _marks(min(ends), max(ends))
    rows = [
        (label(mark), [_at(each, mark) for each in steps])
        for mark in (marks if len(marks) <= _MOST_ROWS else marks[:: math.ceil(len(marks) / _MOST_ROWS)])
    ]
    return Table(title, rows)


def _marks(first: float, last: float) -> list[float]:
    powers = range(math.floor(math.log10(max(first, 1e-3))), math.ceil(math.log10(max(last, 1e-3))) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    beyond = next((mark for mark in found if mark >= last), last)
    return [mark for mark in found if first <= mark <= beyond] or [last]


def _at(steps: Sequence[tuple[float, float]], mark: float) -> str:
    before = [score for when, score in steps if when <= mark * (1 + 1e-9)]
    return number(before[-1]) if before else "–"
