"""The planner: which engine, and how trials are grouped; and the way back from a fused failure."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, Ear
from hypothesis import given
from hypothesis import strategies as st
from test_resume import PowerSwitch
from torch import nn

from hpt_torch import engines
from hpt_torch.models import MLP
from hpt_torch.population import Population
from hpt_torch.record import Record
from hpt_torch.tasks import Classification
from hpt_torch.trainers.costs import SHIPPED, Costs
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.planner import LARGEST, Chunk, plan
from hpt_torch.types import TrialState


def _plan(
    signatures: Sequence[str],
    engine: str = "auto",
    device: str = "cpu",
    traits: Sequence[str] = ("dense",),
    why: str | None = None,
    costs: Costs = SHIPPED, fits: int | None = None, steps: Callable[[int], int] = lambda trial: 1,
) -> list[Chunk]:  # fmt: skip
    return plan(
        list(enumerate(signatures)), engine=engine, device=device, slow=costs.slow_together(device),
        traits=lambda trial: frozenset(traits), why_not=lambda trials, engine: why, fits=fits, steps=steps,
    )  # fmt: skip


@given(
    signatures=st.lists(st.sampled_from("abc"), min_size=1, max_size=300),
    engine=st.sampled_from(["auto", "loop", "fused"]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_every_trial_is_in_one_chunk_of_its_own_signature(
    signatures: list[str], engine: str, device: str
) -> None:
    chunks = _plan(signatures, engine, device)
    assert sorted(trial for chunk in chunks for trial in chunk.trials) == list(range(len(signatures)))
    assert len({chunk.key for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        assert len({signatures[trial] for trial in chunk.trials}) == 1
        assert len(chunk.trials) <= (LARGEST["cpu"] if device == "cpu" else 64)
        assert chunk.engine == "fused" or len(chunk.trials) == 1
        assert chunk.engine == "loop" or len(chunk.trials) >= 2
    assert chunks == _plan(signatures, engine, device)


@pytest.mark.parametrize(("folds", "groups"), [(0, 4), (2, 4)])
def test_what_compiling_has_to_pay_for_is_told_of_all_groups_of_a_signature(folds: int, groups: int) -> None:
    asked: list[tuple[int, int]] = []

    def pays(trials: Sequence[int], groups: int) -> str | None:
        asked.append((len(trials), groups))
        return "it pays" if len(trials) > 2 else None

    chunks = plan(
        list(enumerate("a" * 32 + "bb")), engine="auto", device="cpu", slow=frozenset(),
        traits=lambda trial: frozenset(), why_not=lambda trials, engine: None, pays=pays, folds=folds,
    )  # fmt: skip
    parts = max(folds, 1)  # the same program trains them all
    assert asked == [(8 * parts, groups)] * (4 // parts) + [(2, parts)]
    assert {(len(c.trials), c.engine) for c in chunks} == {(8 * parts, "compiled"), (2, "fused")}


def test_what_decides() -> None:
    many = "a" * 3
    assert [c.engine for c in _plan("aa")] == ["fused"]
    assert [c.engine for c in _plan("aa", device="cuda")] == ["fused"]
    assert {c.engine for c in _plan(many, traits=["convolution"])} == {"loop"}
    assert [c.engine for c in _plan(many, traits=["convolution"], device="cuda")] == ["fused"]
    assert [c.engine for c in _plan("aa", engine="fused", traits=["lstm"])] == ["fused"]
    alone = _plan("ab", engine="fused")
    assert [(c.engine, c.why) for c in alone] == [("loop", "the only trial of its signature")] * 2
    (first, *_) = _plan(many, why="RuntimeError: no batching rule")
    assert (first.engine, first.why) == (
        "loop",
        "cannot be mapped over members: RuntimeError: no batching rule",
    )
    assert [len(c.trials) for c in _plan("a" * 130, device="cuda")] == [44, 43, 43]
    assert [len(c.trials) for c in _plan("a" * 200)] == [29, 29, 29, 29, 28, 28, 28]
    # A round of few signatures keeps several workers busy; one of many signatures does so as it is.
    assert [len(c.trials) for c in _plan("a" * 32)] == [8, 8, 8, 8]
    assert [len(c.trials) for c in _plan("a" * 9)] == [5, 4]
    assert [len(c.trials) for c in _plan("a" * 9, fits=3)] == [3, 3, 3]
    assert [(c.engine, len(c.trials)) for c in _plan("aa", fits=1)] == [("loop", 1)] * 2
    assert [len(c.trials) for c in _plan("a" * 4)] == [2, 2]
    assert [len(c.trials) for c in _plan("a" * 16 + "b" * 16)] == [8, 8, 8, 8]
    assert [len(c.trials) for c in _plan("a" * 27 + "b" * 27 + "c" * 27 + "d" * 27)] == [27] * 4
    # So does one in which one has most of the work: of trials, or of steps.
    assert [len(c.trials) for c in _plan("a" * 20 + "bcdefg" * 4)] == [10, 10, *[4] * 6]
    eights = _plan("a" * 16 + "b" * 16, steps=lambda trial: 1 if trial < 16 else 4)
    assert [(c.trials[0], len(c.trials)) for c in eights] == [(16, 8), (24, 8), (0, 16)]


def test_what_takes_longest_is_trained_first() -> None:
    found = _plan("abbbc", engine="loop", steps=lambda trial: (1, 5, 5, 5, 9)[trial])
    assert [chunk.trials for chunk in found] == [(4,), (1,), (2,), (3,), (0,)]
    assert [chunk.trials for chunk in _plan("abbbc", engine="fused")] == [(1, 2, 3), (0,), (4,)]


class _FailsLate(Classification):
    """A task whose loss raises at the fourth call: in the fused engine for all members at once."""

    calls = 0

    def loss(self, model: nn.Module, batch: Mapping[str, Any], hparams: Mapping[str, Any]) -> torch.Tensor:
        type(self).calls += 1
        if type(self).calls == 4:  # the others are planning's
            raise RuntimeError("late")
        return super().loss(model, batch, hparams)


def test_members_that_fail_together_are_trained_again_in_halves(
    tmp_path: Path, run_quick: Callable[..., str], digits_task: Classification
) -> None:
    _FailsLate.calls = 0
    task = _FailsLate(MLP, digits_task.data())
    settings = ("activation=relu", "search.round_size=3", "search.trials=3")
    got = json.loads(run_quick(tmp_path / "run", *settings, "trainer.engine=fused", task=task))
    assert [trial["state"] for trial in got["trials"]] == ["COMPLETE"] * 3
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        (fallback,) = record.of_kind("fallback")
    assert "RuntimeError: late" in fallback.body["reason"]
    calm = [
        json.loads(run_quick(tmp_path / engine, *settings, f"trainer.engine={engine}"))
        for engine in ("loop", "fused", "fused")
    ]
    trained = [[trial["weights_sha256"] for trial in run["trials"]] for run in (got, *calm)]
    assert trained[0] == [trained[1][0], *trained[2][1:]]  # the first alone, two together


class _Fills(FusedTrainer):
    """A memory that holds three members."""

    def init(self, trials: Sequence[int], hparams: Sequence[Mapping[str, Any]]) -> Population:
        if len(trials) > 3:
            raise torch.OutOfMemoryError("simulated")
        return super().init(trials, hparams)


@pytest.mark.slow
def test_a_group_that_the_memory_does_not_hold_is_halved_and_later_groups_are_no_larger(
    tmp_path: Path, run_quick: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("activation=relu", "search.round_size=16", "search.trials=32", "trainer.epochs=1")
    calm = json.loads(run_quick(tmp_path / "calm", *settings, "trainer.engine=loop"))
    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES, "fused": _Fills})
    settings = (*settings, "trainer.engine=fused", "run.checkpoint_every_seconds=0")
    switch = PowerSwitch(monkeypatch)
    whole = run_quick(tmp_path / "run", *settings)
    got = json.loads(whole)
    assert {trial["state"] for trial in got["trials"]} == {"COMPLETE"}
    assert [t["metrics"].keys() for t in got["trials"]] == [t["metrics"].keys() for t in calm["trials"]]
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        full = record.of_kind("fallback")
        first, second = record.of_kind("plan")
    sizes = [[len(c["trials"]) for c in plan.body["chunks"]] for plan in (first, second)]
    assert [max(sizes[0]), max(sizes[1])] == [8, 2]
    assert [event.body["members"] for event in full] == [8, 8, 4, 4, 4, 4]
    assert all(event.body["out_of_memory"] for event in full)
    for step in range(2, switch.count, 23):
        path = tmp_path / str(step)
        assert switch.cut(step, bool(step % 2), functools.partial(run_quick, path, *settings)) == whole, step


class _Branches(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if float(y.sum()) > 0 else 2 * y


def test_a_module_that_cannot_be_mapped_trains_in_the_loop_and_the_log_says_why(
    tmp_path: Path, run_quick: Callable[..., str], digits_task: Classification
) -> None:
    ear = Ear()

    raw = {**QUICK, "hparams": {}, "space": {"lr": {"float": [0.01, 0.1]}}}
    task = Classification(_Branches, digits_task.data())
    run_quick(tmp_path / "run", "trainer.engine=fused", raw=raw, task=task, observers=[ear])
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        assert {trial.state for trial in record.trials.values()} == {TrialState.COMPLETE}
        assert {c["engine"] for plan in record.of_kind("plan") for c in plan.body["chunks"]} == {"loop"}
    assert len(ear.said) == 1
    assert "engine loop: one by one (cannot be mapped over members: " in ear.said[0]


def test_fused_and_loop_find_the_same(tmp_path: Path, run_quick: Callable[..., str]) -> None:
    settings = ("activation=relu", "search.trials=8", "search.round_size=8", "trainer.dtype=float64")
    fused = json.loads(run_quick(tmp_path / "fused", *settings, "trainer.engine=auto"))
    loop = json.loads(run_quick(tmp_path / "loop", *settings, "trainer.engine=loop"))
    assert fused["best"]["number"] == loop["best"]["number"]
    for a, b in zip(fused["trials"], loop["trials"], strict=True):
        assert a["hparams"] == b["hparams"]
        for name, value in a["metrics"].items():
            assert float.fromhex(value) == pytest.approx(float.fromhex(b["metrics"][name]), rel=1e-6)
