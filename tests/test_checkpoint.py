"""State files: exact, atomic, and never believed without their hash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hpt_torch import checkpoint
from hpt_torch.types import DamageError

TENSORS = {
    "params/weight": torch.randn(3, 4),
    "scalar": torch.tensor(float("nan")),
    "flag": torch.tensor([True, False]),
    "count": torch.tensor(2**40),
    "half": torch.randn(3).bfloat16(),
    "empty": torch.zeros(0, 3),
}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    meta = {"trials": [1, 2], "text": "ü\n"}
    digest = checkpoint.save(tmp_path / "a.safetensors", TENSORS, meta)
    tensors, read = checkpoint.load(tmp_path / "a.safetensors", digest)
    assert read == meta
    assert checkpoint.weights_sha256(tensors) == checkpoint.weights_sha256(TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_views_of_one_stack_can_be_saved(tmp_path: Path) -> None:
    stack = torch.arange(6.0).view(2, 3)
    digest = checkpoint.save(tmp_path / "a", {"first": stack[0], "second": stack[1]}, {})
    assert torch.equal(checkpoint.load(tmp_path / "a", digest)[0]["second"], stack[1])


def test_any_flipped_bit_or_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = checkpoint.save(path, TENSORS, {})
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DamageError, match="damaged"):
            checkpoint.load(path, digest)
        path.write_bytes(whole[:position])
        with pytest.raises(DamageError, match="damaged"):
            checkpoint.load(path, digest)
    path.unlink()
    with pytest.raises(DamageError, match="cannot be read"):
        checkpoint.load(path, digest)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    checkpoint.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2)},
        {"a": torch.zeros(2).double()},
        {"a": torch.zeros(1, 2)},
        {"a": torch.tensor([0.0, -0.0])},
    ],
)
def test_weights_hash_sees_name_type_shape_and_every_bit(other: dict[str, torch.Tensor]) -> None:
    assert checkpoint.weights_sha256(other) != checkpoint.weights_sha256({"a": torch.zeros(2)})
