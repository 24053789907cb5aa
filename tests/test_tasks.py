"""The built-in tasks: that they learn, what they optimise, and what they say when something does not fit."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn

from hpt_torch import metrics, tasks
from hpt_torch.data import DATASETS, Data, Rows, split
from hpt_torch.models import CNN, MLP, RNN, Autoencoder, Linear
from hpt_torch.seeding import generator
from hpt_torch.task import Task
from hpt_torch.tasks import Classification, Reconstruction, Regression, Supervised, from_names
from hpt_torch.trainers import base
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import HParams, InfeasibleError, Objective, TaskError

CPU = torch.device("cpu")


def _blobs(rows: int = 240, classes: int = 3, features: int = 4) -> Data:
    draw = generator(0, "blobs")
    y = np.arange(rows) % classes
    return split(
        draw.normal(size=(rows, features)) + 3 * (np.arange(features) == y[:, None]), y, name="blobs"
    )


def _line(outputs: int = 1) -> Data:
    draw = generator(0, "line")
    x = draw.normal(size=(200, 5))
    y = x @ draw.normal(size=(5, outputs)) + 0.1 * draw.normal(size=(200, outputs))
    return split(x, y[:, 0] if outputs == 1 else y)


def _hparams(task: Task, **given: Any) -> dict[str, Any]:
    return {**{name: spec.default for name, spec in task.hparam_specs().items()}, **given}


def _train(task: Task, epochs: int, **given: Any) -> tuple[dict[str, float], nn.Module]:
    """The last metrics and the trained model."""
    trainer = LoopTrainer(
        task, task.data().to(CPU, torch.float32), device=CPU, dtype=torch.float32, seed=1, epochs=epochs
    )
    hparams = _hparams(task, **{"batch_size": 16, "lr": 0.01, **given})
    population = trainer.init([0], [hparams])
    result = trainer.train(population, epochs, should_pause=lambda: False)
    assert not result.failed, result.failed[0]
    return dict(result.reports[-1].metrics), trainer.load(hparams, 0, trainer.weights(population, 0))


class _Odds(nn.Module):
    """One number a row: the log-odds of class 1."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.linear, self.flat = nn.Linear(4, 1), flat

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y.squeeze(1) if self.flat else y


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_the_log_odds_of_one_class_are_trained_as_torch_does(
    flat: bool, loss: str, shape: tuple[int, ...]
) -> None:
    data = _blobs(classes=2)
    rows = data.train.tensors["inputs"].double(), data.train.tensors["targets"]
    task, model = Classification(_Odds, data), _Odds(flat).double()
    hparams = _hparams(task, loss=loss, label_smoothing=0.1)
    batch = {"inputs": rows[0], "targets": rows[1].reshape(shape)}
    (mine,) = torch.autograd.grad(task.loss(model, batch, hparams), [model.linear.weight])
    smooth = 0.9 * rows[1].double() + 0.05
    expected = nn.functional.binary_cross_entropy_with_logits(model(rows[0]).reshape(-1), smooth)
    (theirs,) = torch.autograd.grad(expected, [model.linear.weight])
    assert torch.allclose(mine, theirs, rtol=1e-12)
    model.requires_grad_(False)
    found = task.finalize(task.metrics(model, batch))
    plain = nn.functional.binary_cross_entropy_with_logits(model(rows[0]).reshape(-1), rows[1].double())
    assert math.isclose(found["loss"], float(plain))
    assert found["accuracy"] == float(((model(rows[0]).reshape(-1) > 0) == rows[1]).double().mean())


def test_weights_of_five_dimensions_beside_images() -> None:
    """As for spectral images: only weights of four dimensions can lie channels-last."""

    class Spectral(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(3, 3, 3, padding=1), nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3, padding=1),
                nn.ReLU(), nn.MaxPool3d((1, 2, 2)), nn.Flatten(), nn.Linear(2 * 3 * 4 * 3, 2),
            )  # fmt: skip

    draw = generator(0, "spectral")
    data = split(draw.normal(size=(60, 3, 9, 7)), np.arange(60) % 2)
    metrics, model = _train(Classification(Spectral, data), 2)
    assert math.isfinite(metrics["valid/loss"])
    assert isinstance(model, Spectral)


# -- they learn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("model", [MLP, Linear])
def test_classification_learns(model: Any, loss: str) -> None:
    every = ["accuracy", "top5", "f1", "precision", "recall", "roc_auc"]
    task = Classification(model, _blobs(), metrics=every)
    metrics, trained = _train(task, 8, loss=loss, label_smoothing=0.05)
    both = {f"{part}/{name}" for part in ("train", "valid") for name in ("loss", *every)}
    assert set(metrics) == {*both, "train/grad_norm"}
    assert metrics["valid/accuracy"] > 0.9
    assert metrics["valid/roc_auc"] > 0.95
    valid = task.data().valid.tensors
    guesses = trained(valid["inputs"]).argmax(-1)
    assert metrics["valid/f1"] == pytest.approx(sk.f1_score(valid["targets"], guesses, average="macro"))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_regression_learns(loss: str, outputs: int) -> None:
    task = Regression(Linear, _line(outputs))
    metrics, trained = _train(task, 12, loss=loss, lr=0.05)
    assert metrics["valid/r2"] > 0.95
    valid = task.data().valid.tensors
    predicted = trained(valid["inputs"]).detach().reshape(valid["targets"].shape)
    assert metrics["valid/r2"] == pytest.approx(sk.r2_score(valid["targets"], predicted), rel=1e-5)
    assert metrics["valid/mse"] == pytest.approx(sk.mean_squared_error(valid["targets"], predicted), rel=1e-5)


def test_reconstruction_learns_the_inputs_and_reads_no_targets() -> None:
    draw = generator(0, "plane")
    x = draw.normal(size=(200, 2)) @ draw.normal(size=(2, 6))
    data = split(x, np.zeros(200, dtype=int), seed=0)
    parts = {part: Rows({"inputs": getattr(data, part).tensors["inputs"]}) for part in ("train", "valid")}
    without = dataclasses.replace(data, **parts, holdout=None)
    scores = []
    for made in (data, without):
        task = Reconstruction(Autoencoder, made)
        metrics, trained = _train(task, 15, latent_dim=2, hidden_sizes=(16,))
        assert metrics["valid/r2"] > 0.9
        assert trained(made.valid.tensors["inputs"]).shape == made.valid.tensors["inputs"].shape
        scores.append(metrics)
    assert scores[0] == scores[1]


def test_reconstruction_of_images() -> None:
    draw = generator(0, "images")
    x = draw.random(size=(80, 1, 6, 6)).astype("float32") * draw.random(size=(80, 1, 1, 1)).astype("float32")
    task = Reconstruction(Autoencoder, split(x, np.zeros(80, dtype=int)))
    metrics, _ = _train(task, 10, hidden_sizes=(32,), output_activation="sigmoid")
    assert metrics["valid/mse"] < 0.06 < float(np.square(x).mean())


# -- what is optimised ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "metrics", "expected"),
    [
        (Classification, None, ("valid/accuracy", "maximize")),
        (Classification, ["f1"], ("valid/f1", "maximize")),
        (Classification, ["roc_auc", "accuracy"], ("valid/roc_auc", "maximize")),
        (Regression, None, ("valid/mse", "minimize")),
        (Regression, ["mae", "r2"], ("valid/mae", "minimize")),
        (Regression, ["r2", "mse"], ("valid/r2", "maximize")),
        (Reconstruction, ["mae"], ("valid/mae", "minimize")),
    ],
)
def test_the_first_metric_is_optimised(
    kind: type[Supervised], metrics: list[str] | None, expected: tuple[str, Any]
) -> None:
    task = kind(Linear, _blobs() if kind is Classification else _line(), metrics=metrics)
    assert task.objective == Objective(metric=expected[0], direction=expected[1])
    assert kind.objective.metric in ("valid/accuracy", "valid/mse")  # that of the class is left alone
    if kind is not Reconstruction:
        assert expected[0] in _train(task, 1)[0]


def test_a_metric_named_twice_counts_once() -> None:
    task = Classification(Linear, _blobs(), metrics=["f1", "accuracy", "f1"])
    assert task.metric_names == ("loss", "f1", "accuracy")


# -- class weights -------------------------------------------------------------------------------------


def _imbalanced() -> Data:
    draw = generator(0, "imbalanced")
    y = (np.arange(600) % 20 == 0).astype(int)
    return split(draw.normal(size=(600, 3)) + 1.2 * y[:, None], y)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_balanced_class_weights_find_the_rare_class(loss: str) -> None:
    task = Classification(Linear, _imbalanced(), metrics=["recall", "accuracy"])
    plain, balanced = (
        _train(task, 10, loss=loss, class_weights=weights)[0] for weights in ("none", "balanced")
    )
    assert balanced["valid/recall"] > plain["valid/recall"] + 0.1


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    data = _imbalanced()
    targets = data.train.tensors["targets"]
    task, logits = Classification(Linear, data), torch.randn(len(targets), 2, dtype=torch.float64)
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(2), y=targets.numpy()))
    hparams = _hparams(task, class_weights="balanced", label_smoothing=torch.tensor(0.0).double())
    got = task.loss(_Constant(logits), {"inputs": logits, "targets": targets}, hparams)
    torch.testing.assert_close(got, nn.functional.cross_entropy(logits, targets, weight=weights))


class _Constant(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_class_weights_do_not_remember_the_precision_of_an_earlier_use(narrow: torch.dtype) -> None:
    """The same task object in one run and then another: the second must not see the first."""
    draw = generator(0, "weights")
    data = split(draw.normal(size=(100, 2)), np.repeat([0, 1, 2], [57, 32, 11]))
    values = []
    for uses in ([torch.float64], [narrow, torch.float64]):
        task = Classification(Linear, data)
        hparams = _hparams(task, class_weights="balanced", label_smoothing=torch.tensor(0.0).double())
        targets = data.train.tensors["targets"]
        for dtype in uses:
            logits = torch.arange(3.0, dtype=dtype).expand(len(targets), 3)
            value = task.loss(_Constant(logits), {"inputs": logits, "targets": targets}, hparams)
        values.append(float(value))
    assert values[0] == values[1]


# -- sequences -----------------------------------------------------------------------------------------


def _unequal(rows: int = 120) -> Data:
    """What matters is the last valid step; behind it stands noise that a model without lengths would read."""
    draw = generator(0, "unequal")
    lengths = draw.integers(2, 9, size=rows)
    x = draw.normal(size=(rows, 9, 1))
    y = np.arange(rows) % 2
    x[np.arange(rows), lengths - 1, 0] = 3.0 * (2 * y - 1)
    return split(x, y, lengths=lengths)


def test_lengths_reach_the_rnn() -> None:
    data = _unequal()
    without = dataclasses.replace(
        data,
        train=Rows({k: v for k, v in data.train.tensors.items() if k != "lengths"}),
        valid=Rows({k: v for k, v in data.valid.tensors.items() if k != "lengths"}),
        holdout=None,
    )
    scores = [
        _train(Classification(RNN, made), 8, cell="rnn", hidden_size=8, lr=0.02)[0]["valid/accuracy"]
        for made in (data, without)
    ]
    assert scores[0] > 0.95
    assert scores[1] < 0.9


def test_lengths_are_of_the_same_rows_as_the_inputs() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(Linear):
        def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
            seen.append((inputs, lengths))
            return super().forward(inputs)

    draw = generator(0, "spy")
    lengths = draw.integers(1, 9, size=60)
    x = (np.arange(9) < lengths[:, None]).astype("float32")[..., None]
    _train(Classification(Spy, split(x, np.arange(60) % 2, lengths=lengths)), 2)
    assert len(seen) > 6
    for inputs, given in seen:
        assert torch.equal(inputs.sum((1, 2)).long(), given)


def test_copying_gives_the_rnn_its_vocabulary_and_a_class_for_each_step() -> None:
    data = DATASETS["copying"](rows=60, symbols=3, copied=2, delay=2)
    task = Classification(RNN, data)
    hparams = _hparams(task, readout="all", hidden_size=8)
    model = task.build_model(hparams)
    assert isinstance(model, RNN)
    assert model.embedding is not None
    assert model.embedding.num_embeddings == model.head.out_features == 5
    assert "vocabulary" not in task.hparam_specs()
    metrics, _ = _train(task, 3, readout="all", hidden_size=8)
    assert metrics["valid/accuracy"] > 0.5  # the blanks


def test_a_text_gives_the_rnn_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    data = DATASETS["text"](path=tmp_path / "text.txt", length=8)
    task = Classification(RNN, data)
    model = task.build_model(_hparams(task, readout="all"))
    assert model.embedding.num_embeddings == len(data.classes)  # type: ignore[union-attr]
    metrics, _ = _train(task, 25, readout="all", hidden_size=32, lr=0.02)
    assert metrics["valid/accuracy"] > 0.7


def test_tokens_that_only_valid_or_holdout_have_are_part_of_the_vocabulary() -> None:
    """Token 9 is met in no train row: an embedding too small for it would fail at the first evaluation."""
    draw = generator(0, "tokens")
    x, y = draw.integers(0, 5, size=(40, 6)), np.arange(40) % 2
    rare = {"inputs": np.where(draw.random((10, 6)) < 0.5, 9, x[:10]), "targets": y[:10]}
    for part in ("valid", "holdout"):
        task = Classification(RNN, split(x, y, **{part: rare}))
        model = task.build_model(_hparams(task))
        assert model.embedding.num_embeddings == 10  # type: ignore[union-attr]


def test_real_inputs_have_no_vocabulary() -> None:
    task = Classification(RNN, _unequal())
    assert task.build_model(_hparams(task)).embedding is None


def test_a_class_at_every_step_makes_losses_and_metrics_means_over_steps() -> None:
    data = DATASETS["copying"](rows=30, symbols=3, copied=2, delay=2)
    task = Classification(RNN, data, metrics=["accuracy", "f1"])
    hparams = _hparams(task, readout="all")
    model, batch = task.build_model(hparams).eval(), data.valid.tensors
    with torch.no_grad():
        logits = model(batch["inputs"])
        got, loss = task.finalize(task.metrics(model, batch)), task.loss(model, batch, hparams)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    torch.testing.assert_close(loss, expected)
    assert got["loss"] == pytest.approx(float(expected), rel=1e-5)
    steps = batch["targets"].flatten()
    guesses = logits.argmax(-1).flatten()
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(steps, guesses))
    assert got["f1"] == pytest.approx(sk.f1_score(steps, guesses, average="macro", zero_division=0))


# -- roc_auc -------------------------------------------------------------------------------------------


def test_roc_auc_needs_every_class_in_valid_and_holdout() -> None:
    data = _blobs()
    without = {
        name: tensor[data.valid.tensors["targets"] != 1] for name, tensor in data.valid.tensors.items()
    }
    text = "metrics: roc_auc needs rows of every class in valid and hold-out"
    for part in ("valid", "holdout"):
        with pytest.raises(TaskError, match=f"^{text}"):
            Classification(Linear, dataclasses.replace(data, **{part: Rows(without)}), metrics=["roc_auc"])
    assert Classification(Linear, dataclasses.replace(data, holdout=None), metrics=["roc_auc"])
    assert Classification(Linear, dataclasses.replace(data, valid=Rows(without)), metrics=["f1"])


def test_roc_auc_of_a_class_at_every_step() -> None:
    data = DATASETS["copying"](rows=60, symbols=3, copied=2, delay=2)
    data = dataclasses.replace(data, out_features=4)  # the sign to begin is an input only
    task = Classification(RNN, data, metrics=["roc_auc"])
    metrics, _ = _train(task, 1, readout="all", hidden_size=4)
    assert 0 <= metrics["valid/roc_auc"] <= 1


def test_roc_auc_where_the_train_rows_measured_miss_a_class() -> None:
    """Train metrics are taken on a sample; a rare class may be absent from it, and the trial is none the
    worse: `valid` has it."""
    draw = generator(0, "rare")
    x, y = draw.normal(size=(300, 2)), np.zeros(300, dtype=int)
    y[:2] = 1
    valid = {"inputs": draw.normal(size=(10, 2)), "targets": np.arange(10) % 2}
    task = Classification(Linear, split(x, y, valid=valid, holdout_fraction=0), metrics=["roc_auc"])
    metrics, _ = _train(task, 2)
    assert 0 <= metrics["valid/roc_auc"] <= 1


# -- images --------------------------------------------------------------------------------------------


def test_only_images_have_augmentation_hyperparameters() -> None:
    images = split(generator(0, "x").normal(size=(40, 1, 6, 6)), np.arange(40) % 2)
    names = {"augment", "crop_padding", "flip_probability", "cutout_size"}
    task = Classification(CNN, images)
    assert names <= set(task.hparam_specs())
    assert names - {"augment"} <= task.dynamic_hparams
    assert not names & set(Classification(MLP, _blobs()).hparam_specs())


def test_augmentation_changes_training_and_not_evaluation() -> None:
    images = split(generator(0, "x").normal(size=(60, 1, 6, 6)), np.arange(60) % 2)
    task = Classification(Linear, images)
    same = _train(task, 2, augment=True, crop_padding=0.0, flip_probability=0.0, cutout_size=0.0)[0]
    assert same == _train(task, 2)[0]
    assert same != _train(task, 2, augment=True, crop_padding=0.0, flip_probability=0.5)[0]
    untrained = _train(task, 1, augment=True, cutout_size=6.0, lr=1e-30)[0]
    plain = _train(task, 1, lr=1e-30)[0]
    assert untrained.pop("train/grad_norm") != plain.pop("train/grad_norm")
    assert untrained == plain


# -- errors --------------------------------------------------------------------------------------------


def _says(text: str) -> Any:
    return pytest.raises(TaskError, match=f"^{re.escape(text)}")


def test_errors_of_the_constructor() -> None:
    data = _blobs()
    with _says("model must be a factory (a class or function that returns a new nn.Module), got Linear("):
        Classification(Linear((4,), 3), data)
    with _says("model must be a factory (a class or function that returns a new nn.Module), got 'mlp'"):
        Classification("mlp", data)  # type: ignore[arg-type]
    with _says("data must be a hpt_torch.Data, got tuple; hpt_torch.split makes one"):
        Classification(Linear, (1, 2))  # type: ignore[arg-type]
    with _says("metrics: must be among accuracy, top5, f1, precision, recall, roc_auc, got 'auc'"):
        Classification(Linear, data, metrics=["accuracy", "auc"])
    with _says("metrics: must be among mse, mae, r2, got 'accuracy'"):
        Regression(Linear, _line(), metrics=["accuracy"])
    with _says("classification needs integer targets (class numbers), got real ones: use Regression"):
        Classification(Linear, _line())


class _Clash:
    """Factories whose constructor has an argument that something else is called."""

    @staticmethod
    def training(input_shape: Any, out_features: int, lr: float = 0.1) -> nn.Module:
        raise NotImplementedError

    @staticmethod
    def loss(input_shape: Any, out_features: int, loss: str = "mse") -> nn.Module:
        raise NotImplementedError

    @staticmethod
    def augment(input_shape: Any, out_features: int, augment: bool = True) -> nn.Module:
        return Linear(input_shape, out_features)

    @staticmethod
    def positional(input_shape: Any, width: int, /) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("factory", "argument"), [(_Clash.training, "lr"), (_Clash.loss, "loss")], ids=["training", "task"]
)
def test_a_constructor_argument_named_as_a_training_hyperparameter(factory: Any, argument: str) -> None:
    text = f"argument '{argument}' is the name of a training hyperparameter; rename it"
    with pytest.raises(TaskError, match=text):
        Classification(factory, _blobs())


def test_an_augmentation_name_clashes_with_images_only() -> None:
    images = split(generator(0, "x").normal(size=(40, 1, 6, 6)), np.arange(40) % 2)
    with pytest.raises(TaskError, match="argument 'augment' is the name of a training hyperparameter"):
        Classification(_Clash.augment, images)
    assert Classification(_Clash.augment, _blobs()).hparam_specs()["augment"].default is True


def test_other_factories_that_cannot_be() -> None:
    with pytest.raises(TaskError, match="argument 'width' must be allowed as a keyword"):
        Classification(_Clash.positional, _blobs())

    class Wrong(Linear):
        dynamic_hparams = frozenset({"dropout"})

    with pytest.raises(TaskError, match="dynamic_hparams names 'dropout', which is no argument of it"):
        Classification(Wrong, _blobs())


def test_a_model_that_these_hyperparameters_do_not_allow() -> None:
    task = Classification(MLP, _blobs())
    with pytest.raises(InfeasibleError, match="give hidden_sizes, or depth and width, not both"):
        task.build_model(_hparams(task, hidden_sizes=(4,), depth=2))


class _Mine(Task):
    objective = Objective(metric="valid/x", direction="minimize")


def make_task() -> Task:
    return _Mine()


def make_nothing() -> int:
    return 3


def make_data(rows: int, *, scale: float = 1.0, valid_fraction: float = 0.2, seed: int = 0) -> Data:
    x = scale * generator(seed, "made").normal(size=(rows, 2))
    return split(x, np.arange(rows) % 2, valid_fraction=valid_fraction, seed=seed)


def make_anything(**options: Any) -> Data:
    return make_data(40, **{k: v for k, v in options.items() if k == "scale"})


def build_linear(input_shape: Any, out_features: int, bias: bool = True) -> nn.Module:
    return Linear(input_shape, out_features, bias=bias)


HERE = {"allow_import": [__name__]}


def test_from_names() -> None:
    task = from_names(
        kind="classification",
        model=f"{__name__}:build_linear",
        data=f"{__name__}:make_data",
        data_options={"rows": 50, "scale": 2.0},
        valid_fraction=0.4,
        seed=3,
        metrics=["f1"],
        **HERE,
    )
    assert isinstance(task, Classification)
    assert len(task.data().valid) == 20
    assert task.objective.metric == "valid/f1"
    assert task.hparam_specs()["bias"].default is True
    assert task.sources() == (Classification, build_linear)
    assert isinstance(from_names(kind=f"{__name__}:make_task", **HERE), _Mine)
    assert from_names(data=f"{__name__}:make_anything", data_options={"whatever": 1}, **HERE)
    for kind, model in (("regression", "linear"), ("reconstruction", "autoencoder")):
        assert from_names(kind=kind, model=model, data="diabetes").objective.direction == "minimize"
    assert len(from_names(data="iris", seed=1).data().valid) == 30
    one, two, again = (from_names(data="iris", seed=seed).data().fingerprint() for seed in (1, 2, 1))
    assert one == again != two


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"kind": "cluster"},
            "task.kind: must be classification, regression, reconstruction or module:factory, got 'cluster'",
        ),
        (
            {"kind": "python"},
            "task.kind: must be classification, regression, reconstruction or module:factory, got 'python'; "
            "this run was started from Python: run its script again",
        ),
        ({"kind": "os:getcwd"}, "task.kind: would import 'os', and a recipe may run only code that you name"),
        ({"kind": f"{__name__}:make_nothing", **HERE}, f"task.kind: {__name__}:make_nothing must give a "
         "hpt_torch.Task, gave int"),
        ({"kind": "a b:c"}, "task.kind: must look like module:factory, got 'a b:c'"),
        (
            {"model": "transformer"},
            "task.model: must be mlp, cnn, rnn, autoencoder, linear or module:factory, got 'transformer'",
        ),
        ({"model": f"{__name__}:nothing", **HERE}, f"task.model: module '{__name__}' has no 'nothing'"),
        ({"model": "absent_module:f", "allow_import": ["absent_module"]},
         "task.model: cannot import 'absent_module': No module named 'absent_module'"),
        ({"data": "imagenet"}, "task.data: must be digits, breast_cancer, wine, "),
        ({"data": "os:getcwd"}, "task.data: would import 'os'"),
        ({"data": f"{__name__}:make_nothing", **HERE}, f"task.data: {__name__}:make_nothing must give a "
         "hpt_torch.Data, gave int"),
        ({"data": "csv"}, "task.data_options.path: must be given for csv"),
        ({"data": f"{__name__}:make_data", **HERE}, f"task.data_options.rows: must be given for {__name__}:"),
        (
            {"data": "digits", "data_options": {"rows": 3}},
            "task.data_options.rows: is not an option of digits; it has: none",
        ),
        (
            {"data": "adding", "data_options": {"lenght": 3}},
            "task.data_options.lenght: is not an option of adding; it has: rows, length",
        ),
        ({"data": "adding", "data_options": {"rows": 1}}, "task.data: rows must be at least 3, got 1"),
        (
            {"data": "iris", "metrics": ["auc"]},
            "task.metrics: must be among accuracy, top5, f1, precision, recall, roc_auc, got 'auc'",
        ),
        (
            {"kind": "classification", "data": "diabetes"},
            "task.kind: classification needs integer targets (class numbers), got real ones: use Regression",
        ),
    ],
)  # fmt: skip
def test_errors_of_from_names(given: Mapping[str, Any], text: str) -> None:
    with _says(text):
        from_names(**given)


def test_a_clash_in_a_recipe_is_told_of_the_model() -> None:
    """The field that has to be changed is the model's."""
    with _says("task.model: "):
        from_names(model=f"{__name__}:clashing", data="iris", **HERE)


def clashing(input_shape: Any, out_features: int, lr: float = 0.1) -> nn.Module:
    raise NotImplementedError


def test_every_kind_and_model_has_a_name() -> None:
    assert set(tasks.KINDS) == {"classification", "regression", "reconstruction"}
    assert set(tasks.MODELS) == {"mlp", "cnn", "rnn", "autoencoder", "linear"}


def test_a_task_that_defines_nothing_says_what_is_missing() -> None:
    task, empty = _Mine(), Rows({"inputs": torch.zeros(1, 1)}).tensors
    hparams: HParams = {}
    for call, name in (
        (lambda: task.data(), "data()"),
        (lambda: task.build_model(hparams), "build_model(hparams)"),
        (lambda: task.loss(nn.Identity(), empty, hparams), "loss(model, batch, hparams)"),
        (lambda: task.metrics(nn.Identity(), empty), "metrics(model, batch)"),
        (lambda: task.finalize(empty), "finalize(sums)"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"_Mine must define {name}")):
            call()


@pytest.mark.parametrize(
    ("output", "targets"),
    [((6,), (6, 1)), ((6, 1), (6,)), ((), (1,)), ((6, 4), (6, 2, 2)), ((6, 2, 2), (6, 4))],
)
def test_targets_are_aligned_with_outputs(output: tuple[int, ...], targets: tuple[int, ...]) -> None:
    values = torch.arange(math.prod(targets)).reshape(targets)
    assert torch.equal(metrics.aligned(values, torch.empty(output)), values.reshape(output))


@pytest.mark.parametrize(("output", "targets"), [((3, 6), (6, 3)), ((6, 3, 5), (6, 5, 3)), ((6, 2), (6,))])
def test_what_does_not_belong_together_is_refused(output: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"the model returns \(.*\) for targets \(.*\): it must return"):
        metrics.aligned(torch.zeros(targets), torch.empty(output))


def test_logits_have_the_rows_of_their_targets() -> None:
    targets = torch.zeros(4, 3, dtype=torch.int64)
    for logits in (torch.zeros(3, 4, 5), torch.zeros(4, 5, 3)):
        with pytest.raises(ValueError, match="a number for each class, classes last"):
            metrics.cross_entropy(logits, targets)
        with pytest.raises(ValueError, match="a number for each class, classes last"):
            metrics.classification_sums(logits, targets, ())
    assert float(metrics.cross_entropy(torch.zeros(4, 3, 5), targets)) == pytest.approx(math.log(5))


def test_a_last_batch_of_one_row_may_lose_its_dimension() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs).squeeze()

    task = Regression(Squeezed, split(torch.randn(20, 3), torch.randn(20), seed=0))
    model, count = Squeezed(), base.EVALUATION_BATCH + 1
    rows = Rows({"inputs": torch.randn(count, 3), "targets": torch.randn(count)})
    expected = nn.functional.mse_loss(model(rows.tensors["inputs"]), rows.tensors["targets"])
    assert base.evaluate(task, model, rows)["mse"] == pytest.approx(float(expected.detach()))
