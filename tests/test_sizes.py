"""How large models are: counted before they are trained, recorded, and bounded by search.max_parameters."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import canonical_of
from test_resume import PowerSwitch
from torch import nn

import hpt_torch
from hpt_torch import recipe as recipes
from hpt_torch import session, tasks
from hpt_torch.models import CNN, MLP, RNN, Autoencoder, Linear
from hpt_torch.record import Record, finish_event, trial_event
from hpt_torch.report.export import trials_csv
from hpt_torch.report.summary import as_dict, summarise
from hpt_torch.result import Result
from hpt_torch.task import Task
from hpt_torch.trainers.sizes import flops, parameters
from hpt_torch.types import RecipeError, TrialState

RunQuick = Callable[..., str]

WIDTHS: dict[str, Any] = {
    "hparams": {"batch_size": 512},
    "space": {"hidden_sizes": {"choice": [[8], [16], [64]]}, "lr": {"float": [1e-3, 1e-1]}},
    "search": {"sampler": "tpe", "trials": 9, "round_size": 3, "max_parameters": 2000},
    "trainer": {"epochs": 2, "device": "cpu", "threads": 1, "engine": "loop"},
    "run": {"tensorboard": False},
    "executor": "inline",
}


def digits_mlp(*hidden: int) -> int:
    """Trainable parameters of an MLP on 8 x 8 pixels with 10 classes, by hand."""
    widths = [64, *hidden, 10]
    return sum((n + 1) * m for n, m in itertools.pairwise(widths))


# -- counting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (MLP((64,), 10, hidden_sizes=(32,)), digits_mlp(32)),
        (
            MLP((64,), 10, hidden_sizes=(32, 16), batch_norm=True),
            digits_mlp(32, 16) + 32 + 16,
        ),  # a shift for each bias, and a scale
        (Linear((64,), 10), 650),
        (Linear((64,), 10, bias=False), 640),
    ],
)
def test_parameters_are_those_of_the_closed_form(model: nn.Module, expected: int) -> None:
    assert parameters(model) == expected


def test_what_is_not_trained_does_not_count_and_what_is_shared_counts_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert parameters(model) == 24
    assert parameters(model, ("0.*",)) == 12
    assert parameters(model, ("*.bias",)) == 18
    model[1].weight = model[0].weight
    assert parameters(model) == 15
    model[0].bias.requires_grad_(False)
    assert parameters(model) == 12


class Forward(Task):
    """Only its metrics are asked for: a forward pass."""

    def metrics(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {"sum": model(batch["inputs"]).sum()}


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (MLP((64,), 10, hidden_sizes=(32, 16), dropout=0.5), (64,), 2 * (64 * 32 + 32 * 16 + 16 * 10)),
        (Linear((64,), 10), (64,), 2 * 64 * 10),
        (nn.Conv2d(3, 5, 3, padding=1), (3, 7, 7), 2 * 3 * 3 * 3 * 5 * 7 * 7),
        (RNN((12, 3), 5, cell="lstm", hidden_size=8), (12, 3), 2 * (12 * 4 * 8 * (3 + 8) + 8 * 5)),
    ],
)
def test_flops_are_those_of_the_closed_form(model: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    row = {"inputs": torch.zeros(1, *shape)}
    before = torch.get_rng_state()
    assert flops(Forward(), model, row) == flops(Forward(), model, row) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (CNN((1, 8, 8), 10, channels=(4,)), (1, 8, 8)),
        (RNN((12, 3), 5, cell="gru", hidden_size=8, bidirectional=True), (12, 3)),
        (Autoencoder((1, 8, 8), latent_dim=3), (1, 8, 8)),
    ],
)
def test_flops_of_every_model_are_counted(model: nn.Module, shape: tuple[int, ...]) -> None:
    """A product with a weight costs two a row at least (batch norm and biases cost nothing)."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert flops(Forward(), model, {"inputs": torch.zeros(1, *shape)}) >= 2 * weights


# -- in a run ------------------------------------------------------------------------------------------


def test_a_model_that_is_too_large_is_infeasible_and_never_trained(
    tmp_path: Path, run_quick: RunQuick
) -> None:
    run_quick(tmp_path, raw=WIDTHS)
    with Record(tmp_path / "run.db", readonly=True) as record:
        trials, summary = record.in_order(), summarise(record)
        planned = {n for event in record.of_kind("plan") for c in event.body["chunks"] for n in c["trials"]}
    large = [trial for trial in trials if trial.hparams["hidden_sizes"] == (64,)]
    small = [trial for trial in trials if trial not in large]
    assert large
    assert small
    for trial in trials:
        assert trial.parameters == digits_mlp(*trial.hparams["hidden_sizes"])  # type: ignore[misc]
        assert trial.flops is None
    for trial in large:
        assert (trial.state, trial.reports) == (TrialState.INFEASIBLE, ())
        assert trial.reason == (
            "its model has 4,810 trainable parameters, more than search.max_parameters allows (2,000)"
        )
    assert {trial.state for trial in small} == {TrialState.COMPLETE}
    assert planned == {trial.number for trial in small}
    assert summary.best in small
    assert as_dict(summary)["trials"][0]["parameters"] == trials[0].parameters
    header, first, *_ = trials_csv(summary).splitlines()
    assert first.split(",")[header.split(",").index("parameters")] == str(trials[0].parameters)
    Result(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert '<button type="button">parameters</button>' in page
    assert '<td data-v="4810">4,810</td>' in page


@pytest.mark.parametrize("more", [(), ("scheduler.kind=asha",), ("evaluation.folds=2",)], ids=str)
def test_a_run_of_too_large_models_only_ends(
    tmp_path: Path, run_quick: RunQuick, more: tuple[str, ...]
) -> None:
    run_quick(tmp_path, "search.max_parameters=1", *more, raw=WIDTHS)
    with Record(tmp_path / "run.db", readonly=True) as record:
        assert [trial.state for trial in record.in_order()] == [TrialState.INFEASIBLE] * 9
        assert summarise(record).best is None


def test_the_one_model_of_a_recipe_must_be_small_enough(digits_task: tasks.Task, tmp_path: Path) -> None:
    raw = {**WIDTHS, "hparams": {"hidden_sizes": [64]}, "space": {"lr": {"float": [1e-3, 1e-1]}}}
    with pytest.raises(RecipeError) as caught:
        session.check(recipes.build(raw, source="test"), digits_task, source="test")
    assert str(caught.value) == (
        "test: 1 problem\n  search.max_parameters: must be at least 4,810, the trainable parameters of the "
        "one model that is searched, got 2,000; raise it, or search smaller ones"
    )
    with pytest.raises(RecipeError, match=r"search.max_parameters: must be .*, got 0"):
        recipes.build(WIDTHS, ["search.max_parameters=0"], source="test")


def test_tune_has_it_too(digits_task: tasks.Task, tmp_path: Path) -> None:
    result = hpt_torch.tune(
        digits_task,
        {"hidden_sizes": hpt_torch.Choice([[4], [64]])},
        sampler="grid",
        max_parameters=400,
        epochs=1,
        executor="inline",
        run_dir=tmp_path,
        progress=False,
        tensorboard=False,
    )
    assert {t.hparams["hidden_sizes"]: (t.state, t.parameters) for t in result.trials} == {
        (4,): (TrialState.COMPLETE, digits_mlp(4)),
        (64,): (TrialState.INFEASIBLE, digits_mlp(64)),
    }


@pytest.mark.slow
def test_a_power_cut_changes_nothing(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("search.trials=6", "run.checkpoint_every_seconds=0")
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *settings, raw=WIDTHS)
    assert '"parameters": 4810' in expected
    assert '"INFEASIBLE"' in expected
    for step in range(1, switch.count + 1, 9):
        path = tmp_path / str(step)
        run = functools.partial(run_quick, path, *settings, raw=WIDTHS)
        assert switch.cut(step, step % 8 == 1, run) == expected, step


def test_a_record_without_sizes_is_read_and_shows_none(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path, "search.max_parameters=9999", raw=WIDTHS)
    with Record(tmp_path / "run.db") as record:
        record.append(trial_event(9, 3, {"lr": 0.1}, ""), finish_event(9, TrialState.FAILED))
    with Record(tmp_path / "run.db", readonly=True) as record:
        summary = summarise(record)
    assert summary.trials[9].parameters is None
    assert "parameters" not in as_dict(summary)["trials"][9]
    assert "parameters" not in json.loads(canonical_of(tmp_path))["trials"][9]


class Broken(nn.Module):
    """Cannot be built at some widths."""

    def __init__(self, input_shape: tuple[int, ...], out_features: int, width: int = 4) -> None:
        super().__init__()
        if width == 5:
            raise TypeError("no such width")
        self.layer = nn.Linear(input_shape[0], out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_model_that_cannot_be_built_is_trainings_to_tell(tmp_path: Path, digits_task: tasks.Task) -> None:
    task = hpt_torch.Classification(Broken, digits_task.data())
    result = hpt_torch.tune(
        task,
        {"width": hpt_torch.Int(4, 5)},
        sampler="grid",
        max_parameters=10_000,
        epochs=1,
        executor="inline",
        run_dir=tmp_path,
        progress=False,
        tensorboard=False,
    )
    found = {trial.hparams["width"]: trial for trial in result.trials}
    assert (found[4].state, found[4].parameters) == (TrialState.COMPLETE, 650)
    assert (found[5].state, found[5].parameters) == (TrialState.FAILED, None)
    assert "no such width" in found[5].reason
