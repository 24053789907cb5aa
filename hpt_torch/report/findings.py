"""What the trials say beyond their scores: importance, intervals, edges of the space, failures by kind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpt_torch import space as spaces
from hpt_torch.report.summary import Summary
from hpt_torch.samplers import make_study
from hpt_torch.space import Choice, is_log
from hpt_torch.types import Report, Trial, TrialState

_FEWEST_TRIALS = 20  # PED-ANOVA compares the best tenth with all: two trials at least
_STEADY_TRIALS = 50  # its documentation asks for five
_EDGE = 0.02  # of a range
_FOREST_TRIALS = 100  # fANOVA's time grows with them, and its shares hardly change
_FOREST_TREES = 16


@dataclass(frozen=True)
class Finding:
    """Something to look at. `check`: the section of Google's Deep Learning Tuning Playbook that asks it."""

    kind: str
    text: str  # one sentence, with the numbers and the remedy
    check: str


@dataclass(frozen=True)
class Importance:
    """The share of each hyperparameter, the largest first; empty where they mean nothing."""

    best: dict[str, float]  # in what makes a trial one of the best: PED-ANOVA
    whole: dict[str, float]  # in what makes any difference: fANOVA
    note: str  # what to know about them


def importance(summary: Summary) -> Importance:
    """Which hyperparameters matter."""
    return summary.once("importance", lambda: _importance(summary))


def _importance(summary: Summary) -> Importance:
    """PED-ANOVA (Watanabe et al. 2023), as Optuna has it: how far a hyperparameter's values among the best
    tenth of the trials differ from its values among all. fANOVA beside it.
    """
    count = len(summary.ranked)
    if not summary.space:
        return Importance({}, {}, "Nothing was searched, so there is nothing to compare.")
    if count < _FEWEST_TRIALS:
        return Importance(
            {},
            {},
            (
                f"Importance compares the best tenth of the trials with all of them, so it needs at least "
                f"{_FEWEST_TRIALS} complete trials; there {'is' if count == 1 else 'are'} {count}."
            ),
        )
    scores = {summary.objective.score(trial) for trial in summary.ranked}
    if len(scores) == 1:
        return Importance(
            {}, {}, "Every complete trial has the same score, so no hyperparameter can explain it."
        )
    import optuna

    try:
        scored = [(t, score) for t in summary.ranked if (score := summary.objective.score(t)) is not None]
        shares = _shares(summary, scored, optuna.importance.PedAnovaImportanceEvaluator())
    except Exception as error:  # a page without importance is better than no page
        return Importance({}, {}, f"Importance could not be computed: {error}.")
    note = f"PED-ANOVA: what sets the best tenth of {count} complete trials apart, each hyperparameter alone."
    if count < _STEADY_TRIALS:
        note += f" A tenth of {count} is few trials: take it as a hint."
    left = [name for name in summary.space if name not in shares]
    if left:
        note += f" Not judged, for not every trial has it: {', '.join(left)}."
    return Importance(shares, _fanova(summary), note)


def _fanova(summary: Summary) -> dict[str, float]:
    """The share of the variance over the whole space that each hyperparameter explains alone (Hutter et al.
    2014, as Optuna has it); empty where the trials do not differ.

    It gets the ranks of the scores, or a few very bad trials would be all that it explains; of many trials
    some, evenly spread.
    """
    import optuna

    ranked = summary.ranked
    scores = [summary.objective.score(trial) for trial in ranked]
    ranks = {score: float(-place) for place, score in enumerate(dict.fromkeys(scores))}
    every = math.ceil(len(ranked) / _FOREST_TRIALS)
    chosen = [(t, ranks[score]) for t, score in zip(ranked, scores, strict=True)][:: every or 1]
    differs = [
        name
        for name in summary.space
        if all(name in t.hparams for t, _ in chosen)
        and len({spaces.encode(t.hparams[name]) for t, _ in chosen}) > 1
    ]
    if len({rank for _, rank in chosen}) < 2 or not differs:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_FOREST_TREES, seed=0)
    return _shares(summary, chosen, evaluator)


def _shares(summary: Summary, scored: Sequence[tuple[Trial, float]], evaluator: Any) -> dict[str, float]:
    import optuna

    metric = summary.objective.metric
    trials = [  # with one report each, for Optuna copies them all
        Trial(
            number=t.number, round=t.round, hparams=t.hparams, signature="", state=t.state, kept_epoch=1,
            reports=(Report(trial=t.number, epoch=1, metrics={metric: score}, seconds=0.0),),
        )
        for t, score in scored
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = optuna.importance.get_param_importances(
            make_study(summary.space, trials, summary.objective), evaluator=evaluator
        )
    return {name: float(share) for name, share in shares.items() if math.isfinite(share)}


def most_important_numbers(summary: Summary, shares: dict[str, float]) -> list[str]:
    """The two numeric hyperparameters to look at together: by importance, else in the space's order."""
    numeric = [name for name, d in summary.space.items() if not isinstance(d, Choice) and d.low < d.high]
    return sorted(numeric, key=lambda name: -shares.get(name, 0.0))[:2]


def at_edge(summary: Summary, name: str) -> str:
    """Where the best value lies within 2 % of its range's end: "lower end" or "upper end"; else nothing."""
    dimension, best = summary.space[name], summary.best
    value = best.hparams.get(name) if best is not None else None
    if isinstance(dimension, Choice) or not isinstance(value, (int, float)):
        return ""
    if dimension.low >= dimension.high:
        return ""
    low, high, at = float(dimension.low), float(dimension.high), float(value)
    if is_log(name, dimension):
        low, high, at = math.log(low), math.log(high), math.log(at)
    share = (at - low) / (high - low)
    return "lower end" if share <= _EDGE else "upper end" if share >= 1 - _EDGE else ""


def defaults_trial(summary: Summary) -> Trial | None:
    """The complete trial 0 where it tried the declared defaults: what the search is compared with."""
    declared = spaces.defaults(summary.space)
    first = summary.trials[0] if summary.trials else None
    if not declared or first is None or first.number != 0 or first.state is not TrialState.COMPLETE:
        return None
    active = {name: value for name, value in declared.items() if name in first.hparams}
    return first if active and all(first.hparams[n] == value for n, value in active.items()) else None


def is_finished(summary: Summary) -> bool:
    """Whether nothing is left to train, as far as the record tells."""
    if not summary.trials or any(not trial.state.is_finished for trial in summary.trials):
        return False
    return summary.planned is None or len(summary.trials) >= summary.planned


@dataclass(frozen=True)
class Failure:
    """Trials that ended badly with the same last line."""

    line: str
    state: str
    trials: Sequence[int]
    reason: str  # of the first of them


def failures(summary: Summary) -> list[Failure]:
    """Failed and infeasible trials by their reason's last line, the most frequent first."""
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in summary.trials:
        if trial.state in (TrialState.FAILED, TrialState.INFEASIBLE):
            groups.setdefault((last_line(trial.reason), trial.state.value), []).append(trial)
    found = [
        Failure(line or "no reason was recorded", state, [t.number for t in trials], trials[0].reason)
        for (line, state), trials in groups.items()
    ]
    return sorted(found, key=lambda failure: (-len(failure.trials), failure.trials[0]))


def last_line(reason: str) -> str:
    lines = reason.strip().splitlines()
    return lines[-1].strip() if lines else ""
