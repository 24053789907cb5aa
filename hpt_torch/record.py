"""`run.db`: the durable truth of a run, as one append-only table of events in a hash chain.

Trials, reports and everything else a run knows are a fold of its events; there is one commit a boundary
and one writer. SQLite does not notice a flipped bit, so every row's hash covers its content and the hash of
the row before it, and `Record` checks the whole chain when it opens. Views (`trials`, `reports`) are for
people with a SQL prompt; the code does not read them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpt_torch import head
from hpt_torch.bodies import decoded, encoded
from hpt_torch.space import freeze
from hpt_torch.types import SIZES, DamageError, Phase, Report, RunError, Trial, TrialState, changed, is_int

FORMAT = 1
_FIRST_HASH = hashlib.sha256(b"hpt_torch record 1").hexdigest()

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,   -- 1, 2, 3, … without gaps
    at REAL NOT NULL,          -- Unix time when it was written; nothing is computed from it
    elapsed REAL NOT NULL,     -- seconds since its session began, on a clock that cannot be set
    kind TEXT NOT NULL,
    body TEXT NOT NULL,        -- JSON
    hash TEXT NOT NULL         -- SHA-256 of the hash before, and of this row
) STRICT;
CREATE VIEW IF NOT EXISTS trials AS
    SELECT json_extract(planned.body, '$.trial') AS trial,
           json_extract(planned.body, '$.hparams') AS hparams,
           coalesce(json_extract(ended.body, '$.state'), 'not finished') AS state,
           json_extract(ended.body, '$.reason') AS reason
    FROM events AS planned LEFT JOIN events AS ended
      ON ended.kind = 'finish' AND json_extract(ended.body, '$.trial') = json_extract(planned.body, '$.trial')
    WHERE planned.kind = 'trial';
CREATE VIEW IF NOT EXISTS reports AS
    SELECT json_extract(body, '$.trial') AS trial, json_extract(body, '$.epoch') AS epoch,
           json_extract(body, '$.seconds') AS seconds, json_extract(body, '$.metrics') AS metrics
    FROM events WHERE kind = 'report';
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a state file or a chunk: never a way to another folder


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened. `body` is plain data that JSON can hold."""

    kind: str
    body: Mapping[str, Any]
    seq: int = 0  # given when it is recorded
    at: float = 0.0
    elapsed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """A committed state file: which part of the run it holds, and what its bytes must hash to."""

    name: str
    sha256: str
    key: str  # what it is the state of, e.g. "chunk-3-0" or "best"
    meta: Mapping[str, Any]


class Record:
    """A run's events and what follows from them. Use as a context manager; `append` is the one writer."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path, self._readonly = path, readonly
        self.head = _FIRST_HASH
        self._opened = time.monotonic()
        self.events: list[Event] = []
        self._by_kind: dict[str, list[Event]] = {}
        self.trials: dict[int, Trial] = {}
        self.state_files: dict[str, list[StateFile]] = {}  # newest last
        self._reports: dict[tuple[int, int], tuple[Report, float]] = {}  # with the time of its commit
        self._db = _connect(path, readonly=readonly)
        try:
            self._load()
            self.lost = max(head.read(path) - len(self.events), 0)  # events that it had, and has no more
            if not readonly:
                _prepare(self._db, path)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise DamageError(
                f"{path} cannot be read as a record ({error}); restore it from a backup"
            ) from error
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._readonly:
            # A closed run is one file: without the WAL's two companions it can be copied and read anywhere.
            # Where somebody is reading just now, it stays as it is.
            with contextlib.suppress(sqlite3.OperationalError):
                self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    # -- writing ---------------------------------------------------------------------------------------

    def append(self, *events: Event) -> None:
        """Commits the events in one transaction: all of them are durable on return, or none is."""
        rows, last, now, elapsed = [], self.head, time.time(), self.elapsed()
        for seq, event in enumerate(events, start=len(self.events) + 1):
            body = encoded(event.body)
            last = _chain(last, seq, now, elapsed, event.kind, body)
            rows.append((seq, now, elapsed, event.kind, body, last))
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise RunError(
                f"{self.path} could not be written ({error}). Everything recorded before is intact: "
                "make room or restore access, then run the same command again"
            ) from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError):
                raise
            raise DamageError(f"{self.path} is damaged ({error}); restore it from a backup") from error
        self.head = last
        for seq, _, _, kind, body, _ in rows:
            self._apply(Event(kind=kind, body=decoded(body), seq=seq, at=now, elapsed=elapsed))
        with contextlib.suppress(OSError):  # the events are safe; only a later loss would go unnoticed
            head.write(self.path, len(self.events))

    # -- reading ---------------------------------------------------------------------------------------

    def of_kind(self, kind: str) -> list[Event]:
        return list(self._by_kind.get(kind, ()))

    def last(self, kind: str) -> Event | None:
        return next(reversed(self._by_kind.get(kind, ())), None)

    def report_at(self, trial: int, epoch: int) -> Report | None:
        return self._reports.get((trial, epoch), (None, 0.0))[0]

    def reported_at(self, trial: int, epoch: int) -> float:
        """Unix time at which this report was committed."""
        return self._reports[trial, epoch][1]

    def in_order(self) -> list[Trial]:
        return [self.trials[number] for number in sorted(self.trials)]

    def elapsed(self) -> float:
        """Seconds since this record was opened: the clock of the session."""
        return time.monotonic() - self._opened

    def seconds_used(self) -> float:
        """Wall-clock seconds that earlier sessions have recorded, each from its start to its last event."""
        total = last = 0.0
        for event in self.events:
            if event.kind == "session":
                total, last = total + last, 0.0
                continue
            last = event.elapsed
        return total + last

    def _load(self) -> None:
        if _is_empty(self._db, self.path):
            return
        for row in self._db.execute("SELECT seq, at, elapsed, kind, body, hash FROM events ORDER BY seq"):
            seq, at, elapsed, kind, body, digest = row
            before, why = len(self.events), "its hash does not fit"
            try:
                fits = seq == before + 1 and digest == _chain(self.head, seq, at, elapsed, kind, body)
                if fits:
                    self._apply(Event(kind=kind, body=decoded(body), seq=seq, at=at, elapsed=elapsed))
            except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                fits, why = False, f"it makes no sense: {type(error).__name__}"
            if not fits:
                raise DamageError(
                    f"{self.path} is damaged: event {before + 1} is not the one that was written "
                    f"({why}). The {before} events before it are intact; restore the file from a backup"
                )
            self.head = digest

    def _apply(self, event: Event) -> None:
        self.events.append(event)
        self._by_kind.setdefault(event.kind, []).append(event)
        body = event.body
        match event.kind:  # others, as sessions, are looked up by kind where they are needed
            case "run":
                if body["format"] != FORMAT:
                    raise RunError(
                        f"{self.path} has record format {body['format']}, this version reads {FORMAT}; "
                        f"use hpt_torch {body['version']}"
                    )
            case "plan":
                for chunk in body["chunks"]:
                    _check_name(chunk["key"])
            case "trial":
                sizes = {name: body[name] for name in SIZES if name in body}
                if not all(is_int(value) for value in (body["trial"], *sizes.values())):
                    raise ValueError("a trial's number and sizes are integers")
                hparams = {name: freeze(value) for name, value in body["hparams"].items()}
                named = {name: body[name] for name in ("round", "signature")}
                trial = Trial(number=body["trial"], hparams=hparams, **named, **sizes)
                folds = (trial,) * body.get("folds", 0)
                self.trials[trial.number] = changed(trial, folds=folds)
            case "report":
                report = Report(
                    trial=body["trial"], epoch=body["epoch"], metrics=body["metrics"], seconds=body["seconds"]
                )
                self._reports[report.trial, report.epoch] = report, event.at
                trial = self.trials[report.trial]
                self._update(report.trial, reports=(*trial.reports, report), state=TrialState.RUNNING)
            case "finish":
                self._update(body["trial"], **_ending(body))
            case "fold_report" | "fold_finish":
                self.trials[body["trial"]] = with_fold(self.trials[body["trial"]], event)
            case "pause":
                for number in body["trials"]:
                    self._update(number, state=TrialState.PAUSED)
            case "promotion":
                again = {"state": TrialState.RUNNING, "reason": "", "weights_sha256": "", "kept_epoch": 0}
                for number, _ in body["trials"]:
                    self._update(number, round=body["round"], **again)
            case "generation":
                for copy in body["exploits"]:
                    self._exploit(body["generation"], body["epoch"], copy)
            case "state":
                file = StateFile(**body)
                _check_name(file.name)
                self.state_files.setdefault(file.key, []).append(file)

    def _exploit(self, generation: int, epoch: int, copy: Mapping[str, Any]) -> None:
        trial = self.trials[copy["target"]]
        first = Phase(generation=0, epoch=0, source=None, hparams=trial.hparams)
        hparams = {name: freeze(value) for name, value in copy["hparams"].items()}
        phase = Phase(generation=generation, epoch=epoch, source=copy["source"], hparams=hparams)
        phases = (*(trial.phases or (first,)), phase)
        self._update(trial.number, hparams=hparams, phases=phases, signature=copy["signature"])

    def _update(self, number: int, **changes: Any) -> None:
        self.trials[number] = changed(self.trials[number], **changes)


def with_fold(trial: Trial, event: Event) -> Trial:
    """The trial after a "fold_report" or "fold_finish" event of one of its folds."""
    folds, body = list(trial.folds), event.body
    fold = folds[body["fold"]]
    if event.kind == "fold_report":
        report = Report(
            trial=trial.number, epoch=body["epoch"], metrics=body["metrics"], seconds=body["seconds"]
        )
        fold = changed(fold, reports=(*fold.reports, report), state=TrialState.RUNNING)
    else:
        fold = changed(fold, **_ending(body))
    folds[body["fold"]] = fold
    state = TrialState.RUNNING if trial.state is TrialState.WAITING else trial.state
    return changed(trial, folds=tuple(folds), state=state)


def _ending(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a trial that a "finish" event sets."""
    fields = {name: body[name] for name in ("reason", "weights_sha256", "kept_epoch")}
    return {**fields, "state": TrialState(body["state"])}


def _connect(path: Path, *, readonly: bool) -> sqlite3.Connection:
    if readonly and not os.path.isfile(path):  # unlike Path.is_file: also for a name that no file can have
        raise RunError(f"{path.parent} is not a run directory: it has no {path.name}")
    try:
        if readonly:
            # A kill inside a commit without WAL (as at the very end of a session) leaves a journal, which
            # SQLite must undo before anybody can read; a living writer's journal it leaves alone.
            hot = os.path.isfile(f"{path}-journal")
            db = sqlite3.connect(f"{path.resolve().as_uri()}?mode={'rw' if hot else 'ro'}", uri=True)
            db.execute("PRAGMA query_only = ON")
            return db
        return sqlite3.connect(path, isolation_level=None)
    except sqlite3.OperationalError as error:
        raise RunError(f"{path} cannot be opened ({error}); restore access to it") from error


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Makes the record ready for writing: only now, when it is known to be ours and intact."""
    try:
        # A file system without shared memory (NFS) refuses WAL and keeps the rollback journal.
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_SCHEMA)
    except sqlite3.OperationalError as error:
        raise RunError(f"{path} cannot be opened for writing ({error}); restore access to it") from error


def _is_empty(db: sqlite3.Connection, path: Path) -> bool:
    """Whether nothing was ever written. Raises DamageError where the file holds anything that is not ours:
    another application's tables, or a trigger, which could change the record with every row that we add."""
    db.execute("PRAGMA trusted_schema = OFF")
    found = {(kind, name): sql for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_master")}
    for kind, name in sorted(found):
        if (kind == "view" and name != "events") or (kind == "table" and name.startswith("sqlite_")):
            continue  # views are read by nobody here; sqlite_stat1 is what ANALYZE leaves
        if (kind, name) != ("table", "events") or _shape(found[kind, name]) != _shape(_SCHEMA).split(";")[0]:
            raise DamageError(
                f"{path} is not a record as hpt_torch made it: it holds the {kind} {name!r:.80}, which is "
                "another application's or was changed; restore it from a backup, or name another --run-dir"
            )
    if not found and os.path.getsize(path) % 512:
        raise DamageError(f"{path} is damaged: it was cut; restore it from a backup")
    return ("table", "events") not in found


def _shape(sql: str) -> str:
    """An SQL statement without its comments and spaces."""
    return "".join(re.sub(r"--.*", "", sql.replace("IF NOT EXISTS ", "")).split())


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} is not the name of a state")


def _chain(head: str, seq: int, at: float, elapsed: float, kind: str, body: str) -> str:
    row = f"{head}\n{seq}\n{at.hex()}\n{elapsed.hex()}\n{kind}\n{body}"
    return hashlib.sha256(row.encode()).hexdigest()


# -- the events that make up a trial's life ------------------------------------------------------------


def trial_event(
    number: int,
    round: int,
    hparams: Mapping[str, Any],
    signature: str,
    sizes: Mapping[str, int] | None = None,
    **more: Any,
) -> Event:
    """sizes: of its model, as far as they are known: some of `types.SIZES`. more: folds; added, of a point
    that was added by hand; left out where they are 0."""
    body = {"trial": number, "round": round, "hparams": dict(hparams), "signature": signature}
    given = {name: value for name, value in more.items() if value}
    return Event(kind="trial", body=body | dict(sizes or {}) | given)


def report_event(report: Report) -> Event:
    return Event(kind="report", body=vars(report))


def finish_event(
    trial: int, state: TrialState, reason: str = "", weights_sha256: str = "", kept_epoch: int = 0
) -> Event:
    body = {"trial": trial, "state": state.value, "reason": reason, "weights_sha256": weights_sha256}
    return Event(kind="finish", body={**body, "kept_epoch": kept_epoch})


def pause_event(trials: Sequence[int] | Iterable[int]) -> Event:
    return Event(kind="pause", body={"trials": list(trials)})


def state_event(file: StateFile) -> Event:
    return Event(kind="state", body={**dataclasses.asdict(file), "meta": dict(file.meta)})
