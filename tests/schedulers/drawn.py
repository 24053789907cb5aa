"""Random spaces and points for the schedulers' tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from hpt_torch.seeding import generator
from hpt_torch.space import Choice, Dimension, Float, Int, Space, is_active
from hpt_torch.types import HParams

OPTIONS: list[Any] = [True, False, "a", "b", [1, 2], [1], 1, 2, 4, 0.5, -3.5]
KINDS = ["float", "log", "steps", "int", "int log", "int steps", "choice", "numbers"]
seeds = st.integers(0, 2**32)


@st.composite
def dimensions(draw: Any, when: Any = None) -> Dimension:
    kind = draw(st.sampled_from(KINDS))
    if kind == "choice":
        return Choice(draw(st.lists(st.sampled_from(OPTIONS), min_size=1, unique_by=repr)), when=when)
    if kind == "numbers":
        numbers = st.integers(-50, 50) | st.floats(-50, 50).filter(lambda x: x != round(x))
        return Choice(draw(st.lists(numbers, min_size=1, max_size=6, unique=True)), when=when)
    if kind.startswith("int"):
        low = draw(st.integers(1 if "log" in kind else -30, 30))
        high = low + draw(st.integers(0, 40))
        step = draw(st.integers(1, max(high - low, 1))) if "steps" in kind else 1
        return Int(low, high, log="log" in kind, step=step, when=when)
    low = draw(st.floats(1e-6, 10) if kind == "log" else st.floats(-10, 10))
    high = low + draw(st.just(0.0) | st.floats(1e-6, 100))
    step = (high - low) / draw(st.floats(1, 20)) if kind == "steps" and high > low else None
    return Float(low, high, log=kind == "log", step=step, when=when)


@st.composite
def spaces(draw: Any) -> Space:
    """Up to six dimensions, of which some depend on earlier ones."""
    space: dict[str, Dimension] = {}
    for name in draw(st.permutations(["a", "b", "c", "d", "e", "f"]))[: draw(st.integers(1, 6))]:
        when = None
        counted = [n for n, d in space.items() if isinstance(d, (Int, Choice))]
        if counted and draw(st.booleans()):
            parent = draw(st.sampled_from(counted))
            values = list(space[parent].values())
            when = {parent: draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))}
        space[name] = draw(dimensions(when=when))
    return space


def rng_of(*path: str | int) -> Any:
    return generator(0, "test", *path)


def check_point(space: Space, point: HParams) -> None:
    """The point lies in the space: its values, their types, and just the names whose conditions hold."""
    assert set(point) == {name for name, dimension in space.items() if is_active(dimension, point)}
    for name, value in point.items():
        assert space[name].contains(value), (name, space[name], value)
        if isinstance(space[name], (Float, Int)):
            assert type(value) is (float if isinstance(space[name], Float) else int)
