"""A run.db that was damaged, forged or never ours: refused by name, and left byte for byte as it was."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import finished, hpt, tree

from hpt_torch import record as records
from hpt_torch.record import Event, Record
from hpt_torch.types import HptError

Damage = Callable[[Path], Any]


def sql(*statements: str) -> Damage:
    def damage(path: Path) -> None:
        with sqlite3.connect(path) as db:
            for statement in statements:
                db.execute(statement)
        db.close()

    return damage


def forged(change: Callable[[list[list[Any]]], Any]) -> Damage:
    """Rows [kind, body] are changed and every hash is made to fit: only sense can tell."""

    def damage(path: Path) -> None:
        with sqlite3.connect(path) as db:
            rows = [list(row) for row in db.execute("SELECT kind, body FROM events ORDER BY seq")]
            change(rows)
            db.execute("DELETE FROM events")
            head = records._FIRST_HASH
            for seq, (kind, body) in enumerate(rows, start=1):
                head = records._chain(head, seq, 1.0, 1.0, kind, body)
                db.execute("INSERT INTO events VALUES (?, 1.0, 1.0, ?, ?, ?)", (seq, kind, body, head))
        db.close()

    return damage


def forged_event(kind: str, **body: Any) -> Damage:
    return forged(lambda rows: rows.append([kind, json.dumps(body)]))


def forged_body(of: str, **change: Any) -> Damage:
    def edit(rows: list[list[Any]]) -> None:
        row = next(row for row in rows if row[0] == of)
        row[1] = json.dumps({**json.loads(row[1]), **change})

    return forged(edit)


def cut(length: int) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def patched(at: int, data: bytes) -> Damage:
    def damage(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + data + whole[at + len(data) :])

    return damage


def remade(create: str) -> Damage:
    """The events, moved into something else of that name."""
    return sql(
        "DROP VIEW trials",
        "DROP VIEW reports",
        "CREATE TABLE old AS SELECT * FROM events",
        "DROP TABLE events",
        create,
        "INSERT INTO events SELECT * FROM old" if "VIEW" not in create else "SELECT 1",
    )


SCORE = """UPDATE events SET body = replace(body, 'accuracy":0', 'accuracy":1') WHERE kind = 'report'"""
NO_SENSE = "it makes no sense"
NOT_OURS = "is not a record as hpt_torch made it: it holds the"
DAMAGES: dict[str, tuple[Damage, str]] = {
    # rows
    "scores edited": (sql(SCORE), "its hash does not fit"),
    "first row removed": (sql("DELETE FROM events WHERE seq = 1"), "event 1 is not the one"),
    "a row removed": (sql("DELETE FROM events WHERE seq = 4"), "event 4 is not the one"),
    "gap closed": (
        sql("DELETE FROM events WHERE seq = 4", "UPDATE events SET seq = seq - 1 WHERE seq > 4"),
        "event 4 is not the one",
    ),
    "a row copied": (
        sql("INSERT INTO events SELECT max(seq) + 1, at, elapsed, kind, body, hash FROM events"),
        "is not the one",
    ),
    "a row before the first": (
        sql("INSERT INTO events SELECT 0, at, elapsed, kind, body, hash FROM events WHERE seq = 1"),
        "event 1 is not the one",
    ),
    "a row at the end of 64 bits": (
        sql("INSERT INTO events SELECT 9223372036854775807, 1.0, 1.0, kind, body, hash FROM events LIMIT 1"),
        "is not the one",
    ),
    "text that is not UTF-8": (
        sql("UPDATE events SET body = CAST(x'fffe' AS TEXT) WHERE seq = 2"),
        "cannot be read as a record",
    ),
    "a lone surrogate": (
        sql("UPDATE events SET body = CAST(x'eda080' AS TEXT) WHERE seq = 2"),
        "cannot be read as a record",
    ),
    "a body of 5 MB": (
        sql("UPDATE events SET body = hex(zeroblob(2500000)) WHERE seq = 2"),
        "its hash does not fit",
    ),
    # rows whose hashes fit
    "body is no JSON": (forged(lambda rows: rows[3].__setitem__(1, "{")), NO_SENSE),
    "body is a list": (forged(lambda rows: rows[0].__setitem__(1, "[]")), NO_SENSE),
    "body is deep": (forged(lambda rows: rows[3].__setitem__(1, "[" * 100_000)), NO_SENSE),
    "body repeats a million digits": (forged(lambda rows: rows[3].__setitem__(1, "1" * 10**6)), NO_SENSE),
    "a float that is none": (forged_event("note", x={"float": "abc"}), NO_SENSE),
    "another format": (forged_body("run", format=99, version="9.1"), "use hpt_torch 9.1"),
    "no format": (forged(lambda rows: rows[0].__setitem__(1, "{}")), NO_SENSE),
    "a trial that was never planned": (
        forged_event("report", trial=77, epoch=1, metrics={}, seconds=1.0),
        NO_SENSE,
    ),
    "a state that there is not": (
        forged_event("finish", trial=0, state="WON", reason="", weights_sha256="", kept_epoch=1),
        NO_SENSE,
    ),
    "a trial named as a path": (
        forged_event("trial", trial="../../x", round=0, hparams={}, signature=""),
        NO_SENSE,
    ),
    "hyperparameters that are a list": (
        forged_event("trial", trial=9, round=0, hparams=[], signature=""),
        NO_SENSE,
    ),
    "a state file in the parent directory": (
        forged_event("state", name="../../../victim", sha256="", key="best", meta={}),
        NO_SENSE,
    ),
    "a state file with an absolute name": (
        forged_event("state", name="/victim", sha256="", key="best", meta={}),
        NO_SENSE,
    ),
    "a state file with a field too many": (
        forged_event("state", name="x", sha256="", key="best", meta={}, evil=1),
        NO_SENSE,
    ),
    "a plan that would write elsewhere": (forged_event("plan", chunks=[{"key": "../../x"}]), NO_SENSE),
    "an exploit of nobody": (
        forged_event("generation", generation=1, epoch=1, exploits=[{"target": 50}]),
        NO_SENSE,
    ),
    "an end before the beginning": (
        forged(lambda rows: rows.sort(key=lambda row: row[0] != "finish")),
        NO_SENSE,
    ),
    # objects
    "a trigger that deletes": (
        sql("CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM events WHERE seq < NEW.seq; END"),
        f"{NOT_OURS} trigger 't'",
    ),
    "a trigger named as the table": (
        sql("CREATE TRIGGER events AFTER INSERT ON events BEGIN UPDATE events SET body = '{}'; END"),
        f"{NOT_OURS} trigger 'events'",
    ),
    "an index that refuses rows": (sql("CREATE UNIQUE INDEX once ON events (kind, seq)"), NOT_OURS),
    "a column more": (sql("ALTER TABLE events ADD COLUMN x TEXT DEFAULT ('y')"), NOT_OURS),
    "a check": (
        remade(
            "CREATE TABLE events (seq INTEGER PRIMARY KEY, at REAL NOT NULL, elapsed REAL NOT NULL, "
            "kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL CHECK (seq < 99)) STRICT"
        ),
        NOT_OURS,
    ),
    "events are a view": (remade("CREATE VIEW events AS SELECT * FROM old"), NOT_OURS),
    "events are a full-text index": (
        remade("CREATE VIRTUAL TABLE events USING fts4 (seq, at, elapsed, kind, body, hash)"),
        NOT_OURS,
    ),
    "another application's tables beside ours": (sql("CREATE TABLE notes (text)"), NOT_OURS),
    "events of another application": (
        lambda path: (path.unlink(), sql("CREATE TABLE events (id, what)")(path)),
        f"{NOT_OURS} table 'events'",
    ),
    "another application's database": (
        lambda path: (path.unlink(), sql("CREATE TABLE \"no\x1b[2Jtes\" (x)")(path)),
        f"{NOT_OURS} table 'no\\x1b[2Jtes'",
    ),
    # bytes
    "cut to 50 bytes": (cut(50), "cannot be read as a record"),
    "cut to a page": (cut(4096), "cannot be read as a record"),
    "cut to a page and a half": (cut(6000), "cannot be read as a record"),
    "zeroes": (lambda path: path.write_bytes(bytes(8192)), "cannot be read as a record"),
    "a text": (lambda path: path.write_text("all is well\n" * 99), "cannot be read as a record"),
    "another page size": (patched(16, b"\x00\x07"), "cannot be read as a record"),
    "another schema version": (patched(44, b"\x00\x00\x00\x09"), "cannot be read as a record"),
    "a format to come": (patched(18, b"\x09\x09"), "cannot be read as a record"),
    "a schema that is a pickle": (patched(100, b"\x80\x04cos\nsystem\n." * 9), "cannot be read as a record"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_record_is_refused_and_left_as_it_is(case: str, tmp_path: Path) -> None:
    damage, told = DAMAGES[case]
    run = finished(tmp_path)
    (tmp_path / "victim").write_text("not yours")
    damage(run / "run.db")
    before = tree(tmp_path)
    hpt("report", "runs/small", cwd=tmp_path).refused("hpt: runs/small/run.db ", told)
    hpt("run", "recipe.toml", "--quiet", cwd=tmp_path).refused("hpt: runs/small/run.db ", told)
    listed = hpt("list", cwd=tmp_path)
    assert (listed.status, listed.stderr) == (0, "")
    with pytest.raises(HptError):
        Record(run / "run.db")  # asks to write, as a run does that does not look first
    assert tree(tmp_path) == before


def _rows(path: Path) -> list[str]:
    with Record(path, readonly=True) as record:
        return [repr(event) for event in record.events]


def _intact_or_refused(path: Path, whole: list[str]) -> bool:
    """Whether the record could be read; then it is the beginning of what was written and can be added to."""
    try:
        rows = _rows(path)
        with Record(path) as record:
            record.append(Event(kind="note", body={}))
    except HptError as error:
        assert str(path) in str(error)
        return False
    assert rows == whole[: len(rows)]
    assert _rows(path)[:-1] == rows
    return True


def test_flipped_bits_anywhere(tmp_path: Path) -> None:
    path = finished(tmp_path) / "run.db"
    whole, content = _rows(path), path.read_bytes()
    outcomes = set()
    positions = [*range(0, 110), *range(110, len(content), len(content) // 150)]
    for position in positions:
        patched(position, bytes([content[position] ^ (1 << position % 8)]))(path)
        outcomes.add(_intact_or_refused(path, whole))
        for left in path.parent.glob("run.db*"):
            left.unlink()
        path.write_bytes(content)
    assert outcomes == {True, False}


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    path = finished(tmp_path) / "run.db"
    whole, content = _rows(path), path.read_bytes()
    for length in range(1, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        assert not _intact_or_refused(path, whole), length


@pytest.fixture
def wal(tmp_path: Path) -> tuple[Path, list[str], bytes]:
    """A record as a kill leaves it: its last rows lie in the write-ahead log. Rows, and the log."""
    with Record(tmp_path / "open.db") as record:
        for i in range(6):
            record.append(Event(kind="note", body={"i": i, "text": "x" * 900}))
        whole = [repr(event) for event in record.events]
        for end in ("", "-wal"):
            shutil.copy(tmp_path / f"open.db{end}", tmp_path / f"run.db{end}")
    return tmp_path / "run.db", whole, (tmp_path / "run.db-wal").read_bytes()


def _with_log(path: Path, log: bytes) -> Path:
    for left in path.parent.glob("copy.db*"):
        left.unlink()
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    copy.with_name("copy.db-wal").write_bytes(log)
    return copy


def test_a_log_cut_anywhere_is_an_earlier_record(wal: tuple[Path, list[str], bytes]) -> None:
    path, whole, log = wal
    seen = set()
    for length in [*range(0, 64, 8), *range(64, len(log), len(log) // 40), len(log)]:
        copy = _with_log(path, log[:length])
        seen.add(len(_rows(copy)))
        assert _intact_or_refused(copy, whole), length
    assert seen == set(range(7))


def test_a_log_with_flipped_bits_or_of_another_record(wal: tuple[Path, list[str], bytes]) -> None:
    path, whole, log = wal
    for position in range(0, len(log), len(log) // 60):
        damaged = log[:position] + bytes([log[position] ^ 1]) + log[position + 1 :]
        _intact_or_refused(_with_log(path, damaged), whole)
    for other in (b"", b"\0" * 9000, b"not a log" * 1000, log[:32] + log[32:] * 2, log[::-1]):
        _intact_or_refused(_with_log(path, other), whole)
    strange = finished(path.parent / "other") / "run.db"
    rows, copy = _rows(strange), _with_log(strange, log)
    with contextlib.suppress(HptError):  # SQLite cannot know whose log it is: one record or the other
        assert _rows(copy) in (rows, whole)
    copy = _with_log(strange, b"")
    copy.with_name("copy.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" * 99)
    _intact_or_refused(copy, rows)


# -- what is ours is never refused ---------------------------------------------------------------------


@pytest.mark.parametrize("done", range(-2, 4))
def test_a_run_that_was_killed_at_its_first_write_goes_on(done: int, tmp_path: Path) -> None:
    """-2: the file was made; -1: and its journal mode; then statement by statement of the schema."""
    run = finished(tmp_path)
    shutil.rmtree(run)
    (run / "checkpoints").mkdir(parents=True)
    db = sqlite3.connect(tmp_path / "open.db")
    if done > -2:
        db.execute("PRAGMA journal_mode = WAL")
    for statement in records._SCHEMA.replace("computed;", "").split(";\n")[: max(done, 0)]:
        db.executescript(statement + ";")
    for end in ("", "-wal"):
        if (tmp_path / f"open.db{end}").exists():
            shutil.copy(tmp_path / f"open.db{end}", run / f"run.db{end}")
    db.close()
    hpt("report", "runs/small", cwd=tmp_path).refused("has not begun: run it first")
    assert hpt("run", "recipe.toml", "--quiet", cwd=tmp_path).status == 0
    assert hpt("report", "runs/small", cwd=tmp_path).status == 0


@pytest.mark.parametrize(
    "change",
    [
        sql("SELECT 1"),
        sql("PRAGMA journal_mode = WAL"),
        sql("ANALYZE"),
        sql("VACUUM"),
        sql("CREATE VIEW mine AS SELECT count(*) FROM events"),
        sql("DROP VIEW trials"),
    ],
    ids=["nothing", "wal", "analyze", "vacuum", "view", "no view"],
)
def test_what_people_do_with_a_database_is_accepted(change: Damage, tmp_path: Path) -> None:
    run = finished(tmp_path)
    rows = _rows(run / "run.db")
    change(run / "run.db")
    assert hpt("run", "recipe.toml", "--quiet", cwd=tmp_path).status == 0
    assert _rows(run / "run.db")[: len(rows)] == rows
