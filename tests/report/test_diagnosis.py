"""Findings: from runs with a known truth to the sentence that ought to be said, and no other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpt_torch.cli import app
from hpt_torch.record import (
    Event,
    Record,
    StateFile,
    finish_event,
    report_event,
    state_event,
    trial_event,
)
from hpt_torch.report import advice, findings, space_checks, summarise
from hpt_torch.report.diagnosis import diagnose, replay_scores, selection
from hpt_torch.report.findings import Finding
from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import number
from hpt_torch.seeding import generator
from hpt_torch.types import Report, TrialState

EPOCHS = 20
SPACE: dict[str, Any] = {"lr": {"float": [1e-4, 1e-1]}, "dropout": {"float": [0.0, 0.5]}}
Curve = Callable[[int, float], dict[str, float]]  # (epoch, the score that it ends with) -> metrics

_opened: list[Record] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


def healthy(epoch: int, score: float) -> dict[str, float]:
    """Rises, slows down, is flat over the last fifth; train is a little better than valid."""
    done = 1 - math.exp(-5.5 * epoch / EPOCHS)
    return {
        "train/accuracy": 0.1 + (score - 0.08) * done, "valid/accuracy": 0.1 + (score - 0.1) * done,
        "train/loss": 2.3 - 2.1 * done, "valid/loss": 2.3 - 2.0 * done,
    }  # fmt: skip


class Run:
    """A record written by hand. A point is hparams and the score that it ends with."""

    def __init__(
        self, path: Path, space: Mapping[str, Any] = SPACE, *, fixed: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None, objective: str = "valid/accuracy",
    ) -> None:  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        self.record, self.number = Record(path / "run.db"), 0
        _opened.append(self.record)
        raw = {"name": "made", "seed": 0, "hparams": dict(fixed or {"batch_size": 64}), "space": dict(space)}
        direction = "maximize" if objective.endswith("accuracy") else "minimize"
        begun = {"format": 1, "recipe": raw, "objective": {"metric": objective, "direction": direction}}
        self.record.append(Event(kind="run", body=begun))
        session = {"budget": {"trials": None}, "valid_rows": 100_000, **(environment or {})}
        self.record.append(Event(kind="session", body=session))

    def trial(self, score: float, curve: Curve = healthy, *, epochs: int = EPOCHS, **hparams: Any) -> None:
        self.record.append(
            trial_event(self.number, 0, hparams, ""),
            *(
                report_event(Report(trial=self.number, epoch=e, metrics=curve(e, score), seconds=0.1))
                for e in range(1, epochs + 1)
            ),
            finish_event(self.number, TrialState.COMPLETE, "", kept_epoch=epochs),
        )
        self.number += 1

    def end(self, state: TrialState, reason: str, **hparams: Any) -> None:
        self.record.append(trial_event(self.number, 0, hparams, ""), finish_event(self.number, state, reason))
        self.number += 1

    @property
    def summary(self) -> Summary:
        return summarise(self.record)

    def found(self, replays: Sequence[float] = ()) -> dict[str, Finding]:
        return {finding.kind: finding for finding in diagnose(self.summary, replays)}

    def problems(self, replays: Sequence[float] = ()) -> set[str]:
        """The kinds that ask for something to be done; importance is only told."""
        return set(self.found(replays)) - {"importance"}


def peaked(run: Run, curve: Curve = healthy, *, trials: int = 40, peak: float = 1e-2, seed: int = 0) -> Run:
    """Random search over SPACE whose score is best at one lr, inside the range."""
    rng = generator(seed, "test diagnosis")
    for _ in range(trials):
        lr, dropout = 10 ** rng.uniform(-4, -1), float(rng.uniform(0, 0.5))
        score = 0.95 - 0.1 * math.log10(lr / peak) ** 2 + 0.01 * rng.standard_normal()
        run.trial(score, curve, lr=lr, dropout=dropout)
    return run


# -- healthy runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_run_has_no_problems(tmp_path: Path, seed: int) -> None:
    run = peaked(Run(tmp_path), seed=seed)
    assert run.problems() == set()
    assert set(run.found()) == {"importance"}


def test_a_run_that_has_hardly_begun_has_no_findings(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert diagnose(run.summary) == []
    run.record.append(trial_event(0, 0, {"lr": 0.1, "dropout": 0.0}, ""))
    assert diagnose(run.summary) == []
    run.number = 1
    peaked(run, trials=2)
    assert diagnose(run.summary) == []


def test_every_finding_is_one_sentence_with_a_number_a_remedy_and_a_section(tmp_path: Path) -> None:
    run = Run(tmp_path, environment={"valid_rows": 50})
    peaked(run, _overfits, peak=1.0)
    for _ in range(6):
        run.end(TrialState.FAILED, "diverged: the training loss is nan in epoch 1", lr=0.09, dropout=0.1)
    found = run.found()
    assert set(found) == {"selection", "overfitting", "divergence", "importance"}  # no edge: they diverge
    for finding in found.values():
        assert finding.text.endswith(".")
        assert finding.text.count(". ") == 0
        assert any(c.isdigit() for c in finding.text)
        assert ": " in finding.text
        assert finding.check


# -- training curves -----------------------------------------------------------------------------------


def _overfits(epoch: int, score: float) -> dict[str, float]:
    metrics = healthy(epoch, score)
    return metrics | {"valid/loss": metrics["valid/loss"] + 0.05 * max(0, epoch - 8)}


def _gapes(epoch: int, score: float) -> dict[str, float]:
    metrics = healthy(epoch, score)
    return metrics | {"train/accuracy": 0.1 + 0.9 * (1 - math.exp(-5.5 * epoch / EPOCHS)),
                      "valid/accuracy": min(metrics["valid/accuracy"], 0.7 * score)}  # fmt: skip


def _rises(epoch: int, score: float) -> dict[str, float]:
    done = epoch / EPOCHS
    return {"train/accuracy": score * done + 0.01, "valid/accuracy": score * done,
            "train/loss": 2.3 - 2 * done, "valid/loss": 2.3 - 1.9 * done}  # fmt: skip


def _quick(epoch: int, score: float) -> dict[str, float]:
    return healthy(min(EPOCHS, 6 * epoch), score)


def _underfits(epoch: int, score: float) -> dict[str, float]:
    return healthy(epoch, 0.6 * score) | {
        "train/accuracy": healthy(epoch, 0.6 * score)["valid/accuracy"] + 0.01
    }


@pytest.mark.parametrize(
    ("curve", "kind", "words"),
    [
        (_overfits, "overfitting", ["5 of the best 5 trials overfit", "valid/loss goes from", "while train/",
                                    "trainer.patience", "regularise more (dropout)"]),
        (_gapes, "overfitting", ["know the train rows far better", "and the gap grew from", "get more data"]),
        (_rises, "still_improving", ["5 of the best 5 trials still improve", "in the last fifth of 20 epochs",
                                     "trainer.epochs=40"]),
        (_quick, "saturated", ["reach 98 % of what they gain by epoch 3 of 20", "trainer.epochs=4",
                               "5.0 times as many trials"]),
        (_underfits, "underfitting", ["underfit", "no better on the rows", "a larger model or less dropout"]),
    ],
)  # fmt: skip
def test_curves(tmp_path: Path, curve: Curve, kind: str, words: list[str]) -> None:
    run = peaked(Run(tmp_path), curve)
    assert run.problems() == {kind}
    text = run.found()[kind].text
    assert [word for word in words if word not in text] == []


def test_the_remedies_are_hyperparameters_that_the_run_has(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path, fixed={"weight_decay": 0.0, "label_smoothing": 0.0, "width": 8}), _overfits)
    assert "(weight_decay, dropout, label_smoothing)" in run.found()["overfitting"].text
    run = peaked(Run(tmp_path / "under", fixed={"width": 8}), _underfits)
    assert "try larger width or less dropout" in run.found()["underfitting"].text


def test_noise_on_a_flat_curve_is_neither_overfitting_nor_improving(tmp_path: Path) -> None:
    """Over many runs whose curves are flat and noisy after a quick rise."""
    wrong = 0
    for seed in range(25):
        rng = generator(seed, "noise")

        def noisy(epoch: int, score: float, rng: Any = rng) -> dict[str, float]:
            metrics = healthy(epoch, score)
            return {name: value + 0.01 * rng.standard_normal() for name, value in metrics.items()}

        run = peaked(Run(tmp_path / str(seed)), noisy, trials=8, seed=seed)
        wrong += bool(run.problems())
    assert wrong <= 1


def test_a_minimised_objective_is_turned_round(tmp_path: Path) -> None:
    run = Run(tmp_path, objective="valid/loss")
    for n in range(8):
        run.trial(0.9 - n / 100, _overfits, lr=10 ** (-4 + n / 3), dropout=0.1)
    assert "overfit: in the best of them valid/loss goes from" in run.found()["overfitting"].text
    run = Run(tmp_path / "short", objective="valid/loss")
    for n in range(8):
        run.trial(0.9 - n / 100, _rises, lr=10 ** (-4 + n / 3), dropout=0.1)
    assert run.problems() == {"still_improving"}


def test_the_end_of_a_schedule_is_named(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path, fixed={"schedule": "cosine"}), _rises)
    assert "(part of it is the end of the cosine schedule)" in run.found()["still_improving"].text


# -- the space -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peak", "end", "beyond"), [(1.0, "upper", "0.1"), (1e-5, "lower", "0.0001")])
def test_best_values_at_an_edge(tmp_path: Path, peak: float, end: str, beyond: str) -> None:
    run = peaked(Run(tmp_path), peak=peak, trials=80)
    assert run.problems() == {"edge"}
    text = run.found()["edge"].text
    assert text.startswith(f"lr's best values sit at its {end} end: ")
    assert f"search on beyond {beyond} (hpt refine" in text


def test_the_end_of_what_is_possible_is_no_edge(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rng = generator(0, "edge")
    for _ in range(60):
        dropout = float(rng.uniform(0, 0.5))
        run.trial(0.9 - dropout, lr=10 ** rng.uniform(-4, -1), dropout=dropout)
    assert "edge" not in run.found()


def test_where_the_score_does_not_depend_on_it_an_edge_is_none(tmp_path: Path) -> None:
    """A sampler that learns may crowd anywhere in a hyperparameter that does not matter."""
    run, rng = Run(tmp_path), generator(0, "crowd")
    for _ in range(40):
        lr = 10 ** rng.uniform(-4, -1)
        score = 0.95 - 0.1 * (math.log10(lr) + 2) ** 2 + 0.01 * rng.standard_normal()
        run.trial(score, lr=lr, dropout=float(rng.uniform(0.46, 0.5)))
    assert run.problems() == set()


def test_the_edge_of_a_list_of_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path, {"lr": {"choice": [1e-3, 1e-2, 1e-1]}, "dropout": {"float": [0.0, 0.5]}})
    rng = generator(0, "list")
    for n in range(45):
        lr = (1e-3, 1e-2, 1e-1)[n % 3]
        run.trial(
            0.9 + 0.05 * math.log10(lr) + 0.01 * rng.standard_normal(), lr=lr, dropout=rng.uniform(0, 0.5)
        )
    assert " trials have 0.1 (searched: 0.001 to 0.1): search on beyond 0.1" in run.found()["edge"].text


def test_divergence_and_where(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path, fixed={"grad_clip_norm": 10.0}), peak=2e-3)
    for n in range(8):
        run.end(
            TrialState.FAILED,
            "diverged: valid/loss is nan after epoch 2",
            lr=0.08 + n / 400,
            dropout=0.05 * n,
        )
    text = run.found()["divergence"].text
    assert text.startswith("8 of 48 trials diverged (17%), 8 of them where lr is at least 0.08, 8 of the ")
    assert text.endswith("lower lr's upper bound to 0.08, or steady the training with grad_clip_norm.")


def test_divergence_beside_the_best_asks_for_steadier_training(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path, fixed={"warmup_epochs": 0.0}), peak=8e-2, trials=60)
    for n in range(8):
        run.end(
            TrialState.FAILED, "diverged: the training loss is inf in epoch 1", lr=0.099, dropout=0.05 * n
        )
    text = run.found()["divergence"].text
    assert "and the best trial is just beside them (lr = " in text
    assert "steady the training with warmup_epochs, for a value among them may then be best" in text


def test_divergence_everywhere_and_with_one_option(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path), trials=30)
    rng = generator(1, "everywhere")
    for _ in range(6):
        run.end(TrialState.FAILED, "diverged: x", lr=10 ** rng.uniform(-4, -1), dropout=rng.uniform(0, 0.5))
    assert "in no part of the space more than in another" in run.found()["divergence"].text
    run = Run(tmp_path / "option", {"optimizer": {"choice": ["sgd", "adam"]}})
    for n in range(20):
        run.trial(0.8 + n / 1000, optimizer="adam")
    for _ in range(6):
        run.end(TrialState.FAILED, "diverged: x", optimizer="sgd")
    text = run.found()["divergence"].text
    assert "6 of them with optimizer = sgd, 6 of the 6 with it: drop optimizer = sgd, or" in text


def test_trials_that_crashed_have_not_diverged(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path))
    for _ in range(10):
        run.end(TrialState.FAILED, "Traceback (most recent call last):\nKeyError: 'x'", lr=0.09, dropout=0.1)
    assert run.problems() == set()


def test_combinations_without_a_model(tmp_path: Path) -> None:
    run = Run(tmp_path, {"kernel_size": {"int": [1, 9]}, "dropout": {"float": [0.0, 0.5]}})
    rng = generator(0, "kernels")
    for n in range(40):
        size, dropout = 1 + n % 9, float(rng.uniform(0, 0.5))
        if size >= 8:
            run.end(TrialState.INFEASIBLE, "block 3 has no pixels left", kernel_size=size, dropout=dropout)
        else:
            run.trial(0.9 - 0.01 * (size - 4) ** 2, kernel_size=size, dropout=dropout)
    text = run.found()["infeasible"].text
    assert text.startswith(
        "8 of 40 trials allow no model, 8 of them where kernel_size is at least 8, 8 of the 8"
    )
    assert "(the first: block 3 has no pixels left): lower kernel_size's upper bound to 8" in text


# -- what was learned ----------------------------------------------------------------------------------


def test_what_matters_and_what_does_not(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path), trials=100)
    text = run.found()["importance"].text
    assert text.startswith("The best of 100 trials differ from the others mostly in lr (PED-ANOVA ")
    shares = findings.importance(run.summary).whole
    assert shares["lr"] > 0.8 > shares["dropout"]


@pytest.mark.parametrize(
    ("best", "whole", "text"),
    [
        ({"lr": 0.7, "dropout": 0.3}, {"lr": 0.02, "dropout": 0.03}, None),  # they do not agree
        ({"lr": 0.9, "dropout": 0.1}, {}, None),
        ({"lr": 1.0}, {"lr": 1.0}, None),  # there is nothing else
        ({"lr": 0.9, "dropout": 0.02}, {"lr": 0.8, "dropout": 0.03},
         "The best of 40 trials differ from the others mostly in lr (PED-ANOVA 90%, fANOVA 80%); dropout "
         "matters little (below 5% in both): fix it to search the others more densely."),
        ({"lr": 0.5, "dropout": 0.4}, {"lr": 0.7, "dropout": 0.2},
         "The best of 40 trials differ from the others mostly in lr (PED-ANOVA 50%, fANOVA 70%), "
         "dropout (PED-ANOVA 40%, fANOVA 20%)."),
    ],
)  # fmt: skip
def test_importance_is_told_where_both_measures_agree(
    tmp_path: Path, best: dict[str, float], whole: dict[str, float], text: str | None
) -> None:
    run = peaked(Run(tmp_path))
    found = space_checks.importance(run.summary, findings.Importance(best, whole, ""))
    assert (found.text if found is not None else None) == text


def test_fanova_is_not_ruled_by_one_very_bad_trial(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path), trials=60)
    run.trial(-1e30, lr=1e-2, dropout=0.49)
    assert findings.importance(run.summary).whole["lr"] > 0.7


BATCH: dict[str, Any] = {"lr": {"float": [1e-4, 1e-1]}, "batch_size": {"choice": [16, 64, 256]}}


def test_two_that_act_together(tmp_path: Path) -> None:
    rng = generator(0, "together")
    run = Run(tmp_path, {"lr": SPACE["lr"], "width": {"int": [8, 512], "log": True}})
    for _ in range(60):
        lr, width = 10 ** rng.uniform(-4, -1), int(2 ** rng.uniform(3, 9))
        best = -1.5 - 2 * (math.log2(width) - 3) / 6  # the wider, the lower
        run.trial(0.9 - 0.2 * (math.log10(lr) - best) ** 2 + 0.01 * rng.standard_normal(), lr=lr, width=width)
    text = run.found()["interaction"].text
    assert text.startswith("lr and width act together: a high lr goes with a low width (that explains ")
    assert "interaction" not in peaked(Run(tmp_path / "apart"), trials=60).found()
    lists = {"lr": [1e-3, 1e-2, 1e-1], "activation": ["relu", "tanh"], "batch_size": [16, 64, 256]}
    run = Run(tmp_path / "lists", {name: {"choice": options} for name, options in lists.items()})
    for n in range(54):
        i, j = n % 3, n // 3 % 3  # the larger, the higher
        score = 0.9 - 0.1 * abs(i - j) + 0.01 * rng.standard_normal()
        run.trial(score, lr=10 ** (i - 3.0), batch_size=16 * 4**j, activation=("relu", "tanh")[n % 2])
    text = run.found()["interaction"].text
    assert text.startswith("lr and batch_size act together: a high lr goes with a high batch_size (that ")


def test_batch_size_confounded_with_lr(tmp_path: Path) -> None:
    rng = generator(0, "confounded")
    run, apart = Run(tmp_path, BATCH), Run(tmp_path / "apart", BATCH)
    for n in range(60):
        size, lr = (16, 64, 256)[n % 3], 10 ** rng.uniform(-4, -1)
        tied = 10 ** (-3.5 + 0.8 * (n % 3) + 0.3 * rng.standard_normal())
        for where, rate in ((run, tied), (apart, lr)):
            score = 0.9 - 0.1 * (math.log10(rate) + 2) ** 2 + 0.01 * rng.standard_normal()
            where.trial(score, lr=min(max(rate, 1e-4), 1e-1), batch_size=size)
    text = run.found()["confounded"].text
    assert text.startswith("lr and batch_size went together over the trials (Spearman +0.")
    assert "confounded" not in apart.found()


def test_batch_size_searched_at_one_lr(tmp_path: Path) -> None:
    run = Run(tmp_path, {"batch_size": BATCH["batch_size"], "dropout": SPACE["dropout"]}, fixed={"lr": 1e-3})
    rng = generator(0, "one lr")
    for n in range(45):
        run.trial(0.8 + 0.05 * (n % 3 == 1) + 0.01 * rng.standard_normal(), batch_size=(16, 64, 256)[n % 3],
                  dropout=rng.uniform(0, 0.5))  # fmt: skip
    assert "batch_size was searched at one lr (0.001)" in run.found()["confounded"].text


# -- trust ---------------------------------------------------------------------------------------------


def test_noise_between_seeds_larger_than_the_gain(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for n in range(12):
        run.trial(0.90 + 0.001 * n, lr=1e-3 * (n + 1), dropout=0.1)
    assert "seed_noise" not in run.found()
    text = run.found(replays=[0.89, 0.90, 0.92, 0.91])["seed_noise"].text
    assert "The seed alone moves valid/accuracy by 0.0129 (standard deviation over 4 replays)" in text
    assert "gain over the median trial is 0.00" in text
    assert "so may the order of the best 12 trials" in text
    assert "seed_noise" not in run.found(replays=[0.911, 0.9111, 0.9109])


def test_noise_from_trials_that_repeat_a_point_against_the_declared_defaults(tmp_path: Path) -> None:
    space = {"lr": {"float": [1e-4, 1e-1], "default": 1e-3}, "dropout": {"float": [0.0, 0.5], "default": 0.0}}
    run = Run(tmp_path, space)
    run.trial(0.900, lr=1e-3, dropout=0.0)
    for lr, scores in ((1e-2, (0.88, 0.90, 0.91)), (2e-2, (0.89, 0.90, 0.87))):
        for score in scores:
            run.trial(score, lr=lr, dropout=0.1)
    text = run.found()["seed_noise"].text
    assert "(standard deviation over 6 trials that repeat 2 points)" in text
    assert "gain over the declared defaults (trial 0) is 0.0" in text


def test_validation_set_small_for_the_number_of_trials(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path, environment={"valid_rows": 100}), trials=60)
    text = run.found()["selection"].text
    assert " of 60 trials are within one standard error (0.0" in text
    assert ", 100 valid rows) of the best" in text
    assert "selection" not in peaked(Run(tmp_path / "large"), trials=60).found()
    unknown = peaked(Run(tmp_path / "unknown", environment={"valid_rows": None}), trials=60)
    assert "selection" not in unknown.found()


def test_with_cross_validation_the_folds_say_how_sure_a_score_is(tmp_path: Path) -> None:
    run = Run(tmp_path, environment={"valid_rows": None}, objective="valid/loss")
    for n in range(20):
        run.trial(0.5, lambda e, s, n=n: {"valid/loss": s + 0.001 * n}, lr=1e-3 * (n + 1), dropout=0.1)
    summary = run.summary
    assert summary.best is not None
    assert selection(summary) is None
    folds = [
        dataclasses.replace(
            summary.best,
            reports=(Report(trial=0, epoch=EPOCHS, metrics={"valid/loss": loss}, seconds=0.1),),
        )
        for loss in (0.49, 0.50, 0.51)
    ]
    found = selection(
        dataclasses.replace(summary, best=dataclasses.replace(summary.best, folds=tuple(folds)))
    )
    assert found is not None
    error = number(0.01 / math.sqrt(3))
    assert found.text.startswith(
        f"6 of 20 trials are within one standard error ({error}, 3 folds) of the best"
    )


def test_hold_out_below_what_the_choice_was_made_at(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path, environment={"valid_rows": 300}), trials=20)
    best = run.summary.best
    assert best is not None
    for held in (0.93, 0.80):  # by chance, and more than that
        assert "selection" not in run.found()
        body = {"trial": best.number, "metrics": {"holdout/accuracy": held}, "rows": 300}
        run.record.append(Event(kind="holdout", body=body))
    text = run.found()["selection"].text
    assert text.startswith("Hold-out accuracy is 0.8000 (300 rows) where the choice was made at 0.9")
    assert "the choice of the best of 20 trials flatters it" in text


def test_replays_are_read_from_the_run(tmp_path: Path) -> None:
    run = peaked(Run(tmp_path), trials=3)
    best = run.summary.best
    assert best is not None
    assert replay_scores(tmp_path, run.summary) == []
    for seed, score in enumerate((0.5, 0.75), start=1):
        Run(tmp_path / "replays" / f"trial-{best.number}-seed-{seed}", {}).trial(
            score, lambda e, s: {"valid/accuracy": s}
        )
    Run(tmp_path / "replays" / f"trial-{best.number + 1}-seed-1", {}).trial(0.1)
    assert replay_scores(tmp_path, run.summary) == [0.5, 0.75]


# -- where it is shown ---------------------------------------------------------------------------------


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A run with findings, one of which has a name in it that HTML, markdown and terminals would read."""
    space = {EVIL: {"float": [1e-4, 1e-1], "log": True}, "dropout": {"float": [0.0, 0.5]}}
    run, rng = Run(tmp_path, space), generator(0, "shown")
    for _ in range(80):
        value = 10 ** rng.uniform(-4, -1)
        run.trial(0.9 + 0.1 * math.log10(value), **{EVIL: value, "dropout": float(rng.uniform(0, 0.5))})
    best = run.summary.best
    assert best is not None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    file = StateFile(name="best.safetensors", sha256=digest, key="best", meta={"trial": best.number})
    run.record.append(state_event(file))
    return tmp_path


EVIL = "<b>\x1b[31m*l_r*"


def test_findings_are_on_the_page_on_the_terminal_in_markdown_and_in_json(shown: Path) -> None:
    def hpt(*options: str) -> str:
        done = CliRunner().invoke(app, ["report", str(shown), *options])
        assert done.exit_code == 0, done.output
        return done.stdout

    text = " ".join(hpt().split())
    assert "What to look at Edge of the space <b>\\x1b[31m*l_r*'s best values sit at its upper" in text
    assert "**What to look at**\n\n- **Edge of the space**: \\<b\\>\\\\x1b\\[31m\\*l\\_r\\*'s" in hpt(
        "--format", "md"
    )
    found = json.loads(hpt("--json"))["findings"]
    assert [finding["kind"] for finding in found] == ["edge", "importance"]
    assert found[0]["text"].startswith(f"{EVIL}'s best values sit at its upper end: ")
    assert found[0]["check"] == "Identifying bad search space boundaries"
    assert "findings" not in json.loads(hpt("--canonical"))
    page = (shown / "report.html").read_text(encoding="utf-8")
    assert '<section id="findings"><h2>What to look at</h2>' in page
    assert "&lt;b&gt;" in page
    assert "<b>\x1b" not in page


def test_a_terminal_shows_the_first_six(capsys: pytest.CaptureFixture[str]) -> None:
    many = [Finding("edge", f"Number {n}: widen.", "Boundaries") for n in range(9)]
    advice.print_findings(many)
    text = capsys.readouterr().out
    assert "Number 5" in text
    assert "Number 6" not in text
    assert "and 3 more in report.html" in text
    advice.print_findings([])
    assert capsys.readouterr().out == ""
    assert advice.as_markdown([]) == advice.as_html([]) == ""


def test_every_kind_of_finding_has_a_label() -> None:
    folder = Path(findings.__file__).parent
    texts = [(folder / f"{name}.py").read_text() for name in ("diagnosis", "curve_checks", "space_checks")]
    kinds = {kind for text in texts for kind in re.findall(r'Finding\(\s*"([a-z_]+)"', text)}
    assert kinds == set(advice.LABELS)
