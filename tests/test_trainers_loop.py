"""The loop trainer against a plain torch loop, and what a member's result may depend on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from hpt_torch import optim
from hpt_torch.checkpoint import weights_sha256
from hpt_torch.data import Data, Rows, split
from hpt_torch.population import Population
from hpt_torch.seeding import generator
from hpt_torch.task import Task
from hpt_torch.tasks import Classification
from hpt_torch.trainers import base
from hpt_torch.trainers.loop import LoopTrainer

CPU = torch.device("cpu")


def never() -> bool:
    return False


def _data() -> Data:
    draw = generator(0, "test-data")
    x = draw.normal(size=(150, 6))
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2 > 0.3).astype("int64") + (x[:, 2] > 1)
    return split(x, y, seed=0)


def _trainer(task: Task, dtype: torch.dtype = torch.float32) -> LoopTrainer:
    return LoopTrainer(task, task.data().to(CPU, dtype), device=CPU, dtype=dtype, seed=3, epochs=5)


def _mlp_task() -> Classification:
    from hpt_torch.models import MLP

    return Classification(MLP, _data())


def _hparams(task: Task, **given: Any) -> dict[str, Any]:
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    return {**defaults, "hidden_sizes": (8,), "batch_size": 16, **given}


def _state(population: Population, i: int) -> str:
    groups = population.member(i)
    return weights_sha256(
        {f"{g}/{n}": t for g in ("params", "buffers", "slots") for n, t in groups[g].items()}
    )


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05},
        {"optimizer": "adam", "weight_decay": 1e-3},
        {"optimizer": "adamw", "weight_decay": 1e-2, "grad_clip_norm": 0.3, "lr": 0.01},
        {"optimizer": "adam", "label_smoothing": 0.1},
    ],
)
def test_equals_a_plain_torch_loop(given: dict[str, Any]) -> None:
    """nn.Module, torch.optim, F.cross_entropy, clip_grad_norm_: the same weights after 5 epochs."""
    task = _mlp_task()
    trainer, hparams = _trainer(task, torch.float64), _hparams(_mlp_task(), **given)
    population = trainer.init([4], [hparams])
    result = trainer.train(population, 5, should_pause=never)

    model = base.build(task, hparams, 4, seed=3).double()
    arguments = {"lr": hparams["lr"], "weight_decay": hparams["weight_decay"]}
    if hparams["optimizer"] == "sgd":
        arguments["momentum"] = hparams["momentum"]
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[
        hparams["optimizer"]
    ](model.parameters(), **arguments)
    train = trainer.data.train
    norms = []
    for epoch in range(5):
        order = base.DataOrder(len(train), 3, CPU).epoch(epoch)
        norms.clear()
        for start in range(0, len(train) - 15, 16):
            batch = train.select(order[start : start + 16])
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                model(batch["inputs"]), batch["targets"], label_smoothing=hparams["label_smoothing"]
            ).backward()
            if math.isfinite(hparams["grad_clip_norm"]):
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), hparams["grad_clip_norm"])))
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.weights(population, 0)[name], value, rtol=1e-9, atol=1e-10)
    accuracy = (
        model.eval()(trainer.data.valid.tensors["inputs"]).argmax(-1) == trainer.data.valid.tensors["targets"]
    )
    last = result.reports[-1].metrics
    assert last["valid/accuracy"] == pytest.approx(float(accuracy.double().mean()))
    if norms:
        assert last["train/grad_norm"] == pytest.approx(sum(norms) / len(norms))
        clipped = sum(norm > hparams["grad_clip_norm"] for norm in norms) / len(norms)
        assert 0 < clipped == pytest.approx(last["train/clipped_share"])


def test_company_and_position_change_no_bit() -> None:
    task = _mlp_task()
    trainer = _trainer(task)
    values = [_hparams(task, dropout=0.1 * i, batch_norm=True, lr=10.0 ** -(i + 1)) for i in range(3)]
    together = trainer.init([5, 6, 7], values)
    reports = trainer.train(together, 3, should_pause=never).reports
    for i in range(3):
        alone = trainer.init([5 + i], [values[i]])
        mine = trainer.train(alone, 3, should_pause=never).reports
        assert _state(alone, 0) == _state(together, i)
        assert [r.metrics for r in mine] == [r.metrics for r in reports if r.trial == 5 + i]
    backwards = trainer.init([7, 5], [values[2], values[0]])
    trainer.train(backwards, 3, should_pause=never)
    assert _state(backwards, 1) == _state(together, 0)


@pytest.mark.slow
def test_stopped_after_any_step_and_continued_is_bit_equal() -> None:
    """49 stops in 7 epochs of 5 steps and 2 members; the state goes through `state` and `restore`."""
    task = _mlp_task()
    values = [_hparams(task, dropout=0.3, batch_norm=True), _hparams(task, grad_clip_norm=0.5, dropout=0.1)]
    values[1]["batch_norm"] = True
    whole = _trainer(task).init([0, 1], values)
    expected = _trainer(task).train(whole, 4, should_pause=never).reports
    for stop_after in range(1, 46, 2):
        trainer, taken, reports = _trainer(task), 0, []

        def stop() -> bool:
            nonlocal taken
            taken += 1
            return taken % stop_after == 0  # noqa: B023

        population = trainer.init([0, 1], values)
        while True:
            result = trainer.train(population, 4, should_pause=stop)
            reports += result.reports
            if not result.paused:
                break
            tensors, meta = population.state()
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            trainer = _trainer(task)  # nothing of the old trainer is needed
            population = trainer.init([0, 1], values)
            population.restore(tensors, meta)
        assert [_state(population, i) for i in range(2)] == [_state(whole, i) for i in range(2)], stop_after
        assert sorted((r.trial, r.epoch, tuple(r.metrics.items())) for r in reports) == sorted(
            (r.trial, r.epoch, tuple(r.metrics.items())) for r in expected
        )


class _Noisy(nn.Module):
    """Draws from torch's global generator, as users' modules do."""

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], out_features)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(x + 0.1 * torch.randn_like(x)))


def test_a_users_own_random_draws_repeat_too() -> None:
    task = Classification(_Noisy, _data())
    hparams = {name: spec.default for name, spec in task.hparam_specs().items()}
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        population = _trainer(task).init([0], [hparams])
        _trainer(task).train(population, 2, should_pause=never)
        states.append(_state(population, 0))
    assert states[0] == states[1]


class _Boom(Task):
    """Member `trial` with bad > 0 raises, or returns NaN, at its third step."""

    def __init__(self, fail: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.fail = fail
        self.steps = 0

    def data(self) -> Data:
        rows = Rows({"inputs": torch.arange(12.0).reshape(12, 1)})
        return Data(train=rows, valid=rows)

    def build_model(self, hparams: Mapping[str, Any]) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: Mapping[str, Any], hparams: Mapping[str, Any]) -> torch.Tensor:
        self.steps += 1
        value = (model(batch["inputs"]) ** 2).mean()
        return self.fail(value) if self.steps % 6 == 3 and hparams["eps"] > 0.5 else value

    def metrics(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        return {"value": (model(batch["inputs"]) ** 2).sum()}

    def finalize(self, sums: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return {"value": float(sums["value"])}


def _raise(value: torch.Tensor) -> torch.Tensor:
    raise KeyError("the user's bug")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (_raise, "the user's bug"),
        (lambda value: value * math.nan, "diverged: the training loss is nan in epoch 1"),
        (lambda value: value + math.inf, "diverged: the training loss is inf in epoch 1"),
    ],
)
def test_a_failing_member_leaves_its_neighbours_as_they_are(
    fail: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    task = _Boom(fail)
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    good, bad = {**defaults, "batch_size": 2}, {**defaults, "batch_size": 2, "eps": 1.0}
    trainer = _trainer(task)
    together = trainer.init([0, 1, 2], [good, bad, good])
    result = trainer.train(together, 2, should_pause=never)
    assert set(result.failed) == {1}
    assert reason in result.failed[1]
    assert together.active == [True, False, True]
    assert {(r.trial, r.epoch) for r in result.reports} == {(0, 1), (0, 2), (2, 1), (2, 2)}
    for i, trial in ((0, 0), (2, 2)):
        alone = trainer.init([trial], [good])
        trainer.train(alone, 2, should_pause=never)
        assert _state(alone, 0) == _state(together, i)


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 90), (16, 5), (90, 1), (1000, 1)])
def test_batches_of_an_epoch(batch_size: int, batches: int) -> None:
    order = base.DataOrder(90, 0, CPU)
    assert order.batches(batch_size) == batches
    assert sorted(order.epoch(0).tolist()) == list(range(90))
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    assert base.DataOrder(90, 1, CPU).epoch(0).tolist() != order.epoch(0).tolist()


def test_frozen_parameters_stay_and_are_part_of_the_weights() -> None:
    class Net(nn.Module):
        def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(input_shape[0], 5), nn.Linear(5, out_features)
            self.body.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).relu())

    task = Classification(Net, _data())
    hparams = {name: spec.default for name, spec in task.hparam_specs().items()}
    trainer = _trainer(task)
    population = trainer.init([0], [hparams])
    before = trainer.weights(population, 0)
    trainer.train(population, 2, should_pause=never)
    after = trainer.weights(population, 0)
    assert torch.equal(before["body.weight"], after["body.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert not any("body" in name for name in population.slots)
    assert set(optim.SLOTS["adam"]) == {name.split("/")[0] for name in population.slots}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_cuda_the_same_as_on_the_cpu_up_to_rounding() -> None:
    task = _mlp_task()
    hparams = _hparams(task, dropout=0.2, batch_norm=True)
    states = []
    for device in (CPU, torch.device("cuda")):
        data = task.data().to(device, torch.float64)
        trainer = LoopTrainer(task, data, device=device, dtype=torch.float64, seed=3, epochs=5)
        population = trainer.init([0], [hparams])
        trainer.train(population, 3, should_pause=never)
        states.append({name: tensor.cpu() for name, tensor in trainer.weights(population, 0).items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-7, atol=1e-8)
