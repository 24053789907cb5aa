"""Cross-validation: the rows that are not held out, cut into folds once, each with its own preprocessing."""

# N rows of the pool (train and valid), K folds

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from sklearn import model_selection as sk
from torch import Tensor

from hpt_torch.data.base import Data, Rows
from hpt_torch.data.images import pixel_statistics
from hpt_torch.data.splits import standardised
from hpt_torch.seeding import derive_seed
from hpt_torch.types import Folding, TaskError


def pooled(data: Data) -> Data:
    """Train and valid rows together as train, for the model that is trained at the end. Nothing is left to
    score it: valid are the rows that were valid before, which it learns from too."""
    pool = _pool(data)
    rows = torch.arange(len(pool["targets"]))
    return _prepared(data, pool, rows, rows[len(data.train) :])


def check(data: Data, folding: Folding | None, seed: int) -> None:
    """Raises TaskError where `folds` would, or, for None, `pooled`; makes no copies of the rows."""
    parts = _parts(data)
    if folding is not None:
        for _ in _indices(data, _joined(parts, "targets"), folding, seed):
            pass


def folds(data: Data, folding: Folding, seed: int) -> list[Data]:
    """One data set a fold, the same ones for the same seed. Standardisation and pixel statistics are fitted
    on the train rows of each. Raises TaskError where the rows cannot be cut so."""
    pool = _pool(data)
    found = []
    for train, valid in _indices(data, pool["targets"], folding, seed):
        found.append(_prepared(data, pool, torch.from_numpy(train), torch.from_numpy(valid)))
    return found


def chosen_splitter(data: Data, folding: Folding) -> str:
    """What `auto` means for this data. Raises TaskError where the data lacks what the splitter needs."""
    targets = data.train.first()["targets"]
    by_class = not targets.is_floating_point() and targets.dim() == 1
    splitter: str = folding.splitter
    if splitter == "auto":
        splitter = "stratified" if by_class else "kfold"
        splitter = "time" if data.ordered else "grouped" if data.groups is not None else splitter
    if splitter == "stratified" and not by_class:
        raise TaskError("stratified folds need one class a row; use kfold")
    if splitter == "grouped" and data.groups is None:
        raise TaskError("grouped folds need groups; give split() its `groups`, or use another splitter")
    if splitter == "time" and not data.ordered:
        raise TaskError("time folds need rows that lie in time; give split() `ordered=True`")
    if splitter == "time" and folding.repeats > 1:
        raise TaskError("time folds are always the same; set repeats to 1")
    return splitter


def _indices(
    data: Data, targets: Tensor, folding: Folding, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    splitter, rows = chosen_splitter(data, folding), np.arange(len(targets))
    groups = data.groups.numpy() if data.groups is not None else None
    by_class = not targets.is_floating_point() and targets.dim() == 1
    for repeat in range(folding.repeats):
        state = derive_seed(seed, "folds", repeat, bits=32)
        cut = {"n_splits": folding.folds, "shuffle": True, "random_state": state}
        try:
            match splitter:
                case "time":
                    splits = sk.TimeSeriesSplit(folding.folds).split(rows)
                case "grouped":
                    grouped = sk.StratifiedGroupKFold if by_class else sk.GroupKFold
                    splits = grouped(**cut).split(rows, targets.numpy() if by_class else None, groups)
                case "stratified":
                    splits = sk.StratifiedKFold(**cut).split(rows, targets.numpy())
                case _:
                    splits = sk.KFold(**cut).split(rows)
            found = list(splits)
        except ValueError as error:
            raise TaskError(f"{len(rows)} rows cannot be cut into {folding.folds} folds: {error}") from error
        if not all(len(train) and len(valid) for train, valid in found):
            raise TaskError(f"{folding.folds} folds leave one of them without rows; ask for fewer")
        yield from found


def _parts(data: Data) -> tuple[Rows, Rows]:
    if not isinstance(data.train, Rows) or not isinstance(data.valid, Rows):
        raise TaskError(
            "train and valid can be joined only in memory; give hpt_torch.Rows instead of a Stream, or do "
            "without folds, confirm and refit"
        )
    return data.train, data.valid


def _joined(parts: tuple[Rows, Rows], name: str) -> Tensor:
    return torch.cat([part.tensors[name] for part in parts])


def _pool(data: Data) -> dict[str, Tensor]:
    parts = _parts(data)
    return {name: _joined(parts, name) for name in parts[0].tensors}


def _prepared(data: Data, pool: dict[str, Tensor], train: Tensor, valid: Tensor) -> Data:
    """The data set with these rows of the pool, preprocessed anew.

    Standardising what was standardised on other rows gives what standardising the raw numbers would have
    given, since each is a shift and a scale.
    """
    parts = {
        name: {n: t.index_select(0, index) for n, t in pool.items()}
        for name, index in (("train", train), ("valid", valid))
    }
    if isinstance(data.holdout, Rows):
        parts["holdout"] = dict(data.holdout.tensors)
    shift, scale = data.shift, data.scale
    if data.standardised is not False:
        mine, own = standardised(parts, data.standardised)
        if shift is not None and scale is not None:
            shift, scale = shift + scale * mine, scale * own
        for tensors in parts.values():
            tensors["inputs"] = tensors["inputs"].float()
    mean, std = data.mean, data.std
    if mean is not None:
        mean, std = pixel_statistics(parts["train"]["inputs"])
    return dataclasses.replace(
        data,
        train=Rows(parts["train"]),
        valid=Rows(parts["valid"]),
        holdout=Rows(parts["holdout"]) if "holdout" in parts else data.holdout,
        mean=mean,
        std=std,
        shift=shift,
        scale=scale,
        groups=None,
    )
