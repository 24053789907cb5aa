"""`.npz` files: arrays under names, with or without ready-made parts."""

# N rows, T steps, F features

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpt_torch.data.base import Data
from hpt_torch.data.splits import split
from hpt_torch.types import TaskError

_SHORT = {"inputs": "x", "targets": "y", "lengths": "len"}
_PARTS = {"train": ("train",), "valid": ("valid", "val"), "holdout": ("test", "holdout")}

Part = dict[str, np.ndarray]  # "inputs", "targets" and perhaps "lengths"


def npz(
    path: str | Path,
    inputs: str = "inputs",
    targets: str = "targets",
    lengths: str | None = None,
    *,
    standardise: bool = False,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """Arrays of a file that `numpy.savez` wrote; nothing in it is unpickled.

    Either one array each under the names given, or parts under the names with `_train`, `_valid` (or
    `_val`) and `_test` (or `_holdout`) at the end; a part that is absent is drawn from train. Where the
    defaults `inputs` and `targets` are absent, `x` and `y` are looked for.

    Inputs are real (N, *shape) or integers (tokens); targets integers or text (classes) or real numbers.
    lengths: the array of the steps of each row that are not padding (default: `lengths` or `len`, if there).
    standardise: as in `split`, on the train rows.
    """
    parts, classes = read_npz(path, inputs, targets, lengths)
    if parts["train"]["inputs"].dtype == np.uint8 and parts["train"]["inputs"].ndim > 2:
        raise TaskError(f"{path}: inputs of uint8 {parts['train']['inputs'].shape} are images; use image_npz")
    train = parts["train"]
    return split(
        train["inputs"],
        train["targets"],
        lengths=train.get("lengths"),
        valid=parts.get("valid"),
        holdout=parts.get("holdout"),
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        standardise=standardise,
        seed=seed,
        name=Path(path).stem,
        classes=classes,
    )


def read_npz(
    path: str | Path, inputs: str, targets: str, lengths: str | None = None
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts of a file by name (`train` holds all rows where there are no parts), and the class names."""
    arrays: dict[str, np.ndarray] = {}
    try:
        file = np.load(Path(path).expanduser(), allow_pickle=False)
        if isinstance(file, np.lib.npyio.NpzFile):
            with file:
                arrays = {key: file[key] for key in file.files}
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TaskError(
            f"{path} must be an .npz file of plain arrays: {error}; write it with numpy.savez"
        ) from error
    if not arrays:
        raise TaskError(f"{path} must be an .npz file with named arrays; write it with numpy.savez")
    wanted = {"inputs": inputs, "targets": targets, "lengths": lengths or "lengths"}
    parts = _parts(path, arrays, wanted, lengths is not None)
    classes = tuple(map(_text, arrays["classes"])) if "classes" in arrays else ()
    labels = [part["targets"] for part in parts.values()]
    if any(array.dtype.kind in "US" for array in labels):
        numbered, names = number_classes(labels)
        for part, array in zip(parts.values(), numbered, strict=True):
            part["targets"] = array
        return parts, names
    return parts, classes


def number_classes(labels: Sequence[np.ndarray]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Labels of several parts, numbered together in sorted order, and their names."""
    names, numbers = np.unique(np.concatenate(labels), return_inverse=True)
    return np.split(numbers, np.cumsum([len(array) for array in labels])[:-1]), tuple(map(_text, names))


def _text(label: Any) -> str:
    return label.decode(errors="backslashreplace") if isinstance(label, bytes) else str(label)


def _parts(
    path: str | Path, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, str], lengths_required: bool
) -> dict[str, Part]:
    there = f"the file has {', '.join(arrays)}"
    stems = {}
    for role, stem in wanted.items():
        tried = [stem, _SHORT[role]] if stem == role else [stem]
        found = [name for name in tried if name in arrays or f"{name}_train" in arrays]
        if found:
            stems[role] = found[0]
        elif role != "lengths" or lengths_required:
            names = " or ".join(f"{name} or {name}_train" for name in tried)
            raise TaskError(f"{path} must hold {role} as {names}, but {there}; pass {role}=NAME")
    if stems["inputs"] in arrays:
        ends: dict[str, str] = {"train": ""}
    else:
        ends = {
            part: f"_{end}"
            for part, spelled in _PARTS.items()
            for end in spelled
            if f"{stems['inputs']}_{end}" in arrays
        }
    parts: dict[str, Part] = {}
    for part, end in ends.items():
        for role, stem in stems.items():
            if stem + end not in arrays:
                raise TaskError(f"{path} must hold {role} as {stem + end}, but {there}; add it")
            if arrays[stem + end].ndim == 0:
                raise TaskError(f"{path}: {stem + end} must have one entry a row, got a single value")
            parts.setdefault(part, {})[role] = arrays[stem + end]
    return parts
