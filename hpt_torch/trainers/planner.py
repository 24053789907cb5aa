"""Which engine trains which trials: a pure function of signatures, device and what is known of the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LARGEST = 64  # members of one population: beyond it a further member costs as much as the one before
# The smallest population that trains faster together than one after another, measured on digits and
# Fashion-MNIST MLPs (notebooks/LOG.md): eager vmap has a fixed cost a step that few members do not repay.
SMALLEST = {"cpu": 8, "cuda": 2, "mps": 2}
# On the CPU vmap turns convolutions into grouped ones, and LSTMs into a loop over steps; both are slower than
# the kernels that one member gets.
SLOW_TOGETHER_ON_CPU = frozenset({"convolution", "lstm"})


@dataclass(frozen=True)
class Chunk:
    """Trials of one signature that train together, and how. Recorded before it is acted on."""

    key: str
    trials: tuple[int, ...]
    engine: str  # loop, or fused
    why: str  # in words, for the log


def plan(
    signatures: Sequence[tuple[int, str]],
    *,
    engine: str,
    device: str,
    traits: Callable[[int], frozenset[str]],
    why_not: Callable[[Sequence[int]], str | None],
) -> list[Chunk]:
    """The chunks of a round, in the order of their first trials.

    signatures: (trial, signature) in order. engine: auto, loop or fused. device: its type. traits: of a
    trial's model; why_not: why trials cannot be mapped together. Both are asked only where they matter.
    """
    groups: dict[str, list[int]] = {}
    for trial, signature in signatures:
        groups.setdefault(signature, []).append(trial)
    chunks = []
    for trials in groups.values():
        for part in _split(trials, 1 if engine == "loop" else LARGEST):
            chosen, why = _choose(part, engine, device, traits, why_not)
            pieces = [part] if chosen == "fused" else [[trial] for trial in part]
            chunks += [Chunk(f"chunk-{piece[0]}", tuple(piece), chosen, why) for piece in pieces]
    return sorted(chunks, key=lambda chunk: chunk.trials[0])


def _choose(
    trials: Sequence[int],
    engine: str,
    device: str,
    traits: Callable[[int], frozenset[str]],
    why_not: Callable[[Sequence[int]], str | None],
) -> tuple[str, str]:
    if engine == "loop":
        return "loop", "asked for"
    if len(trials) == 1:
        return "loop", "the only trial of its signature"
    if engine == "auto":
        smallest = SMALLEST.get(device, 2)
        if len(trials) < smallest:
            return "loop", f"fewer than {smallest} trials of one signature"
        slow = traits(trials[0]) & SLOW_TOGETHER_ON_CPU if device == "cpu" else frozenset()
        if slow:
            return "loop", f"{' and '.join(sorted(slow))} train faster one by one on the CPU"
    if reason := why_not(trials[:2]):
        return "loop", f"cannot be mapped over members: {reason}"
    return "fused", "asked for" if engine == "fused" else f"{len(trials)} trials of one signature"


def _split(trials: Sequence[int], largest: int) -> list[list[int]]:
    """Even parts of at most `largest`."""
    parts = -(-len(trials) // largest)
    bounds = [len(trials) * i // parts for i in range(parts + 1)]
    return [list(trials[a:b]) for a, b in itertools.pairwise(bounds)]
