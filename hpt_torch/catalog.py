"""The recipes and runs at hand, for `hpt list` and for naming a recipe without its path."""

from __future__ import annotations

import os
from pathlib import Path

from hpt_torch.record import Record
from hpt_torch.report import summarise
from hpt_torch.report.terminal import show_seconds
from hpt_torch.types import HptError, Problem, RecipeError

_PACKAGE = Path(__file__).parent
# beside the user, in an installed wheel, in a checkout
_RECIPE_FOLDERS = (Path("recipes"), _PACKAGE / "recipes", _PACKAGE.parent / "recipes")


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or a recipe's name. Raises RecipeError."""
    if len(name) > 4000 or "\0" in name:
        raise RecipeError(name[:60], [Problem("", "is too long or has a NUL; name a recipe file")])
    path = Path(name)
    if os.path.isfile(path) or path.suffix == ".toml" or len(path.parts) > 1:
        return path
    for folder in _RECIPE_FOLDERS:
        candidate = folder / f"{name}.toml"
        if os.path.isfile(candidate):  # unlike Path.is_file: also for a name that no file can have
            return candidate
    known = ", ".join(sorted(path.stem for path in _recipe_files()))
    raise RecipeError(name, [Problem("", f"is neither a file nor a known recipe; known: {known or 'none'}")])


def _recipe_files() -> list[Path]:
    found: dict[str, Path] = {}
    for folder in _RECIPE_FOLDERS:
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            found.setdefault(path.stem, path)
    return list(found.values())


def list_recipes() -> list[tuple[str, str]]:
    """(name, the first comment line that is not a command) of each recipe."""
    rows = []
    for path in _recipe_files():
        comments = [
            line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")
        ]
        about = next((line for line in comments if line and not line.startswith("hpt ")), "")
        rows.append((path.stem, about))
    return rows


def list_runs(root: Path) -> list[tuple[str, str, str, str]]:
    """(name, trials by state, best score, wall-clock) of each run under `root`."""
    rows = []
    for path in sorted(root.glob("*/run.db")):
        try:
            with Record(path, readonly=True) as record:
                summary = summarise(record)
        except HptError as error:
            rows.append((path.parent.name, str(error), "", ""))
            continue
        states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(summary.states.items()))
        best = ""
        if summary.best is not None:
            best = f"{summary.objective.metric} = {summary.objective.score(summary.best):.4f}"
        rows.append((path.parent.name, states, best, show_seconds(summary.seconds)))
    return rows
