"""The compiled trainer: equal to the loop, compiled once, found on disk, and refused where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, Impatient
from test_trainers_fused import (
    CASES,
    CPU,
    _close,
    _flat,
    _same_bits,
    _task,
    _tensors,
    _train,
    _varied,
    never,
)
from torch import Tensor, nn

from hpt_torch import recipe as recipes
from hpt_torch import session
from hpt_torch.checkpoint import weights_sha256
from hpt_torch.models import MLP
from hpt_torch.record import Record
from hpt_torch.task import Task
from hpt_torch.tasks import Classification, Supervised
from hpt_torch.trainers import inductor, traced
from hpt_torch.trainers.compiled import CompiledTrainer
from hpt_torch.trainers.costs import Costs
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import Interrupted, RecipeError, RunMismatchError

pytestmark = pytest.mark.skipif(
    inductor.missing("cpu") is not None, reason=f"nothing can be compiled here: {inductor.missing('cpu')}"
)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[traced.Flat]:
    """What has been compiled, in order."""
    done: list[traced.Flat] = []
    real = inductor.compiled

    def compiled(recorded: traced.Flat) -> Callable[..., Any]:
        done.append(recorded)
        return real(recorded)

    monkeypatch.setattr(inductor, "compiled", compiled)
    return done


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph that the compiler gets, run as it is."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graph)


def _trainer(task: Supervised, dtype: torch.dtype = torch.float64, epochs: int = 3) -> CompiledTrainer:
    return CompiledTrainer(
        task, task.data().to(CPU, dtype), device=CPU, dtype=dtype, seed=3, epochs=epochs, keep=task.objective
    )


# -- the same numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_compiled_equals_the_loop(name: str, compilations: list[traced.Flat]) -> None:
    """Float64, every dynamic hyperparameter differing: weights, buffers, moments, kept weights, metrics."""
    _equal_to_the_loop(_task(name), _varied(_task(name), name, 5, schedule="cosine"))
    assert len(compilations) == 1


@pytest.mark.parametrize("name", CASES)
def test_what_is_handed_to_the_compiler_equals_the_loop(name: str, uncompiled: None) -> None:
    """To compile all of them takes minutes (test_gpu.py does)."""
    _equal_to_the_loop(_task(name), _varied(_task(name), name, 5, schedule="cosine"))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer(optimizer: str, uncompiled: None) -> None:
    task, name = _task("mlp"), "mlp"
    more = {"nesterov": True, "accumulation_steps": 3, "ema": True}
    _equal_to_the_loop(task, _varied(task, name, 3, optimizer=optimizer, **more))


def _equal_to_the_loop(task: Supervised, values: list[dict[str, Any]]) -> None:
    trials = list(range(len(values)))
    loop, expected, _ = _train(LoopTrainer, task, trials, values, keep=True)
    mine, got, _ = _train(CompiledTrainer, task, trials, values, keep=True)
    for i in trials:
        _close(loop, i, mine, i, 1e-9)
        for a, b in zip(expected[i], got[i], strict=True):
            assert b == pytest.approx(a, rel=1e-8, abs=1e-8)


@pytest.mark.slow
def test_members_that_leave_change_nothing_of_the_others(compilations: list[traced.Flat]) -> None:
    """Of 6 members one leaves after an epoch (5 go on in the places of 6), three more after the next (2 in
    the places of 3): two programs, and everybody as in the loop."""
    task = _task("linear")
    values = _varied(task, "linear", 6)
    trainer = _trainer(task)
    population = trainer.init(list(range(6)), values)
    for epoch, leaving in ((1, [2]), (2, [0, 3, 5]), (3, [])):
        trainer.train(population, epoch, should_pause=never)
        for i in leaving:
            population.active[i] = False
    assert len(compilations) == 2
    loop, _, _ = _train(LoopTrainer, task, list(range(6)), values, keep=True)
    for i in (1, 4):
        _close(loop, i, population, i, 1e-9)
    assert population.epoch == [2, 3, 1, 2, 3, 2]


@pytest.mark.parametrize("cudnn", [False, True])
def test_batch_norm_writes_its_running_statistics(cudnn: bool) -> None:
    """That its schema does not say so must not get them lost. cudnn: the operation is called as on CUDA."""

    def step(mean: dict[str, Tensor], var: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = nn.functional.batch_norm(x, mean["m"], var["v"], training=True, momentum=0.1)
        return y

    def arguments() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        x = torch.arange(40, dtype=torch.float64).view(10, 4).cos()
        return {"m": torch.zeros(4, dtype=torch.float64)}, {"v": torch.ones(4, dtype=torch.float64)}, x

    recorded, _ = traced.record(step, *arguments())
    assert recorded is not None
    assert [call.op for call in recorded.calls] == [torch.ops.aten.native_batch_norm.default]
    if cudnn:
        recorded.calls[0].op = torch.ops.aten.cudnn_batch_norm.default
        recorded.calls[0].outputs.append(torch.empty(0, dtype=torch.uint8))
    plain, mine = arguments(), arguments()
    torch.testing.assert_close(inductor.compiled(recorded)(*mine), step(*plain), rtol=1e-12, atol=1e-12)
    assert mine[0]["m"].abs().min() > 0
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


# -- one program a signature ---------------------------------------------------------------------------


@pytest.mark.slow
def test_other_hyperparameters_compile_nothing(compilations: list[traced.Flat]) -> None:
    """As Population Based Training changes them, between epochs."""
    task = _task("linear")
    values = _varied(task, "linear", 3)
    trainer, loop = _trainer(task), LoopTrainer(
        task, task.data().to(CPU, torch.float64), device=CPU, dtype=torch.float64, seed=3, epochs=3,
        keep=task.objective,
    )  # fmt: skip
    both = [kind.init([0, 1, 2], values) for kind in (trainer, loop)]
    for epoch in (1, 2, 3):
        for kind, population in zip((trainer, loop), both, strict=True):
            kind.train(population, epoch, should_pause=never)
            population.hparams = [
                {**h, "lr": 1.2 * float(str(h["lr"])), "beta1": 0.8, "weight_decay": 0.1 * epoch}
                for h in population.hparams
            ]
    assert len(compilations) == 1
    for i in range(3):
        _close(both[1], i, both[0], i, 1e-9)


@pytest.mark.slow
def test_stopped_after_any_step_and_continued_is_bit_equal() -> None:
    task = _task("linear")
    values = _varied(task, "linear", 3, ema=True, schedule="one_cycle")
    whole, expected, _ = _train(CompiledTrainer, task, [0, 1, 2], values, torch.float32, keep=True)
    taken, reports, state, sessions = 0, dict[int, list[dict[str, float]]](), None, 0
    trainer = _trainer(task, torch.float32)

    def stop() -> bool:
        nonlocal taken
        taken += 1
        return taken % 3 == 0

    while True:
        sessions += 1
        population = trainer.init([0, 1, 2], values)
        if state is not None:
            population.restore(*state)
        result = trainer.train(population, 3, should_pause=stop)
        for report in result.reports:
            reports.setdefault(report.trial, []).append(dict(report.metrics))
        if not result.paused:
            break
        tensors, meta = population.state()
        state = {n: t.clone() for n, t in tensors.items()}, meta
    assert sessions == 5
    assert all(_same_bits(whole, i, population, i) for i in range(3))
    assert reports == expected


_PROGRAM = """
import sys
import torch
from torch._dynamo.utils import counters
sys.path.insert(0, sys.argv[1])
from test_trainers_fused import _hparams, _task, _train
from hpt_torch.trainers.compiled import CompiledTrainer
task = _task("linear")
_train(CompiledTrainer, task, [0, 1], [_hparams(task, "linear"), _hparams(task, "linear", lr=0.1)])
print(*(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("bypass", "hit", "miss")))
"""


@pytest.mark.slow
def test_the_next_process_finds_the_program_on_disk(tmp_path: Path) -> None:
    def counts(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).parent)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert counts("1") == "0 0 1"
    assert counts("2") == "0 1 0"


# -- what cannot be compiled ---------------------------------------------------------------------------


class _Reading(nn.Module):
    """Maps, but reads the value of a tensor at each step."""

    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(input_shape[0], out_features), 0
        self.sign = [torch.ones(())]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if float(self.sign[0]) > 0 else -y


class _Counting(_Reading):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x)
        return y / self.calls


@pytest.mark.parametrize(
    ("model", "reason"), [(_Reading, "reads the values"), (_Counting, "changes what the model"), (MLP, None)]
)
def test_what_cannot_be_recorded_is_found_before_training(model: Any, reason: str | None) -> None:
    task = Classification(model, _flat())
    hparams = {n: spec.default for n, spec in task.hparam_specs().items()}
    trainer = _trainer(task)
    population = trainer.init([0, 1], [hparams, hparams])
    before = [weights_sha256(_tensors(population, i)) for i in range(2)]
    found = trainer.why_not(population)
    assert (found is None) if reason is None else (found is not None and reason in found)
    assert [weights_sha256(_tensors(population, i)) for i in range(2)] == before


def _chunks(run: Path) -> list[dict[str, Any]]:
    with Record(run / "run.db", readonly=True) as record:
        return [chunk for plan in record.of_kind("plan") for chunk in plan.body["chunks"]]


def _raw(engine: str, **trainer: Any) -> dict[str, Any]:
    space = {n: v for n, v in QUICK["space"].items() if n != "activation"}
    search = {"sampler": "random", "trials": 4, "round_size": 4}
    task = {"kind": "classification", "model": "linear", "data": "digits"}
    trainer = {**QUICK["trainer"], "engine": engine, **trainer}
    return {
        **QUICK, "task": task, "hparams": {"batch_size": 256}, "space": {"lr": space["lr"]},
        "search": search, "trainer": trainer,
    }  # fmt: skip


@pytest.fixture
def linear(digits_task: Supervised) -> Task:
    from hpt_torch.models import Linear

    return Classification(Linear, digits_task.data())


def test_without_a_compiler_a_recipe_that_asks_for_one_is_refused(
    linear: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "missing", lambda device: f"torch.compile lacks what {device} needs")
    raw = _raw("compiled")
    with pytest.raises(RecipeError, match=r"trainer.engine: .*lacks what cpu needs"):
        session.check(recipes.build(raw, source="test"), linear, source="test")
    session.check(recipes.build(_raw("auto"), source="test"), linear, source="test")


def test_a_task_that_cannot_be_recorded_trains_fused_and_says_why(
    digits_task: Supervised, run_quick: Callable[..., str], tmp_path: Path
) -> None:
    run_quick(tmp_path / "run", raw=_raw("compiled"), task=Classification(_Reading, digits_task.data()))
    assert {(c["engine"], c["why"]) for c in _chunks(tmp_path / "run")} == {
        (
            "fused",
            "2 trials of one signature; not compiled: its step reads the values of tensors, which a compiled "
            "one cannot",
        )
    }


# -- a run ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_compiles_where_the_table_says_that_it_pays(
    linear: Task, run_quick: Callable[..., str], tmp_path: Path
) -> None:
    """20 epochs of 4 batches are 80 steps; 2 members pay after 70."""
    costs = Costs(ratios={}, pays_after={"cpu": {"dense": {2: 70.0}}}).as_recorded("cpu")

    def engines(name: str, *overrides: str, **trainer: Any) -> set[tuple[str, str]]:
        path = tmp_path / name
        run_quick(path, *overrides, raw=_raw("auto", **trainer), task=linear, costs=costs)
        return {(chunk["engine"], chunk["why"]) for chunk in _chunks(path)}

    why = "2 trials of 80 steps: compiling pays after 70"
    assert engines("long", epochs=20) == {("compiled", why)}
    assert engines("again", epochs=20) == {("compiled", why)}
    fused = {("fused", "2 trials of one signature")}
    assert engines("short", epochs=17) == fused
    more = ("search.trials=10", "search.round_size=4")  # the last 2 are no such round
    already = ("compiled", "2 trials of one signature, whose step is compiled already")
    both = {("compiled", "2 trials of 36 steps, in 2 rounds: compiling pays after 70"), already}
    assert engines("rounds", *more, epochs=9) == both
    folds = {("compiled", "2 trials of 36 steps, in 4 groups: compiling pays after 70")}
    assert engines("folds", "evaluation.folds=2", epochs=9) == folds
    sizes = ("space.batch_size={choice = [256, 255]}", "hparams={}")
    assert "compiled" not in {engine for engine, _ in engines("static", *more, *sizes, epochs=9)}
    assert engines("patient", epochs=20, patience=30) == fused
    assert engines("pruned", "scheduler.kind=median", epochs=20) == fused
    population = ("scheduler.kind=pbt", "scheduler.interval_epochs=5")
    assert engines("population", *population, epochs=20) == {("compiled", why), already}
    regrouped = ("space.batch_size={choice = [256, 255]}", "hparams={}")
    assert "compiled" not in {
        engine for engine, _ in engines("regrouped", *population, *regrouped, epochs=20)
    }


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_a_compiled_run_is_the_same_twice_and_in_workers(
    linear: Task, run_quick: Callable[..., str], tmp_path: Path, executor: str
) -> None:
    raw = _raw("compiled", epochs=3)
    first = run_quick(tmp_path / "first", raw=raw, task=linear)
    assert {chunk["engine"] for chunk in _chunks(tmp_path / "first")} == {"compiled"}
    assert run_quick(tmp_path / "second", f"executor={executor}", raw=raw, task=linear) == first


@pytest.mark.slow
def test_a_run_that_was_planned_with_a_compiler_is_not_continued_without_one(
    linear: Task, run_quick: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Costs(ratios={}, pays_after={"cpu": {"dense": {2: 70.0}}}).as_recorded("cpu")
    more: dict[str, Any] = {"raw": _raw("auto", epochs=20), "task": linear, "costs": costs}
    whole = run_quick(tmp_path / "whole", **more)

    with pytest.raises(Interrupted):
        run_quick(tmp_path / "run", **more, observers=[Impatient()])
    with monkeypatch.context() as patch:
        patch.setattr(inductor, "missing", lambda device: f"torch.compile lacks what {device} needs")
        with pytest.raises(RunMismatchError, match="by compiled steps, and torch.compile lacks what cpu"):
            run_quick(tmp_path / "run", **more)
        assert run_quick(tmp_path / "whole", **more) == whole  # it has nothing left to train
    assert run_quick(tmp_path / "run", **more) == whole
