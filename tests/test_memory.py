"""The memory that trials may take: how it is measured, how it divides them, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import pytest
import torch
from test_trainers_fused import _hparams, _task

from hpt_torch import engines, limits
from hpt_torch.data import Rows
from hpt_torch.population import Population
from hpt_torch.record import Record
from hpt_torch.trainers import base
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.planner import Chunk, plan
from hpt_torch.trainers.stack import Stack
from hpt_torch.trainers.traced import computed_bytes


def test_what_a_function_computes_is_counted_once() -> None:
    given, buffer = torch.zeros(1000), torch.zeros(500)

    def function() -> None:
        first = given + 1  # 4000 bytes
        first.add_(1)
        first.view(10, 100).sum(0)  # 400 bytes
        buffer.mul_(2)  # what is there already

    assert computed_bytes(function) == 4400
    assert computed_bytes(lambda: given[:10]) == 0


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gru", "autoencoder"])
def test_a_few_rows_tell_what_a_whole_batch_takes(name: str, parts: int) -> None:
    task = _task(name)
    cpu = torch.device("cpu")
    data = task.data().to(cpu, torch.float32)
    trainer = FusedTrainer(task, data, device=cpu, dtype=torch.float32, seed=0, epochs=1)
    hparams = [_hparams(task, name, lr=lr, batch_size=30, accumulation_steps=parts) for lr in (0.1, 0.01)]
    population = trainer.init([0, 1], hparams)
    before = {n: t.clone() for n, t in population.params.items()}

    stack = Stack(trainer, population.copy(), [0, 1])
    stack.begin_epoch(0, 1)
    batch = data.train.slice(0, 30)
    step = computed_bytes(lambda: stack.step(batch, 0))
    valid = Rows(data.valid.slice(0, min(len(data.valid), base.EVALUATION_BATCH)))
    evaluation = computed_bytes(lambda: stack.evaluate(valid))
    state = sum(t.nbytes for _, tensors in population.stacks() for t in tensors.values())
    expected = (2 * state + max(step, evaluation)) / 2

    assert trainer.bytes_a_member(population, 0, {}) == pytest.approx(expected, rel=0.01)
    assert expected <= trainer.bytes_a_member(population, 1e12, {}) < 40 * expected
    assert all(torch.equal(t, before[n]) for n, t in population.params.items())

    # Of members that differ in batch size alone nothing more is measured, to the same result.
    known: dict[Hashable, int] = {}
    trainer.bytes_a_member(population, 0, known)
    larger = trainer.init([0, 1], [{**values, "batch_size": 40} for values in hparams])
    alone, count = trainer.bytes_a_member(larger, 0, {}), len(known)
    assert trainer.bytes_a_member(larger, 0, known) == alone != trainer.bytes_a_member(population, 0, {})
    assert len(known) == count


def _plan(count: int, holds: int | None, engine: str = "auto", why: str | None = None) -> list[Chunk]:
    asked: list[Sequence[int]] = []

    def told(trials: Sequence[int]) -> int | None:
        asked.append(trials)
        return holds

    chunks = plan(
        [(trial, "a") for trial in range(count)], engine=engine, device="cuda", slow=frozenset(),
        traits=lambda trial: frozenset(), why_not=lambda trials, engine: why, holds=told,
    )  # fmt: skip
    assert all(len(trials) > 1 for trials in asked)
    return chunks


def test_trials_are_divided_as_the_memory_holds_them() -> None:
    assert [len(c.trials) for c in _plan(10, None)] == [10]
    assert [len(c.trials) for c in _plan(10, 10)] == [10]
    pieces = _plan(10, 4)
    assert [c.trials for c in pieces] == [(6, 7, 8, 9), (0, 1, 2), (3, 4, 5)]
    assert {c.engine for c in pieces} == {"fused"}
    assert pieces[0].why == "4 trials of one signature; trainer.memory holds 4"
    for few in (0, 1):
        alone = _plan(3, few)
        assert [(c.trials, c.engine, c.why) for c in alone] == [
            ((trial,), "loop", "trainer.memory holds one") for trial in range(3)
        ]
    assert [(len(c.trials), c.engine) for c in _plan(3, 2)] == [(2, "fused"), (1, "loop")]
    assert {c.engine for c in _plan(3, 2, engine="loop")} == {"loop"}
    assert "cannot be mapped" in _plan(3, 2, why="it branches")[0].why


def _chunks(path: Path) -> list[list[int]]:
    with Record(path / "run.db", readonly=True) as record:
        return [[len(c["trials"]) for c in event.body["chunks"]] for event in record.of_kind("plan")]


def _memory(path: Path) -> int:
    with Record(path / "run.db", readonly=True) as record:
        found: int = record.of_kind("run")[0].body["costs"]["memory"]
    return found


def test_a_run_keeps_to_the_memory_that_it_began_with(
    tmp_path: Path, run_quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("activation=relu", "search.round_size=12", "trainer.epochs=1", "trainer.engine=fused")
    whole = json.loads(run_quick(tmp_path / "whole", *settings, "search.trials=12"))
    assert _chunks(tmp_path / "whole") == [[6, 6]]
    assert 0 < _memory(tmp_path / "whole") < (limits.memory_bytes() or 1e15)

    measured: list[int] = []
    exactly = FusedTrainer.bytes_a_member

    def noted(self: FusedTrainer, population: Population, few: float, known: dict[Hashable, int]) -> int:
        measured.append(exactly(self, population, few, known))
        return measured[-1]

    monkeypatch.setattr(FusedTrainer, "bytes_a_member", noted)
    run_quick(tmp_path / "measured", *settings, "search.trials=12", "trainer.memory=1kB")
    (each,) = set(measured)
    assert _chunks(tmp_path / "measured") == [[1] * 12]

    monkeypatch.setattr(limits, "free_bytes", lambda: 4 * 10 * each)
    monkeypatch.setattr(engines.processes, "cores", lambda: 10)
    divided = json.loads(run_quick(tmp_path / "divided", *settings, "search.trials=12"))
    assert _memory(tmp_path / "divided") == int(0.8 * 4 * each)
    assert _chunks(tmp_path / "divided") == [[3, 3, 3, 3]]
    assert [t["weights_sha256"] for t in divided["trials"]] == [t["weights_sha256"] for t in whole["trials"]]

    # The run goes on with the memory that it began with, and with what it has measured.
    monkeypatch.setattr(limits, "free_bytes", lambda: None)
    monkeypatch.setattr(FusedTrainer, "bytes_a_member", lambda self, population, few, known: 1)
    run_quick(tmp_path / "divided", *settings, "search.trials=24", reopen_holdout=True)
    assert _chunks(tmp_path / "divided") == [[3] * 4] * 2


def test_what_is_measured_is_kept_no_longer_than_its_plan(
    tmp_path: Path, run_quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on finds of earlier plans what they recorded, and nothing else."""
    given: list[dict[Hashable, int]] = []
    exactly = FusedTrainer.bytes_a_member

    def noted(self: FusedTrainer, population: Population, few: float, known: dict[Hashable, int]) -> int:
        given.append(known)
        return exactly(self, population, few, known)

    monkeypatch.setattr(FusedTrainer, "bytes_a_member", noted)
    space = ("activation=relu", "space.batch_size={choice=[64,96,128,192,256]}")
    settings = ("search.round_size=6", "search.trials=24", "trainer.epochs=1", "trainer.engine=fused")
    run_quick(tmp_path / "run", *space, *settings)
    plans = [id(known) for known in given]
    assert len(plans) > len(set(plans)) > 1, plans


def test_what_cannot_be_measured(
    tmp_path: Path, run_quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("activation=relu", "search.trials=4", "search.round_size=4", "trainer.engine=fused")
    for error, chunks in (
        (torch.OutOfMemoryError("full"), [1] * 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), [1] * 4),
        (RuntimeError("of the user's"), [2, 2]),  # which training will meet, or not
    ):

        def fails(self: FusedTrainer, *arguments: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(FusedTrainer, "bytes_a_member", fails)
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        run_quick(path, *settings)
        assert _chunks(path) == [chunks]
        if chunks == [1] * 4:
            run_quick(tmp_path / f"{path.name} of 0", *settings, "trainer.memory=1B")
            assert _chunks(tmp_path / f"{path.name} of 0") == [chunks]


def test_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = limits.free_bytes()
    if free is None:
        pytest.skip("this system does not tell")
    assert 0 < free <= (limits.memory_bytes() or 0)
    told = {"max": ["max", "9000"], "current": ["1", "5000"], "stat": ["", "anon 1\ninactive_file 300"]}
    monkeypatch.setattr(limits, "_cgroup", lambda name: told[name.removeprefix("memory.")])
    assert limits.free_bytes() == 4300
    monkeypatch.setattr(limits, "_cgroup", lambda name: [])
    assert limits.free_bytes() == pytest.approx(free, rel=0.5)
