"""The torture test that `sh scripts/torture` is, with few kills; and that it would find what it looks for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from hpt_torch.executors import processes
from hpt_torch.record import Record, finish_event, report_event, trial_event
from hpt_torch.types import Report, TrialState

sys.path.insert(0, str(ROOT / "scripts"))
import torture_hook
import torture_run

pytestmark = pytest.mark.skipif(not processes.supported(), reason="process groups and /proc: Linux only")
RunQuick = Callable[..., str]


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    """Of a group, a coordinator, a worker; at durable steps and at random instants."""
    results = tmp_path / "results.json"
    command = [sys.executable, ROOT / "scripts" / "torture.py", "--fast", "--kills", "20", "--json", results]
    words = "tpe-fifo-loop-inline,gp-asha,grid-fifo-fused-processes,random-pbt-fused-processes"
    done = subprocess.run(
        [*command, "--recipes", words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.startswith("| case | durable steps | runs |")
    cases = json.loads(results.read_text())
    assert len(cases) == 4
    assert all(case["steps"] > 30 and case["failures"] == [] for case in cases)
    assert sum(case["step_kills"] + case["instant_kills"] for case in cases) >= 20
    assert all(sum(case["targets"].values()) >= 5 for case in cases)
    assert {target for case in cases for target in case["targets"]} == set(torture_hook.TARGETS)
    assert min(sum(case[kind] for case in cases) for kind in ("step_kills", "instant_kills")) >= 4


def test_every_durable_step_is_come_to() -> None:
    steps = ["commit", "fsync", "write trials.csv", "rename to recipe.toml"] * 5
    lives = torture_run.step_lives(steps, 10**3, torture_hook.TARGETS, random.Random(0))
    first = {(kills[0].step, kills[0].moment) for kills in lives}
    assert {(step, moment) for step in range(1, 21) for moment in ("before", "after")} <= first
    assert {step for step, moment in first if moment == "half"} == {3, 7, 11, 15, 19}
    few = torture_run.step_lives(steps, 4, ("group",), random.Random(0))
    assert [kills[0].step for kills in few] == [1, 7, 14, 20]


def test_what_is_wrong_is_found(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path)
    expected = torture_run.reports_of(tmp_path)
    assert torture_run.judge(tmp_path, expected) == []
    for name in (".recipe.toml.tmp", "run.db-journal", "owner.json", "checkpoints/chunk-0-1.safetensors"):
        (tmp_path / name).touch()
        name = name.removeprefix("checkpoints/")
        assert any(f"{name} is left" in problem for problem in torture_run.judge(tmp_path, expected))
        next(tmp_path.rglob(name)).unlink()
    assert torture_run.judge(tmp_path, {**expected, "baselines/random": ""}) == ["baselines/random: missing"]
    assert torture_run.judge(tmp_path, {}) == [".: not in the reference"]
    with Record(tmp_path / "run.db") as record:
        again = finish_event(0, TrialState.COMPLETE, "", record.trials[0].weights_sha256, 2)
        record.append(again, report_event(record.trials[1].reports[0]))
        record.append(trial_event(5, 2, {"lr": 0.1}, "x"))
        record.append(report_event(Report(trial=5, epoch=1, metrics={}, seconds=0.1)))
    best = next((tmp_path / "checkpoints").iterdir())
    best.rename(tmp_path / "hidden")
    assert torture_run.judge(tmp_path, expected) == [
        ".: another canonical report", ".: trial 4 is lost", ".: 0 is ended 2 times",
        ".: (1, 1) is reported 2 times", ".: trial 1 has not ended", ".: trial 5 has not ended",
        f".: {best.name} is missing",
    ]  # fmt: skip
    content = (tmp_path / "run.db").read_bytes()
    (tmp_path / "run.db").write_bytes(content[:9000])
    assert "not readable" in torture_run.judge(tmp_path, expected)[0]


def test_an_orphan_is_found_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture_run, "ORPHAN_SECONDS", 0.2)
    orphan = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert torture_run.living(orphan.pid) == [orphan.pid]
    assert torture_run._orphans(orphan.pid, None) == ["1 processes live 0.2 s after the end"]
    assert orphan.wait(10) == -9
    assert torture_run._orphans(orphan.pid, None) == []


@pytest.mark.parametrize("moment", torture_hook.MOMENTS)
def test_the_plug_is_pulled_at_its_step(tmp_path: Path, moment: str) -> None:
    """Steps: 1 and 2 are the mode and the schema of a record, 3 and 4 its commits, 5 writes a file."""
    code = (
        "import os, sqlite3, sys, torture_hook; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "torture_hook.install(torture_hook.Plug(\n"
        "    log=folder / 'log', root=folder, step=int(sys.argv[2]), moment=sys.argv[3]))\n"
        "db = sqlite3.connect(folder / 'x.db', isolation_level=None)\n"
        "db.execute('PRAGMA journal_mode = WAL'); db.executescript('CREATE TABLE t (a)')\n"
        "for a in range(2):\n"
        "    with db: db.execute('BEGIN'); db.execute('INSERT INTO t VALUES (1)')\n"
        "(folder / 'text').write_text('12345678'); (folder / 'text').unlink()\n"
    )
    rows = {"before": 1, "half": 1, "after": 2}[moment]
    for step, left in ((4, rows), (5, {"before": None, "half": "1234", "after": "12345678"}[moment])):
        folder = tmp_path / str(step)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, folder, str(step), moment],
            cwd=ROOT / "scripts", start_new_session=True, check=False,
        )  # fmt: skip
        assert done.returncode == -9
        assert (folder / "log").read_text().splitlines()[-1].startswith(f"pulled group {moment} ")
        if step == 4:
            import sqlite3

            with sqlite3.connect(folder / "x.db") as db:
                assert db.execute("SELECT count(*) FROM t").fetchone() == (left,)
            db.close()
        else:
            text = folder / "text"
            assert (text.read_text() if text.exists() else None) == left


def test_a_worker_is_killed_alone() -> None:
    parent = subprocess.Popen(["sh", "-c", "sleep 60; echo $?"], stdout=subprocess.PIPE, text=True)
    while not torture_hook.children(parent.pid):
        time.sleep(0.01)
    assert torture_hook.kill(parent.pid, "worker")
    assert parent.communicate(timeout=10)[0] == "137\n"
    assert not torture_hook.kill(parent.pid, "worker")
    assert torture_hook.children(2**22 + 1) == []
