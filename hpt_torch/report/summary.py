"""What a run has found, as plain data: the base of every view of it, and of the Python API."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hpt_torch.record import Record
from hpt_torch.report.confirmation import Confirmation, chosen, confirmation_of
from hpt_torch.report.front import front
from hpt_torch.space import Space, parse_dimension, thaw
from hpt_torch.steered import steered
from hpt_torch.types import SIZES, HParams, Objective, RunError, Trial, TrialState, changed

T = TypeVar("T")
SHARES = ("accuracy", "top5")  # metrics that count rows: their error is known


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run at one moment. `finished` is false while it is running or can be continued."""

    name: str
    objective: Objective
    space: Space
    fixed: HParams
    trials: list[Trial]
    best: Trial | None
    confirmation: Confirmation | None  # the best trials trained again with other seeds; `best` is its winner
    holdout: Mapping[str, float]
    holdout_interval: Mapping[str, tuple[float, float]]  # 95 %, of each of these by bootstrap
    holdout_refit: Mapping[str, float]  # of the best trial trained again on train and valid rows, beside it
    holdout_rows: int
    holdout_reads: int
    seconds: float  # wall-clock of all sessions
    sessions: int
    planned: int | None  # trials the recipe asks for; None: until the time is used up
    environment: Mapping[str, Any]
    timed_out: bool = False  # search.timeout is used up
    second: Objective | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed of this summary at the first call and kept."""
        if key not in self._kept:
            self._kept[key] = compute()
        found: T = self._kept[key]
        return found

    @property
    def pareto(self) -> tuple[Trial, ...]:
        """The trials that no other one beats in both objectives, best in the first one first; none where
        there is one objective."""
        return () if self.second is None else front(self.trials, self.objective, self.second)

    @property
    def without_best(self) -> str:
        """What to say where there is no best trial."""
        why = ": search.timeout is used up. Go on with a larger one, e.g. search.timeout=2h" * self.timed_out
        return f"No trial is complete yet{why}."

    @property
    def holdout_bounds(self) -> tuple[float, float] | None:
        """95 % interval of the objective's hold-out figure."""
        return self.all_holdout_bounds.get(f"holdout/{self.objective.metric.removeprefix('valid/')}")

    @property
    def all_holdout_bounds(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of the hold-out figures: Wilson's for a share of rows, which holds near 0 and 1 as
        well, else the bootstrap's, where one is recorded."""
        found = {}
        for name, value in self.holdout.items():
            low, high = self.holdout_interval.get(name, (None, None))
            if name.removeprefix("holdout/") in SHARES and 0 <= value <= 1 and self.holdout_rows:
                low, high = wilson(value, self.holdout_rows)
            if low is not None and high is not None:
                found[name] = (low, high)
        return found

    @property
    def as_searched(self) -> Summary:
        """The run with the values that were proposed, where a schedule known beforehand has changed a trial's
        on the way: those lie in the space, and tell trials apart."""
        if not any(trial.phases for trial in self.trials):
            return self
        return self.once("as searched", lambda: _as_searched(self))

    @functools.cached_property
    def ranked(self) -> list[Trial]:
        """Completed trials, best first."""
        return self.objective.ranked([t for t in self.trials if t.state is TrialState.COMPLETE])

    @functools.cached_property
    def sizes(self) -> list[str]:
        """Those of `types.SIZES` that are recorded of a trial."""
        return [name for name in SIZES if any(getattr(trial, name) is not None for trial in self.trials)]

    @property
    def states(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for trial in self.trials:
            counts[trial.state.value] = counts.get(trial.state.value, 0) + 1
        return counts

    @property
    def gap(self) -> float | None:
        """Train minus valid of the objective's metric at the best trial: positive = better on train."""
        if self.best is None or not self.objective.metric.startswith("valid/"):
            return None
        train = self.best.metrics.get("train/" + self.objective.metric.removeprefix("valid/"))
        valid = self.objective.score(self.best)
        if train is None or valid is None:
            return None
        return train - valid if self.objective.direction == "maximize" else valid - train

    def full_hparams(self, trial: Trial) -> dict[str, Any]:
        return {**self.fixed, **trial.hparams}


def _as_searched(summary: Summary) -> Summary:
    trials = [_proposed(trial) for trial in summary.trials]
    best = next((t for t in trials if summary.best is not None and t.number == summary.best.number), None)
    return dataclasses.replace(summary, trials=trials, best=best)


def _proposed(trial: Trial) -> Trial:
    """A trial that copied nobody has its first values again."""
    if not trial.phases or any(phase.source not in (None, trial.number) for phase in trial.phases):
        return trial
    return changed(trial, hparams=trial.phases[0].hparams)


def wilson(share: float, rows: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was counted on `rows` rows."""
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(record: Record) -> Summary:
    """Raises RunError where the run has not recorded its recipe yet."""
    begun = record.last("run")
    if begun is None:
        raise RunError(f"{record.path.parent} has not begun: run it first")
    recipe = begun.body["recipe"]
    objective = Objective(**begun.body["objective"])
    sessions, readings = record.of_kind("session"), record.of_kind("holdout")
    best = chosen(record, objective)
    reading: Mapping[str, Any] = readings[-1].body if readings else {"metrics": {}, "rows": 0, "trial": -1}
    current = best is not None and reading["trial"] == best.number
    return Summary(
        name=recipe["name"],
        objective=objective,
        space={name: parse_dimension(raw) for name, raw in recipe["space"].items()},
        fixed=recipe["hparams"],
        trials=record.in_order(),
        best=best,
        confirmation=confirmation_of(record, objective),
        holdout=reading["metrics"] if current else {},
        holdout_interval=reading.get("interval", {}) if current else {},
        holdout_refit=reading.get("refit", {}) if current else {},
        holdout_rows=reading["rows"],
        holdout_reads=len(readings),
        seconds=record.seconds_used(),
        sessions=len(sessions),
        planned=_planned(record),
        environment=sessions[-1].body if sessions else {},
        timed_out=_timed_out(record),
        second=Objective(**begun.body["second"]) if "second" in begun.body else None,
    )


def _planned(record: Record) -> int | None:
    session, asked = record.last("session"), steered(record)
    trials: int | None = session.body["budget"]["trials"] if session is not None else None
    return None if trials is None else trials + asked.trials + len(asked.points)


def _timed_out(record: Record) -> bool:
    session = record.last("session")
    limit: float | None = session.body["budget"].get("timeout") if session is not None else None
    return limit is not None and record.seconds_used() >= limit + steered(record).seconds


def as_dict(summary: Summary) -> dict[str, Any]:
    """Everything as JSON can hold it, times included."""
    best = summary.best
    return {
        "name": summary.name,
        **_objectives(summary),
        "best": None
        if best is None
        else {
            "number": best.number,
            "hparams": _plain(best.hparams),
            "metrics": dict(best.metrics),
            "all_hparams": _plain(summary.full_hparams(best)),
            "standard_error": summary.objective.standard_error(best),
        },
        "holdout": {
            "metrics": dict(summary.holdout),
            "interval": {name: list(bounds) for name, bounds in summary.all_holdout_bounds.items()},
            "refit": dict(summary.holdout_refit),
            "rows": summary.holdout_rows,
            "reads": summary.holdout_reads,
        },
        "gap": summary.gap,
        "confirmation": _confirmation(summary.confirmation),
        "states": summary.states,
        "seconds": summary.seconds,
        "trials": [
            {
                **_trial(trial),
                "round": trial.round,
                "reason": trial.reason,
                "seconds": sum(report.seconds for report in trial.reports),
            }
            for trial in summary.trials
        ],
    }


def canonical(summary: Summary) -> str:
    """What two equal runs have in common, byte for byte: no times, hosts, processes or paths."""
    best = summary.best
    data = {
        **_objectives(summary),
        "best": None
        if best is None
        else {
            "number": best.number,
            "hparams": _plain(best.hparams),
            "metrics": dict(best.metrics),
        },
        "holdout": {
            "metrics": dict(summary.holdout),
            "interval": {name: list(bounds) for name, bounds in summary.holdout_interval.items()},
            "refit": dict(summary.holdout_refit),
            "rows": summary.holdout_rows,
        },
        "confirmation": _confirmation(summary.confirmation),
        "trials": [
            {
                **_trial(trial),
                "round": trial.round,
                "signature": trial.signature,
                "reports": [{"epoch": r.epoch, "metrics": dict(r.metrics)} for r in trial.reports],
            }
            for trial in summary.trials
        ],
    }
    return json.dumps(_hex(data), sort_keys=True, indent=1) + "\n"


def _objectives(summary: Summary) -> dict[str, Any]:
    """The objective; where there is a second one it too, and the numbers of the Pareto set."""
    found: dict[str, Any] = {"objective": dataclasses.asdict(summary.objective)}
    if summary.second is not None:
        found["second"] = dataclasses.asdict(summary.second)
        found["pareto"] = [trial.number for trial in summary.pareto]
    return found


def _confirmation(found: Confirmation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    scores = {str(trial): list(values) for trial, values in found.scores.items()}
    return {"winner": found.winner, "scores": scores, "rivals": found.rivals, "verdict": found.verdict}


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.value,
        "hparams": _plain(trial.hparams),
        "metrics": dict(trial.metrics),
        "epoch": trial.epoch,
        "kept_epoch": trial.kept_epoch,
        "weights_sha256": trial.weights_sha256,
        **{name: size for name in SIZES if (size := getattr(trial, name)) is not None},
        "folds": [
            {
                "state": f.state.value,
                "metrics": dict(f.metrics),
                "kept_epoch": f.kept_epoch,
                "weights_sha256": f.weights_sha256,
            }
            for f in trial.folds
        ],
        "phases": [
            {"generation": p.generation, "epoch": p.epoch, "source": p.source, "hparams": _plain(p.hparams)}
            for p in trial.phases
        ],
    }


def _plain(hparams: HParams) -> dict[str, Any]:
    return {name: thaw(value) for name, value in hparams.items()}


def _hex(value: Any) -> Any:
    """Floats as float.hex: every bit is compared, and no printing rounds it away."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: _hex(item) for key, item in value.items()}
    return [_hex(item) for item in value] if isinstance(value, list) else value
