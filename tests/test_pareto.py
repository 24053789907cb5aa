"""Two objectives: the Pareto set, what samplers see of it, what is refused beside it, every view of it."""

from __future__ import annotations

import functools
import io
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import canonical_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_resume import PowerSwitch

import hpt_torch
from hpt_torch import recipe as recipes
from hpt_torch import samplers, session, tasks
from hpt_torch.record import Record
from hpt_torch.report.front import front
from hpt_torch.report.markdown import markdown
from hpt_torch.report.summary import Summary, as_dict, summarise
from hpt_torch.report.terminal import print_report
from hpt_torch.result import Result
from hpt_torch.samplers import make_study
from hpt_torch.space import Choice, Float, Int, Space
from hpt_torch.types import Objective, RecipeError, Report, RunError, Trial, TrialState

RunQuick = Callable[..., str]

FIRST = Objective(metric="valid/accuracy", direction="maximize")
SIZE = Objective(metric="parameters", direction="minimize")

SPACE: Space = {name: Float(0, 1) for name in "xyzw"}

RAW: dict[str, Any] = {
    "hparams": {"batch_size": 512},
    "space": {"hidden_sizes": {"choice": [[4], [8], [16], [32]]}, "lr": {"float": [1e-3, 1e-1]}},
    "objective": {"second": {"metric": "parameters"}},
    "search": {"sampler": "tpe", "trials": 12, "round_size": 4, "max_parameters": 1000},
    "trainer": {"epochs": 2, "device": "cpu", "threads": 1, "engine": "loop"},
    "run": {"tensorboard": False},
    "executor": "inline",
}


def trial(
    number: int, accuracy: float | None, parameters: int | None, state: TrialState = TrialState.COMPLETE
) -> Trial:
    metrics = {} if accuracy is None else {FIRST.metric: accuracy}
    report = Report(trial=number, epoch=1, metrics=metrics, seconds=0.0)
    return Trial(
        number=number,
        round=number // 6,
        hparams={name: (number * (0.618 + i / 9)) % 1 for i, name in enumerate(SPACE)},
        signature="",
        state=state,
        reports=(report,),
        parameters=parameters,
    )


# -- the set -------------------------------------------------------------------------------------------


def beats(a: tuple[float, float], b: tuple[float, float], signs: tuple[int, int]) -> bool:
    """By the definition: at least as good in both, and not equal in both."""
    return all(s * x >= s * y for s, x, y in zip(signs, a, b, strict=True)) and a != b


scores = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.75, math.nan, math.inf, -math.inf]) | st.floats()
sizes = st.none() | st.integers(0, 5) | st.integers(0, 2**53)
states = st.sampled_from([TrialState.COMPLETE] * 4 + list(TrialState))
directions = st.sampled_from(["maximize", "minimize"])


@given(
    rows=st.lists(st.tuples(st.none() | scores, sizes, states), max_size=12),
    first=directions,
    second=directions,
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_the_set_is_the_one_of_the_definition(rows: list[Any], first: Any, second: Any) -> None:
    one, two = replace(FIRST, direction=first), replace(SIZE, direction=second)
    trials = [trial(n, *row) for n, row in enumerate(rows)]
    signs = (1 if first == "maximize" else -1, 1 if second == "maximize" else -1)
    at = {
        t.number: (a, b)
        for t in trials
        if t.state is TrialState.COMPLETE
        and (a := one.score(t)) is not None
        and (b := two.score(t)) is not None
    }
    expected = {n for n, own in at.items() if not any(beats(other, own, signs) for other in at.values())}
    found = front(trials, one, two)
    assert {t.number for t in found} == expected
    assert [t.number for t in found] == [
        t.number for t in sorted(found, key=lambda t: (-signs[0] * at[t.number][0], t.number))
    ]


def test_the_set_is_optunas() -> None:
    rows = [(0.5, 10), (0.5, 10), (0.4, 10), (0.4, 5), (0.9, 50), (0.9, 60), (math.nan, 1), (0.1, 5)]
    trials = [trial(n, *row) for n, row in enumerate(rows)]
    theirs = make_study(SPACE, trials, FIRST, SIZE).best_trials
    assert [t.number for t in front(trials, FIRST, SIZE)] == [4, 0, 1, 3]
    assert {t.user_attrs["hpt_torch/number"] for t in theirs} == {4, 0, 1, 3}


@pytest.mark.parametrize("state", [s for s in TrialState if s is not TrialState.COMPLETE])
def test_only_complete_trials_are_in_it(state: TrialState) -> None:
    assert front([trial(0, 0.5, 10), trial(1, 0.9, 1, state)], FIRST, SIZE)[0].number == 0


# -- what samplers make of two objectives ---------------------------------------------------------------


def history(count: int = 30) -> list[Trial]:
    """Accuracy grows with x, and so does the size."""
    trials = [trial(n, None, None) for n in range(count)]
    made = []
    for t in trials:
        x = float(t.hparams["x"])  # type: ignore[arg-type]
        made.append(trial(t.number, x, int(1 + 1000 * x)))
    return made


def proposals(kind: str, second: Objective | None, trials: list[Trial], count: int = 40) -> list[float]:
    points = samplers.suggest(
        SPACE,
        trials,
        range(len(trials), len(trials) + count),
        round=1 + max(t.round for t in trials),
        kind=kind,  # type: ignore[arg-type]
        objective=FIRST,
        second=second,
        size=6,
        seed=0,
    )
    return [float(point["x"]) for point in points]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tpe", "nsga2"])
def test_a_sampler_searches_for_both(kind: str) -> None:
    """Where the second objective is against the first, small values are as good as large ones."""
    alone = statistics.mean(proposals(kind, None, history()))
    against = statistics.mean(proposals(kind, SIZE, history()))
    along = statistics.mean(proposals(kind, replace(SIZE, direction="maximize"), history()))
    assert alone > 0.7
    assert along > 0.7
    assert 0.2 < against < 0.6


def test_nsga2_has_the_parents_that_optunas_has() -> None:
    """Its own bookkeeping, in attributes of trials, gives the same ones as our rounds."""
    rows = [((n * 7 % 11) / 11, 1 + n * 5 % 13) for n in range(24)]
    trials = [trial(n, *row) for n, row in enumerate(rows)]
    trials[7] = replace(trials[7], state=TrialState.FAILED)
    study = make_study(SPACE, trials, FIRST, SIZE)
    ours = samplers._genetic(study, 6)(seed=0)
    theirs = optuna.samplers.NSGAIISampler(population_size=6, seed=0)
    attributed = optuna.create_study(directions=["maximize", "minimize"])
    for t in study.get_trials():
        t.system_attrs = {theirs._get_generation_key(): t.user_attrs["hpt_torch/round"]}
        attributed.add_trial(t)
    for generation in range(5):
        found = [t.number for t in ours.get_parent_population(study, generation)]
        expected = [t.number for t in theirs.get_parent_population(attributed, generation)]
        assert sorted(found) == sorted(expected), generation
        assert len(found) == (6 if generation else 0)


def test_nsga2s_children_are_made_of_their_parents() -> None:
    """Without a mutation, a value of a child is one of the best six; the first generation is drawn."""
    space: Space = {"x": Float(0, 1), "y": Float(0, 1), "n": Int(0, 99)}
    trials = [replace(trial(n, n / 12, None), hparams={"x": n / 12, "y": n / 24, "n": n}) for n in range(12)]
    ask = functools.partial(samplers.suggest, space, kind="nsga2", objective=FIRST, size=6, seed=3)
    children = ask(trials, range(12, 36), round=2)
    best = {name: {t.hparams[name] for t in trials[6:]} for name in space}
    share = statistics.mean(child[name] in best[name] for child in children for name in space)
    assert 0.5 < share < 1.0  # one of three is mutated, on average
    first = ask([], range(24), round=0)
    assert not any(child[name] in best[name] for child in first for name in ("x", "y"))


def test_a_round_in_which_nothing_is_complete_leaves_its_parents() -> None:
    trials = history(12)
    lost = [replace(t, number=t.number + 12, round=2, state=TrialState.FAILED) for t in trials]
    assert set(proposals("nsga2", SIZE, [*trials, *lost])) & {float(t.hparams["x"]) for t in trials}  # type: ignore[arg-type]


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            'objective.second={metric="valid/loss"}',
            "objective.second.direction: must be given (maximize or minimize) where the metric is "
            "'valid/loss'; only parameters and flops have one",
        ),
        (
            "scheduler.kind=pbt",
            "objective.second: does not go with scheduler.kind pbt, which compares trials by one number, "
            "got 'parameters' as another; leave out one of the two",
        ),
        (
            "scheduler.kind=asha",
            "objective.second: does not go with scheduler.kind asha, which compares trials by one number, "
            "got 'parameters' as another; leave out one of the two",
        ),
        (
            'objective.second={metric="valid/accuracy", direction="maximize"}',
            "objective.second.metric: must be another one than the first objective's, got 'valid/accuracy' "
            "for both; leave objective.second out, or name parameters, flops or another metric",
        ),
        (
            'objective.second={metric="valid/acuracy", direction="maximize"}',
            "objective.second.metric: must be parameters or flops, or begin with valid/ and be one of "
            "valid/loss, valid/accuracy, got 'valid/acuracy'; did you mean valid/accuracy?",
        ),
        (
            'objective.second={metric="params", direction="minimize"}',
            "objective.second.metric: must be parameters or flops, or begin with valid/ and be one of "
            "valid/loss, valid/accuracy, got 'params'; did you mean parameters?",
        ),
        (
            'objective.second={metric="flops", way="up"}',
            "objective.second.way: unknown field; known: direction, metric",
        ),
        ("objective.second=flops", "objective.second: must be a table, got 'flops'"),
        (
            "search.round_size=1",
            "search.round_size: is the generation of nsga2, whose points have two parents, and must be at "
            "least 2, got 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(digits_task: tasks.Task, override: str, line: str) -> None:
    overrides = [override, *(["search.sampler=nsga2"] if "round_size" in override else [])]
    with pytest.raises(RecipeError) as caught:
        session.check(recipes.build(RAW, overrides, source="test"), digits_task, source="test")
    assert line in str(caught.value).splitlines()[1].strip()


def test_a_second_objective_changes_what_a_run_is() -> None:
    plain = recipes.build({**RAW, "objective": {}}, source="test").model_dump(exclude_none=True)
    two = recipes.build(RAW, source="test").model_dump(exclude_none=True)
    assert len(recipes.differences(plain, two)) == 1


# -- runs ----------------------------------------------------------------------------------------------


def summary_of(path: Path) -> Summary:
    with Record(path / "run.db", readonly=True) as record:
        return summarise(record)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
@pytest.mark.slow
def test_a_power_cut_changes_nothing(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    settings = (f"search.sampler={sampler}", "run.checkpoint_every_seconds=0", "trainer.epochs=1")
    switch = PowerSwitch(monkeypatch)
    expected = run_quick(tmp_path / "whole", *settings, raw=RAW)
    assert '"INFEASIBLE"' in expected
    found = json.loads(expected)
    assert found["second"] == {"metric": "parameters", "direction": "minimize"}
    assert found["pareto"] == [t.number for t in summary_of(tmp_path / "whole").pareto]
    for step in range(2, switch.count + 1, 12):
        path = tmp_path / str(step)
        run = functools.partial(run_quick, path, *settings, raw=RAW)
        assert switch.cut(step, step % 12 == 2, run) == expected, step


def test_a_run_has_its_pareto_set(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path, raw=RAW)
    result = Result(tmp_path)
    complete = [t for t in result.trials if t.state is TrialState.COMPLETE]
    assert len(complete) < len(result.trials)
    assert list(result.pareto) == list(front(complete, result.objective, SIZE))
    assert result.best == result.objective.ranked(complete)[0]  # decided by the first objective alone
    assert all(t.flops is None for t in result.trials)
    study = result.study
    assert [d.name.lower() for d in study.directions] == ["maximize", "minimize"]
    assert {t.user_attrs["hpt_torch/number"] for t in study.best_trials} == {t.number for t in result.pareto}
    pytest.importorskip("plotly")
    assert optuna.visualization.plot_pareto_front(study).data
    figure = result.plot.pareto()
    assert [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text] == [
        "valid/accuracy",
        "parameters",
    ]
    assert result.plot.progress().data
    assert result.plot.slice().data


def test_every_view_shows_it(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path, raw=RAW)
    summary = summary_of(tmp_path)
    text = io.StringIO()
    print_report(summary, Console(file=text, width=120))
    assert "Pareto set of valid/accuracy and parameters" in text.getvalue()
    rows = markdown(summary).partition("Pareto set of valid/accuracy and parameters:")[2]
    assert [line.split(" | ")[0].strip("| ") for line in rows.splitlines()[4 : 4 + len(summary.pareto)]] == [
        str(t.number) for t in summary.pareto
    ]
    data = as_dict(summary)
    assert data["pareto"] == [t.number for t in summary.pareto]
    Result(tmp_path)
    page = (tmp_path / "report.html").read_text()
    section = page.partition('<section id="pareto">')[2].partition("</section>")[0]
    plot, _, table = section.partition("<table")
    complete = [t for t in summary.trials if t.state is TrialState.COMPLETE]
    for t in summary.trials:
        assert plot.count(f'<a href="#t{t.number}"') == (t in complete)
        assert table.count(f'<a href="#t{t.number}"') == (t in summary.pareto)
        assert f'<tr id="t{t.number}"' in page
    assert plot.count("s-complete big") == len(summary.pareto)
    assert 'class="l so-far"' in plot


def test_one_objective_has_no_pareto_set(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path, raw={**RAW, "objective": {}})
    result = Result(tmp_path)
    assert result.pareto == ()
    assert "pareto" not in as_dict(result.summary)
    assert '"pareto"' not in canonical_of(tmp_path)
    assert 'id="pareto"' not in (tmp_path / "report.html").read_text()
    pytest.importorskip("plotly")
    with pytest.raises(RunError, match="the run has one objective; set objective.second"):
        result.plot.pareto()


def test_the_second_metric_is_the_mean_over_folds(tmp_path: Path, run_quick: RunQuick) -> None:
    override = 'objective.second={metric="valid/loss", direction="minimize"}'
    run_quick(tmp_path, override, "evaluation.folds=2", "search.trials=3", raw=RAW)
    summary = summary_of(tmp_path)
    second = Objective(metric="valid/loss", direction="minimize")
    assert summary.second == second
    for t in summary.ranked:
        assert second.score(t) == pytest.approx(
            statistics.mean(fold.metrics["valid/loss"] for fold in t.folds)
        )
    assert summary.pareto


def test_tune_records_flops_where_they_are_asked_for(tmp_path: Path, digits_task: tasks.Task) -> None:
    result = hpt_torch.tune(
        digits_task,
        {"hidden_sizes": Choice([[4], [8]])},
        sampler="grid",
        second={"metric": "flops"},
        epochs=1,
        executor="inline",
        run_dir=tmp_path,
        progress=False,
        tensorboard=False,
    )
    assert {t.hparams["hidden_sizes"]: t.flops for t in result.trials} == {
        (n,): 2 * (64 * n + n * 10) for n in (4, 8)
    }
    assert json.loads(canonical_of(tmp_path))["trials"][0]["flops"] == result.trials[0].flops
    assert "flops" in (tmp_path / "trials.csv").read_text().splitlines()[0]
