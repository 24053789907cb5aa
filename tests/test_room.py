"""Room on the disk: a run needs some to begin, keeps to its limit, and gives back what it can do without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import canonical_of
from typer.testing import CliRunner

from hpt_torch import room, tuner
from hpt_torch.cli import app
from hpt_torch.observers.tensorboard import TensorBoardObserver
from hpt_torch.rundir import RunDir
from hpt_torch.types import RunError

RunQuick = Callable[..., str]


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(RunError, match=r"needs 67.1 MB of free disk .* there are 10.0 MB; make room"):
        run_quick(tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_over_the_limit_only_the_newest_state_is_kept(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no curve is written; the result is the same."""
    most: dict[str, int] = {}
    drop = tuner.Tuner.drop_old_states

    def count(self: tuner.Tuner, key: str, *, ended: bool = False) -> None:
        drop(self, key, ended=ended)
        name = self.dir.path.name
        states = [p for p in self.dir.checkpoints.iterdir() if p.name.startswith("chunk")]
        most[name] = max(most.get(name, 0), len(states))

    monkeypatch.setattr(tuner.Tuner, "drop_old_states", count)
    settings = ["trainer.epochs=6", "run.checkpoint_every_seconds=0"]
    expected = run_quick(tmp_path / "free", *settings, observers=[TensorBoardObserver()])
    bound = run_quick(tmp_path / "bound", *settings, "run.max_disk='1kB'", observers=[TensorBoardObserver()])
    assert bound == expected
    assert most == {"free": tuner.KEEP_STATES, "bound": 1}
    assert list((tmp_path / "free" / "tensorboard").iterdir())
    assert not (tmp_path / "bound" / "tensorboard").exists()


def test_what_can_go_goes_and_no_result_with_it(tmp_path: Path, run_quick: RunQuick) -> None:
    path, settings = tmp_path / "run", ["final.confirm=2", "final.seeds=2"]
    expected = run_quick(path, *settings, observers=[TensorBoardObserver()])
    CliRunner().invoke(app, ["report", str(path)], catch_exceptions=False)
    before = room.used(path)
    shown = CliRunner().invoke(app, ["clean", str(path)], catch_exceptions=False)
    assert room.used(path) == before
    for name in ("tensorboard", "report.html", "trials.csv", "confirmations"):
        assert name in shown.output
    done = CliRunner().invoke(app, ["clean", str(path), "--yes"], catch_exceptions=False)
    assert "removed" in done.output
    assert room.used(path) < before - 50_000
    assert not (path / "tensorboard").exists()
    again = CliRunner().invoke(app, ["clean", str(path)], catch_exceptions=False)
    assert "nothing can go" in again.output
    assert canonical_of(path) == expected
    assert run_quick(path, *settings) == expected
    CliRunner().invoke(app, ["report", str(path)], catch_exceptions=False)
    assert (path / "best" / "weights.safetensors").is_file()


def test_a_run_that_is_going_on_is_left_alone(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run", observers=[TensorBoardObserver()])
    with RunDir(tmp_path / "run"):
        refused = CliRunner().invoke(app, ["clean", str(tmp_path / "run"), "--yes"])
    assert "is being written by" in str(refused.exception)
    assert (tmp_path / "run" / "tensorboard").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(bytes(1000))
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
    assert room.used(tmp_path / "near") == 0
    assert [room.show_bytes(n) for n in (12, 3_400_000, 1_200_000_000)] == ["12 B", "3.4 MB", "1.2 GB"]
