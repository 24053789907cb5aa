"""A run's directory: where its files lie, who may write it, and in what environment it runs."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from hpt_torch import __version__
from hpt_torch.checkpoint import write_atomic
from hpt_torch.types import DamageError, RunError, RunLockedError, writing

_PACKAGES = ("torch", "torchvision", "optuna", "numpy", "scikit-learn", "scipy", "safetensors", "tensorboard")
_MOST_OF_A_DIFF = 200_000  # characters
_FILES = {
    "run.db", "run.db-wal", "run.db-shm", "run.db-journal", "run.head", "run.lock", "crash.log", "owner.json",
    "recipe.toml", "environment.json", "trials.csv", "report.html",
}  # fmt: skip
_FOLDERS = {"checkpoints", "tensorboard", "best", "replays", "baselines", "confirmations", "requests"}


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
        """Raises RunError where the path holds something that is not a run, or a way out of it."""
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise RunError(f"{self.path} is a file or a link to nothing; name a directory with --run-dir")
        try:
            entries = {entry.name: entry for entry in sorted(os.scandir(self.path), key=lambda e: e.name)}
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise self._unusable("read", error) from error
        # What may be there before the first commit; the journal, while the record is made a WAL one.
        started = _FILES - {"recipe.toml", "environment.json", "trials.csv", "report.html"} | {"checkpoints"}
        foreign = [name for name in entries if name not in started]
        if foreign and self.record.is_file() and not self.record.stat().st_size:
            raise DamageError(f"{self.record} is empty, but a run was in it; restore it from a backup")
        if foreign and "run.db" not in entries:
            raise RunError(
                f"{self.path} is not a run directory (it has no run.db but holds {foreign[0]}); "
                "name another with --run-dir"
            )
        for kind, names in (("file", _FILES), ("folder", _FOLDERS)):
            for name in sorted(names & entries.keys()):
                if not getattr(entries[name], f"is_{kind}".replace("folder", "dir"))(follow_symlinks=False):
                    raise RunError(
                        f"{self.path / name} must be a {kind} and not a link, so that nothing is written "
                        f"outside of {self.path}; put the {kind} in its place, or name another --run-dir"
                    )
        for folder in sorted(
            (_FOLDERS - {"checkpoints"}) & entries.keys()
        ):  # those are only read or replaced
            for entry in list(os.scandir(entries[folder])):
                if entry.is_symlink():
                    raise RunError(
                        f"{entry.path} must not be a link, so that nothing is written outside of "
                        f"{self.path}; remove it, or name another --run-dir"
                    )

    def _unusable(self, verb: str, error: Exception) -> RunError:
        reason = getattr(error, "strerror", None) or error
        return RunError(f"{str(self.path)[:300]} cannot be {verb}: {reason}; name another with --run-dir")

    def owner(self) -> tuple[int, str] | None:
        """(process id, host) of who has the lock, or had it when it was killed."""
        with contextlib.suppress(OSError, LookupError, RecursionError, TypeError, ValueError):
            known = json.loads(self._owner.read_text())  # anybody can write it
            return int(known["pid"]), f"{known['host']!r:.80}"
        return None

    def is_run(self) -> bool:
        """Whether a process seems to run it now. Trying the lock would keep others from it."""
        owner = self.owner()
        here = f"{socket.gethostname()!r:.80}"
        if owner is None or owner[1] != here or os.name == "nt":  # where asking for a process would stop it
            return owner is not None
        try:
            os.kill(owner[0], 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True
        return True

    def __enter__(self) -> Self:
        self.check_usable()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable("created", error) from error
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            who = self.owner()
            owner = "another process" if who is None else f"process {who[0]} on {who[1]}"
            raise RunLockedError(
                f"{self.path} is being written by {owner}; wait for it or stop it first"
            ) from None
        except OSError as error:
            raise self._unusable("locked", error) from error
        try:
            self._owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except OSError as error:
            self._lock.release()
            raise self._unusable("written", error) from error
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

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file of the run whole. Raises RunError where the disk is full or broken."""
        with writing(path):
            write_atomic(path, data)

    def write_json(self, path: Path, data: Any) -> None:
        self.write(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


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


def repository(folder: Path) -> dict[str, str]:
    """The git commit of the user's repository and what is changed since, as `git diff`; empty without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
        return done.stdout if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD").strip()
        if not commit:
            return {}
        diff = git("diff", "--no-ext-diff", "--no-textconv", "HEAD")
        return {"commit": commit, "diff": diff[:_MOST_OF_A_DIFF]}
    except (OSError, subprocess.TimeoutExpired):
        return {}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``name: old -> new`` for what of the environment may change a result."""
    flat = [{**e, **{f"packages.{n}": v for n, v in e.get("packages", {}).items()}} for e in (before, now)]
    names = ["python", "platform", "processor", "device", "threads", *(f"packages.{n}" for n in _PACKAGES)]
    pairs = [(name, flat[0].get(name), flat[1].get(name)) for name in names]
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]
