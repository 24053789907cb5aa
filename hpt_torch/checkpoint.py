"""State files: tensors and a little JSON in one safetensors file, written atomically, checked by hash.

safetensors holds no code, so nothing of a run is ever unpickled; it has no checksum, so the SHA-256 of the
bytes stands in the committed record and is checked before a byte is parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _parse
from safetensors.torch import save as _serialise
from torch import Tensor

from hpt_torch.types import DamageError


def write_atomic(path: Path, data: bytes) -> None:
    """Either the old file or the whole new one is there after a crash at any instant."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a stray; a link would lead the bytes elsewhere
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory; its rename is journaled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Writes the file and returns the SHA-256 of its bytes."""
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    data = _serialise(on_cpu, metadata={"hpt_torch": json.dumps(meta)})
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def load(path: Path, sha256: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and JSON of a file. Raises DamageError unless its bytes hash to `sha256`."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise DamageError(f"{path} cannot be read: it is not a file")
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DamageError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamageError(f"{path} is damaged: its SHA-256 is not the recorded one")
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _parse(data), json.loads(header["__metadata__"]["hpt_torch"])
    except (LookupError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        raise DamageError(f"{path} is not a state file of hpt_torch ({type(error).__name__})") from error


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
