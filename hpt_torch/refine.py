"""Coarse to fine: the next search space, from the trials of the last one, with the reason for every bound.

A range is narrowed to where the best fifth of the trials lies, widened at an end where they crowd, and left
alone where the trials are too few or the score does not visibly depend on it. An option of a choice is
dropped where no good trial used it and its trials are worse than the others'. Google's Deep Learning Tuning
Playbook asks for the second ("Identifying bad search space boundaries") before anything is concluded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpt_torch.evidence import (
    FEWEST_GOOD,
    FEWEST_TRIALS,
    Judged,
    allowed,
    crowd,
    judge,
    matters,
    numbers,
    place,
    placed,
    value_at,
    worse,
)
from hpt_torch.needs import lost_need
from hpt_torch.space import Choice, Dimension, Float, Int, Space, encode, ordered
from hpt_torch.types import Objective, Trial, UserInputError

_P = 0.01  # of a dependence, before anything is cut; see `evidence` for why not 0.05
_NARROWEST = 0.1  # of the old range: the best few trials are close together also by chance
_WIDEST = 0.8  # a range that would keep more than this is left
_WIDENED = 0.25  # of the old range, beyond the end


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """A space to search next, and for every dimension of the old one why it is as it is."""

    space: dict[str, Dimension]
    reasons: dict[str, str]
    changed: frozenset[str]  # the names whose values are others now; a new default alone is no change


def refine(space: Space, trials: Sequence[Trial], objective: Objective) -> Refinement:
    """A narrower space around the best region; its defaults are the best trial's values, where they fit.

    Raises UserInputError where a scheduler changed hyperparameters on the way: then the good trials are
    copies of each other, and no trial is a point of the space.
    """
    if any(trial.phases for trial in trials):
        raise UserInputError(
            "a run whose scheduler changes hyperparameters cannot be refined: its good trials are copies of "
            "each other; refine a run of random search or TPE"
        )
    judged = judge(trials, objective)
    new: dict[str, Dimension] = {}
    reasons: dict[str, str] = {}
    found = {name: _judged(name, dimension, judged, space) for name, dimension in space.items()}
    for name in ordered(space):
        changed, reason = found[name]
        kept, gone = _conditions(changed, new)
        lost = lost_need(name, space, lambda parent, value: found[parent][0].contains(value))
        if kept is None:
            reasons[name] = f"left out: it needs {gone}, which is searched no more"
        elif lost is not None:
            reasons[name] = f"left out: it needs {lost[0]} = {_either(lost[1])}, which is searched no more"
        else:
            new[name] = _with_default(name, kept, judged.good[0] if judged.good else None)
            reasons[name] = reason
    shown = {name: new[name] for name in space if name in new}
    changed_names = frozenset(name for name in space if name not in new or _differ(space[name], new[name]))
    return Refinement(space=shown, reasons={name: reasons[name] for name in space}, changed=changed_names)


def _judged(name: str, dimension: Dimension, judged: Judged, space: Space) -> tuple[Dimension, str]:
    """Its next values, whatever becomes of the others, and why."""
    if isinstance(dimension, Choice):
        return _choice(name, dimension, judged, space)
    return _range(name, dimension, judged, space)


def _differ(old: Dimension, new: Dimension) -> bool:
    return dataclasses.replace(old, default=None) != dataclasses.replace(new, default=None)


def _too_few(name: str, dimension: Dimension, judged: Judged) -> str:
    """Why nothing can be said of this dimension; "" where something can."""
    having, _ = placed(judged, {name: dimension})
    good = [trial for trial in judged.good if trial in having]
    if len(having) < FEWEST_TRIALS:
        if not having:
            return f"left: no trial says anything about it, and {FEWEST_TRIALS} are needed"
        count = "1 trial says" if len(having) == 1 else f"{len(having)} trials say"
        return f"left: only {count} something about it, and {FEWEST_TRIALS} are needed"
    if len(good) < FEWEST_GOOD:
        return f"left: only {len(good)} of the best trials have it, and {FEWEST_GOOD} are needed"
    return ""


# -- ranges --------------------------------------------------------------------------------------------


def _range(name: str, dimension: Float | Int, judged: Judged, space: Space) -> tuple[Dimension, str]:
    if dimension.low >= dimension.high:
        return dimension, "left: it has one value"
    few = _too_few(name, dimension, judged)
    if few:
        return dimension, few
    p = matters(judged, name, space)
    if p >= _P:
        return dimension, f"left: the score does not visibly depend on it (p = {p:.2g})"
    values = sorted(_number(trial.hparams[name]) for trial in judged.good if name in trial.hparams)
    places = [place(name, dimension, value) for value in values]
    # of the ends of an interval, the smallest and largest of k values fall short by this much on average
    margin = max((places[-1] - places[0]) / (len(places) - 1),
                 (_NARROWEST - (places[-1] - places[0])) / 2)  # fmt: skip
    lower, upper = max(places[0] - margin, 0.0), min(places[-1] + margin, 1.0)
    crowded = crowd(name, dimension, judged)
    among = f"the best {len(values)} of {len(placed(judged, {name: dimension})[0])} trials"
    if crowded is None and upper - lower > _WIDEST:
        where = f"{values[0]:.3g} to {values[-1]:.3g}"
        return dimension, f"left: {among} lie almost everywhere in it ({where})"
    low, high = _outward(name, dimension, lower, upper)
    about = []
    if crowded is not None:
        near = f"{crowded.count} of {among} lie at {'most' if crowded.end == 'lower' else 'least'} "
        near += f"{crowded.where:.3g}"
        end = _beyond(name, dimension, crowded.end)
        if crowded.unstable:
            about.append(
                f"{near}, but {crowded.unstable} diverged there: steady the training before going on"
            )
        elif end is None:
            about.append(f"{near}, but it can go no further")
        else:
            about.append(f"{near}, so the {crowded.end} bound is widened")
            low, high = (end, high) if crowded.end == "lower" else (low, end)
    cut = [f"below {values[0]:.3g}"] if low > dimension.low else []
    cut += [f"above {values[-1]:.3g}"] if high < dimension.high else []
    if cut:
        about.append(f"none of {among} is {' or '.join(cut)}")
    if not about:
        return dimension, f"left: {among} reach from end to end"
    kind: Any = type(dimension)
    step = dimension.step
    if step is not None and step > high - low:  # one value is left of a range with steps
        low, high = _at_least_two(dimension, low, high)
    new: Dimension = kind(low, high, log=dimension.log, step=step, when=dimension.when)
    return new, "; ".join(about)


def _number(value: Any) -> float:
    return float(value)


def _outward(name: str, dimension: Float | Int, lower: float, upper: float) -> tuple[float, float]:
    """The values at two places: whole steps, or two digits, rounded away from each other inside the range."""
    low, high = value_at(name, dimension, lower), value_at(name, dimension, upper)
    if dimension.step is None:
        low, high = _two_digits(low, math.floor), _two_digits(high, math.ceil)
        return max(low, dimension.low), min(high, dimension.high)
    step = dimension.step
    first = math.floor((low - dimension.low) / step + 1e-6)
    last = math.ceil((high - dimension.low) / step - 1e-6)
    last = min(last, (dimension.count() or 1) - 1)
    return dimension.low + first * step, dimension.low + last * step


def _two_digits(value: float, rounding: Any) -> float:
    if value == 0:
        return 0.0
    unit = math.floor(math.log10(abs(value))) - 1
    tidy = round(value / 10.0**unit, 6)  # 0.1 / 0.001 is a little more than 100
    return float(f"{rounding(tidy)}e{unit}")


def _at_least_two(dimension: Float | Int, low: float, high: float) -> tuple[float, float]:
    step = dimension.step or 0
    if high + step <= dimension.high:
        return low, high + step
    return max(low - step, dimension.low), high


def _beyond(name: str, dimension: Float | Int, end: str) -> float | None:
    """A bound further out, within what the hyperparameter allows; None where it can go no further."""
    low, high, open_low, open_high = allowed(name)
    if dimension.low >= 0 and math.isinf(low):
        low = 0.0  # what was searched above zero is hardly meant to go below it
    old, limit, is_open = (
        (dimension.low, low, open_low) if end == "lower" else (dimension.high, high, open_high)
    )
    new = value_at(name, dimension, -_WIDENED if end == "lower" else 1 + _WIDENED)
    if dimension.step is not None:
        room = abs(old - limit) / dimension.step + 1e-9
        most = math.inf if math.isinf(room) else math.floor(room) - (is_open and room % 1 < 1e-6)
        steps = min(max(1, round(abs(new - old) / dimension.step)), most)
        return None if steps < 1 else old + (-steps if end == "lower" else steps) * dimension.step
    new = _two_digits(new, math.floor if end == "lower" else math.ceil)
    outside = new < limit if end == "lower" else new > limit
    if outside or (new == limit and is_open):
        new = (old + limit) / 2 if is_open else limit
    return None if new == old else new


# -- choices -------------------------------------------------------------------------------------------


def _choice(name: str, dimension: Choice, judged: Judged, space: Space) -> tuple[Choice, str]:
    if len(dimension.options) < 2:
        return dimension, "left: it has one option"
    few = _too_few(name, dimension, judged)
    if few:
        return dimension, few
    having, _ = placed(judged, {name: dimension})
    codes = [encode(trial.hparams[name]) for trial in having]
    used = {encode(trial.hparams[name]) for trial in judged.good if name in trial.hparams}
    dropped, unsure = {}, []
    for option in dimension.options:
        if encode(option) in used:
            continue
        p, count = worse(judged, name, option, space), codes.count(encode(option))
        if p < _P / len(dimension.options):
            dropped[encode(option)] = f"{encode(option)} ({count} trials, p = {p:.2g})"
        else:
            unsure.append(f"{encode(option)} ({count} trial{'' if count == 1 else 's'})")
    options = [option for option in dimension.options if encode(option) not in dropped]
    about = []
    if dropped:
        about.append(
            f"none of the best {len(judged.good)} trials uses {', '.join(dropped.values())}, and those "
            "trials are worse than the others"
        )
    further = _next_option(name, dimension, judged, space)
    if further is not None:
        value, why = further
        options = [value, *options] if value < options[0] else [*options, value]
        about.append(why)
    if not about:
        if unsure:
            unclear = "but those are not clearly worse than the others"
            return dimension, f"left: no good trial uses {', '.join(unsure)}, {unclear}"
        return dimension, "left: good trials use every option"
    return Choice(options, when=dimension.when), "; ".join(about)


def _next_option(name: str, dimension: Choice, judged: Judged, space: Space) -> tuple[Any, str] | None:
    """Of a rising list of numbers whose best trials crowd at an end, the number that would come next."""
    options = numbers(dimension)
    crowded = crowd(name, dimension, judged) if options is not None and len(options) >= 3 else None
    if options is None or crowded is None or crowded.unstable or matters(judged, name, space) >= _P:
        return None
    last, before = (options[0], options[1]) if crowded.end == "lower" else (options[-1], options[-2])
    grows = options[0] > 0 and options[-1] / options[0] > len(options)  # 1, 10, 100 rather than 1, 2, 3
    value: float = last * last / before if grows else last + (last - before)
    if all(isinstance(option, int) for option in dimension.options):
        value = round(value)
    else:
        value = _two_digits(value, round)
    low, high, open_low, open_high = allowed(name)
    if (value <= low if open_low else value < low) or (value >= high if open_high else value > high):
        return None
    if value == last or (value < 0 <= options[0]):
        return None
    used = f"{crowded.count} of the best {crowded.of} trials use {last:g}, the {crowded.end} end"
    return value, f"{used}, so {value:g} is new"


# -- what holds between dimensions ---------------------------------------------------------------------


def _conditions(dimension: Dimension, new: Space) -> tuple[Dimension | None, str]:
    """The dimension with what is left of its condition; None, and the lost condition, where nothing is."""
    if not dimension.when:
        return dimension, ""
    when = {}
    for parent, values in dimension.when.items():
        kept = tuple(v for v in values if parent in new and new[parent].contains(v))
        if not kept:
            return None, f"{parent} = {_either(values)}"
        when[parent] = kept
    return dataclasses.replace(dimension, when=when), ""


def _either(values: Sequence[Any]) -> str:
    return ", ".join(map(encode, values))


def _with_default(name: str, dimension: Dimension, best: Trial | None) -> Dimension:
    value: Any = dimension.default
    if best is not None and name in best.hparams and dimension.contains(best.hparams[name]):
        value = best.hparams[name]
    fits = value is not None and dimension.contains(value)
    return dataclasses.replace(dimension, default=value if fits else None)
