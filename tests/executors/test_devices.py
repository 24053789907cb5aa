"""A worker a device: the same results as without, whatever happens to one. Here every device is the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ear, Impatient
from executors.test_processes import _Killer, children
from torch import Tensor, nn

from hpt_torch import engines, session
from hpt_torch import recipe as recipes
from hpt_torch.data import Data, Stream
from hpt_torch.executors import processes
from hpt_torch.models import MLP
from hpt_torch.recipe import Recipe
from hpt_torch.tasks import Classification
from hpt_torch.types import Interrupted, RecipeError, RunError

pytestmark = pytest.mark.skipif(not processes.supported(), reason="workers are forked, on Linux only")
RunQuick = Callable[..., str]
FUSED = ("trainer.engine=fused", "search.trials=6", "search.round_size=6", "batch_size=64")
TWO = "trainer.devices=[0, 1]"


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many devices as a recipe names, each of them the CPU."""

    def devices_of(recipe: Recipe) -> list[torch.device]:
        return [torch.device("cpu")] * len(recipe.trainer.devices or [0])

    monkeypatch.setattr(processes, "can_use_cuda", lambda: not torch.cuda.is_initialized())
    monkeypatch.setattr(engines, "devices_of", devices_of)
    monkeypatch.setattr(engines, "_missing_devices", lambda recipe: ())


class _Places(Classification):
    """Writes down which process computes its loss."""

    def __init__(self, *arguments: Any, folder: Path) -> None:
        super().__init__(*arguments)
        self.folder = folder

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        (self.folder / str(os.getpid())).touch()
        return super().loss(model, batch, hparams)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "settings",
    [
        FUSED,
        (*FUSED, "evaluation.folds=2"),
        (*FUSED, "final.confirm=2", "final.seeds=2"),
        (*FUSED, "scheduler.kind=pbt", "space={lr={float=[0.001, 0.1]}}", "activation=relu"),
    ],
    ids=["fifo", "folds", "confirmed", "pbt"],
)
def test_devices_change_nothing(
    tmp_path: Path, run_quick: RunQuick, settings: tuple[str, ...], digits_task: Classification
) -> None:
    (tmp_path / "who").mkdir()
    task = _Places(MLP, digits_task.data(), folder=tmp_path / "who")
    inline = run_quick(tmp_path / "inline", *settings, task=task)
    assert [path.name for path in (tmp_path / "who").iterdir()] == [str(os.getpid())]
    assert run_quick(tmp_path / "devices", *settings, TWO, "executor=auto", task=task) == inline
    assert len(list((tmp_path / "who").iterdir())) >= 3  # and two workers
    assert children() == []


@pytest.mark.usefixtures("on_cpu")
def test_a_run_goes_on_with_other_devices(tmp_path: Path, run_quick: RunQuick) -> None:
    settings = (*FUSED, "trainer.epochs=6")
    whole = run_quick(tmp_path / "whole", *settings)

    with pytest.raises(Interrupted):
        run_quick(tmp_path / "run", *settings, TWO, "executor=auto", observers=[Impatient()])
    assert run_quick(tmp_path / "run", *settings, "trainer.devices=[3]", "executor=auto") == whole


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_a_worker_that_dies_is_replaced_by_a_spare_at_its_place(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*FUSED, "executor=auto", TWO)
    whole = run_quick(tmp_path / "calm", *settings)
    monkeypatch.setattr(processes.ProcessExecutor, "_fork", _limited(processes.ProcessExecutor._fork, 3))
    monkeypatch.setattr(processes, "SPARES", 1)
    task = _Killer(MLP, digits_task.data())
    task.once = tmp_path / "killed"
    assert run_quick(tmp_path / "run", *settings, task=task) == whole
    assert task.once.exists()


def _limited(fork: Callable[..., Any], most: int) -> Callable[..., Any]:
    """Fails after so many forks: once this process uses CUDA there are no others."""
    left = [most]

    def limited(self: processes.ProcessExecutor) -> Any:
        left[0] -= 1
        assert left[0] >= 0, "forked too late"
        return fork(self)

    return limited


@pytest.mark.usefixtures("on_cpu")
def test_without_a_spare_the_run_ends_and_the_next_command_goes_on(
    tmp_path: Path, run_quick: RunQuick, digits_task: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*FUSED, "executor=auto", TWO)
    whole = run_quick(tmp_path / "calm", *settings)
    monkeypatch.setattr(processes, "SPARES", 0)
    task = _Killer(MLP, digits_task.data())
    task.once = tmp_path / "killed"
    with pytest.raises(RunError, match=r"was killed by SIGKILL.* the same command goes on"):
        run_quick(tmp_path / "run", *settings, task=task)
    assert children() == []
    assert run_quick(tmp_path / "run", *settings, task=task) == whole


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_confirmations_of_a_run_with_a_timeout_train_on_the_first_device(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*FUSED, "final.confirm=2", "final.seeds=2")
    whole = run_quick(tmp_path / "calm", *settings)
    settle = engines.settle

    def used(recipe: Recipe, device: torch.device) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        settle(recipe, device)

    monkeypatch.setattr(engines, "settle", used)
    more = ("executor=auto", TWO, "run.epoch_timeout=60s")
    assert run_quick(tmp_path / "run", *settings, *more) == whole


def test_a_fork_of_a_process_that_has_asked_the_driver_cannot_use_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for bad in (False, True):
        monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda bad=bad: bad)
        assert processes.can_use_cuda() is not bad


@pytest.mark.usefixtures("on_cpu")
def test_a_process_that_has_used_cuda_trains_by_itself_and_says_so(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_quick(tmp_path / "calm", *FUSED)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.ProcessExecutor, "_fork", _limited(lambda self: None, 0))
    ear = Ear()

    assert run_quick(tmp_path / "run", *FUSED, TWO, "executor=auto", observers=[ear]) == whole
    assert any("all trains on cpu: workers of other devices" in line for line in ear.said)


@pytest.mark.parametrize(
    ("settings", "field", "rule"),
    [
        ({"trainer": {"devices": [0], "device": "cpu"}}, "trainer.devices", "are CUDA's, and"),
        ({"trainer": {"devices": [0], "device": "cuda:1"}}, "trainer.devices", "leave one out"),
        ({"trainer": {"devices": [0, 2]}}, "trainer.devices", "names 2, but there are 2, from 0 on"),
        ({"trainer": {"devices": [0]}, "executor": "inline"}, "executor", "use auto"),
        ({"trainer": {"devices": [0]}, "run": {"workers": 2}}, "run.workers", "leave one of the two out"),
    ],
)  # fmt: skip
def test_what_is_refused(
    settings: dict[str, Any], field: str, rule: str, digits_task: Classification,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    raw = {"space": {"lr": {"float": [0.01, 0.1]}}, "search": {"trials": 2}, **settings}
    with pytest.raises(RecipeError) as error:
        session.check(recipes.build(raw, source="test"), digits_task, source="test")
    (problem,) = error.value.problems
    assert (problem.where, rule in problem.what) == (field, True), problem


def test_a_stream_with_workers_is_refused(
    digits_task: Classification, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    rows = digits_task.data().train
    data = Data(train=Stream(rows, workers=1), valid=rows, out_features=10)
    raw = {"space": {"lr": {"float": [0.01, 0.1]}}, "search": {"trials": 2}, "trainer": {"devices": [0]}}
    with pytest.raises(RecipeError, match=r"trainer\.devices.*give it workers=0"):
        session.check(recipes.build(raw, source="test"), Classification(MLP, data), source="test")
