"""Promotion: who ASHA stopped too early goes on as if it had never been, whatever happens meanwhile."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK
from test_evolution import record_of
from test_resume import PowerSwitch
from typer.testing import CliRunner

from hpt_torch import promotion
from hpt_torch.cli import app
from hpt_torch.schedulers import Halving
from hpt_torch.types import DamageError, Objective, Report, Trial

RunQuick = Callable[..., str]
ASHA: dict[str, Any] = {
    **QUICK,
    "space": {"lr": {"float": [1e-5, 1.0]}, "dropout": {"float": [0.0, 0.5]}},
    "search": {"sampler": "random", "trials": 20, "round_size": 4},
    "scheduler": {"kind": "asha", "reduction_factor": 2},
    "trainer": {**QUICK["trainer"], "epochs": 5, "engine": "loop"},
    "run": {"tensorboard": False, "checkpoint_every_seconds": 0},
}


def _promoted(run: Path) -> list[tuple[int, int, int]]:
    """(round, trial, epoch) of all promotions."""
    with record_of(run) as record:
        return [(e.body["round"], *pair) for e in record.of_kind("promotion") for pair in e.body["trials"]]


# -- who -----------------------------------------------------------------------------------------------


def test_who_is_among_the_best_share_by_now_goes_on() -> None:
    halving, objective = Halving(kind="asha"), Objective(metric="valid/loss", direction="minimize")

    def trials(*losses: float) -> list[Trial]:
        return [
            Trial(
                number=n, round=0, hparams={}, signature="",
                reports=(Report(trial=n, epoch=1, metrics={"valid/loss": loss}, seconds=0.0),),
            )
            for n, loss in enumerate(losses)
        ]  # fmt: skip

    def promoted(waiting: set[int], *losses: float) -> list[int]:
        return halving.promoted(waiting, trials(*losses), 1, objective, seed=0)

    assert promoted({1, 2}, 0.1, 0.2, 0.3) == []  # one of three passes
    assert promoted({1, 2}, 0.1, 0.2, 0.3, 0.9, 0.9, 0.9) == [1]  # two of six
    assert promoted({1, 2}, 0.1, 0.2, 0.3, *[0.9] * 6) == [1, 2]
    assert promoted({2}, 0.1, 0.2, 0.3, *[0.9] * 6) == [2]
    assert halving.promoted({1}, trials(0.1, 0.2), 3, objective, seed=0) == []  # nobody came so far


@pytest.mark.slow
def test_the_promoted_end_as_if_they_had_never_been_stopped(tmp_path: Path, run_quick: RunQuick) -> None:
    """The loop trainer's bits, against a run in which nobody stops."""
    got = json.loads(run_quick(tmp_path / "run", raw=ASHA))
    whole = json.loads(run_quick(tmp_path / "fifo", raw={**ASHA, "scheduler": {}}))
    promoted = _promoted(tmp_path / "run")
    assert promoted
    ends = {trial: got["trials"][trial] for _, trial, _ in promoted}
    assert "COMPLETE" in {end["state"] for end in ends.values()}
    for trial, alone in zip(got["trials"], whole["trials"], strict=True):
        assert trial["reports"] == alone["reports"][: trial["epoch"]]
        if trial["state"] == "COMPLETE":
            assert trial["weights_sha256"] == alone["weights_sha256"]
    for _, trial, epoch in promoted:
        assert ends[trial]["epoch"] > epoch
    with record_of(tmp_path / "run") as record:
        for event in record.of_kind("promotion"):
            for number, epoch in event.body["trials"]:  # the best that waited, by what was known then
                known = [
                    e for e in record.of_kind("report") if e.seq < event.seq and e.body["epoch"] == epoch
                ]
                scores = {e.body["trial"]: e.body["metrics"]["valid/accuracy"] for e in known}
                better = [n for n, score in scores.items() if score > scores[number]]
                assert len(better) < len(scores) // 2
        files = {path.name.rpartition("-")[0] for path in (tmp_path / "run/checkpoints").iterdir()}
        assert files - {"best"} <= promotion.needed(record)


@pytest.mark.slow
def test_a_larger_budget_promotes_who_waits(tmp_path: Path, run_quick: RunQuick) -> None:
    """What a run has kept at its end is gone on with when it is extended: to the end of one that had it from
    the start."""
    run_quick(tmp_path / "run", "search.trials=12", raw=ASHA)
    extended = run_quick(tmp_path / "run", raw=ASHA, reopen_holdout=True)
    assert len(_promoted(tmp_path / "run")) >= 1
    trials = [(t["state"], t["reports"], t["weights_sha256"]) for t in json.loads(extended)["trials"]]
    whole = json.loads(run_quick(tmp_path / "whole", raw=ASHA))["trials"]
    same = [t == (w["state"], w["reports"], w["weights_sha256"]) for t, w in zip(trials, whole, strict=True)]
    assert sum(same) >= 15  # at the end of the smaller budget some were promoted earlier than they would be


@pytest.mark.slow
def test_who_waits_can_be_promoted_after_a_cleaning(tmp_path: Path, run_quick: RunQuick) -> None:
    """`hpt clean` removes no state from which an extended run goes on: it ends as it does uncleaned."""
    cleaned, left = tmp_path / "cleaned", tmp_path / "left"
    for path in (cleaned, left):
        run_quick(path, "search.trials=8", raw=ASHA)
    before = _promoted(cleaned)
    stale = cleaned / "checkpoints" / "paused-99-0.safetensors"
    stale.write_bytes(b"of nobody")
    CliRunner().invoke(app, ["clean", str(cleaned), "--yes"], catch_exceptions=False)
    assert not stale.exists()
    ends = [run_quick(path, raw=ASHA, reopen_holdout=True) for path in (cleaned, left)]
    assert ends[0] == ends[1]
    assert any(trial < 8 for _, trial, _ in _promoted(cleaned)[len(before) :])


# -- whatever happens ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("trainer.engine=fused", "run.checkpoint_every_seconds=1e6"),
        ("evaluation.folds=2", "search.trials=12"),
    ],
    ids=["fused", "folds"],
)
def test_power_cuts(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *settings, raw=ASHA)
    assert _promoted(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir())
    for step in range(3, switch.count + 1, max(switch.count // 4, 1)):
        path = tmp_path / str(step)
        run = functools.partial(run_quick, path, *settings, raw=ASHA)
        assert switch.cut(step, bool(step % 2), run) == expected, step
        assert sorted(path.name for path in (path / "checkpoints").iterdir()) == names
        assert _promoted(path) == _promoted(tmp_path / "whole")


def test_a_damaged_state_stops_the_run_before_anything_else_is_recorded(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promoted trial cannot be trained again by the engine that it goes on with."""
    real = promotion.promotions

    def damaging(tuner: Any, round: int) -> Any:
        events, chunks = real(tuner, round)
        for chunk in chunks:
            name = tuner.record.state_files[chunk.start][-1].name
            (tuner.dir.checkpoints / name).write_bytes(b"damaged")
        return events, chunks

    monkeypatch.setattr(promotion, "promotions", damaging)
    with pytest.raises(DamageError, match=r"paused-\d+-0.safetensors"):
        run_quick(tmp_path / "run", raw=ASHA)


def test_damaged_weights_of_a_promoted_trial_are_made_again(tmp_path: Path, run_quick: RunQuick) -> None:
    """From the state with which it was promoted. Good points come first, of which the first rungs stop some,
    then bad ones."""
    lrs = [0.2, 0.05, 0.03, 0.02, *(1e-5 * (1 + i / 10) for i in range(16))]
    search = {**ASHA["search"], "start_with_defaults": False}
    raw = {**ASHA, "seed": 1, "search": {**search, "points": [{"lr": lr, "dropout": 0.0} for lr in lrs]}}
    expected = run_quick(tmp_path / "run", raw=raw)
    best = json.loads(expected)["best"]["number"]
    assert best in {trial for _, trial, _ in _promoted(tmp_path / "run")}
    (weights,) = (tmp_path / "run/checkpoints").glob("best-*")
    weights.write_bytes(b"damaged")
    assert run_quick(tmp_path / "run", raw=raw) == expected
    assert weights.read_bytes() != b"damaged"
