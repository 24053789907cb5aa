"""What the trials of a search say about one hyperparameter: ranks, places in the range, and tests.

Scores enter as ranks, so that a few very bad trials do not outweigh all others. Everything is a pure function
of space, trials and objective. A sampler that learns (TPE, GP) has better trials later, and crowds later: see
`context`. What is left of that makes p-values a little too small, so whoever uses them asks for 1 %, not 5 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hpt_torch.hparams import CLASSIFICATION, MODEL, TRAINING, by_name
from hpt_torch.space import Choice, Dimension, Space, encode, is_log
from hpt_torch.types import HParamValue, Objective, Trial, TrialState, is_number

FEWEST_TRIALS = 20  # below this many judged trials nothing is said
FEWEST_GOOD = 5
_GOOD_SHARE = 0.2
_FEW_VALUES = 12  # up to so many values, an edge is the last value; else a tenth of the range
_CROWD_P = 0.01
_LIMITS = by_name([*TRAINING, *CLASSIFICATION, *MODEL])

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """The trials that say something, best first, each with a normal score: higher is better."""

    trials: Sequence[Trial]
    scores: Array  # (trials,)
    good: Sequence[Trial]  # the best fifth of the complete ones, five at least, and those that tie with it

    @property
    def enough(self) -> bool:
        return len(self.trials) >= FEWEST_TRIALS and len(self.good) >= FEWEST_GOOD


def diverged(trial: Trial) -> bool:
    """Whether its training left the finite numbers; not where its code raised."""
    return trial.state is TrialState.FAILED and trial.reason.strip().startswith("diverged")


def judge(trials: Sequence[Trial], objective: Objective) -> Judged:
    """Ranks complete trials by score; below them pruned ones, the further they came the better; below those,
    all alike, the diverged and the infeasible. Others (running, raised an error) say nothing."""
    sign = 1.0 if objective.direction == "maximize" else -1.0
    keys: dict[int, tuple[float, ...]] = {}
    for trial in trials:
        score = objective.score(trial)
        if trial.state is TrialState.COMPLETE and score is not None:
            keys[trial.number] = (2.0, 0.0, sign * score)
        elif trial.state is TrialState.PRUNED and score is not None:
            keys[trial.number] = (1.0, float(trial.epoch), sign * score)
        elif diverged(trial) or trial.state is TrialState.INFEASIBLE:
            keys[trial.number] = (0.0, 0.0, 0.0)
    judged = sorted((t for t in trials if t.number in keys), key=lambda t: t.number)
    judged.sort(key=lambda t: keys[t.number], reverse=True)
    places = {key: place for place, key in enumerate(sorted(set(keys.values())))}
    ranks = stats.rankdata([places[keys[t.number]] for t in judged]) if judged else np.zeros(0)
    complete = [t for t in judged if keys[t.number][0] == 2.0]
    count = min(len(complete), max(FEWEST_GOOD, math.ceil(_GOOD_SHARE * len(complete))))
    good = [t for t in complete if keys[t.number] >= keys[complete[count - 1].number]] if count else []
    return Judged(judged, stats.norm.ppf((ranks - 0.375) / (len(judged) + 0.25)), good)


# -- places in a range ---------------------------------------------------------------------------------


def numbers(dimension: Dimension) -> Sequence[float] | None:
    """The options of a choice that is a rising list of numbers, such as [32, 64, 128]; else None."""
    if not isinstance(dimension, Choice) or len(dimension.options) < 2:
        return None
    options = [float(option) for option in dimension.options if is_number(option)]
    rising = all(a < b for a, b in itertools.pairwise(options))
    return options if rising and len(options) == len(dimension.options) else None


def _has_no_order(dimension: Dimension) -> bool:
    return isinstance(dimension, Choice) and numbers(dimension) is None


def place(name: str, dimension: Dimension, value: object) -> float:
    """0 at the lower end, 1 at the upper, on the dimension's scale; of a choice of numbers by its place in
    the list; nan for what has no order."""
    options = numbers(dimension)
    if isinstance(dimension, Choice):
        if options is None or not is_number(value) or value not in options:
            return math.nan
        return options.index(float(value)) / (len(options) - 1)  # type: ignore[arg-type]
    if not is_number(value):
        return math.nan
    low, high, at = float(dimension.low), float(dimension.high), float(value)  # type: ignore[arg-type]
    if low >= high:
        return math.nan
    if is_log(name, dimension):
        if at <= 0:
            return math.nan
        low, high, at = math.log(low), math.log(high), math.log(at)
    return min(max((at - low) / (high - low), 0.0), 1.0)


def value_at(name: str, dimension: Dimension, at: float) -> float:
    """The inverse of `place` for a range; also beyond its ends."""
    assert not isinstance(dimension, Choice)
    low, high = float(dimension.low), float(dimension.high)
    if is_log(name, dimension):
        return math.exp(math.log(low) + at * (math.log(high) - math.log(low)))
    return low + at * (high - low)


def allowed(name: str) -> tuple[float, float, bool, bool]:
    """(low, high, low itself is not allowed, high itself is not allowed) of a hyperparameter of this name."""
    spec = _LIMITS.get(name)
    return (-math.inf, math.inf, False, False) if spec is None else (
        spec.low, spec.high, spec.open_low, spec.open_high)  # fmt: skip


@dataclass(frozen=True)
class Crowd:
    """Good trials at one end of a range: more of them than chance would put there."""

    end: Literal["lower", "upper"]
    count: int  # of them
    of: int  # good trials that have the hyperparameter
    where: float  # the value from which on they were counted
    unstable: int = 0  # trials that diverged there, where those are at least half as many


def crowd(name: str, dimension: Dimension, judged: Judged) -> Crowd | None:
    """Where at least a third of the good trials lie at an end, which chance would do in one search of 100.

    The end is a tenth of the range; of at most twelve values, the last one.
    """
    places = _places(name, dimension, judged.good)
    bad = _places(name, dimension, [trial for trial in judged.trials if diverged(trial)])
    count = dimension.count()
    few = isinstance(dimension, Choice) or (count is not None and count <= _FEW_VALUES)
    room, expected = (1e-9, 1 / count) if few and count else (0.1, 0.1)
    ends: tuple[Literal["lower", "upper"], ...] = ("lower", "upper")
    for end in ends:
        inside, lost = (
            [at for at in found if (at if end == "lower" else 1 - at) <= room] for found in (places, bad)
        )
        p = float(stats.binom.sf(len(inside) - 1, len(places), expected))
        if len(places) < FEWEST_GOOD or 3 * len(inside) < len(places) or p >= _CROWD_P:
            continue
        options = numbers(dimension)
        if options is not None:
            where = options[0 if end == "lower" else -1]
        else:
            inner = 0.0 if few else room
            where = value_at(name, dimension, inner if end == "lower" else 1 - inner)
        return Crowd(end, len(inside), len(places), where, len(lost) if 2 * len(lost) >= len(inside) else 0)
    return None


def _places(name: str, dimension: Dimension, trials: Sequence[Trial]) -> list[float]:
    found = [place(name, dimension, trial.hparams.get(name)) for trial in trials]
    return [at for at in found if not math.isnan(at)]


# -- tests ---------------------------------------------------------------------------------------------


def columns(name: str, dimension: Dimension, trials: Sequence[Trial]) -> Array:
    """(trials, k): a cubic in the place, or one column an option; whoever fits them adds the constant."""
    values = [trial.hparams[name] for trial in trials]
    if isinstance(dimension, Choice):
        codes, options = [encode(value) for value in values], [encode(o) for o in dimension.options[1:]]
        found = [[float(code == option) for option in options] for code in codes]
        return np.array(found).reshape(len(trials), len(options))
    places = np.array([place(name, dimension, value) for value in values])
    return np.stack([places - 0.5, (places - 0.5) ** 2, (places - 0.5) ** 3], axis=1)


def explained(scores: Array, base: Array, extra: Array) -> tuple[float, float]:
    """(share of the scores' variance that `extra` explains beyond `base`, p of the F-test of it).

    base: (trials, a), extra: (trials, b); the constant is added here. (0, 1) where nothing can be said.
    """
    constant = np.ones((len(scores), 1))
    small, large = np.hstack([constant, base]), np.hstack([constant, base, extra])
    used, total = int(np.linalg.matrix_rank(small)), float(np.sum((scores - scores.mean()) ** 2))
    full = int(np.linalg.matrix_rank(large))
    left = len(scores) - full
    if full == used or left < 3 or total == 0:
        return 0.0, 1.0
    before, after = _residual(scores, small), _residual(scores, large)
    gained = max(before - after, 0.0)
    if after <= 1e-12 * total:
        return gained / total, 0.0
    return gained / total, float(stats.f.sf((gained / (full - used)) / (after / left), full - used, left))


def _residual(scores: Array, design: Array) -> float:
    fit = design @ np.linalg.lstsq(design, scores, rcond=None)[0]
    return float(np.sum((scores - fit) ** 2))


def placed(judged: Judged, dimensions: Space) -> tuple[list[Trial], Array]:
    """The judged trials that have all of these hyperparameters, in their ranges, and their scores."""
    chosen = [
        i
        for i, trial in enumerate(judged.trials)
        if all(_is_placed(trial, name, dimension) for name, dimension in dimensions.items())
    ]
    return [judged.trials[i] for i in chosen], judged.scores[chosen]


def _is_placed(trial: Trial, name: str, dimension: Dimension) -> bool:
    value = trial.hparams.get(name)
    return name in trial.hparams and (
        _has_no_order(dimension) or not math.isnan(place(name, dimension, value))
    )


def context(space: Space, trials: Sequence[Trial], *but: str) -> Array:
    """(trials, k): what else may have made their scores: the round, and every other hyperparameter that all
    of them have, each as a quadratic or one column an option; without the latter where these were too many.

    A sampler that learns has better trials in later rounds, and in these it crowds in every hyperparameter,
    also where that does not matter. Without the round, all of them would seem to matter.
    """
    rounds = np.array([float(trial.round) for trial in trials])
    span = float(np.ptp(rounds)) or 1.0
    late = (rounds - rounds.min()) / span - 0.5
    parts = [np.stack([late, late**2], axis=1)]
    for name, dimension in space.items():
        if name in but or not all(_is_placed(trial, name, dimension) for trial in trials):
            continue
        found = columns(name, dimension, trials)
        parts.append(found if isinstance(dimension, Choice) else found[:, :2])
    every = np.hstack(parts)
    return every if 3 * every.shape[1] <= len(trials) else parts[0]


def matters(judged: Judged, name: str, space: Space) -> float:
    """p: how probable so strong a dependence of the score on this hyperparameter would be by chance."""
    dimension = space[name]
    trials, scores = placed(judged, {name: dimension})
    if len(trials) < FEWEST_TRIALS:
        return 1.0
    return explained(scores, context(space, trials, name), columns(name, dimension, trials))[1]


def worse(judged: Judged, name: str, option: HParamValue, space: Space) -> float:
    """p: how probable it would be by chance that the trials with this option score so low."""
    trials, scores = placed(judged, {name: space[name]})
    uses = np.array([[float(encode(trial.hparams[name]) == encode(option))] for trial in trials])
    if len(trials) < FEWEST_TRIALS or not 0 < uses.sum() < len(trials):
        return 1.0
    base = context(space, trials, name)
    design = np.hstack([np.ones((len(trials), 1)), base, uses])
    p = explained(scores, base, uses)[1]
    is_lower = float(np.linalg.lstsq(design, scores, rcond=None)[0][-1]) < 0
    return p / 2 if is_lower else 1 - p / 2
