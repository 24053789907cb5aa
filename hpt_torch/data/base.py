"""`Rows` (aligned tensors), `Data` (train, valid, hold-out) and the split that keeps them apart."""

# N rows

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from hpt_torch.seeding import derive_seed
from hpt_torch.types import TaskError


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

    def to(self, device: torch.device, dtype: torch.dtype) -> Rows:
        """On the device; real numbers in `dtype`; images (N, C, H, W) channels-last, the faster layout."""
        moved = {}
        for name, tensor in self.tensors.items():
            tensor = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            moved[name] = (
                tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
            )
        return Rows(moved)


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set in three parts. Trials are trained on `train`, scored on `valid`; `holdout` is read once,
    after the search has chosen."""

    train: Rows
    valid: Rows
    holdout: Rows | None = None
    out_features: int = 1  # classes, or values to predict
    name: str = "data"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.tensors["inputs"].shape[1:])

    def to(self, device: torch.device, dtype: torch.dtype) -> Data:
        holdout = self.holdout.to(device, dtype) if self.holdout is not None else None
        return dataclasses.replace(
            self, train=self.train.to(device, dtype), valid=self.valid.to(device, dtype), holdout=holdout
        )

    def fingerprint(self) -> str:
        """SHA-256 over every tensor, so that a run is not continued on other data."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid, self.holdout):
            for name, tensor in sorted(part.tensors.items()) if part is not None else ():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(
                    tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
        return digest.hexdigest()


def split(
    inputs: Tensor | np.ndarray,
    targets: Tensor | np.ndarray,
    *,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    stratify: bool | None = None,
    standardise: bool = False,
    seed: int = 0,
    name: str = "data",
) -> Data:
    """Splits rows at random into train, valid and hold-out.

    inputs: (N, *shape), made float32 unless integer; targets: (N,) integers (classes) or (N, …) reals.
    stratify: keep the share of each class equal (default: for integer targets).
    standardise: subtract the mean and divide by the standard deviation of each feature *of the train rows*.
    """
    x, y = torch.as_tensor(inputs), torch.as_tensor(targets)
    if len(x) != len(y):
        raise TaskError(f"inputs and targets must have the same number of rows, got {len(x)} and {len(y)}")
    for label, fraction in (("valid_fraction", valid_fraction), ("holdout_fraction", holdout_fraction)):
        if not 0 <= fraction < 1:
            raise TaskError(f"{label} must be in [0, 1), got {fraction}")
    classes = not y.is_floating_point()
    stratify = classes if stratify is None else stratify
    if x.is_floating_point():
        x = x.float()
        if not bool(torch.isfinite(x).all()):
            rows = (~torch.isfinite(x).reshape(len(x), -1).all(dim=1)).nonzero().flatten()[:5].tolist()
            raise TaskError(f"inputs must be finite; rows {rows} are not: drop or fill them first")
    y = y.long() if classes else y.float()

    rest = np.arange(len(x))
    parts: dict[str, np.ndarray] = {}
    for part, fraction in (("holdout", holdout_fraction), ("valid", valid_fraction)):
        count = round(fraction * len(x))
        if not count:
            continue
        labels = y[rest].numpy() if stratify else None
        try:
            rest, parts[part] = train_test_split(
                rest, test_size=count, random_state=derive_seed(seed, "split", part, bits=32), stratify=labels
            )
        except ValueError as error:
            raise TaskError(f"cannot split off {count} of {len(rest)} rows for {part}: {error}") from error
    if "valid" not in parts:
        raise TaskError("valid_fraction must leave at least one row to score trials on")
    if standardise:
        x = _standardise(x, rest)

    def part_of(index: np.ndarray) -> Rows:
        chosen = torch.from_numpy(np.sort(index))
        return Rows({"inputs": x[chosen], "targets": y[chosen]})

    return Data(
        train=part_of(rest),
        valid=part_of(parts["valid"]),
        holdout=part_of(parts["holdout"]) if "holdout" in parts else None,
        out_features=int(y.max()) + 1 if classes else max(1, int(np.prod(y.shape[1:]))),
        name=name,
    )


def _standardise(x: Tensor, train: np.ndarray) -> Tensor:
    seen = x[torch.from_numpy(train)].double()
    mean, std = seen.mean(dim=0), seen.std(dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))  # a feature that never varies becomes 0
    return ((x.double() - mean) / std).float()
