"""Traced programs: the same bits as the mapped function, for every model; what cannot be traced is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from test_trainers_fused import CASES, CPU, _same_bits, _task, _train, _varied, never
from torch import Tensor, nn

from hpt_torch.data.folds import folds
from hpt_torch.tasks import Classification
from hpt_torch.trainers import programs, traced
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.trainers.programs import Program
from hpt_torch.trainers.traced import trace
from hpt_torch.types import Folding


@pytest.mark.parametrize("name", CASES)
def test_traced_steps_give_the_bits_of_mapped_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five members that differ in everything dynamic, with clipping, an average of weights and split batches;
    in float32, where any other order of operations would show."""
    task = _task(name)
    values = _varied(task, name, 5, ema=True, accumulation_steps=2, optimizer="adamw")
    trials = list(range(5))
    monkeypatch.setattr(programs, "TRACE_FROM", 10**9)
    mapped, _, _ = _train(FusedTrainer, task, trials, values, torch.float32)
    monkeypatch.setattr(programs, "TRACE_FROM", 0)
    replayed, _, trainer = _train(FusedTrainer, task, trials, values, torch.float32)
    assert trainer.programs.of("step")
    assert trainer.programs.of("evaluate")
    assert all(program.traced for what in ("step", "evaluate") for program in trainer.programs.of(what))
    assert all(_same_bits(mapped, i, replayed, i) for i in trials)


@pytest.mark.parametrize("name", CASES)
def test_traced_steps_of_the_loop_give_the_bits_of_plain_autograd(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _task(name)
    values = _varied(task, name, 2, ema=True, accumulation_steps=2, optimizer="adamw")
    monkeypatch.setattr(programs, "TRACE_FROM", 10**9)
    plain, reports, _ = _train(LoopTrainer, task, [0, 1], values, torch.float32)
    monkeypatch.setattr(programs, "TRACE_FROM", 0)
    replayed, same, trainer = _train(LoopTrainer, task, [0, 1], values, torch.float32)
    assert trainer.module_programs.of("step")
    assert all(program.traced for program in trainer.module_programs.of("step"))
    assert all(_same_bits(plain, i, replayed, i) for i in (0, 1))
    assert same == reports
    assert [len(reports[i]) for i in (0, 1)] == [3, 3]


class _Branching(nn.Module):
    """Whether it negates depends on its input: what was recorded for one batch is wrong for another."""

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(*input_shape, out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return -y if x.mean() > 0 else y


class _Drawing(_Branching):
    """Draws random numbers of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x + 0.1 * torch.randn_like(x))
        return y


class _Remembering(_Branching):
    """Changes what it does when it has been called often."""

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__(input_shape, out_features)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        y: Tensor = self.linear(x) * (2.0 if self.calls > 20 else 1.0)
        return y


@pytest.mark.parametrize(
    ("model", "is_traced"), [(_Branching, False), (_Remembering, False), (_Drawing, True)]
)
def test_the_loop_traces_only_what_stays_the_same(
    model: type[nn.Module], is_traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Classification(model, CASES["mlp"][2]())
    defaults = {n: spec.default for n, spec in task.hparam_specs().items()}
    values = [defaults | {"batch_size": 16, "accumulation_steps": 2}]
    monkeypatch.setattr(programs, "TRACE_FROM", 10**9)
    plain, _, _ = _train(LoopTrainer, task, [0], values, torch.float32, epochs=5)
    monkeypatch.setattr(programs, "TRACE_FROM", 0)
    replayed, reports, trainer = _train(LoopTrainer, task, [0], values, torch.float32, epochs=5)
    assert len(reports[0]) == 5
    assert [program.traced for program in trainer.module_programs.of("step")] == [is_traced]
    assert _same_bits(plain, 0, replayed, 0)


def test_where_tracing_needs_too_much_memory_the_function_runs_itself() -> None:
    attempts = []

    def function(params: Tensor, buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers["mean"].add_(x.mean())
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("simulated")
        return params * x

    program, x, buffers = Program(), torch.ones(3), {"mean": torch.zeros(())}
    for step in range(1, 4):
        assert torch.equal(program(function, x, buffers, x), x)
        assert float(buffers["mean"]) == step
    assert not program.traced


def test_rows_and_views_that_are_taken_often_are_taken_once() -> None:
    calls = []

    def function(x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        total = x.new_zeros(4)
        for t in range(5):
            total = total + x[t] * x[t] + x[:, 1:][t, 0]
        buffers["last"].copy_(x[4])
        return total

    x, y = torch.randn(5, 4), torch.randn(5, 4)
    kept = traced._written_out
    try:
        traced._written_out = lambda c, *rest: calls.extend(c) or kept(c, *rest)  # type: ignore
        run, returned = trace(function, x, {"last": torch.zeros(4)})
    finally:
        traced._written_out = kept
    assert torch.equal(returned, function(x, {"last": torch.zeros(4)}))
    buffers, plain = {"last": torch.zeros(4)}, {"last": torch.zeros(4)}
    assert torch.equal(run(y, buffers), function(y, plain))
    assert torch.equal(buffers["last"], plain["last"])
    names = [call.op.__name__ for call in calls]
    assert names.count("unbind.int") == 2
    assert names.count("slice.Tensor") == 1


def test_a_program_serves_other_members_and_other_hyperparameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second program for a second group of the same signature, size and batch."""
    monkeypatch.setattr(programs, "TRACE_FROM", 0)
    task = _task("mlp")
    values = _varied(task, "mlp", 8, dropout=0.2)
    data = task.data().to(CPU, torch.float32)
    trainer = FusedTrainer(task, data, device=CPU, dtype=torch.float32, seed=3, epochs=2)
    for trials in ([0, 1, 2, 3], [4, 5, 6, 7]):
        population = trainer.init(trials, [values[i] for i in trials])
        trainer.train(population, 2, should_pause=never)
        fresh, _, _ = _train(FusedTrainer, task, trials, [values[i] for i in trials], torch.float32, epochs=2)
        assert all(_same_bits(population, i, fresh, i) for i in range(4))
    assert len(trainer.programs.of("step")) == 1


def test_trainers_of_other_rows_share_their_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the folds do: of the second one nothing is traced, and its bits are those of its own."""
    monkeypatch.setattr(programs, "TRACE_FROM", 0)
    task = _task("mlp")
    values = _varied(task, "mlp", 4, dropout=0.2)
    kept = programs.Programs()
    options: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "seed": 3, "epochs": 2}
    for fold in folds(task.data(), Folding(folds=2), seed=0):
        pair = []
        for shared in (kept, None):
            trainer = FusedTrainer(task, fold.to(CPU, torch.float32), programs=shared, **options)
            population = trainer.init([0, 1, 2, 3], values)
            trainer.train(population, 2, should_pause=never)
            pair.append(population)
        assert all(_same_bits(pair[0], i, pair[1], i) for i in range(4))
    assert len(kept.of("step")) == 1


class _Counting(Classification):
    """Its loss depends on how often it was called, which a traced program cannot know."""

    calls = 0

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
        self.calls += 1
        return super().loss(model, batch, hparams) * (1.0 + self.calls)


def test_code_that_changes_between_calls_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "TRACE_FROM", 0)
    _, model, data, _ = CASES["mlp"]
    task = _Counting(model, data())
    _, _, trainer = _train(FusedTrainer, task, [0, 1], _varied(task, "mlp", 2))
    assert [program.traced for program in trainer.programs.of("step")] == [False]
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


def _same_at_every_call(function: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that the program of a function ``(x (3, 4), buffers, h (3,))`` runs, once it has given
    what the function gives for other tensors."""
    written: list[str] = []
    kept = traced._written_out

    def listen(calls: Any, *rest: Any) -> Any:
        written.extend(call.op.__name__ for call in calls)
        return kept(calls, *rest)

    monkeypatch.setattr(traced, "_written_out", listen)
    h = torch.rand(3)
    run, _ = trace(function, torch.randn(3, 4), {"sum": torch.zeros(4)}, h, steady=[h])
    for seed in range(3):
        x, there, here = torch.randn(3, 4), torch.zeros(4), torch.zeros(4)
        torch.manual_seed(seed)
        expected = function(x, {"sum": there}, h)
        torch.manual_seed(seed)
        assert torch.equal(run(x, {"sum": here}, h), expected)
        assert torch.equal(here, there)
    return written


def test_what_is_computed_alike_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, buffers: dict[str, Tensor], h: Tensor) -> Tensor:
        return x.exp().mean(0) + x.exp().mean(0) * h.sum()

    names = _same_at_every_call(function, monkeypatch)
    assert names.count("exp.default") == names.count("mean.dim") == 1


def test_what_only_looks_alike_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, buffers: dict[str, Tensor], h: Tensor) -> Tensor:
        before = buffers["sum"].exp()
        buffers["sum"].add_(x.sum(0))
        written = buffers["sum"].exp()  # of what was written into meanwhile
        whole = torch.ones(4, dtype=torch.int64) + x.argmax(0)
        numbers = whole.mul(2) + whole.mul(2.0)  # an integer, and a float
        drawn = torch.rand_like(x)[0] + torch.rand_like(x)[0]
        left, right = x.abs(), x.abs()
        left.mul_(2)
        return before + 3 * written + numbers + drawn + left[0] + right[1]

    names = _same_at_every_call(function, monkeypatch)
    for name, count in (("exp.default", 2), ("mul.Tensor", 3), ("rand_like.default", 2), ("abs.default", 2)):
        assert names.count(name) == count, name


def test_what_depends_on_steady_tensors_alone_is_computed_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def function(x: Tensor, buffers: dict[str, Tensor], h: Tensor) -> Tensor:
        return x * h.exp().view(3, 1)

    done: list[int] = []
    kept = traced._written_out

    def counted(calls: Any, *rest: Any) -> Any:
        run = kept(calls, *rest)
        computes = [call.op.__name__ for call in calls].count("exp.default")
        return lambda *arguments: done.extend([1] * computes) or run(*arguments)

    monkeypatch.setattr(traced, "_written_out", counted)
    h = torch.rand(3)
    run, _ = trace(function, torch.ones(3, 4), {}, h, steady=[h])

    def right(h: Tensor, times: int) -> bool:
        x = torch.randn(3, 4)
        return torch.equal(run(x, {}, h), function(x, {}, h)) and len(done) == times

    assert right(h, 1)
    assert right(h, 1)
    h.add_(1)  # into the same tensor
    assert right(h, 2)
    other = h.clone()  # of the same version, in its place
    other.mul_(2)
    assert right(other, 3)
    assert right(other, 3)


def test_a_steady_tensor_that_the_function_writes_into_is_not_taken_for_steady() -> None:
    def function(x: Tensor, buffers: dict[str, Tensor], h: Tensor) -> Tensor:
        value = h.exp()
        h.mul_(0.5)
        return x * (value + h.exp()).sum()

    h, plain, x = torch.ones(3), torch.ones(3), torch.ones(4)
    run, returned = trace(function, x, {}, h, steady=[h])
    assert torch.equal(returned, function(x, {}, plain))
    for _ in range(3):
        assert torch.equal(run(x, {}, h), function(x, {}, plain))
        assert torch.equal(h, plain)
