"""scikit-learn's tables, CSV files and plain `.npz` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpt_torch.data import DATASETS, csv, diabetes, npz
from hpt_torch.types import TaskError


@pytest.mark.parametrize(
    ("name", "rows", "features", "out_features"),
    [
        ("digits", 1797, 64, 10),
        ("breast_cancer", 569, 30, 2),
        ("wine", 178, 13, 3),
        ("iris", 150, 4, 3),
        ("diabetes", 442, 10, 1),
    ],
)
def test_bundled_tables(name: str, rows: int, features: int, out_features: int) -> None:
    data = DATASETS[name](seed=2)
    assert data.holdout is not None
    assert len(data.train) + len(data.valid) + len(data.holdout) == rows
    assert (data.input_shape, data.out_features, data.name) == ((features,), out_features, name)
    mean = data.train.tensors["inputs"].mean(dim=0)
    torch.testing.assert_close(mean, torch.zeros(features), atol=1e-5, rtol=0)
    assert data.fingerprint() == DATASETS[name](seed=2).fingerprint()
    assert len(data.classes) == (out_features if out_features > 1 else 0)


def test_diabetes_keeps_the_units_of_its_target() -> None:
    targets = diabetes().train.tensors["targets"]
    assert targets.dtype == torch.float32
    assert 100 < float(targets.mean()) < 200


# -- csv -----------------------------------------------------------------------------------------------


def table(path: Path, rows: int = 60, header: str = "age,colour,plot,kind") -> Path:
    colours, kinds = ("red", "blue", "green"), ("yes", "no")
    lines = [f"{20 + i},{colours[i % 3]},{1000 + i % 4},{kinds[i % 2]}" for i in range(rows)]
    file = path / "table.csv"
    file.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return file


def test_types_are_inferred_and_said(tmp_path: Path) -> None:
    data = csv(table(tmp_path), "kind")
    assert [str(column) for column in data.columns] == [
        "age: number",
        "colour: category (blue, green, red)",
        "plot: number",
        "kind: target, classes no, yes",
    ]
    assert (data.input_shape, data.out_features, data.classes) == ((5,), 2, ("no", "yes"))
    x = data.train.tensors["inputs"]
    torch.testing.assert_close(x[:, [0, 4]].mean(dim=0), torch.zeros(2), atol=1e-5, rtol=0)
    assert x[:, 1:4].sum(dim=1).unique().tolist() == [1.0]  # categories stay 0 and 1
    assert x[:, 1:4].unique().tolist() == [0.0, 1.0]


def test_rows_keep_their_target(tmp_path: Path) -> None:
    data = csv(table(tmp_path), "kind", standardise=False)
    for part in (data.train, data.valid, data.holdout):
        assert part is not None
        ages, kinds = part.tensors["inputs"][:, 0], part.tensors["targets"]
        assert [("yes", "no")[int(age) % 2] for age in ages] == [data.classes[kind] for kind in kinds]


def test_columns_can_be_chosen_dropped_and_named_categories(tmp_path: Path) -> None:
    file = table(tmp_path)
    assert csv(file, "kind", columns=["plot"]).input_shape == (1,)
    assert csv(file, "kind", drop=["colour"]).input_shape == (2,)
    data = csv(file, "kind", ["plot"], categorical=["plot"])
    assert str(data.columns[0]) == "plot: category (1000, 1001, 1002, 1003)"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    file = path / "t.csv"
    file.write_text(text, encoding=encoding)
    return file


def column_of(values: list[Any]) -> str:
    return "a,y\n" + "\n".join(f"{i},{value}" for i, value in enumerate(values))


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([i % 12 for i in range(60)], tuple(map(str, range(12)))),  # by size, not by letter
        ([float(i % 2) for i in range(60)], ("0", "1")),
        ([i % 13 for i in range(60)], ()),  # hardly repeated: a quantity
        ([i for i in range(60)], ()),
        ([i % 2 + 0.5 for i in range(60)], ()),
        (["b" if i % 2 else "a" for i in range(60)], ("a", "b")),
        ([10_000_000 + i % 3 for i in range(60)], ("10000000", "10000001", "10000002")),
    ],
)
def test_what_a_target_is_taken_for(tmp_path: Path, values: list[Any], classes: tuple[str, ...]) -> None:
    data = csv(write(tmp_path, column_of(values)), "y")
    assert data.classes == classes
    assert data.train.tensors["targets"].dtype == (torch.int64 if classes else torch.float32)
    assert data.out_features == (len(classes) or 1)


def test_the_guess_can_be_overruled(tmp_path: Path) -> None:
    file = write(tmp_path, column_of([i % 3 for i in range(60)]))
    assert csv(file, "y", target_type="number").train.tensors["targets"].dtype == torch.float32
    assert csv(file, "y", target_type="classes").out_features == 3


def test_byte_order_mark_quotes_blank_lines_and_delimiters(tmp_path: Path) -> None:
    text = "a;y\n" + "\n\n".join(f'"{i}";{i / 3}' for i in range(20))
    data = csv(write(tmp_path, text, "utf-8-sig"), "y", delimiter=";")
    assert data.columns[0].name == "a"
    assert len(data.train) == 12


def test_missing_values_are_named(tmp_path: Path) -> None:
    lines = [f"{i},{i % 2}" for i in range(20)]
    lines[3], lines[5] = ",1", "5,NaN"
    with pytest.raises(
        TaskError, match=r"no value may be missing, .*: line 5 column 'a', line 7 column 'y'; fill them in"
    ):
        csv(write(tmp_path, "a,y\n" + "\n".join(lines)), "y")
    holes = "a,y\n" + "\n".join(f"?,{i % 2}" for i in range(20))
    with pytest.raises(TaskError, match="line 6 column 'a' and 15 more; fill"):
        csv(write(tmp_path, holes), "y")


@pytest.mark.parametrize("missing", ["#N/A", "<NA>", "#NA", "-nan", "1.#QNAN", "NULL", "n/a"])
def test_what_other_programs_write_for_a_missing_value_is_missing(tmp_path: Path, missing: str) -> None:
    for values in ([*map(str, range(39)), missing], [*["low", "high"] * 20, missing]):
        text = "a,y\n" + "\n".join(f"{value},{i % 2}" for i, value in enumerate(values))
        with pytest.raises(TaskError, match=f"may be missing, .*: line {len(values) + 1} column 'a'; fill"):
            csv(write(tmp_path, text), "y")


@pytest.mark.parametrize("odd", ["x", "-", "None", "inf", "-Infinity", "1,5", "1,000", "1_000", "12 cm"])
def test_a_value_that_is_none_in_a_column_of_numbers_is_refused(tmp_path: Path, odd: str) -> None:
    values = [*map(str, range(20)), odd, *map(str, range(19))]
    text = "a;y\n" + "\n".join(f"{value};{i % 2}" for i, value in enumerate(values))
    with pytest.raises(TaskError, match=f"column 'a' has '{odd}' in line 22; mend it, .* in categorical"):
        csv(write(tmp_path, text), "y", delimiter=";")
    named = csv(write(tmp_path, text), "y", delimiter=";", categorical=["a"])
    assert odd in named.columns[0].values
    swapped = "y;a\n" + text.split("\n", 1)[1]
    with pytest.raises(TaskError, match=f"target 'y' has '{odd}' in line 22; mend it, .*='classes'"):
        csv(write(tmp_path, swapped), "y", delimiter=";")


@pytest.mark.parametrize(
    ("values", "first"),
    [
        (["0,5", "1,5", "-2,25", "3,0"], "0,5"),
        (["1,000", "12,500", "1,000,000", "7"], "1,000"),
        (["1.000,5", "2", "3", "4"], "1.000,5"),
        (["1", "-", "none", "2", "3", "-"], "-"),  # many rows without a value are no category either
    ],
)
def test_columns_of_numbers_that_cannot_be_read_are_refused(
    tmp_path: Path, values: list[str], first: str
) -> None:
    text = "a;y\n" + "\n".join(f"{values[i % len(values)]};{i % 2}" for i in range(60))
    with pytest.raises(TaskError, match=f"with a point for decimals, but column 'a' has '{first}' in line"):
        csv(write(tmp_path, text), "y", delimiter=";")


@pytest.mark.parametrize(
    "values",
    [
        ["1a", "12", "7b"],
        ["1", "2", "3", "many"],  # a quarter is no number
        ["none", "some", "-"],
        ["0", "1", "-"],  # two numbers may be names
        ["1_000", "2_000", "3_000"],
    ],
)
def test_text_with_some_numbers_stays_a_category(tmp_path: Path, values: list[str]) -> None:
    text = "a;y\n" + "\n".join(f"{values[i % len(values)]};{i % 2}" for i in range(60))
    assert csv(write(tmp_path, text), "y", delimiter=";").columns[0].values == tuple(sorted(values))


TWO = "a,b,y\n" + "\n".join(f"{i},{i * 2},{i % 2}" for i in range(20))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TWO, {"target": "z"}, "target names 'z', which is no column; the columns are a, b, y"),
        (TWO, {"drop": ["z"]}, "drop names 'z', which is no column"),
        (TWO, {"columns": ["a", "y"]}, "columns must not name the target 'y'; leave it out there"),
        (TWO, {"drop": "a"}, r"drop must be a list of names, got 'a'; write \['a'\]"),
        (TWO, {"drop": ["a", "b"]}, "at least one column must be left to learn from; drop fewer"),
        (TWO, {"delimiter": "::"}, "delimiter must be one character, got '::'"),
        (TWO, {"delimiter": ";"}, "must name at least two columns, .*; set delimiter=','"),
        (TWO, {"target_type": "text"}, "target_type must be 'classes' or 'number', got 'text'"),
        ("a,y\n", {}, "must have a header row and rows below it, got 1 rows"),
        (TWO + "\n1,2", {}, "must have the 3 values that the header names, line 22 has 2; put quotes"),
        ("a,a,y\n1,2,3", {}, "column names must differ, 'a' stands twice; rename one"),
        ('a,y\n"1,2', {}, "must be a table in UTF-8 text: .*; save it as CSV in UTF-8"),
        (column_of(["a"] * 20), {}, "must have at least two classes, got only 'a'"),
        (
            column_of(["a", "b"] * 9 + ["c"]),
            {},
            "must have at least three rows .*, 'c' has fewer; leave those",
        ),
        (column_of(["a", "b"] * 9), {"target_type": "number"}, "must hold finite numbers, got 'a'; mend it"),
        (column_of([*range(50), "inf"]), {"target_type": "number"}, "must hold finite numbers, got 'inf'"),
        (
            "a,y\n" + "\n".join(f"{'x' if i == 7 else i},{i % 2}" for i in range(80)),
            {},
            r"at most 50 values, column 'a' has 80 \(it is no number: 'x' in line 9\); drop it or mend",
        ),
        (column_of(["0", "1"] * 40), {"categorical": ["a"]}, "at most 50 values, column 'a' has 80; drop it"),
    ],
)
def test_csv_errors(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        csv(write(tmp_path, text), **{"target": "y", **options})


def test_a_file_that_is_absent_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        csv(tmp_path / "absent.csv", "y")
    (tmp_path / "latin.csv").write_bytes("a,y\né,1\n".encode("latin-1"))
    with pytest.raises(TaskError, match="must be a table in UTF-8 text"):
        csv(tmp_path / "latin.csv", "y")


# -- npz -----------------------------------------------------------------------------------------------

X, Y = np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(20) % 2


def saved(path: Path, **arrays: Any) -> Path:
    file = path / "arrays.npz"
    np.savez(file, **arrays)
    return file


def test_npz_is_split_or_comes_in_parts(tmp_path: Path) -> None:
    data = npz(saved(tmp_path, inputs=X, targets=Y), standardise=True)
    assert (len(data.train), len(data.valid), data.name) == (12, 4, "arrays")
    ready = npz(saved(tmp_path, x_train=X, y_train=Y, x_val=X[:3], y_val=Y[:3], x_test=X[:5], y_test=Y[:5]))
    assert ready.holdout is not None
    assert (len(ready.train), len(ready.valid), len(ready.holdout)) == (20, 3, 5)
    own = npz(saved(tmp_path, features=X, label=Y * 1.0), "features", "label")
    assert own.train.tensors["targets"].dtype == torch.float32


def test_npz_numbers_text_labels_over_all_parts(tmp_path: Path) -> None:
    words = np.array(["b", "c"])[Y]
    test = np.array(["a", "b", "c"])
    data = npz(saved(tmp_path, x_train=X, y_train=words, x_test=X[:3], y_test=test))
    assert data.holdout is not None
    assert (data.classes, data.out_features) == (("a", "b", "c"), 3)
    assert data.holdout.tensors["targets"].tolist() == [0, 1, 2]
    assert set(data.train.tensors["targets"].tolist()) == {1, 2}


def test_npz_names_classes_of_bytes_as_text(tmp_path: Path) -> None:
    words = np.array([b"cat", "é".encode()])[Y]
    assert npz(saved(tmp_path, x=X, y=words)).classes == ("cat", "é")
    assert npz(saved(tmp_path, x=X, y=Y, classes=np.array([b"no", b"yes"]))).classes == ("no", "yes")
    assert npz(saved(tmp_path, x=X, y=np.array([b"a", b"\xe9"])[Y])).classes == ("a", r"\xe9")


def test_npz_finds_lengths(tmp_path: Path) -> None:
    series, steps = np.zeros((20, 5, 2), dtype=np.float32), np.arange(20) % 5 + 1
    assert "lengths" in npz(saved(tmp_path, x=series, y=Y, len=steps)).valid.tensors
    named = npz(saved(tmp_path, x=series, y=Y, steps=steps), lengths="steps")
    assert "lengths" in named.train.tensors
    assert "lengths" not in npz(saved(tmp_path, x=series, y=Y)).train.tensors


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (
            {"a": X},
            {},
            "must hold inputs as inputs or inputs_train or x or x_train, but the file has a; pass",
        ),
        ({"x": X}, {}, "must hold targets as .*, but the file has x; pass targets=NAME"),
        ({"x": X, "y": Y}, {"lengths": "n"}, "must hold lengths as n or n_train, but the file has x, y"),
        ({"x_train": X, "y_train": Y, "x_test": X}, {}, "must hold targets as y_test, but the file has"),
        ({"x": X, "y": np.array(1)}, {}, "y must have one entry a row, got a single value"),
        ({"x": np.array([{}] * 20), "y": Y}, {}, "must be an .npz file of plain arrays: .*pickle"),
        ({"x": np.zeros((20, 4, 4), dtype=np.uint8), "y": Y}, {}, "are images; use image_npz"),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        npz(saved(tmp_path, **arrays), **options)


def test_npz_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        npz(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(TaskError, match="must be an .npz file of plain arrays"):
        npz(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(TaskError, match="must be an .npz file with named arrays; write it with numpy.savez"):
        npz(tmp_path / "one.npy")
