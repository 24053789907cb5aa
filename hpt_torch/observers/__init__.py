"""Observers show a run while it goes on. What they write is derived from the record and can be deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hpt_torch.record import Event
    from hpt_torch.tuner import Tuner


class Observer(Protocol):
    """Sees what is recorded, after it was. Nothing it writes is needed to go on."""

    def started(self, tuner: Tuner) -> None: ...

    def recorded(self, tuner: Tuner, events: Sequence[Event]) -> None: ...

    def ended(self, tuner: Tuner) -> None: ...

    def say(self, line: str) -> None: ...
