"""`Population`: the training state of P members of one signature, stacked along a first dimension."""

# P members

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpt_torch.types import HParams

GROUPS = ("params", "buffers", "slots", "kept", "sums")
PLACES = ("step", "epoch", "batch", "active", "best", "best_epoch")


@dataclass(kw_only=True)
class Population:
    """Everything that training changes, and where each member stands.

    params, buffers: name -> (P, *shape); slots: "exp_avg/name" -> (P, *shape), the optimizer's state (and
    "ema/name", the averaged weights); kept: name -> (P, *shape), the weights of each member's best epoch,
    empty where the last ones are kept; sums: name -> (P,), what the current epoch has added up so far.
    """

    trials: list[int]
    hparams: list[HParams]  # each member's full hyperparameters, static and dynamic
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    slots: dict[str, Tensor]
    kept: dict[str, Tensor]
    sums: dict[str, Tensor]
    step: list[int] = field(default_factory=list)  # optimizer steps taken, a member's own count
    epoch: list[int] = field(default_factory=list)  # whole epochs trained
    batch: list[int] = field(default_factory=list)  # batches into the next epoch
    active: list[bool] = field(default_factory=list)
    best: list[float | None] = field(default_factory=list)  # score of the best epoch
    best_epoch: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trials)

    def __post_init__(self) -> None:
        for name in PLACES:
            if not getattr(self, name):
                start = {"active": True, "best": None}.get(name, 0)
                setattr(self, name, [start] * len(self))

    def stacks(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for group in GROUPS:
            yield group, getattr(self, group)

    def copy(self) -> Population:
        """Another population of the same members, in memory of its own."""
        stacks: Any = {group: {n: t.clone() for n, t in tensors.items()} for group, tensors in self.stacks()}
        places: Any = {name: list(getattr(self, name)) for name in PLACES}
        return Population(trials=list(self.trials), hparams=list(self.hparams), **stacks, **places)

    def member(self, i: int) -> dict[str, dict[str, Tensor]]:
        """Views of member i's tensors, by group."""
        return {group: {name: tensor[i] for name, tensor in stack.items()} for group, stack in self.stacks()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which `restore` makes the same population."""
        tensors = {f"{group}/{name}": t for group, stack in self.stacks() for name, t in stack.items()}
        return tensors, {name: list(getattr(self, name)) for name in ("trials", *PLACES)}

    def take(self, rows: Sequence[int]) -> Population:
        """A population of these members, in memory of its own."""
        index = torch.tensor(list(rows), device=next(iter(self.params.values())).device)
        stacks: Any = {
            group: {name: t.index_select(0, index) for name, t in tensors.items()}
            for group, tensors in self.stacks()
        }
        lists: Any = {name: [getattr(self, name)[i] for i in rows] for name in ("trials", "hparams", *PLACES)}
        return Population(**lists, **stacks)

    def put(self, rows: Sequence[int], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over the saved state of some of its members. Raises ValueError if it is of others."""
        if list(meta["trials"]) != [self.trials[i] for i in rows]:
            raise ValueError(f"the state is of trials {meta['trials']}, not of those at {list(rows)}")
        index = torch.tensor(list(rows), device=next(iter(self.params.values())).device)
        for group, stack in self.stacks():
            for name, tensor in stack.items():
                tensor.index_copy_(0, index, tensors[f"{group}/{name}"].to(tensor.device))
        for name in PLACES:
            for i, value in zip(rows, meta[name], strict=True):
                getattr(self, name)[i] = value

    def copy_members(self, sources: Mapping[int, int]) -> None:
        """Makes each key's member what the member at its value is: weights, buffers, moments, progress.
        All are copies of what was there before. Hyperparameters and trial numbers stay."""
        if not sources:
            return
        device = next(iter(self.params.values())).device
        targets, origins = (torch.tensor(list(part), device=device) for part in (sources, sources.values()))
        for _, stack in self.stacks():
            for tensor in stack.values():
                tensor[targets] = tensor[origins]
        for name in PLACES:
            values = list(getattr(self, name))
            for target, source in sources.items():
                getattr(self, name)[target] = values[source]

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over a saved state in place. Raises ValueError unless it is one of these same members."""
        if list(meta["trials"]) != self.trials:
            raise ValueError(f"the state is of trials {meta['trials']}, not {self.trials}")
        expected = {f"{group}/{name}": t for group, stack in self.stacks() for name, t in stack.items()}
        if {k: t.shape for k, t in expected.items()} != {k: t.shape for k, t in tensors.items()}:
            raise ValueError("the state's tensors are not those of this model")
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
        for name in PLACES:
            setattr(self, name, list(meta[name]))


def stack(members: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """name -> (P, *shape) from P mappings name -> shape, on the device."""
    return {name: torch.stack([member[name] for member in members]).to(device) for name in members[0]}
