"""Steering a run: points that are added to it, trials that are stopped, budgets that are extended.

Whoever asks leaves a file in the run's folder `requests`; the run, its one writer, records it as an event and
does what it says. While nobody runs it the request waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpt_torch.checkpoint import write_atomic
from hpt_torch.points import check_points
from hpt_torch.record import Event, Record, finish_event
from hpt_torch.space import Space, parse_dimension
from hpt_torch.types import Problem, RunError, TrialState, is_int, writing

FOLDER = "requests"
STOPPED = "stopped by hand: hpt stop"
_POLL_SECONDS = 0.5
MOST_TRIALS, MOST_SECONDS = 1_000_000, 1e9
_LARGEST = 10_000  # bytes of a request


# -- asking --------------------------------------------------------------------------------------------


def ask(path: Path, kind: str, body: Mapping[str, Any]) -> Path:
    """Leaves a request for the run at `path`: add {"point": …}, stop {"trial": …}, or extend {"trials": …,
    "seconds": …}. Returns its file, which is gone once the run has taken it up. Raises RunError where the run
    cannot do that."""
    with Record(path / "run.db", readonly=True) as record:
        if problem := _refusal(record, kind, body):
            raise RunError(f"{path}: {problem}")
    file = path / FOLDER / f"{time.time_ns()}-{os.getpid()}.{kind}"
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(body).encode())
    return file


def _refusal(record: Record, kind: str, body: Mapping[str, Any]) -> str:
    """Why the run cannot do this; empty if it can."""
    begun = record.last("run")
    if begun is None:
        return "it has not begun: run it first"
    recipe = begun.body["recipe"]
    if recipe.get("scheduler", {}).get("kind") in ("pbt", "schedule"):
        return (
            "the members of a population are its scheduler's to choose; to change them run another one, "
            "with another --run-dir"
        )
    match kind:
        case "add":
            space: Space = {name: parse_dimension(raw) for name, raw in recipe["space"].items()}
            problems: list[Problem] = check_points([body["point"]], space)
            return "; ".join(f"{p.where.removeprefix('search.points.0.')} {p.what}" for p in problems)
        case "stop":
            trial = record.trials.get(body["trial"])
            if trial is None:
                return f"there is no trial {body['trial']} among its {len(record.trials)}, which begin with 0"
            if trial.state.is_finished:
                return f"trial {trial.number} has ended: it is {trial.state.value}"
        case "extend":
            sampler, search = recipe["search"]["sampler"], recipe["search"]
            if body.get("trials") and (sampler == "grid" or not recipe["space"]):
                return "all points of its space are in it; widen the space in a run of its own"
            if body.get("trials") and search.get("trials") is None:
                return "it has no number of trials to extend; extend its time, e.g. timeout=+30m"
            if body.get("seconds") and search.get("timeout") is None:
                return "it has no search.timeout to extend; extend its trials, e.g. trials=+20"
    return ""


# -- taking up -----------------------------------------------------------------------------------------


class Steering:
    """The requests to one run."""

    def __init__(self, path: Path) -> None:
        self.folder = path / FOLDER
        self._looked, self._urgent = 0.0, False

    def urgent(self) -> bool:
        """Whether a trial is to be stopped, which asks for a boundary now. Looks twice a second."""
        if not self._urgent and (now := time.monotonic()) - self._looked >= _POLL_SECONDS:
            self._looked = now
            self._urgent = any(file.suffix == ".stop" for file in self._files())
        return self._urgent

    def waiting(self) -> list[tuple[Path, Event | None]]:
        """Requests in the order in which they were made; None for what is none."""
        self._urgent = False
        return [(file, _read(file)) for file in self._files()]

    def is_recorded(self, record: Record, file: Path) -> bool:
        """Whether this request was taken up already, by a session that was killed before it put it away."""
        kinds = ("add", "stop", "extend")
        return any(event.body.get("request") == file.name for kind in kinds for event in record.of_kind(kind))

    def remove(self, file: Path) -> None:
        """Puts a request away, once what it asked is recorded."""
        file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        files = [f for f in self.folder.iterdir() if not f.name.endswith(".tmp") and not f.is_dir()]
        return sorted(files, key=lambda file: (len(file.stem), file.name))


def _read(file: Path) -> Event | None:
    with contextlib.suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        if not stat.S_ISREG(file.lstat().st_mode) or file.stat().st_size > _LARGEST:
            return None
        body, name = json.loads(file.read_bytes()), {"request": file.name}
        match file.suffix:
            case ".add" if isinstance(body["point"], dict):
                return Event(kind="add", body={**name, "point": body["point"]})
            case ".stop" if is_int(body["trial"]):
                return Event(kind="stop", body={**name, "trial": body["trial"]})
            case ".extend" if is_int(body["trials"]) and 0 <= body["trials"] <= MOST_TRIALS:
                seconds = float(body["seconds"])
                if 0 <= seconds <= MOST_SECONDS:
                    return Event(kind="extend", body={**name, "trials": body["trials"], "seconds": seconds})
    return None


def take_up(record: Record, request: Event) -> tuple[list[Event], str]:
    """What a request becomes in the record, and what to say of it."""
    if problem := _refusal(record, request.kind, request.body):
        return [], f"a request ({request.kind}) is refused: {problem}"
    match request.kind:
        case "add":
            return [request], f"a point is added: {_shown(request.body['point'])}"
        case "stop":
            number = request.body["trial"]
            return [request, finish_event(number, TrialState.PRUNED, STOPPED)], f"trial {number} is stopped"
    by = {name: request.body[name] for name in ("trials", "seconds") if request.body[name]}
    return [request], f"extended by {_shown(by)}"


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())
