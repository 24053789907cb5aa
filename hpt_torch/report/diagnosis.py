"""What to look at in a run: findings, each one sentence with its numbers and its remedy.

The checks are those of Google's Deep Learning Tuning Playbook, where it has them; a finding's `check` names
the section. Those of training curves are in `curve_checks`, those of the space in `space_checks`, those of
trust here. A check that has too little to go by finds nothing, so no finding on few trials says nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from hpt_torch.evidence import judge
from hpt_torch.record import Record
from hpt_torch.report import curve_checks, findings, space_checks
from hpt_torch.report.findings import Finding
from hpt_torch.report.summary import SHARES, Summary, summarise
from hpt_torch.report.svg import number
from hpt_torch.space import encode
from hpt_torch.types import Trial

REPLAYS = "replays"  # the folder of a run in which its replays are runs


def of_run(run: Path, summary: Summary) -> list[Finding]:
    """What `diagnose` finds in the run at this path and its replays."""
    replays = replay_scores(run, summary)
    return summary.once(("findings", *replays), lambda: diagnose(summary, replays))


def diagnose(summary: Summary, replays: Sequence[float] = ()) -> list[Finding]:
    """The findings, the most important first: whether the result can be trusted, then what would make it
    better, then what was learned. `replays`: scores of the best trial trained again with other seeds.

    Where a scheduler changed hyperparameters on the way, trials are no points of the space, and their curves
    are those of copies: only the first kind of check is made.
    """
    summary = summary.as_searched
    found = [seed_noise(summary, replays), selection(summary)]
    if not any(trial.phases for trial in summary.trials):
        judged = judge(summary.trials, summary.objective)
        found += [space_checks.divergence(summary), space_checks.infeasible(summary)]
        found += space_checks.edges(summary, judged)
        found += curve_checks.check(summary)
        found += [space_checks.confounded(summary, judged), space_checks.interaction(summary, judged)]
        found.append(space_checks.importance(summary, findings.importance(summary)))
    return [finding for finding in found if finding is not None]


def replay_scores(run: Path, summary: Summary) -> list[float]:
    """The valid scores of the replays that `hpt replay` made of the best trial of the run at this path."""
    if summary.best is None:
        return []
    scores = []
    for path in sorted((run / REPLAYS).glob(f"trial-{summary.best.number}-seed-*/run.db")):
        with Record(path, readonly=True) as record:
            if record.last("run") is None:
                continue
            other = summarise(record)
        score = None if other.best is None else other.objective.score(other.best)
        scores += [] if score is None else [score]
    return scores


def seed_noise(summary: Summary, replays: Sequence[float] = ()) -> Finding | None:
    """Noise between seeds larger than the gain ("Determining whether to adopt …", trial variance).

    From replays of the best trial, else from its confirmation, else from trials with equal hyperparameters,
    which differ in their seed.
    """
    best, objective, confirmed = summary.best, summary.objective, summary.confirmation
    if best is None:
        return None
    if len(replays) >= 3:
        noise, source = statistics.stdev(replays), f"{len(replays)} replays"
    elif confirmed is not None and len(confirmed.scores[best.number]) >= 3:
        noise, source = confirmed.deviation(best.number), f"{len(confirmed.scores[best.number])} new seeds"
    else:
        noise, source = _repeats(summary)
    reference = findings.defaults_trial(summary)
    scores = [score for trial in summary.ranked if (score := objective.score(trial)) is not None]
    if reference is not None and reference is not best:
        over, base = f"the declared defaults (trial {reference.number})", objective.score(reference)
    else:
        over, base = "the median trial", statistics.median(scores)
    top = objective.score(best)
    if not source or base is None or top is None or len(scores) < 2:
        return None
    gain = abs(top - base)
    if gain >= 2 * noise:
        return None
    near = sum(abs(top - score) <= 2 * noise for score in scores)
    remedy = "train the best few again with new seeds before choosing (final.confirm)"
    if confirmed is not None:
        remedy = "among those that cannot be told apart, take the cheapest or the simplest"
    return Finding(
        "seed_noise",
        f"The seed alone moves {objective.metric} by {number(noise)} (standard deviation over {source}), and "
        f"the best trial's gain over {over} is {number(gain)}: it may be luck, and so may the order of the "
        f"best {near} trials; {remedy}.",
        "Determining whether to adopt a training pipeline change: trial variance",
    )


def _repeats(summary: Summary) -> tuple[float, str]:
    """(standard deviation between trials of equal hyperparameters, from what); "" where there are too few."""
    groups: dict[str, list[float]] = {}
    for trial in summary.ranked:
        key = repr(sorted((name, encode(value)) for name, value in trial.hparams.items()))
        score = summary.objective.score(trial)
        if score is not None and abs(score) < 1e100:  # the square of a larger one is no number
            groups.setdefault(key, []).append(score)
    repeated = [scores for scores in groups.values() if len(scores) > 1]
    free = sum(len(scores) - 1 for scores in repeated)
    if free < 3:
        return 0.0, ""
    squares = sum(statistics.variance(scores) * (len(scores) - 1) for scores in repeated)
    count = sum(map(len, repeated))
    return math.sqrt(squares / free), f"{count} trials that repeat {len(repeated)} points"


def selection(summary: Summary) -> Finding | None:
    """Validation set small for the number of trials ("Determining whether to adopt …", study variance).

    The highest of n scores that share a standard error s is too high by up to s times the expected largest of
    n standard normals. Trials are scored on the same rows, so their errors go together: it is an upper bound.
    Where hold-out rows were read, they decide.
    """
    best, objective = summary.best, summary.objective
    known = None if best is None else standard_error(summary, best)
    score = None if best is None else objective.score(best)
    if known is None or score is None:
        return None
    (error, rows), check = known, "Determining whether to adopt a training pipeline change: study variance"
    remedy = "judge it by the hold-out figure, and choose on more validation rows or by cross-validation"
    if best is not None and best.folds:
        remedy = "judge it by the hold-out figure, and train the best few again (final.confirm)"
    if summary.confirmation is not None:
        remedy = "judge it by the hold-out figure, and bring more rows"
    metric = objective.metric.removeprefix("valid/")
    held = summary.holdout.get(f"holdout/{metric}")
    if held is not None and metric in SHARES and summary.holdout_rows:
        chance = 2 * math.hypot(error, _binomial(held, summary.holdout_rows))
        if score - held > chance:
            return Finding(
                "selection",
                f"Hold-out {metric} is {number(held)} ({summary.holdout_rows:,} rows) where the choice was "
                f"made at {number(score)} ({rows}), which is more than chance would make of it "
                f"({number(chance)}): the choice of the best of {len(summary.ranked)} trials flatters it; "
                f"{remedy}.",
                check,
            )
    scores = [value for trial in summary.ranked if (value := objective.score(trial)) is not None]
    near = sum(abs(score - value) <= error for value in scores)
    if len(scores) < 10 or near < max(5, len(scores) // 10) or summary.confirmation is not None:
        return None
    flattery = number(error * _largest_of(near))
    return Finding(
        "selection",
        f"{near} of {len(scores)} trials are within one standard error ({number(error)}, {rows}) of the "
        f"best, whose {metric} the choice among them may flatter by up to {flattery}: {remedy}.",
        check,
    )


def standard_error(summary: Summary, best: Trial) -> tuple[float, str] | None:
    """(standard error of the best score, from what): over folds, or of a share of the valid rows."""
    error, score = summary.objective.standard_error(best), summary.objective.score(best)
    if error is not None:
        return error, f"{len(best.folds)} folds"
    rows = summary.environment.get("valid_rows")
    if summary.objective.metric.removeprefix("valid/") not in SHARES or score is None or not 0 <= score <= 1:
        return None
    if not isinstance(rows, int) or rows < 1:
        return None
    return _binomial(score, rows), f"{rows:,} valid rows"


def _binomial(share: float, rows: int) -> float:
    """The standard error of a share of rows; of one without a single error, as if half a row were one."""
    return math.sqrt(max(share * (1 - share), 0.5 / rows * (1 - 0.5 / rows)) / rows)


def _largest_of(count: int) -> float:
    """The expected largest of so many standard normals (Blom 1958)."""
    return float(stats.norm.ppf((count - 0.375) / (count + 0.25)))
