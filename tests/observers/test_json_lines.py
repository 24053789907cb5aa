"""`--json-lines`: one object an event, nothing else on standard output."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from hpt_torch.observers.json_lines import JsonLinesObserver
from hpt_torch.types import RunError

RunQuick = Callable[..., str]


def _lines(text: str) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_event_is_a_line(tmp_path: Path, run_quick: RunQuick) -> None:
    stream = io.StringIO()
    report = json.loads(run_quick(tmp_path / "run", observers=[JsonLinesObserver(stream)]))
    lines = _lines(stream.getvalue())
    assert [line["event"] for line in lines if line["event"] in ("started", "end")] == ["started", "end"]
    assert lines[0] | {"run": "", "device": ""} == {
        "event": "started", "run": "", "name": "tune", "metric": "valid/accuracy", "direction": "maximize",
        "trials": 4, "epochs": 2, "device": "", "finished": 0, "best": None,
    }  # fmt: skip
    trials = [line for line in lines if line["event"] == "trial"]
    assert [line["finished"] for line in trials] == [1, 2, 3, 4]
    assert {line["trial"] for line in trials} == {0, 1, 2, 3}
    assert all(line["state"] == "COMPLETE" for line in trials)
    assert [(line["round"], line["trials"]) for line in lines if line["event"] == "round"] == [(0, 2), (1, 4)]
    bests = [line["score"] for line in lines if line["event"] == "best"]
    assert bests == sorted(bests)
    end = lines[-1]
    assert end["state"] == "finished"
    assert end["best"]["trial"] == report["best"]["number"]
    assert end["best"]["score"] == bests[-1]
    assert end["holdout"].keys() == {"holdout/accuracy", "holdout/loss"}


def test_a_population_tells_its_generations(tmp_path: Path, run_quick: RunQuick) -> None:
    from test_evolution import POPULATION

    stream = io.StringIO()
    run_quick(tmp_path / "run", raw=POPULATION, observers=[JsonLinesObserver(stream)])
    rounds = [line for line in _lines(stream.getvalue()) if line["event"] == "round"]
    assert [line["generation"] for line in rounds if "generation" in line] == [1, 2, 3]
    assert sum(line.get("copies", 0) for line in rounds) >= 3


def test_numbers_that_json_does_not_have_are_texts() -> None:
    stream = io.StringIO()
    JsonLinesObserver(stream)._write("message", values=(float("inf"), float("nan"), 1.5), more={"x": (1, 2)})
    assert _lines(stream.getvalue()) == [
        {"event": "message", "values": ["inf", "nan", 1.5], "more": {"x": [1, 2]}}
    ]


def test_a_failure_ends_as_one(tmp_path: Path, run_quick: RunQuick) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            if '"trial"' in text and '"end"' not in text:
                raise RunError("nobody listens")
            return super().write(text)

    stream = Broken()
    with pytest.raises(RunError, match="nobody listens"):
        run_quick(tmp_path / "run", observers=[JsonLinesObserver(stream)])
    assert _lines(stream.getvalue())[-1]["state"] == "failed"


@pytest.mark.slow
def test_standard_output_holds_nothing_else_whatever_the_task_prints(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, input_shape, out_features):\n"
        "        super().__init__()\n"
        "        print('a print of the task', flush=True)\n"
        "        self.layer = nn.Linear(input_shape[0], out_features)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"
    )
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\n[task]\nmodel = "mine:Net"\n[space]\nlr = { float = [1e-3, 1e-1] }\n'
        "[search]\ntrials = 3\n[trainer]\nepochs = 1\nthreads = 1\n"
    )
    arguments = ["run", "mine.toml", "--allow-import", "mine", "--json-lines"]
    command = [sys.executable, "-c", "from hpt_torch.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert _lines(done.stdout)[-1]["state"] == "finished"
    assert "a print of the task" in done.stderr
    # A reader that goes away ends the run with one message, and nothing is lost.
    shell = f"cd {tmp_path} && '{sys.executable}' -c 'from hpt_torch.cli import main; main()'"
    piped = f"({shell} {' '.join(arguments)} --run-dir other; echo status $? >&2) | head -n 1"
    done = subprocess.run(
        piped, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert "the program that read the JSON lines has ended" in done.stderr
    assert "status 2" in done.stderr
    assert "Traceback" not in done.stderr
