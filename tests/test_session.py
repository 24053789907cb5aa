"""What is checked before a session writes, and how it ends."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, ROOT, canonical_of
from torch import nn

from hpt_torch import recipe, session
from hpt_torch.record import Record
from hpt_torch.rundir import RunDir, repository
from hpt_torch.task import Task
from hpt_torch.tasks import Classification
from hpt_torch.types import (
    InfeasibleError,
    RecipeError,
    RunError,
    RunLockedError,
    RunMismatchError,
    TrialState,
)

RunQuick = Callable[..., str]


def test_another_recipe_is_refused_with_the_difference(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run")
    before = (tmp_path / "run" / "run.db").read_bytes()
    for override, line in (
        ("lr=0.5", "hparams.lr: not given -> 0.5"),
        ("seed=9", "seed: 0 -> 9"),
        ("trainer.epochs=5", "trainer.epochs: 2 -> 5"),
        ("search.round_size=3", "search.round_size: 2 -> 3"),
        ("space.dropout={float=[0.0, 0.4]}", "space.dropout: {'float': [0.0, 0.5]} -> {'float': [0.0, 0.4]}"),
    ):
        with pytest.raises(RunMismatchError) as caught:
            run_quick(tmp_path / "run", override)
        assert line in str(caught.value)
    assert (tmp_path / "run" / "run.db").read_bytes() == before


def test_logging_and_name_may_differ(tmp_path: Path, run_quick: RunQuick) -> None:
    first = run_quick(tmp_path / "run")
    assert run_quick(tmp_path / "run", "name=other", "run.checkpoint_every_seconds=7") == first


@pytest.mark.slow
def test_one_writer_at_a_time(tmp_path: Path, run_quick: RunQuick) -> None:
    """The lock of a living process holds and names it; that of a killed one does not."""
    path = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from hpt_torch.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunLockedError, match=f"being written by process {holder.pid} on "):
            run_quick(path)
    finally:
        holder.kill()
        holder.communicate()
    assert (path / "owner.json").exists()  # left by the kill
    run_quick(path)
    assert not (path / "owner.json").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, run_quick: RunQuick) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(RunError, match=r"is not a run directory \(it has no run.db but holds thesis.tex\)"):
        run_quick(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        run_quick(tmp_path / "thesis.tex")


@pytest.mark.parametrize("name", ["../up", "a/../../b", "/absolute"])
def test_run_names_stay_inside_the_root(name: str) -> None:
    with pytest.raises(RunError, match="leads outside"):
        session.run_dir_for(name)


class Net(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], out_features: int, width: int = 4) -> None:
        super().__init__()
        if width > 100:
            raise ValueError(f"width must be at most 100, got {width}")
        if width == 13:
            raise RuntimeError("unlucky")
        self.layers = nn.Sequential(
            nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, out_features)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def _raw(**space: Any) -> dict[str, Any]:
    return {**QUICK, "hparams": {}, "space": space}


def test_infeasible_and_failing_models_are_recorded_and_the_run_goes_on(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    task = Classification(Net, digits_task.data())
    raw = _raw(width={"choice": [4, 13, 200]})
    raw["search"] = {"sampler": "grid"}
    run_quick(tmp_path / "run", raw=raw, task=task)
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        ends = {trial.hparams["width"]: trial for trial in record.trials.values()}
    assert ends[4].state is TrialState.COMPLETE
    assert ends[200].state is TrialState.INFEASIBLE
    assert ends[200].reason == "width must be at most 100, got 200"
    assert ends[13].state is TrialState.FAILED
    assert "RuntimeError: unlucky" in ends[13].reason
    assert json.loads(canonical_of(tmp_path / "run"))["best"]["hparams"] == {"width": 4}


def test_a_model_that_can_never_be_is_refused_before_anything_is_written(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    task = Classification(Net, digits_task.data())
    with pytest.raises(RecipeError, match="hparams: allow no model: width must be at most 100, got 300"):
        run_quick(tmp_path / "run", "width=300", raw=_raw(lr={"float": [0.1, 1.0]}), task=task)
    assert not (tmp_path / "run").exists()


def test_changed_code_is_noticed(tmp_path: Path, run_quick: RunQuick, digits_task: Classification) -> None:
    raw = _raw(lr={"float": [0.01, 0.1]})
    space: dict[str, Any] = {}
    for version, extra in (("one", "x"), ("two", "2 * x")):
        file = tmp_path / f"{version}.py"
        file.write_text(
            "from torch import nn\n"
            "class Made(nn.Module):\n"
            "    def __init__(self, input_shape, out_features):\n"
            "        super().__init__()\n"
            "        self.linear = nn.Linear(input_shape[0], out_features)\n"
            f"    def forward(self, x):\n        return self.linear({extra})\n"
        )
        import importlib.util

        spec = importlib.util.spec_from_file_location(f"made_{version}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        space[version] = Classification(module.Made, digits_task.data())
    run_quick(tmp_path / "run", raw=raw, task=space["one"])
    with pytest.raises(
        RunMismatchError, match=r"the code of Made, made_one.Made.__init__, .* and 2 more changed"
    ):
        run_quick(tmp_path / "run", raw=raw, task=space["two"])
    run_quick(tmp_path / "run", raw=raw, task=space["two"], accept_changed_code=True)


def test_changed_data_is_refused(tmp_path: Path, run_quick: RunQuick, digits_task: Classification) -> None:
    import dataclasses

    from hpt_torch.data import Rows

    run_quick(tmp_path / "run")
    data = digits_task.data()
    inputs = data.train.tensors["inputs"].clone()
    inputs[3, 5] += 1e-3
    changed = dataclasses.replace(data, train=Rows({**data.train.tensors, "inputs": inputs}))
    from hpt_torch.models import MLP

    with pytest.raises(RunMismatchError, match="the data set's tensors are not the same"):
        run_quick(tmp_path / "run", task=Classification(MLP, changed))


def test_the_holdout_is_read_once_and_by_nothing_else(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    """A hold-out whose labels are all wrong changes no decision, only its own figure."""
    import dataclasses

    from hpt_torch.data import Rows
    from hpt_torch.models import MLP

    honest = json.loads(run_quick(tmp_path / "honest"))
    data = digits_task.data()
    assert data.holdout is not None
    wrong = Rows({**data.holdout.tensors, "targets": (data.holdout.tensors["targets"] + 1) % 10})
    task = Classification(MLP, dataclasses.replace(data, holdout=wrong))
    spoilt = json.loads(run_quick(tmp_path / "spoilt", task=task))
    assert spoilt["trials"] == honest["trials"]
    assert spoilt["best"] == honest["best"]
    accuracy = [float.fromhex(r["holdout"]["metrics"]["holdout/accuracy"]) for r in (honest, spoilt)]
    assert accuracy[0] > 0.85
    assert accuracy[1] < 0.1
    run_quick(tmp_path / "honest")
    with Record(tmp_path / "honest" / "run.db", readonly=True) as record:
        assert len(record.of_kind("holdout")) == 1


class _Slow(Classification):
    def loss(self, model: nn.Module, batch: Mapping[str, Any], hparams: Mapping[str, Any]) -> torch.Tensor:
        time.sleep(0.05)
        return super().loss(model, batch, hparams)


@pytest.mark.slow
def test_a_used_up_timeout_pauses_and_a_larger_one_goes_on(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    from hpt_torch.models import MLP

    expected = run_quick(tmp_path / "whole")
    slow = _Slow(MLP, digits_task.data())
    run_quick(tmp_path / "run", "search.timeout=0.4s", task=slow)
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        assert record.last("pause") is not None
        assert TrialState.PAUSED in {trial.state for trial in record.trials.values()}
        used = record.seconds_used()
        assert used >= 0.4
    run_quick(tmp_path / "run", "search.timeout=0.4s", task=slow)  # nothing is left of the budget
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        assert len(record.of_kind("pause")) == 1
    # The figures were not read unless a trial was complete; searching on is then asked for.
    assert run_quick(tmp_path / "run", "search.timeout=1h", task=slow, reopen_holdout=True) == expected


def test_device_and_dtype_are_checked(digits_task: Task) -> None:
    for device, part in (
        ("cuda", "has no CUDA device"),
        ("cuda:7", "no CUDA device"),
        ("mps", "no Apple GPU"),
    ):
        if device != "mps" and torch.cuda.is_available():
            continue
        made = recipe.build(QUICK, [f"trainer.device={device}"], source="x")
        with pytest.raises(RecipeError, match=f"trainer.device: .*{part}"):
            session.check(made, digits_task, source="x")


def test_infeasible_error_may_be_raised_by_a_task(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification
) -> None:
    class Picky(Classification):
        def build_model(self, hparams: Mapping[str, Any]) -> nn.Module:
            if hparams["activation"] == "tanh":
                raise InfeasibleError("tanh is not for us")
            return super().build_model(hparams)

    from hpt_torch.models import MLP

    run_quick(tmp_path / "run", "search.trials=6", "trainer.engine=auto", task=Picky(MLP, digits_task.data()))
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        states = {(t.hparams["activation"], t.state) for t in record.trials.values()}
    assert states == {("relu", TrialState.COMPLETE), ("tanh", TrialState.INFEASIBLE)}


def test_a_run_leaves_no_owner_and_no_lock_behind(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run")
    with RunDir(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["threads"] == 1


def test_the_repository_is_recorded_with_what_is_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True)

    assert repository(tmp_path) == {}
    git("init")
    (tmp_path / "train.py").write_text("lr = 1\n")
    git("add", "train.py")
    git("commit", "-m", "first")
    (tmp_path / "train.py").write_text("lr = 2\n")
    found = repository(tmp_path)
    assert len(found["commit"]) == 40
    assert "-lr = 1\n+lr = 2\n" in found["diff"]


def test_another_environment_is_named(
    tmp_path: Path, run_quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Listener:
        def __getattr__(self, name: str) -> Any:
            return (lambda line: said.append(line)) if name == "say" else lambda *arguments: None

    run_quick(tmp_path / "run", "search.trials=1")
    run_quick(tmp_path / "run", "search.trials=2", observers=[Listener()], reopen_holdout=True)
    assert not [line for line in said if "since the last session" in line]
    versions = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1" if name == "optuna" else versions(name)
    )
    run_quick(tmp_path / "run", "search.trials=3", observers=[Listener()], reopen_holdout=True)
    assert f"since the last session: packages.optuna: {versions('optuna')} -> 0.1" in said
