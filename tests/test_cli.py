"""The command line as a stranger uses it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, canonical_of

HPT = [sys.executable, "-c", "from hpt_torch.cli import main; main()"]
RECIPE = """# A small search for the tests.
name = "small"
[hparams]
hidden_sizes = [16]
batch_size = 256
[space]
lr = { float = [1e-3, 1e-1], default = 1e-2 }
dropout = { float = [0.0, 0.5] }
[search]
trials = 3
[trainer]
epochs = 2
threads = 1
"""


def hpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HPT, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which `hpt run small.toml` has finished."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.toml").write_text(RECIPE)
    done = hpt("run", "small.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "small: 3 complete" in done.stdout
    assert "Best: trial" in done.stdout
    assert "hold-out" in done.stdout
    assert "tensorboard --logdir runs/small/tensorboard" in done.stdout
    assert "3 trials of 2 epochs on" in done.stderr
    return folder


@pytest.mark.slow
def test_run_leaves_everything_where_it_says(finished: Path) -> None:
    run = finished / "runs" / "small"
    names = "best checkpoints environment.json recipe.toml report.html run.db run.head run.lock"
    assert sorted(p.name for p in run.iterdir()) == [*names.split(), "tensorboard", "trials.csv"]
    rows = list(csv.DictReader((run / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["COMPLETE"] * 3
    best = tomllib.loads((run / "best" / "hparams.toml").read_text())
    report = json.loads(hpt("report", "runs/small", "--json", cwd=finished).stdout)
    assert best["trial"] == report["best"]["number"]
    assert best["hparams"]["lr"] == report["best"]["hparams"]["lr"]
    assert best["hparams"]["hidden_sizes"] == [16]
    scores = [trial["metrics"]["valid/accuracy"] for trial in report["trials"]]
    assert report["best"]["metrics"]["valid/accuracy"] == max(scores)
    assert rows[0]["lr"] == str(0.01)  # trial 0 is the declared default


@pytest.mark.slow
def test_canonical_is_equal_for_equal_runs_and_has_no_times_or_places(finished: Path) -> None:
    first = hpt("report", "runs/small", "--canonical", cwd=finished).stdout
    again = hpt("run", "small.toml", "--run-dir", "elsewhere", "--quiet", cwd=finished)
    assert again.returncode == 0
    assert hpt("report", "elsewhere", "--canonical", cwd=finished).stdout == first
    assert canonical_of(finished / "elsewhere") == first
    data = json.loads(first)
    assert list(data) == sorted(data)
    assert float.fromhex(data["trials"][0]["hparams"]["lr"]) == 0.01
    assert all(len(trial["weights_sha256"]) == 64 for trial in data["trials"])
    assert "seconds" not in first
    assert str(finished) not in first
    other = hpt("run", "small.toml", "seed=1", "--run-dir", "other", "--quiet", cwd=finished)
    assert other.returncode == 0
    assert canonical_of(finished / "other") != first


@pytest.mark.slow
def test_list_and_validate(finished: Path) -> None:
    listed = hpt("list", cwd=finished).stdout
    assert "digits_mlp_tpe" in listed
    assert "small" in listed
    assert "3 complete" in listed
    shown = hpt("validate", "small.toml", "search.timeout=90s", cwd=finished).stdout
    assert "valid" in shown
    assert "dynamic    dropout, lr" in shown
    assert "3 trials, at most 90 s, of 2 epochs" in shown
    schema = json.loads(hpt("validate", "--schema", cwd=finished).stdout)
    assert "space" in schema["properties"]
    assert hpt("--version", cwd=finished).stdout.startswith("hpt_torch 0.")


@pytest.mark.slow
def test_mistakes_are_one_message_and_exit_status_2(finished: Path) -> None:
    for arguments, part in (
        (("run", "nothing_like_it"), "is neither a file nor a known recipe; known: "),
        (("run", "missing.toml"), "cannot be read: No such file"),
        (("run", "small.toml", "lr=-1"), "hparams.lr: must be in (0, 1e+06], got -1"),
        (("run", "small.toml", "seed=5"), "belongs to another recipe:\n  seed: 0 -> 5"),
        (("report", "missing"), "is not a run directory"),
        (("run", "small.toml", "task.model=os:system", "--run-dir", "evil"), "add --allow-import os"),
    ):
        done = hpt(*arguments, cwd=finished)
        assert done.returncode == 2, arguments
        assert part in done.stderr
        assert "Traceback" not in done.stderr
    assert not (finished / "evil").exists()


@pytest.mark.slow
def test_a_model_of_the_users_by_name(finished: Path) -> None:
    (finished / "mymodel.py").write_text(
        "from torch import nn\n"
        "def make(input_shape, out_features, width=8):\n"
        "    inputs, hidden = nn.Linear(input_shape[0], width), nn.Linear(width, out_features)\n"
        "    return nn.Sequential(inputs, nn.Tanh(), hidden)\n"
    )
    arguments = ("run", "small.toml", "task.model=mymodel:make", "width=12", "space.dropout={int=[1,2]}")
    done = hpt(*arguments, "--allow-import", "mymodel", "--run-dir", "own", cwd=finished)
    assert done.returncode == 2  # dropout and hidden_sizes are not hyperparameters of this model
    assert "space.dropout: is not a hyperparameter of this task" in done.stderr
    text = RECIPE.replace("dropout = { float = [0.0, 0.5] }", "").replace("hidden_sizes = [16]", "width = 12")
    (finished / "own.toml").write_text(text.replace("[hparams]", '[task]\nmodel = "mymodel:make"\n[hparams]'))
    done = hpt("run", "own.toml", "--allow-import", "mymodel", "--run-dir", "own", cwd=finished)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(
    finished: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = [
        "run",
        str(finished / "small.toml"),
        "trainer.epochs=400",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        [*HPT, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "run.db").exists():
        time.sleep(0.02)
    time.sleep(1.0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "everything is saved" in errors
    assert f"The same command goes on: hpt {' '.join(arguments)}" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "run").glob("**/*.tmp"))
    shown = hpt("report", str(tmp_path / "run"), cwd=tmp_path)
    assert shown.returncode == 0
