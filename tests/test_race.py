"""Stopping trials early as a run: engines, workers, kills, several signatures in a round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from test_evolution import record_of
from test_resume import Killed, PowerSwitch
from torch import nn

from hpt_torch import recipe as recipes
from hpt_torch import session
from hpt_torch.executors import processes
from hpt_torch.models import MLP
from hpt_torch.record import Record
from hpt_torch.tasks import Classification, Task
from hpt_torch.types import RecipeError, TrialState

RunQuick = Callable[..., str]
RACE: dict[str, Any] = {
    **QUICK,
    "space": {**QUICK["space"], "batch_size": {"choice": [128, 256]}},
    "hparams": {"hidden_sizes": [16], "batch_norm": True},
    "search": {"sampler": "random", "trials": 12, "round_size": 6},
    "scheduler": {"kind": "successive_halving", "reduction_factor": 2},
    "trainer": {**QUICK["trainer"], "epochs": 5},
    "run": {"tensorboard": False, "checkpoint_every_seconds": 0},
}


@pytest.mark.slow
def test_trials_stop_at_rungs_and_what_goes_on_is_as_it_would_be_alone(
    tmp_path: Path, run_quick: RunQuick
) -> None:
    got = json.loads(run_quick(tmp_path / "run", raw=RACE))
    whole = json.loads(run_quick(tmp_path / "fifo", raw={**RACE, "scheduler": {}}))
    for half in (got["trials"][:6], got["trials"][6:]):
        assert sorted(trial["epoch"] for trial in half) == [1, 1, 1, 2, 4, 5]  # 6, 3, 2, 1 at rungs 1, 2, 4
    for trial, alone in zip(got["trials"], whole["trials"], strict=True):
        assert trial["hparams"] == alone["hparams"]
        assert trial["reports"] == alone["reports"][: trial["epoch"]]
        assert trial["state"] == ("COMPLETE" if trial["epoch"] == 5 else "PRUNED")
        if trial["state"] == "COMPLETE":
            assert trial["weights_sha256"] == alone["weights_sha256"]
    assert got["trials"][got["best"]["number"]]["state"] == "COMPLETE"
    with record_of(tmp_path / "run") as record:
        for event in record.of_kind("pruning"):
            racing = [
                t
                for t in record.in_order()
                if t.round == event.body["round"] and t.epoch >= event.body["epoch"]
            ]
            scores = {t.number: t.reports[event.body["epoch"] - 1].metrics["valid/accuracy"] for t in racing}
            stopped = set(event.body["stopped"])
            assert max(scores[n] for n in stopped) <= min(scores[n] for n in scores if n not in stopped)
        reasons = [t.reason for t in record.in_order() if t.state is TrialState.PRUNED]
        assert all(reason.startswith("successive_halving: place ") for reason in reasons)
    assert len([*(tmp_path / "run/checkpoints").iterdir()]) == 1  # the best weights


@pytest.mark.slow
@pytest.mark.skipif(not processes.supported(), reason="workers are forked, on Linux only")
@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, run_quick: RunQuick, engine: str) -> None:
    inline = run_quick(tmp_path / "inline", f"trainer.engine={engine}", raw=RACE)
    for workers in (1, 3):
        settings = (f"trainer.engine={engine}", "executor=processes", f"run.workers={workers}")
        assert run_quick(tmp_path / str(workers), *settings, raw=RACE) == inline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sampler", "engine", "every"),
    [
        ("successive_halving", "random", "loop", 0.0),
        ("asha", "tpe", "fused", 0.0),
        ("hyperband", "random", "fused", 1e6),
        ("median", "tpe", "loop", 1e6),
    ],
)
def test_power_cuts(
    tmp_path: Path,
    run_quick: RunQuick,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    sampler: str,
    engine: str,
    every: float,
) -> None:
    """With the states saved at every boundary, and never, so that everything is trained again."""
    settings = (
        f"scheduler.kind={kind}", f"search.sampler={sampler}", f"trainer.engine={engine}",
        f"run.checkpoint_every_seconds={every}", "scheduler.startup_trials=2",
    )  # fmt: skip
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *settings, raw=RACE)
    assert "PRUNED" in expected
    for step in range(1, switch.count + 1, 37):
        path = tmp_path / str(step)
        switch.arm(step, bool(step % 2))
        with pytest.raises(Killed):
            run_quick(path, *settings, raw=RACE)
        switch.arm(-1, False)
        assert run_quick(path, *settings, raw=RACE) == expected, step
        assert {file.name.partition("-")[0] for file in (path / "checkpoints").iterdir()} <= {
            "best",
            "paused",
        }
        assert len([*(path / "checkpoints").glob("best-*")]) == 1


@pytest.mark.slow
def test_a_decision_is_made_once(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded decision is not made again, whatever the pruner would say now."""
    expected = run_quick(tmp_path / "whole", raw=RACE)
    append = Record.append

    def cut(record: Record, *events: Any) -> None:
        append(record, *events)
        if any(event.kind == "pruning" for event in events):
            raise Killed

    monkeypatch.setattr(Record, "append", cut)
    with pytest.raises(Killed):
        run_quick(tmp_path / "run", raw=RACE)
    monkeypatch.setattr(Record, "append", append)
    with record_of(tmp_path / "run") as record:
        (first,) = record.of_kind("pruning")
    run_quick(tmp_path / "run", raw=RACE)
    with record_of(tmp_path / "run") as record:
        assert record.of_kind("pruning")[0] == first
        places = [(event.body["round"], event.body["epoch"]) for event in record.of_kind("pruning")]
    assert places == [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 4)]
    with record_of(tmp_path / "run") as record:
        assert expected.count("PRUNED") == sum(t.state is TrialState.PRUNED for t in record.in_order())


class _Raising(Classification):
    """Its third batch raises for one learning rate, and takes the group that trains together with it."""

    def loss(self, model: nn.Module, batch: Any, hparams: Any) -> torch.Tensor:
        value = super().loss(model, batch, hparams)
        if not torch._C._functorch.get_dynamic_layer_stack_depth() and float(hparams["lr"]) > 0.5:
            raise ValueError("too large a step")
        return value


def test_a_group_that_falls_apart_races_on(tmp_path: Path, run_quick: RunQuick, digits_task: Task) -> None:
    raw = {**RACE, "space": {"lr": {"choice": [0.001, 0.01, 1.0]}}, "hparams": {"hidden_sizes": [16]}}
    task = _Raising(MLP, digits_task.data())
    got = json.loads(run_quick(tmp_path / "run", "trainer.engine=loop", raw=raw, task=task))
    for trial in got["trials"]:
        assert (trial["state"] == "FAILED") == (trial["hparams"]["lr"] == (1.0).hex())
    assert {trial["state"] for trial in got["trials"]} == {"FAILED", "PRUNED", "COMPLETE"}


@pytest.mark.slow
def test_early_stopping_inside_a_trial_goes_together_with_it(tmp_path: Path, run_quick: RunQuick) -> None:
    settings = ("trainer.patience=1", "trainer.epochs=9", "lr=0.1")
    got = json.loads(run_quick(tmp_path / "run", *settings, raw=RACE))
    states = [(trial["state"], trial["epoch"]) for trial in got["trials"]]
    assert {state for state, _ in states} == {"COMPLETE", "PRUNED"}
    assert any(state == "COMPLETE" and epoch < 9 for state, epoch in states)


@pytest.mark.parametrize(
    ("scheduler", "where"),
    [
        ({"kind": "threshold"}, "scheduler.lower"),
        ({"kind": "asha", "reduction_factor": 1}, "scheduler.reduction_factor"),
        ({"kind": "halving"}, "scheduler.kind"),
        ({"kind": "percentile", "percentile": 101.0}, "scheduler.percentile"),
    ],
)
def test_wrong_settings_are_named(digits_task: Task, scheduler: Any, where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        session.check(
            recipes.build({**RACE, "scheduler": scheduler}, source="test"), digits_task, source="test"
        )
    assert where in "\n".join(map(str, caught.value.problems))
