"""The Python API."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from conftest import ROOT
from torch import nn

import hpt_torch as hpt
from hpt_torch.machine import are_denormals_zero
from hpt_torch.seeding import generator


class Net(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def data() -> hpt.Data:
    x = generator(0, "tune").normal(size=(300, 6))
    return hpt.split(x, (x[:, 0] * x[:, 1] > 0).astype("int64"), seed=0)


SPACE = {"lr": hpt.Float(1e-3, 1e-1), "width": hpt.Choice([4, 16]), "dropout": hpt.Float(0.0, 0.5)}


def _tune(data: hpt.Data, path: Path, **options: Any) -> hpt.Result:
    settings: dict[str, Any] = {
        "trials": 5,
        "epochs": 3,
        "sampler": "random",
        "device": "cpu",
        "progress": False,
    }
    return hpt.tune(hpt.Classification(Net, data), SPACE, run_dir=path, **{**settings, **options})


def test_result(data: hpt.Data, tmp_path: Path) -> None:
    result = _tune(data, tmp_path / "run")
    assert len(result.trials) == 5
    scores = [trial.metrics["valid/accuracy"] for trial in result.trials]
    assert result.best.metrics["valid/accuracy"] == max(scores)
    assert set(result.best.hparams) == set(SPACE)
    assert result.hparams()["optimizer"] == "adam"
    assert 0 <= result.holdout["holdout/accuracy"] <= 1
    assert f"best is trial {result.best.number} with valid/accuracy={max(scores):.4f}" in repr(result)
    assert "<table" in result._repr_html_()
    lines = result.to_csv(tmp_path / "copy.csv").splitlines()
    assert lines[0].startswith("number,state,dropout,lr,width,")
    assert len(lines) == 6
    assert (tmp_path / "copy.csv").read_text() == (tmp_path / "run" / "trials.csv").read_text()


def test_best_model_gives_the_reported_figure(data: hpt.Data, tmp_path: Path) -> None:
    result = _tune(data, tmp_path / "run")
    model = result.best_model()
    assert not model.training
    valid = data.valid.tensors
    accuracy = float((model(valid["inputs"]).argmax(-1) == valid["targets"]).double().mean())
    assert accuracy == result.best.metrics["valid/accuracy"]
    reopened = hpt.Result(tmp_path / "run")
    with pytest.raises(hpt.RunError, match="needs the task"):
        reopened.best_model()
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "run" / "best" / "weights.safetensors")
    assert set(weights) == set(Net().state_dict())  # a plain Net loads them
    plain = Net(width=result.best.hparams["width"])
    plain.load_state_dict(weights)


def test_a_result_is_found_from_another_folder(
    data: hpt.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a notebook changes its working directory; it is shown as it was named."""
    monkeypatch.chdir(tmp_path)
    result = _tune(data, Path("run"), trials=1, epochs=1, tensorboard=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert isinstance(result.best_model(), Net)
    assert result.path == tmp_path / "run"
    assert repr(result).startswith("Result('run': 1 complete")


def test_study_is_a_view_for_optuna(data: hpt.Data, tmp_path: Path) -> None:
    result = _tune(data, tmp_path / "run")
    study = result.study
    assert study.best_value == result.best.metrics["valid/accuracy"]
    assert len(study.trials) == 5
    assert set(optuna.importance.get_param_importances(study)) <= set(SPACE)
    assert study.trials[0].intermediate_values[3] == result.trials[0].metrics["valid/accuracy"]


def test_the_same_call_continues_and_a_changed_one_is_another_run(
    data: hpt.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = hpt.Classification(Net, data)

    def call(**options: Any) -> hpt.Result:
        return hpt.tune(
            task, SPACE, trials=2, epochs=1, sampler="random", progress=False, tensorboard=False, **options
        )

    first = call()
    assert first.path.parent == tmp_path / "runs"
    assert call().path == first.path
    assert call().summary.sessions == 3
    others = {call(seed=1).path, call(hparams={"batch_size": 8}).path}
    assert len({first.path, *others}) == 3


def test_wrong_arguments_are_shown_together_and_write_nothing(data: hpt.Data, tmp_path: Path) -> None:
    with pytest.raises(hpt.RecipeError) as caught:
        hpt.tune(
            hpt.Classification(Net, data),
            {"lr": hpt.Float(0.0, 1.0), "widht": hpt.Choice([1])},
            trials=0,
            sampler="magic",
            run_dir=tmp_path / "run",
        )
    for part in ("search.trials", "search.sampler"):
        assert part in str(caught.value)
    with pytest.raises(hpt.RecipeError) as caught:
        hpt.tune(
            hpt.Classification(Net, data), {"widht": hpt.Choice([1])}, trials=1, run_dir=tmp_path / "run"
        )
    assert "space.widht: is not a hyperparameter of this task; did you mean width?" in str(caught.value)
    with pytest.raises(ValueError, match="task: must be a hpt_torch.Task, got str"):
        hpt.tune("mlp", {}, trials=1)  # type: ignore[arg-type]
    with pytest.raises(hpt.RecipeError) as caught:
        hpt.tune(hpt.Classification(Net, data), None, trials=1, trainer=5)  # type: ignore[arg-type]
    for line in ("space: must be a mapping of names to values, got None", "trainer: must be a mapping"):
        assert line in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_more_of_the_trainers_settings(data: hpt.Data, tmp_path: Path) -> None:
    space = {"lr": hpt.Float(0.01, 0.1)}
    settings = {"patience": 1, "memory": "1GB"}
    result = hpt.tune(
        hpt.Classification(Net, data), space, trials=2, epochs=3, trainer=settings, progress=False,
        tensorboard=False, run_dir=tmp_path / "run",
    )  # fmt: skip
    recipe = (result.path / "recipe.toml").read_text()
    with pytest.raises(hpt.RecipeError, match=r"trainer.epochs: is an argument of its own"):
        hpt.tune(hpt.Classification(Net, data), space, trials=2, trainer={"epochs": 3})
    assert "memory = 1000000000" in recipe
    assert "patience = 1" in recipe


def test_models_are_factories_with_named_hyperparameters(data: hpt.Data) -> None:
    with pytest.raises(ValueError, match="model must be a factory"):
        hpt.Classification(Net(), data)
    with pytest.raises(ValueError, match="data must be a hpt_torch.Data, got tuple"):
        hpt.Classification(Net, (1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="argument 'lr' is the name of a training hyperparameter"):
        hpt.Classification(lambda lr: Net(), data)
    specs = hpt.Classification(lambda units, depth=2: Net(units), data).hparam_specs()
    assert specs["units"].required
    assert specs["depth"].default == 2
    with pytest.raises(hpt.RecipeError, match=r"hparams\.units: must be given here or searched"):
        hpt.tune(hpt.Classification(lambda units: Net(units), data), {"lr": SPACE["lr"]}, trials=1)


class _OwnStep(hpt.Task):
    """A task with its own loss, metrics and a dynamic hyperparameter of its own."""

    objective = hpt.Objective(metric="valid/mse", direction="minimize")
    name = "own"

    def __init__(self, data: hpt.Data) -> None:
        self._data = data

    def data(self) -> hpt.Data:
        return self._data

    def hparam_specs(self) -> dict[str, Any]:
        from hpt_torch.hparams import HParamSpec

        extra = HParamSpec(name="pull", type="float", default=0.0, low=0.0, dynamic=True)
        return {**super().hparam_specs(), "pull": extra}

    def build_model(self, hparams: Mapping[str, Any]) -> nn.Module:
        return nn.Linear(6, 1)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], hparams: Mapping[str, Any]) -> torch.Tensor:
        assert hparams["pull"].shape == ()
        error = (model(batch["inputs"]).squeeze(-1) - batch["targets"]) ** 2
        return error.mean() + hparams["pull"] * model.weight.square().sum()  # type: ignore[operator,union-attr]

    def metrics(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        error = (model(batch["inputs"]).squeeze(-1) - batch["targets"]) ** 2
        return {"error": error.double().sum(), "rows": torch.tensor(float(len(error)))}

    def finalize(self, sums: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return {"mse": float(sums["error"] / sums["rows"])}


def test_bring_your_own_task(tmp_path: Path) -> None:
    x = generator(1, "own").normal(size=(200, 6)).astype("float32")
    data = hpt.split(x, x @ torch.arange(6.0).numpy(), seed=0)
    result = hpt.tune(
        _OwnStep(data),
        {"pull": hpt.Choice([0.0, 10.0]), "lr": hpt.Choice([0.1])},
        hparams={"batch_size": 8}, sampler="grid", epochs=20, run_dir=tmp_path / "run", progress=False,
    )  # fmt: skip
    assert result.best.hparams["pull"] == 0.0
    assert result.best.metrics["valid/mse"] < 0.05
    assert {trial.signature for trial in result.trials} == {
        result.trials[0].signature
    }  # dynamic: one program
    with pytest.raises(TypeError, match=r"must define build_model\(hparams\)"):
        hpt.Task().build_model({})


def test_public_names() -> None:
    import hpt_torch

    for name in hpt_torch.__all__:
        assert getattr(hpt_torch, name) is not None
        assert name in dir(hpt_torch)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = hpt_torch.nonsense


def test_importing_hpt_torch_and_its_cli_needs_no_torch() -> None:
    code = "import sys, hpt_torch, hpt_torch.cli; print('torch' in sys.modules, 'optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_the_script_in_the_readme_runs_as_printed(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(script.strip().splitlines()) <= 20
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "valid/accuracy" in done.stdout


def test_a_population_from_python(tmp_path: Path, data: hpt.Data) -> None:
    result = hpt.tune(
        hpt.Classification(Net, data), {"lr": hpt.Float(1e-3, 1e-1)}, trials=6, epochs=4, sampler="random",
        scheduler={"kind": "pbt", "interval_epochs": 1}, run_dir=tmp_path / "run", progress=False,
        tensorboard=False,
    )  # fmt: skip
    assert len(result.trials) == 6
    assert any(trial.phases for trial in result.trials)
    assert result.best is not None
    assert result.best.epoch == 4


@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_the_callers_torch_is_as_it_was(tmp_path: Path, data: hpt.Data, engine: str) -> None:
    def settings() -> tuple[object, ...]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        draws = torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())
        return torch.get_num_threads(), deterministic, torch.is_grad_enabled(), are_denormals_zero(), *draws

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        before, space = settings(), {"lr": hpt.Float(1e-3, 1e-1)}
        hpt.tune(
            hpt.Classification(Net, data), space, trials=3, epochs=2, run_dir=tmp_path / "run", engine=engine
        )
        assert settings() == before
    finally:
        torch.set_num_threads(threads)


def test_what_is_searched_under_a_condition_has_its_default_elsewhere(data: hpt.Data, tmp_path: Path) -> None:
    """Trials whose schedule is constant are those of a search in which nothing of it was said."""
    cosine: dict[str, Any] = {"when": {"schedule": ("cosine",)}}
    space = {
        "schedule": hpt.Choice(["constant", "cosine"]),
        "warmup_epochs": hpt.Int(1, 2, **cosine),
        "batch_size": hpt.Choice([16, 32], **cosine),
        "weight_decay": hpt.Float(0.1, 0.5, **cosine),
        "momentum": hpt.Float(0.5, 0.9, **cosine),
        "ema": hpt.Choice([True], **cosine),
        "dropout": hpt.Float(0.2, 0.5, **cosine),
        "freeze": hpt.Choice([["layers.0.*"]], **cosine),
    }
    task, options = hpt.Classification(Net, data), {"sampler": "random", "epochs": 3, "progress": False}
    options |= {"hparams": {"optimizer": "sgd"}, "executor": "inline", "tensorboard": False}
    result = hpt.tune(task, space, trials=8, run_dir=tmp_path / "run", **options)  # type: ignore[arg-type]
    assert [trial.state for trial in result.trials] == ["COMPLETE"] * 8
    constant = [trial for trial in result.trials if trial.hparams["schedule"] == "constant"]
    assert 0 < len(constant) < 8
    assert all(set(trial.hparams) == {"schedule"} for trial in constant)
    plain = hpt.tune(task, {}, trials=1, run_dir=tmp_path / "plain", **options)  # type: ignore[arg-type]
    assert plain.trials[0].metrics.keys() == constant[0].metrics.keys()
    assert result.best_model()
    settings = result.hparams(constant[0])
    assert "warmup_epochs" not in settings
    with hpt.record.Record(tmp_path / "run" / "run.db", readonly=True) as record:
        assert "batch_size" not in record.of_kind("run")[0].body["recipe"]["hparams"]


class _Rated(hpt.Classification):
    """With a further figure, which has no value where nothing was guessed to be of class 1."""

    def __init__(self, model: Any, data: hpt.Data) -> None:
        super().__init__(model, data)
        self.metric_names = (*self.metric_names, "precision_of_1", "precision")

    def metrics(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        guesses = model(batch["inputs"]).argmax(1)
        hits = ((guesses == 1) & (batch["targets"] == 1)).sum()
        return {**super().metrics(model, batch), "guessed": (guesses == 1).sum() * 0, "hits": hits}

    def finalize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {**super().finalize(sums), "precision_of_1": sums["hits"] / sums["guessed"] * 0}


@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_a_metric_without_a_value_ends_no_trial_but_the_objective_does(
    data: hpt.Data, tmp_path: Path, engine: str
) -> None:
    options: dict[str, Any] = {"trials": 2, "epochs": 2, "engine": engine, "executor": "inline"}
    options |= {"progress": False, "tensorboard": False}
    space = {"lr": hpt.Float(1e-3, 1e-2)}
    result = hpt.tune(_Rated(Net, data), space, run_dir=tmp_path / "one", **options)
    assert [trial.state for trial in result.trials] == ["COMPLETE"] * 2
    assert not any("precision_of_1" in name for name in result.best.metrics)
    asked = {"metric": "valid/precision", "direction": "maximize"}
    result = hpt.tune(_Rated(Net, data), space, run_dir=tmp_path / "two", **options, **asked)
    assert [trial.state for trial in result.trials] == ["FAILED"] * 2
    assert result.trials[0].reason == (
        "the objective valid/precision was not measured in epoch 1, only train/accuracy, train/grad_norm, "
        "train/loss, train/precision_of_1, valid/accuracy, valid/loss, valid/precision_of_1; the task's "
        "finalize() must return it, and roc_auc needs rows of every class"
    )
    asked = {"metric": "valid/precision_of_1", "direction": "maximize"}
    result = hpt.tune(_Rated(Net, data), space, run_dir=tmp_path / "three", **options, **asked)
    assert "diverged: valid/precision_of_1 is nan" in result.trials[0].reason
