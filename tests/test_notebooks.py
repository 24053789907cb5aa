"""The notebooks run, show pictures, and are paired: the .ipynb is what jupytext makes of the .py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
IDS = [path.stem for path in NOTEBOOKS]
MOST_SECONDS = 60  # on two cores that have nothing else to do; the machine that tests may have


def _cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]  # type: ignore[no-any-return]


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_no_outputs_are_kept(path: Path) -> None:
    cells = _cells(path.with_suffix(".ipynb"))
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_both_forms_say_the_same(path: Path) -> None:
    """After a change of the .py: jupytext --to ipynb notebooks/*.py"""
    jupytext = pytest.importorskip("jupytext", reason="compares the two forms: needs the extra notebooks")
    made = jupytext.read(path)
    cells = _cells(path.with_suffix(".ipynb"))
    assert [(c["cell_type"], "".join(c["source"])) for c in cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the notebooks draw with plotly: needs the extra notebooks")
    began = time.monotonic()
    if all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel", "jupytext")):
        outputs = _run_as_notebook(path, tmp_path)
        kinds = [kind for output in outputs for kind in output.get("data", {})]
        assert kinds.count("application/vnd.plotly.v1+json") >= 1  # pictures
        assert not [o for o in outputs if o["output_type"] == "stream" and "Warning" in o["text"]]
    else:
        _run_as_script(path, tmp_path)
    assert time.monotonic() - began < 3 * MOST_SECONDS
    assert list((tmp_path / "runs").iterdir())


def _run_as_notebook(path: Path, folder: Path) -> list[dict[str, Any]]:
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(path)
    NotebookClient(
        notebook,
        timeout=3 * MOST_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute(env={**os.environ, "PYTHONPATH": str(ROOT), "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _run_as_script(path: Path, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)], cwd=folder, capture_output=True, text=True,
        timeout=3 * MOST_SECONDS, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
