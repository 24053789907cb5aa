"""Checks of the training curves of the best few trials: the playbook's "Examining the training curves".

Only trials that were trained for as long as any count; curves of fewer than five epochs say nothing. What
most of the best five trials show is said once, with the best trial's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from hpt_torch.report.findings import Finding
from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import number
from hpt_torch.types import Trial

_TRIALS = 5
_FEWEST_EPOCHS = 5
_SECTION = "Examining the training curves"
# metrics whose perfect value is 1, so that it is known how much is missing
_PERFECT_IS_ONE = ("accuracy", "top5", "f1", "precision", "recall", "roc_auc", "r2")
_REGULARISERS = ("weight_decay", "dropout", "label_smoothing", "l2", "augment")
_CAPACITY = (
    "hidden_sizes",
    "width",
    "depth",
    "channels",
    "head_sizes",
    "hidden_size",
    "num_layers",
    "latent_dim",
)


@dataclass(frozen=True)
class Curve:
    """A metric of one trial on train and valid rows after each epoch, turned round so that less is better."""

    metric: str
    sign: float
    epochs: Sequence[int]
    train: Sequence[float]
    valid: Sequence[float]

    def show(self, value: float) -> str:
        return number(self.sign * value)

    @property
    def low(self) -> int:
        """Where the valid curve, smoothed over three epochs, is lowest."""
        smooth = [_mean(self.valid[max(0, i - 1) : i + 2]) for i in range(len(self.valid))]
        return smooth.index(min(smooth))

    @property
    def fall(self) -> float:
        """How far the valid curve fell at all."""
        return max(self.valid) - min(self.valid)


def check(summary: Summary) -> list[Finding]:
    """What the curves show; one of over- and underfitting, and one of too short and too long, at most."""
    found = overfitting(summary)
    too_short = still_improving(summary)
    if found is None and too_short is None:
        found = underfitting(summary)
    second = too_short if too_short is not None or found is not None else saturated(summary)
    return [finding for finding in (found, second) if finding is not None]


def curves(summary: Summary, metric: str) -> list[Curve]:
    """Of the best few trials that were trained to the end, the best first."""
    maximised = summary.objective.metric == f"valid/{metric}" and summary.objective.direction == "maximize"
    longest = max((trial.epoch for trial in summary.ranked), default=0)
    best = [trial for trial in summary.ranked if trial.epoch == longest][:_TRIALS]
    found = [_curve(trial, metric, -1.0 if maximised else 1.0) for trial in best]
    return [curve for curve in found if len(curve.epochs) >= _FEWEST_EPOCHS]


def _curve(trial: Trial, metric: str, sign: float) -> Curve:
    points = []
    for report in trial.reports:
        train, valid = (report.metrics.get(f"{part}/{metric}", math.nan) for part in ("train", "valid"))
        if math.isfinite(train) and math.isfinite(valid) and max(abs(train), abs(valid)) < 1e100:
            points.append((report.epoch, sign * train, sign * valid))
    epochs, trains, valids = zip(*points, strict=True) if points else ((), (), ())
    return Curve(metric, sign, epochs, trains, valids)


def _most(of: Sequence[Curve], shows: Callable[[Curve], bool]) -> list[Curve]:
    """Those that show it, where that is most of them; three at least."""
    showing = [curve for curve in of if shows(curve)]
    return showing if len(showing) >= max(3, math.ceil(0.6 * len(of))) else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# -- the checks ----------------------------------------------------------------------------------------


def overfitting(summary: Summary) -> Finding | None:
    """Valid gets worse while train gets better, or the gap between them grows until it is most of the error
    ("Are any of the trials exhibiting problematic overfitting?")."""
    metric = summary.objective.metric.removeprefix("valid/")
    for name in dict.fromkeys((metric, "loss")):
        of = curves(summary, name)
        showing = _most(of, _turns)
        if showing:
            c, low = showing[0], showing[0].low
            return Finding(
                "overfitting",
                f"{len(showing)} of the best {len(of)} trials overfit: in the best of them valid/{name} goes "
                f"from {c.show(c.valid[low])} after epoch {c.epochs[low]} to {c.show(c.valid[-1])} after "
                f"epoch {c.epochs[-1]}, while train/{name} goes from {c.show(c.train[low])} to "
                f"{c.show(c.train[-1])}: {_regularise(summary)}, or stop in time (trainer.patience).",
                _SECTION,
            )
    showing = _most(of := curves(summary, metric), _gapes) if metric in _PERFECT_IS_ONE else []
    if showing:
        c = showing[0]
        return Finding(
            "overfitting",
            f"{len(showing)} of the best {len(of)} trials know the train rows far better: in the best of "
            f"them train/{metric} is {c.show(c.train[-1])} and valid/{metric} {c.show(c.valid[-1])}, and the "
            f"gap grew from {number(c.valid[0] - c.train[0])} to {number(c.valid[-1] - c.train[-1])}: "
            f"{_regularise(summary)}, or get more data.",
            _SECTION,
        )
    return None


def _turns(c: Curve) -> bool:
    """Valid rises from its lowest point to the end, more than by chance, and train goes on falling."""
    low = c.low
    epochs, rest = c.epochs[low:], c.valid[low:]
    if len(rest) < _FEWEST_EPOCHS or c.fall == 0 or c.train[-1] >= c.train[low]:
        return False
    tau, p = stats.kendalltau(epochs, rest)
    return bool(tau > 0 and p < 0.05 and rest[-1] - rest[0] > 0.1 * c.fall)


def _gapes(c: Curve) -> bool:
    """The gap has grown, and is at least five points and half of what valid lacks."""
    gap, lacks = c.valid[-1] - c.train[-1], 1 + c.valid[-1]
    return gap > max(0.05, 0.5 * lacks) and gap > 1.5 * (c.valid[0] - c.train[0])


def underfitting(summary: Summary) -> Finding | None:
    """Train is as bad as valid, and both are far from perfect: the model, not the data, is the limit.

    The playbook has no such check; it is the other half of overfitting's.
    """
    metric = summary.objective.metric.removeprefix("valid/")
    if metric not in _PERFECT_IS_ONE:
        return None
    of = curves(summary, metric)
    showing = _most(
        of, lambda c: 1 + c.train[-1] >= 0.1 and c.valid[-1] - c.train[-1] <= 0.1 * (1 + c.train[-1])
    )
    if not showing:
        return None
    c, known = showing[0], _known(summary, _CAPACITY)
    larger = f"larger {', '.join(known[:3])}" if known else "a larger model"
    weaker = _known(summary, _REGULARISERS)[:2]
    remedy = f"{larger} or less {' and '.join(weaker)}" if weaker else larger
    return Finding(
        "underfitting",
        f"{len(showing)} of the best {len(of)} trials underfit: the best of them has train/{metric} "
        f"{c.show(c.train[-1])} and valid/{metric} {c.show(c.valid[-1])}, no better on the rows that it was "
        f"trained on than on others: try {remedy}, unless the labels allow no better.",
        _SECTION,
    )


def still_improving(summary: Summary) -> Finding | None:
    """Valid gets better in the last fifth of the epochs ("Are the trials still improving at the end?")."""
    metric = summary.objective.metric.removeprefix("valid/")
    of = curves(summary, metric)
    showing = _most(of, lambda c: c.fall > 0 and _last_gain(c)[2] > 0.05 * c.fall)
    if not showing:
        return None
    c = showing[0]
    before, after, gain = _last_gain(c)
    share, last = gain / c.fall, c.epochs[-1]
    schedule = summary.fixed.get("schedule", "constant")
    annealed = "" if schedule == "constant" or "schedule" in summary.space else (
        f" (part of it is the end of the {schedule} schedule)"
    )  # fmt: skip
    return Finding(
        "still_improving",
        f"{len(showing)} of the best {len(of)} trials still improve when they are stopped: the best of them "
        f"goes from {c.show(before)} to {c.show(after)} in the last fifth of {last} epochs, {share:.0%} of "
        f"all that it gains{annealed}: train longer (trainer.epochs={2 * last}).",
        f"{_SECTION}; Deciding how long to train",
    )


def _last_gain(c: Curve) -> tuple[float, float, float]:
    """(mean of the fifth before the last, mean of the last, how much better that is)."""
    count = max(2, len(c.valid) // 5)
    before, after = _mean(c.valid[-2 * count : -count]), _mean(c.valid[-count:])
    return before, after, before - after


def saturated(summary: Summary) -> Finding | None:
    """Nothing is gained any more for most of the training ("saturated long before the final step")."""
    metric = summary.objective.metric.removeprefix("valid/")
    of = curves(summary, metric)
    last = max((c.epochs[-1] for c in of), default=0)
    showing = _most(of, lambda c: c.fall > 0 and _enough(c) <= 0.4 * last)
    if not showing or last < 10:
        return None
    enough = max(_enough(c) for c in showing)
    epochs = math.ceil(1.25 * enough)
    return Finding(
        "saturated",
        f"{len(showing)} of the best {len(of)} trials reach 98 % of what they gain by epoch {enough} of "
        f"{last}: trainer.epochs={epochs} would leave time for {last / epochs:.1f} times as many trials.",
        f"{_SECTION}; Deciding how long to train",
    )


def _enough(c: Curve) -> int:
    """The epoch after which the mean of the last fifth is as good as reached: 2 % of the fall are missing."""
    level = _last_gain(c)[1] + 0.02 * c.fall
    return next((e for e, value in zip(c.epochs, c.valid, strict=True) if value <= level), c.epochs[-1])


# -- remedies ------------------------------------------------------------------------------------------


def _known(summary: Summary, names: Sequence[str]) -> list[str]:
    """Those of these hyperparameters that the run has."""
    return [name for name in names if name in summary.space or name in summary.fixed]


def _regularise(summary: Summary) -> str:
    known = _known(summary, _REGULARISERS)
    return f"regularise more ({', '.join(known[:3])})" if known else "regularise more"
