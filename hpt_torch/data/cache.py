"""Tensors that took long to make are kept in one file a data set, whose SHA-256 lies beside it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from hpt_torch.checkpoint import write_atomic

_log = logging.getLogger(__name__)


def directory() -> Path:
    """The folder that HPT_TORCH_CACHE names, else hpt_torch in XDG_CACHE_HOME or ~/.cache."""
    named, caches = os.environ.get("HPT_TORCH_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if named:
        return Path(named).expanduser()
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "hpt_torch"


def write(path: Path, data: bytes) -> None:
    """Writes a file whole, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def cached(name: str, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `build` returns, from the cache where a file with the right hash is there.

    A damaged file is rebuilt, with a warning: safetensors has no checksum, and a flipped bit would else be
    learned from. A folder that cannot be written costs only time.
    """
    path = directory() / f"{name}.safetensors"
    tensors = _read(path)
    if tensors is None:
        tensors = {key: tensor.contiguous() for key, tensor in build().items()}
        _write(path, tensors)
    return tensors


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cannot be read (%s); it is built anew", path, error.strerror)
        return None
    try:
        recorded = _sidecar(path).read_text(encoding="ascii").split()[:1]
    except (OSError, UnicodeDecodeError):
        recorded = []
    if recorded != [hashlib.sha256(data).hexdigest()]:
        _log.warning("%s is damaged: its SHA-256 is not the one beside it; it is built anew", path)
        return None
    return dict(load(data))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    data = save(tensors)
    try:
        # a crash between the two leaves a file that does not fit its hash, which is rebuilt
        write(path, data)
        write(_sidecar(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode("ascii"))
    except OSError as error:
        _log.warning("%s cannot be written (%s); the data set is made again next time", path, error.strerror)
