"""Baselines: what Population Based Training is compared with, at equal compute.

As many members, trained for as many epochs: *random* keeps the hyperparameters that each began with, which is
random search; *exploit_only* copies weights and never changes a hyperparameter. What PBT has beyond the
second is what changing hyperparameters brings; what the second has beyond the first, copying weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpt_torch import session
from hpt_torch.observers import Observer
from hpt_torch.recipe import Recipe, planned_trials
from hpt_torch.recipe_sections import SchedulerSection
from hpt_torch.record import Record
from hpt_torch.report.population import BASELINES
from hpt_torch.session import Checked
from hpt_torch.trainers import costs


def run(
    checked: Checked,
    path: Path,
    *,
    observers: Sequence[Observer] = (),
    accept_changed_code: bool = False,
    reopen_holdout: bool = False,
) -> None:
    """`session.run`, and then the baselines that the recipe asks for, each as a run in `path`/baselines."""
    for name, recipe in {"": checked.recipe, **baselines_of(checked.recipe)}.items():
        session.run(
            dataclasses.replace(checked, recipe=recipe),
            path / BASELINES / name if name else path,
            observers=observers,
            accept_changed_code=accept_changed_code,
            reopen_holdout=reopen_holdout,
            costs=_costs_of(path) if name else None,
        )


def _costs_of(path: Path) -> dict[str, Any]:
    """What the run plans with: its baselines do, too, though the cost table has changed since it began."""
    with Record(path / "run.db", readonly=True) as record:
        begun = record.of_kind("run")[0].body
    return costs.recorded(begun, begun["device"])


def baselines_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of the baselines, by name; none where they are not asked for."""
    if not recipe.scheduler.baseline:
        return {}
    exploit_only = recipe.scheduler.model_copy(update={"baseline": False, "explore": False})
    search = recipe.search.model_copy(update={"sampler": "random", "trials": planned_trials(recipe)})
    return {
        "random": recipe.model_copy(update={"scheduler": SchedulerSection(), "search": search}),
        "exploit_only": recipe.model_copy(update={"scheduler": exploit_only}),
    }
