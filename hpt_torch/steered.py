"""What was asked of a run by hand so far, as its record has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpt_torch.record import Record
from hpt_torch.types import HParams


@dataclass(frozen=True, kw_only=True)
class Steered:
    """Of one run."""

    points: Sequence[HParams]  # added
    added: int  # how many of them are trials
    trials: int  # by which its number of trials is extended
    seconds: float  # by which its time is
    stopped: frozenset[int]  # trials


def steered(record: Record) -> Steered:
    extensions = [event.body for event in record.of_kind("extend")]
    return Steered(
        points=[event.body["point"] for event in record.of_kind("add")],
        added=sum(event.body.get("added", False) for event in record.of_kind("trial")),
        trials=sum(body["trials"] for body in extensions),
        seconds=sum(body["seconds"] for body in extensions),
        stopped=frozenset(event.body["trial"] for event in record.of_kind("stop")),
    )
