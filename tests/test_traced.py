"""Traced programs: the same bits as the mapped function, for every model; what cannot be traced is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_trainers_fused import CASES, CPU, _same_bits, _task, _train, _varied, never
from torch import Tensor, nn

from hpt_torch.tasks import Classification
from hpt_torch.trainers import fused
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.traced import Program


@pytest.mark.parametrize("name", CASES)
def test_traced_steps_give_the_bits_of_mapped_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five members that differ in everything dynamic, with clipping, an average of weights and split batches;
    in float32, where any other order of operations would show."""
    task = _task(name)
    values = _varied(task, name, 5, ema=True, accumulation_steps=2, optimizer="adamw")
    trials = list(range(5))
    monkeypatch.setattr(fused, "_TRACE_FROM", 10**9)
    mapped, _, _ = _train(FusedTrainer, task, trials, values, torch.float32)
    monkeypatch.setattr(fused, "_TRACE_FROM", 0)
    traced, _, trainer = _train(FusedTrainer, task, trials, values, torch.float32)
    assert isinstance(trainer, FusedTrainer)
    assert trainer.programs("step")
    assert trainer.programs("evaluate")
    assert all(program.traced for what in ("step", "evaluate") for program in trainer.programs(what))
    assert all(_same_bits(mapped, i, traced, i) for i in trials)


def test_a_program_serves_other_members_and_other_hyperparameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second program for a second group of the same signature, size and batch."""
    monkeypatch.setattr(fused, "_TRACE_FROM", 0)
    task = _task("mlp")
    values = _varied(task, "mlp", 8, dropout=0.2)
    data = task.data().to(CPU, torch.float32)
    trainer = FusedTrainer(task, data, device=CPU, dtype=torch.float32, seed=3, epochs=2)
    for trials in ([0, 1, 2, 3], [4, 5, 6, 7]):
        population = trainer.init(trials, [values[i] for i in trials])
        trainer.train(population, 2, should_pause=never)
        fresh, _, _ = _train(FusedTrainer, task, trials, [values[i] for i in trials], torch.float32, epochs=2)
        assert all(_same_bits(population, i, fresh, i) for i in range(4))
    assert len(trainer.programs("step")) == 1


class _Counting(Classification):
    """Its loss depends on how often it was called, which a traced program cannot know."""

    calls = 0

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        self.calls += 1
        return super().loss(model, batch, hparams) * (1.0 + self.calls)


def test_code_that_changes_between_calls_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_TRACE_FROM", 0)
    _, model, data, _ = CASES["mlp"]
    task = _Counting(model, data())
    _, _, trainer = _train(FusedTrainer, task, [0, 1], _varied(task, "mlp", 2))
    assert isinstance(trainer, FusedTrainer)
    assert [program.traced for program in trainer.programs("step")] == [False]
    assert task.calls > 10  # it was called at every step


def test_the_program_and_the_function_agree_on_what_they_write() -> None:
    def function(params: Tensor, buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers["mean"].mul_(0.5).add_(x.mean())
        same = x.float().reshape(3, 2).expand(3, 2)  # views that may be the tensor itself
        return params * same.transpose(0, 1).transpose(0, 1)

    program, x = Program(), torch.randn(3, 2)
    buffers, plain = {"mean": torch.zeros(())}, {"mean": torch.zeros(())}
    for step in range(5):
        assert torch.equal(program(function, x, buffers, x + step), function(x, plain, x + step))
        assert torch.equal(buffers["mean"], plain["mean"])
    assert program.traced
