"""Checks of the search space: where trials fail, best values at an edge, what matters, what acts together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hpt_torch.evidence import (
    FEWEST_TRIALS,
    Array,
    Judged,
    allowed,
    columns,
    context,
    crowd,
    diverged,
    explained,
    matters,
    numbers,
    place,
    placed,
)
from hpt_torch.report import findings
from hpt_torch.report.findings import Finding, Importance
from hpt_torch.report.summary import Summary
from hpt_torch.report.terminal import show_value
from hpt_torch.space import Choice, Dimension, encode
from hpt_torch.types import Trial, TrialState, is_number

_P = 0.01  # of a test, before anything is said
_LITTLE, _MUCH = 0.05, 0.1  # of the importance
_INSIGHT = "Identifying scientific, nuisance, and fixed hyperparameters"


def divergence(summary: Summary) -> Finding | None:
    """The share of trials that diverged, and where ("What fraction of the trials is infeasible?")."""
    bad = [trial for trial in summary.trials if diverged(trial)]
    others = [t for t in summary.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    count = len(bad) + len(others)
    if len(bad) < 2 or len(bad) < 0.05 * count:
        return None
    known = {*summary.space, *summary.fixed}
    steadier = [name for name in ("warmup_epochs", "grad_clip_norm") if name in known]
    calm = f"steady the training with {' or '.join(steadier)}" if steadier else "clip its gradients"
    region = _where(summary, bad, others)
    share = f"{len(bad)} of {count} trials diverged ({len(bad) / count:.0%})"
    check = "What fraction of the trials is infeasible?"
    if region is None:
        text = (
            f"{share}, in no part of the space more than in another: {calm}, or look for a bug in the loss."
        )
        return Finding("divergence", text, check)
    best = None if summary.best is None else summary.best.hparams.get(region.name)
    if best is not None and region.beside(best):
        near = f"and the best trial is just beside them ({region.name} = {show_value(best)})"
        text = f"{share}, {region.text}, {near}: {calm}, for a value among them may then be best."
        return Finding("divergence", text, "How can optimization failures be debugged and mitigated?")
    return Finding("divergence", f"{share}, {region.text}: {region.remedy}, or {calm}.", check)


def infeasible(summary: Summary) -> Finding | None:
    """The share of trials whose hyperparameters allow no model, and where (same section)."""
    bad = [trial for trial in summary.trials if trial.state is TrialState.INFEASIBLE]
    others = [t for t in summary.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    count = len(bad) + len(others)
    if len(bad) < 2 or len(bad) < 0.1 * count:
        return None
    region = _where(summary, bad, others)
    reason = findings.last_line(bad[0].reason)[:150]
    where = "" if region is None else f", {region.text}"
    remedy = "leave such combinations out of the space" if region is None else region.remedy
    return Finding(
        "infeasible",
        f"{len(bad)} of {count} trials allow no model{where} (the first: {reason}): {remedy}.",
        "What fraction of the trials is infeasible?",
    )


@dataclass(frozen=True)
class _Region:
    """A part of the space in which trials end badly."""

    name: str
    dimension: Dimension
    p: float
    text: str  # "6 of them where lr is at least 0.031, 6 of the 9 there"
    remedy: str
    edge: float = math.nan  # its place in the range

    def beside(self, value: Any) -> bool:
        return abs(place(self.name, self.dimension, value) - self.edge) <= 0.1


def _where(summary: Summary, bad: Sequence[Trial], others: Sequence[Trial]) -> _Region | None:
    """The half-range or option that sets them apart most, where chance would hardly (Fisher's exact test)."""
    regions = []
    for name, dimension in summary.space.items():
        mine = [t.hparams[name] for t in bad if name in t.hparams]
        rest = [t.hparams[name] for t in others if name in t.hparams]
        if not mine or not rest:
            continue
        found = (
            _option(name, dimension, mine, rest)
            if isinstance(dimension, Choice)
            else _half(name, dimension, mine, rest)
        )
        regions += [] if found is None else [found]
    regions = [region for region in regions if region.p < _P / len(summary.space)]
    return min(regions, key=lambda region: region.p, default=None)


def _option(name: str, dimension: Choice, bad: Sequence[Any], rest: Sequence[Any]) -> _Region | None:
    options = []
    for option in dimension.options:
        inside = [sum(encode(v) == encode(option) for v in values) for values in (bad, rest)]
        p = _fisher(inside, (len(bad), len(rest))) * len(dimension.options)
        options.append((p, show_value(option), inside))
    p, option, (hit, missed) = min(options)
    text = f"{hit} of them with {name} = {option}, {hit} of the {hit + missed} with it"
    return _Region(name, dimension, p, text, f"drop {name} = {option}")


def _half(name: str, dimension: Dimension, bad: Sequence[Any], rest: Sequence[Any]) -> _Region | None:
    """The cut with the largest difference between the shares of both kinds on one side (Youden's J)."""
    a, b = ([p for v in vs if not math.isnan(p := place(name, dimension, v))] for vs in (bad, rest))
    if not a or not b:
        return None
    cuts = []
    for cut in sorted(set(a)):
        for upper in (True, False):
            inside = [sum(x >= cut if upper else x <= cut for x in xs) for xs in (a, b)]
            cuts.append((inside[0] / len(a) - inside[1] / len(b), cut, upper, inside))
    _, cut, upper, inside = max(cuts)
    p = min(1.0, _fisher(inside, (len(a), len(b))) * 2 * len(set(a)))
    values = [v for v in bad if place(name, dimension, v) == cut]
    side, bound = ("at least", "upper") if upper else ("at most", "lower")
    text = f"{inside[0]} of them where {name} is {side} {show_value(values[0])}, "
    text += f"{inside[0]} of the {sum(inside)} there"
    verb = "lower" if upper else "raise"
    remedy = f"{verb} {name}'s {bound} bound to {show_value(values[0])}"
    return _Region(name, dimension, p, text, remedy, cut)


def _fisher(inside: Sequence[int], all_: Sequence[int]) -> float:
    table = [[inside[0], all_[0] - inside[0]], [inside[1], all_[1] - inside[1]]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def edges(summary: Summary, judged: Judged) -> list[Finding]:
    """Best at the edge of the space ("Identifying bad search space boundaries")."""
    if not judged.enough:
        return []
    found = []
    for name, dimension in summary.space.items():
        at = crowd(name, dimension, judged)
        if at is None or at.unstable or matters(judged, name, summary.space) >= _P:
            continue
        ends = (
            (dimension.options[0], dimension.options[-1])
            if isinstance(dimension, Choice)
            else (dimension.low, dimension.high)
        )
        end = ends[at.end == "upper"]
        if end == allowed(name)[at.end == "upper"]:
            continue  # there is nothing beyond it
        side = "" if isinstance(dimension, Choice) else "at most " if at.end == "lower" else "at least "
        found.append(
            Finding(
                "edge",
                f"{name}'s best values sit at its {at.end} end: {at.count} of the best {at.of} of "
                f"{len(judged.trials)} trials have {side}{at.where:.3g} (searched: {ends[0]:g} to "
                f"{ends[1]:g}): search on beyond {end:g} (hpt refine proposes a space).",
                "Identifying bad search space boundaries",
            )
        )
    return found


# -- what was learned ----------------------------------------------------------------------------------


def confounded(summary: Summary, judged: Judged) -> Finding | None:
    """Batch size confounded with lr ("Why shouldn't the batch size be used to directly improve validation
    set performance?": the optimizer's hyperparameters must be tuned for each batch size)."""
    space = summary.space
    check = "Why shouldn't the batch size be used to directly improve validation set performance?"
    size = space.get("batch_size")
    if size is None or (size.count() or 2) < 2 or not judged.enough:
        return None
    if "lr" not in space:
        if "lr" not in summary.fixed or matters(judged, "batch_size", space) >= _P:
            return None
        return Finding(
            "confounded",
            f"batch_size was searched at one lr ({show_value(summary.fixed['lr'])}), and each batch size has "
            "a best lr of its own, so its effect is also that of lr: search lr too.",
            check,
        )
    trials, _ = placed(judged, {"lr": space["lr"], "batch_size": size})
    rates, sizes = ([t.hparams[name] for t in trials] for name in ("lr", "batch_size"))
    both = [(a, b) for a, b in zip(rates, sizes, strict=True) if is_number(a) and is_number(b)]
    if len(both) < FEWEST_TRIALS or any(len(set(values)) < 2 for values in zip(*both, strict=True)):
        return None
    rho, p = stats.spearmanr(*zip(*both, strict=True))
    if abs(rho) < 0.5 or p >= _P:
        return None
    return Finding(
        "confounded",
        f"lr and batch_size went together over the trials (Spearman {rho:+.2f}, {len(both)} trials), so "
        "which of them made the score cannot be told: compare batch sizes in runs with batch_size fixed, "
        "each at its own best lr.",
        check,
    )


def interaction(summary: Summary, judged: Judged) -> Finding | None:
    """Which two hyperparameters interact ("Identifying scientific, nuisance, and fixed hyperparameters": one
    that interacts must be tuned together with the other, not fixed).

    An F-test of the product of two terms beyond cubics of each alone, over the ranks of the scores.
    """
    if not judged.enough:
        return None
    names, pairs = list(summary.space), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            first, second = summary.space[a], summary.space[b]
            trials, scores = placed(judged, {a: first, b: second})
            if len(trials) < FEWEST_TRIALS:
                continue
            one, two = columns(a, first, trials), columns(b, second, trials)
            x, y = _line(a, first, trials), _line(b, second, trials)
            product = (x[:, :, None] * y[:, None, :]).reshape(len(trials), -1)
            alone = np.hstack([one, two, context(summary.space, trials, a, b)])
            share, p = explained(scores, alone, product)
            design = np.hstack([np.ones((len(trials), 1)), alone, product])
            slope = (
                float(np.linalg.lstsq(design, scores, rcond=None)[0][-1]) if product.shape[1] == 1 else 0.0
            )
            pairs.append((p, -share, a, b, slope, len(trials)))
    if not pairs:
        return None
    p, share, a, b, slope, count = min(pairs)
    if p >= _P / len(pairs) or -share < 0.05:
        return None
    ordered = all(not isinstance(d, Choice) or numbers(d) for d in (summary.space[a], summary.space[b]))
    how = f": a high {a} goes with a {'high' if slope > 0 else 'low'} {b}" if ordered else ""
    return Finding(
        "interaction",
        f"{a} and {b} act together{how} (that explains {-share:.0%} of the ranks of {count} trials beyond "
        "what each does alone): tune them together, and do not fix one while you search the other.",
        _INSIGHT,
    )


def _line(name: str, dimension: Dimension, trials: Sequence[Trial]) -> Array:
    """(trials, k): the place in the range; of a choice without order, a column an option."""
    if isinstance(dimension, Choice) and numbers(dimension) is None:
        return columns(name, dimension, trials)
    return np.array([[place(name, dimension, trial.hparams[name]) - 0.5] for trial in trials])


def importance(summary: Summary, known: Importance) -> Finding | None:
    """Which hyperparameters matter, where PED-ANOVA and fANOVA agree (same section: what matters little is
    fixed)."""
    shares, whole = known.best, known.whole
    main = [name for name, share in shares.items() if min(share, whole.get(name, 0.0)) >= _MUCH][:3]
    if len(shares) < 2 or not main:
        return None
    little = [name for name, share in shares.items() if max(share, whole.get(name, 0.0)) < _LITTLE]
    listed = ", ".join(f"{name} (PED-ANOVA {shares[name]:.0%}, fANOVA {whole[name]:.0%})" for name in main)
    text = f"The best of {len(summary.ranked)} trials differ from the others mostly in {listed}"
    if little:
        verb, them = ("matters", "it") if len(little) == 1 else ("matter", "them")
        text += (
            f"; {', '.join(little)} {verb} little (below {_LITTLE:.0%} in both): fix {them} to search the "
        )
        text += "others more densely"
    return Finding("importance", f"{text}.", _INSIGHT)
