"""`split` and `Data`: parts are disjoint, exhaustive, stable, and learn only from train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from hpt_torch.data import Data, Rows, split
from hpt_torch.data.splits import stratified_subset
from hpt_torch.seeding import derive_seed
from hpt_torch.types import TaskError

CPU = torch.device("cpu")


def numbered(rows: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that are their own row number, so that a row can be followed into its part."""
    return np.arange(rows, dtype=np.float64)[:, None], np.arange(rows) % classes


def parts_of(data: Data) -> list[Rows]:
    return [part for part in (data.train, data.valid, data.holdout) if part is not None]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(40, 200),
    valid=st.sampled_from([0.1, 0.2, 0.4]),
    holdout=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 2**40),
)
def test_parts_are_disjoint_and_exhaustive(rows: int, valid: float, holdout: float, seed: int) -> None:
    data = split(*numbered(rows), valid_fraction=valid, holdout_fraction=holdout, seed=seed)
    seen = torch.cat([part.tensors["inputs"].flatten() for part in parts_of(data)])
    assert sorted(seen.tolist()) == list(range(rows))
    assert len(data.valid) == round(valid * rows)
    assert (len(data.holdout) if data.holdout else 0) == round(holdout * rows)
    for part in parts_of(data):  # a row keeps its target
        x, y = part.tensors["inputs"].flatten(), part.tensors["targets"]
        assert torch.equal(x.long() % 3, y)


def test_same_seed_same_split_and_another_seed_another() -> None:
    first, again, other = (split(*numbered(100), seed=seed) for seed in (4, 4, 5))
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != other.fingerprint()


def test_class_shares_are_kept() -> None:
    targets = np.repeat([0, 1, 2], [700, 200, 100])
    data = split(np.zeros((1000, 1)), targets, seed=1)
    for part in parts_of(data):
        shares = torch.bincount(part.tensors["targets"]).double() / len(part)
        torch.testing.assert_close(
            shares, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), atol=0.006, rtol=0
        )


def classes_of(data: Data) -> list[list[int]]:
    return [torch.bincount(part.tensors["targets"], minlength=3).tolist() for part in parts_of(data)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("valid", "holdout"), [(0.2, 0.2), (0.1, 0.4), (0.5, 0.3), (0.05, 0)])
def test_a_rare_class_has_a_row_in_every_part(valid: float, holdout: float, seed: int) -> None:
    targets = np.array([0] * (3 if holdout else 2) + [1, 2] * 98)
    fractions: dict[str, Any] = {"valid_fraction": valid, "holdout_fraction": holdout, "seed": seed}
    data = split(np.arange(len(targets))[:, None], targets, **fractions)
    assert all(counts[0] == 1 and abs(counts[1] - counts[2]) <= 2 for counts in classes_of(data))
    assert len(data.valid) == round(valid * len(targets))
    rows = torch.cat([part.tensors["inputs"].flatten() for part in parts_of(data)])
    assert sorted(rows.tolist()) == list(range(len(targets)))
    assert split(np.arange(len(targets))[:, None], targets, **fractions).fingerprint() == data.fingerprint()


def test_several_rare_classes_have_rows_in_every_part() -> None:
    targets = np.concatenate((np.repeat(np.arange(12), 3), np.full(60, 12)))
    data = split(np.zeros((96, 1)), targets, valid_fraction=0.15, holdout_fraction=0.15)
    for part in parts_of(data):
        assert len(part.tensors["targets"].unique()) == 13


def test_a_split_with_every_class_in_every_part_is_as_scikit_learn_draws_it() -> None:
    inputs, targets = np.arange(100)[:, None], np.repeat([0, 1, 2], [10, 30, 60])
    data = split(inputs, targets, seed=3)
    rest, holdout = train_test_split(
        np.arange(100),
        test_size=20,
        random_state=derive_seed(3, "split", "holdout", bits=32),
        stratify=targets,
    )
    _, valid = train_test_split(
        rest,
        test_size=20,
        random_state=derive_seed(3, "split", "valid", bits=32),
        stratify=targets[rest],
    )
    assert data.holdout is not None
    assert data.holdout.tensors["inputs"].flatten().tolist() == sorted(holdout)
    assert data.valid.tensors["inputs"].flatten().tolist() == sorted(valid)


def test_statistics_come_from_train_only() -> None:
    inputs, targets = numbered(100)
    data = split(inputs * 3 + 7, targets, standardise=True)
    train = data.train.tensors["inputs"]
    torch.testing.assert_close(train.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(correction=0), torch.tensor(1.0))
    raw = split(inputs * 3 + 7, targets)
    mean, std = raw.train.tensors["inputs"].mean(), raw.train.tensors["inputs"].std(correction=0)
    assert abs(data.valid.tensors["inputs"].mean()) > 1e-4
    torch.testing.assert_close(data.valid.tensors["inputs"], (raw.valid.tensors["inputs"] - mean) / std)


def test_standardise_names_features_and_leaves_constants_finite() -> None:
    inputs = np.stack([np.arange(50.0), np.arange(50.0), np.full(50, 5.0)], axis=1)
    data = split(inputs, np.arange(50) % 2, standardise=[True, False, True])
    train = data.train.tensors["inputs"]
    assert abs(float(train[:, 0].mean())) < 1e-6
    assert set(train[:, 1].tolist()) <= set(range(50))
    assert train[:, 2].abs().max() == 0


@pytest.mark.parametrize("shape", [(1000, 1), (1000,), (200, 5, 1), (1000, 1, 1, 1)])
@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -3e-20])
def test_a_single_feature_that_never_varies_becomes_0(shape: tuple[int, ...], value: float) -> None:
    data = split(np.full(shape, value), np.arange(shape[0]) % 2, standardise=True)
    for part in parts_of(data):
        assert part.tensors["inputs"].abs().max() == 0


def test_a_feature_that_varies_little_is_standardised() -> None:
    inputs = 1 + 1e-12 * (np.arange(100)[:, None] % 3)
    x = split(inputs, np.arange(100) % 2, standardise=True).train.tensors["inputs"]
    torch.testing.assert_close(x.std(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_large_values_are_standardised_before_they_lose_digits() -> None:
    seconds = 1.7e9 + np.arange(100.0)  # float32 knows only every 128th of them
    data = split(seconds[:, None], np.arange(100) % 2, standardise=True)
    assert len(data.train.tensors["inputs"].unique()) == len(data.train)


def test_sequences_have_one_mean_a_feature_and_padding_counts_for_nothing() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    lengths = draw.integers(2, 6, size=60)
    real = np.arange(6)[None, :, None] < lengths[:, None, None]
    inputs = np.where(real, draw.normal(4, 2, (60, 6, 3)), 999.0)
    data = split(inputs, np.arange(60) % 2, lengths=lengths, standardise=True)
    x, n = data.train.tensors["inputs"], data.train.tensors["lengths"]
    valid = torch.arange(6) < n[:, None]
    torch.testing.assert_close(x[valid].mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[valid].std(dim=0, correction=0), torch.ones(3))
    assert x[~valid].abs().max() == 0


def test_ready_made_parts_are_kept_whole() -> None:
    inputs, targets = numbered(50)
    test = {"inputs": inputs[:9] + 100, "targets": targets[:9]}
    data = split(inputs, targets, holdout=test)
    assert (len(data.train), len(data.valid)) == (40, 10)
    assert data.holdout is not None
    assert data.holdout.tensors["inputs"].flatten().tolist() == list(range(100, 109))
    assert split(inputs, targets, holdout=test, holdout_fraction=0).holdout is None
    both = split(inputs, targets, valid=test, holdout=test)
    assert (len(both.train), len(both.valid)) == (50, 9)


def test_targets_decide_out_features_and_dtype() -> None:
    x = np.zeros((30, 2))
    assert split(x, np.arange(30) % 4).out_features == 4
    assert split(x, np.arange(30.0)).out_features == 1
    several = split(x, np.zeros((30, 5)))
    assert (several.out_features, several.train.tensors["targets"].dtype) == (5, torch.float32)
    steps = split(x, np.tile(np.arange(3), (30, 1)))
    assert (steps.out_features, steps.train.tensors["targets"].dtype) == (3, torch.int64)
    assert split(x, np.arange(30) % 2, classes=["a", "b", "c"]).out_features == 3


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (bool, torch.float32),
        (np.float16, torch.float32),
        (np.uint8, torch.uint8),
        (np.int32, torch.int32),
        (np.uint16, torch.int64),
        (np.uint32, torch.int64),
        (np.uint64, torch.int64),
    ],
)
def test_inputs_are_of_a_dtype_that_models_take(given: type, taken: torch.dtype) -> None:
    numbers = np.arange(40).reshape(20, 2) % 3
    ready = {"inputs": numbers.astype(given), "targets": Y.astype(np.uint16)}
    data = split(ready["inputs"], ready["targets"], valid=ready)
    x = data.valid.tensors["inputs"]
    assert {part.tensors["inputs"].dtype for part in parts_of(data)} == {taken}
    assert x.tolist() == numbers.astype(given).tolist()
    assert data.valid.tensors["targets"].tolist() == Y.tolist()


def test_a_subset_keeps_shares_and_grows() -> None:
    labels = np.repeat([0, 1], [90, 10])
    small, large = (stratified_subset(labels, rows, 3, "train") for rows in (20, 50))
    assert np.bincount(labels[small.numpy()]).tolist() == [18, 2]
    assert set(small.tolist()) < set(large.tolist())
    assert stratified_subset(labels, 99, 3).shape == (99,)


def pixels(seed: int = 0) -> Data:
    draw = np.random.Generator(np.random.PCG64(seed))
    images = draw.integers(0, 256, (40, 3, 4, 4), dtype=np.uint8)
    data = split(images, np.arange(40) % 2)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1), torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    return Data(train=data.train, valid=data.valid, holdout=data.holdout, out_features=2, mean=mean, std=std)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_uint8_images_are_normalised_on_the_way_to_the_device(dtype: torch.dtype) -> None:
    data = pixels()
    moved = data.to(CPU, dtype)
    for part, before in zip(parts_of(moved), parts_of(data), strict=True):
        x = part.tensors["inputs"]
        wanted = (before.tensors["inputs"].double() / 255 - data.mean) / data.std
        assert x.dtype == dtype
        assert x.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(
            x.double(), wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
        )
        assert part.tensors["targets"].dtype == torch.int64
    again = moved.to(CPU, dtype)
    assert torch.equal(again.train.tensors["inputs"], moved.train.tensors["inputs"])


def test_more_rows_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pixels().to(CPU, torch.float32)
    monkeypatch.setattr("hpt_torch.data.base._CHUNK_ROWS", 7)
    assert pixels().to(CPU, torch.float32).fingerprint() == whole.fingerprint()


def test_uint8_without_a_mean_stays_uint8() -> None:
    data = split(np.zeros((20, 5), dtype=np.uint8), np.arange(20) % 2).to(CPU, torch.float32)
    assert data.train.tensors["inputs"].dtype == torch.uint8


def test_fingerprint_covers_the_statistics() -> None:
    import dataclasses

    data = pixels()
    assert data.mean is not None
    changed = dataclasses.replace(data, mean=data.mean + 0.001)
    assert changed.fingerprint() != data.fingerprint()
    plain = dataclasses.replace(data, mean=None, std=None)
    assert plain.fingerprint() != data.fingerprint()


def fingerprint_of_groups(groups: Any) -> str:
    data = split(*numbered(60), groups=groups, seed=1)
    assert data.groups is not None
    assert not data.groups.is_floating_point()
    return data.fingerprint() + str([(data.groups == group).sum().item() for group in data.groups])


@pytest.mark.parametrize(
    "labelled",
    [
        lambda names: names,
        lambda names: names.astype(object),
        lambda names: names.astype("S"),
        lambda names: names.tolist(),
        lambda names: [(name, 1) for name in names],
        lambda names: np.array([frozenset(name) for name in names], dtype=object),
    ],
)
def test_groups_may_be_any_labels(labelled: Callable[[np.ndarray], Any]) -> None:
    numbers = np.arange(60) // 5
    names = np.array(list("abcdefghijkl"))[numbers]
    assert fingerprint_of_groups(labelled(names)) == fingerprint_of_groups(numbers)


def test_mixed_labels_are_groups_of_their_own_and_integers_stay() -> None:
    data = split(*numbered(60), groups=["1", 1, None] * 20, holdout_fraction=0.3, valid_fraction=0.3)
    assert [part.tensors["targets"].unique().numel() for part in parts_of(data)] == [1, 1, 1]
    for numbers in (np.arange(60) // 5 + 700, [700 + i // 5 for i in range(60)]):
        groups = split(*numbered(60), groups=numbers).groups
        assert groups is not None
        assert groups.min() >= 700


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        (["a"] * 19, r"groups must be one integer a row, or one label .*, shape \(20,\), got \(19,\); give"),
        ([[1]] * 20, "groups must be labels that can be compared: .*; use text or numbers"),
    ],
)
def test_groups_that_tell_no_rows_apart_are_refused(groups: Any, text: str) -> None:
    with pytest.raises(TaskError, match=text):
        split(X, Y, groups=groups)


X, Y = np.zeros((20, 2)), np.arange(20) % 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"valid_fraction": 1.0}, r"valid_fraction must be in \[0, 1\), got 1.0"),
        ({"holdout_fraction": -0.1}, r"holdout_fraction must be in \[0, 1\), got -0.1"),
        ({"valid_fraction": 0}, "valid_fraction must leave at least one row to score trials on, got 0 of 20"),
        (
            {"valid_fraction": 0.5, "holdout_fraction": 0.5},
            "must leave rows to train on, got 0.5 and 0.5 of 20",
        ),
        ({"targets": Y[:3]}, "inputs and targets must have the same number of rows, got 20 and 3"),
        ({"targets": Y - 1}, "targets must be class numbers from 0, got -1; number the classes from 0"),
        ({"targets": np.where(Y, np.nan, 1.0)}, r"targets must be finite; rows \[1, 3, 5, 7, 9\] are not"),
        ({"inputs": X + np.inf}, r"inputs must be finite; rows \[0, 1, 2, 3, 4\] are not: drop or fill them"),
        ({"inputs": np.array([["a"]] * 20)}, "inputs must hold numbers"),
        ({"inputs": X * 1j}, "inputs must be real, got torch.complex128; pass real and imaginary parts"),
        ({"targets": Y * 1j}, "targets must be real, got torch.complex128"),
        ({"inputs": X.astype(np.uint64) + 2**63}, r"inputs must be integers below 2\*\*63, got larger ones"),
        (
            {"targets": np.eye(20, dtype=int)[0]},
            "cannot split off 4 of 20 rows for holdout: .* change holdout_f",
        ),
        ({"lengths": np.full(20, 3)}, "lengths must be from 1 to the 2 steps of inputs, got 3 in row 0"),
        ({"lengths": np.ones(20)}, "lengths must be one integer a row of inputs"),
        (
            {"standardise": [True] * 5},
            "standardise must be one boolean a feature, got 5 for 2 features; name all of them, or pass True",
        ),
        ({"standardise": [True]}, "one boolean a feature, got 1 for 2 features"),
        ({"standardise": []}, "one boolean a feature, got 0 for 2 features"),
        ({"standardise": [True], "inputs": np.zeros((20, 5, 2))}, "got 1 for 2 features"),
        ({"classes": ["only"]}, "targets must be numbers of the 1 classes named, got 1; name them all"),
        ({"holdout": {"inputs": X[:, :1], "targets": Y}}, r"holdout inputs must look like those of train"),
        ({"valid": {"inputs": X, "targets": Y * 1.0}}, r"valid targets must look like those of train"),
        (
            {"valid": {"inputs": X, "targets": Y, "lengths": Y + 1}},
            "valid lengths must be given for every part or for none",
        ),
    ],
)
def test_errors_say_rule_value_and_remedy(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(TaskError, match=text):
        split(**{"inputs": X, "targets": Y, **arguments})


def test_mean_without_std_is_refused() -> None:
    rows = Rows({"inputs": torch.zeros(2, 1)})
    with pytest.raises(TaskError, match="mean and std must be given together"):
        Data(train=rows, valid=rows, mean=torch.zeros(1))


@pytest.mark.parametrize("empty", ["train", "valid", "holdout"])
def test_a_part_without_rows_is_refused(empty: str) -> None:
    names = ("train", "valid", "holdout")
    parts = {name: Rows({"inputs": torch.zeros(0 if name == empty else 3, 2)}) for name in names}
    with pytest.raises(TaskError, match=f"{empty} has no rows; give it some"):
        Data(**parts, out_features=2)


def test_tables_and_other_byte_orders_are_taken() -> None:
    class Table:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values

        def to_numpy(self) -> np.ndarray:
            return self.values

    x, y = numbered(60)
    expected = split(x, y, seed=0, standardise=False)
    for inputs, targets in ((x.astype(">f4"), y.astype(">i8")), (Table(x), Table(y))):
        found = split(inputs, targets, seed=0, standardise=False)  # type: ignore[arg-type]
        for mine, other in zip(parts_of(found), parts_of(expected), strict=True):
            assert torch.equal(mine.tensors["inputs"], other.tensors["inputs"])
            assert torch.equal(mine.tensors["targets"], other.tensors["targets"])


def test_class_numbers_are_numbers_of_classes() -> None:
    x, y = numbered(60)
    with pytest.raises(TaskError, match="class numbers from 0, below 10,000,000, got 1099511627776"):
        split(x, np.where(y == 2, 2**40, y), seed=0)
