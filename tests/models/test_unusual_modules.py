"""Modules that are unlike ours: gradients that lie in memory otherwise than their parameters, or are sparse;
one tensor under two names; layers that take their shapes from the data, that write into it, that keep more
than tensors. They train as torch trains them, and are found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hpt_torch as hpt
from hpt_torch.data import Rows, split
from hpt_torch.tasks import Classification
from hpt_torch.trainers import base
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer

CPU = torch.device("cpu")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Layouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 4))
        self.second = nn.Parameter(torch.randn(6, 3))
        self.shift = nn.Parameter(torch.randn(5))
        self.scale = nn.Parameter(torch.randn(2, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.einsum("bi,hi->bh", inputs, self.first) + self.shift.mean()  # one number, seen as five
        weight = self.second * self.scale.sum(0)  # a row, seen as two
        return (weight.t() @ hidden.t()).t()


class Tied(nn.Module):
    """The order of the names matters: the second one is not among `named_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.decoder(torch.relu(self.encoder(inputs))))


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.hidden(inputs))))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, sparse=True), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.embedding((inputs > 0).long()).flatten(1))


class InPlace(nn.Module):
    """Writes into its inputs, and twice into what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(inputs.add_(0.5))).mul_(2).add_(1)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def get_extra_state(self) -> dict[str, str]:
        return {"version": "1"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        assert state == {"version": "1"}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


MODELS = [Layouts, Tied, Lazy, Sparse, InPlace, Stateful]
CASES = [(kind, engine) for kind in MODELS for engine in (LoopTrainer, FusedTrainer)]
CASES.remove((Sparse, FusedTrainer))  # cannot be mapped: the planner sends it to the loop


def _task(model: type[nn.Module]) -> Classification:
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    return Classification(model, split(x, (x[:, 0] > 0).long() + (x[:, 1] > 0), seed=0))


def test_autograd_does_return_such_gradients() -> None:
    model = Layouts()
    grads = torch.autograd.grad(model(torch.randn(8, 4)).sum(), list(model.parameters()))
    assert any(not grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("kind", "engine"), CASES)
def test_they_train_as_with_torchs_own_optimizer(
    kind: type[nn.Module], engine: type[LoopTrainer], optimizer: str
) -> None:
    task = _task(kind)
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    hparams = {**defaults, "optimizer": optimizer, "lr": 0.01, "batch_size": 8}
    data = task.data().to(CPU, torch.float64)
    assert isinstance(data.train, Rows)
    trainer = engine(task, data, device=CPU, dtype=torch.float64, seed=3, epochs=2)
    population = trainer.init([4, 5], [hparams, {**hparams, "lr": 0.02}])
    trainer.train(population, 2, should_pause=lambda: False)
    for i, trial in enumerate((4, 5)):
        model = base.build(task, population.hparams[i], trial, 3, data.valid).double()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.sparse = False  # torch's Adam takes no sparse gradients
        own = {"momentum": 0.9} if optimizer == "sgd" else {}
        lr = population.hparams[i]["lr"]
        other = OPTIMIZERS[optimizer](model.parameters(), lr=lr, weight_decay=0.0, **own)
        for epoch in range(2):
            order = base.DataOrder(len(data.train), 3, CPU).epoch(epoch)
            for start in range(0, len(order) - 7, 8):
                batch = data.train.select(order[start : start + 8])
                other.zero_grad()
                nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"]).backward()
                other.step()
        weights = trainer.weights(population, i)
        expected = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_a_search_ends_with_the_model_that_it_scored(tmp_path: Path, kind: type[nn.Module]) -> None:
    task = _task(kind)
    space = {"lr": hpt.Float(1e-3, 1e-1)}
    result = hpt.tune(task, space, trials=3, epochs=2, sampler="random", run_dir=tmp_path / "run")
    valid = task.data().valid
    found = base.evaluate(task, result.best_model(), valid)["accuracy"]
    assert found == pytest.approx(result.best.metrics["valid/accuracy"])
