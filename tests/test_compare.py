"""hpt compare: runs side by side, in words, in tables and on a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, ROOT
from typer.testing import CliRunner

from hpt_torch.cli import app
from hpt_torch.record import Event, Record, finish_event, report_event, trial_event
from hpt_torch.report import compare, compare_views
from hpt_torch.types import Report, RunError, TrialState

LR: dict[str, Any] = {"lr": {"float": [1e-4, 1e-1]}}
EVIL = "<script>alert(1)</script>|`*"


def made(
    path: Path, scores: list[float], *, seconds: float = 1.0, holdout: float | None = None, rows: int = 1000,
    data: str = "same", metric: str = "valid/accuracy", space: dict[str, Any] | None = None, **recipe: Any,
) -> Path:  # fmt: skip
    """A run written by hand: a trial a score, each `seconds` after the last."""
    path.mkdir(parents=True)
    with Record(path / "run.db") as record:
        clock = iter(
            [0.0] * 2 + [seconds * (n + 1) for n in range(len(scores))] + [seconds * len(scores)] * 9
        )
        record.elapsed = lambda: next(clock)  # type: ignore[method-assign]
        objective = {"metric": metric, "direction": "minimize" if metric.endswith("loss") else "maximize"}
        raw = {"name": path.name, "seed": 0, "hparams": {"batch_size": 64}, "space": space or LR,
               "search": {"sampler": "random", "trials": 9}, **recipe}  # fmt: skip
        record.append(
            Event(kind="run", body={"format": 1, "recipe": raw, "objective": objective, "data": data})
        )
        record.append(Event(kind="session", body={"budget": {"trials": None}, "valid_rows": rows}))
        for number, score in enumerate(scores):
            report = Report(
                trial=number, epoch=1, metrics={metric: score, "train/accuracy": 1.0}, seconds=0.0
            )
            record.append(
                trial_event(number, 0, {"lr": (number + 1) / 100}, ""),
                report_event(report),
                finish_event(number, TrialState.COMPLETE, "", kept_epoch=1),
            )
        if holdout is not None:
            best = (min if metric.endswith("loss") else max)(scores)
            body = {"trial": scores.index(best), "metrics": {"holdout/accuracy": holdout}, "rows": rows}
            record.append(Event(kind="holdout", body=body))
    return path


def rows(runs: list[compare.Run], title: str) -> dict[str, list[str]]:
    tables = {table.title: table for table in compare.tables(runs)}
    return {label: list(cells) for label, cells in tables[title].rows} if title in tables else {}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        made(tmp_path / "a", [0.5, 0.7, 0.6, 0.8], holdout=0.75),
        made(tmp_path / "b", [0.7, 0.65, 0.9], seconds=3.0, holdout=0.88, seed=1,
             space={"lr": {"float": [1e-4, 1.0], "default": 0.01}}),
    ]  # fmt: skip


def test_what_each_run_reached(two: list[Path]) -> None:
    found = rows(compare.read(two), "What each run reached")
    assert found["best valid/accuracy"] == ["0.8000", "0.9000"]
    assert found["its hold-out accuracy"] == ["0.7500", "0.8800"]
    assert found["best trial"] == ["3", "2"]
    assert found["trials"] == ["4 complete", "3 complete"]
    assert found["epochs trained"] == ["4", "3"]


def test_only_what_differs_is_shown(two: list[Path]) -> None:
    runs = compare.read(two)
    assert rows(runs, "What the recipes differ in") == {
        "seed": ["0", "1"],
        "space.lr": ["float [0.0001, 0.1]", "float [0.0001, 1.0], default 0.01"],
    }
    assert rows(runs, "What their best trials differ in") == {"lr": ["0.04", "0.03"]}


def test_budgets_differ_too_and_a_setting_of_one_run_only_is_a_dash_in_the_other(tmp_path: Path) -> None:
    a = made(tmp_path / "a", [0.5], search={"sampler": "tpe", "trials": 5})
    b = made(tmp_path / "b", [0.5], search={"sampler": "tpe", "timeout": 60.0}, run={"tensorboard": False})
    assert rows(compare.read([a, b]), "What the recipes differ in") == {
        "search.timeout": ["–", "60.0"],
        "search.trials": ["5", "–"],
    }


def test_the_best_so_far_by_trials_and_by_time(two: list[Path]) -> None:
    runs = compare.read(two)
    assert runs[0].by_trial == [(1, 0.5), (2, 0.7), (4, 0.8)]
    assert runs[1].by_time == [(3.0, 0.7), (9.0, 0.9)]
    assert rows(runs, "Best score so far, by trials") == {
        "1": ["0.5000", "0.7000"], "2": ["0.7000", "0.7000"], "5": ["0.8000", "0.9000"],
    }  # fmt: skip
    assert rows(runs, "Best score so far, by wall-clock") == {
        "1.0 s": ["0.5000", "–"], "2.0 s": ["0.7000", "–"], "5.0 s": ["0.8000", "0.7000"],
        "10.0 s": ["0.8000", "0.9000"],
    }  # fmt: skip


def test_the_verdict_says_who_leads_and_whether_that_can_be_told(tmp_path: Path, two: list[Path]) -> None:
    assert compare.verdict(compare.read(two)) == [
        "b has the best valid/accuracy, 0.9000: 0.1000 better than a.",
        "On hold-out rows b is best, with 0.8800; to choose between runs by this figure is a choice, too, "
        "and flatters it.",
    ]
    close = [made(tmp_path / "c", [0.80], rows=100), made(tmp_path / "d", [0.81], rows=100)]
    assert compare.verdict(compare.read(close)) == [
        "d has the best valid/accuracy, 0.8100: 0.0100 better than c, which is less than one standard error "
        "of a score (0.0392, 100 valid rows)."
    ]
    tie = [made(tmp_path / name, [0.8], holdout=0.7) for name in "ef"]
    assert compare.verdict(compare.read(tie)) == [
        "e and f share the best valid/accuracy, 0.8000.",
        "On hold-out rows e and f share the best value, 0.7000.",
    ]


def test_what_stands_against_a_comparison_is_said(tmp_path: Path) -> None:
    a = made(tmp_path / "a", [0.8])
    other = made(tmp_path / "b", [0.9], data="another split")
    assert compare.verdict(compare.read([a, other]))[0].startswith("Not all runs are scored on the same rows")
    loss = made(tmp_path / "c", [0.9, 0.4], metric="valid/loss")
    runs = compare.read([a, loss])
    assert compare.verdict(runs) == ["The runs optimise different metrics, so their scores are not compared."]
    found = rows(runs, "What each run reached")
    assert found["best valid/accuracy"] == ["0.8000", "–"]
    assert found["best valid/loss"] == ["–", "0.4000"]
    assert "<figure>" not in compare_views.html(runs)


def test_lower_is_better_where_the_objective_says_so(tmp_path: Path) -> None:
    a = made(tmp_path / "a", [0.9, 0.4, 0.6], metric="valid/loss")
    b = made(tmp_path / "b", [0.5], metric="valid/loss")
    runs = compare.read([a, b])
    assert compare.verdict(runs)[0] == "a has the best valid/loss, 0.4000: 0.1000 better than b."
    assert runs[0].by_trial == [(1, 0.9), (2, 0.4)]


def test_runs_that_found_nothing_and_runs_of_one_name(tmp_path: Path) -> None:
    a, b = made(tmp_path / "x" / "run", []), made(tmp_path / "y" / "run", [0.5])
    runs = compare.read([a, b])
    assert [run.name for run in runs] == [str(a), str(b)]
    assert compare.verdict(runs) == []
    assert rows(runs, "What each run reached")["trials"] == ["none yet", "1 complete"]
    assert compare_views.html(runs).count("<figure>") == 2
    assert compare_views.html([runs[0], runs[0]]).count("<figure>") == 0
    with pytest.raises(RunError, match="name each run once"):
        compare.read([a, tmp_path / "x" / ".." / "x" / "run"])


# -- views ---------------------------------------------------------------------------------------------


def test_texts_of_the_runs_are_escaped(tmp_path: Path) -> None:
    a = made(tmp_path / "a", [0.5], hparams={"note": EVIL, EVIL: 1})
    b = made(tmp_path / "b", [0.6])
    runs = compare.read([a, b])
    assert "<script" not in compare_views.html(runs)
    text = compare_views.markdown(runs)
    assert not re.search(r"(?<!\\)<", text)
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 4


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "link", "path", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag


def test_the_command_prints_text_or_markdown_and_writes_a_page(two: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "both.html"
    done = CliRunner().invoke(app, ["compare", *map(str, two), "--html", str(target)])
    assert done.exit_code == 0
    assert "b has the best valid/accuracy, 0.9000" in done.stdout
    assert "What the recipes differ in" in done.stdout
    assert done.stderr == f"With curves: {target}\n"
    page = target.read_text()
    parser = _Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert page.count('<path class="l b0"') == page.count('<path class="l b1"') == 2
    done = CliRunner().invoke(app, ["compare", *map(str, two), "--format", "md"])
    assert done.stdout.startswith(
        "### a / b\n\n- b has the best valid/accuracy, 0.9000: 0.1000 better than a.\n"
    )
    assert "\n| best valid/accuracy | 0.8000 | 0.9000 |\n" in done.stdout


def test_what_the_command_refuses(two: list[Path], tmp_path: Path) -> None:
    for arguments in ([str(two[0])], [*map(str, two), "--format", "pdf"]):
        assert CliRunner().invoke(app, ["compare", *arguments]).exit_code == 2
    done = CliRunner().invoke(app, ["compare", str(two[0]), str(tmp_path / "none")])
    assert "is not a run directory" in str(done.exception)
    done = CliRunner().invoke(app, ["compare", *map(str, two), "--html", str(tmp_path / "no" / "such.html")])
    assert "cannot be written: No such file or directory; name another file" in str(done.exception)


def test_two_runs_of_digits(run_quick: Callable[..., str], tmp_path: Path) -> None:
    run_quick(tmp_path / "one", raw={**QUICK, "name": "one"})
    run_quick(tmp_path / "two", raw={**QUICK, "name": "two", "search": {**QUICK["search"], "trials": 2}})
    runs = compare.read([tmp_path / "one", tmp_path / "two"])
    assert rows(runs, "What the recipes differ in") == {"search.trials": ["4", "2"]}
    assert rows(runs, "What each run reached")["trials"] == ["4 complete", "2 complete"]
    assert set(rows(runs, "Best score so far, by trials")) >= {"1"}
    assert len(compare.verdict(runs)) >= 1


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    (row,) = [line for line in text.splitlines() if line.startswith("| commands |")]
    assert set(re.findall(r"`(?:hpt )?(\w+)`", row)) == set(names)
