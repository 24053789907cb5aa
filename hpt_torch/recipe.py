"""Recipes: what a run is to do, as one TOML file. Loaded, overridden and checked here; nothing is written.

All problems are found in one pass and shown together, each with its field, the rule, the value and the
remedy. Classes below this module get flat arguments, never a `Recipe`.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import Field, ValidationError

from hpt_torch import grids
from hpt_torch import space as spaces
from hpt_torch.overrides import apply_overrides
from hpt_torch.recipe_checks import cross_check, did_you_mean, homes
from hpt_torch.recipe_sections import (
    DimensionField,
    EvaluationSection,
    FinalSection,
    ObjectiveSection,
    RunSection,
    SchedulerSection,
    SearchSection,
    Section,
    TaskSection,
    TrainerSection,
)
from hpt_torch.schedulers import PBT, Halving, Pruner, Pruning, Schedule, Scheduler, parse_changes
from hpt_torch.schedulers.halving import HalvingName
from hpt_torch.schedulers.pruning import PruningName
from hpt_torch.types import Folding, Objective, Problem, RecipeError

MAX_BYTES = 1_000_000
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Recipe(Section):
    """Everything a run needs. Frozen; unknown keys are refused."""

    name: str = Field(default="tune", pattern=NAME, description="names the run directory")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, strict=True)
    task: TaskSection = TaskSection()
    hparams: dict[str, Any] = Field(default_factory=dict, description="fixed hyperparameters")
    space: dict[str, DimensionField] = Field(default_factory=dict, description="searched hyperparameters")
    objective: ObjectiveSection = ObjectiveSection()
    search: SearchSection = SearchSection()
    trainer: TrainerSection = TrainerSection()
    scheduler: SchedulerSection = SchedulerSection()
    evaluation: EvaluationSection = EvaluationSection()
    final: FinalSection = FinalSection()
    run: RunSection = RunSection()
    executor: Literal["auto", "inline", "processes"] = Field(
        default="auto",
        description="processes (Linux, CPU): worker processes of one thread each; inline: none",
    )

    def to_toml(self) -> str:
        raw = self.model_dump(exclude_none=True)
        raw["hparams"] = {
            name: spaces.thaw(value) for name, value in raw["hparams"].items() if value is not None
        }
        return tomli_w.dumps(raw)


# What may differ when a run is continued: budgets and logging. Everything else changes results.
EXTENDABLE = (
    "name",
    "search.trials",
    "search.timeout",
    "scheduler.baseline",
    "final",
    "run",
    "executor",
    "trainer.devices",
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with ``key=value`` overrides. Raises RecipeError with every problem found."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(str(path), [Problem("", f"cannot be read: {reason}")]) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(str(path), [Problem("", f"must be at most {MAX_BYTES:,} bytes")])
    try:
        raw = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [Problem("", f"must be UTF-8 text: {error}")]) from None
    except RecursionError:
        raise RecipeError(str(path), [Problem("", "is nested too deeply")]) from None
    except ValueError as error:  # TOMLDecodeError, and integers of thousands of digits
        raise RecipeError(str(path), [Problem("", f"is not valid TOML: {error}")]) from None
    return build(raw, overrides, source=str(path))


def build(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> Recipe:
    """A recipe from plain data, with overrides. Raises RecipeError with every problem found."""
    data, problems = apply_overrides(raw, overrides, sections=tuple(Recipe.model_fields))
    try:
        recipe = Recipe.model_validate(data)
        problems += cross_check(recipe)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
        problems += _problems_beside(data, error)
    except RecursionError:
        problems.append(Problem("", "is nested too deeply"))
    if problems:
        raise RecipeError(source, problems)
    return recipe


def _problems_beside(data: Mapping[str, Any], error: ValidationError) -> list[Problem]:
    """What is wrong between the fields that are right, so that all mistakes are shown together."""
    wrong = [tuple(map(str, item["loc"])) for item in error.errors()]
    repaired = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    for section, *rest in wrong:
        table = repaired.get(section)
        if rest and isinstance(table, dict):
            table.pop(rest[0], None)
        else:
            repaired.pop(section, None)
    try:
        found = cross_check(Recipe.model_validate(repaired))
    except ValidationError:
        return []
    touched = {location[0] if len(location) == 1 else ".".join(location[:2]) for location in wrong}
    return [
        p
        for p in found
        if not any(p.where == t or p.where.startswith(f"{t}.") for t in touched)
        and not (p.where.startswith("search.") and "space" in {t.split(".")[0] for t in touched})
    ]


def scheduler_of(recipe: Recipe) -> Scheduler | None:
    """Who changes trials at boundaries; None: nobody. Raises UserInputError for settings that cannot be."""
    if recipe.scheduler.kind == "schedule":
        return Schedule(changes=parse_changes(recipe.scheduler.changes))
    return PBT(**_settings(recipe, PBT)) if recipe.scheduler.kind == "pbt" else None


def pruner_of(recipe: Recipe) -> Pruner | None:
    """Who stops trials at boundaries; None: nobody."""
    kind = recipe.scheduler.kind
    if kind in get_args(HalvingName):
        return Halving(**_settings(recipe, Halving))
    return Pruning(**_settings(recipe, Pruning)) if kind in get_args(PruningName) else None


def _settings(recipe: Recipe, kind: type) -> dict[str, Any]:
    """The settings of [scheduler] that this class has."""
    interval = recipe.scheduler.interval_epochs or max(recipe.trainer.epochs // 10, 1)
    given = {**recipe.scheduler.model_dump(), "interval_epochs": interval}
    return {field.name: given[field.name] for field in dataclasses.fields(kind)}


def folding_of(recipe: Recipe) -> Folding | None:
    """How rows are cut for cross-validation; None: train and valid as they are."""
    settings = recipe.evaluation
    if settings.folds is None:
        return None
    return Folding(folds=settings.folds, splitter=settings.splitter, repeats=settings.repeats)


def second_of(recipe: Recipe) -> Objective | None:
    """The second objective; None: there is one only."""
    second = recipe.objective.second
    if second is None:
        return None
    return Objective(metric=second.metric, direction=second.direction or "minimize")


def needs_refit(recipe: Recipe) -> bool:
    """Whether the search alone leaves no model of the chosen trial."""
    return recipe.evaluation.folds is not None or recipe.final.confirm is not None


def refits(recipe: Recipe) -> bool:
    """Whether the chosen trial is trained again on train and valid rows together."""
    asked = recipe.final.refit
    return needs_refit(recipe) if asked is None else asked


def planned_trials(recipe: Recipe) -> int | None:
    """How many trials the recipe asks for; None: as many as fit into its time."""
    if recipe.search.trials is not None:
        return recipe.search.trials
    if not recipe.space:
        return 1
    return grids.size(recipe.space) if recipe.search.sampler == "grid" else None


# -- messages ------------------------------------------------------------------------------------------


def _problem(item: Any) -> Problem:
    """One of pydantic's errors in our form: field, rule, value, remedy."""
    location = [str(part) for part in item["loc"]]
    where, value = ".".join(location), item.get("input")
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    context = item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            known = _fields_at(location[:-1])
            found = homes(location[-1], Recipe)
            hint = f"; did you mean {found[0]}?" if found else did_you_mean(location[-1], known)
            return Problem(where, f"unknown field{hint or '; known: ' + ', '.join(sorted(known))}")
        case "literal_error":
            expected = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
            return Problem(where, f"must be one of {expected}, got {shown}")
        case "value_error":
            return Problem(where, str(context.get("error", item["msg"])))
        case "string_pattern_mismatch" if where == "name":
            rule = "must be a letter or digit, then up to 63 letters, digits, '.', '_' or '-'"
            return Problem(where, f"{rule}, got {shown}")
        case "string_pattern_mismatch" if where == "trainer.device":
            return Problem(where, f"must be auto, cpu, cuda, cuda:N or mps, got {shown}")
        case "model_type" | "dict_type":
            return Problem(where, f"must be a table, got {shown}")
    message = item["msg"].replace("Input should be", "must be")
    return Problem(where, f"{message[:1].lower()}{message[1:]}, got {shown}")


def _fields_at(location: Sequence[str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        kind = model.model_fields[part].annotation
        model = next((one for one in get_args(kind) if hasattr(one, "model_fields")), kind)  # of X | None
    return list(model.model_fields)


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors (Taplo, Even Better TOML)."""
    return Recipe.model_json_schema()


# -- differences ---------------------------------------------------------------------------------------


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``field: old -> new`` for every field in which two recipes (plain data) would give other results."""
    lines = []
    flat_old, flat_new = flatten(old), flatten(new)
    population = flat_new.get("scheduler.kind") in ("pbt", "schedule")  # its size is no budget
    for key in sorted(set(flat_old) | set(flat_new)):
        free = any(key == name or key.startswith(f"{name}.") for name in EXTENDABLE)
        if free and not (population and key == "search.trials"):
            continue
        before, after = flat_old.get(key, "not given"), flat_new.get(key, "not given")
        if before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def flatten(data: Mapping[str, Any]) -> dict[str, Any]:
    """``section.field`` -> value, one level down."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    return flat
