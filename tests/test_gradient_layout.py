"""Gradients that lie in memory otherwise than their parameters: torch's kernels must not misread them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpt_torch.data import split
from hpt_torch.tasks import Classification
from hpt_torch.trainers import base
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer

CPU = torch.device("cpu")


class _Awkward(nn.Module):
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


def test_autograd_does_return_such() -> None:
    model = _Awkward()
    grads = torch.autograd.grad(model(torch.randn(8, 4)).sum(), list(model.parameters()))
    assert any(not grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("engine", [LoopTrainer, FusedTrainer])
def test_they_train_as_with_torchs_own_optimizer(engine: type[LoopTrainer], optimizer: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=draw)
    task = Classification(_Awkward, split(x, (x[:, 0] > 0).long() + (x[:, 1] > 0), seed=0))
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    hparams = {**defaults, "optimizer": optimizer, "lr": 0.01, "batch_size": 8}
    data = task.data().to(CPU, torch.float64)
    trainer = engine(task, data, device=CPU, dtype=torch.float64, seed=3, epochs=2)
    population = trainer.init([4, 5], [hparams, {**hparams, "lr": 0.02}])
    trainer.train(population, 2, should_pause=lambda: False)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    for i, trial in enumerate((4, 5)):
        model = base.build(task, population.hparams[i], trial, seed=3).double()
        own = {"momentum": 0.9} if optimizer == "sgd" else {}
        other = kinds[optimizer](model.parameters(), lr=population.hparams[i]["lr"], weight_decay=0.0, **own)
        for epoch in range(2):
            order = base.DataOrder(len(data.train), 3, CPU).epoch(epoch)
            for start in range(0, len(order) - 7, 8):
                batch = data.train.select(order[start : start + 8])
                other.zero_grad()
                nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"]).backward()
                other.step()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(trainer.weights(population, i)[name], value, rtol=1e-9, atol=1e-10)
