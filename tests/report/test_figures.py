"""`Result.plot` and what a notebook shows for Result and Trial."""

from __future__ import annotations

import dataclasses
import html.parser
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpt_torch import Result
from hpt_torch.types import RunError, Trial, TrialState

RunQuick = Callable[..., str]


@pytest.fixture
def result(tmp_path: Path, run_quick: RunQuick) -> Result:
    run_quick(tmp_path / "run", "search.trials=8", "trainer.epochs=3")
    return Result(tmp_path / "run")


@pytest.fixture
def population(tmp_path: Path, run_quick: RunQuick) -> Result:
    from test_evolution import POPULATION

    run_quick(tmp_path / "pbt", raw=POPULATION)
    return Result(tmp_path / "pbt")


class Balanced(html.parser.HTMLParser):
    """Fails where a tag is closed that is not the last one opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_every_figure_shows_every_trial(result: Result) -> None:
    pytest.importorskip("plotly", reason="draws with plotly")
    plot, scores = result.plot, [result.objective.score(t) for t in result.trials]
    points, best = plot.progress().data[:2]
    assert list(points.y) == scores
    assert best.y[-1] == max(s for s in scores if s is not None)
    assert {trace.xaxis for trace in plot.slice("lr", "dropout").data} == {"x", "x2"}
    parallel = plot.parallel("lr", "activation").to_json()
    assert "activation" in parallel
    assert "dropout" not in parallel
    assert plot.contour("lr", "dropout").data
    assert len(plot.importance().data[0].y) == 3
    curves = {line.name: line for line in plot.curves().data}
    assert len(curves) == 8 + 3  # of the best three also train
    first = result.summary.ranked[0]
    assert list(curves[f"trial {first.number}, valid"].y) == [
        r.metrics["valid/accuracy"] for r in first.reports
    ]
    assert list(curves[f"trial {first.number}, train"].x) == [1, 2, 3]
    assert len(plot.curves("loss").data) == 11
    diagonal, trials = plot.gap().data
    assert list(diagonal.x) == list(diagonal.y)
    assert list(trials.y) == [t.metrics["valid/accuracy"] for t in result.summary.ranked]


def test_what_cannot_be_drawn_is_said(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly", reason="draws with plotly")
    with pytest.raises(RunError, match="'lrr' was not searched; searched were lr, dropout, activation"):
        result.plot.slice("lrr")
    with pytest.raises(RunError, match="no trial reported valid/f1; reported are accuracy, loss"):
        result.plot.curves("f1")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"needs plotly: pip install 'hpt-torch\[plots\]'"):
        result.plot.progress()


def test_a_schedule_is_the_lineage_of_the_best(population: Result) -> None:
    pytest.importorskip("plotly", reason="draws with plotly")
    from hpt_torch.report.schedule import best_schedule

    *faint, bold = population.plot.schedule("lr").data
    assert len(faint) == 6
    expected = [(e, s.hparams["lr"]) for s in best_schedule(population.summary) for e in (s.after, s.until)]
    assert list(zip(bold.x, bold.y, strict=True)) == expected
    assert bold.name.endswith("the best")
    assert population.plot.schedule("lr").layout.yaxis.type == "log"


def test_the_study_is_optunas(result: Result) -> None:
    pytest.importorskip("plotly", reason="draws with plotly")
    import optuna

    assert len(optuna.visualization.plot_intermediate_values(result.study).data) == 8


def test_cards_hold_the_answer(result: Result) -> None:
    card = Balanced(result._repr_html_())
    best = result.best
    score = f"{result.objective.score(best):.4f}"
    assert score in card.text
    assert f"{result.holdout['holdout/accuracy']:.4f}" in card.text
    assert "8 complete" in card.text
    trial = Balanced(best._repr_html_())
    assert f"Trial {best.number}" in trial.text
    assert all(name in trial.text for name in (*best.hparams, *best.metrics))
    assert score in trial.text


def test_cards_escape_and_survive_anything(result: Result) -> None:
    evil = "<script>alert('x')</script>&\"'"
    trial = Trial(
        number=3, round=0, signature="", state=TrialState.FAILED, reason=f"Traceback\n{evil}",
        hparams={evil: evil, "sizes": (1, 2)},
    )  # fmt: skip
    card = Balanced(trial._repr_html_())
    assert "<script" not in trial._repr_html_()
    assert evil in card.text
    empty = dataclasses.replace(result.summary, name=evil, trials=[trial], best=None)
    from hpt_torch.report.cards import result_card

    text = result_card(empty, Path(evil))
    assert "no trial is complete yet" in Balanced(text).text
    assert "<script" not in text
