"""What training together is worth, and compiling: by device and kind of model.

The planner asks which models are slow together, and after how many steps a compiled step has paid. A run
records that when it begins and plans with it to its end, whatever the table says later: `hpt doctor
--calibrate` may measure another one meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 2
# What a model is made of: the traits that trainers tell. "dense": none of the others.
TRAITS = ("convolution", "dense", "gru", "lstm", "rnn")

Figures = Mapping[str, Mapping[str, Mapping[int, float]]]  # by device type, trait and members


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A cost table. ratios[device type][trait][members]: how many times the speed of one by one it has to
    train so many members together; what is not in it counts as fast together. pays_after[device
    type][trait][members]: the steps of one worker of two after which compiling the step has paid; what is not
    in it, and fewer members, are compiled only where the recipe asks for it."""

    ratios: Figures
    pays_after: Figures = field(default_factory=dict)
    measured: str = ""  # when, in ISO 8601; empty: the table that comes with hpt_torch
    torch: str = ""  # the version that it was measured with

    def slow_together(self, device: str) -> frozenset[str]:
        """The traits of models that train faster one by one: those whose median ratio is below 1."""
        table = self.ratios.get(device, {})
        return frozenset(trait for trait, ratio in table.items() if statistics.median(ratio.values()) < 1)

    @property
    def sha256(self) -> str:
        """Of the figures alone, so that when they were measured makes no difference."""
        text = json.dumps([self.ratios, self.pays_after], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_recorded(self, device: str) -> dict[str, Any]:
        """What a run's first event holds of it."""
        pays_after = {
            trait: {str(members): steps for members, steps in row.items()}
            for trait, row in self.pays_after.get(device, {}).items()
        }
        slow = sorted(self.slow_together(device))
        return {"sha256": self.sha256, "slow": slow, "pays_after": pays_after}

    def dumps(self) -> str:
        """As JSON that `loads` reads back."""
        whole = {"format": FORMAT, "measured": self.measured, "torch": self.torch, "sha256": self.sha256}
        figures = {"ratios": self.ratios, "pays_after": self.pays_after}
        return json.dumps({**whole, **figures}, indent=1, sort_keys=True) + "\n"


def loads(text: str) -> Costs:
    """The table that `dumps` wrote. Raises ValueError where it is none, or not as it was written."""
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise ValueError(f"it has format {raw['format']!r}, this version reads {FORMAT}")
        ratios, pays_after = (_figures(raw[name]) for name in ("ratios", "pays_after"))
        costs = Costs(
            ratios=ratios, pays_after=pays_after, measured=str(raw["measured"]), torch=str(raw["torch"])
        )
        recorded = raw["sha256"]
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a cost table ({type(error).__name__}: {error})") from error
    rows = [row for table in (*ratios.values(), *pays_after.values()) for row in table.values()]
    if not all(row and all(0 < figure < float("inf") for figure in row.values()) for row in rows):
        raise ValueError("each trait needs figures above 0")
    if costs.sha256 != recorded:
        raise ValueError("its SHA-256 is not the recorded one")
    return costs


def _figures(raw: Any) -> dict[str, dict[str, dict[int, float]]]:
    return {
        str(device): {
            str(trait): {int(members): float(figure) for members, figure in row.items()}
            for trait, row in table.items()
        }
        for device, table in raw.items()
    }


def saved_after(pays_after: Mapping[str, Mapping[str, float]], traits: Iterable[str], members: int) -> float:
    """The steps after which compiling has paid for so many members of a model, as `Costs.as_recorded` holds
    them: those of the most members that were measured and are not more. Infinity: never, or not known."""
    worst = 0.0
    for trait in traits:
        known = {int(count): steps for count, steps in pays_after.get(trait, {}).items()}
        fitting = [count for count in known if count <= members]
        worst = max(worst, known[max(fitting)] if fitting else math.inf)
    return worst or math.inf


def recorded(begun: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What the run planned with that began with this event; before it was recorded, that was SHIPPED's
    ratios."""
    found: dict[str, Any] = begun.get("costs") or {**SHIPPED.as_recorded(device), "pays_after": {}}
    return found


# One thread of a 2-core x86-64 CPU, torch 2.14 (notebooks/LOG.md), of each kind the larger model that was
# measured. On the CPU vmap turns convolutions into grouped ones, and an LSTM cannot use the kernel that one
# member gets. Nothing is shipped for other devices.
SHIPPED = Costs(
    ratios={
        "cpu": {
            "convolution": {2: 0.54, 8: 0.54, 32: 0.54},
            "dense": {2: 1.2, 8: 1.8, 32: 1.9},
            "gru": {2: 1.1, 8: 1.5, 32: 1.5},
            "lstm": {2: 0.75, 8: 0.75, 32: 0.75},
            "rnn": {2: 1.3, 8: 1.5, 32: 1.3},
        }
    },
    pays_after={"cpu": {"dense": {2: 24_000.0, 8: 20_000.0, 16: 10_000.0, 32: 6000.0}}},
)
