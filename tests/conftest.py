"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Of this process and of all that tests start, as two test processes on two cores would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from hpt_torch import recipe as recipes
from hpt_torch import session, tasks
from hpt_torch.record import Record
from hpt_torch.report import canonical, summarise

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """The tests have a cache of their own: a cost table of this machine would change which engine trains."""
    assert config.cache is not None
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    os.environ["HPT_TORCH_CACHE"] = str(config.cache.mkdir(f"hpt_torch{worker}"))


@pytest.fixture(scope="session")
def digits_task() -> tasks.Task:
    return tasks.from_names(
        kind="classification", model="mlp", data="digits", valid_fraction=0.2, holdout_fraction=0.2, seed=0
    )


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Models this small train faster on one thread than on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


QUICK: dict[str, Any] = {
    "hparams": {"hidden_sizes": [16], "batch_size": 256, "batch_norm": True},
    "space": {
        "lr": {"float": [1e-4, 1e-1], "default": 1e-3},
        "dropout": {"float": [0.0, 0.5]},
        "activation": {"choice": ["relu", "tanh"]},
    },
    "search": {"sampler": "random", "trials": 4, "round_size": 2},
    "trainer": {"epochs": 2, "device": "cpu", "threads": 1, "engine": "loop"},
    "run": {"tensorboard": False},
    "executor": "inline",
}


@pytest.fixture
def run_quick(digits_task: tasks.Task) -> Callable[..., str]:
    """Runs a small search to its end and returns its canonical report."""

    def run(path: Path, *overrides: str, raw: dict[str, Any] | None = None, **options: Any) -> str:
        recipe = recipes.build(raw or QUICK, overrides, source="test")
        task = options.pop("task", digits_task)
        session.run(session.check(recipe, task, source="test", run_dir=path), path, **options)
        return canonical_of(path)

    return run


def canonical_of(path: Path) -> str:
    with Record(path / "run.db", readonly=True) as record:
        return canonical(summarise(record))


class Ear:
    """An observer that keeps what the run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def started(self, tuner: Any) -> None: ...
    def recorded(self, tuner: Any, events: Any) -> None: ...
    def ended(self, tuner: Any) -> None: ...
    def say(self, line: str) -> None:
        self.said.append(line)


class Impatient(Ear):
    """Asks for a stop once something is trained."""

    def recorded(self, tuner: Any, events: Any) -> None:
        if not tuner.stopped and any(event.kind == "report" for event in events):
            os.kill(os.getpid(), signal.SIGTERM)
