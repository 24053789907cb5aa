"""Every option of training against plain torch: schedules, penalties, groups, averages, clipping, keeping."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import Killed, PowerSwitch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hpt_torch import recipe, session
from hpt_torch.checkpoint import load, weights_sha256
from hpt_torch.data import Data, split
from hpt_torch.models import CNN, MLP, RNN
from hpt_torch.population import Population
from hpt_torch.record import Record
from hpt_torch.seeding import generator
from hpt_torch.task import Task
from hpt_torch.tasks import Classification
from hpt_torch.trainers import base
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import Objective, Report, TrialState

CPU = torch.device("cpu")
EPOCHS, BATCH, TRIAL, SEED = 4, 16, 4, 3
VALID_LOSS = Objective(metric="valid/loss", direction="minimize")

Scheduler = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]


def never() -> bool:
    return False


def _data() -> Data:
    draw = generator(0, "options")
    x = draw.normal(size=(150, 6))
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2 > 0.3).astype("int64") + (x[:, 2] > 1)
    return split(x, y, seed=0)


class Net(nn.Module):
    """Parameters of one and of two dimensions, with and without a norm, in a body and a head."""

    def __init__(self, input_shape: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(input_shape[0], 8), nn.LayerNorm(8), nn.Tanh())
        self.head = nn.Linear(8, out_features)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


class NormNet(Net):
    """With running statistics, which are averaged by no one."""

    def __init__(self, input_shape: Sequence[int], out_features: int) -> None:
        super().__init__(input_shape, out_features)
        self.body[1] = nn.BatchNorm1d(8)


def _task(model: Any = Net) -> Classification:
    return Classification(model, _data())


def _hparams(task: Task, **given: Any) -> dict[str, Any]:
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    return {**defaults, "batch_size": BATCH, **given}


def _trainer(task: Task, dtype: torch.dtype = torch.float64, **options: Any) -> LoopTrainer:
    options = {"epochs": EPOCHS, **options}
    return LoopTrainer(task, task.data().to(CPU, dtype), device=CPU, dtype=dtype, seed=SEED, **options)


def _train(
    trainer: LoopTrainer, hparams: dict[str, Any], epochs: int = EPOCHS
) -> tuple[Population, list[Report]]:
    population = trainer.init([TRIAL], [hparams])
    result = trainer.train(population, epochs, should_pause=never)
    assert not result.failed, result.failed
    return population, result.reports


def _plain(
    trainer: LoopTrainer,
    hparams: dict[str, Any],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    scheduler: Scheduler | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    before_step: Callable[[nn.Module], None] | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    started: Callable[[nn.Module], None] | None = None,
    batch_size: int = BATCH,
) -> nn.Module:
    """The same rows in the same order, by the means that torch itself offers."""
    model = base.build(trainer.task, hparams, TRIAL, seed=SEED).double()
    base.set_hparams(model, hparams, trainer.named)
    train = trainer.data.train
    for tensor in train.tensors.values():
        if tensor.dim() == 4:
            model = model.to(memory_format=torch.channels_last)
    if started is not None:
        started(model)
    optimizer = make_optimizer(model)
    steps = len(train) // batch_size
    schedule = scheduler(optimizer, steps) if scheduler is not None else None
    for epoch in range(EPOCHS):
        order = base.DataOrder(len(train), SEED, CPU).epoch(epoch)
        for index in range(steps):
            batch = train.select(order[index * batch_size : (index + 1) * batch_size])
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"])
            (loss if penalty is None else loss + penalty(model)).backward()
            if before_step is not None:
                before_step(model)
            optimizer.step()
            if schedule is not None and (epoch, index) != (EPOCHS - 1, steps - 1):
                schedule.step()
            if after_step is not None:
                after_step(model)
    return model


def _assert_same(mine: dict[str, Tensor], model: nn.Module) -> None:
    theirs = model.state_dict()
    assert {n for n in theirs if not n.endswith("num_batches_tracked")} <= set(mine)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-10)


def _moved(trainer: LoopTrainer, hparams: dict[str, Any], weights: dict[str, Tensor]) -> set[str]:
    """The names of what training changed."""
    before = trainer.weights(trainer.init([TRIAL], [hparams]), 0)
    return {name for name, value in weights.items() if not torch.equal(value, before[name])}


# -- schedules -----------------------------------------------------------------------------------------

ONE_CYCLE = {"one_cycle_start": 0.3, "one_cycle_div": 5.0, "one_cycle_final_div": 100.0}


def _one_cycle(optimizer: torch.optim.Optimizer, S: int) -> lr_scheduler.LRScheduler:
    steps = EPOCHS * S
    return lr_scheduler.OneCycleLR(
        optimizer,
        0.1,
        total_steps=steps + 1,
        pct_start=(0.3 * steps + 1) / (steps + 1),  # torch's peak is at pct_start * total_steps - 1
        div_factor=5.0,
        final_div_factor=100.0,
        cycle_momentum=False,
    )


def _warm_exponential(optimizer: torch.optim.Optimizer, S: int) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ExponentialLR(optimizer, 0.7 ** (1 / S)),
            lr_scheduler.LinearLR(optimizer, 1 / (2 * S), total_iters=2 * S - 1),
        ]
    )


@pytest.mark.parametrize(
    ("given", "scheduler"),
    [
        ({"schedule": "constant"}, lambda o, S: lr_scheduler.ConstantLR(o, 1.0)),
        (
            {"schedule": "step", "step_epochs": 2, "step_gamma": 0.3},
            lambda o, S: lr_scheduler.StepLR(o, 2 * S, 0.3),
        ),
        (
            {"schedule": "cosine", "cosine_min": 0.1},
            lambda o, S: lr_scheduler.CosineAnnealingLR(o, EPOCHS * S, 0.1 * 0.1),
        ),
        (
            {"schedule": "exponential", "exponential_gamma": 0.7},
            lambda o, S: lr_scheduler.ExponentialLR(o, 0.7 ** (1 / S)),
        ),
        ({"schedule": "one_cycle", **ONE_CYCLE}, _one_cycle),
        (
            {"schedule": "exponential", "exponential_gamma": 0.7, "warmup_epochs": 2.0},
            _warm_exponential,
        ),
    ],
    ids=["constant", "step", "cosine", "exponential", "one_cycle", "warm-up"],
)
def test_schedules(given: dict[str, Any], scheduler: Scheduler) -> None:
    task = _task()
    trainer, hparams = _trainer(task), _hparams(task, optimizer="sgd", momentum=0.9, lr=0.1, **given)
    population, _ = _train(trainer, hparams)
    model = _plain(
        trainer, hparams, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), scheduler=scheduler
    )
    _assert_same(trainer.weights(population, 0), model)


# -- optimizers, penalties, groups ---------------------------------------------------------------------


def test_rmsprop() -> None:
    task = _task()
    hparams = _hparams(task, optimizer="rmsprop", lr=0.01, alpha=0.9, eps=1e-6, weight_decay=1e-3)
    trainer = _trainer(task)
    population, _ = _train(trainer, hparams)
    model = _plain(
        trainer,
        hparams,
        lambda m: torch.optim.RMSprop(m.parameters(), 0.01, alpha=0.9, eps=1e-6, weight_decay=1e-3),
    )
    _assert_same(trainer.weights(population, 0), model)


def test_sgd_with_nesterov_and_decay() -> None:
    task = _task()
    hparams = _hparams(
        task, optimizer="sgd", lr=0.05, momentum=0.8, nesterov=True, weight_decay=1e-2, schedule="cosine"
    )
    trainer = _trainer(task)
    population, _ = _train(trainer, hparams)
    model = _plain(
        trainer,
        hparams,
        lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.8, nesterov=True, weight_decay=1e-2),
        scheduler=lambda o, S: lr_scheduler.CosineAnnealingLR(o, EPOCHS * S),
    )
    _assert_same(trainer.weights(population, 0), model)


@pytest.mark.parametrize("everywhere", [True, False])
def test_l1_and_l2_are_part_of_the_loss(everywhere: bool) -> None:
    task = _task()
    hparams = _hparams(task, lr=0.01, l1=1e-3, l2=1e-2, decay_norm_and_bias=everywhere)

    def penalty(model: nn.Module) -> Tensor:
        reached = [p for p in model.parameters() if everywhere or p.dim() > 1]
        return torch.stack([1e-3 * p.abs().sum() + 1e-2 * p.square().sum() for p in reached]).sum()

    trainer = _trainer(task)
    population, _ = _train(trainer, hparams)
    model = _plain(trainer, hparams, lambda m: torch.optim.Adam(m.parameters(), 0.01), penalty=penalty)
    _assert_same(trainer.weights(population, 0), model)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_weight_decay_not_on_biases_and_norms(name: str) -> None:
    task = _task()
    hparams = _hparams(
        task, optimizer=name, momentum=0.0, lr=0.02, weight_decay=0.1, decay_norm_and_bias=False
    )

    def groups(model: nn.Module) -> torch.optim.Optimizer:
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
        return kind(
            [
                {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=0.02,
        )

    trainer = _trainer(task)
    population, _ = _train(trainer, hparams)
    _assert_same(trainer.weights(population, 0), _plain(trainer, hparams, groups))


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_head_with_its_own_learning_rate(factor: float) -> None:
    """Under a schedule: the head's rate follows it too."""
    task = _task()
    hparams = _hparams(
        task, optimizer="adamw", lr=0.01, weight_decay=0.05, head=("head.*",), head_lr_factor=factor,
        schedule="cosine",
    )  # fmt: skip

    def groups(model: nn.Module) -> torch.optim.Optimizer:
        assert isinstance(model, Net)
        return torch.optim.AdamW(
            [
                {"params": model.body.parameters(), "lr": 0.01},
                {"params": model.head.parameters(), "lr": 0.01 * factor},
            ],
            weight_decay=0.05,
        )

    trainer = _trainer(task)
    population, _ = _train(trainer, hparams)
    model = _plain(
        trainer, hparams, groups, scheduler=lambda o, S: lr_scheduler.CosineAnnealingLR(o, EPOCHS * S)
    )
    _assert_same(trainer.weights(population, 0), model)


@pytest.mark.parametrize(
    "patterns", [("body.*",), ("head.bias",), ("*.weight",), ("body.0.*", "head.*"), ("body.0",)]
)
def test_freeze(patterns: tuple[str, ...]) -> None:
    """Against torch with requires_grad_(False); penalties and decay do not reach what is frozen."""
    task = _task()
    hparams = _hparams(
        task, optimizer="adamw", lr=0.02, weight_decay=0.1, l2=1e-2, grad_clip_norm=1.0, freeze=patterns
    )

    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            inside = any(name.startswith(f"{pattern}.") for pattern in patterns)
            if inside or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                parameter.requires_grad_(False)

    def free(model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad]

    trainer = _trainer(task)
    population, _ = _train(trainer, hparams)
    model = _plain(
        trainer,
        hparams,
        lambda m: torch.optim.AdamW(free(m), 0.02, weight_decay=0.1),
        started=freeze,
        penalty=lambda m: torch.stack([1e-2 * p.square().sum() for p in free(m)]).sum(),
        before_step=lambda m: _discard(nn.utils.clip_grad_norm_(free(m), 1.0)),
    )
    weights = trainer.weights(population, 0)
    _assert_same(weights, model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert _moved(trainer, hparams, weights) == set(weights) - frozen


def _discard(value: object) -> None: ...


def test_everything_frozen_is_told_as_such() -> None:
    """Nothing to train: said in words, not as an error of autograd's."""
    task = _task()
    trainer, hparams = _trainer(task), _hparams(task, freeze=("*",))
    try:
        population = trainer.init([TRIAL], [hparams])
        reason = trainer.train(population, 1, should_pause=never).failed[TRIAL]
    except Exception as error:
        reason = str(error)
    assert "freeze" in reason
    assert "does not require grad" not in reason


def test_convolutions_in_channels_last_and_their_optimizer_state() -> None:
    """Images train channels-last; slots must name the same weights as the parameters do."""
    draw = generator(0, "images")
    x = draw.normal(size=(60, 3, 8, 8))
    task = Classification(CNN, split(x, (x.mean((1, 2, 3)) > 0).astype("int64")))
    trainer, hparams = _trainer(task), _hparams(task, channels=(4, 6), lr=0.01, weight_decay=1e-2)
    population, _ = _train(trainer, hparams)
    kept: list[torch.optim.Adam] = []

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        kept.append(torch.optim.Adam(model.parameters(), 0.01, weight_decay=1e-2))
        return kept[0]

    model = _plain(trainer, hparams, adam)
    _assert_same(trainer.weights(population, 0), model)
    for name, parameter in model.named_parameters():
        for slot in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                population.slots[f"{slot}/{name}"][0], kept[0].state[parameter][slot], rtol=1e-8, atol=1e-10
            )


# -- accumulation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 7, 16, 50])
@pytest.mark.parametrize("extra", [{}, {"l1": 1e-3, "grad_clip_norm": 0.3, "label_smoothing": 0.1}])
def test_accumulation_is_the_same_step(parts: int, extra: dict[str, Any]) -> None:
    """3, 7: the batch of 16 does not divide evenly; 50: more parts than rows."""
    task = _task()
    trainer = _trainer(task)
    one, reports = _train(trainer, _hparams(task, lr=0.01, **extra))
    many, more = _train(trainer, _hparams(task, lr=0.01, accumulation_steps=parts, **extra))
    for name, value in trainer.weights(one, 0).items():
        torch.testing.assert_close(trainer.weights(many, 0)[name], value, rtol=1e-9, atol=1e-10)
    for a, b in zip(reports, more, strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-8)


def test_accumulation_with_class_weights_is_the_same_step() -> None:
    """A part's mean is weighted by the weights of its classes; so must be its share of the whole."""
    task = _task()
    trainer = _trainer(task)
    one, many = (
        _train(trainer, _hparams(task, lr=0.01, class_weights="balanced", accumulation_steps=parts))[0]
        for parts in (1, 3)
    )
    for name, value in trainer.weights(one, 0).items():
        torch.testing.assert_close(trainer.weights(many, 0)[name], value, rtol=1e-9, atol=1e-10)


def test_parts_are_what_is_in_memory_at_a_time() -> None:
    sizes: list[int] = []

    class Spy(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                sizes.append(len(x))
            return super().forward(x)

    task = _task(Spy)
    _train(_trainer(task), _hparams(task, accumulation_steps=3), epochs=1)
    assert sizes == [5, 5, 6] * 5


def test_parts_of_a_batch_have_noise_of_their_own() -> None:
    """One dropout mask for all parts would correlate what should be independent rows."""
    masks: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self, input_shape: Sequence[int], out_features: int) -> None:
            super().__init__()
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(input_shape[0], out_features)

        def forward(self, x: Tensor) -> Tensor:
            dropped = self.drop(x)
            if self.training:
                masks.append(dropped == 0)
            return self.head(dropped)

    task = _task(Spy)
    _train(_trainer(task), _hparams(task, accumulation_steps=2), epochs=1)
    first, second = masks[0], masks[1]
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert not torch.equal(masks[0], masks[2])  # from step to step it does change


# -- averaged weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Net, NormNet])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_ema_equals_torchs_averaged_model(decay: float, model: Any) -> None:
    """Weights and metrics are those of the average; running statistics are the model's own."""
    task = _task(model)
    hparams = _hparams(task, lr=0.02, ema=True, ema_decay=decay)
    trainer = _trainer(task)
    population, reports = _train(trainer, hparams)
    kept: list[AveragedModel] = []

    def start(made: nn.Module) -> None:
        kept.append(AveragedModel(made, multi_avg_fn=get_ema_multi_avg_fn(decay)))
        kept[0].update_parameters(made)  # its first update copies: so the initial weights count

    trained = _plain(
        trainer,
        hparams,
        lambda m: torch.optim.Adam(m.parameters(), 0.02),
        started=start,
        after_step=lambda m: kept[0].update_parameters(m),
    )
    average = kept[0].module
    weights = trainer.weights(population, 0)
    # buffers as they stand after the last step: AveragedModel copies them along
    _assert_same(weights, average)
    apart = max(
        float((population.params[name][0] - value).abs().max()) for name, value in weights.items()
        if name in population.params
    )  # fmt: skip
    assert (apart > 1e-3) == (decay > 0)
    for name, parameter in trained.named_parameters():  # the average has no say in training
        torch.testing.assert_close(population.params[name][0], parameter.detach(), rtol=1e-9, atol=1e-10)
    measured = base.evaluate(task, average, trainer.data.valid)
    for name, value in measured.items():
        assert reports[-1].metrics[f"valid/{name}"] == pytest.approx(value, rel=1e-9)
    if decay == 0.99:
        assert measured["loss"] != pytest.approx(
            base.evaluate(task, trained, trainer.data.valid)["loss"], rel=1e-3
        )


def test_an_average_of_frozen_weights_is_not_kept() -> None:
    task = _task()
    trainer = _trainer(task)
    hparams = _hparams(task, ema=True, ema_decay=0.5, freeze=("body.*",))
    population, _ = _train(trainer, hparams)
    assert {n.removeprefix("ema/") for n in population.slots if n.startswith("ema/")} == {
        "head.weight", "head.bias"
    }  # fmt: skip
    assert _moved(trainer, hparams, trainer.weights(population, 0)) == {"head.weight", "head.bias"}


# -- clipping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "value"), [(0.3, 0.1), (math.inf, 0.1), (0.3, math.inf), (1e3, 1e3)])
def test_clipping_by_value_and_norm(norm: float, value: float) -> None:
    task = _task()
    hparams = _hparams(task, optimizer="sgd", lr=0.1, grad_clip_norm=norm, grad_clip_value=value)
    norms: list[float] = []
    touched: list[bool] = []

    def clip(model: nn.Module) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(grads)))
        before = [grad.clone() for grad in grads]
        if math.isfinite(value):
            nn.utils.clip_grad_value_(model.parameters(), value)
        if math.isfinite(norm):
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        touched.append(any(not torch.equal(a, b) for a, b in zip(before, grads, strict=True)))

    trainer = _trainer(task)
    population, reports = _train(trainer, hparams)
    model = _plain(
        trainer, hparams, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), before_step=clip
    )
    _assert_same(trainer.weights(population, 0), model)
    steps = len(norms) // EPOCHS
    for epoch, report in enumerate(reports):
        of_epoch = slice(epoch * steps, (epoch + 1) * steps)
        assert report.metrics["train/grad_norm"] == pytest.approx(sum(norms[of_epoch]) / steps, rel=1e-9)
        assert report.metrics["train/clipped_share"] == pytest.approx(sum(touched[of_epoch]) / steps)
    if norm < 1:
        assert 0 < sum(touched) <= len(touched)


def test_the_norm_of_a_gradient_that_is_not_clipped_is_the_mean_of_a_few_steps() -> None:
    task = _task()
    hparams = _hparams(task, optimizer="sgd", lr=0.1)
    norms: list[float] = []

    def measure(model: nn.Module) -> None:
        norms.append(
            float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        )

    trainer = _trainer(task)
    _, reports = _train(trainer, hparams)
    _plain(
        trainer, hparams, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), before_step=measure
    )
    steps = len(norms) // EPOCHS
    assert steps > base.NORMS
    for epoch, report in enumerate(reports):
        chosen = [norms[epoch * steps + i] for i in range(steps) if base.norm_is_measured(i, steps)]
        assert len(chosen) == base.NORMS
        assert report.metrics["train/grad_norm"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-9)
        assert "train/clipped_share" not in report.metrics


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5, 7, 8, 100])
def test_the_steps_at_which_norms_are_measured_are_spread_evenly(batches: int) -> None:
    chosen = [i for i in range(batches) if base.norm_is_measured(i, batches)]
    assert len(chosen) == min(base.NORMS, batches)
    assert chosen[-1] == batches - 1
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


# -- the best epoch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"ema": True, "ema_decay": 0.8}, {"freeze": ("body.0.*",)}])
@pytest.mark.parametrize("objective", [VALID_LOSS, Objective(metric="valid/accuracy", direction="maximize")])
def test_the_best_epochs_weights_are_kept(objective: Objective, given: dict[str, Any]) -> None:
    """A rate too high to settle: some epoch in the middle is the best, and the last is not."""
    task = _task(NormNet)
    trainer = _trainer(task, torch.float32, keep=objective, epochs=10)
    hparams = _hparams(task, optimizer="sgd", lr=2.0, **given)
    population, reports = _train(trainer, hparams, epochs=10)
    scores = [report.metrics[objective.metric] for report in reports]
    best = scores.index((max if objective.direction == "maximize" else min)(scores))  # the first of equals
    assert population.best_epoch == [best + 1]
    assert population.best == [scores[best]]
    assert best + 1 < 10
    weights = trainer.weights(population, 0)
    model = trainer.load(hparams, TRIAL, weights)
    for part, rows in (("valid", trainer.data.valid), ("train", trainer.probe)):
        for name, value in base.evaluate(task, model, rows).items():
            assert reports[best].metrics[f"{part}/{name}"] == value
    # Training itself does not know of it, and a trial that ends there keeps the very same.
    last = _trainer(task, torch.float32, epochs=10)
    unkept, plain = _train(last, hparams, epochs=10)
    assert [r.metrics for r in plain] == [r.metrics for r in reports]
    stopped, _ = _train(last, hparams, epochs=best + 1)
    assert weights_sha256(last.weights(stopped, 0)) == weights_sha256(weights)
    assert weights_sha256(last.weights(unkept, 0)) != weights_sha256(weights)


# -- patience ------------------------------------------------------------------------------------------

PATIENT: dict[str, Any] = {
    "hparams": {"hidden_sizes": [8], "batch_size": 512, "ema": False},
    "space": {"lr": {"choice": [0.001, 0.3]}},
    "search": {"sampler": "grid", "round_size": 2},
    "objective": {"metric": "valid/loss", "direction": "minimize"},
    "trainer": {"epochs": 8, "patience": 2, "device": "cpu", "threads": 1, "engine": "loop"},
    "run": {"tensorboard": False, "checkpoint_every_seconds": 0},
    "executor": "inline",
}


def _patient_trials(path: Path) -> list[Any]:
    with Record(path / "run.db", readonly=True) as record:
        return record.in_order()


def test_patience_stops_a_trial_at_its_best(tmp_path: Path, run_quick: Callable[..., str]) -> None:
    run_quick(tmp_path / "run", raw=PATIENT)
    trials = _patient_trials(tmp_path / "run")
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert {trial.epoch < 8 for trial in trials} == {True, False}  # some stopped early, not all
    for trial in trials:
        losses = [report.metrics["valid/loss"] for report in trial.reports]
        best = losses.index(min(losses)) + 1
        assert trial.kept_epoch == best
        assert trial.epoch == min(8, best + 2)
        ages = [end - losses.index(min(losses[:end])) - 1 for end in range(1, len(losses))]
        assert all(age < 2 for age in ages)  # not an epoch too late
        assert trial.metrics["valid/loss"] == min(losses)


def test_patience_hands_out_the_best_epochs_weights(
    tmp_path: Path, run_quick: Callable[..., str], digits_task: Any
) -> None:
    """The file of the run, loaded into a model, scores what the record says of the kept epoch."""
    run_quick(tmp_path / "run", raw=PATIENT)
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        best = min(record.in_order(), key=lambda trial: trial.metrics["valid/loss"])
        file = record.state_files["best"][-1]
    weights, meta = load(tmp_path / "run" / "checkpoints" / file.name, file.sha256)
    assert meta == {"trial": best.number}
    assert weights_sha256(weights) == best.weights_sha256
    checked = session.check(recipe.build(PATIENT, source="test"), digits_task, source="test")
    trainer = LoopTrainer(
        digits_task,
        digits_task.data().to(CPU, torch.float32),
        device=CPU,
        dtype=torch.float32,
        seed=0,
        epochs=8,
    )
    model = trainer.load({**checked.hparams, **best.hparams}, best.number, weights)
    measured = base.evaluate(digits_task, model, trainer.data.valid)
    assert measured["loss"] == best.metrics["valid/loss"]


@pytest.mark.slow
def test_patience_and_a_power_cut_anywhere(
    tmp_path: Path, run_quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", raw=PATIENT)
    steps = switch.count
    assert steps > 30
    for step in range(1, steps + 1, 15):
        for after in (False, True):
            path = tmp_path / f"{step}-{after}"
            switch.arm(step, after)
            with pytest.raises(Killed):
                run_quick(path, raw=PATIENT)
            switch.arm(-1, after)
            assert run_quick(path, raw=PATIENT) == expected, (step, after)


def test_patience_and_one_power_cut(
    tmp_path: Path, run_quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the best epoch of the last trial and the end of its patience: the best must outlive the cut."""
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", raw=PATIENT)
    switch.arm(switch.count - 6, True)
    with pytest.raises(Killed):
        run_quick(tmp_path / "cut", raw=PATIENT)
    cut = _patient_trials(tmp_path / "cut")[-1]
    assert cut.state is TrialState.RUNNING
    switch.arm(-1, True)
    assert run_quick(tmp_path / "cut", raw=PATIENT) == expected
    ended = _patient_trials(tmp_path / "cut")[-1]
    assert ended.kept_epoch <= cut.epoch < ended.epoch


# -- autocast ------------------------------------------------------------------------------------------


def _images() -> Data:
    draw = generator(0, "autocast-images")
    x = draw.normal(size=(120, 1, 8, 8))
    return split(x, (x[:, 0, :, :4].mean((1, 2)) > x[:, 0, :, 4:].mean((1, 2))).astype("int64"))


def _sequences() -> Data:
    draw = generator(0, "autocast-sequences")
    x = draw.normal(size=(120, 5, 2))
    return split(x, (x[:, -1, 0] > 0).astype("int64"))


@pytest.mark.parametrize(
    ("model", "data", "given"),
    [
        (MLP, _data, {"hidden_sizes": (16,), "batch_norm": True, "dropout": 0.1}),
        (MLP, _data, {"hidden_sizes": (16,), "loss": "bce", "label_smoothing": 0.1}),
        (MLP, _data, {"hidden_sizes": (16,), "class_weights": "balanced", "label_smoothing": 0.1}),
        (CNN, _images, {"channels": (4,), "augment": True, "crop_padding": 1.0}),
        (RNN, _sequences, {"cell": "gru", "hidden_size": 8}),
        (RNN, _sequences, {"cell": "lstm", "hidden_size": 8, "num_layers": 2, "bidirectional": True}),
        (RNN, _sequences, {"cell": "rnn", "hidden_size": 8}),
    ],
)
def test_autocast_stays_near_float32(model: Any, data: Callable[[], Data], given: dict[str, Any]) -> None:
    task = Classification(model, data())
    ends = []
    for autocast in (None, torch.bfloat16):
        trainer = _trainer(task, torch.float32, autocast=autocast)
        population, reports = _train(trainer, _hparams(task, lr=0.01, ema=True, ema_decay=0.5, **given))
        assert all(tensor.dtype == torch.float32 for tensor in population.params.values())
        assert all(tensor.dtype == torch.float32 for tensor in population.slots.values())
        ends.append((trainer.weights(population, 0), reports[-1].metrics))
    assert ends[0][1] != ends[1][1]  # it did something
    assert ends[1][1]["valid/loss"] == pytest.approx(ends[0][1]["valid/loss"], rel=0.1)
    for name, value in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], value, rtol=0.2, atol=0.08)


def test_autocast_computes_matrix_products_in_bfloat16() -> None:
    seen: set[tuple[bool, torch.dtype]] = set()

    class Spy(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            seen.add((self.training, logits.dtype))
            return logits

    task = _task(Spy)
    _train(_trainer(task, torch.float32, autocast=torch.bfloat16), _hparams(task), epochs=1)
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


# -- all together --------------------------------------------------------------------------------------


def _everything(population: Population, i: int) -> str:
    groups = population.member(i)
    return weights_sha256({f"{g}/{n}": t for g in groups for n, t in groups[g].items()})


ALL = {
    "dropout": 0.2,
    "batch_norm": True,
    "hidden_sizes": (8,),
    "ema": True,
    "ema_decay": 0.8,
    "schedule": "cosine",
    "warmup_epochs": 0.5,
    "accumulation_steps": 3,
    "grad_clip_norm": 0.5,
    "lr": 0.05,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{}, {"optimizer": "sgd", "nesterov": True, "l1": 1e-3, "head": ("layers.5.*",)}]
)
def test_stopped_after_any_step_and_continued_is_bit_equal(given: dict[str, Any]) -> None:
    task = _task(MLP)
    values = [
        _hparams(task, **ALL, **given),
        _hparams(task, **{**ALL, **given, "lr": 3.0, "ema_decay": 0.0, "cosine_min": 1.0}),
    ]

    # The epoch with the largest loss, so that it is an early one, and its copy has to last.
    worst = Objective(metric="valid/loss", direction="maximize")

    def trainer() -> LoopTrainer:
        return _trainer(task, torch.float32, keep=worst)

    whole_trainer = trainer()
    whole = whole_trainer.init([0, 1], values)
    expected = whole_trainer.train(whole, EPOCHS, should_pause=never).reports
    assert any(epoch < EPOCHS for epoch in whole.best_epoch)
    for stop_after in (1, 2, 3, 4, 5, 6, 7, 11, 19, 29):
        mine, taken, reports = trainer(), 0, []

        def stop() -> bool:
            nonlocal taken
            taken += 1
            return taken % stop_after == 0  # noqa: B023

        population = mine.init([0, 1], values)
        while True:
            result = mine.train(population, EPOCHS, should_pause=stop)
            reports += result.reports
            if not result.paused:
                break
            tensors, meta = population.state()
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            mine = trainer()
            population = mine.init([0, 1], values)
            population.restore(tensors, meta)
        assert population.best_epoch == whole.best_epoch
        for i in range(2):
            assert _everything(population, i) == _everything(whole, i), stop_after
            assert weights_sha256(mine.weights(population, i)) == weights_sha256(
                whole_trainer.weights(whole, i)
            )
        assert sorted((r.trial, r.epoch, tuple(r.metrics.items())) for r in reports) == sorted(
            (r.trial, r.epoch, tuple(r.metrics.items())) for r in expected
        )


def test_company_changes_no_bit_with_every_option_on() -> None:
    task = _task(MLP)
    trainer = _trainer(task, torch.float32, keep=VALID_LOSS)
    values = [_hparams(task, **{**ALL, "lr": lr}) for lr in (0.5, 0.05, 0.005)]
    together = trainer.init([5, 6, 7], values)
    trainer.train(together, EPOCHS, should_pause=never)
    for i in range(3):
        alone = trainer.init([5 + i], [values[i]])
        trainer.train(alone, EPOCHS, should_pause=never)
        assert _everything(alone, 0) == _everything(together, i)


def test_schedules_go_on_through_epochs_trained_one_at_a_time() -> None:
    """The tuner asks for one epoch after another; the schedule knows the whole."""
    task = _task()
    trainer, hparams = _trainer(task), _hparams(task, schedule="one_cycle", lr=0.05)
    whole, _ = _train(trainer, hparams)
    parts = trainer.init([TRIAL], [hparams])
    for before, until in pairwise(range(EPOCHS + 1)):
        assert parts.epoch == [before]
        trainer.train(parts, until, should_pause=never)
    assert _everything(parts, 0) == _everything(whole, 0)
