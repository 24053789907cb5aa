"""Arguments of a user's model that only are dropout rates: found, trained together, each with its own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pickle
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpt_torch as hpt
from hpt_torch.data import split
from hpt_torch.hparams import signature
from hpt_torch.models.rates import Rate
from hpt_torch.record import Record
from hpt_torch.tasks import Classification
from hpt_torch.trainers import base
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import HParams

CPU = torch.device("cpu")


class Plain(nn.Module):
    """Two rates by names of its own, and one that is fixed."""

    def __init__(self, drop_in: float = 0.1, dropout: float = 0.2, width: int = 8) -> None:
        super().__init__()
        if not 0 <= drop_in < 1 or dropout > 1.0:
            raise ValueError("checks of the range decide nothing")
        self.first = nn.Sequential(nn.Dropout(drop_in), nn.Linear(4, width), nn.ReLU(), nn.Dropout(dropout))
        self.rest = nn.Sequential(nn.Dropout(0.4), nn.Linear(width, 3))
        self.again = self.first[3]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rest(self.first(inputs))


def _net(dropout: float = 0.2, change: Callable[[Any, Any], Any] | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 3))
    if change is not None:
        change(model, dropout)
    return model


@dataclasses.dataclass
class _Config:
    dropout: float


class _Slots:
    __slots__ = ("rate",)

    def __init__(self, rate: float) -> None:
        self.rate = rate


def _hook(model: nn.Module, p: float) -> None:
    model.register_forward_hook(lambda module, args, output: F.dropout(output, p))


# What a constructor may do besides `nn.Dropout(p)`: p may still be a rate and nothing else
KEEPS: dict[str, Callable[[Any, Any], Any]] = {
    "an attribute": lambda model, p: setattr(model, "rate", p),
    "another layer": lambda model, p: model.append(nn.AlphaDropout(p)),
    "in a list": lambda model, p: setattr(model, "rates", [0.1, [p]]),
    "in a dataclass": lambda model, p: setattr(model, "config", _Config(p)),
    "in slots": lambda model, p: setattr(model, "config", _Slots(p)),
    "in a function": lambda model, p: setattr(model, "drop", lambda x: F.dropout(x, p)),
    "in a default": lambda model, p: setattr(model, "drop", lambda x, p=p: F.dropout(x, p)),
    "in a partial": lambda model, p: setattr(model, "drop", functools.partial(F.dropout, p=p)),
    "in a hook": _hook,
    "in a hidden layer": lambda model, p: setattr(model, "hidden", [nn.Dropout(p)]),
    "in a copy": lambda model, p: model.append(
        copy.deepcopy(nn.Sequential(nn.Dropout(p), nn.AlphaDropout(p)))
    ),
}
# or it is more
DECIDES: dict[str, Callable[[Any, Any], Any]] = {
    "half of it": lambda model, p: model.append(nn.Dropout(p / 2)),
    "a tensor": lambda model, p: model.register_buffer("rate", torch.tensor(p)),
    "a tensor of its own": lambda model, p: setattr(model, "rate", torch.tensor([p])),
    "weights": lambda model, p: model[0].weight.data.mul_(1 - p),
    "a decision": lambda model, p: model.append(nn.Identity()) if p > 0 else None,
    "truth": lambda model, p: model.append(nn.Identity()) if p else None,
    "a number of layers": lambda model, p: [model.append(nn.Identity()) for _ in range(round(4 * p))],
    "an equality": lambda model, p: p == 0.5,
    "a name": lambda model, p: model.add_module(f"dropped {p}".replace(".", ""), nn.Identity()),
    "a number of NumPy's": lambda model, p: setattr(model, "rate", np.float64(p)),
    "an array": lambda model, p: setattr(model, "rate", np.array([p])),
    "a plain number": lambda model, p: setattr(model, "rate", math.sqrt(p)),
    "of another type": lambda model, p: model.append(nn.Identity()) if type(p) is float else None,
    "a question": lambda model, p: p.is_integer(),
    "its real part": lambda model, p: p.real,
    "text": lambda model, p: setattr(model, "saved", json.dumps([p])),
    "rates of its own": lambda model, p: [
        model.append(nn.Dropout(r)) for r in torch.linspace(0, p, 3).tolist()
    ],
    "a stored number": lambda model, p: setattr(model, "rate", pickle.loads(pickle.dumps(p))),
    "too large to tell": lambda model, p: setattr(model, "table", [[i] for i in range(100_000)]),
}


def _data() -> Any:
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    return split(x, (x[:, 0] > 0).long() + (x[:, 1] > 0), seed=0)


def test_rates_are_found_by_what_becomes_of_them() -> None:
    task = Classification(Plain, _data())
    torch.manual_seed(5)
    expected = float(torch.rand(1))
    torch.manual_seed(5)
    assert task.rate_hparams == {"drop_in", "dropout"}
    assert {"drop_in", "dropout", "lr"} <= task.dynamic_hparams
    assert "width" not in task.dynamic_hparams
    assert float(torch.rand(1)) == expected, "the caller's generators are as they were"
    assert Classification(_net, _data()).rate_hparams == {"dropout"}


@pytest.mark.parametrize("name", [*KEEPS, *DECIDES])
def test_what_a_number_decides_is_seen(name: str) -> None:
    def build(dropout: float = 0.2) -> nn.Module:
        return _net(dropout, {**KEEPS, **DECIDES}[name])

    assert Classification(build, _data()).rate_hparams == ({"dropout"} if name in KEEPS else set())


def test_optional_undecided_and_declared_arguments_are_left_as_they_are() -> None:
    def required(width: int, dropout: float = 0.1) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Dropout(dropout), nn.Linear(width, 3))

    def unused(dropout: float = 0.1) -> nn.Module:
        return nn.Linear(4, 3)

    class Declared(Plain):
        dynamic_hparams = frozenset({"dropout"})

    class Own(Classification):
        def build_model(self, hparams: HParams) -> nn.Module:
            return Plain(0.3)

    for task in (Classification(factory, _data()) for factory in (required, unused, Declared)):
        assert task.rate_hparams == frozenset()
    assert Own(Plain, _data()).rate_hparams == frozenset()


DECISIONS: list[Callable[[Any], Any]] = [
    lambda p: p > 0,
    lambda p: p <= 0,
    lambda p: p < 0.5,
    lambda p: p >= 0.1,
    lambda p: p == 0,
    lambda p: bool(p),
    lambda p: 1 - p,
    lambda p: float(p),
    lambda p: hash(p),
    lambda p: f"{p:.1f}",
]


@pytest.mark.parametrize("decide", DECISIONS)
def test_a_marked_number_says_what_a_number_says_and_remembers_it(decide: Callable[[Any], Any]) -> None:
    rate = Rate(0.25, "dropout")
    assert [rate < 0, rate >= 0, rate < 1, rate >= 1.0, rate > 1, rate <= 1.0] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    assert not rate.used
    assert decide(rate) == decide(0.25)
    assert rate.used
    copy = pickle.loads(pickle.dumps(rate))
    assert copy == 0.25
    assert type(copy) is float


def _hparams(task: Classification, **own: Any) -> dict[str, Any]:
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    return {**defaults, "optimizer": "adam", "lr": 0.01, "batch_size": 8, **own}


class Functional(Plain):
    """Every way to drop units that torch has, by calls."""

    def __init__(self, drop_in: float = 0.1, dropout: float = 0.2) -> None:
        super().__init__(drop_in, dropout)
        self.p, self.config = dropout, _Config(dropout)
        self.whole, self.alpha = nn.Dropout1d(drop_in), nn.AlphaDropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.alpha(self.whole(self.first(inputs).view(-1, 4, 2))).flatten(1)
        hidden = F.dropout(F.feature_alpha_dropout(hidden, self.p, self.training), p=self.config.dropout)
        query = F.dropout(hidden.view(-1, 2, 4), self.p, self.training, inplace=True)
        attended = F.scaled_dot_product_attention(query, query, query, dropout_p=self.p)
        return self.rest(attended.flatten(1))


class Asked(Plain):
    """Reads a layer's rate in forward, and in the loss."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rest(F.dropout(self.first[1](inputs), self.first[3].p, self.training))


class Copied(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout))
        self.config = dataclasses.asdict(_Config(dropout))
        self.layers = nn.Sequential(*(copy.deepcopy(block) for _ in range(3)), nn.Linear(4, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(F.dropout(inputs, self.config["dropout"], self.training))


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=dropout)
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(inputs.unsqueeze(-1))).mean(1))


@pytest.mark.parametrize("kind", [Plain, Functional, Asked, Copied, Transformer])
def test_each_member_has_its_own_rates(kind: type[nn.Module]) -> None:
    task = Classification(kind, _data())
    pairs = ((0.0, 0.5), (0.3, 0.0), (0.3, 0.5), (0.1, 0.2))
    each = [_hparams(task, drop_in=a, dropout=b) for a, b in pairs]
    if kind in (Copied, Transformer):
        each = [{n: v for n, v in hparams.items() if n != "drop_in"} for hparams in each]
    data, found, reports = task.data().to(CPU, torch.float64), [], []
    for engine in (LoopTrainer, FusedTrainer):
        trainer = engine(task, data, device=CPU, dtype=torch.float64, seed=3, epochs=3)
        population = trainer.init([0, 1, 2, 3], each)
        if isinstance(trainer, FusedTrainer):
            assert trainer.why_not(population) is None
        result = trainer.train(population, 3, should_pause=lambda: False)
        assert not result.failed
        found.append([trainer.weights(population, i) for i in range(4)])
        reports.append({(r.trial, r.epoch): r.metrics for r in result.reports})
    for alone, together in zip(*found, strict=True):
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-8, atol=1e-8)
    for key, metrics in reports[0].items():
        assert reports[1][key] == pytest.approx(metrics, rel=1e-7)


READS: dict[str, Callable[[Tensor, Any], Any]] = {
    "a product": lambda x, p: x * p,
    "half of it": lambda x, p: F.dropout(x, p / 2),
    "a decision": lambda x, p: F.dropout(x, p) if p > 0 else x,
    "another function": lambda x, p: F.leaky_relu(x, p),
    "a tensor": lambda x, p: F.dropout(x, 0.1) * torch.tensor(p),
    "a number": lambda x, p: x * math.sqrt(p),
    "a tensor of zeros": lambda x, p: x + torch.full_like(x, p),
    "a decimal": lambda x, p: x * float(Decimal(p)),
}


@pytest.mark.parametrize("place", ["attribute", "layer", "class"])
@pytest.mark.parametrize("name", READS)
def test_what_reads_a_rate_otherwise_trains_one_by_one(name: str, place: str) -> None:
    class Reading(nn.Module):
        known: ClassVar[dict[str, float]] = {}

        def __init__(self, rate: float = 0.1) -> None:
            super().__init__()
            self.layer, self.head = nn.Dropout(rate), nn.Linear(4, 3)
            if place == "attribute":
                self.rate = rate
            elif place == "class":
                self.known["rate"] = rate

        def forward(self, inputs: Tensor) -> Tensor:
            rate = {"attribute": lambda: self.rate, "class": lambda: self.known["rate"]}
            read = rate[place]() if place in rate else self.layer.p
            return self.head(READS[name](self.layer(inputs), read))

    task = Classification(Reading, _data())
    if place != "class" and name not in ("a number", "a decimal"):
        assert task.rate_hparams == frozenset()  # seen at once
        return
    assert task.rate_hparams == {"rate"}
    trainer = FusedTrainer(task, task.data(), device=CPU, dtype=torch.float32, seed=0, epochs=1)
    each = [_hparams(task, rate=rate) for rate in (0.1, 0.5)]
    assert trainer.why_not(trainer.init([0, 1], each)) == "rate is read otherwise than as a rate of dropout"


def test_values_that_are_no_numbers_train_apart() -> None:
    def optional(dropout: float | None = 0.1) -> nn.Module:
        return _net() if dropout is None else _net(dropout)

    task = Classification(optional, _data())
    each = [_hparams(task, dropout=p) for p in (None, 0.1, 0.2)]
    alike = [signature(hparams, task.dynamic_hparams) for hparams in each]
    assert alike[0] != alike[1] == alike[2]
    assert isinstance(task.build_model(each[0]), nn.Module)


def test_a_rate_acts_on_its_own_layers_alone() -> None:
    task = Classification(Plain, _data())
    trainer = LoopTrainer(task, task.data(), device=CPU, dtype=torch.float32, seed=0, epochs=1)
    model = trainer.build(_hparams(task), 0)
    base.set_hparams(model, _hparams(task, drop_in=0.25, dropout=0.5), task.buffer_hparams)
    rates = {name: float(m.dropout) for name, m in model.named_modules() if hasattr(m, "noise_key")}
    assert rates == {"first.0": 0.25, "first.3": 0.5, "rest.0": pytest.approx(0.4)}


def test_a_search_over_rates_trains_together(tmp_path: Path) -> None:
    space = {"lr": hpt.Float(1e-3, 1e-1), "dropout": hpt.Float(0.0, 0.5), "width": hpt.Choice([8, 16])}
    task = Classification(Plain, _data())
    result = hpt.tune(task, space, trials=8, epochs=2, sampler="random", run_dir=tmp_path / "run")
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        chunks = [chunk for plan in record.of_kind("plan") for chunk in plan.body["chunks"]]
    assert sum(len(chunk["trials"]) for chunk in chunks if chunk["engine"] == "fused") >= 7
    model = result.best_model()
    layer = model.get_submodule("first.3")
    assert type(layer) is nn.Dropout
    assert layer.p == result.best.hparams["dropout"]
    assert type(layer.p) is float


def test_what_another_choice_decides_trains_one_by_one() -> None:
    def either(kind: str = "layer", dropout: float = 0.1) -> nn.Module:
        return _net(dropout) if kind == "layer" else _net(dropout / 2)

    task = Classification(either, _data())
    assert task.rate_hparams == {"dropout"}
    trainer = FusedTrainer(task, task.data(), device=CPU, dtype=torch.float32, seed=0, epochs=1)
    why = "dropout decides what the model is, besides being a rate of dropout"
    for kind, reason in (("layer", None), ("half", why)):
        each = [_hparams(task, kind=kind, dropout=p) for p in (0.1, 0.5)]
        assert trainer.why_not(trainer.init([0, 1], each)) == reason


def _ways(name: str) -> type[nn.Module]:
    """Modules with an argument that is a number in [0, 1), but no rate of dropout, or not always."""

    class Way(nn.Module):
        def __init__(self, rate: float = 0.1, layer: int = 0, kind: str = "no") -> None:
            super().__init__()
            self.rate, self.layer, self.kind = rate, layer, kind
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            if kind == "reads":
                json.dumps({"rate": rate})
                self.rate = rate * 1.0

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(inputs))
            hidden = [hidden, F.dropout(hidden, 0.2, self.training)][self.layer]
            if name == "sometimes" and self.training and np.random.rand() < 0.2:
                hidden = hidden + self.rate
            if name == "large batches" and len(inputs) > 2:
                hidden = hidden * (1 + self.rate)
            if name == "gradients" and hidden.requires_grad:
                hidden.register_hook(lambda grad: grad * -self.rate)
            if name == "dropout":
                hidden = F.dropout(hidden, self.rate, self.training)
            return self.head(hidden)

    return Way


@pytest.mark.parametrize("name", ["sometimes", "large batches", "gradients", "never"])
def test_what_dropout_does_not_get_is_no_rate(name: str) -> None:
    assert Classification(_ways(name), _data()).rate_hparams == frozenset()


def test_models_that_mind_marked_numbers_are_built_with_plain_ones() -> None:
    task = Classification(_ways("dropout"), _data())
    assert task.rate_hparams == {"rate"}  # and not the index, a whole number
    trainer = FusedTrainer(task, task.data(), device=CPU, dtype=torch.float32, seed=0, epochs=1)
    each = [_hparams(task, kind="reads", rate=rate) for rate in (0.1, 0.5)]
    why = trainer.why_not(trainer.init([0, 1], each))
    assert why == "rate decides what the model is, besides being a rate of dropout"
    assert trainer.why_not(trainer.init([0, 1], [_hparams(task, rate=rate) for rate in (0.1, 0.5)])) is None
    assert type(task.build_model(_hparams(task, rate=0.3)).rate) is float


def test_rates_are_below_one(tmp_path: Path) -> None:
    task = Classification(Plain, _data())
    with pytest.raises(hpt.HptError, match=r"drop_in.*must be in \[0, 1\), got 1.0"):
        hpt.tune(task, {"drop_in": hpt.Choice([0.0, 1.0])}, trials=2, epochs=1, run_dir=tmp_path / "run")


class Masked(nn.Module):
    """A rate called as a buffer."""

    def __init__(self, mask: float = 0.15) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(mask), nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.drop(inputs * self.mask))


def test_a_buffer_called_as_a_rate_stays_what_it_is(tmp_path: Path) -> None:
    task = Classification(Masked, _data())
    assert task.rate_hparams == {"mask"}
    space = {"lr": hpt.Float(1e-3, 1e-1), "mask": hpt.Float(0.0, 0.5)}
    model = hpt.tune(task, space, trials=3, epochs=1, run_dir=tmp_path / "run").best_model()
    assert model.get_buffer("mask").tolist() == [1.0, 0.0, 1.0, 1.0]


def test_batch_norm_with_accumulated_batches_trains_together() -> None:
    def net(dropout: float = 0.1) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3))

    task = Classification(net, _data())
    trainer = FusedTrainer(task, task.data(), device=CPU, dtype=torch.float32, seed=0, epochs=1)
    each = [_hparams(task, dropout=p, accumulation_steps=2) for p in (0.1, 0.5)]
    assert trainer.why_not(trainer.init([0, 1], each)) is None
