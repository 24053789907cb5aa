"""A real TensorBoard on a real run, clicked through in a real browser."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_evolution import POPULATION

from hpt_torch.observers.tensorboard import TensorBoardObserver

RunQuick = Callable[..., str]
pytestmark = pytest.mark.slow


@contextmanager
def _tensorboard(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tensorboard.main", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if len(_get(f"{url}/data/runs")) == POPULATION["search"]["trials"]:
                    break
            except (urllib.error.URLError, ConnectionError):
                pass  # it has not started yet
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=10)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def board(tmp_path: Path, run_quick: RunQuick) -> Iterator[str]:
    run_quick(tmp_path / "run", raw=POPULATION, observers=[TensorBoardObserver()])
    with _tensorboard(tmp_path / "run" / "tensorboard") as url:
        yield url


def test_its_own_answers(board: str) -> None:
    plugins = _get(f"{board}/data/plugins_listing")
    active = {name for name, about in plugins.items() if about["enabled"]}
    assert {"scalars", "hparams", "text", "custom_scalars"} <= active
    tags = _get(f"{board}/data/plugin/scalars/tags")
    assert len(tags) == 6
    assert all("lr" in found and "gap/accuracy" in found for found in tags.values())
    layout = _get(f"{board}/data/plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == [
        "Learning",
        "Hyperparameters",
        "Training",
    ]


def test_in_a_browser(board: str) -> None:
    reason = "looks at TensorBoard in a browser"
    playwright = pytest.importorskip("playwright.sync_api", reason=f"{reason}: needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip(f"{reason}: needs chromium on the PATH")
    errors: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{board}/#timeseries")
        page.get_by_text("gap/loss").first.wait_for(timeout=15_000)
        page.get_by_text("hparams/batch_size").first.wait_for()

        page.get_by_role("tab", name="Custom Scalars").click()
        page.get_by_text("accuracy, train and valid").first.wait_for(timeout=15_000)
        page.get_by_text("Hyperparameters", exact=True).first.wait_for()

        page.get_by_role("tab", name="Text").click()
        page.get_by_text("a copy of trial").first.wait_for(timeout=15_000)

        page.get_by_role("tab", name="HParams").click()
        page.get_by_text("Table View").first.wait_for(timeout=15_000)
        table = page.locator("vaadin-grid, hparams-table-view").first
        for number in range(6):
            table.get_by_text(f"trial-{number:05d}").first.wait_for(timeout=15_000)
        page.get_by_text("Parallel Coordinates View").click()
        page.locator("svg path").first.wait_for(state="attached", timeout=15_000)
        assert page.get_by_text("dropout").count() > 0
        browser.close()
    assert errors == []
