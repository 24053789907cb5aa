"""Grids: every point of a space that can be counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hpt_torch.space import Space, encode, is_active, ordered
from hpt_torch.types import HParamValue, SpaceError

_MAX_GRID = 100_000


def _bound(space: Space) -> int:
    """The points of the grid if no dimension had a condition. Raises SpaceError as `points` does."""
    found = 1
    for name, dimension in space.items():
        count = dimension.count()
        if count is None:
            raise SpaceError(f"space.{name}: a grid needs values that can be counted; give step or a choice")
        found *= count
    if found > _MAX_GRID:
        raise SpaceError(f"the grid has more than {_MAX_GRID:,} points; use another sampler or fewer values")
    return found


def points(space: Space) -> Iterator[dict[str, HParamValue]]:
    """Every point of a space that can be counted, first name slowest; inactive dimensions are left out.

    Raises SpaceError where a dimension is continuous or the grid has more than a hundred thousand points.
    """
    _bound(space)
    names, seen = ordered(space), set()
    for combination in itertools.product(*(space[name].values() for name in names)):
        point: dict[str, HParamValue] = {}
        for name, value in zip(names, combination, strict=True):
            if is_active(space[name], point):
                point[name] = value
        key = tuple((name, encode(value)) for name, value in point.items())
        if key not in seen:
            seen.add(key)
            yield point


def size(space: Space) -> int:
    """How many `points` gives."""
    if all(dimension.when is None for dimension in space.values()):
        return _bound(space)
    return sum(1 for _ in points(space))
