"""Population Based Training as a run: engines, workers, kills, divergence, moves between batch sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import canonical_of
from test_resume import Killed, PowerSwitch

from hpt_torch import recipe as recipes
from hpt_torch import session
from hpt_torch.checkpoint import weights_sha256
from hpt_torch.evolution import Evolution
from hpt_torch.executors import processes
from hpt_torch.population import Population
from hpt_torch.record import Record
from hpt_torch.schedulers.lineage import lineage, scores
from hpt_torch.tasks import Task
from hpt_torch.types import RecipeError, TrialState

RunQuick = Callable[..., str]
POPULATION: dict[str, Any] = {
    "hparams": {"hidden_sizes": [8], "batch_norm": True},
    "space": {
        "lr": {"float": [1e-4, 1e-1], "default": 1e-3},
        "dropout": {"float": [0.0, 0.5]},
        "batch_size": {"choice": [128, 256, 512]},
    },
    "search": {"sampler": "random", "trials": 6},
    "scheduler": {"kind": "pbt", "interval_epochs": 1, "quantile": 0.34},
    "trainer": {"epochs": 4, "device": "cpu", "threads": 1},
    "run": {"tensorboard": False, "checkpoint_every_seconds": 0},
    "executor": "inline",
}


def record_of(path: Path) -> Record:
    return Record(path / "run.db", readonly=True)


def exploits_of(path: Path) -> list[dict[str, Any]]:
    with record_of(path) as record:
        return [copy for event in record.of_kind("generation") for copy in event.body["exploits"]]


@pytest.mark.slow
def test_every_generation_is_decided_once_and_lineages_lead_to_the_start(
    tmp_path: Path, run_quick: RunQuick
) -> None:
    got = json.loads(run_quick(tmp_path / "run", raw=POPULATION))
    assert [trial["state"] for trial in got["trials"]] == ["COMPLETE"] * 6
    with record_of(tmp_path / "run") as record:
        decided = [event.body for event in record.of_kind("generation")]
        assert [(body["generation"], body["epoch"]) for body in decided] == [(1, 1), (2, 2), (3, 3)]
        assert sum(len(body["exploits"]) for body in decided) >= 3
        for number in record.trials:
            stretches = lineage(record.trials, number, 4)
            assert [s.after for s in stretches] == [0, *(s.until for s in stretches[:-1])]
            assert stretches[-1].until == 4
            assert stretches[-1].trial == number
            epochs = [epoch for epoch, _ in scores(record.trials, number, 4, "valid/accuracy")]
            assert epochs == [1, 2, 3, 4]
    best = got["best"]
    assert got["trials"][best["number"]]["metrics"] == best["metrics"]


def test_a_copy_is_its_source_bit_for_bit_and_its_source_is_untouched() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {"w": torch.randn(4, 3, generator=draw), "m": torch.randn(4, 2, generator=draw)}
    stacks: Any = {name: {k: t.clone() for k, t in tensors.items()} for name in ("params", "buffers")}
    stacks |= {"slots": {"exp_avg/w": tensors["w"] * 2}, "kept": {}, "sums": {"loss": torch.zeros(4)}}
    population = Population(trials=[5, 6, 7, 8], hparams=[{}] * 4, step=[1, 2, 3, 4], **stacks)
    population.active = [True, False, True, True]
    before = population.copy()
    population.copy_members({1: 2, 0: 3})
    for target, source in ((0, 3), (1, 2), (2, 2), (3, 3)):
        now, was = population.member(target), before.member(source)
        for group in now:
            assert weights_sha256(now[group]) == weights_sha256(was[group])
        assert population.step[target] == before.step[source]
    assert population.active == [True] * 4
    assert population.trials == [5, 6, 7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_a_resumed_population_ends_as_an_uninterrupted_one(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """The power is cut before and after durable steps, exploits among them; with the state saved at every
    boundary, and with no state saved at all, so that everything is trained again."""
    settings = (f"trainer.engine={engine}", "batch_size=256")
    raw = {**POPULATION, "space": {n: d for n, d in POPULATION["space"].items() if n != "batch_size"}}
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *settings, raw=raw)
    steps = switch.count
    for every in ("0", "1e6"):
        saving = f"run.checkpoint_every_seconds={float(every)}"
        for step in range(4, steps + 1, 13 if engine == "fused" else 41):
            path = tmp_path / f"{every}-{step}"
            switch.arm(step, bool(step % 2))
            try:
                run_quick(path, *settings, saving, raw=raw)
            except Killed:
                switch.arm(-1, False)
                assert run_quick(path, *settings, saving, raw=raw) == expected, (every, step)
            else:
                assert every == "1e6"  # fewer steps than with states
            assert len([*(path / "checkpoints").iterdir()]) == 1  # the best weights


@pytest.mark.slow
def test_power_cuts_with_batch_sizes_that_change(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", raw=POPULATION)
    for step in range(1, switch.count + 1, 29):
        path = tmp_path / str(step)
        switch.arm(step, bool(step % 2))
        with pytest.raises(Killed):
            run_quick(path, raw=POPULATION)
        switch.arm(-1, False)
        assert run_quick(path, raw=POPULATION) == expected, step


@pytest.mark.slow
@pytest.mark.skipif(not processes.supported(), reason="workers are forked, on Linux only")
@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, run_quick: RunQuick, engine: str) -> None:
    inline = run_quick(tmp_path / "inline", f"trainer.engine={engine}", raw=POPULATION)
    for workers in (1, 3):
        settings = (f"trainer.engine={engine}", "executor=processes", f"run.workers={workers}")
        assert run_quick(tmp_path / str(workers), *settings, raw=POPULATION) == inline


def test_members_keep_their_own_count_of_steps_when_the_batch_size_changes(
    tmp_path: Path, run_quick: RunQuick, digits_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's bias correction reads it: the steps of a member are those of its lineage, whatever it copied."""
    found: list[Population] = []
    decide = Evolution._decide

    def watching(evolution: Evolution, epoch: int) -> None:
        found.append(evolution.population)
        decide(evolution, epoch)

    monkeypatch.setattr(Evolution, "_decide", watching)
    settings = ("scheduler.resample_probability=1.0", "run.checkpoint_every_seconds=1e6", "trainer.epochs=6")
    run_quick(tmp_path / "run", *settings, raw=POPULATION)
    rows = len(digits_task.data().train)
    population = found[-1]
    with record_of(tmp_path / "run") as record:
        moved = 0
        for i, number in enumerate(population.trials):
            stretches = lineage(record.trials, number, 6)
            moved += len({s.hparams["batch_size"] for s in stretches}) > 1
            inside = [s for s in stretches if s.after < 5]  # states of finished members are not kept
            steps = sum((min(s.until, 5) - s.after) * (rows // int(s.hparams["batch_size"])) for s in inside)
            assert population.step[i] == steps
    assert moved >= 2


def test_a_diverged_member_is_replaced_and_never_the_best(tmp_path: Path, run_quick: RunQuick) -> None:
    raw = {
        **POPULATION,
        "hparams": {"hidden_sizes": [8], "optimizer": "sgd", "batch_size": 128},
        "space": {"lr": {"choice": [0.01, 0.1, 1e6]}},
        "scheduler": {"kind": "pbt", "interval_epochs": 1, "explore": False},
    }
    got = json.loads(run_quick(tmp_path / "run", raw=raw))
    with record_of(tmp_path / "run") as record:
        diverged = [event.body for event in record.of_kind("diverged")]
        assert diverged
        assert {body["generation"] for body in diverged} == {0}
        replaced = {copy["target"] for copy in record.of_kind("generation")[0].body["exploits"]}
        assert {body["trial"] for body in diverged} <= replaced
        assert all(trial.state is TrialState.COMPLETE for trial in record.trials.values())
    assert all(trial["hparams"]["lr"] != (1e6).hex() for trial in got["trials"])


def test_a_population_that_diverges_whole_fails_and_says_why(tmp_path: Path, run_quick: RunQuick) -> None:
    raw = {
        **POPULATION,
        "hparams": {"hidden_sizes": [8], "optimizer": "sgd", "batch_size": 128},
        "space": {"lr": {"choice": [1e5, 1e6]}},
    }
    got = json.loads(run_quick(tmp_path / "run", raw=raw))
    assert got["best"] is None
    with record_of(tmp_path / "run") as record:
        assert {trial.state for trial in record.trials.values()} == {TrialState.FAILED}
        assert all("diverged" in trial.reason for trial in record.trials.values())


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"space": {"activation": {"choice": ["relu", "tanh"]}}}, "space.activation", "structural"),
        ({"search": {"sampler": "random", "trials": 1}}, "search.trials", "must be at least 2, got 1"),
        ({"trainer": {"patience": 3}}, "trainer.patience", "does not go with pbt"),
        ({"scheduler": {"kind": "pbt", "quantile": 0.7}}, "scheduler.quantile", "0.5"),
        (
            {"scheduler": {"kind": "pbt", "perturbation_factors": [1.1, 1.2]}},
            "scheduler.perturbation_factors",
            "the first in (0, 1)",
        ),
        ({"scheduler": {"kind": "pbt", "interval": 2}}, "scheduler.interval", "did you mean"),
    ],
)
def test_wrong_settings_are_named(digits_task: Task, changes: Any, where: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        session.check(recipes.build({**POPULATION, **changes}, source="test"), digits_task, source="test")
    text = "\n".join(map(str, caught.value.problems))
    assert where in text
    assert what in text


def test_another_population_size_is_another_run(tmp_path: Path, run_quick: RunQuick) -> None:
    before = run_quick(tmp_path / "run", raw=POPULATION)
    with pytest.raises(Exception, match="search.trials: 6 -> 8"):
        run_quick(tmp_path / "run", "search.trials=8", raw=POPULATION)
    assert canonical_of(tmp_path / "run") == before
