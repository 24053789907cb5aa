"""Every recipe under recipes/ is valid and runs, shortened, on data that is on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from hpt_torch import data as datasets
from hpt_torch import recipe as recipes
from hpt_torch import session, tasks
from hpt_torch.catalog import find_recipe, list_recipes
from hpt_torch.data import Data, Rows, as_rows, image_npz
from hpt_torch.record import Record
from hpt_torch.types import TaskError, TrialState

RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
LONG = {"adding_rnn_clip", "breast_cancer_mlp_folds", "text_rnn"}
FIXTURE = ROOT / "tests" / "fixtures" / "fashion_mnist_250.npz"


def _fashion(limit: int | None = None, **options: Any) -> Data:
    return image_npz(FIXTURE, **options)


def _coloured(limit: int | None = None, **options: Any) -> Data:
    """The fixture with three channels and 32 x 32 pixels, as CIFAR's images."""
    made = image_npz(FIXTURE, **options)

    def grow(part: Any) -> Rows:
        pixels = torch.nn.functional.pad(part.tensors["inputs"], (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        return Rows({**part.tensors, "inputs": pixels.contiguous()})

    three = {name: getattr(made, name).expand(3, 1, 1).contiguous() for name in ("mean", "std")}
    assert made.holdout is not None
    return Data(
        train=grow(made.train), valid=grow(made.valid), holdout=grow(made.holdout), out_features=10, **three
    )


def _sequences(**options: Any) -> Data:
    """Twelve channels, seven to 29 steps, nine classes, as the Japanese vowels."""
    torch.manual_seed(0)
    inputs, lengths = torch.randn(180, 29, 12), torch.randint(7, 30, (180,))
    return datasets.split(inputs, torch.arange(180) % 9, lengths=lengths, name="vowels", **options)


STAND_INS = {
    "fashion_mnist": _fashion,
    "mnist": _fashion,
    "cifar10": _coloured,
    "fashion_mnist_rows": lambda **options: as_rows(_fashion(**options)),
    "japanese_vowels": _sequences,
}


def _load(path: Path, *overrides: str) -> session.Checked:
    recipe = recipes.load(path, overrides)
    made = tasks.from_names(**recipe.task.model_dump(), seed=recipe.seed)
    return session.check(recipe, made, source=str(path))


@pytest.fixture
def _small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in STAND_INS.items():
        monkeypatch.setitem(datasets.DATASETS, name, function)
    monkeypatch.chdir(ROOT)  # text_rnn reads the repository's licence


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 13
    assert {name for name, _ in list_recipes()} >= {path.stem for path in RECIPES}


@pytest.mark.usefixtures("_small_data")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_says_how_to_run_it_and_what_it_gave(path: Path) -> None:
    checked = _load(path)
    assert checked.recipe.name == path.stem
    lines = path.read_text().splitlines()
    assert lines[0] == f"# hpt run recipes/{path.name}"
    assert any(line.startswith("# Result: ") for line in lines)
    assert find_recipe(path.stem).name == path.name
    assert all(about for _, about in list_recipes())


@pytest.mark.usefixtures("_small_data")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_recipe_runs_shortened(path: Path, tmp_path: Path) -> None:
    checked = _load(path, "search.trials=2", "trainer.epochs=1", "trainer.device=cpu")
    session.run(checked, tmp_path / "run")
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        states = [trial.state for trial in record.in_order()]
    assert TrialState.COMPLETE in states
    assert set(states) <= {TrialState.COMPLETE, TrialState.INFEASIBLE}


@pytest.mark.slow
def test_the_full_fashion_mnist_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60,000 images from where they lie on this machine (Debian's package, or torchvision's root)."""
    monkeypatch.setenv("HPT_TORCH_DOWNLOAD", "0")
    monkeypatch.setenv("HPT_TORCH_CACHE", str(tmp_path / "cache"))
    try:
        checked = _load(
            ROOT / "recipes" / "fashion_mnist_mlp_random.toml", "search.trials=1", "trainer.epochs=1"
        )
    except TaskError as error:
        pytest.skip(f"Fashion-MNIST is not on this machine: {error}")
    session.run(checked, tmp_path / "run")
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        (trial,) = record.in_order()
        assert trial.metrics["valid/accuracy"] > 0.8
        assert record.of_kind("holdout")[0].body["rows"] == 10_000
