"""Points that the user brings: tried first, whatever the sampler. They may come from another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpt_torch import space as spaces
from hpt_torch.record import Record
from hpt_torch.report.summary import summarise
from hpt_torch.space import Space, freeze, thaw
from hpt_torch.types import HParams, HParamValue, HptError, Problem


def check_points(points: Sequence[Mapping[str, Any]], space: Space) -> list[Problem]:
    """What is wrong with them: each names searched hyperparameters, and values that the space has, under the
    conditions that it has for them."""
    problems = []
    for number, point in enumerate(points):
        where = f"search.points.{number}"
        if not point:
            problems.append(Problem(where, "must name at least one hyperparameter, e.g. { lr = 0.01 }"))
        for name, value in point.items():
            if name not in space:
                known = ", ".join(space) or "nothing, for [space] is empty"
                problems.append(Problem(f"{where}.{name}", f"is not searched; [space] has {known}"))
            elif not _fits(space, name, value):
                dimension = spaces.dump_dimension(space[name])
                problems.append(Problem(f"{where}.{name}", f"must lie in {dimension}, got {value!r}"))
        if all(name in space and _fits(space, name, value) for name, value in point.items()):
            problems += _unread(where, _completed(point, space), space)
    return problems


def _unread(where: str, point: HParams, space: Space) -> list[Problem]:
    """The values that no trial with these others would have."""
    problems = []
    for name in point:
        for parent, allowed in (space[name].when or {}).items():
            if not spaces.is_active(replace(space[name], when={parent: allowed}), point):
                options = " or ".join(str(thaw(value)) for value in allowed)
                rule = f"is read only where {parent} is {options}, and the point has {thaw(point[parent])}"
                problems.append(Problem(f"{where}.{name}", f"{rule}; leave one of them out"))
    return problems


def _completed(point: Mapping[str, Any], space: Space) -> HParams:
    """The point's values as the space has them, and of what they are read under the first that allows it."""
    full = {name: _typed(space, name, value) for name, value in point.items()}
    for name in reversed(spaces.ordered(space)):
        if name in full:
            for parent, allowed in (space[name].when or {}).items():
                full.setdefault(parent, allowed[0])
    return full


def queue(space: Space, points: Sequence[Mapping[str, Any]], *, start_with_defaults: bool) -> list[HParams]:
    """What the first trials have fixed, in their order: the declared defaults, if there are any, and the
    points. What a point leaves open is up to the sampler."""
    declared = spaces.defaults(space) if start_with_defaults else {}
    return [*([declared] if declared else []), *(_completed(point, space) for point in points)]


def _typed(space: Space, name: str, value: Any) -> HParamValue:
    """A whole number where the space has real ones is one of those."""
    return float(value) if isinstance(space[name], spaces.Float) else freeze(value)


def points_of(run_dir: str, count: int, space: Space) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The best `count` points of another run, best first, as far as this space has their values."""
    try:
        with Record(Path(run_dir) / "run.db", readonly=True) as record:
            ranked = summarise(record).ranked
    except HptError as error:
        return [], [Problem("search.warm_start", str(error))]
    found: list[dict[str, Any]] = []
    for trial in ranked:
        point = {n: thaw(v) for n, v in trial.hparams.items() if n in space and _fits(space, n, v)}
        full = _completed(point, space)
        point = {n: v for n, v in point.items() if spaces.is_active(space[n], full)}
        if point and point not in found and len(found) < count:
            found.append(point)
    if not found:
        what = f"must have complete trials that this space has room for, got {len(ranked)} complete trials"
        return [], [Problem("search.warm_start", f"{what} of {run_dir}; leave it out, or widen [space]")]
    return found, []


def taken_before(
    run_dir: Path | None, warm: tuple[str, int], own: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """The points of the run in this directory, if it began with as many of the same other run before these:
    what has become of that since makes no difference. None: there is no such run."""
    if run_dir is None or not (run_dir / "run.db").exists():
        return None
    try:
        with Record(run_dir / "run.db", readonly=True) as record:
            begun = record.last("run")
    except HptError:  # who opens it to go on says what is wrong
        return None
    if begun is None or begun.body.get("warm_start") != list(warm):
        return None
    points: list[dict[str, Any]] = begun.body["recipe"]["search"]["points"]
    return points if points[len(points) - len(own) :] == list(own) else None


def _fits(space: Space, name: str, value: Any) -> bool:
    dimension = space[name]
    try:
        return dimension.contains(freeze(value))
    except (TypeError, ValueError):
        return False
