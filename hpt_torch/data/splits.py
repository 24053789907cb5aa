"""`split`: train, valid and hold-out are kept apart before anything is learned from a row."""

# N rows, T steps, F features

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit, train_test_split
from torch import Tensor

from hpt_torch.data.base import Data, Rows
from hpt_torch.seeding import derive_seed, generator
from hpt_torch.types import TaskError

Array = Tensor | np.ndarray
MOST_CLASSES = 10_000_000  # so many outputs a model would have


def split(
    inputs: Array,
    targets: Array,
    *,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    stratify: bool | None = None,
    standardise: bool | Sequence[bool] = False,
    seed: int = 0,
    name: str = "data",
    lengths: Array | None = None,
    valid: Mapping[str, Array] | None = None,
    holdout: Mapping[str, Array] | None = None,
    classes: Sequence[str] = (),
    groups: Array | Sequence[Hashable] | None = None,
    ordered: bool = False,
) -> Data:
    """Splits rows into train, valid and hold-out, at random unless they are `ordered`.

    inputs: (N, *shape), made float32 unless integer; targets: (N,) integers (classes), (N, T) integers (a
    class at every step) or (N, …) reals.
    stratify: keep the share of each class equal (default: for targets of one integer a row). A class with a
    row for each part that is drawn, and for train, has one in each.
    standardise: subtract the mean and divide by the standard deviation of each feature *of the train rows*;
    a sequence of F booleans names the features it is done to. Sequences (N, T, F) have one mean a feature,
    over all rows and steps that are not padding, and their padding becomes 0.
    lengths: (N,) integers, the steps of each row that are not padding.
    valid, holdout: parts that came ready-made, as mappings with `inputs`, `targets` (and `lengths`). Then no
    row is drawn for that part; `holdout_fraction` 0 leaves a ready-made hold-out away.
    classes: the names of the classes, in the order of their numbers.
    groups: (N,) integers, text or other labels; rows with the same one (a patient, a speaker) stay in one
    part. The fractions are then those of the groups.
    ordered: the rows lie in time, and train is before valid, valid before hold-out.

    >>> import numpy as np, hpt_torch as hpt
    >>> data = hpt.split(np.zeros((10, 4)), np.arange(10) % 2, valid_fraction=0.2, holdout_fraction=0.2)
    >>> len(data.train), len(data.valid), len(data.holdout), data.out_features
    (6, 2, 2, 2)
    """
    if ordered and (groups is not None or stratify):
        raise TaskError("ordered rows are split where they lie; leave out groups and stratify, or ordered")
    for label, fraction in (("valid_fraction", valid_fraction), ("holdout_fraction", holdout_fraction)):
        if not 0 <= fraction < 1:
            raise TaskError(f"{label} must be in [0, 1), got {fraction}")
    pool = _checked({"inputs": inputs, "targets": targets, "lengths": lengths}, "")
    parts: dict[str, dict[str, Tensor]] = {}
    if valid is not None:
        parts["valid"] = _checked(valid, "valid ", like=pool)
    if holdout is not None and holdout_fraction:
        parts["holdout"] = _checked(holdout, "holdout ", like=pool)
    y, rows = pool["targets"], len(pool["targets"])
    by_class = not y.is_floating_point()
    if stratify is None:
        stratify = by_class and y.dim() == 1 and groups is None and not ordered

    drawn = {"holdout": 0 if holdout is not None else round(holdout_fraction * rows)}
    drawn["valid"] = 0 if valid is not None else round(valid_fraction * rows)
    if not drawn["valid"] and valid is None:
        raise TaskError(
            f"valid_fraction must leave at least one row to score trials on, got {valid_fraction} of {rows} "
            "rows; raise it"
        )
    if sum(drawn.values()) >= rows:
        raise TaskError(
            f"valid_fraction and holdout_fraction must leave rows to train on, got {valid_fraction} and "
            f"{holdout_fraction} of {rows} rows; lower one of them"
        )
    rest, where = np.arange(rows), dict[str, np.ndarray]()
    belongs = _group_numbers(groups, rows) if groups is not None else rest
    if groups is not None and (valid is not None or holdout is not None):
        raise TaskError("groups cannot be kept together across ready-made parts; leave one of the two out")
    parts_left = sum(count > 0 for count in drawn.values()) + 1  # with train
    if stratify:
        kinds = np.unique(y.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
        common = np.flatnonzero(np.bincount(kinds) >= parts_left)  # the classes that every part can have
    for part, count in drawn.items():
        if not count:
            continue
        parts_left -= 1
        labels = y[torch.from_numpy(rest)].numpy() if stratify else None
        state = derive_seed(seed, "split", part, bits=32)
        try:
            if ordered:
                rest, chosen = rest[:-count], rest[-count:]
            elif groups is not None:
                drawing = GroupShuffleSplit(1, test_size=count / len(rest), random_state=state)
                left, out = next(drawing.split(rest, groups=belongs[rest]))
                rest, chosen = rest[left], rest[out]
            else:
                rest, chosen = train_test_split(rest, test_size=count, random_state=state, stratify=labels)
                if stratify:
                    draw = generator(seed, "split", part, "exchange")
                    rest, chosen = _exchanged(rest, chosen, kinds, common, parts_left, draw)
        except ValueError as error:
            raise TaskError(
                f"cannot split off {count} of {len(rest)} rows for {part}: {error}; change {part}_fraction, "
                "bring more rows, or pass stratify=False to split()"
            ) from error
        parts[part] = _taken(pool, chosen)
        where[part] = np.sort(chosen)
    parts["train"], where["train"] = _taken(pool, rest), np.sort(rest)
    shift, scale = standardised(parts, standardise) if standardise is not False else (None, None)
    for tensors in parts.values():
        if tensors["inputs"].is_floating_point():
            tensors["inputs"] = tensors["inputs"].float()
    together = None
    if groups is not None:
        together = torch.from_numpy(belongs[np.concatenate((where["train"], where["valid"]))])
    return Data(
        train=Rows(parts["train"]),
        valid=Rows(parts["valid"]),
        holdout=Rows(parts["holdout"]) if "holdout" in parts else None,
        out_features=_out_features(parts, classes),
        name=name,
        classes=tuple(classes),
        standardised=standardise if isinstance(standardise, bool) else tuple(standardise),
        shift=shift,
        scale=scale,
        ordered=ordered,
        groups=together,
    )


def _exchanged(
    rest: np.ndarray,
    chosen: np.ndarray,
    kinds: np.ndarray,
    common: np.ndarray,
    least: int,
    draw: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Rest and chosen, with rows exchanged until each class in `common` has `least` in rest, one in chosen.

    kinds: (N,) class numbers of all rows. A side gives a row of the class that it has most of for one that it
    lacks. Where it lacks none, nothing is drawn or moved.
    """
    sides, needed = [rest.copy(), chosen.copy()], (least, 1)
    for here, there in ((0, 1), (1, 0)):
        held = np.bincount(kinds[sides[here]], minlength=int(kinds.max()) + 1)
        for kind in common[held[common] < needed[here]]:
            while held[kind] < needed[here] < held.max():
                most = int(held.argmax())
                given = draw.choice(np.flatnonzero(kinds[sides[here]] == most))
                taken = draw.choice(np.flatnonzero(kinds[sides[there]] == kind))
                sides[here][given], sides[there][taken] = sides[there][taken], sides[here][given]
                held[most], held[kind] = held[most] - 1, held[kind] + 1
    return sides[0], sides[1]


def stratified_subset(labels: Array, rows: int, seed: int, *path: str | int) -> Tensor:
    """Sorted indices, shape (rows,), of a random subset with the class shares of `labels` (N,).

    A smaller subset of the same seed and path is part of a larger one. Written out because scikit-learn's
    splitter refuses where fewer rows than classes would be left over.
    """
    labels = np.asarray(labels)
    order = generator(seed, "subset", *path).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        place[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    return torch.from_numpy(np.sort(order[np.argsort(place[order], kind="stable")[:rows]]))


def _taken(pool: Mapping[str, Tensor], index: np.ndarray) -> dict[str, Tensor]:
    chosen = torch.from_numpy(np.sort(index))
    return {name: tensor[chosen] for name, tensor in pool.items()}


def _group_numbers(groups: Any, rows: int) -> np.ndarray:
    """(N,) integers that are equal where groups are: those given, or a number for each label."""
    listed = isinstance(groups, list | tuple) and not all(isinstance(label, int) for label in groups)
    # NumPy alone would make one type of mixed labels, and a table of tuples
    labels = np.fromiter(groups, dtype=object, count=len(groups)) if listed else np.asarray(_native(groups))
    if labels.shape != (rows,):
        raise TaskError(
            f"groups must be one integer a row, or one label of another kind, shape ({rows},), got "
            f"{labels.shape}; give every row its own"
        )
    if labels.dtype.kind in "iu":
        return labels
    if labels.dtype != object:
        return np.unique(labels, return_inverse=True)[1]
    try:
        distinct = list(dict.fromkeys(labels))
    except TypeError as error:
        raise TaskError(
            f"groups must be labels that can be compared: {error}; use text or numbers"
        ) from error
    if all(isinstance(label, str) for label in distinct):  # then their order does not depend on the rows'
        distinct.sort()
    number = {label: i for i, label in enumerate(distinct)}
    return np.array([number[label] for label in labels])


def _native(array: Any) -> Any:
    """As torch takes it: an array of this machine's byte order, also of a table."""
    if hasattr(array, "to_numpy"):  # pandas, polars
        array = array.to_numpy()
    if not isinstance(array, np.ndarray):
        return array
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="), copy=False)


def _checked(
    arrays: Mapping[str, Array | None], part: str, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tensors of the dtypes that `split` promises, but for inputs: they stay wide until standardised."""
    tensors: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        try:
            tensor = torch.as_tensor(_native(array))
        except TypeError as error:
            raise TaskError(f"{part}{name} must hold numbers: {error}") from error
        tensor = _plain(tensor, part + name)
        if name == "inputs" and tensor.dtype == torch.bool:
            tensor = tensor.float()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(dim=1)
            raise TaskError(
                f"{part}{name} must be finite; rows {bad.nonzero().flatten()[:5].tolist()} are not: "
                "drop or fill them first"
            )
        tensors[name] = tensor
    x, y = tensors["inputs"], tensors["targets"]
    if len(x) != len(y):
        raise TaskError(
            f"{part}inputs and targets must have the same number of rows, got {len(x)} and {len(y)}"
        )
    tensors["targets"] = y.float() if y.is_floating_point() else y.long()
    if not y.is_floating_point() and len(y) and int(tensors["targets"].min()) < 0:
        raise TaskError(
            f"{part}targets must be class numbers from 0, got {int(y.min())}; number the classes from 0, or "
            "make the targets float for a regression"
        )
    if "lengths" in tensors:
        tensors["lengths"] = _checked_lengths(tensors["lengths"], x, part)
    if like is None:
        return tensors
    for name in ("inputs", "targets"):
        shape, other = tuple(tensors[name].shape[1:]), tuple(like[name].shape[1:])
        real, other_real = tensors[name].is_floating_point(), like[name].is_floating_point()
        if shape != other or real != other_real:
            raise TaskError(
                f"{part}{name} must look like those of train, got {tensors[name].dtype} {shape} a row "
                f"beside {like[name].dtype} {other}"
            )
    if ("lengths" in tensors) != ("lengths" in like):
        raise TaskError(f"{part}lengths must be given for every part or for none")
    return tensors


def _plain(tensor: Tensor, name: str) -> Tensor:
    """With the wide unsigned integers, which torch hardly knows, as int64."""
    if tensor.is_complex():
        raise TaskError(
            f"{name} must be real, got {tensor.dtype}; pass real and imaginary parts as values of their own"
        )
    if tensor.dtype == torch.uint64 and bool((tensor.view(torch.int64) < 0).any()):
        raise TaskError(f"{name} must be integers below 2**63, got larger ones of uint64; number them anew")
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def _checked_lengths(lengths: Tensor, x: Tensor, part: str) -> Tensor:
    if lengths.is_floating_point() or lengths.shape != x.shape[:1] or x.dim() < 2:
        raise TaskError(
            f"{part}lengths must be one integer a row of inputs (N, T, …), got {lengths.dtype} "
            f"{tuple(lengths.shape)} for inputs {tuple(x.shape)}"
        )
    lengths = lengths.long()
    bad = ((lengths < 1) | (lengths > x.shape[1])).nonzero().flatten()
    if len(bad):
        raise TaskError(
            f"{part}lengths must be from 1 to the {x.shape[1]} steps of inputs, got {int(lengths[bad[0]])} "
            f"in row {int(bad[0])}"
        )
    return lengths


def standardised(
    parts: Mapping[str, dict[str, Tensor]], chosen: bool | Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Standardises the inputs of all parts on the rows of "train", as `split` says, in float64; what was
    subtracted, and what they were divided by after that, each of the shape of a row (or of a step)."""
    train = parts["train"]
    seen = train["inputs"].double()
    if seen.dim() == 3:
        steps = _steps(train)
        seen = seen.flatten(0, 1) if steps is None else seen[steps]
    mean, std = seen.mean(dim=0), seen.std(dim=0, correction=0)
    # A feature that never varies becomes 0, also where the rounding of the sums gave it a tiny deviation
    never = seen.amin(dim=0) == seen.amax(dim=0)
    mean = torch.where(never & (std > 0), seen[0], mean)
    std = torch.where(never | (std == 0), torch.ones_like(std), std)
    if not isinstance(chosen, bool):
        mask, features = torch.tensor(list(chosen), dtype=torch.bool), mean.shape[-1] if mean.dim() else 1
        if mask.shape[-1] != features:
            raise TaskError(
                f"standardise must be one boolean a feature, got {mask.shape[-1]} for {features} features; "
                "name all of them, or pass True"
            )
        mean, std = torch.where(mask, mean, 0.0), torch.where(mask, std, 1.0)
    for tensors in parts.values():
        x = (tensors["inputs"].double() - mean) / std
        steps = _steps(tensors) if x.dim() == 3 else None
        tensors["inputs"] = x if steps is None else x * steps.unsqueeze(-1)
    return mean, std


def _steps(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """(N, T), true where a step is not padding; None where there is no padding."""
    if "lengths" not in tensors:
        return None
    return torch.arange(tensors["inputs"].shape[1]) < tensors["lengths"].unsqueeze(1)


def _out_features(parts: Mapping[str, Mapping[str, Tensor]], classes: Sequence[str]) -> int:
    y = parts["train"]["targets"]
    if y.is_floating_point():
        return max(1, int(np.prod(y.shape[1:])))
    top = max(int(tensors["targets"].max()) for tensors in parts.values() if tensors["targets"].numel())
    if classes and top >= len(classes):
        raise TaskError(
            f"targets must be numbers of the {len(classes)} classes named, got {top}; name them all"
        )
    if top >= MOST_CLASSES:
        rule = f"targets must be class numbers from 0, below {MOST_CLASSES:,}"
        raise TaskError(f"{rule}, got {top}; number the classes anew")
    return len(classes) or top + 1
