"""Promotion: a trial that ASHA stopped goes on from there once it is among the best after all.

Li et al. 2020 (arXiv 1810.05934): who reaches a rung is compared with all that ever do, and the number that
passes grows with them. For that the states of the best that were stopped are kept, a few a rung.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from hpt_torch.executors.segment import Segment, State
from hpt_torch.record import Event, Record
from hpt_torch.schedulers import Halving, Pruner
from hpt_torch.trainers.planner import Chunk

if TYPE_CHECKING:
    from hpt_torch.tuner import Tuner

KEPT = 8  # states at a rung


def promotes(pruner: Pruner | None) -> TypeGuard[Halving]:
    return isinstance(pruner, Halving) and pruner.kind == "asha"


def paused(record: Record) -> dict[int, list[int]]:
    """By rung: the trials that wait there with their states, best first."""
    found: dict[int, list[int]] = {}
    for event in record.events:
        if event.kind == "pruning" and "kept" in event.body:
            found[event.body["epoch"]] = list(event.body["kept"])
        elif event.kind == "promotion":
            for number, epoch in event.body["trials"]:
                found[epoch].remove(number)
    return found


def arrivals(record: Record) -> dict[int, int]:
    """The trials that were promoted into the last round, and after which epoch each goes on."""
    plan, promotion = record.last("plan"), record.last("promotion")
    if plan is None or promotion is None or promotion.seq < plan.seq:
        return {}
    return {number: epoch for number, epoch in promotion.body["trials"]}


def promotions(tuner: Tuner, round: int) -> tuple[list[Event], list[Chunk]]:
    """Who goes on in this round, as an event to be committed behind its plan, and how they train."""
    pruner, record = tuner.pruner, tuner.record
    if not promotes(pruner):
        return [], []
    trials, found = record.in_order(), list[tuple[int, int]]()
    for epoch, waiting in sorted(paused(record).items(), reverse=True):
        open_still = [n for n in waiting if n not in tuner.steered.stopped]
        going = pruner.promoted(open_still, trials, epoch, tuner.objective, tuner.recipe.seed)
        found += [(number, epoch) for number in going]
    chunks = []
    for number, epoch in found:
        for fold in _folds(tuner):
            key, why = _key(number, fold), f"promoted after epoch {epoch}"
            chunks.append(Chunk(f"{key}-from-{epoch}", (number,), "loop", why, fold, key))
    body = {"round": round, "trials": [list(pair) for pair in found]}
    return [Event(kind="promotion", body=body)] if found else [], chunks


def keep(
    tuner: Tuner, epoch: int, stopped: Sequence[int], segments: Sequence[Segment]
) -> tuple[list[int], list[Event], list[str]]:
    """Who waits at this rung from now on; the states that are written for it; the keys of states that are not
    kept any more. stopped: who is stopped there now; segments: with the states of their training there."""
    before = paused(tuner.record).get(epoch, [])
    assert promotes(tuner.pruner)
    ranked = tuner.pruner.ranked(tuner.record.in_order(), epoch, tuner.objective, tuner.recipe.seed)
    near = ranked[: 2 * tuner.pruner.passing(len(ranked))]  # who is further behind will hardly be promoted
    waiting = [number for number in near if number in before or number in stopped][:KEPT]
    events = [
        tuner.save(_key(number, segment.fold), _row(segment.state, number))
        for segment in segments
        for number in segment.trials
        if number in waiting and number in stopped and segment.state is not None
    ]
    gone = [_key(number, fold) for number in before if number not in waiting for fold in _folds(tuner)]
    return waiting, events, gone


def needed(record: Record) -> set[str]:
    """The keys of states from which somebody may go on, or has gone on."""
    waiting = {number for numbers in paused(record).values() for number in numbers}
    trials = [record.trials[number] for number in waiting]
    keys = {_key(t.number, fold) for t in trials for fold in (range(len(t.folds)) if t.folds else [None])}
    plans = [chunk for plan in record.of_kind("plan") for chunk in plan.body["chunks"]]
    return keys | {chunk["start"] for chunk in plans if chunk.get("start")}


def _folds(tuner: Tuner) -> Sequence[int | None]:
    return range(tuner.folds) if tuner.folds else [None]


def _key(trial: int, fold: int | None) -> str:
    """Under which the state of a trial that waits is kept."""
    return f"paused-{trial}" + ("" if fold is None else f"-fold-{fold}")


def _row(state: State, trial: int) -> State:
    """One member of a population's state."""
    tensors, meta = state
    i = meta["trials"].index(trial)
    own: dict[str, Any] = {name: [values[i]] for name, values in meta.items()}
    return {name: tensor[i : i + 1].clone() for name, tensor in tensors.items()}, own
