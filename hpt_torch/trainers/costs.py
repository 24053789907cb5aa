"""What training together is worth: its speed over that of one by one, by device and kind of model.

The planner asks only which models are slow together. A run records that when it begins and plans with it to
its end, whatever the table says later: `hpt doctor --calibrate` may measure another one meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = 1
# What a model is made of: the traits that trainers tell. "dense": none of the others.
TRAITS = ("convolution", "dense", "gru", "lstm", "rnn")

Ratios = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A cost table. ratios[device type][trait][members]: how many times the speed of one by one it has to
    train so many members together. What is not in it counts as fast together."""

    ratios: Ratios
    measured: str = ""  # when, in ISO 8601; empty: the table that comes with hpt_torch
    torch: str = ""  # the version that it was measured with

    def slow_together(self, device: str) -> frozenset[str]:
        """The traits of models that train faster one by one: those whose median ratio is below 1."""
        table = self.ratios.get(device, {})
        return frozenset(trait for trait, ratio in table.items() if statistics.median(ratio.values()) < 1)

    @property
    def sha256(self) -> str:
        """Of the ratios alone, so that when they were measured makes no difference."""
        text = json.dumps(self.ratios, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_recorded(self, device: str) -> dict[str, Any]:
        """What a run's first event holds of it."""
        return {"sha256": self.sha256, "slow": sorted(self.slow_together(device))}

    def dumps(self) -> str:
        """As JSON that `loads` reads back."""
        whole = {"format": FORMAT, "measured": self.measured, "torch": self.torch, "sha256": self.sha256}
        return json.dumps({**whole, "ratios": self.ratios}, indent=1, sort_keys=True) + "\n"


def loads(text: str) -> Costs:
    """The table that `dumps` wrote. Raises ValueError where it is none, or not as it was written."""
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise ValueError(f"it has format {raw['format']!r}, this version reads {FORMAT}")
        ratios = {
            str(device): {
                str(trait): {int(members): float(ratio) for members, ratio in row.items()}
                for trait, row in table.items()
            }
            for device, table in raw["ratios"].items()
        }
        costs = Costs(ratios=ratios, measured=str(raw["measured"]), torch=str(raw["torch"]))
        recorded = raw["sha256"]
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a cost table ({type(error).__name__}: {error})") from error
    rows = [row for table in ratios.values() for row in table.values()]
    if not all(row and all(0 < ratio < float("inf") for ratio in row.values()) for row in rows):
        raise ValueError("each trait needs ratios above 0")
    if costs.sha256 != recorded:
        raise ValueError("its SHA-256 is not the recorded one")
    return costs


def recorded(begun: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What the run planned with that began with this event; before it was recorded, that was SHIPPED."""
    found: dict[str, Any] = begun.get("costs") or SHIPPED.as_recorded(device)
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
    }
)
