"""JapaneseVowels, `.ts` files and text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpt_torch.data import Data, japanese_vowels, text, ts
from hpt_torch.types import TaskError

SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "data"
VOWELS = SHARED / "japanese_vowels.npz"
HEADER = """# made by hand
@problemName toy
@timeStamps false
@missing false
@univariate false
@dimensions 2
@equalLength false
@classLabel true up down
@data
"""


def write(path: Path, body: str, header: str = HEADER, name: str = "toy_TRAIN.ts") -> Path:
    file = path / name
    file.write_text(header + body, encoding="utf-8")
    return file


def series(rows: int = 20, lengths: tuple[int, ...] = (2, 3, 4)) -> str:
    """Row i counts up from i in its first dimension, and in tenths in its second."""
    lines = []
    for i in range(rows):
        steps = range(lengths[i % len(lengths)])
        first, second = (",".join(str(i + k / scale) for k in steps) for scale in (1, 10))
        lines.append(f"{first}:{second}:{('up', 'down')[i % 2]}")
    return "\n".join(lines)


def test_unequal_series(tmp_path: Path) -> None:
    data = ts(write(tmp_path, series()), standardise=False, holdout_fraction=0)
    assert (data.input_shape, data.out_features, data.classes, data.name) == (
        (4, 2),
        2,
        ("up", "down"),
        "toy",
    )
    assert (len(data.train), len(data.valid)) == (16, 4)
    for part in (data.train, data.valid):
        tensors = part.tensors
        for x, y, n in zip(tensors["inputs"], tensors["targets"], tensors["lengths"], strict=True):
            i = int(x[0, 0])
            assert (int(n), int(y)) == ((2, 3, 4)[i % 3], i % 2)
            assert x[: int(n), 0].tolist() == [i + k for k in range(int(n))]
            assert x[int(n) :].abs().sum() == 0


def test_equal_series_have_no_lengths(tmp_path: Path) -> None:
    header = HEADER.replace("@equalLength false", "@equalLength true\n@seriesLength 3")
    data = ts(write(tmp_path, series(lengths=(3,)), header))
    assert sorted(data.train.tensors) == ["inputs", "targets"]
    assert data.input_shape == (3, 2)
    mean = data.train.tensors["inputs"].mean(dim=(0, 1))
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)


def test_a_test_file_is_the_holdout(tmp_path: Path) -> None:
    train, test = write(tmp_path, series()), write(tmp_path, series(6, (5, 1)), name="toy_TEST.ts")
    data = ts(train, test)
    assert data.holdout is not None
    assert (len(data.train), len(data.valid), len(data.holdout)) == (16, 4, 6)
    assert data.input_shape == (5, 2)  # the longest of both files
    assert data.holdout.tensors["lengths"].tolist() == [5, 1] * 3


def test_a_test_file_must_be_like_the_other(tmp_path: Path) -> None:
    other = write(tmp_path, series(), HEADER.replace("up down", "down up"), "toy_TEST.ts")
    with pytest.raises(
        TaskError, match=r"toy_TEST.ts must have the dimensions and classes of .*toy_TRAIN.ts, got 2"
    ):
        ts(write(tmp_path, series()), other)


def test_a_regression(tmp_path: Path) -> None:
    header = "@univariate true\n@equalLength true\n@targetLabel true\n@data\n"
    data = ts(write(tmp_path, "\n".join(f"{i},{i}:{i / 2}" for i in range(20)), header), standardise=False)
    assert (data.out_features, data.classes) == (1, ())
    torch.testing.assert_close(data.train.tensors["targets"] * 2, data.train.tensors["inputs"][:, 0, 0])


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (
            HEADER,
            "1,2:1,2:up\n1,2:1,x:up",
            "line 11: a value must be a finite number, got x in dimension 2; missing",
        ),
        (HEADER, "1,?:1,2:up", r"line 10: a value must be a finite number, got \? in dimension 1"),
        (HEADER, "1,,3:1,2,3:up", "line 10: a value must be a finite number, got nothing in dimension 1"),
        (HEADER, "1,inf:1,2:up", "line 10: a value must be a finite number, got inf in dimension 1"),
        (HEADER, "1,2:up", "line 10: a series must have the 2 dimensions of the header, got 1"),
        (HEADER, "1,2", "line 10: a series must be followed by ':' and its target, got no ':'"),
        (HEADER, "1,2:1:up", r"line 10: all dimensions of a series must have the same steps, got \[2, 1\]"),
        (HEADER, "1,2:1,2:left", "line 10: the class must be one of up, down, got 'left'"),
        (HEADER, "", "must hold series below a line @data, got none"),
        (
            HEADER.replace("@dimensions 2\n", ""),
            "1:1:up\n1:up",
            "line 10: .*same dimensions, got 1 after 2; check",
        ),
        (HEADER.replace("2\n", "two\n"), "", "line 6: @dimensions must be a whole number from 1, got two"),
        (
            HEADER.replace("@missing false", "@missing"),
            "",
            "line 4: @missing must be true or false, got nothing",
        ),
        (
            HEADER.replace("Stamps false", "Stamps true"),
            "",
            "line 3: @timeStamps must be false: .*; drop them",
        ),
        (
            HEADER.replace("true up down", "true up"),
            "",
            r"line 8: @classLabel true must be followed by two or more",
        ),
        (
            HEADER.replace("true up down", "false"),
            "1:1",
            "line 9: @classLabel true or @targetLabel true must say",
        ),
        ("@targetLabel true\n@data\n", "1:up", "line 3: the target must be a finite number, got 'up'"),
        ("1,2:up\n", "", "line 1: a line before @data must begin with @ or #; add @data above"),
        (
            HEADER.replace("Length false", "Length true"),
            "1:1:up\n1,2:1,2:up",
            "line 11: @equalLength is true, and 2",
        ),
        (
            HEADER.replace("Length false", "Length true\n@seriesLength 3"),
            "1:1:up",
            "line 11: a series must have the 3 steps of the header, got 1",
        ),
    ],
)
def test_ts_errors_name_the_line(tmp_path: Path, header: str, body: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        ts(write(tmp_path, body, header))


def test_ts_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        ts(tmp_path / "absent.ts")
    (tmp_path / "latin.ts").write_bytes(b"\xe9")
    with pytest.raises(TaskError, match="must be text in UTF-8"):
        ts(tmp_path / "latin.ts")


# -- JapaneseVowels ------------------------------------------------------------------------------------


def check_vowels(data: Data) -> None:
    assert data.holdout is not None
    assert (len(data.train), len(data.valid), len(data.holdout)) == (216, 54, 370)
    assert (data.input_shape, data.out_features, data.name) == ((29, 12), 9, "japanese_vowels")
    x, n = data.train.tensors["inputs"], data.train.tensors["lengths"]
    assert 7 <= int(n.min()) < int(n.max()) <= 29
    real = torch.arange(29) < n[:, None]
    torch.testing.assert_close(x[real].mean(dim=0), torch.zeros(12), atol=1e-5, rtol=0)
    assert x[~real].abs().max() == 0
    assert torch.bincount(data.valid.tensors["targets"]).tolist() == [6] * 9


def test_japanese_vowels_by_path_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    if not VOWELS.is_file():
        pytest.skip("shared/data/japanese_vowels.npz is not beside this checkout")
    check_vowels(japanese_vowels(VOWELS))
    monkeypatch.setenv("HPT_TORCH_DATA", str(SHARED))
    check_vowels(japanese_vowels())


def test_japanese_vowels_in_the_package_aeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "aeon" / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (tmp_path / "aeon" / "__init__.py").write_text("raise ImportError('it is only looked up')")
    for part in ("TRAIN", "TEST"):
        write(folder, series(), name=f"JapaneseVowels_{part}.ts")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HPT_TORCH_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = japanese_vowels()
    assert data.holdout is not None
    assert (len(data.holdout), data.name) == (20, "japanese_vowels")


def test_japanese_vowels_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HPT_TORCH_DATA", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        TaskError, match="'japanese_vowels' must be on this machine, .*empty.*: set HPT_TORCH_DATA"
    ):
        japanese_vowels()
    with pytest.raises(TaskError, match=r"path must end in _TRAIN.ts, .*, got other.ts"):
        japanese_vowels("other.ts")


# -- text ----------------------------------------------------------------------------------------------


def test_text_is_blocks_of_characters_one_step_ahead(tmp_path: Path) -> None:
    file = tmp_path / "poem.txt"
    words = "abcd" * 30 + "abxy" * 10 + "dcza" * 10  # train, valid, hold-out
    file.write_text(words, encoding="utf-8")
    data = text(file, length=8)
    assert data.holdout is not None
    assert data.classes == ("a", "b", "c", "d", "<unknown>")
    assert (data.out_features, data.input_shape, data.name) == (5, (8,), "poem")
    assert (len(data.train), len(data.valid), len(data.holdout)) == (14, 4, 4)
    shown = [character if character in "abcd" else "<unknown>" for character in words]
    for part, start in ((data.train, 0), (data.valid, 120), (data.holdout, 160)):
        x, y = part.tensors["inputs"], part.tensors["targets"]
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])  # the rows follow one another
        assert [data.classes[i] for i in x.flatten()] == shown[start : start + x.numel()]


def test_no_character_of_one_part_is_in_another(tmp_path: Path) -> None:
    file = tmp_path / "unique.txt"
    file.write_text("".join(chr(0x4E00 + i) for i in range(200)), encoding="utf-8")
    data = text(file, length=5)
    unknown = data.out_features - 1
    assert unknown == 120
    assert int(data.train.tensors["targets"].max()) < unknown
    for part in (data.valid, data.holdout):
        assert part is not None
        assert part.tensors["inputs"].unique().tolist() == [unknown]
    assert text(file, length=5, seed=1).fingerprint() == data.fingerprint()
    assert text(file, length=5, holdout_fraction=0).holdout is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1 character, got 0"),
        (
            {"length": 20},
            "valid must hold more than length=20 characters, got 20 of 100; lower length, change",
        ),
        ({"length": 5, "valid_fraction": 0}, "valid must hold more than length=5 characters, got 0 of 100"),
        (
            {"length": 5, "holdout_fraction": 0.01},
            "holdout must hold more than length=5 characters, got 1 of",
        ),
        (
            {"length": 5, "valid_fraction": 0.6, "holdout_fraction": 0.6},
            "train must hold more than .* got 0 of",
        ),
        ({"valid_fraction": 1}, r"valid_fraction must be in \[0, 1\), got 1"),
    ],
)
def test_text_errors(tmp_path: Path, options: dict[str, float], message: str) -> None:
    (tmp_path / "t.txt").write_text("ab" * 50)
    with pytest.raises(TaskError, match=message):
        text(tmp_path / "t.txt", **options)  # type: ignore[arg-type]


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        text(tmp_path / "absent.txt")
    (tmp_path / "b.txt").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(TaskError, match="must be text in UTF-8: .*; save it as UTF-8"):
        text(tmp_path / "b.txt")
