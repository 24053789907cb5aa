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
from hpt_torch.report.findings import Finding, Importance
from hpt_torch.report.summary import Summary, summarise
from hpt_torch.report.svg import number
from hpt_torch.space import encode

REPLAYS = "replays"  # the folder of a run in which its replays are runs
_SHARES = ("accuracy", "top5")  # metrics that count rows: their error is known


def diagnose(
    summary: Summary, replays: Sequence[float] = (), importance: Importance | None = None
) -> list[Finding]:
    """The findings, the most important first: whether the result can be trusted, then what would make it
    better, then what was learned. `replays`: scores of the best trial trained again with other seeds;
    `importance`: where it is known already.

    Where a scheduler changed hyperparameters on the way, trials are no points of the space, and their curves
    are those of copies: only the first kind of check is made.
    """
    found = [seed_noise(summary, replays), selection(summary)]
    if not any(trial.phases for trial in summary.trials):
        judged = judge(summary.trials, summary.objective)
        found += [space_checks.divergence(summary), space_checks.infeasible(summary)]
        found += space_checks.edges(summary, judged)
        found += curve_checks.check(summary)
        found += [space_checks.confounded(summary, judged), space_checks.interaction(summary, judged)]
        found.append(space_checks.importance(summary, importance or findings.importance(summary)))
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

    From replays of the best trial, else from trials with equal hyperparameters, which differ in their seed.
    """
    best, objective = summary.best, summary.objective
    if best is None:
        return None
    if len(replays) >= 3:
        noise, source = statistics.stdev(replays), f"{len(replays)} replays"
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
    return Finding(
        "seed_noise",
        f"The seed alone moves {objective.metric} by {number(noise)} (standard deviation over {source}), and "
        f"the best trial's gain over {over} is {number(gain)}: it may be luck, and so may the order of the "
        f"best {near} trials; train the best few again with more seeds (hpt replay) before choosing.",
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
    """Validation set small for the number of trials ("Is the validation set too small?": study variance).

    The highest of n scores that share a standard error s is too high by up to s times the expected largest of
    n standard normals. Trials are scored on the same rows, so their errors go together: it is an upper bound.
    Where hold-out rows were read, they decide.
    """
    metric, best = summary.objective.metric.removeprefix("valid/"), summary.best
    rows = summary.environment.get("valid_rows")
    if best is None or metric not in _SHARES or not isinstance(rows, int) or rows < 1:
        return None
    score = summary.objective.score(best)
    if score is None or not 0 <= score <= 1:
        return None
    error = math.sqrt(max(score * (1 - score), 0.25 / rows) / rows)
    check = "Determining whether to adopt a training pipeline change: study variance"
    remedy = (
        "judge it by the hold-out figure, and for a finer choice use more validation rows or cross-validation"
    )
    held = summary.holdout.get(f"holdout/{metric}")
    if held is not None and summary.holdout_rows:
        both = error * math.sqrt(1 + rows / summary.holdout_rows)
        if score - held > 2 * both:
            return Finding(
                "selection",
                f"Hold-out {metric} is {number(held)} ({summary.holdout_rows:,} rows) where the choice was "
                f"made at {number(score)} ({rows:,} valid rows), which is more than chance in the rows "
                f"({number(2 * both)}): the choice of the best of {len(summary.ranked)} trials flatters it; "
                f"{remedy}.",
                check,
            )
    scores = [value for trial in summary.ranked if (value := summary.objective.score(trial)) is not None]
    near = [value for value in scores if value >= score - error]
    if len(scores) < 10 or len(near) < max(5, len(scores) // 10):
        return None
    flattery = error * _largest_of(len(near))
    return Finding(
        "selection",
        f"{len(near)} of {len(scores)} trials are within one standard error ({number(error)} on {rows:,} "
        f"valid rows) of the best, whose {metric} the choice among them may flatter by up to "
        f"{number(flattery)}: {remedy}.",
        check,
    )


def _largest_of(count: int) -> float:
    """The expected largest of so many standard normals (Blom 1958)."""
    return float(stats.norm.ppf((count - 0.375) / (count + 0.25)))
