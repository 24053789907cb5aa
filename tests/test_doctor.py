"""hpt doctor: what it finds and says, what it counts as a problem, and its measurement of the cost table."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from rich.console import Console
from test_calibration import OWN, TINY
from test_cli import HPT
from typer.testing import CliRunner

from hpt_torch import calibration, doctor, limits, room
from hpt_torch.cli import app
from hpt_torch.data import cache
from hpt_torch.trainers.costs import SHIPPED, TRAITS


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's cost table lies; there is none yet. Runs are in tmp_path/runs."""
    monkeypatch.setenv("HPT_TORCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return calibration.path()


def _doctor(*options: str) -> Any:
    done = CliRunner().invoke(app, ["doctor", *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def _json(*options: str, status: int = 0) -> dict[str, Any]:
    done = _doctor("--json", *options)
    assert done.exit_code == status, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert bool(found["problems"]) == bool(status)
    return found


def _versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if (found := versions[name] if name in versions else real(name)) is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


# -- what it shows -------------------------------------------------------------------------------------


def test_json_has_everything(table: Path) -> None:
    found = _json()
    assert set(found) == {
        "hpt_torch", "python", "executable", "platform", "packages", "extras", "compiler", "problems", "cpu",
        "memory_bytes", "settings", "devices", "no_cuda", "costs", "disk",
    }  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(found["packages"]) == {re.split(r"[\[>]", line)[0] for line in project["dependencies"]}
    extras = {
        name: {re.split(r"[\[>]", line)[0] for line in lines}
        for name, lines in project["optional-dependencies"].items()
    }
    assert {name: set(about["packages"]) for name, about in found["extras"].items()} == extras
    assert found["packages"]["torch"]["version"] == metadata.version("torch")
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["costs"]["source"] == "shipped"
    assert found["costs"]["sha256"] == SHIPPED.sha256
    assert found["disk"]["free_bytes"] > found["disk"]["needed_bytes"]


def test_piped_it_is_plain_and_on_a_terminal_a_table(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _doctor().output
    assert f"\npackages         {', '.join(_torchless(plain))}" in plain
    assert "\ncost table       the shipped one; faster one by one: convolution (cpu), lstm (cpu)" in plain
    assert plain.endswith("Nothing keeps hpt_torch from running here.\n")
    assert not set("│┌─") & set(plain)
    screen = io.StringIO()
    monkeypatch.setattr(doctor, "Console", lambda: Console(file=screen, force_terminal=True, width=100))
    doctor.doctor(runs=Path("runs"))
    assert "│ cost table" in screen.getvalue()


def _torchless(text: str) -> list[str]:
    """The packages in the text, as they are in this environment."""
    (line,) = (line for line in text.splitlines() if line.startswith("packages"))
    names = [cell.split()[0] for cell in line.removeprefix("packages").split(", ")]
    assert "optuna" in names
    return [f"{name} {metadata.version(name)}" for name in names]


def test_a_measured_table_says_when_with_what_and_how_to_go_back(table: Path) -> None:
    cache.write(table, OWN.dumps().encode())
    costs = _json()["costs"]
    assert (costs["source"], costs["measured"], costs["torch"]) == ("measured", OWN.measured, "2.0")
    assert costs["slow_together"] == {"cpu": ["dense"]}
    text = _doctor().output
    assert f"measured {OWN.measured} with torch 2.0; this is another torch: hpt doctor --calibrate" in text
    assert f"remove {table} to go back to the shipped one" in text


def test_what_is_not_there_is_said(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra or compiler keeps nothing from running."""
    _versions(monkeypatch, plotly=None, ray="1.0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(limits, "_cgroup", lambda name: ["max 100000", "150000 100000"])
    monkeypatch.setattr(limits, "memory_bytes", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    done = _doctor()
    assert done.exit_code == 0
    assert 'extra plots      plotly missing: pip install "hpt-torch[plots]"' in done.output
    assert 'extra ray        ray 1.0 (needs 2.30): pip install "hpt-torch[ray]"' in done.output
    assert "C++ compiler     none: torch.compile needs one" in done.output
    assert "memory           unknown" in done.output
    if sys.platform.startswith("linux"):
        assert "of which a cgroup allows the time of 1.5: set run.workers=2" in done.output


def test_limits_of_a_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits._cgroup("memory.max", tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert limits._cgroup("memory.max", tmp_path) == (["1000"] if Path("/proc/self/cgroup").is_file() else [])
    whole = limits.memory_bytes()
    monkeypatch.setattr(limits, "_cgroup", lambda name: ["max", "1000000", "2000000"])
    assert limits.memory_bytes() in (1_000_000, None)
    monkeypatch.setattr(limits, "_cgroup", lambda name: ["max"])
    assert whole is None or limits.memory_bytes() >= whole
    monkeypatch.setattr(limits, "_cgroup", lambda name: ["max 100000"])
    assert limits.cpu_quota() is None


# -- what is a problem ---------------------------------------------------------------------------------


def test_a_damaged_table_is_one(table: Path) -> None:
    cache.write(table, b"damaged")
    found = _json(status=1)
    assert found["costs"] == {"path": str(table), "source": "damaged"}
    (problem,) = found["problems"]
    assert "hpt doctor --calibrate, or remove the file" in problem
    assert f"Problem: {table}, the cost table of this machine, is damaged" in _doctor().output


def test_packages_that_are_missing_or_too_old_are(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, optuna=None, torch="2.5.9+cu118")
    assert _json(status=1)["problems"] == [
        'optuna is not installed: pip install "optuna>=4.4"',
        'torch is 2.5.9+cu118, which is too old: pip install "torch>=2.6"',
    ]
    assert "optuna missing" in _doctor().output


def test_a_package_that_cannot_be_imported_is(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (problem,) = _json(status=1)["problems"]
    assert problem.startswith("torchvision cannot be imported (import of torchvision halted")


def test_a_disk_without_room_or_leave_to_write_is(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FREE_BYTES", 2**80)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    full, shut = _json("--runs", "elsewhere/runs", status=1)["problems"]
    assert "elsewhere/runs needs" in full
    assert "cannot be written, so no run can be kept in elsewhere/runs; use another --run-dir" in shut


def test_a_gpu_that_does_not_work_is(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: int) -> None:
        raise RuntimeError("CUDA error: busy\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    found = _json(status=1)
    assert found["problems"] == ["cuda:0 cannot be used (CUDA error: busy); use trainer.device=cpu"]
    assert (found["devices"], found["no_cuda"]) == ([{"device": "cuda:0"}], "")


# -- measuring -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibrate_measures_keeps_and_says_where(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "Effort", lambda: TINY)
    cache.write(table, b"damaged")  # it is measured anew
    done = _doctor("--calibrate")
    assert done.exit_code == 0
    assert set(re.findall(r"^  cpu, (\w+): 2 together at \d+\.\d\d x$", done.stdout, re.M)) == set(TRAITS)
    assert f"Kept in {table}: new runs plan with it.\nRemove that file to go back" in done.stdout
    assert f"with torch {torch.__version__}; faster one by one: " in done.stdout
    kept = calibration.present()
    assert kept.measured
    again = _json("--calibrate")  # standard output is the JSON alone
    assert again["costs"]["ratios"]["cpu"].keys() == kept.ratios["cpu"].keys()


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_table(table: Path) -> None:
    process = subprocess.Popen(
        [*HPT, "doctor", "--calibrate"], env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("  cpu, "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert errors == "hpt: stopped; the cost table is as it was\n"
    assert not table.parent.exists()
