"""The record: one commit a boundary, a chain of hashes, and a fold that gives back what was put in."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from hpt_torch.record import (
    Event,
    Record,
    StateFile,
    finish_event,
    pause_event,
    report_event,
    state_event,
    trial_event,
)
from hpt_torch.types import DamageError, Report, RunError, Trial, TrialState, changed


def _fill(path: Path) -> Record:
    record = Record(path)
    record.append(Event(kind="run", body={"format": 1, "version": "0", "recipe": {"seed": 3}}))
    record.append(Event(kind="session", body={"pid": 1}))
    hparams = {"lr": 0.1 + 0.2, "sizes": (64, (1, 2)), "flag": True, "name": "ü", "clip": math.inf}
    record.append(trial_event(0, 0, hparams, "sig"), trial_event(1, 0, {"lr": 5e-324}, "sig"))
    report = Report(trial=0, epoch=1, metrics={"valid/loss": 1 / 3, "odd": float("nan")}, seconds=0.5)
    record.append(report_event(report))
    record.append(
        finish_event(0, TrialState.COMPLETE, "", "abc"),
        state_event(StateFile(name="best-0", sha256="00", key="best", meta={"trial": 0})),
    )
    record.append(pause_event([1]))
    return record


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    with _fill(tmp_path / "run.db") as written, Record(tmp_path / "run.db", readonly=True) as read:
        assert read.head == written.head
        assert [repr(event) for event in read.events] == [repr(event) for event in written.events]
        assert read.trials.keys() == {0, 1}
        first = read.trials[0]
        assert first.hparams == {
            "lr": 0.1 + 0.2, "sizes": (64, (1, 2)), "flag": True, "name": "ü", "clip": math.inf
        }  # fmt: skip
        assert (first.state, first.weights_sha256, first.epoch) == (TrialState.COMPLETE, "abc", 1)
        assert first.metrics["valid/loss"] == 1 / 3
        assert math.isnan(first.metrics["odd"])
        assert read.trials[1].state is TrialState.PAUSED
        assert read.trials[1].hparams["lr"] == 5e-324
        assert read.state_files["best"][-1].name == "best-0"
        assert read.report_at(0, 1) is not None
        assert read.report_at(0, 2) is None


def test_a_closed_record_is_one_file(tmp_path: Path) -> None:
    _fill(tmp_path / "run.db").close()
    Record(tmp_path / "run.db", readonly=True).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.db", "run.head"]


def test_a_lost_end_is_noticed(tmp_path: Path) -> None:
    path, head = tmp_path / "run.db", tmp_path / "run.head"
    _fill(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM events WHERE seq > 5")
    for readonly in (True, False):
        with Record(path, readonly=readonly) as record:
            assert (len(record.events), record.lost) == (5, 3)
    with Record(path) as record:
        record.append(pause_event([1]))
    for said in (None, b"", b"damaged", b"9" * 9, head.read_bytes()):
        head.unlink(missing_ok=True)
        if said is not None:
            head.write_bytes(said)
        with Record(path) as record:
            assert (len(record.events), record.lost) == (6, 0)


@pytest.mark.parametrize("column", ["at", "elapsed", "kind", "body", "hash"])
def test_a_changed_row_is_found_wherever_it_is(tmp_path: Path, column: str) -> None:
    count = len(_fill(tmp_path / "run.db").events)
    for seq in range(1, count + 1):
        path = tmp_path / f"{column}-{seq}.db"
        _fill(path).close()
        with sqlite3.connect(path) as db:
            (value,) = db.execute(f"SELECT {column} FROM events WHERE seq = ?", (seq,)).fetchone()
            changed = value + 1e-6 if isinstance(value, float) else value.replace(value[1], "~", 1)
            db.execute(f"UPDATE events SET {column} = ? WHERE seq = ?", (changed, seq))
        db.close()
        with pytest.raises(DamageError, match=f"event {seq} is not the one that was written"):
            Record(path)


def test_a_missing_row_inside_is_found_and_a_cut_tail_is_an_earlier_record(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    count = len(_fill(path).events)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM events WHERE seq = ?", (count,))
    db.close()
    with Record(path) as record:
        assert len(record.events) == count - 1
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM events WHERE seq = 3")
    db.close()
    with pytest.raises(DamageError, match="event 3 is not the one"):
        Record(path)


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"not a database, but long enough to look at" * 100)
    for readonly in (True, False):
        with pytest.raises(DamageError):
            Record(tmp_path / "run.db", readonly=readonly)
    with pytest.raises(RunError, match="is not a run directory"):
        Record(tmp_path / "none" / "run.db", readonly=True)
    with Record(tmp_path / "new.db") as record, pytest.raises(RunError, match="format 99"):
        record.append(Event(kind="run", body={"format": 99, "version": "9.0"}))


def test_a_transaction_is_whole_or_not_at_all(tmp_path: Path) -> None:
    """Row 2 of 3 cannot be written: none is, and the record goes on as if nothing had been asked."""
    with _fill(tmp_path / "run.db") as record:
        count, head = len(record.events), record.head
        record._db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON events WHEN NEW.body LIKE '%boom%' "
            "BEGIN SELECT RAISE(ABORT, 'boom'); END"
        )
        with pytest.raises(sqlite3.DatabaseError, match="boom"):
            record.append(*(Event(kind="note", body={"text": text}) for text in ("a", "boom", "c")))
        assert (len(record.events), record.head) == (count, head)
        record._db.execute("DROP TRIGGER full")
        record.append(Event(kind="note", body={"text": "d"}))
    with Record(tmp_path / "run.db", readonly=True) as read:
        assert [e.body["text"] for e in read.of_kind("note")] == ["d"]


def test_time_used_adds_up_over_sessions_and_ignores_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"monotonic": 100.0, "time": 1e9}
    monkeypatch.setattr("time.monotonic", lambda: now["monotonic"])
    monkeypatch.setattr("time.time", lambda: now["time"])
    for _ in range(2):
        with Record(tmp_path / "run.db") as record:
            record.append(Event(kind="session", body={}))
            now["monotonic"] += 10
            now["time"] -= 3600  # somebody sets the clock back by an hour
            record.append(Event(kind="note", body={}))
        now["monotonic"] += 1000  # nothing runs between the sessions
    with Record(tmp_path / "run.db", readonly=True) as record:
        assert record.seconds_used() == 20.0


def test_the_views_answer_sql(tmp_path: Path) -> None:
    _fill(tmp_path / "run.db").close()
    with sqlite3.connect(tmp_path / "run.db") as db:
        assert db.execute("SELECT trial, state FROM trials ORDER BY trial").fetchall() == [
            (0, "COMPLETE"), (1, "not finished")
        ]  # fmt: skip
        assert db.execute("SELECT trial, epoch FROM reports").fetchall() == [(0, 1)]
    db.close()


def test_a_changed_trial_is_the_one_that_dataclasses_would_make() -> None:
    """Also after what follows from its fields has been asked for."""
    one, two = (Report(trial=0, epoch=n, metrics={"valid/loss": 1.0 / n}, seconds=0.0) for n in (1, 2))
    trial = Trial(number=0, round=0, hparams={}, signature="", reports=(one,))
    assert trial.metrics == one.metrics
    more: dict[str, Any] = {"reports": (one, two), "state": TrialState.RUNNING}
    later = changed(trial, **more)
    assert later == dataclasses.replace(trial, **more)
    assert later.metrics == two.metrics
    assert (trial.reports, trial.metrics) == ((one,), one.metrics)
