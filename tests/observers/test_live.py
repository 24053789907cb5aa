"""The live view: what it counts, how it fits a terminal, and that it leaves the terminal as it was."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from rich.console import Console

from hpt_torch.observers.live import LiveView, Standing, sparkline
from hpt_torch.observers.memory import tree_memory
from hpt_torch.observers.progress import ProgressObserver
from hpt_torch.record import Event, Record
from hpt_torch.tuner import Tuner
from hpt_torch.types import Objective

RunQuick = Callable[..., str]
WIDTHS = (12, 24, 40, 56, 70, 100, 200)


class Drawn:
    """An observer that draws the view after every commit, and keeps what it drew by width."""

    def __init__(self, *, height: int = 30, **options: Any) -> None:
        self.texts: dict[int, list[str]] = {width: [] for width in WIDTHS}
        self.options = {"height": height, "force_terminal": True, "color_system": None, **options}
        self.standing: Standing | None = None

    def started(self, tuner: Tuner) -> None:
        self.view = LiveView(tuner)
        self.standing = self.view.standing

    def recorded(self, tuner: Tuner, events: Sequence[Event]) -> None:
        self.view.standing.note(events)
        for width, texts in self.texts.items():
            console = Console(file=io.StringIO(), width=width, **self.options)
            console.print(self.view)
            texts.append(console.file.getvalue())  # type: ignore[attr-defined]

    def ended(self, tuner: Tuner) -> None:
        """Nothing to close."""

    def say(self, line: str) -> None:
        """Messages are not drawn."""


def _agrees(standing: Standing, run: Path) -> None:
    with Record(run / "run.db", readonly=True) as record:
        trials = record.in_order()
    assert +standing.states == Counter(trial.state for trial in trials)
    assert standing.finished == len(trials)
    assert standing.trained == sum(len(trial.reports) for trial in trials)
    assert standing.begun == 0
    scores = [standing.objective.score(trial) for trial in trials]
    assert standing.curve[-1][1] == max(score for score in scores if score is not None)


def test_what_it_counts_is_what_was_recorded(tmp_path: Path, run_quick: RunQuick) -> None:
    drawn = Drawn()
    run_quick(tmp_path / "run", observers=[drawn])
    assert drawn.standing is not None
    _agrees(drawn.standing, tmp_path / "run")
    again = Drawn()
    run_quick(tmp_path / "run", "search.trials=6", observers=[again], reopen_holdout=True)
    assert again.standing is not None
    _agrees(again.standing, tmp_path / "run")  # a continued run begins with what was there


@pytest.mark.slow
def test_a_population_is_counted_and_leads_before_it_ends(tmp_path: Path, run_quick: RunQuick) -> None:
    from test_evolution import POPULATION

    drawn = Drawn()
    run_quick(tmp_path / "run", observers=[drawn], raw=POPULATION)
    assert drawn.standing is not None
    _agrees(drawn.standing, tmp_path / "run")
    assert "generation 3, epoch 3 of 4" in drawn.texts[100][-1]
    assert any("so far" in text and "0 of 6" in text for text in drawn.texts[100])


def test_folds_are_work_of_one_trial(tmp_path: Path, run_quick: RunQuick) -> None:
    drawn = Drawn()
    run_quick(tmp_path / "run", "evaluation.folds=3", observers=[drawn])
    standing = drawn.standing
    assert standing is not None
    assert standing.trained == 4 * 3 * 2  # trials, folds, epochs
    assert standing.epochs == 3 * 2
    assert (standing.finished, standing.begun) == (4, 0)
    assert any(0 < float(done) < 4 for done in re.findall(r"(\d) of 4", "".join(drawn.texts[100])))


def test_what_would_steer_a_terminal_is_shown(tmp_path: Path, run_quick: RunQuick) -> None:
    from conftest import QUICK

    from hpt_torch import tasks
    from hpt_torch.data import digits

    class Evil(torch.nn.Module):
        def __init__(self, kind: str = ""):
            super().__init__()
            if kind.endswith("refused"):
                raise RuntimeError(f"refused {kind} [bold]x[/bold]")
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x)
            return out

    evil = "\x1b[2J\x07"
    raw = {**QUICK, "hparams": {"batch_size": 256}, "space": {"kind": {"choice": [evil, f"{evil}refused"]}}}
    drawn, console = Drawn(), Console(file=io.StringIO(), width=300)
    observers = [drawn, ProgressObserver(console)]
    run_quick(tmp_path / "run", raw=raw, task=tasks.Classification(Evil, digits()), observers=observers)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "refused \\x1b[2J\\x07refused [bold]x[/bold]" in told
    assert "kind=\\x1b[2J\\x07" in drawn.texts[100][-1]
    for text in (told, *drawn.texts[100]):
        assert evil not in text


@pytest.mark.parametrize("height", [8, 30])
def test_it_fits_every_terminal(tmp_path: Path, run_quick: RunQuick, height: int) -> None:
    drawn = Drawn(height=height)
    run_quick(tmp_path / "run", observers=[drawn])
    for width, texts in drawn.texts.items():
        for text in texts:
            lines = text.splitlines()
            assert max(map(len, lines)) <= width
            if width >= 40:
                assert len(lines) <= height
    last = drawn.texts[100][-1]
    assert "4 of 4 · round 2 of 2" in last
    assert "4 complete" in last
    assert "epochs/s" in last
    assert "trials/min" in last
    assert "valid/accuracy, trial" in last
    assert ("lr=" in last) == (height == 30)
    assert ("memory" in last) == (height == 30 and sys.platform == "linux")


def test_a_terminal_without_unicode_gets_plain_letters(tmp_path: Path, run_quick: RunQuick) -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

    class DrawnAscii(Drawn):
        def recorded(self, tuner: Tuner, events: Sequence[Event]) -> None:
            self.view.standing.note(events)
            console = Console(file=Ascii(), width=80, **self.options)
            console.print(self.view)
            self.texts[100].append(console.file.getvalue())  # type: ignore[attr-defined]

    drawn = DrawnAscii()
    run_quick(tmp_path / "run", observers=[drawn])
    assert "0.0" in "".join(drawn.texts[100])
    assert not set("".join(drawn.texts[100])) & set("▁▂▃▄▅▆▇█━─╭")


def test_sparkline() -> None:
    assert sparkline([(0, 0.1), (5, 0.5), (10, 0.9)], 10, 5) == "▁▁▅▅█"
    assert sparkline([(0, 3.0), (10, 1.0)], 20, 4) == "█▁▁▁"[:1] + "█▁▁"  # a loss goes down
    assert sparkline([(0, 1.0)], 10, 8) == ""
    assert sparkline([(0, 1.0), (1, 2.0)], 10, 3) == ""


def test_a_trial_counts_with_the_score_of_the_epoch_that_it_keeps() -> None:
    standing = Standing(Objective(metric="m", direction="minimize"), epochs=3)
    standing.note([Event(kind="trial", body={"trial": 0, "round": 0})])
    for epoch, value in ((1, 0.5), (2, 0.2), (3, 0.4)):
        standing.note([Event(kind="report", body={"trial": 0, "epoch": epoch, "metrics": {"m": value}})])
    standing.note([Event(kind="finish", body={"trial": 0, "state": "COMPLETE", "kept_epoch": 2})])
    assert standing.curve == [(3, 0.2)]


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process tree is read from /proc")
def test_memory_counts_children_and_what_is_shared_once() -> None:
    alone = tree_memory()
    assert alone is not None
    program = "x = bytearray(200 << 20); print('made', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    grown = (tree_memory() or 0) - alone
    child.communicate("\n")
    assert 190 << 20 < grown < 400 << 20
    assert tree_memory(pid=child.pid) is None  # it has ended


# -- in a terminal -------------------------------------------------------------------------------------

RECIPE = """
name = "small"
[hparams]
hidden_sizes = [16]
batch_size = 256
[space]
lr = { float = [1e-3, 1e-1], default = 1e-2 }
[search]
trials = 4
[trainer]
epochs = 3000
threads = 1
"""


def _in_terminal(
    folder: Path, *arguments: str, stop: signal.Signals | None = None, **environment: str
) -> tuple[int, str]:
    """`hpt run` in a terminal of 90 columns, stopped once it has drawn for a while: (exit status, output)."""
    (folder / "small.toml").write_text(RECIPE)
    main, end = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", "from hpt_torch.cli import main; main()", "run", "small.toml", *arguments],
        cwd=folder, stdin=end, stdout=end, stderr=end,
        env={**env, "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "30", "PYTHONPATH": str(ROOT),
             **environment},
    )  # fmt: skip
    os.close(end)
    output, until = b"", time.monotonic() + 60
    while time.monotonic() < until:
        try:
            output += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if stop is not None and output.count(b"epochs/s") >= 3:
            process.send_signal(stop)
            stop = None
    os.close(main)
    return process.wait(timeout=30), output.decode()


def _cursor_is_shown(output: str) -> bool:
    return output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_terminal_is_left_as_it_was(tmp_path: Path, number: signal.Signals) -> None:
    code, output = _in_terminal(tmp_path, stop=number)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    assert "╭─" in output
    assert _cursor_is_shown(output)
    assert "\x1b[?1049h" not in output  # no other screen, from which one would have to come back
    if number != signal.SIGKILL:
        assert "everything is saved" in output
        after = output[output.rfind("epochs/s") :]
        assert after.count("\x1b[1A") >= 5  # the view is wiped away
    assert "Traceback" not in output


@pytest.mark.slow
def test_no_color_is_respected(tmp_path: Path) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-9]|38;[25])[0-9;]*m")
    code, output = _in_terminal(tmp_path, "trainer.epochs=200", NO_COLOR="1")
    assert code == 0
    assert "╭─" in output
    assert not colour.search(output)
    code, output = _in_terminal(tmp_path, "trainer.epochs=200", "--run-dir", "coloured")
    assert code == 0
    assert colour.search(output)


@pytest.mark.slow
def test_a_dumb_terminal_and_a_pipe_get_lines(tmp_path: Path) -> None:
    code, output = _in_terminal(tmp_path, "trainer.epochs=20", TERM="dumb")
    assert code == 0
    assert "4 trials of 20 epochs on" in output
    assert "\x1b[1A" not in output


def test_a_forked_worker_prints_past_the_view(capfd: pytest.CaptureFixture[str]) -> None:
    """The view's thread may hold its lock at a fork, for good as far as the child can tell."""
    from rich.file_proxy import FileProxy

    from hpt_torch.observers import progress

    before = sys.stdout
    console = Console(file=io.StringIO())
    sys.stdout = FileProxy(console, before)  # type: ignore[assignment]
    try:
        progress._restore_streams()
        assert sys.stdout is before
    finally:
        sys.stdout = before


def test_plain_lines_where_it_is_piped(tmp_path: Path, run_quick: RunQuick) -> None:
    console = Console(file=io.StringIO(), width=200)
    run_quick(tmp_path / "run", observers=[ProgressObserver(console)])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 trials of 2 epochs on cpu" in text
    assert "best valid/accuracy=" in text
    assert "\x1b" not in text
