"""The company invariant: fused, alone, in the loop, at any position, beside anything: the same member."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpt_torch.checkpoint import weights_sha256
from hpt_torch.data import Data, Rows, split
from hpt_torch.models import CNN, MLP, RNN, Autoencoder, Linear
from hpt_torch.population import Population
from hpt_torch.seeding import generator
from hpt_torch.tasks import Classification, Reconstruction, Regression, Supervised
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer

CPU = torch.device("cpu")


def never() -> bool:
    return False


def _flat() -> Data:
    draw = generator(0, "fused-data")
    x = draw.normal(size=(150, 16))
    return split(x, (x[:, 0] > 0.3).astype("int64") + (x[:, 2] > 1), seed=0)


def _images() -> Data:
    draw = generator(0, "fused-images")
    x = draw.normal(size=(90, 2, 8, 8)).astype("float32")
    return split(x, (x[:, 0].mean((1, 2)) > 0).astype("int64"), seed=0)


def _sequences() -> Data:
    draw = generator(0, "fused-sequences")
    x = draw.normal(size=(90, 7, 16)).astype("float32")
    lengths = torch.from_numpy(draw.integers(2, 8, size=90))
    data = split(x, (x[:, 0, 0] > 0).astype("int64"), seed=0)

    def with_lengths(rows: Rows, start: int) -> Rows:
        return Rows({**rows.tensors, "lengths": lengths[start : start + len(rows)]})

    return Data(
        train=with_lengths(data.train, 0),
        valid=with_lengths(data.valid, 60),
        out_features=2,
        name="sequences",
    )


CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "mlp": (Classification, MLP, _flat, {"hidden_sizes": (32, 16), "batch_norm": True}),
    "mlp without batch norm": (Classification, MLP, _flat, {"hidden_sizes": (16,)}),
    "cnn": (Classification, CNN, _images, {"channels": (3, 4), "augment": True}),
    "rnn": (Classification, RNN, _sequences, {"cell": "rnn", "hidden_size": 16, "num_layers": 2}),
    "gru": (Classification, RNN, _sequences, {"cell": "gru", "hidden_size": 16, "num_layers": 2}),
    "lstm": (Classification, RNN, _sequences, {"cell": "lstm", "hidden_size": 16, "bidirectional": True}),
    "autoencoder": (Reconstruction, Autoencoder, _flat, {"hidden_sizes": (32,), "latent_dim": 16}),
    "linear": (Classification, Linear, _flat, {}),
}
_STATE_GROUPS = ("params", "buffers", "slots", "kept")


def _task(name: str) -> Supervised:
    kind, model, data, _ = CASES[name]
    made: Supervised = kind(model, data())
    return made


def _hparams(task: Supervised, name: str, **given: Any) -> dict[str, Any]:
    defaults = {n: spec.default for n, spec in task.hparam_specs().items()}
    return {**defaults, "batch_size": 16, **CASES[name][3], **given}


def _varied(task: Supervised, name: str, count: int, **given: Any) -> list[dict[str, Any]]:
    """`count` members of one signature that differ in every dynamic hyperparameter that they have."""
    values = []
    for i in range(count):
        dynamic = {
            "lr": 0.002 * (i + 1), "weight_decay": 0.01 * (i % 3), "dropout": 0.15 * (i % 4),
            "l1": 1e-4 * (i % 2), "l2": 1e-3 * (i % 3), "label_smoothing": 0.05 * (i % 3),
            "batch_norm_momentum": 0.1 + 0.1 * (i % 5), "grad_clip_norm": [math.inf, 0.3, 1.0][i % 3],
            "beta1": 0.9 - 0.05 * (i % 2), "momentum": 0.5 + 0.1 * (i % 4), "warmup_epochs": float(i % 2),
            "crop_padding": float(i % 3), "flip_probability": 0.25 * (i % 4),
        }  # fmt: skip
        known = {n: v for n, v in dynamic.items() if n in task.hparam_specs() and n not in given}
        values.append(_hparams(task, name, **known, **given))
    return values


def _train(
    kind: type[LoopTrainer], task: Supervised, trials: list[int], values: list[dict[str, Any]],
    dtype: torch.dtype = torch.float64, epochs: int = 3, keep: bool = False,
) -> tuple[Population, dict[int, list[dict[str, float]]], LoopTrainer]:  # fmt: skip
    data = task.data().to(CPU, dtype)
    trainer = kind(
        task, data, device=CPU, dtype=dtype, seed=3, epochs=epochs, keep=task.objective if keep else None
    )
    population = trainer.init(trials, values)
    result = trainer.train(population, epochs, should_pause=never)
    reports: dict[int, list[dict[str, float]]] = {trial: [] for trial in trials}
    for report in result.reports:
        reports[report.trial].append(dict(report.metrics))
    return population, reports, trainer


def _tensors(population: Population, i: int) -> dict[str, Tensor]:
    member = population.member(i)
    return {f"{group}/{n}": t for group in _STATE_GROUPS for n, t in member[group].items()}


def _same_bits(a: Population, i: int, b: Population, j: int) -> bool:
    return weights_sha256(_tensors(a, i)) == weights_sha256(_tensors(b, j))


def _close(a: Population, i: int, b: Population, j: int, tolerance: float) -> None:
    for name, tensor in _tensors(a, i).items():
        torch.testing.assert_close(_tensors(b, j)[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_fused_equals_the_loop(name: str) -> None:
    """Seven members that differ in everything dynamic, float64, to 1e-9; metrics too."""
    task = _task(name)
    values = _varied(task, name, 7, schedule="cosine")
    trials = list(range(10, 17))
    fused, fused_reports, _ = _train(FusedTrainer, task, trials, values)
    loop, loop_reports, _ = _train(LoopTrainer, task, trials, values)
    for i, trial in enumerate(trials):
        _close(loop, i, fused, i, 1e-9)
        for a, b in zip(loop_reports[trial], fused_reports[trial], strict=True):
            assert a == pytest.approx(b, rel=1e-8, abs=1e-8)
    assert fused.step == loop.step
    assert not torch.allclose(*(next(iter(fused.params.values()))[i] for i in (0, 1)))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize(
    "given",
    [
        {"ema": True, "ema_decay": 0.9},
        {"accumulation_steps": 3, "decay_norm_and_bias": False},
        {"head": ("layers.*.weight",), "head_lr_factor": 0.3, "freeze": ("layers.1.*",)},
        {"grad_clip_value": 0.01, "schedule": "one_cycle"},
    ],
)
def test_fused_equals_the_loop_for_every_optimizer_and_option(optimizer: str, given: dict[str, Any]) -> None:
    task, name = _task("mlp without batch norm"), "mlp without batch norm"
    values = _varied(task, name, 3, optimizer=optimizer, nesterov=True, **given)
    fused, fused_reports, trainer = _train(FusedTrainer, task, [0, 1, 2], values, keep=True)
    loop, loop_reports, oracle = _train(LoopTrainer, task, [0, 1, 2], values, keep=True)
    for i in range(3):
        _close(loop, i, fused, i, 1e-9)
        for key, tensor in oracle.weights(loop, i).items():
            torch.testing.assert_close(trainer.weights(fused, i)[key], tensor, rtol=1e-9, atol=1e-9)
        for a, b in zip(loop_reports[i], fused_reports[i], strict=True):
            assert a == pytest.approx(b, rel=1e-8, abs=1e-8)
    assert fused.best_epoch == loop.best_epoch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "gru", "autoencoder", "linear"])
def test_company_size_and_position_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """One member in P = 1, 2, 7, 32 and 64, at any position: the same bits of weights, buffers and moments.

    The sizes are multiples of 16: elsewhere the members of a stack are differently aligned in memory, and
    the CPU's matmul rounds differently.
    """
    task = _task(name)
    values = _varied(task, name, 64)
    reference, reports, _ = _train(FusedTrainer, task, list(range(64)), values, dtype, epochs=2)
    for chosen in ([5], [5, 9], [9, 5], [0, 1, 2, 3, 4, 5, 6], list(range(5, 37))):
        group, mine, _ = _train(FusedTrainer, task, chosen, [values[i] for i in chosen], dtype, epochs=2)
        assert _same_bits(reference, 5, group, chosen.index(5)), chosen
        for a, b in zip(mine[5], reports[5], strict=True):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-12)  # sums over the rows, in float64


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_company_changes_nothing_beyond_rounding(name: str) -> None:
    task = _task(name)
    values = _varied(task, name, 7)
    reference, _, _ = _train(FusedTrainer, task, list(range(7)), values)
    for chosen in ([5], [5, 2], [2, 3, 5]):
        group, _, _ = _train(FusedTrainer, task, chosen, [values[i] for i in chosen])
        _close(reference, 5, group, chosen.index(5), 1e-9)


def test_a_diverging_member_leaves_its_neighbours_as_they_are() -> None:
    task = _task("mlp")
    good = _varied(task, "mlp", 3)
    bad = {**good[1], "lr": 1e30, "optimizer": "adam"}
    apart, apart_reports, _ = _train(FusedTrainer, task, [0, 2], [good[0], good[2]])
    data = task.data().to(CPU, torch.float64)
    trainer = FusedTrainer(task, data, device=CPU, dtype=torch.float64, seed=3, epochs=3)
    together = trainer.init([0, 1, 2], [good[0], {**bad, "weight_decay": 1e300}, good[2]])
    result = trainer.train(together, 3, should_pause=never)
    assert set(result.failed) == {1}
    assert "diverged" in result.failed[1]
    for i, j in ((0, 0), (2, 1)):
        assert _same_bits(together, i, apart, j)
    assert [dict(r.metrics) for r in result.reports if r.trial == 2] == apart_reports[2]


def test_stopped_after_any_step_and_continued_is_bit_equal() -> None:
    task = _task("mlp")
    values = _varied(task, "mlp", 3, ema=True, schedule="one_cycle")
    whole, expected, _ = _train(FusedTrainer, task, [0, 1, 2], values, torch.float32, keep=True)
    for stop_after in (1, 2, 4, 7):
        data, taken = task.data().to(CPU, torch.float32), 0

        def stop() -> bool:
            nonlocal taken
            taken += 1
            return taken % stop_after == 0  # noqa: B023

        reports: dict[int, list[dict[str, float]]] = {0: [], 1: [], 2: []}
        state: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        while True:
            trainer = FusedTrainer(
                task, data, device=CPU, dtype=torch.float32, seed=3, epochs=3, keep=task.objective
            )
            population = trainer.init([0, 1, 2], values)
            if state is not None:
                population.restore(*state)
            result = trainer.train(population, 3, should_pause=stop)
            for report in result.reports:
                reports[report.trial].append(dict(report.metrics))
            if not result.paused:
                break
            tensors, meta = population.state()
            state = {n: t.clone() for n, t in tensors.items()}, meta
        assert all(_same_bits(whole, i, population, i) for i in range(3))
        assert reports == expected


class _Branching(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if float(y.sum()) > 0 else -y


class _Random(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x + x.new_empty(x.shape).cauchy_())
        return y


class _Plain(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(nn.functional.dropout(x, 0.0))
        return y


@pytest.mark.parametrize(
    ("model", "reason"), [(_Branching, "item"), (_Random, "random"), (MLP, None), (Linear, None)]
)
def test_what_cannot_be_mapped_is_found_before_training(model: Any, reason: str | None) -> None:
    task = Classification(model, _flat())
    hparams = {n: spec.default for n, spec in task.hparam_specs().items()}
    data = task.data().to(CPU, torch.float32)
    trainer = FusedTrainer(task, data, device=CPU, dtype=torch.float32, seed=3, epochs=3)
    population = trainer.init([0, 1], [hparams, hparams])
    before = [weights_sha256(_tensors(population, i)) for i in range(2)]
    found = trainer.why_not(population)
    assert (found is None) if reason is None else (found is not None and reason in found.lower())
    assert [weights_sha256(_tensors(population, i)) for i in range(2)] == before


def test_a_users_dropout_layers_are_stateless_too() -> None:
    class Net(nn.Module):
        def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(input_shape[0], 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, out_features)
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x)
            return y

    task = Classification(Net, _flat())
    hparams = {n: spec.default for n, spec in task.hparam_specs().items()}
    fused, _, _ = _train(FusedTrainer, task, [0, 1], [hparams, {**hparams, "lr": 0.01}])
    loop, _, _ = _train(LoopTrainer, task, [0, 1], [hparams, {**hparams, "lr": 0.01}])
    for i in range(2):
        _close(loop, i, fused, i, 1e-9)


def test_regression_in_company() -> None:
    draw = generator(1, "fused-regression")
    x = draw.normal(size=(100, 4)).astype("float32")
    task = Regression(MLP, split(x, x @ draw.normal(size=(4, 2)).astype("float32"), seed=0))
    defaults = {n: spec.default for n, spec in task.hparam_specs().items()}
    values = [
        {**defaults, "loss": "huber", "huber_delta": d, "lr": 0.01, "batch_size": 16} for d in (0.5, 2.0)
    ]
    fused, a, _ = _train(FusedTrainer, task, [0, 1], values)
    loop, b, _ = _train(LoopTrainer, task, [0, 1], values)
    for i in range(2):
        _close(loop, i, fused, i, 1e-9)
        assert a[i][-1] == pytest.approx(b[i][-1], rel=1e-8)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_configuration_is_the_same_fused_and_in_the_loop(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["mlp", "gru", "autoencoder", "linear"]))
    task = _task(name)
    static = {
        "optimizer": data.draw(st.sampled_from(["sgd", "adam", "adamw", "rmsprop"])),
        "schedule": data.draw(st.sampled_from(["constant", "step", "cosine", "exponential", "one_cycle"])),
        "batch_size": data.draw(st.sampled_from([7, 16, 1000])),
        "accumulation_steps": data.draw(st.sampled_from([1, 2])) if name != "mlp" else 1,
        "ema": data.draw(st.booleans()),
        "decay_norm_and_bias": data.draw(st.booleans()),
    }
    specs = task.hparam_specs()
    members = []
    for _ in range(data.draw(st.integers(1, 3))):
        dynamic = {
            "lr": data.draw(st.floats(1e-4, 3e-2)),
            "weight_decay": data.draw(st.sampled_from([0.0, 1e-3])),
            "l1": data.draw(st.sampled_from([0.0, 1e-3])),
            "l2": data.draw(st.sampled_from([0.0, 1e-3])),
            "dropout": data.draw(st.floats(0, 0.8)),
            "grad_clip_norm": data.draw(st.sampled_from([0.1, 1.0, math.inf])),
            "grad_clip_value": data.draw(st.sampled_from([0.01, math.inf])),
            "warmup_epochs": data.draw(st.sampled_from([0.0, 1.5])),
        }
        known = {n: v for n, v in {**dynamic, **static}.items() if n in specs}
        members.append(_hparams(task, name, **known))
    trials = list(range(len(members)))
    fused, _, _ = _train(FusedTrainer, task, trials, members, epochs=2)
    loop, _, _ = _train(LoopTrainer, task, trials, members, epochs=2)
    for i in trials:
        _close(loop, i, fused, i, 1e-7)
