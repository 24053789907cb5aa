"""`Part` (what trainers read), `Rows` (a part in memory), `Data` (train, valid, hold-out)."""

# N rows, B batch, C channels, H height, W width

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hpt_torch.types import TaskError

GATHER = 16  # batches that are gathered at once
_CHUNK_ROWS = 8192  # rows are converted this many at a time, to bound the memory in between


class Part(abc.ABC):
    """N rows of named tensors (`inputs`, `targets`, whatever a task reads), given out in batches."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where the batches are."""

    @functools.cached_property
    def has_images(self) -> bool:
        """Whether batches have tensors (B, C, H, W), which are laid out channels-last."""
        return any(tensor.dim() == 4 for tensor in self.first().values())

    @abc.abstractmethod
    def first(self) -> dict[str, Tensor]:
        """The first row as a batch of one, as it was given: for shapes and dtypes."""

    @abc.abstractmethod
    def select(self, index: Tensor) -> dict[str, Tensor]:
        """The rows at `index`, shape (B,), as a batch."""

    @abc.abstractmethod
    def slice(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows that lie together, as a batch: a copy, into which a model may write."""

    @abc.abstractmethod
    def batches(
        self, order: Tensor | None, size: int, start: int = 0
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(i, batch i) from batch `start` on, each of `size` rows (the last of what is left).

        order: the row numbers, shape (B,); None takes all rows as they lie.
        """

    @abc.abstractmethod
    def subset(self, index: Tensor) -> Part:
        """The rows at `index`, shape (B,), as a part of the same kind."""

    @abc.abstractmethod
    def to(
        self, device: torch.device, dtype: torch.dtype, *, scale: tuple[Tensor, Tensor] | None = None
    ) -> Part:
        """On the device; real numbers in `dtype`; images (N, C, H, W) channels-last, the faster layout.

        scale: mean and standard deviation that make uint8 `inputs` real numbers, `(x / 255 - mean) / std`.
        """

    @abc.abstractmethod
    def digest(self, digest: Any) -> None:
        """Feeds the hash with what tells these rows from others."""

    def close(self) -> None:  # noqa: B027 - nothing to let go of, unless a part says so
        """Lets go of what is held for reading (processes)."""


@dataclass(frozen=True)
class Rows(Part):
    """Tensors with one first dimension of N rows, by name: `inputs`, `targets`, whatever a task reads.

    >>> import torch, hpt_torch as hpt
    >>> len(hpt.Rows({"inputs": torch.zeros(5, 3), "targets": torch.zeros(5)}))
    5
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise TaskError("rows need at least one tensor")
        counts = {name: len(tensor) if tensor.dim() else -1 for name, tensor in self.tensors.items()}
        if len(set(counts.values())) > 1 or -1 in counts.values():
            raise TaskError(f"all tensors of a split must have the same number of rows, got {counts}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def first(self) -> dict[str, Tensor]:
        return self.slice(0, 1)

    def select(self, index: Tensor) -> dict[str, Tensor]:
        """The rows at `index`, shape (B,), as a batch."""
        return {name: _selected(tensor, index) for name, tensor in self.tensors.items()}

    def slice(self, start: int, stop: int) -> dict[str, Tensor]:
        return {name: tensor[start:stop].clone() for name, tensor in self.tensors.items()}

    def batches(
        self, order: Tensor | None, size: int, start: int = 0
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """As `Part.batches`. Several are gathered at once, always the same ones together, so that a batch
        lies where it lay when an epoch is continued in its middle."""
        rows, gathered, block = len(self) if order is None else len(order), self.tensors, -1
        for index in range(start, -(-rows // size)):
            if order is None:
                yield index, self.slice(index * size, (index + 1) * size)
                continue
            first = index - index % GATHER
            if first != block:
                gathered, block = self.select(order[first * size : (first + GATHER) * size]), first
            mine = slice((index - first) * size, (index - first + 1) * size)
            yield index, {name: tensor[mine] for name, tensor in gathered.items()}

    def subset(self, index: Tensor) -> Rows:
        return Rows(self.select(index.to(self.device)))

    def to(
        self, device: torch.device, dtype: torch.dtype, *, scale: tuple[Tensor, Tensor] | None = None
    ) -> Rows:
        moved = {}
        for name, tensor in self.tensors.items():
            if scale is not None and name == "inputs" and tensor.dtype == torch.uint8:
                tensor = normalised(tensor, *scale, device, dtype)
            elif tensor.device != device:
                tensor = _carried(tensor, device, dtype if tensor.is_floating_point() else tensor.dtype)
            elif tensor.is_floating_point():
                tensor = tensor.to(dtype)
            moved[name] = tensor.contiguous(memory_format=layout(tensor))
        return Rows(moved)

    def digest(self, digest: Any) -> None:
        for name, tensor in sorted(self.tensors.items()):
            digest_tensor(digest, name, tensor)


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
    after the search has chosen.

    >>> import torch, hpt_torch as hpt
    >>> rows = hpt.Rows({"inputs": torch.zeros(6, 3), "targets": torch.tensor([0, 1, 2, 0, 1, 2])})
    >>> hpt.Data(train=hpt.Rows(rows.slice(0, 4)), valid=hpt.Rows(rows.slice(4, 6)), out_features=3).name
    'data'
    """

    train: Part
    valid: Part
    holdout: Part | None = None
    out_features: int = 1  # classes, or values to predict
    name: str = "data"
    mean: Tensor | None = None  # (C, 1, 1), of the train pixels / 255, where `inputs` are uint8 images
    std: Tensor | None = None  # (C, 1, 1)
    classes: tuple[str, ...] = ()  # their names, for display; for text, the characters
    columns: tuple[Column, ...] = ()  # of a table, as they were read: ``print(*data.columns, sep="\n")``
    shift: Tensor | None = None  # of the shape of a row: `inputs` are (what was given - shift) / scale
    scale: Tensor | None = None
    # What folds need to know. Which features were standardised, on the rows of train; whether the rows of
    # train lie in time before those of valid; (train + valid rows,), rows that must stay together.
    standardised: bool | tuple[bool, ...] = False
    ordered: bool = False
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        for name, part in (("train", self.train), ("valid", self.valid), ("holdout", self.holdout)):
            if not isinstance(part, Part) and not (name == "holdout" and part is None):
                raise TaskError(
                    f"{name} must be a hpt_torch.Rows or a hpt_torch.Stream, got a {type(part).__name__}; "
                    "hpt_torch.Stream(dataset) reads a torch data set (of a DataLoader: `loader.dataset`)"
                )
            if part is not None and len(part) == 0:
                remedy = "give it some, or None" if name == "holdout" else "give it some"
                raise TaskError(f"{name} has no rows; {remedy}")
        if (self.mean is None) != (self.std is None):
            raise TaskError("mean and std must be given together; give both or neither")

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.first()["inputs"].shape[1:])

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

    def prepared(self, inputs: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """New rows (N, *shape), in the units of those that the data set was made of, as its models read them:
        standardised as the rows of train were, uint8 pixels as normalised reals. (Steps of padding are the
        caller's to set to 0.)"""
        rows = torch.as_tensor(inputs.to_numpy() if hasattr(inputs, "to_numpy") else inputs)
        rows = rows.float() if rows.dtype == torch.bool else rows
        if self.mean is not None and self.std is not None and not rows.is_floating_point():
            return normalised(rows, self.mean, self.std, rows.device, dtype)
        if self.shift is not None and self.scale is not None:
            rows = (rows.double() - self.shift.to(rows.device)) / self.scale.to(rows.device)
        return rows.to(dtype) if rows.is_floating_point() else rows

    def fingerprint(self) -> str:
        """SHA-256 over every tensor, so that a run is not continued on other data.

        Of a `Stream` it covers the length and a few items spread over the set.
        """
        digest = hashlib.sha256()
        for part in (self.train, self.valid, self.holdout):
            if part is not None:
                part.digest(digest)
        for name, statistic in (("mean", self.mean), ("std", self.std)):
            if statistic is not None:
                digest_tensor(digest, name, statistic)
        return digest.hexdigest()

    def close(self) -> None:
        """Ends the processes that streams read with, if there are any."""
        for part in (self.train, self.valid, self.holdout):
            if part is not None:
                part.close()


def digest_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:  # one number out of a row of many counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    digest.update(flat.view(torch.uint8).numpy().tobytes())


def layout(tensor: Tensor) -> torch.memory_format:
    """Channels-last for images; where there is one channel or one pixel both layouts are the same."""
    image = tensor.dim() == 4 and tensor.shape[1] > 1 and tensor[0, 0].numel() > 1 if len(tensor) else False
    return torch.channels_last if image else torch.contiguous_format


def laid_out(flat: Tensor, shape: torch.Size) -> Tensor:
    """The numbers of `flat` as a tensor of this shape, in its layout."""
    if layout(flat.view(shape)) is torch.contiguous_format:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _selected(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows at `index`, in the layout of `tensor`: index_select alone would make them contiguous."""
    if layout(tensor) is torch.channels_last and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return tensor.index_select(0, index)


def _carried(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On another device, in its layout, by chunks: never twice there, which data close to its size needs."""
    there = torch.empty(tensor.shape, device=device, dtype=dtype, memory_format=layout(tensor))
    for start in range(0, len(tensor), _CHUNK_ROWS):
        there[start : start + _CHUNK_ROWS] = tensor[start : start + _CHUNK_ROWS].to(device)
    return there


def normalised(pixels: Tensor, mean: Tensor, std: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`(x / 255 - mean) / std` of uint8 pixels, on the device."""
    wide = torch.promote_types(dtype, torch.float32)  # computed in at least float32, rounded once at the end
    mean, std = mean.to(device, wide), std.to(device, wide)
    reals = torch.empty(pixels.shape, device=device, dtype=dtype, memory_format=layout(pixels))
    for start in range(0, len(pixels), _CHUNK_ROWS):
        chunk = pixels[start : start + _CHUNK_ROWS].to(device).to(wide)
        reals[start : start + _CHUNK_ROWS] = (chunk / 255 - mean) / std
    return reals
