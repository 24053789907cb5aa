"""Modules that are unlike ours: gradients that lie in memory otherwise than their parameters, or are sparse;
one tensor under two names; layers that take their shapes from the data, that write into it, that keep more
than tensors. They train as torch trains them, and are found again."""

from __future__ import annotations

import copy
import re
import types
from pathlib import Path
from typing import Any

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


class OwnAlpha(nn.Module):
    """Buffers that are called as the optimizer's hyperparameters."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("alpha", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("eps", torch.tensor(0.01), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs * self.alpha + self.eps)


class Shrinking(nn.Module):
    """Writes into its weights at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.head.weight.mul_(0.9)
        return self.head(inputs)


class Teacher(nn.Module):
    """Frozen weights that follow the learned ones."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.teacher = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.teacher.weight.mul_(0.9).add_(0.1 * self.head.weight)
        return self.head(inputs) + self.teacher(inputs)


class Hooked(nn.Module):
    """Half of the gradient of its weights is masked by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.head.weight.register_hook(lambda grad: grad * torch.tensor([1.0, 0.0, 1.0, 0.0]).to(grad))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


class Rebinding(nn.Module):
    """Puts a new tensor in the place of a buffer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * (inputs + 5).mean(0)
        return self.head(inputs + 5 - self.mean)


class Counting(nn.Module):
    """Does something else from its fifth step on: the count is in a dict, and in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.counts, self.state = nn.Linear(4, 3), {"steps": 0}, types.SimpleNamespace(steps=0)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.counts["steps"] += 1
            self.state.steps += 1
        early = self.counts["steps"] < 5 and self.state.steps < 5
        return self.head(inputs) * (1.0 if early else 0.1)


class Reading(nn.Module):
    """Branches on values that it reads in a way that no operation shows; only some batches are unlike."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.state = nn.Linear(4, 3), (torch.zeros(3), torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        largest = max(inputs[:, 0].tolist()), float(inputs[:, 1].detach().numpy().max())
        self.state = (self.state[0], torch.ones(3))
        return self.head(inputs) * (3.0 if max(largest) > 2.0 else 1.0)


class Selecting(nn.Module):
    """How many numbers it goes on with depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.head(hidden) + hidden[hidden > 0].mean()


class Aliased(nn.Module):
    """Keeps a parameter in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.aliases = [self.head.weight]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs) * self.aliases[0].abs().mean()


class Averaging(nn.Module):
    """Keeps the average of its outputs as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.average = torch.zeros(3)

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.head(inputs)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * output.detach().mean(0)
        return output - self.average.to(output)


MODELS = [Layouts, Tied, Lazy, Sparse, InPlace, Stateful, OwnAlpha, Shrinking, Teacher, Hooked]
MODELS += [Rebinding, Counting, Reading, Selecting, Aliased]
CASES = [(kind, engine) for kind in MODELS for engine in (LoopTrainer, FusedTrainer)]
for cannot_be_mapped in (
    Sparse,
    Hooked,
    Rebinding,
    Counting,
    Reading,
    Selecting,
    Aliased,
):  # the planner sends them to the loop
    CASES.remove((cannot_be_mapped, FusedTrainer))


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


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Hooked, "a hook on the gradient of head.weight"),
        (Aliased, "aliases[0] is a parameter that the module reaches otherwise than by its name"),
        (Rebinding, "it puts another tensor in the place of mean; write into it"),
        (Averaging, "it puts another tensor in the place of average[0]; write into it"),
    ],
)
def test_what_would_go_wrong_together_is_trained_one_by_one(kind: type[nn.Module], why: str) -> None:
    task = _task(kind)
    hparams = {name: spec.default for name, spec in task.hparam_specs().items()}
    fused = FusedTrainer(task, task.data(), device=CPU, dtype=torch.float32, seed=0, epochs=1)
    assert fused.why_not(fused.init([0, 1], [hparams, hparams])) == why


class Viewing(nn.Module):
    """As many CNNs are written: `view` does not go with memory that is laid out channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(36, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = nn.functional.max_pool2d(torch.relu(self.conv(inputs)), 2)
        return self.head(maps.view(maps.size(0), -1))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("engine", ["loop", "fused"])
def test_a_cnn_may_view_its_maps_as_rows(tmp_path: Path, engine: str, channels: int) -> None:
    x = torch.randn(60, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(1, 2, 1), Viewing()) if channels == 1 else Viewing()
    task = Classification(lambda: copy.deepcopy(model), split(x, (x.mean((1, 2, 3)) > 0).long(), seed=0))
    space = {"lr": hpt.Float(1e-3, 1e-1)}
    given = {"sampler": "random", "engine": engine, "run_dir": tmp_path / "run"}
    result = hpt.tune(task, space, trials=2, epochs=3, **given)
    assert [trial.state for trial in result.trials] == [hpt.TrialState.COMPLETE] * 2
    found = base.evaluate(task, result.best_model(), task.data().valid)["accuracy"]
    assert found == pytest.approx(result.best.metrics["valid/accuracy"])


class Remembered(nn.Module):
    """Knows its dropout by two names, and reads its rate."""

    def __init__(self, sizes: tuple[int, ...] = (6,)) -> None:
        super().__init__()
        assert isinstance(sizes, tuple), "as it was declared"
        (hidden,) = sizes
        self.first, self.drop, self.head = nn.Linear(4, hidden), nn.Dropout(0.5), nn.Linear(hidden, 3)
        self.steps = [self.first, self.drop, self.head]

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.drop.p == 0.5
        for step in self.steps:
            inputs = step(inputs)
        return inputs


class Rounded(Classification):
    def finalize(self, sums: Any) -> Any:
        return {name: torch.tensor(value) for name, value in super().finalize(sums).items()}


def test_dropout_by_another_name_rests_where_a_model_is_evaluated(tmp_path: Path) -> None:
    task = Rounded(Remembered, _task(Tied).data())
    space = {"lr": hpt.Float(1e-3, 1e-1)}
    result = hpt.tune(task, space, trials=2, epochs=2, sampler="random", run_dir=tmp_path / "run")
    model, rows = result.best_model(), task.data().valid
    assert isinstance(rows, Rows)
    first, second = (model(rows.tensors["inputs"]) for _ in range(2))
    assert torch.equal(first, second)
    assert base.evaluate(task, model, rows)["loss"] == pytest.approx(result.best.metrics["valid/loss"])


def test_complex_parameters_are_refused(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs.to(torch.cfloat) @ self.weight).real

    task = Classification(Complex, _task(Tied).data())
    result = hpt.tune(task, {"lr": hpt.Float(1e-3, 1e-1)}, trials=2, epochs=1, run_dir=tmp_path / "run")
    assert {trial.state for trial in result.trials} == {hpt.TrialState.INFEASIBLE}
    assert result.trials[0].reason.startswith("weight is complex: parameters must be real")


def test_a_loss_of_each_row_is_refused_by_name(tmp_path: Path) -> None:
    class Rowwise(Classification):
        def loss(self, model: nn.Module, batch: Any, hparams: Any) -> Tensor:
            return nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"], reduction="none")

    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    task = Rowwise(lambda: nn.Linear(4, 2), split(x, (x[:, 0] > 0).long(), seed=0))
    hparams: dict[str, Any] = {"lr": hpt.Float(1e-3, 1e-1), "batch_size": hpt.Choice([8, 16])}
    result = hpt.tune(task, hparams, trials=3, epochs=1, sampler="random", run_dir=tmp_path / "run")
    rule = r"Rowwise\.loss must return a tensor of shape \(\), got one of shape \(\d+,\); take the mean"
    assert re.search(rule, repr(result))
