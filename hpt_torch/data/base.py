"""`Rows` (aligned tensors) and `Data` (train, valid, hold-out): what every data set becomes."""

# N rows, B batch, C channels, H height, W width

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hpt_torch.types import TaskError

_CHUNK_ROWS = 8192  # pixels become real numbers this many rows at a time, to bound the memory in between


@dataclass(frozen=True)
class Rows:
    """Tensors with one first dimension of N rows, by name: `inputs`, `targets`, whatever a task reads."""

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise TaskError("rows need at least one tensor")
        counts = {name: len(tensor) if tensor.dim() else -1 for name, tensor in self.tensors.items()}
        if len(set(counts.values())) > 1 or -1 in counts.values():
            raise TaskError(f"all tensors of a split must have the same number of rows, got {counts}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, index: Tensor) -> dict[str, Tensor]:
        """The rows at `index`, shape (B,), as a batch."""
        return {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}

    def slice(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: tensor[start:stop] for name, tensor in self.tensors.items()}

    def to(
        self, device: torch.device, dtype: torch.dtype, *, scale: tuple[Tensor, Tensor] | None = None
    ) -> Rows:
        """On the device; real numbers in `dtype`; images (N, C, H, W) channels-last, the faster layout.

        scale: mean and standard deviation that make uint8 `inputs` real numbers, `(x / 255 - mean) / std`.
        """
        moved = {}
        for name, tensor in self.tensors.items():
            if scale is not None and name == "inputs" and tensor.dtype == torch.uint8:
                tensor = _normalised(tensor, *scale, device, dtype)
            tensor = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            moved[name] = tensor.contiguous(memory_format=_layout(tensor))
        return Rows(moved)


@dataclass(frozen=True)
class Column:
    """What a column of a table was taken for. `str()` says it in words."""

    name: str
    kind: Literal["number", "category", "target"]
    values: tuple[str, ...] = ()  # of a category: one input each; of a target: its classes, or none

    def __str__(self) -> str:
        if self.kind == "target":
            return f"{self.name}: target, " + (
                f"classes {', '.join(self.values)}" if self.values else "number"
            )
        return f"{self.name}: {self.kind}" + (f" ({', '.join(self.values)})" if self.values else "")


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set in three parts. Trials are trained on `train`, scored on `valid`; `holdout` is read once,
    after the search has chosen."""

    train: Rows
    valid: Rows
    holdout: Rows | None = None
    out_features: int = 1  # classes, or values to predict
    name: str = "data"
    mean: Tensor | None = None  # (C, 1, 1), of the train pixels / 255, where `inputs` are uint8 images
    std: Tensor | None = None  # (C, 1, 1)
    classes: tuple[str, ...] = ()  # their names, for display; for text, the characters
    columns: tuple[Column, ...] = ()  # of a table, as they were read: ``print(*data.columns, sep="\n")``

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise TaskError("mean and std must be given together; give both or neither")

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.tensors["inputs"].shape[1:])

    def to(self, device: torch.device, dtype: torch.dtype) -> Data:
        """On the device, as models read it: where there is a mean, uint8 pixels become normalised reals."""
        scale = (self.mean, self.std) if self.mean is not None and self.std is not None else None
        holdout = self.holdout.to(device, dtype, scale=scale) if self.holdout is not None else None
        return dataclasses.replace(
            self,
            train=self.train.to(device, dtype, scale=scale),
            valid=self.valid.to(device, dtype, scale=scale),
            holdout=holdout,
        )

    def fingerprint(self) -> str:
        """SHA-256 over every tensor, so that a run is not continued on other data."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid, self.holdout):
            for name, tensor in sorted(part.tensors.items()) if part is not None else ():
                _digest(digest, name, tensor)
        for name, statistic in (("mean", self.mean), ("std", self.std)):
            if statistic is not None:
                _digest(digest, name, statistic)
        return digest.hexdigest()


def _digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def _normalised(
    pixels: Tensor, mean: Tensor, std: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)  # computed in at least float32, rounded once at the end
    mean, std = mean.to(device, wide), std.to(device, wide)
    reals = torch.empty(pixels.shape, device=device, dtype=dtype, memory_format=_layout(pixels))
    for start in range(0, len(pixels), _CHUNK_ROWS):
        chunk = pixels[start : start + _CHUNK_ROWS].to(device).to(wide)
        reals[start : start + _CHUNK_ROWS] = (chunk / 255 - mean) / std
    return reals
