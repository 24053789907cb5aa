"""Help that shows examples, completion, and `hpt dashboard`."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from hpt_torch import cli_help
from hpt_torch.cli import app
from hpt_torch.record import Record

RunQuick = Callable[..., str]
HPT = [sys.executable, "-c", "from hpt_torch.cli import main; main()"]
COMMANDS = [
    command.name or command.callback.__name__ for command in app.registered_commands if command.callback
]


def _help(*command: str) -> str:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert done.exit_code == 0
    return done.output


def test_every_command_has_examples() -> None:
    assert set(COMMANDS) == set(cli_help.EXAMPLES)
    assert "  hpt run digits_mlp_tpe\n" in _help()


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_shown_as_they_are_and_name_what_exists(command: str) -> None:
    text = _help(command)
    for line in cli_help.EXAMPLES[command]:
        assert f"  {line}\n" in text  # whole: click has not filled the lines
        words = shlex.split(re.split(r" (?:\||>>?) ", line)[0])
        assert words[:2] == ["hpt", command]
        for word in words[2:]:
            if word.startswith("--"):
                assert word in text, word
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file()


def test_recipes_complete() -> None:
    names = [name for name, _ in cli_help.recipes("digits_")]
    assert {"digits_mlp_tpe", "digits_mlp_pbt"} <= set(names)
    assert all(name.startswith("digits_") for name in names)


@pytest.mark.slow
def test_the_shell_is_told_what_completes() -> None:
    env = {
        **os.environ,
        "_HPT_COMPLETE": "complete_bash",
        "COMP_WORDS": "hpt run digits_mlp_t",
        "COMP_CWORD": "2",
    }
    program = "import sys; sys.argv[0] = 'hpt'; from hpt_torch.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert "digits_mlp_tpe" in done.stdout.split()


@pytest.mark.slow
def test_help_needs_no_torch() -> None:
    program = (
        "import sys\nfrom hpt_torch.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "heavy = ('torch', 'optuna', 'tensorboard', 'wsgiref', 'plotly')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_dashboard_shows_the_run(tmp_path: Path, run_quick: RunQuick) -> None:
    pytest.importorskip("optuna_dashboard", reason="needs the extra dashboard")
    run_quick(tmp_path / "run")
    before = (tmp_path / "run" / "run.db").read_bytes()
    process = subprocess.Popen(
        [*HPT, "dashboard", str(tmp_path / "run"), "--port", "0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()  # the first one: no warning before it
        found = re.search(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C", line)
        assert found is not None, line
        url = f"http://127.0.0.1:{found[1]}"
        with urllib.request.urlopen(f"{url}/api/studies", timeout=30) as answer:
            (study,) = json.load(answer)["study_summaries"]
        with urllib.request.urlopen(f"{url}/api/studies/{study['study_id']}", timeout=30) as answer:
            trials = json.load(answer)["trials"]
        with Record(tmp_path / "run" / "run.db", readonly=True) as record:
            expected = [trial.metrics["valid/accuracy"] for trial in record.in_order()]
            ended = [record.reported_at(trial.number, trial.epoch) for trial in record.in_order()]
        assert [trial["values"][0] for trial in trials] == pytest.approx(expected)
        shown = [datetime.fromisoformat(trial["datetime_complete"]).timestamp() for trial in trials]
        assert shown == pytest.approx(ended, abs=1.0)
        busy = subprocess.run(
            [*HPT, "dashboard", str(tmp_path / "run"), "--port", found[1]],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert busy.returncode == 2
        assert "cannot be listened on" in busy.stderr
        assert "Traceback" not in busy.stderr
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run" / "run.db").read_bytes() == before


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpt_torch import dashboard
    from hpt_torch.types import RunError

    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(RunError, match=r"pip install 'hpt-torch\[dashboard\]'"):
        dashboard.dashboard(tmp_path)
