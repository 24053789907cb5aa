"""Where torchvision's image sets come from: this machine, or else a download by torchvision."""

# N rows, C channels, H height, W width

from __future__ import annotations

import gzip
import importlib
import logging
import math
import os
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpt_torch.data import cache
from hpt_torch.types import TaskError

_log = logging.getLogger(__name__)

_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image set: its class in torchvision.datasets and what shows that its files are there."""

    torchvision_class: str
    marker: str = ""  # a path under a torchvision root; none: the set is of four idx files
    system_directory: str = ""  # where a package of the operating system puts the idx files
    system_package: str = ""


SOURCES = {
    "mnist": Source(torchvision_class="MNIST"),
    "fashion_mnist": Source(
        torchvision_class="FashionMNIST",
        system_directory="/usr/share/datasets/fashion-mnist",
        system_package="dataset-fashion-mnist",
    ),
    "kmnist": Source(torchvision_class="KMNIST"),
    "cifar10": Source(torchvision_class="CIFAR10", marker="cifar-10-batches-py"),
    "cifar100": Source(torchvision_class="CIFAR100", marker="cifar-100-python"),
    "svhn": Source(torchvision_class="SVHN", marker="train_32x32.mat"),
}


def roots() -> list[Path]:
    """The folders that may hold data sets as torchvision lays them out, in the order they are tried."""
    named = os.environ.get("HPT_TORCH_DATA")
    first = [Path(named).expanduser()] if named else []
    home = Path.home()
    every = [*first, Path("data"), home / "data", home / ".cache" / "torchvision", _download_root()]
    return list(dict.fromkeys(every))


def find(name: str) -> dict[str, Tensor]:
    """`x_train`, `x_test` uint8 (N, C, H, W); `y_train`, `y_test` uint8 (N,). Raises TaskError if nowhere."""
    source = SOURCES[name]
    found = _found(source, roots())
    if found is None and os.environ.get("HPT_TORCH_DOWNLOAD") != "0":
        root = _download_root()
        _log.warning("%s is not on this machine: torchvision downloads it to %s", name, root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            _torchvision(source, root, download=True)
        except (OSError, RuntimeError) as error:
            raise TaskError(f"{_not_found(name, source)}. The download failed: {error}") from error
        found = _found(source, [root])
    if found is None:
        raise TaskError(_not_found(name, source))
    return found


def _download_root() -> Path:
    named = os.environ.get("HPT_TORCH_DATA")
    return Path(named).expanduser() if named else cache.directory() / "torchvision"


def _not_found(name: str, source: Source) -> str:
    files = source.marker or f"{source.torchvision_class}/raw/{_IDX[0]}"
    package = (
        f"install the Debian package {source.system_package}"
        if source.system_package
        else "name an .npz file of the images with the data set image_npz"
    )
    return (
        f"the data set {name!r} must be on this machine or be downloaded, and it was not found in "
        f"{', '.join(str(root) for root in roots())}: (1) set HPT_TORCH_DATA to a torchvision root (a folder "
        f"that holds {files}), or (2) {package}, or (3) leave HPT_TORCH_DOWNLOAD other than 0, so that "
        "torchvision downloads it"
    )


def _found(source: Source, folders: list[Path]) -> dict[str, Tensor] | None:
    if not source.marker:
        raw = [root / source.torchvision_class / "raw" for root in folders]
        for folder in [*raw, *([Path(source.system_directory)] if source.system_directory else [])]:
            files = [_first(folder / name, folder / f"{name}.gz") for name in _IDX]
            there = [file for file in files if file is not None]
            if len(there) == len(_IDX):
                _log.info("reading %s", folder)
                return _idx_set(there)
        return None
    for root in folders:
        if (root / source.marker).exists():
            try:
                return _torchvision(source, root, download=False)
            except RuntimeError as error:  # a file is missing or has another MD5
                _log.warning("%s: torchvision refuses %s: %s", root, source.torchvision_class, error)
    return None


def _first(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _torchvision(source: Source, root: Path, *, download: bool) -> dict[str, Tensor]:
    # takes a second to import, and a cached set needs none of it
    made = getattr(importlib.import_module("torchvision.datasets"), source.torchvision_class)
    svhn = source.torchvision_class == "SVHN"  # the one that names its parts otherwise
    tensors = {}
    for part in ("train", "test"):
        which: dict[str, Any] = {"split": part} if svhn else {"train": part == "train"}
        with warnings.catch_warnings():
            # the CIFAR pickles are older than the NumPy that reads them
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            read = made(root=str(root), download=download, **which)
        labels = read.labels if svhn else read.targets
        tensors[f"x_{part}"] = as_nchw(np.asarray(read.data))
        tensors[f"y_{part}"] = torch.as_tensor(np.asarray(labels)).to(torch.uint8)
    return tensors


def as_nchw(images: np.ndarray, layout: str = "auto") -> Tensor:
    """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) -> (N, C, H, W). Channels are 1, 3 or 4."""
    if layout not in ("auto", "NHWC", "NCHW"):
        raise TaskError(f"layout must be 'auto', 'NHWC' or 'NCHW', got {layout!r}")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise TaskError(
            "images must be uint8 of shape (N, H, W), (N, H, W, C) or (N, C, H, W), got "
            f"{images.dtype} {images.shape}; for other arrays use npz"
        )
    if images.ndim == 3:
        return torch.from_numpy(np.ascontiguousarray(images[:, None]))
    if layout == "auto":
        first, last = images.shape[1] in (1, 3, 4), images.shape[3] in (1, 3, 4)
        if first == last:
            raise TaskError(
                f"images of shape {images.shape} must have 1, 3 or 4 channels, first or last; "
                "say which with layout='NHWC' or layout='NCHW'"
            )
        layout = "NCHW" if first else "NHWC"
    return torch.from_numpy(
        np.ascontiguousarray(images if layout == "NCHW" else images.transpose(0, 3, 1, 2))
    )


# -- the idx format ------------------------------------------------------------------------------------


def _idx_set(files: list[Path]) -> dict[str, Tensor]:
    names = ("x_train", "y_train", "x_test", "y_test")
    arrays = {name: read_idx(file) for name, file in zip(names, files, strict=True)}
    return {
        name: as_nchw(array) if name.startswith("x") else torch.from_numpy(array)
        for name, array in arrays.items()
    }


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file, gzipped or not: 0, 0, type 8, the number of dimensions, each dimension
    as four bytes, highest first, then the values (LeCun's format)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{path} cannot be unpacked: {error}; delete it and fetch it again") from error
    dimensions = data[3] if len(data) > 3 else 0
    start = 4 + 4 * dimensions
    if data[:3] != b"\0\0\x08" or not dimensions or len(data) < start:
        raise TaskError(f"{path} must be an idx file of bytes; delete it and fetch it again")
    shape = tuple(np.frombuffer(data, ">u4", dimensions, 4).tolist())
    if len(data) - start != math.prod(shape):
        raise TaskError(
            f"{path} must hold {math.prod(shape)} values, as its shape {shape} says, got {len(data) - start}"
            "; delete it and fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()
