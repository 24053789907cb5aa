"""Losses are torch's, metrics scikit-learn's, whatever batches the rows come in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sk
from torch import Tensor

from hpt_torch import metrics as m

B, C = 23, 4


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _classes(seed: int, *shape: int, classes: int = C) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def _equal_with_gradients(mine: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    values, gradients = [], []
    for function in (mine, theirs):
        x = _random(0, B, C).requires_grad_()
        value = function(x)
        assert value.shape == ()
        values.append(value)
        gradients.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


# -- losses --------------------------------------------------------------------------------------------


def _mapped(function: Callable[[Tensor, Tensor], Tensor], value: float) -> Callable[[Tensor], Tensor]:
    """The loss as fused training calls it: mapped over members (here one), its hyperparameter a tensor."""
    given = torch.tensor([value], dtype=torch.float64)
    return lambda x: torch.func.vmap(function)(x.unsqueeze(0), given).squeeze(0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_equals_torch(smoothing: float, weighted: bool) -> None:
    targets = _classes(1, B)
    weights = _random(2, C).exp() if weighted else None

    def mine(x: Tensor, given: Tensor | float) -> Tensor:
        return m.cross_entropy(x, targets, given, weights)

    for form in (
        lambda x: mine(x, smoothing),
        lambda x: mine(x, torch.tensor(smoothing, dtype=torch.float64)),
        _mapped(mine, smoothing),
    ):
        _equal_with_gradients(
            form, lambda x: F.cross_entropy(x, targets, weight=weights, label_smoothing=smoothing)
        )


def test_cross_entropy_of_sequences_is_the_mean_over_rows_and_steps() -> None:
    logits, targets, weights = _random(0, B, 7, C), _classes(1, B, 7), _random(2, C).exp()
    for given in (None, weights):
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=given, label_smoothing=0.1)
        torch.testing.assert_close(m.cross_entropy(logits, targets, 0.1, given), expected)
        mapped = _mapped(lambda x, share, w=given: m.cross_entropy(x, targets, share, w), 0.1)
        torch.testing.assert_close(mapped(logits), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_equals_torch(smoothing: float) -> None:
    """torch has no label smoothing for it: of two outcomes a question, each gets half of the share."""
    targets = _classes(1, B)
    yes = F.one_hot(targets, C).double() * (1 - smoothing) + smoothing / 2

    def theirs(x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, yes, reduction="sum") / B

    def mine(x: Tensor, given: Tensor | float) -> Tensor:
        return m.binary_cross_entropy(x, targets, given)

    _equal_with_gradients(lambda x: mine(x, smoothing), theirs)
    _equal_with_gradients(_mapped(mine, smoothing), theirs)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mse", F.mse_loss),
        ("mae", F.l1_loss),
        ("huber", F.huber_loss),
        ("huber", lambda x, y: F.huber_loss(x, y, delta=0.3)),
    ],
)
def test_regression_losses_equal_torch(name: str, theirs: Any) -> None:
    targets = _random(3, B, C)
    delta = 1.0 if theirs is F.huber_loss else 0.3

    def mine(x: Tensor, given: Tensor | float) -> Tensor:
        return m.regression_loss(name, x, targets, given)

    for form in (lambda x: mine(x, delta), _mapped(mine, delta)):
        _equal_with_gradients(form, lambda x: theirs(x, targets))


# -- classification ------------------------------------------------------------------------------------


def _added(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As trainers add up: sums are added, rows of each_* put one after another."""
    return {
        name: torch.cat([p[name] for p in parts])
        if name.startswith("each_")
        else torch.stack([p[name] for p in parts]).sum(0)
        for name in parts[0]
    }


def _measured(logits: Tensor, targets: Tensor, names: Sequence[str], size: int) -> dict[str, float]:
    batches = zip(logits.split(size), targets.split(size), strict=True)
    sums = _added([m.classification_sums(x, y, names) for x, y in batches])
    return m.classification_metrics(sums, names)


@pytest.mark.parametrize("size", [1000, 64, 7])
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_classification_metrics_equal_scikit_learn(classes: int, size: int) -> None:
    logits, targets = _random(5, 300, classes), _classes(6, 300, classes=classes)
    logits[torch.arange(300), targets] += 0.5
    guesses = logits.argmax(-1)
    got = _measured(logits, targets, m.CLASSIFICATION, size)
    probability = logits.softmax(-1)
    expected = {
        "loss": sk.log_loss(targets, probability),
        "accuracy": sk.accuracy_score(targets, guesses),
        "f1": sk.f1_score(targets, guesses, average="macro"),
        "precision": sk.precision_score(targets, guesses, average="macro"),
        "recall": sk.recall_score(targets, guesses, average="macro"),
    }
    if classes == 2:
        expected["roc_auc"] = sk.roc_auc_score(targets, probability[:, 1])
    else:
        expected["roc_auc"] = sk.roc_auc_score(targets, probability, multi_class="ovr", average="macro")
    expected["top5"] = 1.0
    if classes > 5:
        expected["top5"] = sk.top_k_accuracy_score(targets, logits, k=5, labels=range(classes))
        assert expected["top5"] < 1
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize(
    ("absent_targets", "absent_guesses"), [([1], []), ([], [0]), ([2], [0]), ([3], [3]), ([0, 1], [0, 2])]
)
def test_macro_means_where_classes_are_missing(absent_targets: list[int], absent_guesses: list[int]) -> None:
    """A class neither met nor guessed is left out; one never guessed has precision 0, never met recall 0."""
    logits, targets = _random(7, 200, C), _classes(8, 200)
    logits[:, absent_guesses] = -100.0
    keep = ~torch.isin(targets, torch.tensor(absent_targets))
    logits, targets = logits[keep], targets[keep]
    guesses = logits.argmax(-1)
    got = _measured(logits, targets, ["f1", "precision", "recall"], 30)
    for name, function in (
        ("f1", sk.f1_score),
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
    ):
        expected = function(targets, guesses, average="macro", zero_division=0)
        assert got[name] == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("steps", [2, 3, 11])
def test_roc_auc_with_ties_equals_scikit_learn(steps: int) -> None:
    """Scores of a few values only: rows of both sides share them."""
    scores = _classes(9, 400, classes=steps).double() / (steps - 1)
    targets = (_random(10, 400) * 0.5 + scores > 0.5).long()
    two = torch.stack([1 - scores, scores], -1)
    assert m.roc_auc(two, targets) == pytest.approx(sk.roc_auc_score(targets, scores), rel=1e-9)
    three = torch.stack([scores, (1 - scores) / 2, (1 - scores) / 2], -1)
    targets = torch.where(_random(11, 400) > 0, targets, 2)
    expected = sk.roc_auc_score(targets, three, multi_class="ovr", average="macro")
    assert m.roc_auc(three, targets) == pytest.approx(expected, rel=1e-9)
    constant = torch.full((400, 3), 1 / 3, dtype=torch.float64)
    assert m.roc_auc(constant, targets) == pytest.approx(0.5)


@pytest.mark.parametrize("targets", [[0, 0, 0], [1, 1, 1]])
def test_roc_auc_of_one_class_is_not_a_number(targets: list[int]) -> None:
    scores = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    assert np.isnan(m.roc_auc(torch.stack([1 - scores, scores], -1), torch.tensor(targets)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(sk.roc_auc_score(targets, scores))


def test_a_class_at_every_step_counts_every_step() -> None:
    logits, targets = _random(0, B, 7, C), _classes(1, B, 7)
    got = _measured(logits, targets, ["accuracy", "f1", "roc_auc"], 5)
    flat = _measured(logits.flatten(0, 1), targets.flatten(), ["accuracy", "f1", "roc_auc"], 1000)
    assert got == pytest.approx(flat, rel=1e-12)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(targets.flatten(), logits.argmax(-1).flatten()))


def test_only_what_is_wanted_is_summed() -> None:
    logits, targets = _random(0, B, C), _classes(1, B)
    assert set(m.classification_sums(logits, targets, ["accuracy"])) == {"rows", "loss", "correct"}
    assert set(m.classification_sums(logits, targets, ["roc_auc"])) >= {"each_probability", "each_target"}


# -- regression ----------------------------------------------------------------------------------------


def _fit(predicted: Tensor, targets: Tensor, size: int) -> dict[str, float]:
    batches = list(zip(predicted.split(size), targets.split(size), strict=True))
    sums = [m.regression_sums(p, t, m.regression_loss("mse", p, t)) for p, t in batches]
    return m.regression_metrics(_added(sums))


@pytest.mark.parametrize("size", [1000, 64, 7])
@pytest.mark.parametrize("shape", [(300,), (300, 1), (300, 3), (300, 2, 2)])
def test_regression_metrics_equal_scikit_learn(shape: tuple[int, ...], size: int) -> None:
    predicted, targets = _random(12, *shape), _random(13, *shape) * 2 + 5
    predicted = targets + 0.3 * predicted
    got = _fit(predicted, targets, size)
    y, x = (t.reshape(len(t), -1).numpy() for t in (targets, predicted))
    expected = {
        "loss": sk.mean_squared_error(y, x),
        "mse": sk.mean_squared_error(y, x),
        "mae": sk.mean_absolute_error(y, x),
        "r2": sk.r2_score(y, x),
    }
    assert got == pytest.approx(expected, rel=1e-9)


def test_r2_of_targets_that_never_vary() -> None:
    """scikit-learn's rule: 1 where the constant was guessed exactly, else 0."""
    targets = torch.tensor([[1.0, 2.0]] * 6, dtype=torch.float64)
    predicted = targets.clone()
    predicted[0, 1] += 1
    assert _fit(predicted, targets, 4)["r2"] == sk.r2_score(targets, predicted) == 0.5


@pytest.mark.parametrize("value", [0.1, 1e4 / 3, -7.7e-3, 123.456])
@pytest.mark.parametrize("rows", [7, 10, 33, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_r2_of_a_constant_that_is_no_round_number(rows: int, value: float, dtype: torch.dtype) -> None:
    """Sums of squares leave rounding behind, which must not be taken for a spread and divided by."""
    targets = torch.full((rows,), value, dtype=dtype).double()
    predicted = targets + 0.5 * abs(value) * _random(14, rows)
    assert _fit(predicted, targets, 16)["r2"] == 0


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e5])
def test_r2_of_targets_far_from_zero(offset: float) -> None:
    """Years or prices: a mean much larger than the spread."""
    targets = _random(15, 500) + offset
    predicted = targets + 0.3 * _random(16, 500)
    assert _fit(predicted, targets, 64)["r2"] == pytest.approx(sk.r2_score(targets, predicted), rel=1e-6)


# -- mapped over members -------------------------------------------------------------------------------


def test_losses_map_over_members_with_their_own_hyperparameters() -> None:
    logits, targets, weights = _random(20, 3, B, C), _classes(21, B), _random(22, C).exp()
    real, shares = _random(23, B, C), torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)

    def pairs(x: Tensor, share: Tensor) -> tuple[Tensor, ...]:
        return (
            m.cross_entropy(x, targets, share),
            m.cross_entropy(x, targets, share, weights),
            m.binary_cross_entropy(x, targets, share, weights),
            m.regression_loss("mse", x, real),
            m.regression_loss("mae", x, real),
            m.regression_loss("huber", x, real, share + 0.1),
        )

    mapped = torch.func.vmap(pairs)(logits, shares)
    for i in range(3):
        for got, expected in zip(mapped, pairs(logits[i], shares[i]), strict=True):
            torch.testing.assert_close(got[i], expected, rtol=1e-12, atol=1e-12)


def test_sums_map_over_members() -> None:
    names = ["accuracy", "top5", "f1", "precision", "recall"]
    logits, targets, real = _random(24, 3, B, 8), _classes(25, B, classes=8), _random(26, B, 8)

    def sums(x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return (
            m.classification_sums(x, targets, names),
            m.regression_sums(x, real, m.regression_loss("mse", x, real)),
        )

    mapped = torch.func.vmap(sums)(logits)
    for i in range(3):
        for got, expected in zip(mapped, sums(logits[i]), strict=True):
            assert set(got) == set(expected)
            for name in expected:
                torch.testing.assert_close(got[name][i], expected[name], rtol=1e-12, atol=1e-12)


def test_directions() -> None:
    assert {*m.CLASSIFICATION, "r2"} == m.MAXIMIZED
    assert not {"mse", "mae", "loss"} & m.MAXIMIZED
