"""State files whose hash fits and that are hostile all the same: a forged record may name any bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import MARKER, Bomb, bomb

from hpt_torch import checkpoint
from hpt_torch.types import DamageError

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor([True, False]), "c": torch.zeros(0, 2)}


def made(tmp_path: Path) -> bytes:
    checkpoint.save(tmp_path / "good", TENSORS, {"trial": 1})
    return (tmp_path / "good").read_bytes()


def refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(DamageError, match=f"^{path} is not a state file of hpt_torch") as caught:
        checkpoint.load(path, hashlib.sha256(data).hexdigest())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


META = {"__metadata__": {"hpt_torch": "{}"}}


def tensor(**change: Any) -> dict[str, Any]:
    return {**META, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}}


def _zip(folder: Path) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save({"a": Bomb(folder)}, file)
    return file.getvalue()


CASES: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\x01" * 7,
    "only a length": bytes(8),
    "a header of 2**64 - 1 bytes": file(META, length=2**64 - 1),
    "a header of 2**63 bytes": file(META, length=2**63),
    "a header longer than the file": file(META, length=10_000),
    "a header one byte longer": file(META, length=len(json.dumps(META)) + 1),
    "a header one byte shorter": file(META, length=len(json.dumps(META)) - 1),
    "no JSON": file(b"{no}"),
    "not UTF-8": file(b'{"\xff": 1}'),
    "a list": file([]),
    "a number": file(1),
    "deep": file(b"[" * 100_000),
    "deep in a table": file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "no metadata": file({}),
    "metadata of another program": file({"__metadata__": {"format": "pt"}}),
    "metadata that is a list": file({"__metadata__": ["hpt_torch"]}),
    "metadata that is no text": file({"__metadata__": {"hpt_torch": {}}}),
    "metadata that is no JSON": file({"__metadata__": {"hpt_torch": "{"}}),
    "metadata that is deep": file({"__metadata__": {"hpt_torch": "[" * 100_000}}),
    "an unknown type": file(tensor(dtype="PICKLE"), bytes(8)),
    "no type": file({**META, "a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "a negative size": file(tensor(shape=[-2]), bytes(8)),
    "a size beyond 64 bits": file(tensor(shape=[2**64]), bytes(8)),
    "sizes whose product overflows": file(tensor(shape=[2**32, 2**32, 2**32]), bytes(8)),
    "more values than bytes": file(tensor(shape=[10**9]), bytes(8)),
    "bytes beyond the file": file(tensor(data_offsets=[0, 8000], shape=[2000]), bytes(8)),
    "bytes before the file": file(tensor(data_offsets=[-8, 0]), bytes(8)),
    "an end before its beginning": file(tensor(data_offsets=[8, 0]), bytes(8)),
    "a hole": file(tensor(data_offsets=[8, 16]), bytes(16)),
    "bytes that are nobody's": file(tensor(), bytes(16)),
    "two tensors in one place": file({**tensor(), "b": tensor()["a"]}, bytes(8)),
    "fields too many": file(tensor(evil="os.system"), bytes(8))[:-8],
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_state_file(case: str, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", CASES[case])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_by_another_name_is_not_unpickled(protocol: int, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", pickle.dumps(Bomb(tmp_path), protocol))
    refused(tmp_path / "x.safetensors", file(META) + bomb(tmp_path))
    assert not (tmp_path / MARKER).exists()


def test_a_file_of_torch_save_is_not_unpickled(tmp_path: Path) -> None:
    data = _zip(tmp_path)
    assert zipfile.is_zipfile(io.BytesIO(data))
    refused(tmp_path / "x.safetensors", data)
    assert not (tmp_path / MARKER).exists()


def test_cut_anywhere(tmp_path: Path) -> None:
    whole = made(tmp_path)
    for length in range(len(whole)):
        refused(tmp_path / "x.safetensors", whole[:length])


def test_flipped_bits_in_the_header_are_refused_or_change_names_only(tmp_path: Path) -> None:
    whole = made(tmp_path)
    start = 8 + int.from_bytes(whole[:8], "little")
    path, outcomes = tmp_path / "x.safetensors", set()
    for position in range(start):
        for bit in range(8):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            try:
                tensors, _ = checkpoint.load(path, hashlib.sha256(data).hexdigest())
            except DamageError as error:
                assert str(path) in str(error)
                outcomes.add("refused")
            else:
                assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(whole) - start
                outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", "circle", ".", "x" * 600, "pipe/x", "a\0b"):
        with pytest.raises(DamageError, match="cannot be read"):
            checkpoint.load(tmp_path / name, "")
