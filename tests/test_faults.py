"""Full and broken disks, damaged files, a clock that jumps, stopped workers, signals: an error or
the same result, never another one."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, canonical_of
from forked import Hpt

from hpt_torch.executors import processes
from hpt_torch.record import Record
from hpt_torch.rundir import RunDir
from hpt_torch.types import RunError, RunLockedError

pytestmark = pytest.mark.skipif(not processes.supported(), reason="forks, /proc and limits: Linux only")
RunQuick = Callable[..., str]
STATES = ("run.checkpoint_every_seconds=0", "batch_size=512")  # a state file at every training step
RECIPE = """
[hparams]
hidden_sizes = [256]
batch_size = 512
[space]
lr = { float = [1e-4, 1e-1], default = 1e-3 }
dropout = { float = [0.0, 0.5] }
[search]
sampler = "random"
trials = 3
[trainer]
engine = "loop"
epochs = 3
threads = 1
[run]
checkpoint_every_seconds = 0.0
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """RECIPE's file, and the canonical report of a run of it that met no fault."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "recipe.toml").write_text(RECIPE)
    status, said = Hpt(*run_of(folder / "recipe.toml", folder / "run")).wait()
    assert status == 0, said
    return folder / "recipe.toml", canonical_of(folder / "run")


def run_of(recipe: Path, run: Path, *overrides: str) -> list[str]:
    return ["run", str(recipe), *overrides, "--run-dir", str(run)]


# -- disks ---------------------------------------------------------------------------------------------


class Disk:
    """Counts fsyncs of this process; the n-th one fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.left, self.error = 0, -1, errno.EIO
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self.count += 1
            self.left -= 1
            if self.left == 0:
                raise OSError(self.error, os.strerror(self.error))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", counted)


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_fsync_that_fails(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """At any of them: an error that says what is kept and what to do, and the same end once it works."""
    disk = Disk(monkeypatch)
    expected = run_quick(tmp_path / "whole", *STATES)
    count, disk.error = disk.count, error
    assert count > 30
    for number in range(1, count + 1, 2 if error == errno.EIO else 1):
        disk.left, path = number, tmp_path / str(number)
        with pytest.raises(RunError) as caught:
            run_quick(path, *STATES)
        assert f"could not be written ({os.strerror(error)})" in str(caught.value)
        assert "run the same command again" in str(caught.value)
        assert not list(path.rglob("*.tmp"))
        disk.left = -1
        assert run_quick(path, *STATES) == expected, number


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_size_of_a_file(tmp_path: Path, reference: tuple[Path, str]) -> None:
    """No file may grow beyond a limit: owner, record and its log, states, TensorBoard, exports, by turns."""
    recipe, expected = reference
    told = set()
    for limit in (10, 600, 4200, 13000, 41000, 120000, 1000000):
        path = tmp_path / f"run-{limit}"
        full = Hpt(
            *run_of(recipe, path),
            prepare=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
        )
        status, said = full.wait()
        assert "Traceback" not in said
        assert status in (0, 2), said
        found = re.search(r"hpt: \S*/([a-z.]+)\S* (could not|cannot) be (opened for writing|written)", said)
        assert (found is None) == (status == 0), said
        told.add("nothing" if found is None else found[1])
        status, said = Hpt(*run_of(recipe, path)).wait()
        assert status == 0, said
        assert canonical_of(path) == expected, limit
        assert not [p for p in path.rglob("*") if p.name.endswith((".tmp", "-wal", "-shm"))]
    assert told >= {"run", "run.db", "chunk", "nothing"}, told


@pytest.mark.slow
@pytest.mark.parametrize("number", [7, 14])
def test_a_broken_disk_under_the_record(tmp_path: Path, reference: tuple[Path, str], number: int) -> None:
    """SQLite's own fdatasync fails, by a fault that is injected into the system call."""
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", os.devnull, "true"], check=False).returncode:
        pytest.skip("needs strace, and the right to trace a process")
    recipe, expected = reference
    hpt = [sys.executable, "-m", "hpt_torch", *run_of(recipe, tmp_path / "run", "executor=inline")]
    inject = f"inject=fdatasync:error=EIO:when={number}"
    done = subprocess.run(
        [strace, "-f", "-o", tmp_path / "calls", "-e", "trace=fdatasync", "-e", inject, *hpt],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "(INJECTED)" in (tmp_path / "calls").read_text()
    assert done.returncode == 2, done.stderr
    assert re.search(r"run.db (could not be|cannot be opened for) writ\w+ \(disk I/O error\)", done.stderr)
    assert "Traceback" not in done.stderr
    status, said = Hpt(*hpt[3:]).wait()
    assert status == 0, said
    assert canonical_of(tmp_path / "run") == expected


# -- state files ---------------------------------------------------------------------------------------


@pytest.fixture
def killed(tmp_path: Path, reference: tuple[Path, str]) -> tuple[Path, Path, str]:
    """A run that lost its power in the middle, its log not yet in the database; the recipe and the bytes with
    which it must end."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import torture_hook

    recipe, expected = reference
    path = tmp_path / "killed"
    plug = torture_hook.Plug(log=tmp_path / "steps", root=path, step=100, target="group")
    run = Hpt(
        *run_of(recipe, path, "executor=inline"),
        prepare=partial(torture_hook.install, plug),
    )
    status, said = run.wait()
    assert status == -signal.SIGKILL, said
    assert (path / "run.db-wal").stat().st_size > 20_000
    return recipe, path, expected


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def spread(length: int, count: int) -> list[int]:
    """So many places, from the first to the last."""
    return sorted({round(i * (length - 1) / (count - 1)) for i in range(count)})


def events_in(path: Path) -> int:
    """How many events this run's record still holds, seen in a copy of it: reading changes its index."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("run.db", "run.db-wal"):
            shutil.copy(path / name, folder)
        with Record(Path(folder, "run.db")) as record:
            return len(record.events)


def goes_on(recipe: Path, path: Path) -> tuple[int, str]:
    return Hpt(*run_of(recipe, path, "executor=inline")).wait()


@pytest.mark.slow
def test_a_damaged_state_file(tmp_path: Path, killed: tuple[Path, Path, str]) -> None:
    """Cut at any length, one bit of it flipped, missing, or another trial's: the one before serves, it is
    said, and the end is the same."""
    recipe, path, expected = killed
    with Record(path / "run.db", readonly=True) as record:
        last, others = record.last("state"), record.state_files["best"]
        assert last is not None
        files = record.state_files[last.body["key"]]
    assert len(files) > 2
    newest, data = files[-1].name, (path / "checkpoints" / files[-1].name).read_bytes()
    other = (path / "checkpoints" / others[-1].name).read_bytes()
    damages: list[bytes | None] = [None, other, (path / "checkpoints" / files[-2].name).read_bytes()]
    damages += [data[:length] for length in spread(len(data), 6)]
    damages += [flipped(data, at) for at in spread(len(data), 6)]
    for number, damage in enumerate(damages):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(path, copy)
        (copy / "checkpoints" / newest).unlink()
        if damage is not None:
            (copy / "checkpoints" / newest).write_bytes(damage)
        status, said = goes_on(recipe, copy)
        assert status == 0, said
        assert f"{newest} {'cannot be read' if damage is None else 'is damaged'}" in said
        assert "going back to the state before it" in said
        assert canonical_of(copy) == expected, number


# -- the record ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_record(tmp_path: Path, killed: tuple[Path, Path, str]) -> None:
    """The log loses its end, from any byte on: the run goes on from an earlier point to the same end. The log
    or the database is changed or cut inside: the same end, or an error that says what is still good."""
    recipe, path, expected = killed
    log, closed = (path / "run.db-wal").read_bytes(), tmp_path / "closed"
    shutil.copytree(path, closed)
    Record(closed / "run.db").close()  # what was in the log is now in the database
    whole = (closed / "run.db").read_bytes()
    assert not (closed / "run.db-wal").exists()
    cases = [(path, "run.db-wal", log[:length]) for length in (0, *spread(len(log), 7), len(log))]
    cases += [(path, "run.db-wal", flipped(log, at)) for at in spread(len(log), 7)]
    cases += [(closed, "run.db", flipped(whole, at)) for at in spread(len(whole), 9)]
    cases += [(closed, "run.db", whole[:length]) for length in (0, *spread(len(whole), 6)[:-1])]
    ends = Counter[tuple[str, str]]()
    for number, (source, name, data) in enumerate(cases):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(source, copy)
        (copy / name).write_bytes(data)
        (copy / "run.db-shm").unlink(missing_ok=True)  # an index of the log, which went with the power
        had, has = int((copy / "run.head").read_text()), events_in(copy) if source is path else -1
        status, said = goes_on(recipe, copy)
        if status == 0 and has >= 0:
            announced = re.search(r"the end of the record is lost \((\d+) events", said)
            assert had - has == (int(announced[1]) if announced else 0), said
            ends["announced", "yes" if announced else "no"] += 1
        if status == 0:
            assert canonical_of(copy) == expected, (number, name)
            ends[name, "went on"] += 1
            continue
        assert status == 2, said
        assert re.search(r"run.db (is (damaged|empty)|cannot be read|is not a record)", said), said
        assert "restore" in said
        ends[name, "refused"] += 1
    assert ends["run.db-wal", "refused"] == 0  # SQLite knows where its log is whole
    assert ends["run.db", "refused"] >= 9, ends
    assert ends["announced", "yes"] >= 6, ends
    assert ends["announced", "no"] >= 1, ends


def test_a_kill_while_the_record_is_made_a_wal_one(tmp_path: Path, run_quick: RunQuick) -> None:
    """SQLite writes a rollback journal for the header; the torture test has found a run killed in between."""
    expected = run_quick(tmp_path / "whole")
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    for name in ("run.lock", "owner.json", "run.db"):
        (path / name).touch()
    (path / "run.db-journal").write_bytes(bytes.fromhex("d9d505f920a163d7") + bytes(504))
    assert run_quick(path) == expected


def _killed_in_a_commit(path: Path) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA cache_size = 1")  # so that pages go to the file before the commit
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE events SET body = body || hex(zeroblob(9000))")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_kill_inside_a_commit_without_wal(tmp_path: Path, run_quick: RunQuick) -> None:
    """What SQLite must undo is undone for those who only read, too: for the report, and before going on."""
    expected = run_quick(tmp_path / "run")
    record = tmp_path / "run" / "run.db"
    whole = record.read_bytes()
    context = multiprocessing.get_context("spawn")
    for reads_first in (True, False):
        process = context.Process(target=_killed_in_a_commit, args=(record,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert record.with_name("run.db-journal").stat().st_size > 512
        assert record.read_bytes() != whole
        if reads_first:
            assert canonical_of(tmp_path / "run") == expected
        assert run_quick(tmp_path / "run") == expected
        whole = record.read_bytes()


# -- clock, workers, lock ------------------------------------------------------------------------------


def test_a_clock_that_is_set(tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour forward, an hour back, at every reading: no report depends on it."""
    settings = ("search.timeout=30m", *STATES)
    expected = run_quick(tmp_path / "whole", *settings)
    now, readings = time.time, 0

    def jumping() -> float:
        nonlocal readings
        readings += 1
        return now() + (0.0, 3600.0, -3600.0)[readings % 3]

    monkeypatch.setattr(time, "time", jumping)
    assert run_quick(tmp_path / "jumping", *settings) == expected
    assert readings > 10


@pytest.mark.slow
def test_a_worker_that_is_stopped_for_a_while(tmp_path: Path, run_quick: RunQuick) -> None:
    """As a debugger or a full machine does. Its work is waited for, and done once."""
    settings = (*STATES, "executor=processes", "run.workers=2", "search.trials=6", "trainer.epochs=4")
    expected = run_quick(tmp_path / "whole", *settings)
    mine, stopped = Path(f"/proc/self/task/{threading.get_native_id()}/children"), []

    def stop_and_go() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and len(stopped) < 4:
            for child in map(int, mine.read_text().split()):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                        continue
                    os.kill(child, signal.SIGSTOP)
                    time.sleep(0.1)
                    os.kill(child, signal.SIGCONT)
                    stopped.append(child)
            time.sleep(0.01)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    got = run_quick(tmp_path / "stopped", *settings)
    thread.join()
    assert got == expected
    with Record(tmp_path / "stopped" / "run.db", readonly=True) as record:
        reports = Counter((event.body["trial"], event.body["epoch"]) for event in record.of_kind("report"))
        ends = Counter(event.body["trial"] for event in record.of_kind("finish"))
    assert stopped
    assert len(reports) == 6 * 4
    assert {*reports.values(), *ends.values()} == {1}


def _hold(path: Path, ready: str) -> None:
    """Holds a run's lock, and has a child that lives on."""
    with RunDir(path):
        if not os.fork():
            os.setsid()
            time.sleep(60)
            os._exit(0)
        Path(ready).touch()
        time.sleep(60)


@pytest.mark.slow
def test_a_lock_is_free_at_once_when_its_holder_is_killed(tmp_path: Path) -> None:
    """Also where a process that it had forked is still there."""
    ready = tmp_path / "ready"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
         f"from test_faults import _hold, Path; _hold(Path({str(tmp_path / 'run')!r}), {str(ready)!r})"],
        cwd=ROOT,
    )  # fmt: skip
    while not ready.exists():
        assert holder.poll() is None
        time.sleep(0.01)
    left = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    try:
        with pytest.raises(RunLockedError, match=f"process {holder.pid} on "), RunDir(tmp_path / "run"):
            pass
        holder.kill()
        holder.wait()
        assert Path(f"/proc/{left[0]}").exists()
        with RunDir(tmp_path / "run"):
            pass
    finally:
        holder.kill()
        holder.wait()
        os.kill(int(left[0]), signal.SIGKILL)
