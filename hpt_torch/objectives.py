"""What a run optimises, as its recipe and its task have it."""

from __future__ import annotations

from hpt_torch.recipe import Recipe, second_of
from hpt_torch.recipe_checks import did_you_mean
from hpt_torch.task import Task
from hpt_torch.types import SIZES, Objective, Problem


def objective_of(recipe: Recipe, task: Task) -> tuple[Objective, list[Problem]]:
    """The objective that says what is best, and what is wrong with it or with the second one."""
    objective, second = task.objective, second_of(recipe)
    if recipe.objective.metric is not None and recipe.objective.direction is not None:
        objective = Objective(metric=recipe.objective.metric, direction=recipe.objective.direction)
    problems = _check("objective.metric", objective, task)
    if second is None:
        return objective, problems
    if second.metric == objective.metric:
        rule = f"must be another one than the first objective's, got {second.metric!r} for both"
        hint = "leave objective.second out, or name parameters, flops or another metric"
        problems.append(Problem("objective.second.metric", f"{rule}; {hint}"))
    elif second.metric not in SIZES:
        problems += _check("objective.second.metric", second, task, SIZES)
    return objective, problems


def _check(where: str, objective: Objective, task: Task, others: tuple[str, ...] = ()) -> list[Problem]:
    """The metric must be one that the task measures on the rows that score trials, or one of `others`."""
    part, _, name = objective.metric.partition("/")
    known = task.metric_names
    if part == "valid" and (known is None or name in known):
        return []
    names = [f"valid/{metric}" for metric in known or ()]
    among = f" and be one of {', '.join(names)}" if names else ""
    instead = f"be {' or '.join(others)}, or " if others else ""
    hint = did_you_mean(objective.metric, [*others, *names])
    return [Problem(where, f"must {instead}begin with valid/{among}, got {objective.metric!r}{hint}")]
