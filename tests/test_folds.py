"""Cross-validation: what folds are, that a trial's score is their mean, and that nothing is lost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, canonical_of
from test_resume import PowerSwitch

import hpt_torch
from hpt_torch import engines, session
from hpt_torch import recipe as recipes
from hpt_torch.cli import app
from hpt_torch.data import Data, Rows, digits, fashion_mnist, split
from hpt_torch.data.folds import folds, pooled
from hpt_torch.record import Record
from hpt_torch.result import Result
from hpt_torch.task import Task
from hpt_torch.tasks import Classification
from hpt_torch.trainers.base import evaluate
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import Folding, RecipeError, TaskError, Trial, TrialState

RunQuick = Callable[..., str]


def numbered(rows: int = 60, **options: Any) -> Data:
    """Inputs that tell which row they are."""
    x = np.arange(rows, dtype=np.float32)[:, None]
    return split(x, np.arange(rows) % 3, **options)


def rows_of(part: Any) -> list[int]:
    return sorted(int(value) for value in part.tensors["inputs"].flatten())


# -- the folds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitter", ["kfold", "stratified", "auto"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_each_row_of_the_pool_is_valid_once_a_repeat(splitter: Any, repeats: int) -> None:
    data = numbered()
    pool = sorted(rows_of(data.train) + rows_of(data.valid))
    cut = folds(data, Folding(folds=4, splitter=splitter, repeats=repeats), seed=0)
    assert len(cut) == 4 * repeats
    for start in range(0, len(cut), 4):
        assert sorted(row for fold in cut[start : start + 4] for row in rows_of(fold.valid)) == pool
    for fold in cut:
        assert sorted(rows_of(fold.train) + rows_of(fold.valid)) == pool
        assert fold.holdout is not None
        assert not set(rows_of(fold.holdout)) & set(pool)
        if splitter != "kfold":
            assert max(torch.bincount(fold.valid.tensors["targets"])) <= 5  # of 48 rows, 16 a class
    assert len({tuple(rows_of(fold.valid)) for fold in cut}) == len(cut)  # repeats differ
    again = folds(data, Folding(folds=4, splitter=splitter, repeats=repeats), seed=0)
    assert [rows_of(fold.valid) for fold in again] == [rows_of(fold.valid) for fold in cut]
    other = folds(data, Folding(folds=4, splitter=splitter, repeats=repeats), seed=1)
    assert [rows_of(fold.valid) for fold in other] != [rows_of(fold.valid) for fold in cut]


def test_groups_stay_together() -> None:
    groups = np.arange(60) // 5
    data = numbered(groups=groups)
    parts = [data.train, data.valid, data.holdout]
    seen = [set(groups[rows_of(part)]) for part in parts]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 12
    assert data.groups is not None
    order = torch.cat([part.tensors["inputs"].flatten() for part in (data.train, data.valid)])  # type: ignore[attr-defined]
    assert data.groups.tolist() == groups[order.long()].tolist()
    for fold in folds(data, Folding(folds=3), seed=0):
        assert not set(groups[rows_of(fold.train)]) & set(groups[rows_of(fold.valid)])


def test_time_lies_in_order() -> None:
    data = numbered(ordered=True)
    assert max(rows_of(data.train)) < min(rows_of(data.valid))
    assert data.holdout is not None
    assert max(rows_of(data.valid)) < min(rows_of(data.holdout))
    cut = folds(data, Folding(folds=3), seed=0)
    for fold in cut:
        assert max(rows_of(fold.train)) < min(rows_of(fold.valid))
    assert [len(fold.train) for fold in cut] == sorted(len(fold.train) for fold in cut)


def test_standardisation_is_fitted_in_the_fold() -> None:
    """As if the raw numbers had been standardised on the fold's train rows, and no others."""
    x = np.random.default_rng(0).normal(5, [1, 100, 0.1], (80, 3))
    x[0] = 1e4  # an outlier: whoever has it in train has another mean
    plain, scaled = (split(x, np.arange(80) % 2, standardise=on) for on in (False, True))
    how = Folding(folds=4)
    shifts = set()
    for raw, fold in zip(folds(plain, how, 0), folds(scaled, how, 0), strict=True):
        seen = raw.train.tensors["inputs"].double()  # type: ignore[attr-defined]
        mean, std = seen.mean(0), seen.std(0, correction=0)
        shifts.add(round(float(mean[0]), 6))
        for part in ("train", "valid", "holdout"):
            expected = (getattr(raw, part).tensors["inputs"].double() - mean) / std
            torch.testing.assert_close(
                getattr(fold, part).tensors["inputs"].double(), expected, rtol=1e-4, atol=1e-4
            )
            new = fold.prepared(getattr(raw, part).tensors["inputs"].numpy())
            torch.testing.assert_close(new, getattr(fold, part).tensors["inputs"], rtol=1e-4, atol=1e-4)
    assert len(shifts) == 4


def test_pixels_are_normalised_by_the_fold() -> None:
    data = fashion_mnist(limit=200)
    cut = folds(data, Folding(folds=2), seed=0)
    assert cut[0].mean is not None
    assert not torch.equal(cut[0].mean, cut[1].mean)  # type: ignore[arg-type]
    rows = cut[0].to(torch.device("cpu"), torch.float32).train.tensors["inputs"]  # type: ignore[attr-defined]
    assert abs(float(rows.mean())) < 1e-3


def test_all_rows_but_the_hold_out_are_pooled() -> None:
    data = numbered()
    pool = pooled(data)
    assert rows_of(pool.train) == sorted(rows_of(data.train) + rows_of(data.valid))
    assert set(rows_of(pool.valid)) == set(rows_of(data.valid))


@pytest.mark.parametrize(
    ("folding", "data", "piece"),
    [
        (Folding(folds=5, splitter="grouped"), numbered(), "need groups"),
        (Folding(folds=5, splitter="time"), numbered(), "rows that lie in time"),
        (Folding(folds=3, splitter="time", repeats=2), numbered(ordered=True), "set repeats to 1"),
        (Folding(folds=30), numbered(), "cannot be cut into 30 folds"),
        (Folding(folds=5, splitter="grouped"), numbered(groups=np.arange(60) // 15), "5 folds"),
        (
            Folding(folds=5, splitter="stratified"),
            split(np.ones((20, 1)), np.linspace(0, 1, 20)),
            "need one class a row",
        ),
    ],
)
def test_folds_that_cannot_be(folding: Folding, data: Data, piece: str) -> None:
    with pytest.raises(TaskError, match=piece):
        folds(data, folding, seed=0)


def test_a_stream_cannot_be_cut(digits_task: Task) -> None:
    data = numbered()
    stream = hpt_torch.Stream(torch.utils.data.TensorDataset(*data.train.tensors.values()))  # type: ignore[attr-defined]
    task = Classification(hpt_torch.models.MLP, dataclasses.replace(data, train=stream))
    for override in ("evaluation.folds=3", "final.refit=true"):
        with pytest.raises(RecipeError, match=f"{override.partition('=')[0]}: .* only in memory"):
            checked_of(override, task=task)


def test_split_refuses_groups_it_cannot_keep() -> None:
    with pytest.raises(TaskError, match="one integer a row"):
        numbered(groups=np.arange(59))
    with pytest.raises(TaskError, match="ready-made parts"):
        numbered(groups=np.arange(60), holdout={"inputs": np.ones((2, 1)), "targets": np.array([0, 1])})
    with pytest.raises(TaskError, match="ordered rows are split where they lie"):
        numbered(ordered=True, stratify=True)


# -- trials --------------------------------------------------------------------------------------------

FOLDS = ["evaluation.folds=3", "activation=relu", "batch_size=512"]


def trials_of(path: Path) -> list[Trial]:
    with Record(path / "run.db", readonly=True) as record:
        return record.in_order()


def checked_of(*overrides: str, task: Task, raw: dict[str, Any] = QUICK) -> session.Checked:
    return session.check(recipes.build(raw, overrides, source="test"), task, source="test")


@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_a_trial_is_the_mean_of_trainings_alone(
    engine: str, tmp_path: Path, run_quick: RunQuick, digits_task: Task
) -> None:
    settings = [*FOLDS, f"trainer.engine={engine}", "search.trials=2"]
    run_quick(tmp_path / "run", *settings)
    checked = checked_of(*settings, task=digits_task)
    cut = folds(digits_task.data(), Folding(folds=3), checked.recipe.seed)
    for trial in trials_of(tmp_path / "run"):
        alone = []
        for data in cut:
            trainer = LoopTrainer(
                digits_task, data, device=torch.device("cpu"), dtype=torch.float32,
                seed=checked.recipe.seed, epochs=2,
            )  # fmt: skip
            population = trainer.init([trial.number], [{**checked.hparams, **trial.hparams}])
            alone.append(trainer.train(population, 2, should_pause=lambda: False).reports)
        for epoch, report in enumerate(trial.reports):
            for name, value in report.metrics.items():
                mean = sum(reports[epoch].metrics[name] for reports in alone) / 3
                tolerance = 0 if engine == "loop" else 2e-3
                assert abs(value - mean) <= tolerance, (trial.number, name)
        assert len(trial.reports) == 2
        assert trial.state is TrialState.COMPLETE


def test_the_model_at_the_end_has_learned_from_all_rows(
    tmp_path: Path, run_quick: RunQuick, digits_task: Task
) -> None:
    run_quick(tmp_path / "run", *FOLDS)
    result = Result(tmp_path / "run", digits_task)
    checked = checked_of(*FOLDS, task=digits_task)
    everything = pooled(digits_task.data())
    trainer = LoopTrainer(
        digits_task, everything, device=torch.device("cpu"), dtype=torch.float32,
        seed=checked.recipe.seed, epochs=2,
    )  # fmt: skip
    best = result.best
    population = trainer.init([best.number], [{**checked.hparams, **best.hparams}])
    trainer.train(population, 2, should_pause=lambda: False)
    weights = trainer.weights(population, 0)
    model = result.best_model()
    for name, tensor in model.state_dict().items():
        if name in weights:
            assert torch.equal(tensor, weights[name]), name
    assert everything.holdout is not None
    found = evaluate(digits_task, model, everything.holdout)
    assert result.holdout == {f"holdout/{name}": value for name, value in found.items()}
    assert (tmp_path / "run" / "best" / "weights.safetensors").is_file()


def test_the_best_epoch_of_each_fold_counts(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run", *FOLDS, "trainer.keep=best", "trainer.epochs=9", "lr=0.1")
    kept = set()
    for trial in trials_of(tmp_path / "run"):
        best = [max(r.metrics["valid/accuracy"] for r in fold.reports) for fold in trial.folds]
        assert trial.metrics["valid/accuracy"] == sum(best) / 3
        assert trial.kept_epoch == round(sum(fold.kept_epoch for fold in trial.folds) / 3)
        kept |= {fold.kept_epoch for fold in trial.folds}
    assert len(kept) > 1


@pytest.mark.slow
def test_patience_and_pruners_go_with_folds(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "patience", *FOLDS, "trainer.patience=1", "trainer.epochs=8", "lr=0.05")
    lengths = {len(f.reports) for t in trials_of(tmp_path / "patience") for f in t.folds}
    assert min(lengths) < 8
    settings = ["scheduler.kind=successive_halving", "trainer.epochs=4", "search.round_size=4"]
    expected = run_quick(tmp_path / "halving", *FOLDS, *settings)
    trials = trials_of(tmp_path / "halving")
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in trials:
        assert [len(fold.reports) for fold in trial.folds] == [trial.epoch] * 3
    forked = run_quick(tmp_path / "forked", *FOLDS, *settings, "executor=processes", "run.workers=2")
    assert forked == expected


@pytest.mark.parametrize("kind", ["fifo", "median"])
def test_a_fold_that_fails_fails_its_trial(
    kind: str, tmp_path: Path, run_quick: RunQuick, digits_task: Task
) -> None:
    class Fragile(Classification):
        """Raises where a certain row is among those that are trained on, at high learning rates."""

        def loss(self, model: Any, batch: Any, hparams: Any) -> Any:
            loss = super().loss(model, batch, hparams)
            marked = (batch["inputs"][:, 0] > 40).any()
            return loss * torch.where(marked & (hparams["lr"] > 0.01), torch.nan, 1.0)

    data = digits()
    rows = {name: t.clone() for name, t in data.train.tensors.items()}  # type: ignore[attr-defined]
    rows["inputs"][0, 0] = 50
    data = dataclasses.replace(data, train=Rows(rows), standardised=False)
    task = Fragile(hpt_torch.models.MLP, data)
    run_quick(tmp_path / "run", *FOLDS, f"scheduler.kind={kind}", "trainer.epochs=3", task=task)
    trials = trials_of(tmp_path / "run")
    failed = [t for t in trials if t.state is TrialState.FAILED]
    assert {t.hparams["lr"] > 0.01 for t in failed} == {True}  # type: ignore[operator]
    assert 0 < len(failed) < len(trials)
    for trial in failed:
        assert "of 3: diverged" in trial.reason
        assert {fold.state for fold in trial.folds} >= {TrialState.FAILED}
    assert Result(tmp_path / "run", task).best.state is TrialState.COMPLETE


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [(), ("scheduler.kind=asha", "trainer.epochs=3"), ("trainer.patience=1",)]
)
def test_power_cut_with_folds(
    overrides: tuple[str, ...], tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*FOLDS, "run.checkpoint_every_seconds=0", "trainer.engine=fused", *overrides]
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *settings)
    steps = switch.count
    for step in range(1, steps + 1, 9):
        for after in (False, True):
            path = tmp_path / f"{step}-{after}"
            got = switch.cut(step, after, functools.partial(run_quick, path, *settings))
            assert got == expected, (step, after)
            # Beside the last training's weights only states of trials that ASHA may promote.
            files = [p.name for p in (path / "checkpoints").iterdir() if not p.name.startswith("paused-")]
            assert len(files) == 1, files
            assert files[0].startswith("refit-")


def test_more_trials_are_added_later(tmp_path: Path, run_quick: RunQuick) -> None:
    expected = run_quick(tmp_path / "whole", *FOLDS)
    run_quick(tmp_path / "grown", *FOLDS, "search.trials=2")
    assert run_quick(tmp_path / "grown", *FOLDS, reopen_holdout=True) == expected


# -- refit without folds -------------------------------------------------------------------------------


def test_refit_is_reported_beside_the_chosen_model(
    tmp_path: Path, run_quick: RunQuick, digits_task: Task
) -> None:
    run_quick(tmp_path / "plain")
    run_quick(tmp_path / "refit", "final.refit=true", "trainer.keep=last")
    plain, again = (Result(tmp_path / name, digits_task) for name in ("plain", "refit"))
    assert again.holdout == plain.holdout
    assert set(again.summary.holdout_refit) == set(again.holdout)
    assert again.summary.holdout_refit != again.holdout
    assert not plain.summary.holdout_refit
    best = tmp_path / "refit" / "best"
    assert (best / "refit.safetensors").read_bytes() != (best / "weights.safetensors").read_bytes()
    assert canonical_of(tmp_path / "refit") != canonical_of(tmp_path / "plain")


# -- recipes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "field", "piece"),
    [
        (["evaluation.repeats=2"], "evaluation.repeats", "must be 1 without folds"),
        (["evaluation.folds=1"], "evaluation.folds", "greater than or equal to 2"),
        (["evaluation.folds=90"], "evaluation.folds", ""),
        (["evaluation.folds=5", "final.refit=false"], "final.refit", "must be true with"),
        (["evaluation.folds=5", "scheduler.kind=pbt"], "evaluation.folds", "does not go with"),
        (["final.refit=true", "scheduler.kind=pbt"], "final.refit", "does not go with"),
        (["evaluation.folds=5", "evaluation.splitter=time"], "evaluation.folds", "ordered=True"),
        (["evaluation.folds=5", "evaluation.splitter=x"], "evaluation.splitter", "must be one of auto"),
    ],
)
def test_recipes_that_cannot_be(
    overrides: list[str], field: str, piece: str, tmp_path: Path, digits_task: Task
) -> None:
    if overrides == ["evaluation.folds=90"]:  # more than a class has rows
        digits_task = Classification(hpt_torch.models.MLP, numbered())
    with pytest.raises(RecipeError) as caught:
        checked_of(*overrides, task=digits_task)
    assert any(p.where == field and piece in p.what for p in caught.value.problems), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_validate_says_how_rows_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    app(["validate", "breast_cancer_mlp_folds"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "folds      5 (stratified)\n" in shown
    assert "confirm    the best 3 with 5 new seeds\n" in shown


def test_folds_share_what_is_traced(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their trainers differ in their rows alone."""
    made: dict[str, LoopTrainer] = {}
    make = engines.trainers
    monkeypatch.setattr(engines, "trainers", lambda *arguments: made.update(make(*arguments)) or made)
    run_quick(tmp_path / "run", *FOLDS, "trainer.engine=fused", "activation=relu", "trainer.epochs=8")
    fused = [trainer for name, trainer in made.items() if name.startswith("fused")]
    assert len(fused) == 4  # of the split, and of three folds
    assert len({id(trainer.programs) for trainer in fused}) == 1
    assert len(fused[0].programs.of("step")) == 1
