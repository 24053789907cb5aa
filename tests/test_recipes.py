"""Every recipe under recipes/ is valid and runs, shortened."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from hpt_torch import recipe as recipes
from hpt_torch import session, tasks
from hpt_torch.catalog import find_recipe, list_recipes
from hpt_torch.record import Record
from hpt_torch.types import TrialState

RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))


def _load(path: Path, *overrides: str) -> session.Checked:
    recipe = recipes.load(path, overrides)
    made = tasks.from_names(**recipe.task.model_dump(), seed=recipe.seed)
    return session.check(recipe, made, source=str(path))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 1
    assert {name for name, _ in list_recipes()} >= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_says_how_to_run_it(path: Path) -> None:
    checked = _load(path)
    assert checked.recipe.name == path.stem
    assert path.read_text().startswith(f"# hpt run recipes/{path.name}\n")
    assert find_recipe(path.stem).name == path.name
    assert all(about for _, about in list_recipes())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_shortened(path: Path, tmp_path: Path) -> None:
    checked = _load(path, "search.trials=2", "trainer.epochs=1", "trainer.device=cpu")
    session.run(checked, tmp_path / "run")
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        assert [trial.state for trial in record.in_order()] == [TrialState.COMPLETE] * 2
