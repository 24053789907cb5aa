"""report.html: what it says, that it is safe, and (where there is one) that a browser is content with it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
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
    pause_event,
    report_event,
    state_event,
    trial_event,
)
from hpt_torch.report import export, findings, plots, summarise
from hpt_torch.report.markdown import markdown
from hpt_torch.report.page import page
from hpt_torch.report.summary import wilson
from hpt_torch.report.svg import linear, logarithmic, number, robust, seconds
from hpt_torch.types import Report, TrialState

SPACE: dict[str, Any] = {
    "lr": {"float": [1e-4, 1e-1], "default": 1e-3},
    "layers": {"int": [1, 3]},
    "optimizer": {"choice": ["sgd", "adam"]},
    "momentum": {"float": [0.0, 0.9], "when": {"optimizer": ["sgd"]}},
    "hidden_sizes": {"choice": [[16], [16, 8]]},
}
SHORT_EVIL = "<b onclick=alert(3)>"
EVIL = "</script><img src=x onerror=alert(1)>\"'`</title></style><svg onload=alert(2)>"


_opened: list[Record] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while _opened:
        _opened.pop().close()


class Run:
    """A record written by hand: `trial` plans and trains one, `end` finishes it."""

    def __init__(
        self, path: Path, space: Mapping[str, Any] = SPACE, planned: int | None = None, **recipe: Any
    ):
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.record = path, Record(path / "run.db")
        _opened.append(self.record)
        raw = {"name": "by hand", "seed": 0, "hparams": {"batch_size": 32}, "space": dict(space), **recipe}
        objective = {"metric": "valid/accuracy", "direction": "maximize"}
        begun = {"format": 1, "version": "0", "recipe": raw, "objective": objective, "device": "cpu"}
        session = {"pid": 1, "host": "here", "budget": {"trials": planned}, "packages": {"torch": "2.9"}}
        self.record.append(Event(kind="run", body=begun))
        self.session = Event(kind="session", body=session)
        self.record.append(self.session)

    def trial(self, number: int, scores: list[float], **hparams: Any) -> None:
        self.record.append(trial_event(number, 0, hparams, ""))
        for epoch, score in enumerate(scores, start=1):
            metrics = {"valid/accuracy": score, "train/accuracy": score + 0.01, "valid/loss": 1 - score}
            self.record.append(report_event(Report(trial=number, epoch=epoch, metrics=metrics, seconds=0.5)))

    def end(
        self, number: int, state: TrialState = TrialState.COMPLETE, reason: str = "", kept: int = 0
    ) -> None:
        self.record.append(finish_event(number, state, reason, kept_epoch=kept))

    def holdout(self, trial: int, accuracy: float, rows: int = 100) -> None:
        body = {"trial": trial, "metrics": {"holdout/accuracy": accuracy, "holdout/loss": 0.3}, "rows": rows}
        self.record.append(Event(kind="holdout", body=body))

    def best_file(self) -> None:
        """Weights for the best trial, as `hpt report` copies them."""
        best = summarise(self.record).best
        assert best is not None
        (self.path / "checkpoints").mkdir()
        (self.path / "checkpoints" / "best.safetensors").write_bytes(b"weights")
        digest = hashlib.sha256(b"weights").hexdigest()
        self.record.append(
            state_event(
                StateFile(name="best.safetensors", sha256=digest, key="best", meta={"trial": best.number})
            )
        )

    def page(self) -> str:
        return page(self.record, summarise(self.record))


def ordinary(path: Path, trials: int = 24, epochs: int = 3) -> Run:
    """Complete trials whose score depends on lr alone, one pruned, two failed, one infeasible."""
    run = Run(path, planned=trials + 4)
    for n in range(trials):
        lr = 10 ** (-4 + 3 * ((n * 0.618034) % 1))
        peak = 0.95 - 0.1 * abs(math.log10(lr) + 2)
        sgd = {"momentum": 0.03 * (n % 30)} if n % 2 else {}
        optimizer = "sgd" if n % 2 else "adam"
        sizes = ((16,), (16, 8))[n % 2]
        scores = [peak - 0.2 / (e + 1) + 0.2 / (epochs + 1) for e in range(1, epochs + 1)]
        run.trial(n, scores, lr=lr, layers=1 + n % 3, optimizer=optimizer, hidden_sizes=sizes, **sgd)
        run.end(n)
    run.trial(trials, [0.3], lr=2e-4, layers=1, optimizer="adam", hidden_sizes=(16,))
    run.end(trials, TrialState.PRUNED, "below the median")
    for n in (trials + 1, trials + 2):
        run.trial(n, [], lr=0.1, layers=3, optimizer="adam", hidden_sizes=(16,))
        run.end(
            n, TrialState.FAILED, f"Traceback (most recent call last):\n  line {n}\nValueError: loss is nan"
        )
    run.trial(trials + 3, [], lr=0.1, layers=3, optimizer="adam", hidden_sizes=(16,))
    run.end(trials + 3, TrialState.INFEASIBLE, "kernel larger than input")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return ordinary(tmp_path / "run")


class Outline(HTMLParser):
    """What a browser would make of the page: elements, their attributes, texts by element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._shown: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.left_open = self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "br", "wbr"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.texts.setdefault(tag, []).append(data)
        if tag not in ("style", "script", "title"):
            self._shown.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self._shown).split())


# -- what it says --------------------------------------------------------------------------------------


def test_the_answer_comes_first_then_everything_else_in_order(run: Run) -> None:
    run.holdout(trial=summarise(run.record).best.number, accuracy=0.9)  # type: ignore[union-attr]
    text = run.page()
    outline = Outline(text)
    assert outline.left_open == []
    assert [i for i in outline.ids if not re.fullmatch(r"t\d+", i)] == [
        "answer", "findings", "progress", "curves", "parallel", "slices", "importance", "interaction",
        "timeline", "trials", "failures", "origin",
    ]  # fmt: skip
    best = summarise(run.record).best
    assert best is not None
    words = outline.words
    assert f"{number(best.metrics['valid/accuracy'])}" in words
    assert (
        "0.9000 100 rows that no decision saw, read once, after the search. 95 % interval 0.8256 to 0.9448"
        in words
    )
    assert "24 complete 1 pruned 2 failed 1 infeasible" in words
    assert "of it training: 36.5 s for 73 epochs" in words
    assert "finished" in outline.texts["span"]
    assert f"{best.hparams['lr']:.4g}" in words
    assert "0.0001 to 0.1 (log scale)" in words


def test_every_trial_has_a_row_and_every_link_leads_to_one(run: Run) -> None:
    outline = Outline(run.page())
    rows = [i for i in outline.ids if re.fullmatch(r"t\d+", i)]
    assert rows == [f"t{n}" for n in range(28)]
    targets = {value[1:] for name, value in outline.attributes if name == "href" and value.startswith("#")}
    assert targets <= set(outline.ids)
    assert targets >= set(rows)  # each dot of the first figure is a link
    marks = {value for name, value in outline.attributes if name == "data-t"}
    assert marks == {str(n) for n in range(28)}


def test_failures_are_grouped_and_their_tracebacks_folded(run: Run) -> None:
    found = findings.failures(summarise(run.record))
    assert [(f.line, f.state, list(f.trials)) for f in found] == [
        ("ValueError: loss is nan", "FAILED", [25, 26]),
        ("kernel larger than input", "INFEASIBLE", [27]),
    ]
    outline = Outline(run.page())
    assert any("line 25\nValueError" in text for text in outline.texts["pre"])
    assert not any("line 26" in text for text in outline.texts["pre"])
    assert "failed 2 ×" in outline.words


def test_a_traceback_without_end_does_not_make_a_page_without_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for n in range(60):
        run.trial(n, [], lr=0.1)
        run.end(n, TrialState.FAILED, "x" * 200_000 + f"\nError {n}")
    text = run.page()
    assert len(text) < 500_000
    assert "20 further kinds of failure are in trials.csv" in text


def test_importance_finds_what_matters_and_says_when_it_cannot(run: Run, tmp_path: Path) -> None:
    assert "A tenth of 24 is few trials" in findings.importance(summarise(run.record)).note
    known = findings.importance(summarise(ordinary(tmp_path / "many", trials=100).record))
    assert next(iter(known.best)) == next(iter(known.whole)) == "lr"
    assert sum(known.best.values()) == pytest.approx(1)
    assert known.note.endswith("the best tenth of 100 complete trials apart, each hyperparameter alone.")
    few = ordinary(tmp_path / "few", trials=3)
    assert findings.importance(summarise(few.record)) == findings.Importance(
        {},
        {},
        "Importance compares the best tenth of the trials with all of them, so it needs at least 20 complete "
        "trials; there are 3.",
    )
    same = Run(tmp_path / "same")
    for n in range(30):
        same.trial(n, [0.5], lr=10 ** (-4 + n / 10))
        same.end(n)
    assert findings.importance(summarise(same.record)).note.startswith(
        "Every complete trial has the same score"
    )
    assert "same score" in Outline(same.page()).words


def test_the_hold_out_is_never_shown_for_another_trial(run: Run) -> None:
    best = summarise(run.record).best
    assert best is not None
    assert "No hold-out rows were read" in run.page()
    run.holdout(trial=best.number + 1, accuracy=0.99)
    assert "read once, for an earlier best trial" in run.page()
    assert "0.9900" not in run.page()
    run.holdout(trial=best.number, accuracy=0.75)
    words = Outline(run.page()).words
    assert "0.7500 100 rows that no decision saw, read 2 times" in words
    assert "a little less honest" in words


def test_declared_defaults_are_compared_with(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trial(0, [0.7], lr=1e-3, layers=1, optimizer="adam", hidden_sizes=(16,))
    run.end(0)
    run.trial(1, [0.8], lr=1e-4, layers=1, optimizer="adam", hidden_sizes=(16,))
    run.end(1)
    words = Outline(run.page()).words
    assert "declared defaults ( trial 0 ): 0.7000" in words
    assert "at its lower end" in words  # the best lr is the lowest that was searched
    assert "declared defaults 0.7000" in markdown(summarise(run.record))


def test_equal_records_give_equal_pages(run: Run) -> None:
    first = run.page()
    with Record(run.path / "run.db", readonly=True) as again:
        assert page(again, summarise(again)) == first


# -- any record gives a page ---------------------------------------------------------------------------


def _nothing(run: Run) -> None:
    pass


def _planned_only(run: Run) -> None:
    run.trial(0, [], lr=0.01, layers=1, optimizer="adam", hidden_sizes=(16,))


def _failed_only(run: Run) -> None:
    for n in range(3):
        run.trial(n, [], lr=0.01)
        run.end(n, TrialState.FAILED)


def _one(run: Run) -> None:
    run.trial(0, [0.5], lr=0.01, layers=2, optimizer="sgd", momentum=0.5, hidden_sizes=(16, 8))
    run.end(0)


def _not_finite(run: Run) -> None:
    for n, score in enumerate([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.5]):
        run.trial(n, [score, score], lr=0.01, layers=1, optimizer="adam", hidden_sizes=(16,))
        run.end(n)


def _running(run: Run) -> None:
    _one(run)
    run.trial(1, [0.4], lr=0.02, layers=2, optimizer="adam", hidden_sizes=(16,))
    run.trial(2, [0.6], lr=0.03)
    run.record.append(pause_event([2]))
    run.record.append(run.session)
    run.trial(3, [])


def _strange_values(run: Run) -> None:
    run.trial(0, [0.5], lr="not a number", layers=None, optimizer="gone", hidden_sizes=(1, (2, "x")), new=[])
    run.end(0)


@pytest.mark.parametrize(
    "fill", [_nothing, _planned_only, _failed_only, _one, _not_finite, _running, _strange_values]
)
@pytest.mark.parametrize("space", [SPACE, {}, {"only": {"choice": [1]}, "k": {"int": [3, 3]}}])
def test_any_record_gives_a_page(tmp_path: Path, fill: Any, space: dict[str, Any]) -> None:
    run = Run(tmp_path, space)
    fill(run)
    summary = summarise(run.record)
    outline = Outline(page(run.record, summary))
    assert outline.left_open == []
    assert sum(bool(re.fullmatch(r"t\d+", i)) for i in outline.ids) == len(summary.trials)
    paths = " ".join(value for name, value in outline.attributes if name in ("d", "style"))
    assert not re.search("nan|inf", paths)
    assert markdown(summary).startswith("### by hand")


def test_a_run_in_progress_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, planned=10)
    _running(run)
    words = Outline(run.page()).words
    assert "not finished" in words
    assert "4 of 10 trials" in words
    assert "It is read once, when the search has ended." in words


@pytest.mark.slow
def test_a_thousand_trials_stay_below_five_megabytes(tmp_path: Path) -> None:
    run = Run(tmp_path)
    events = []
    for n in range(1000):
        hparams = {"lr": 10 ** (-4 + n / 400), "layers": 1 + n % 3, "optimizer": "adam", "hidden_sizes": [16]}
        events.append(trial_event(n, 0, hparams, ""))
        for epoch in range(1, 101):
            metrics = {
                f"{part}/{m}": 0.001 * (n + epoch)
                for part in ("train", "valid")
                for m in ("accuracy", "loss")
            }
            events.append(report_event(Report(trial=n, epoch=epoch, metrics=metrics, seconds=0.1)))
        events.append(finish_event(n, TrialState.COMPLETE))
    run.record.append(*events)
    text = run.page()
    assert len(text.encode()) < 2_500_000
    assert "faint curves are drawn, evenly by rank" in text
    assert "of long curves, 60 epochs" in text


# -- it is safe ----------------------------------------------------------------------------------------


def evil_run(path: Path) -> Run:
    space = {EVIL: {"choice": [EVIL, SHORT_EVIL]}, "lr": {"float": [1e-4, 1e-1]}, "w": {"float": [0.0, 1.0]}}
    run = Run(path, space, name=EVIL, hparams={EVIL: EVIL, "surrogate": "\ud800"})
    for n in range(22):
        run.trial(
            n, [0.5 + 0.01 * n, 0.51 + 0.01 * n], **{EVIL: EVIL, "lr": 10 ** (-4 + n / 10), "w": n / 22}
        )
        run.end(n)
    run.trial(22, [], **{EVIL: SHORT_EVIL, "lr": 0.1, "w": 1.0})
    run.end(22, TrialState.FAILED, EVIL + "\n" + EVIL)
    run.record.append(
        Event(kind="session", body={**run.session.body, "host": EVIL, "packages": {EVIL: EVIL}})
    )
    return run


def test_every_string_is_escaped(tmp_path: Path) -> None:
    outline = Outline(evil_run(tmp_path).page())
    assert outline.left_open == []
    assert {"img", "image", "iframe", "object", "embed", "form", "base"} & set(outline.tags) == set()
    assert outline.tags.count("script") == 1
    assert outline.tags.count("style") == 1
    assert [name for name, _ in outline.attributes if name.startswith("on")] == []
    assert "onload" not in "".join(outline.texts["script"])
    assert EVIL in outline.words
    assert EVIL in "".join(outline.texts["title"])


def test_nothing_is_loaded_and_no_other_script_can_run(tmp_path: Path) -> None:
    run = evil_run(tmp_path)
    outline = Outline(run.page())
    assert not [
        (n, v) for n, v in outline.attributes if n in ("src", "srcset", "action", "data", "xlink:href")
    ]
    links = [value for name, value in outline.attributes if name == "href"]
    assert {value for value in links if not value.startswith("#")} == {"data:,"}
    assert "url(" not in "".join(outline.texts["style"])
    assert "@import" not in "".join(outline.texts["style"])
    policy = next(v for n, v in outline.attributes if n == "content" and "default-src" in v)
    digest = hashlib.sha256("".join(outline.texts["script"]).encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy
    written = export.write_page(run.record, summarise(run.record), tmp_path)
    assert written is not None  # also with text that UTF-8 cannot hold
    assert written.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_markdown_cannot_be_broken_out_of(tmp_path: Path) -> None:
    text = markdown(summarise(evil_run(tmp_path).record))
    assert not re.search(r"(?<!\\)<", text)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    run = Run(tmp_path / "two", name="a\n# b | c @someone #12 ![x](y)")
    first = markdown(summarise(run.record)).splitlines()[0]
    assert first == "### a #\u2060 b \\| c @\u2060someone #\u206012 \\!\\[x\\](y) (not finished)"


def test_a_page_that_cannot_be_written_fails_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    summary = summarise(run.record)
    (tmp_path / "report.html").mkdir()
    with caplog.at_level(logging.WARNING):
        assert export.write_page(run.record, summary, tmp_path) is None
    assert "could not be written: IsADirectoryError" in caplog.text
    monkeypatch.setattr(export, "page", lambda *_: 1 / 0)
    assert export.write_page(run.record, summary, run.path) is None
    assert "ZeroDivisionError" in caplog.text


# -- scales and times ----------------------------------------------------------------------------------


def test_ticks() -> None:
    def labels(scale: Any) -> list[str]:
        return [text for _, text in scale.ticks]

    assert labels(linear(0, 1)) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert labels(linear(0.5, 3.5, whole=True)) == ["1", "2", "3"]
    assert labels(linear(0, 2500)) == ["0", "500", "1,000", "1,500", "2,000", "2,500"]
    assert labels(logarithmic(1e-4, 1e-1)) == ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]
    assert labels(logarithmic(1, 1000)) == ["1", "10", "100", "1000"]
    assert labels(logarithmic(16, 256)) == ["20", "50", "100", "200"]
    assert labels(seconds(9000)) == ["0.0 h", "0.5 h", "1.0 h", "1.5 h", "2.0 h", "2.5 h"]
    assert logarithmic(1e-4, 1e-1).at(1e-2) == pytest.approx(2 / 3)
    assert linear(7, 7).at(7) == 0.5


def test_a_few_bad_scores_do_not_flatten_the_others() -> None:
    good = [0.9 + 0.001 * i for i in range(40)]
    scale, cut = robust([*good, 0.1, -1e9], "maximize")
    assert cut == 2
    assert scale.low > 0.85
    assert scale.high > max(good)  # never on the better side
    assert robust([*good, 0.1, -1e9], "minimize")[1] == 0
    assert robust(good, "maximize")[1] == 0
    assert robust([math.nan], "maximize")[1] == 0
    scale, _ = robust([1e-3 * 1.4**i for i in range(40)], "minimize")
    assert scale.log


def test_wilsons_interval() -> None:
    low, high = wilson(0.9, 100)  # Newcombe 1998's method 3: 0.8256 to 0.9448
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert wilson(1.0, 10)[1] == 1.0
    assert wilson(0.0, 10)[0] == 0.0


def test_times_leave_interruptions_out_and_trials_together_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    clock = iter([1.0, 3.0, 5.0, 0.5, 2.0, 2.0])
    monkeypatch.setattr(run.record, "elapsed", lambda: next(clock))
    both = [report_event(Report(trial=n, epoch=1, metrics={}, seconds=0.75)) for n in (0, 1)]
    run.record.append(*(trial_event(n, 0, {}, "") for n in (0, 1, 2)))  # at 1 s
    run.record.append(*both)  # at 3 s: 1.5 s of training together
    run.record.append(report_event(Report(trial=1, epoch=2, metrics={}, seconds=9.0)))  # at 5 s
    run.record.append(run.session)  # another session, 0.5 s after its beginning
    run.record.append(report_event(Report(trial=2, epoch=1, metrics={}, seconds=0.5)))  # at 2 s of it
    run.record.append(finish_event(2, TrialState.COMPLETE))
    when = plots.times(run.record)
    assert when.spans[0] == (1.5, 3.0)
    assert when.spans[1] == (1.5, 5.0)
    assert when.spans[2] == (6.5, 7.0)
    assert when.sessions[1:] == [5.5]
    assert when.total == 7.0 == pytest.approx(run.record.seconds_used(), abs=0.5)


# -- the command line ----------------------------------------------------------------------------------


@pytest.fixture
def finished(run: Run) -> Path:
    run.best_file()
    return run.path


def test_report_writes_the_page_and_says_where_on_stderr(finished: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(finished)])
    assert done.exit_code == 0
    assert done.stderr == f"With plots: {finished / 'report.html'}\n"
    assert "report.html" not in done.stdout
    assert "Best: trial" in done.stdout
    assert (finished / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_json_and_canonical_write_no_page(finished: Path) -> None:
    for option in ("--json", "--canonical"):
        done = CliRunner().invoke(app, ["report", str(finished), option])
        assert (done.exit_code, done.stderr) == (0, "")
        json.loads(done.stdout)
        assert not (finished / "report.html").exists()
        assert CliRunner().invoke(app, ["report", str(finished), option, "--open"]).exit_code == 2
    assert CliRunner().invoke(app, ["report", str(finished), "--format", "pdf"]).exit_code == 2


def test_markdown_for_a_pull_request(finished: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(finished), "--format", "md"])
    assert done.exit_code == 0
    assert done.stdout.startswith("### by hand\n\n24 complete, 2 failed, 1 infeasible, 1 pruned in ")
    assert len([line for line in done.stdout.splitlines() if line.startswith("|")]) == 7
    assert "\n- 2 failed: ValueError: loss is nan\n- 1 infeasible: kernel larger than input\n" in done.stdout


def test_open_shows_the_page(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open_new_tab", opened.append)
    assert CliRunner().invoke(app, ["report", str(finished), "--open"]).exit_code == 0
    assert opened == [(finished / "report.html").resolve().as_uri()]


# -- a real browser ------------------------------------------------------------------------------------


def _chromium() -> str:
    """Path of the browser; skips, with the reason, where there is none or nothing to drive it with."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on the PATH")
    return found


_PLACE = (
    "e => { const box = e.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] }"
)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ordinary, evil_run])
def test_a_browser_is_content_and_sorts_and_shows(tmp_path: Path, make: Any) -> None:
    executable = _chromium()
    from playwright.sync_api import sync_playwright

    run = make(tmp_path / "run")
    target = export.write_page(run.record, summarise(run.record), tmp_path)
    assert target is not None
    complaints: list[str] = []
    requests: list[str] = []
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        for width in (1200, 390):
            tab = browser.new_page(viewport={"width": width, "height": 800})
            tab.on("console", lambda message: complaints.append(message.text))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("dialog", lambda dialog: complaints.append(dialog.message))
            tab.on("request", lambda request: requests.append(request.url))
            tab.goto(target.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out

            head = tab.locator("table.trials thead th").nth(2)
            head.click()
            head.click()
            assert head.get_attribute("aria-sort") == "descending"
            best = summarise(run.record).ranked[0].number
            assert tab.locator("table.trials tbody th").first.inner_text() == str(best)
            last = tab.locator("table.trials tbody tr").last.inner_text()
            assert "–" in last  # those without a score come last in both directions

            dot = tab.locator("#progress .d.best")
            dot.scroll_into_view_if_needed()
            # a stroke without length has no size, which the driver takes for invisible
            at = dot.evaluate(_PLACE)
            tab.mouse.move(*at)
            tip = tab.locator(".tip")
            assert tip.is_visible()
            assert tip.inner_text().split()[:2] == ["trial", str(best)]
            for mark in tab.locator("#progress .d").all():
                tab.mouse.move(*mark.evaluate(_PLACE))
                assert tip.locator("span").nth(1).inner_text() == mark.get_attribute("data-t")
            tab.mouse.click(*at)
            tab.wait_for_url(f"**#t{best}")

            axis = tab.locator(".parallel .axis").last
            axis.scroll_into_view_if_needed()
            box = axis.bounding_box()
            assert box is not None
            x, y = box["x"] + box["width"] / 2, box["y"]
            tab.mouse.move(x, y + 0.3 * box["height"])
            tab.mouse.down()
            tab.mouse.move(x, y + 0.6 * box["height"])
            tab.mouse.up()
            kept = re.match(r"(\d+) of (\d+) trials pass", tab.locator(".brushed").inner_text())
            assert kept is not None
            assert 0 < int(kept[1]) < int(kept[2])
            for line in tab.locator(".parallel .l:not(.out)").all():
                height = re.search(r" 1000,(\d+)$", line.get_attribute("d") or "")
                assert height is not None
                assert 290 < int(height[1]) < 610
            assert tab.locator(".parallel .out").count() == int(kept[2]) - int(kept[1])
            tab.close()
        browser.close()
    assert complaints == []
    assert set(requests) <= {target.as_uri(), "data:,"}
