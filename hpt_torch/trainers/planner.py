"""Which engine trains which trials: a pure function of signatures, device and what is known of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

TOGETHER = ("fused", "compiled")  # the engines that train several trials at once
# Members of one population: beyond it a further member costs as much as the one before.
LARGEST = {"cpu": 32, "elsewhere": 64}
# On the CPU a population trains in one worker. So that more workers have something to do, none has more than
# one of so many parts of a round's work, if that leaves it enough members. (Not of as many as there are
# workers: their number must not change a result.)
_POPULATIONS, _ENOUGH = 4, 8


@dataclass(frozen=True)
class Chunk:
    """Trials of one signature that train together, and how. Recorded before it is acted on."""

    key: str
    trials: tuple[int, ...]
    engine: str  # loop, fused or compiled
    why: str  # in words, for the log
    fold: int | None = None  # of cross-validation, from 0
    start: str = ""  # the key of the state that they go on from; empty: they are new


def plan(
    signatures: Sequence[tuple[int, str]],
    *,
    engine: str,
    device: str,
    slow: frozenset[str],
    traits: Callable[[int], frozenset[str]],
    why_not: Callable[[Sequence[int], str], str | None],
    pays: Callable[[Sequence[int], int], str | None] = lambda trials, groups: None,
    holds: Callable[[Sequence[int]], int | None] = lambda trials: None,
    steps: Callable[[int], int] = lambda trial: 1,
    folds: int = 0,
    fits: int | None = None,
) -> list[Chunk]:
    """The chunks of a round, those that take longest first; with folds, each once a fold.

    signatures: (trial, signature) in order. engine: of the recipe. device: its type. slow: the traits of
    models that train faster one by one (`costs.Costs.slow_together`). traits: of a trial's model. why_not:
    why trials cannot be trained together by this engine. pays: why it pays to compile the step of these
    trials, where the round has so many groups like theirs, or None. holds: how many trials like these the
    memory holds at once, as measured; None: any number. These four are asked only where they matter. steps:
    how many a trial takes in an epoch. fits: how many trials the memory holds, as groups that ran out of it
    have shown.
    """

    def choose(groups: int, trials: Sequence[int]) -> tuple[str, str]:
        return _choose(trials, groups, engine, device, slow, traits, why_not, pays)

    groups: dict[str, list[int]] = {}
    parts = range(folds) if folds else [None]
    for trial, signature in signatures:
        groups.setdefault(signature, []).append(trial)
    chunks = []
    work = len(parts) * sum(steps(trial) for trial, _ in signatures)
    for trials in groups.values():
        share = len(trials) * steps(trials[0]) / work
        split = _split(trials, _largest(len(trials), share, engine, device, fits))
        for part in split:
            for piece, chosen, why in _pieces(part, holds, partial(choose, len(split) * len(parts))):
                for fold in parts:
                    key = f"chunk-{piece[0]}" + ("" if fold is None else f"-fold-{fold}")
                    chunks.append(Chunk(key, tuple(piece), chosen, why, fold))
    # So that no worker is left alone with much in the end.
    return sorted(chunks, key=lambda chunk: (-len(chunk.trials) * steps(chunk.trials[0]), chunk.trials[0]))


def _pieces(
    part: list[int],
    holds: Callable[[Sequence[int]], int | None],
    choose: Callable[[Sequence[int]], tuple[str, str]],
) -> Iterator[tuple[list[int], str, str]]:
    """(trials, engine, why): the part together, or as many of it as the memory holds, or one by one."""
    chosen, why = choose(part)
    most = holds(part) if chosen in TOGETHER else 1
    if most is None or most >= len(part):
        yield part, chosen, why
    elif chosen not in TOGETHER:
        yield from (([trial], chosen, why) for trial in part)
    else:
        for piece in _split(part, max(most, 1)):
            chosen, why = choose(piece) if len(piece) > 1 else ("loop", "")
            yield piece, chosen, f"{why}; trainer.memory holds {most}" if why else "trainer.memory holds one"


def _choose(
    trials: Sequence[int],
    groups: int,
    engine: str,
    device: str,
    slow: frozenset[str],
    traits: Callable[[int], frozenset[str]],
    why_not: Callable[[Sequence[int], str], str | None],
    pays: Callable[[Sequence[int], int], str | None],
) -> tuple[str, str]:
    if engine == "loop":
        return "loop", "asked for"
    if len(trials) == 1:
        return "loop", "the only trial of its signature"
    reason = why_not(trials[:2], "fused")
    if engine == "auto" and reason is None:
        slowing = traits(trials[0]) & slow if slow else slow
        if slowing:
            where = "the CPU" if device == "cpu" else device
            return "loop", f"{' and '.join(sorted(slowing))} train faster one by one on {where}"
    if reason is not None:
        return "loop", f"cannot be mapped over members: {reason}"
    if engine == "fused":
        return "fused", "asked for"
    why = "asked for" if engine == "compiled" else pays(trials, groups)
    hindrance = why and why_not(trials[:2], "compiled")
    if why and not hindrance:
        return "compiled", why
    uncompiled = f"; not compiled: {hindrance}" if hindrance else ""
    return "fused", f"{len(trials)} trials of one signature{uncompiled}"


def _largest(members: int, share: float, engine: str, device: str, fits: int | None) -> int:
    """How many members of a group of this size train together at most. share: of the round's work."""
    if engine == "loop":
        return 1
    largest = LARGEST.get(device, LARGEST["elsewhere"])
    if device == "cpu":
        pieces = max(min(math.ceil(_POPULATIONS * share), max(members // _ENOUGH, 2), members // 2), 1)
        largest = min(largest, -(-members // pieces))
    return largest if fits is None else min(largest, fits)


def _split(trials: Sequence[int], largest: int) -> list[list[int]]:
    """Even parts of at most `largest`."""
    parts = -(-len(trials) // largest)
    bounds = [len(trials) * i // parts for i in range(parts + 1)]
    return [list(trials[a:b]) for a, b in itertools.pairwise(bounds)]
