"""Tables: scikit-learn's own, on every machine without a download, and the user's CSV files."""

# N rows, F features

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from csv import Error as CsvError
from csv import reader as csv_reader
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

from hpt_torch.data.base import Column, Data
from hpt_torch.data.splits import split
from hpt_torch.types import TaskError

# In any case: what pandas takes for missing, but for "None", which may be a category
MISSING = (
    *("", "?", "na", "n/a", "nan", "null", "<na>", "#na", "#n/a", "#n/a n/a", "-nan"),
    *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
)
DASHES = ("none", "-")  # in any case: a category among words, no value among numbers
MOSTLY_NUMBERS = 0.9  # a column with this share of numbers is one of numbers, and what is none a mistake
MOST_CLASSES = 20  # a whole-number target with more values than this is a quantity
ROWS_PER_CLASS = 5  # nor are numbers that hardly repeat the names of classes
MOST_CATEGORIES = 50  # a text column with more values than this is a name or a note, not a category
_COMMAS = re.compile(  # 1,5 and 1,000.5 and 1.000,5
    r"[+-]?(\d+,\d+|\d{1,3}(,\d{3})+(\.\d+)?|\d{1,3}(\.\d{3})+,\d+)"
)


def digits(*, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels (UCI, via scikit-learn), standardised on the train rows."""
    return _bundled(load_digits, "digits", valid_fraction, holdout_fraction, seed)


def breast_cancer(*, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0) -> Data:
    """569 tumours, 30 measures, 2 classes (UCI, via scikit-learn), standardised on the train rows."""
    return _bundled(load_breast_cancer, "breast_cancer", valid_fraction, holdout_fraction, seed)


def wine(*, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0) -> Data:
    """178 wines, 13 measures, 3 growers (UCI, via scikit-learn), standardised on the train rows."""
    return _bundled(load_wine, "wine", valid_fraction, holdout_fraction, seed)


def iris(*, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0) -> Data:
    """150 irises, 4 measures, 3 species (Fisher 1936, via scikit-learn), standardised on the train rows."""
    return _bundled(load_iris, "iris", valid_fraction, holdout_fraction, seed)


def diabetes(*, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0) -> Data:
    """442 patients, 10 measures, and how far the disease went in a year: a regression (Efron et al. 2004, via
    scikit-learn). Inputs are standardised on the train rows; the target keeps its units (25 to 346)."""
    return _bundled(load_diabetes, "diabetes", valid_fraction, holdout_fraction, seed)


def _bundled(
    load: Callable[[], Any], name: str, valid_fraction: float, holdout_fraction: float, seed: int
) -> Data:
    bunch = load()
    return split(
        bunch.data,
        bunch.target,
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        standardise=True,
        seed=seed,
        name=name,
        classes=[str(label) for label in getattr(bunch, "target_names", ())],
    )


# -- the user's own table ------------------------------------------------------------------------------


def csv(
    path: str | Path,
    target: str,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    *,
    categorical: Sequence[str] = (),
    target_type: Literal["classes", "number"] | None = None,
    delimiter: str = ",",
    standardise: bool = True,
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    seed: int = 0,
) -> Data:
    """A table in a UTF-8 text file whose first row names the columns.

    A column of numbers is one input, standardised on the train rows; any other is a category, one input of 0
    or 1 a value. A target of text, or of at most 20 whole numbers with five rows each on average, is
    classes; any other is a number to predict, in its own units. `Data.columns` says what was taken for what.
    Where nearly all values are numbers, the few that are not are refused.

    columns: those to learn from (default: all but `target` and `drop`).
    categorical: columns of numbers that are only names, such as a postcode.
    target_type: "classes" or "number", where the guess is wrong.
    Raises TaskError where a value is missing, naming line and column: filling it in is a choice of the
    user's that must not look at the hold-out.
    """
    header, table, lines = _read_table(Path(path), delimiter)
    place = {name: number for number, name in enumerate(header)}
    names = _chosen(path, header, target, columns, drop, categorical)
    _refuse_missing(path, [*names, target], place, table, lines)

    blocks: list[np.ndarray] = []
    described: list[Column] = []
    for name in names:
        texts = [row[place[name]] for row in table]
        numbers = None if name in categorical else _numbers(texts)
        if numbers is not None:
            blocks.append(numbers[:, None])
            described.append(Column(name, "number"))
            continue
        values = _ordered(texts)
        if len(values) > MOST_CATEGORIES:
            odd = [(text, line) for text, line in zip(texts, lines, strict=True) if _number(text) is None]
            why = f" (it is no number: {odd[0][0]!r} in line {odd[0][1]})" if odd else ""
            raise TaskError(
                f"{path}: a category must have at most {MOST_CATEGORIES} values, column {name!r} has "
                f"{len(values)}{why}; drop it or mend the value"
            )
        if name not in categorical:
            _refuse_odd(path, f"column {name!r}", texts, lines, "drop the column, or name it in categorical")
        blocks.append((np.array(texts)[:, None] == np.array(values)[None, :]).astype(np.float64))
        described.append(Column(name, "category", values))

    targets, classes = _target(path, target, [row[place[target]] for row in table], lines, target_type)
    described.append(Column(target, "target", classes))
    numeric = [column.kind == "number" for column in described[:-1] for _ in column.values or "."]
    data = split(
        np.concatenate(blocks, axis=1),
        targets,
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        standardise=numeric if standardise else False,
        seed=seed,
        name=Path(path).stem,
        classes=classes,
    )
    return dataclasses.replace(data, columns=tuple(described))


def _read_table(path: Path, delimiter: str) -> tuple[list[str], list[list[str]], list[int]]:
    """The header, the rows and the line each ended on."""
    if len(delimiter) != 1:
        raise TaskError(f"delimiter must be one character, got {delimiter!r}")
    table, lines = [], []
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            reader = csv_reader(file, delimiter=delimiter, strict=True)
            for row in reader:
                if row:
                    table.append([value.strip() for value in row])
                    lines.append(reader.line_num)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, CsvError) as error:
        raise TaskError(f"{path} must be a table in UTF-8 text: {error}; save it as CSV in UTF-8") from error
    if len(table) < 2:
        raise TaskError(f"{path} must have a header row and rows below it, got {len(table)} rows")
    header = table[0]
    if len(header) == 1 and (other := [mark for mark in ";\t|," if mark != delimiter and mark in header[0]]):
        raise TaskError(
            f"{path}: the header must name at least two columns, got {header[0]!r} with "
            f"delimiter={delimiter!r}; set delimiter={other[0]!r}"
        )
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise TaskError(f"{path}: column names must differ, {twice[0]!r} stands twice; rename one")
    for row, line in zip(table, lines, strict=True):
        if len(row) != len(header):
            raise TaskError(
                f"{path}: every row must have the {len(header)} values that the header names, line {line} "
                f"has {len(row)}; put quotes around a value that holds {delimiter!r}"
            )
    return header, table[1:], lines[1:]


def _chosen(
    path: str | Path,
    header: Sequence[str],
    target: str,
    columns: Sequence[str] | None,
    drop: Sequence[str] | None,
    categorical: Sequence[str],
) -> list[str]:
    for option, given in (("columns", columns), ("drop", drop), ("categorical", categorical)):
        if isinstance(given, str):
            raise TaskError(f"{option} must be a list of names, got {given!r}; write [{given!r}]")
    known = (("target", [target]), ("columns", columns), ("drop", drop), ("categorical", categorical))
    for option, given in known:
        unknown = [name for name in given or () if name not in header]
        if unknown:
            raise TaskError(
                f"{path}: {option} names {unknown[0]!r}, which is no column; "
                f"the columns are {', '.join(header)}"
            )
        if option != "target" and target in (given or ()):
            raise TaskError(f"{path}: {option} must not name the target {target!r}; leave it out there")
    names = [name for name in columns or header if name != target and name not in (drop or ())]
    if not names:
        raise TaskError(f"{path}: at least one column must be left to learn from; drop fewer")
    return names


def _refuse_missing(
    path: str | Path,
    names: Sequence[str],
    place: dict[str, int],
    table: Sequence[Sequence[str]],
    lines: Sequence[int],
) -> None:
    holes = [
        f"line {line} column {name!r}"
        for row, line in zip(table, lines, strict=True)
        for name in names
        if row[place[name]].lower() in MISSING
    ]
    if holes:
        more = f" and {len(holes) - 5} more" if len(holes) > 5 else ""
        raise TaskError(
            f"{path}: no value may be missing, but these are: {', '.join(holes[:5])}{more}; fill them in, "
            "leave those rows out, or name the columns in drop"
        )


def _refuse_odd(path: str | Path, what: str, texts: Sequence[str], lines: Sequence[int], remedy: str) -> None:
    """Refuses the values that are no numbers in a column where nearly all are meant as numbers."""
    saying = [text for text in texts if text.lower() not in DASHES]
    meant = [text for text in saying if _means_number(text)]
    if len(set(meant)) <= 2 or len(meant) < MOSTLY_NUMBERS * len(saying):
        return
    odd = [(text, line) for text, line in zip(texts, lines, strict=True) if _number(text) is None]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise TaskError(
            f"{path}: a column of numbers must hold finite numbers, with a point for decimals, but {what} "
            f"has {odd[0][0]!r} in line {odd[0][1]}{more}; mend it, leave the row out, {remedy}"
        )


def _means_number(text: str) -> bool:
    """Whether it is a number, if only with a comma in it or an infinite one."""
    if _COMMAS.fullmatch(text):
        return True
    return "_" not in text and (_number(text) is not None or text.lower().lstrip("+-") in ("inf", "infinity"))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    # Python also reads 1_000 and inf: in a table the one is a code and the other an accident
    return number if math.isfinite(number) and "_" not in text else None


def _numbers(texts: Sequence[str]) -> np.ndarray | None:
    numbers = [number for text in texts if (number := _number(text)) is not None]
    return np.array(numbers) if len(numbers) == len(texts) else None


def _ordered(texts: Sequence[str]) -> tuple[str, ...]:
    """The distinct values: by size where all are numbers, else by letter."""
    values = sorted(set(texts))
    numbers = _numbers(values)
    if numbers is not None:
        values = [values[i] for i in np.argsort(numbers, kind="stable")]
    return tuple(values)


def _target(
    path: str | Path, name: str, texts: Sequence[str], lines: Sequence[int], target_type: str | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    if target_type not in (None, "classes", "number"):
        raise TaskError(f"target_type must be 'classes' or 'number', got {target_type!r}")
    numbers = _numbers(texts)
    if numbers is None and target_type == "number":
        odd = next(text for text in texts if _number(text) is None)
        raise TaskError(f"{path}: target {name!r} must hold finite numbers, got {odd!r}; mend it")
    if numbers is None and target_type is None:
        _refuse_odd(path, f"target {name!r}", texts, lines, "or set target_type='classes'")
    if numbers is not None and target_type is None:
        distinct = np.unique(numbers)
        few = len(distinct) <= MOST_CLASSES and len(distinct) * ROWS_PER_CLASS <= len(texts)
        target_type = "classes" if few and bool((distinct == np.round(distinct)).all()) else "number"
    if numbers is not None and target_type == "number":
        return numbers, ()
    if numbers is not None:  # 1 and 1.0 are one class
        texts = [repr(float(n)) if n % 1 or abs(n) >= 2**53 else str(int(n)) for n in numbers]
    classes = _ordered(texts)
    rare = sorted(label for label, count in Counter(texts).items() if count < 3)
    if rare:
        raise TaskError(
            f"{path}: every class of target {name!r} must have at least three rows (one to train on, one to "
            f"validate, one to hold out), {rare[0]!r} has fewer; leave those rows out"
            + ("" if numbers is None else ", or set target_type='number'")
        )
    if len(classes) < 2:
        raise TaskError(f"{path}: target {name!r} must have at least two classes, got only {classes[0]!r}")
    index = {label: number for number, label in enumerate(classes)}
    return np.array([index[text] for text in texts]), classes
