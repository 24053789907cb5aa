"""Sequences: JapaneseVowels, `.ts` files as aeon and sktime write them, and text for character models."""

# N rows, T steps, F features

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpt_torch.data.arrays import npz
from hpt_torch.data.base import Data, Rows
from hpt_torch.data.image_sources import roots
from hpt_torch.data.splits import split
from hpt_torch.data.ts_format import read_ts
from hpt_torch.types import TaskError

UNKNOWN = "<unknown>"


def japanese_vowels(
    path: str | Path | None = None,
    *,
    standardise: bool = True,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """270 + 370 utterances of two vowels by 9 speakers: 12 features, 7 to 29 steps (Kudo et al. 1999, UCI).

    The official test set is the hold-out, `valid_fraction` of the train rows are drawn for valid. Has
    `lengths`. path: `japanese_vowels.npz` or `JapaneseVowels_TRAIN.ts` (with `_TEST.ts` beside it); without
    it, the folder in HPT_TORCH_DATA and the package aeon are looked through.
    standardise: each feature by its mean and deviation over the steps of the train rows.
    """
    found = Path(path) if path is not None else _find_vowels()
    test = found.with_name(found.name.replace("_TRAIN", "_TEST"))
    if found.suffix == ".ts" and test == found:
        raise TaskError(f"path must end in _TRAIN.ts, with the hold-out in _TEST.ts beside it, got {found}")
    read = partial(ts, found, test) if found.suffix == ".ts" else partial(npz, found)
    data = read(
        standardise=standardise,
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        seed=seed,
    )
    return dataclasses.replace(data, name="japanese_vowels")


def _find_vowels() -> Path:
    folders = roots()
    tried = [root / name for root in folders for name in ("japanese_vowels.npz", _VOWELS_TS)]
    aeon = importlib.util.find_spec("aeon")  # only looked up: importing it takes seconds
    if aeon is not None and aeon.origin is not None:
        tried.append(Path(aeon.origin).parent / "datasets" / "data" / _VOWELS_TS)
    for path in tried:
        if path.is_file():
            return path
    raise TaskError(
        "the data set 'japanese_vowels' must be on this machine, and japanese_vowels.npz or "
        f"{_VOWELS_TS} was not found in {', '.join(str(root) for root in folders)} nor in the package aeon: "
        "set HPT_TORCH_DATA to its folder, give path, or install aeon"
    )


_VOWELS_TS = "JapaneseVowels/JapaneseVowels_TRAIN.ts"


def ts(
    path: str | Path,
    test_path: str | Path | None = None,
    *,
    standardise: bool = True,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """Series of a `.ts` file: inputs (N, T, F), zeros behind the end, and `lengths` where they differ.

    Targets are the classes of `@classLabel`, in the order of the header, or the numbers of `@targetLabel`.
    test_path: a file whose series are the hold-out; without it the hold-out is drawn from `path`.
    standardise: each feature by its mean and deviation over the steps of the train rows.
    """
    files = {"train": read_ts(path)}
    if test_path is not None:
        files["holdout"] = read_ts(test_path)
        a, b = files["train"], files["holdout"]
        if (a.features, a.classes) != (b.features, b.classes):
            raise TaskError(
                f"{test_path} must have the dimensions and classes of {path}, got {b.features} and "
                f"{b.classes} beside {a.features} and {a.classes}"
            )
    every = [len(series) for file in files.values() for series in file.series]
    steps, unequal = max(every), min(every) < max(every)
    parts = {}
    for part, file in files.items():
        inputs = torch.zeros(len(file.series), steps, file.features, dtype=torch.float64)
        for row, series in enumerate(file.series):
            inputs[row, : len(series)] = torch.from_numpy(series)
        parts[part] = {"inputs": inputs, "targets": torch.from_numpy(file.targets)}
        if unequal:
            parts[part]["lengths"] = torch.tensor([len(series) for series in file.series])
    train = parts["train"]
    return split(
        train["inputs"],
        train["targets"],
        lengths=train.get("lengths"),
        holdout=parts.get("holdout"),
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        standardise=standardise,
        seed=seed,
        name=Path(path).stem.removesuffix("_TRAIN"),
        classes=files["train"].classes,
    )


# -- characters ----------------------------------------------------------------------------------------


def text(
    path: str | Path,
    length: int = 64,
    *,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """A UTF-8 text for a character model: inputs and targets int64 (N, length), the targets one step ahead.

    The first part of the text is train, the next valid, the last the hold-out: blocks, because windows drawn
    at random would overlap their neighbours in other parts. Rows do not overlap, so `seed` changes nothing.
    The vocabulary is the characters of train, in order, and one number for every other character;
    `Data.classes` lists it and `out_features` is its size, of inputs and targets alike.
    """
    for label, fraction in (("valid_fraction", valid_fraction), ("holdout_fraction", holdout_fraction)):
        if not 0 <= fraction < 1:
            raise TaskError(f"{label} must be in [0, 1), got {fraction}")
    if length < 1:
        raise TaskError(f"length must be at least 1 character, got {length}")
    try:
        characters = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} must be text in UTF-8: {error}; save it as UTF-8") from error
    valid, held = (round(fraction * len(characters)) for fraction in (valid_fraction, holdout_fraction))
    train = len(characters) - valid - held
    blocks = {
        "train": (0, train),
        "valid": (train, train + valid),
        "holdout": (train + valid, len(characters)),
    }
    for part, (start, stop) in blocks.items():
        if stop - start <= length and (part != "holdout" or held):
            raise TaskError(
                f"{path}: {part} must hold more than length={length} characters, got {max(0, stop - start)}"
                f" of {len(characters)}; lower length, change the fractions or bring more text"
            )
    vocabulary = sorted(set(characters[:train]))
    number = {character: i for i, character in enumerate(vocabulary)}
    codes = np.array([number.get(character, len(vocabulary)) for character in characters])
    parts = {part: _windows(codes[start:stop], length) for part, (start, stop) in blocks.items()}
    return Data(
        train=parts["train"],
        valid=parts["valid"],
        holdout=parts["holdout"] if held else None,
        out_features=len(vocabulary) + 1,
        name=Path(path).stem,
        classes=(*vocabulary, UNKNOWN),
    )


def _windows(codes: np.ndarray, length: int) -> Rows:
    """Rows of `length` characters and the same one character on; a rest that fills no row is left out."""
    rows = max(0, len(codes) - 1) // length

    def cut(first: int) -> Tensor:
        return torch.from_numpy(codes[first : first + rows * length].reshape(rows, length).astype(np.int64))

    return Rows({"inputs": cut(0), "targets": cut(1)})
