"""The best trials trained again with new seeds: who is chosen, how sure that is, and that nothing is lost."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import canonical_of
from scipy import stats
from test_folds import checked_of, trials_of
from test_resume import PowerSwitch, _stop_after

from hpt_torch import session
from hpt_torch.record import Record
from hpt_torch.report.confirmation import Confirmation
from hpt_torch.result import Result
from hpt_torch.seeding import derive_seed
from hpt_torch.task import Task
from hpt_torch.types import Interrupted, Objective, RecipeError, TrialState

RunQuick = Callable[..., str]
HIGHER = Objective(metric="valid/accuracy", direction="maximize")
CONFIRM = ["final.confirm=3", "final.seeds=2", "search.trials=5", "activation=relu"]


def _confirmed(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(canonical_of(path))["confirmation"]
    return found


def test_the_best_are_trained_again_alike(tmp_path: Path, run_quick: RunQuick, digits_task: Task) -> None:
    """Each score is that of a trial of these hyperparameters in a run with that seed."""
    run_quick(tmp_path / "run", *CONFIRM)
    trials = trials_of(tmp_path / "run")
    top = HIGHER.ranked(trials)[:3]
    found = _confirmed(tmp_path / "run")
    assert [int(number) for number in found["scores"]] == sorted(t.number for t in top)
    for i in (1, 2):
        seed = derive_seed(0, "confirm", i)
        points = [{name: value for name, value in t.hparams.items()} for t in top]
        raw = (
            "[" + ", ".join("{" + ", ".join(f"{n} = {v!r}" for n, v in p.items()) + "}" for p in points) + "]"
        )
        settings = [f"trainer.seed={seed}", "search.trials=3", f"search.points={raw}", "activation=relu"]
        run_quick(
            tmp_path / f"seed-{i}", *settings, "search.start_with_defaults=false", "search.round_size=3"
        )
        for twin, trial in zip(trials_of(tmp_path / f"seed-{i}"), top, strict=True):
            score = twin.metrics["valid/accuracy"]
            assert float.fromhex(found["scores"][str(trial.number)][i - 1]) == score
    means = {int(n): sum(map(float.fromhex, values)) for n, values in found["scores"].items()}
    result = Result(tmp_path / "run", digits_task)
    assert result.best.number == found["winner"]
    assert means[found["winner"]] == max(means.values())
    result.best_model()


def test_the_hold_out_is_read_once_and_for_the_winner(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run", *CONFIRM)
    for folder in (tmp_path / "run" / "confirmations").iterdir():
        with Record(folder / "run.db", readonly=True) as record:
            assert record.of_kind("finish")
            assert not record.of_kind("holdout")
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        (reading,) = record.of_kind("holdout")
        assert reading.body["trial"] == record.of_kind("confirmed")[0].body["winner"]


def test_it_can_be_asked_for_later(tmp_path: Path, run_quick: RunQuick) -> None:
    expected = run_quick(tmp_path / "whole", *CONFIRM)
    run_quick(tmp_path / "later", *CONFIRM[2:])
    assert run_quick(tmp_path / "later", *CONFIRM, reopen_holdout=True) == expected
    assert Result(tmp_path / "later").summary.holdout_reads == 2


def test_it_goes_with_folds(tmp_path: Path, run_quick: RunQuick, digits_task: Task) -> None:
    run_quick(tmp_path / "run", *CONFIRM, "evaluation.folds=3")
    assert len(_confirmed(tmp_path / "run")["scores"]) == 3
    assert Result(tmp_path / "run", digits_task).holdout


@pytest.mark.slow
def test_power_cut_during_a_confirmation(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *CONFIRM)
    for step in range(1, switch.count + 1, 9):
        path = tmp_path / str(step)
        got = switch.cut(step, step % 4 == 1, functools.partial(run_quick, path, *CONFIRM))
        assert got == expected, step


def test_stopped_during_a_confirmation(tmp_path: Path, run_quick: RunQuick) -> None:
    expected = run_quick(tmp_path / "whole", *CONFIRM)
    run_quick(tmp_path / "run", *CONFIRM[2:])
    with pytest.raises(Interrupted, match=f"everything is saved in {tmp_path / 'run'}'"), _stop_after(3):
        run_quick(tmp_path / "run", *CONFIRM, reopen_holdout=True)
    assert run_quick(tmp_path / "run", *CONFIRM, reopen_holdout=True) == expected


def test_a_trial_that_fails_under_a_new_seed_does_not_win(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpt_torch.trainers import loop

    run_quick(tmp_path / "plain", *CONFIRM[2:])
    best = HIGHER.ranked(trials_of(tmp_path / "plain"))[0]
    build = loop.base.build

    def fragile(task: Any, hparams: Any, trial: int, seed: int, rows: Any) -> Any:
        if hparams["lr"] == best.hparams["lr"] and seed == derive_seed(0, "confirm", 2):
            raise RuntimeError("only under this seed")
        return build(task, hparams, trial, seed, rows)

    monkeypatch.setattr(loop.base, "build", fragile)
    run_quick(tmp_path / "run", *CONFIRM)
    found = _confirmed(tmp_path / "run")
    assert found["scores"][str(best.number)] == []
    assert found["winner"] != best.number


def _found(scores: dict[int, list[float]], winner: int) -> Confirmation:
    return Confirmation(objective=HIGHER, scores=scores, winner=winner)


def test_who_can_be_told_from_the_winner() -> None:
    scores = {
        4: [0.90, 0.91, 0.92, 0.93],
        7: [0.89, 0.90, 0.91, 0.921],  # always a little worse: pairs tell what means would not
        2: [0.80, 0.99, 0.85, 0.95],
        9: [],
    }
    found = _found(scores, 4)
    assert found.p_value(7) == stats.ttest_rel(scores[4], scores[7]).pvalue < 0.05
    assert found.p_value(2) > 0.05
    assert found.rivals == [2]
    assert found.verdict == (
        "Trial 4 stays the best: mean 0.9150 over 4 new seeds, standard deviation 0.0129. "
        "It cannot be told from trial 2."
    )
    moved = _found({7: scores[7], 4: scores[4]}, 4)
    assert moved.verdict.startswith("Trial 4 takes the place of trial 7: ")
    assert _found({1: [0.5, 0.6], 2: [0.5, 0.6]}, 1).rivals == [2]
    assert _found({1: [0.5, 0.6], 2: [0.4, 0.5]}, 1).rivals == []


@pytest.mark.parametrize(
    ("overrides", "field", "piece"),
    [
        (["final.confirm=1"], "final.confirm", "greater than or equal to 2"),
        (["final.confirm=3", "final.refit=false"], "final.refit", "must be true"),
        (["final.confirm=3", "scheduler.kind=pbt"], "final.confirm", "does not go with"),
    ],
)
def test_recipes_that_cannot_be(overrides: list[str], field: str, piece: str, digits_task: Task) -> None:
    with pytest.raises(RecipeError) as caught:
        checked_of(*overrides, task=digits_task)
    assert any(p.where == field and piece in p.what for p in caught.value.problems), str(caught.value)


def test_one_complete_trial_needs_no_confirmation(
    tmp_path: Path, run_quick: RunQuick, digits_task: Task
) -> None:
    session.run(checked_of("final.confirm=3", "search.trials=1", task=digits_task), tmp_path / "run")
    (trial,) = trials_of(tmp_path / "run")
    assert trial.state is TrialState.COMPLETE
    assert Result(tmp_path / "run", digits_task).holdout


def test_the_page_shows_the_choice(tmp_path: Path, run_quick: RunQuick, digits_task: Task) -> None:
    run_quick(tmp_path / "run", *CONFIRM, "evaluation.folds=3", "final.seeds=3")
    result = Result(tmp_path / "run", digits_task)
    page = (tmp_path / "run" / "report.html").read_text()
    found = result.summary.confirmation
    assert found is not None
    for text in (found.verdict, "p (paired t-test)", "on its 3 folds", "<h2>The choice</h2>"):
        assert text in page
