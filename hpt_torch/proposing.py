"""What is tried next: the rounds of the sampler, and in between the points that were added by hand.

A sampler counts its own trials only, so that an added one takes no place of its sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hpt_torch import samplers
from hpt_torch.points import queue
from hpt_torch.recipe import Recipe, second_of
from hpt_torch.record import Record
from hpt_torch.seeding import derive_seed
from hpt_torch.steered import steered
from hpt_torch.types import HParams, Objective


@dataclass(frozen=True, kw_only=True)
class Round:
    """Trials that are proposed at once."""

    number: int  # of the sampler's round; that of added points is the one before them
    points: Mapping[int, HParams]  # by trial
    added: bool = False  # by hand


def next_round(
    record: Record, recipe: Recipe, objective: Objective, *, size: int, budget: int | None
) -> Round | None:
    """The next trials, or None where none are left. size: of a round; budget: trials of the sampler."""
    first, so_far = len(record.trials), steered(record)
    asked = first - so_far.added
    if asked and so_far.added < len(so_far.points):
        which = range(so_far.added, len(so_far.points))
        found = _added(record, recipe, objective, so_far.points, which, size)
        return Round(number=(asked - 1) // size, points=dict(enumerate(found, start=first)), added=True)
    if budget is not None and asked >= budget:
        return None
    number, search = asked // size, recipe.search
    end = (number + 1) * size
    threads = torch.get_num_threads()
    found = samplers.suggest(
        recipe.space,
        record.in_order(),
        range(asked, end if budget is None else min(end, budget)),
        round=number,
        kind=search.sampler,
        objective=objective,
        second=second_of(recipe),
        size=size,
        seed=recipe.seed,
        queue=queue(recipe.space, search.points, start_with_defaults=search.start_with_defaults),
    )
    torch.set_num_threads(threads)  # Optuna's GP sampler changes it while it fits
    return Round(number=number, points=dict(enumerate(found, start=first)))


def _added(
    record: Record, recipe: Recipe, objective: Objective, points: Sequence[HParams], which: range, size: int
) -> list[HParams]:
    """These of the points, completed: what a point leaves open comes from the sampler, or from chance where
    that has a fixed sequence."""
    kind = recipe.search.sampler
    return samplers.suggest(
        recipe.space,
        record.in_order(),
        which,
        round=len(record.trials),  # after all that there are
        kind="random" if kind in ("grid", "qmc") else kind,
        objective=objective,
        second=second_of(recipe),
        size=size,
        seed=derive_seed(recipe.seed, "added", bits=32),
        queue=queue(recipe.space, points, start_with_defaults=False),
    )
