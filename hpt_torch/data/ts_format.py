"""The `.ts` text format of aeon and sktime: a header of @-lines, then one series a line.

A series is its dimensions with `:` between them, each its values with `,` between them, and at the end the
class label or target. Time stamps and missing values are refused.
"""

# N series, T steps, F features (the format's dimensions)

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from hpt_torch.types import TaskError


@dataclass(frozen=True, kw_only=True)
class TsFile:
    """What a file holds."""

    series: tuple[np.ndarray, ...]  # N arrays (T, F) float64, T of each its own
    targets: np.ndarray  # (N,) class numbers int64, or float64
    classes: tuple[str, ...]  # their names in the order of the header; none for a regression

    @property
    def features(self) -> int:
        return int(self.series[0].shape[1])


@dataclass
class _Header:
    classes: tuple[str, ...] | None = None  # None: the target is a number
    labelled: bool = False
    dimensions: int | None = None
    equal_length: bool = False
    series_length: int | None = None


class _Reader:
    """Knows the line it is at, so that every error can name it."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.line = path, 0

    def refuse(self, what: str) -> NoReturn:
        raise TaskError(f"{self.path}, line {self.line}: {what}")

    def flag(self, name: str, values: list[str]) -> bool:
        if not values or values[0].lower() not in ("true", "false"):
            self.refuse(f"@{name} must be true or false, got {' '.join(values) or 'nothing'}")
        return values[0].lower() == "true"

    def count(self, name: str, values: list[str]) -> int:
        if len(values) != 1 or not values[0].isdecimal() or int(values[0]) < 1:
            self.refuse(f"@{name} must be a whole number from 1, got {' '.join(values) or 'nothing'}")
        return int(values[0])

    def read(self) -> TsFile:
        try:
            lines = Path(self.path).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise TaskError(f"{self.path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise TaskError(f"{self.path} must be text in UTF-8: {error}; save it as UTF-8") from error
        header, in_data = _Header(), False
        series: list[np.ndarray] = []
        labels: list[str] = []
        for self.line, raw in enumerate(lines, start=1):
            text = raw.strip()
            if not text or text[0] in "#%":
                continue
            if in_data:
                values, label = self.case(text, header)
                if series and values.shape[1] != series[0].shape[1]:
                    self.refuse(
                        f"every series must have the same dimensions, got {values.shape[1]} after "
                        f"{series[0].shape[1]}; check the colons"
                    )
                if header.equal_length and series and len(values) != len(series[0]):
                    self.refuse(
                        f"@equalLength is true, and {len(values)} steps follow {len(series[0])}; set it to "
                        "false or mend the line"
                    )
                series.append(values)
                labels.append(label)
            elif text[0] != "@":
                self.refuse("a line before @data must begin with @ or #; add @data above the first series")
            elif text.split()[0].lower() == "@data":
                in_data = True
                if not header.labelled:
                    self.refuse(
                        "@classLabel true or @targetLabel true must say that each series has a target"
                    )
            else:
                self.header_line(text, header)
        if not series:
            raise TaskError(f"{self.path} must hold series below a line @data, got none")
        return TsFile(
            series=tuple(series), targets=self.targets(labels, header), classes=header.classes or ()
        )

    def header_line(self, text: str, header: _Header) -> None:
        name, *values = text[1:].split()
        match name.lower():
            case "timestamps":
                if self.flag(name, values):
                    self.refuse("@timeStamps must be false: series with time stamps are not read; drop them")
            case "missing":
                self.flag(name, values)  # what counts is whether a value is missing, which is refused there
            case "univariate":
                if self.flag(name, values):
                    header.dimensions = 1
            case "dimensions" | "dimension":
                header.dimensions = self.count(name, values)
            case "equallength":
                header.equal_length = self.flag(name, values)
            case "serieslength":
                header.series_length = self.count(name, values)
            case "classlabel":
                header.labelled = self.flag(name, values)
                header.classes = tuple(values[1:])
                if header.labelled and len(set(header.classes)) < max(2, len(header.classes)):
                    self.refuse(f"@classLabel true must be followed by two or more labels, got {values[1:]}")
            case "targetlabel":
                header.labelled = self.flag(name, values)
            case _:  # @problemName and whatever else describes the file
                pass

    def case(self, text: str, header: _Header) -> tuple[np.ndarray, str]:
        *dimensions, label = (part.strip() for part in text.split(":"))
        if not dimensions:
            self.refuse("a series must be followed by ':' and its target, got no ':'")
        if header.dimensions is not None and len(dimensions) != header.dimensions:
            self.refuse(
                f"a series must have the {header.dimensions} dimensions of the header, got {len(dimensions)}"
            )
        rows = [self.values(dimension, number) for number, dimension in enumerate(dimensions, start=1)]
        counts = [len(row) for row in rows]
        if len(set(counts)) > 1:
            self.refuse(f"all dimensions of a series must have the same steps, got {counts}")
        if header.equal_length and header.series_length not in (None, counts[0]):
            self.refuse(f"a series must have the {header.series_length} steps of the header, got {counts[0]}")
        if header.classes is not None and label not in header.classes:
            self.refuse(f"the class must be one of {', '.join(header.classes)}, got {label!r}")
        if header.classes is None and _finite(label) is None:
            self.refuse(f"the target must be a finite number, got {label!r}")
        return np.array(rows).T, label

    def values(self, dimension: str, number: int) -> list[float]:
        values = []
        for text in dimension.split(","):
            value = _finite(text)
            if value is None:
                shown = text.strip() or "nothing"
                self.refuse(
                    f"a value must be a finite number, got {shown} in dimension {number}; missing values are "
                    "not filled in: do it, or leave the series out"
                )
            values.append(value)
        return values

    def targets(self, labels: list[str], header: _Header) -> np.ndarray:
        if header.classes is None:
            return np.array([float(label) for label in labels])
        number = {label: i for i, label in enumerate(header.classes)}
        return np.array([number[label] for label in labels], dtype=np.int64)


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_ts(path: str | Path) -> TsFile:
    """The series of a file. Raises TaskError that names the line of what cannot be read."""
    return _Reader(path).read()
