"""A run's directory: where its files lie, who may write it, and in what environment it runs."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from hpt_torch import __version__
from hpt_torch.checkpoint import write_atomic
from hpt_torch.types import RunError, RunLockedError

_PACKAGES = ("torch", "torchvision", "optuna", "numpy", "scikit-learn", "scipy", "safetensors", "tensorboard")


class RunDir:
    """The directory of one run. As a context manager it holds the run's lock, which a kill releases."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "run.db"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.recipe = path / "recipe.toml"
        self.environment = path / "environment.json"
        self.best = path / "best"
        self.trials_csv = path / "trials.csv"
        self._owner = path / "owner.json"
        self._lock = filelock.FileLock(path / "run.lock")

    def check_usable(self) -> None:
        """Raises RunError where the path holds something that is not a run."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; name a directory with --run-dir")
        if self.path.is_dir() and not self.record.exists():
            foreign = sorted(
                p.name for p in self.path.iterdir() if p.name not in ("run.lock", "owner.json", "checkpoints")
            )
            if foreign:
                raise RunError(
                    f"{self.path} is not a run directory (it has no run.db but holds {foreign[0]}); "
                    "name another with --run-dir"
                )

    def __enter__(self) -> Self:
        self.check_usable()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be created: {error.strerror}; name another with --run-dir"
            ) from error
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = "another process"
            if self._owner.exists():
                known = json.loads(self._owner.read_text())
                owner = f"process {known['pid']} on {known['host']}"
            raise RunLockedError(
                f"{self.path} is being written by {owner}; wait for it or stop it first"
            ) from None
        self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()

    def remove_strays(self, keep: set[str]) -> None:
        """Removes state files that no committed row names, and temporary files of a write that was cut."""
        for path in self.checkpoints.iterdir():
            if path.name not in keep and (path.suffix == ".safetensors" or path.name.endswith(".tmp")):
                path.unlink()

    def remove(self, names: Iterable[str]) -> None:
        """Removes state files that committed ones have replaced."""
        for name in names:
            (self.checkpoints / name).unlink(missing_ok=True)

    def write_json(self, path: Path, data: Any) -> None:
        write_atomic(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def environment(device: str, threads: int) -> dict[str, Any]:
    """What a result may depend on: versions, processor, device, threads."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "hpt_torch": __version__, "python": platform.python_version(), "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(), "executable": sys.executable,
        "device": device, "threads": threads, "packages": versions,
    }  # fmt: skip
