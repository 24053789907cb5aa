"""Image sets: uint8 (N, C, H, W) in memory, normalised when they move to the device."""

# N rows, C channels, H height, W width

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from hpt_torch.data.arrays import read_npz
from hpt_torch.data.base import Data, Part, Rows
from hpt_torch.data.cache import cached
from hpt_torch.data.image_sources import as_nchw, find
from hpt_torch.data.splits import Array, split, stratified_subset
from hpt_torch.types import TaskError

Parts = dict[str, dict[str, Array]]  # "train" and perhaps "valid", "holdout": "inputs" and "targets"
_CHUNK_ROWS = 8192


def mnist(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """60,000 + 10,000 handwritten digits of 28 x 28 pixels (LeCun et al. 1998).

    The official test set is the hold-out (`holdout_fraction` 0 leaves it away, any other value keeps all of
    it); `valid_fraction` of the train rows are drawn for valid, each class by its share. The same holds for
    every set of this file that has an official test set.

    limit: use at most so many rows of the official train set (before valid is drawn) and so many of the
    test set, each class by its share: for short runs.
    """
    return _official("mnist", limit, valid_fraction, holdout_fraction, seed)


def fashion_mnist(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """60,000 + 10,000 pieces of clothing of 28 x 28 pixels (Xiao et al. 2017). Options as in `mnist`."""
    return _official("fashion_mnist", limit, valid_fraction, holdout_fraction, seed)


def kmnist(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """60,000 + 10,000 cursive Japanese characters of 28 x 28 pixels (Clanuwat et al. 2018). As `mnist`."""
    return _official("kmnist", limit, valid_fraction, holdout_fraction, seed)


def cifar10(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """50,000 + 10,000 photographs of 3 x 32 x 32, 10 classes (Krizhevsky 2009). Options as in `mnist`."""
    return _official("cifar10", limit, valid_fraction, holdout_fraction, seed)


def cifar100(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """50,000 + 10,000 photographs of 3 x 32 x 32, 100 classes (Krizhevsky 2009). Options as in `mnist`."""
    return _official("cifar100", limit, valid_fraction, holdout_fraction, seed)


def svhn(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """73,257 + 26,032 house numbers of 3 x 32 x 32 (Netzer et al. 2011). Options as in `mnist`."""
    return _official("svhn", limit, valid_fraction, holdout_fraction, seed)


def digits_images(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """scikit-learn's 1,797 digits as images of 1 x 8 x 8; all three parts are drawn at random."""
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # 0 … 16 as 0 … 255
    parts: Parts = {"train": {"inputs": as_nchw(pixels), "targets": bunch.target}}
    return _images(parts, "digits_images", limit, valid_fraction, holdout_fraction, seed)


def image_npz(
    path: str | Path,
    inputs: str = "inputs",
    targets: str = "targets",
    *,
    layout: str = "auto",
    limit: int | None = None,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """Images of an `.npz` file: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), under the names of `npz`.

    Ready-made parts `_valid` and `_test` stay as they are; what is absent is drawn from train. An array
    `classes`, if there is one, names the classes.
    layout: "NHWC" or "NCHW", where the shape does not tell.
    """
    parts, classes = read_npz(path, inputs, targets)
    ready: Parts = {}
    for part, arrays in parts.items():
        try:
            ready[part] = {"inputs": as_nchw(arrays["inputs"], layout), "targets": arrays["targets"]}
        except TaskError as error:
            raise TaskError(f"{path}: {error}") from error
    return _images(ready, Path(path).stem, limit, valid_fraction, holdout_fraction, seed, classes)


def as_rows(data: Data) -> Data:
    """Images (N, 1, H, W) as sequences (N, H, W): H steps of W features, for recurrent models."""
    shape = data.input_shape
    if len(shape) != 3 or shape[0] != 1:
        raise TaskError(
            f"as_rows needs images of one channel, (1, H, W) each, got {shape}; choose another data set"
        )

    def flat(rows: Part) -> Rows:
        if not isinstance(rows, Rows):
            raise TaskError(
                "as_rows needs images in memory, got a Stream; let its data set leave the channel out"
            )
        return Rows({**rows.tensors, "inputs": rows.tensors["inputs"].squeeze(1)})

    return dataclasses.replace(
        data,
        train=flat(data.train),
        valid=flat(data.valid),
        holdout=flat(data.holdout) if data.holdout is not None else None,
        name=f"{data.name}_rows",
    )


def mnist_rows(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """`mnist` as sequences of 28 rows of 28 pixels (Le et al. 2015 read it pixel by pixel)."""
    return as_rows(_official("mnist", limit, valid_fraction, holdout_fraction, seed))


def fashion_mnist_rows(
    *, limit: int | None = None, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0
) -> Data:
    """`fashion_mnist` as sequences of 28 rows of 28 pixels."""
    return as_rows(_official("fashion_mnist", limit, valid_fraction, holdout_fraction, seed))


def _official(
    name: str, limit: int | None, valid_fraction: float, holdout_fraction: float, seed: int
) -> Data:
    found = cached(name, lambda: find(name))
    parts: Parts = {
        "train": {"inputs": found["x_train"], "targets": found["y_train"]},
        "holdout": {"inputs": found["x_test"], "targets": found["y_test"]},
    }
    return _images(parts, name, limit, valid_fraction, holdout_fraction, seed)


def _images(
    parts: Parts,
    name: str,
    limit: int | None,
    valid_fraction: float,
    holdout_fraction: float,
    seed: int,
    classes: tuple[str, ...] = (),
) -> Data:
    if limit is not None and limit < 1:
        raise TaskError(f"limit must be at least 1 row, got {limit}; leave it out for all rows")
    if limit is not None:
        parts = {part: _limited(part, arrays, limit, seed) for part, arrays in parts.items()}
    data = split(
        parts["train"]["inputs"],
        parts["train"]["targets"],
        valid=parts.get("valid"),
        holdout=parts.get("holdout"),
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        seed=seed,
        name=name,
        classes=classes,
    )
    assert isinstance(data.train, Rows)  # `split` makes no other
    mean, std = pixel_statistics(data.train.tensors["inputs"])
    return dataclasses.replace(data, mean=mean, std=std)


def _limited(part: str, arrays: Mapping[str, Array], limit: int, seed: int) -> dict[str, Array]:
    if limit >= len(arrays["targets"]):
        return dict(arrays)
    if np.asarray(arrays["targets"]).dtype.kind == "f":
        raise TaskError(
            "limit keeps the share of each class, and these targets are real numbers; leave it out"
        )
    chosen = stratified_subset(arrays["targets"], limit, seed, part)
    return {name: torch.as_tensor(array)[chosen] for name, array in arrays.items()}


def pixel_statistics(pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation a channel of pixels / 255, float32 (C, 1, 1).

    The sums are of integers, so the result does not depend on threads or on the order of rows.
    """
    channels = pixels_NCHW.shape[1]
    total = torch.zeros(channels, dtype=torch.int64)
    squares = torch.zeros(channels, dtype=torch.int64)
    for start in range(0, len(pixels_NCHW), _CHUNK_ROWS):
        chunk = pixels_NCHW[start : start + _CHUNK_ROWS]
        total += chunk.sum(dim=(0, 2, 3), dtype=torch.int64)
        squares += (chunk.int() ** 2).sum(dim=(0, 2, 3), dtype=torch.int64)
    count = pixels_NCHW.numel() // channels
    mean = total.double() / count
    std = (squares.double() / count - mean**2).clamp(min=0).sqrt()
    std = torch.where(std > 0, std, torch.full_like(std, 255.0))  # a channel that never varies becomes 0
    return (mean / 255).float().reshape(-1, 1, 1), (std / 255).float().reshape(-1, 1, 1)
