"""Room on the disk: what a run takes, what of it can go, and whether there is enough to begin."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpt_torch import promotion
from hpt_torch.record import Record
from hpt_torch.report.confirmation import REFIT
from hpt_torch.types import RunError

FREE_BYTES = 64 * 2**20  # what a run needs to begin, or to go on
_MEASURED_EVERY_SECONDS = 10.0


def check_free(path: Path) -> None:
    """Raises RunError where the disk of this path, which need not exist yet, is as good as full."""
    free = free_bytes(path)
    if free < FREE_BYTES:
        raise RunError(
            f"{path} needs {show_bytes(FREE_BYTES)} of free disk to begin with, and there are "
            f"{show_bytes(free)}; make room (hpt clean shows what of a run can go), or name another --run-dir"
        )


def free_bytes(path: Path) -> int:
    """Of the disk on which this path lies, or would lie."""
    return shutil.disk_usage(standing(path)).free


def standing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.resolve().parents) if parent.is_dir())


def used(path: Path) -> int:
    """The bytes of all files below a path; links are not followed."""
    if path.is_file() and not path.is_symlink():
        return path.lstat().st_size
    return sum(
        (Path(folder) / name).lstat().st_size
        for folder, _, names in os.walk(path)
        for name in names
        if (Path(folder) / name).exists()  # a run that goes on may have replaced it
    )


class Room:
    """Whether a run has used the disk that it may (`run.max_disk`): then curves are no longer written, and
    of the states of training only the newest is kept. The record and the best weights always are."""

    def __init__(self, path: Path, limit: int | None, say: Callable[[str], None]) -> None:
        self._path, self._limit, self._say = path, limit, say
        self._measured, self._full = -_MEASURED_EVERY_SECONDS, False

    @property
    def is_full(self) -> bool:
        """As measured at most every ten seconds."""
        now = time.monotonic()
        if self._limit is not None and not self._full and now - self._measured >= _MEASURED_EVERY_SECONDS:
            self._measured, bytes_used = now, used(self._path)
            self._full = bytes_used >= self._limit
            if self._full:
                self._say(
                    f"run.max_disk of {show_bytes(self._limit)} is used up: curves are no longer written, "
                    "and only the newest state of each training is kept"
                )
        return self._full


@dataclass(frozen=True)
class Removable:
    """A file or folder that a run can do without."""

    path: Path
    bytes: int
    why: str


def removable(run_dir: Path) -> list[Removable]:
    """What can go of a run without losing any of its results, nor what an extension goes on from. Raises
    RunError where it is not a run."""
    with Record(run_dir / "run.db", readonly=True) as record:
        ended = all(trial.state.is_finished for trial in record.trials.values())
        kept = {f.name for key in ("best", REFIT) for f in record.state_files.get(key, [])[-1:]}
        # with a larger budget, who waits at a rung may be promoted
        kept |= {f.name for key in promotion.needed(record) for f in record.state_files.get(key, [])}
    found = [(run_dir / "tensorboard", "curves; written again when the run goes on")]
    found += [
        (run_dir / name, "hpt report writes it again") for name in ("report.html", "trials.csv", "best")
    ]
    if ended:
        old = [path for path in (run_dir / "checkpoints").glob("*.safetensors") if path.name not in kept]
        found += [(path, "of a training that has ended") for path in sorted(old)]
    for kind, path in _inner(run_dir):
        found.append((path / "tensorboard", "curves; written again when the run goes on"))
        if kind == "confirmations":
            found.append((path / "checkpoints", "weights that nobody asks for: the scores are kept"))
    sizes = [Removable(path, used(path), why) for path, why in found if path.exists()]
    return [item for item in sizes if item.bytes]


def _inner(run_dir: Path) -> Iterator[tuple[str, Path]]:
    """The runs inside a run, and of which kind they are."""
    for kind in ("baselines", "confirmations", "replays"):
        for database in sorted((run_dir / kind).glob("*/run.db")):
            yield kind, database.parent


def remove(item: Removable) -> None:
    if item.path.is_dir():
        shutil.rmtree(item.path)
    else:
        item.path.unlink(missing_ok=True)


def show_bytes(count: float) -> str:
    """12 B, 3.4 MB, 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
