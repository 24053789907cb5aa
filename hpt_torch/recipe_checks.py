"""What must hold between the fields of a recipe, and between a recipe and its task's hyperparameters.

Each check returns every problem it finds; nothing is raised and nothing is written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hpt_torch import grids
from hpt_torch import space as spaces
from hpt_torch.hparams import HParamSpec
from hpt_torch.points import check_points, queue
from hpt_torch.schedulers import PORTABLE
from hpt_torch.schedulers import check_space as check_pbt_space
from hpt_torch.space import Choice, Dimension
from hpt_torch.types import SIZES, Problem, SpaceError, is_int

if TYPE_CHECKING:
    from hpt_torch.recipe import Recipe


def cross_check(recipe: Recipe) -> list[Problem]:
    """Fields that are each right but do not go together."""
    problems = [Problem(p.where, p.what) for p in spaces.check_space(recipe.space, recipe.hparams)]
    for name, value in recipe.task.data_options.items():
        if isinstance(value, str) and "\0" in value:
            problems.append(Problem(f"task.data_options.{name}", f"must not hold a NUL, got {value!r}"))
    for name in recipe.hparams:
        if name in recipe.space:
            problems.append(Problem(f"hparams.{name}", "is also in [space]; keep one of the two"))
    if recipe.search.sampler == "grid" and not problems:
        try:
            size = grids.size(recipe.space)
        except SpaceError as error:
            problems.append(Problem("search.sampler", f"grid: {error}"))
        else:
            if recipe.search.trials is not None and recipe.search.trials > size:
                problems.append(
                    Problem(
                        "search.trials",
                        f"the grid has {size} points, got {recipe.search.trials}; leave it out",
                    )
                )
    if recipe.search.sampler == "grid" and (recipe.search.points or recipe.search.warm_start):
        name = "points" if recipe.search.points else "warm_start"
        problems.append(Problem(f"search.{name}", "do not go with grid, which has its own; leave them out"))
    problems += check_points(recipe.search.points, recipe.space)
    first = queue(
        recipe.space,
        recipe.search.points if not problems else [],
        start_with_defaults=recipe.search.start_with_defaults,
    )
    if recipe.search.points and recipe.search.trials is not None and len(first) > recipe.search.trials:
        rule = f"must be at least {len(first)}, so that the points (and the declared defaults) are tried"
        problems.append(Problem("search.trials", f"{rule}, got {recipe.search.trials}"))
    if (
        recipe.search.sampler != "grid"
        and recipe.search.timeout is None
        and (recipe.search.trials is None and recipe.space)
    ):
        problems.append(
            Problem("search.trials", "must be given (or search.timeout), so that the search ends")
        )
    if (recipe.objective.metric is None) != (recipe.objective.direction is None):
        missing = "direction" if recipe.objective.direction is None else "metric"
        problems.append(
            Problem(f"objective.{missing}", "metric and direction are given together or not at all")
        )
    problems += _check_second(recipe)
    if recipe.search.sampler == "nsga2" and recipe.search.round_size == 1:
        rule = "is the generation of nsga2, whose points have two parents, and must be at least 2, got 1"
        problems.append(Problem("search.round_size", rule))
    if recipe.trainer.patience is not None and recipe.trainer.keep == "last":
        problems.append(
            Problem(
                "trainer.keep",
                "must be best (or left out) with trainer.patience, got last: the last epochs "
                "before stopping are those without a better score",
            )
        )
    if recipe.scheduler.kind == "pbt":
        problems += _check_pbt(recipe)
    elif recipe.scheduler.baseline:
        problems.append(Problem("scheduler.baseline", "compares pbt, and needs kind = pbt; leave it out"))
    if recipe.scheduler.kind == "schedule":
        problems += _check_changes(recipe)
    elif recipe.scheduler.changes:
        problems.append(Problem("scheduler.changes", "are read only with kind = schedule; leave them out"))
    if recipe.scheduler.kind in ("pbt", "schedule"):
        problems += _check_population(recipe)
    problems += _check_evaluation(recipe)
    limits = recipe.scheduler.lower, recipe.scheduler.upper
    if recipe.scheduler.kind == "threshold" and limits == (None, None):
        problems.append(Problem("scheduler.lower", "or scheduler.upper must be given with kind = threshold"))
    if recipe.task.valid_fraction + recipe.task.holdout_fraction >= 0.95:
        problems.append(
            Problem("task.valid_fraction", "valid_fraction + holdout_fraction must stay below 0.95")
        )
    return problems


def _check_second(recipe: Recipe) -> list[Problem]:
    """The second objective says which way is better, and nobody decides while trials train."""
    second, kind, problems = recipe.objective.second, recipe.scheduler.kind, list[Problem]()
    if second is None:
        return []
    if second.direction is None and second.metric not in SIZES:
        rule = f"must be given (maximize or minimize) where the metric is {second.metric!r}"
        problems.append(Problem("objective.second.direction", f"{rule}; only {' and '.join(SIZES)} have one"))
    if kind not in ("fifo", "schedule"):
        rule = f"does not go with scheduler.kind {kind}, which compares trials by one number"
        problems.append(
            Problem("objective.second", f"{rule}, got {second.metric!r} as another; leave out one of the two")
        )
    return problems


def _check_evaluation(recipe: Recipe) -> list[Problem]:
    """Folds, and the training at the end, are of trials that keep their hyperparameters."""
    problems, kind = [], recipe.scheduler.kind
    changing = kind in ("pbt", "schedule")
    if recipe.evaluation.folds is None and recipe.evaluation.repeats > 1:
        problems.append(
            Problem("evaluation.repeats", "must be 1 without folds; set evaluation.folds, e.g. to 5")
        )
    if recipe.evaluation.folds is not None and changing:
        problems.append(
            Problem(
                "evaluation.folds",
                f"does not go with scheduler.kind {kind}, whose members change while they train; leave out "
                "one of the two (hpt replay tells how much of the score the choice has made)",
            )
        )
    asked = "confirm" if recipe.final.confirm is not None else "refit"
    if (recipe.final.refit or recipe.final.confirm is not None) and changing:
        problems.append(
            Problem(
                f"final.{asked}",
                f"does not go with scheduler.kind {kind}, whose members change while they train; "
                "hpt replay trains the schedule again",
            )
        )
    if recipe.final.refit is False and (asked == "confirm" or recipe.evaluation.folds is not None):
        rule = "must be true with evaluation.folds and with final.confirm, which leave no other model"
        problems.append(Problem("final.refit", f"{rule}; leave it out"))
    return problems


def _check_pbt(recipe: Recipe) -> list[Problem]:
    problems = []
    trials = recipe.search.trials
    if recipe.search.sampler != "grid" and (trials is None or trials < 2):
        got = "none" if trials is None else trials
        what = f"is the population's size with pbt, and must be at least 2, got {got}"
        problems.append(Problem("search.trials", what))
    first, second = recipe.scheduler.perturbation_factors
    if not 0 < first < 1 < second:
        problems.append(
            Problem(
                "scheduler.perturbation_factors",
                f"must be two numbers, the first in (0, 1), the second above 1, got [{first}, {second}]",
            )
        )
    return problems


def _check_changes(recipe: Recipe) -> list[Problem]:
    problems, last, epochs = list[Problem](), 0, recipe.trainer.epochs
    if not recipe.scheduler.changes:
        rule = "must be given with kind = schedule, such as [{ after = 2, lr = 0.01 }]"
        problems.append(Problem("scheduler.changes", rule))
    for i, change in enumerate(recipe.scheduler.changes):
        after: Any = change.get("after")
        where = f"scheduler.changes.{i}"
        if not is_int(after) or not last < after < epochs:
            rule = f"must be an integer above {last} and below trainer.epochs ({epochs})"
            problems.append(Problem(f"{where}.after", f"{rule}, got {after!r:.80}"))
            break
        last = after
        if len(change) == 1:
            problems.append(Problem(where, "must name a hyperparameter to change, such as lr = 0.01"))
    return problems


def _check_population(recipe: Recipe) -> list[Problem]:
    problems = []
    if recipe.trainer.patience is not None or recipe.trainer.keep == "best":
        problems.append(
            Problem(
                "trainer.patience" if recipe.trainer.patience is not None else "trainer.keep",
                f"does not go with {recipe.scheduler.kind}, which trains to the last epoch; leave it out",
            )
        )
    return problems


def check_hparams(recipe: Recipe, specs: Mapping[str, HParamSpec]) -> list[Problem]:
    """What is wrong between a recipe's hyperparameters and those that its task knows."""
    problems: list[Problem] = []
    for table, names in (("hparams", recipe.hparams), ("space", recipe.space)):
        for name in names:
            if name not in specs:
                home = next(iter(homes(name, type(recipe))), None)
                hint = f"; did you mean {home}?" if home else did_you_mean(name, specs)
                rest = "" if home else f"; it has: {', '.join(sorted(specs))}"
                problems.append(
                    Problem(f"{table}.{name}", f"is not a hyperparameter of this task{hint}{rest}")
                )
    for name, spec in specs.items():
        if spec.required and name not in recipe.hparams and name not in recipe.space:
            problems.append(
                Problem(f"hparams.{name}", "must be given here or searched in [space]: it has no default")
            )
    for name, value in recipe.hparams.items():
        if name in specs and (what := specs[name].problem(value)):
            problems.append(Problem(f"hparams.{name}", what))
    for name, dimension in recipe.space.items():
        if name in specs:
            problems += _check_dimension(name, dimension, specs[name])
    for name in (*recipe.hparams, *recipe.space):
        for parent, allowed in (specs[name].needs or {}).items() if name in specs else ():
            possible = _possible(parent, recipe, specs)
            if not is_read(name, recipe, specs):
                table = "space" if name in recipe.space else "hparams"
                problems.append(
                    Problem(
                        f"{table}.{name}",
                        f"is read only where {parent} is {' or '.join(map(str, allowed))}, but "
                        f"{parent} is {', '.join(map(str, possible))}; leave it out",
                    )
                )
    factor = recipe.hparams.get("head_lr_factor", 1.0) != 1.0, "head_lr_factor" in recipe.space
    if any(factor) and "head" in specs and "head" not in recipe.space and not recipe.hparams.get("head"):
        where = f"{'space' if factor[1] else 'hparams'}.head_lr_factor"
        rule = 'is the learning rate of the parameters in head, which is empty; set hparams.head = ["head.*"]'
        problems.append(Problem(where, f"{rule}, or leave it out"))
    dynamic = [name for name, spec in specs.items() if spec.dynamic]
    if recipe.scheduler.kind == "pbt" and not problems:
        problems += check_pbt_space(recipe.space, dynamic)
    for i, change in enumerate(recipe.scheduler.changes):
        for name, value in change.items():
            where = f"scheduler.changes.{i}.{name}"
            if name == "after":
                continue
            if name not in dynamic and name not in PORTABLE:
                rule = "cannot change while a model trains, or is not a hyperparameter of this task"
                known = ", ".join(sorted({*dynamic, *PORTABLE}))
                problems.append(Problem(where, f"{rule}{did_you_mean(name, dynamic)}; these can: {known}"))
            elif what := specs[name].problem(value):
                problems.append(Problem(where, what))
    return problems


def is_read(name: str, recipe: Recipe, specs: Mapping[str, HParamSpec]) -> bool:
    """Whether any trial of the recipe can have the values that this hyperparameter needs beside it."""
    needs = specs[name].needs or {}
    return all(
        any(p in allowed for p in _possible(parent, recipe, specs)) for parent, allowed in needs.items()
    )


def _possible(name: str, recipe: Recipe, specs: Mapping[str, HParamSpec]) -> list[Any]:
    dimension = recipe.space.get(name)
    if dimension is not None:
        return list(dimension.options) if isinstance(dimension, Choice) else [dimension.low, dimension.high]
    return [recipe.hparams.get(name, specs[name].default)]


def _check_dimension(name: str, dimension: Dimension, spec: HParamSpec) -> Iterable[Problem]:
    where = f"space.{name}"
    if isinstance(dimension, Choice):
        for option in dimension.options:
            if what := spec.problem(option):
                yield Problem(where, f"option {spaces.thaw(option)!r}: {what}")
        return
    if spec.type in ("bool", "str", "ints"):
        yield Problem(where, f"{name} is not a number; use {{choice = [...]}}")
        return
    if spec.type == "int" and not isinstance(dimension, spaces.Int):
        yield Problem(where, f"{name} is an integer; use {{int = [...]}} or {{choice = [...]}}")
        return
    for end in ("low", "high"):
        if what := spec.problem(getattr(dimension, end)):
            yield Problem(where, f"{end} {what}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def homes(field: str, recipe: type[Recipe]) -> list[str]:
    """Where a recipe has a field of this name: at the top, or else in its sections."""
    found = [name for name in recipe.model_fields if name == field]
    for section, info in recipe.model_fields.items():
        if field in getattr(info.annotation, "model_fields", ()):
            found.append(f"{section}.{field}")
    return found
