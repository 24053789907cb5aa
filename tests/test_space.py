"""Dimensions, their conditions, their recipe form, and grids."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpt_torch import grids
from hpt_torch.hparams import ALWAYS_LOG
from hpt_torch.space import (
    Choice,
    Dimension,
    Float,
    Int,
    check_space,
    decode,
    defaults,
    dump_dimension,
    encode,
    freeze,
    is_active,
    is_log,
    ordered,
    parse_dimension,
    thaw,
    to_optuna,
)
from hpt_torch.types import SpaceError

# -- dimensions ----------------------------------------------------------------------------------------


def test_float_holds_floats() -> None:
    dimension = Float(0, 1, default=1)
    assert [type(v) for v in (dimension.low, dimension.high, dimension.default)] == [float] * 3


def test_choice_freezes_its_lists() -> None:
    dimension = Choice([[64], [64, [1, 2]], "a"], default=[64])
    assert dimension.options == ((64,), (64, (1, 2)), "a")
    assert dimension.default == (64,)
    assert hash(dimension) is not None
    assert thaw(freeze([64, [1, 2]])) == [64, [1, 2]]


@pytest.mark.parametrize(
    ("dimension", "inside", "outside"),
    [
        (
            Float(0, 1),
            [0, 0.0, 0.5, 1, 1.0],
            [-1e-9, 1.0000001, math.nan, math.inf, "0.5", True, None, (0.5,)],
        ),
        (Float(0, 0.3, step=0.1), [0.0, 0.1, 0.2, 0.3], [0.05, 0.4]),
        (Float(0.1, 1.0, step=0.2), [0.1, 0.3, 0.5, 0.9], [1.0, 0.2]),
        (Int(1, 9), [1, 5, 9], [0, 10, 1.0, 5.0, True, "5", None]),
        (Int(1, 9, step=4), [1, 5, 9], [2, 4, 8]),
        (Choice([32, 64]), [32, 64], [32.0, 33, "32", True, (32,)]),
        (Choice([True, 1, 1.0, "1"]), [True, 1, 1.0, "1"], [False, "True", 2]),
        (Choice([[64], [64, 64]]), [(64,), [64], (64, 64)], [64, (64, 64, 64), ()]),
        (Choice([[], ["a", 1]]), [(), ("a", 1)], [("a",), ("a", 1.0)]),
        (Float(2, 2), [2.0], [2.1]),
        (Int(2, 2), [2], [3]),
    ],
    ids=repr,
)
def test_contains(dimension: Dimension, inside: list[Any], outside: list[Any]) -> None:
    assert [v for v in inside if not dimension.contains(v)] == []
    assert [v for v in outside if dimension.contains(v)] == []


@pytest.mark.parametrize(
    ("dimension", "values"),
    [
        (Float(0, 1), None),
        (Float(0, 1, step=0.5), (0.0, 0.5, 1.0)),
        (Float(0, 1, step=0.4), (0.0, 0.4, 0.8)),
        (Float(0, 0.3, step=0.1), (0.0, 0.1, 0.2, 0.3)),
        (Int(3, 5), (3, 4, 5)),
        (Int(3, 8, step=2), (3, 5, 7)),
        (Choice([[64], "a", True]), ((64,), "a", True)),
    ],
    ids=repr,
)
def test_values(dimension: Dimension, values: tuple[Any, ...] | None) -> None:
    assert dimension.count() == (None if values is None else len(values))
    if values is not None:
        found = tuple(dimension.values())
        assert found == (pytest.approx(values) if isinstance(dimension, Float) else values)
        assert all(dimension.contains(value) for value in found)


@given(low=st.floats(-1e3, 1e3), width=st.floats(1e-2, 1e3), steps=st.integers(2, 30), rest=st.floats(0, 0.9))
@settings(deadline=None, derandomize=True)
def test_the_values_of_a_stepped_float_lie_inside(low: float, width: float, steps: int, rest: float) -> None:
    dimension = Float(low, low + width, step=width / (steps + rest))
    values = dimension.values()
    assert len(values) == steps + 1
    assert [v for v in values if not dimension.contains(v)] == []
    assert max(values) <= dimension.high


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(1, 0), r"low must be at most high, got \[1, 0\]"),
        (lambda: Float("a", 1), "low must be a finite number, got 'a'"),
        (lambda: Float(0, math.inf), "high must be a finite number, got inf"),
        (lambda: Float(True, 2), "low must be a finite number, got True"),
        (lambda: Float(0, 1, log=True), "a log scale needs low > 0, got 0"),
        (lambda: Float(0.1, 1, log=True, step=0.1), "step and log cannot be combined"),
        (lambda: Float(0, 1, step=0), "step must be above 0"),
        (lambda: Float(0, 1, step=2), "step must be at most high - low = 1, got 2"),
        (lambda: Float(0, 1, default=2), "default must lie in the dimension, got 2"),
        (lambda: Float(0, 10**400), "high must be a finite number"),
        (lambda: Int(1, 2.0), r"high must be an integer of at most 2\*\*53, got 2.0"),
        (lambda: Int(1, 9, step=0), "step must be above 0"),
        (lambda: Int(1, 9, step=1.5), r"step must be an integer of at most 2\*\*53, got 1.5"),
        (lambda: Int(0, 9, log=True), "a log scale needs low > 0"),
        (lambda: Int(1, 9, log="yes"), "log must be true or false, got 'yes'"),
        (lambda: Int(1, 9, step=2, default=2), "default must lie in the dimension, got 2"),
        (lambda: Choice([]), "at least one option"),
        (lambda: Choice("abc"), "a list of at least one option, got 'abc'"),
        (lambda: Choice([1, 2, 1]), "option 1 twice"),
        (lambda: Choice([[1], (1,)]), r"option \[1\] twice"),
        (
            lambda: Choice([None]),
            "an option must be a finite number .*, a text, true, false or a list of these, got None",
        ),
        (lambda: Choice([{"a": 1}]), "an option must be a finite number"),
        (lambda: Choice([math.nan]), "an option must be a finite number .*, got nan"),
        (lambda: Choice([2**53 + 1]), r"an integer: at most 2\*\*53\), .* got 9007199254740993"),
        (lambda: Choice([1], default={}), "default must be a finite number"),
        (lambda: Int(1, 2, when={"x": (None,)}), "a value of when.x must be a finite number"),
        (lambda: Choice([1], default=2), "default must lie in the dimension, got 2"),
        (lambda: parse_dimension({1: 2}), "exactly one of float, int, choice"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


# -- log scales ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALWAYS_LOG))
def test_some_names_are_searched_on_a_log_scale_unless_said_otherwise(name: str) -> None:
    assert is_log(name, Float(1e-4, 1e-1))
    assert is_log(name, Int(1, 10))
    assert not is_log(name, Float(1e-4, 1e-1, log=False))
    assert not is_log(name, Float(0.1, 0.5, step=0.1))
    assert not is_log(name, Int(1, 9, step=2))
    assert Float(1e-4, 1e-1).distribution(name).log


def test_every_other_name_is_linear_unless_said_otherwise() -> None:
    assert not is_log("dropout", Float(1e-4, 1e-1))
    assert is_log("dropout", Float(1e-4, 1e-1, log=True))
    assert is_log("width", Int(8, 256, log=True))


def test_a_default_log_scale_needs_a_positive_low() -> None:
    assert check_space({"dropout": Float(0, 1), "lr": Float(0, 1, log=False)}) == []
    (problem,) = check_space({"lr": Float(0, 1)})
    assert problem.where == "space.lr"
    assert "raise low or set log = false" in problem.what


@pytest.mark.parametrize(
    "dimension",
    [
        Float(1e-4, 0.1),
        Float(1, 5, step=1),
        Float(0.1, 0.5, step=0.1),
        Int(1, 9),
        Int(1, 9, step=2),
        Choice([1, [2]]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["lr", "x"])
def test_what_the_checks_accept_optuna_accepts(name: str, dimension: Dimension) -> None:
    assert check_space({name: dimension}) == []
    dimension.distribution(name)


@pytest.mark.parametrize(
    "dimension",
    [
        Float(0.0, 1.0, step=0.3),
        Float(0.0, 1.0, step=0.16666666666666669),  # six of these, in decimals, lie beyond 1
        Float(0.0, 1.0, step=0.3333333333333333),
        Float(1e-4, 1.0, step=1e-3),
        Int(1, 10, step=2),
    ],
    ids=repr,
)
def test_a_step_that_does_not_divide_the_range_warns_nobody(dimension: Dimension) -> None:
    """Such a range ends at its last step, as `values` says; Optuna's warning about it would be noise."""
    last = dimension.values()[-1]
    assert dimension.distribution("x").high == pytest.approx(last)
    assert dimension.distribution("x")._contains(to_optuna(dimension, last))
    assert dimension.contains(decode(dimension, dimension.distribution("x").high))


# -- encoding ------------------------------------------------------------------------------------------

options = st.recursive(
    st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.booleans(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(option=options)
@settings(deadline=None, derandomize=True)
def test_a_choice_survives_encoding(option: Any) -> None:
    back = decode(Choice([option]), encode(freeze(option)))
    assert repr(back) == repr(freeze(option))


def test_encoding_tells_kinds_apart_and_decoding_gives_pythons_types() -> None:
    kinds: list[Any] = [1, 1.0, True, "1", "true", (1,), ((1,),), ()]
    assert len({encode(kind) for kind in kinds}) == len(kinds)
    assert type(decode(Float(0, 1), 1)) is float
    assert type(decode(Int(0, 1), 1.0)) is int


# -- recipe form ---------------------------------------------------------------------------------------

whens = st.none() | st.dictionaries(
    st.text(min_size=1), st.lists(options, min_size=1, max_size=3), min_size=1
)


@st.composite
def dimensions(draw: st.DrawFn) -> Dimension:
    when = draw(whens)
    when = None if when is None else {name: tuple(map(freeze, values)) for name, values in when.items()}
    kind = draw(st.sampled_from(["float", "int", "choice"]))
    if kind == "choice":
        listed = draw(st.lists(options, min_size=1, max_size=4, unique_by=json.dumps))
        return Choice(listed, default=draw(st.none() | st.sampled_from(listed)), when=when)
    log = draw(st.sampled_from([None, True, False]))
    if kind == "int":
        low, high = sorted(draw(st.tuples(st.integers(1, 10**9), st.integers(1, 10**9))))
        step = 1 if log or low == high else draw(st.integers(1, high - low))
        return Int(low, high, log=log, step=step, default=draw(st.sampled_from([None, low])), when=when)
    low, high = sorted(draw(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))))
    step = high - low if not log and low < high and draw(st.booleans()) else None
    return Float(low, high, log=log, step=step, default=draw(st.sampled_from([None, low, high])), when=when)


@given(dimension=dimensions())
@settings(deadline=None, derandomize=True)
def test_dump_and_parse_give_the_same_dimension(dimension: Dimension) -> None:
    raw = dump_dimension(dimension)
    assert repr(parse_dimension(raw)) == repr(dimension)
    assert repr(parse_dimension(json.loads(json.dumps(raw)))) == repr(dimension)
    assert parse_dimension(dimension) is dimension


# -- the space as a whole ------------------------------------------------------------------------------

CONDITIONAL: Mapping[str, Dimension] = {
    "nesterov": Choice([True, False], when={"momentum": (0.5,)}),
    "momentum": Float(0, 0.5, step=0.5, default=0.5, when={"optimizer": ("sgd",)}),
    "optimizer": Choice(["adam", "sgd"], default="adam"),
}


def test_ordered_puts_parents_first_and_keeps_the_order_otherwise() -> None:
    assert ordered({"b": Int(1, 2), "a": Int(1, 2)}) == ["b", "a"]
    assert ordered(CONDITIONAL) == ["optimizer", "momentum", "nesterov"]
    assert ordered({"x": Int(1, 2, when={"y": (1,)}), "z": Int(1, 2), "y": Int(1, 2)}) == ["z", "y", "x"]


def test_a_circle_is_found() -> None:
    circle = {"a": Int(1, 2, when={"b": (1,)}), "b": Int(1, 2, when={"a": (1,)}), "c": Int(1, 2)}
    with pytest.raises(SpaceError, match="the conditions of a, b depend on each other in a circle"):
        ordered(circle)
    assert any("circle" in problem.what for problem in check_space(circle))


def test_is_active() -> None:
    nesterov = CONDITIONAL["nesterov"]
    assert is_active(CONDITIONAL["optimizer"], {})
    assert is_active(nesterov, {"momentum": 0.5})
    assert not is_active(nesterov, {"momentum": 0.0})
    assert not is_active(nesterov, {})
    both = Int(1, 2, when={"a": (1, 2), "b": ("x",)})
    assert is_active(both, {"a": 2, "b": "x"})
    assert not is_active(both, {"a": 2, "b": "y"})
    assert not is_active(both, {"a": 3, "b": "x"})


def test_a_condition_that_the_checks_accept_can_hold() -> None:
    """TOML's 1 is a possible value of a real dimension, so it must be equal to that dimension's 1.0."""
    space = {"dropout": Float(0, 1, step=0.5), "width": Int(1, 2, when={"dropout": (1,)})}
    assert check_space(space) == []
    assert {"dropout": 1.0, "width": 2} in list(grids.points(space))


def test_defaults() -> None:
    assert defaults(CONDITIONAL) == {"momentum": 0.5, "optimizer": "adam"}
    assert defaults(
        {"a": Choice([True, False], default=False), "b": Int(0, 1, default=0), "c": Int(0, 1)}
    ) == {
        "a": False,
        "b": 0,
    }


def test_grid_of_a_conditional_space() -> None:
    points = list(grids.points(CONDITIONAL))
    assert points == [
        {"optimizer": "adam"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "momentum": 0.5, "nesterov": True},
        {"optimizer": "sgd", "momentum": 0.5, "nesterov": False},
    ]


def test_grid_order_and_size() -> None:
    points = list(grids.points({"a": Int(1, 3), "b": Choice(["x", [1]])}))
    assert [tuple(point.values()) for point in points] == [
        (1, "x"), (1, (1,)), (2, "x"), (2, (1,)), (3, "x"), (3, (1,)),
    ]  # fmt: skip
    assert list(grids.points({})) == [{}]


def test_grid_keeps_points_that_only_look_equal() -> None:
    assert len(list(grids.points({"a": Choice([1, 1.0, True, "1"])}))) == 4


def test_grid_refuses_what_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpaceError, match=r"space\.lr: a grid needs values that can be counted; give step"):
        list(grids.points({"n": Int(1, 2), "lr": Float(0.1, 0.2)}))
    monkeypatch.setattr(grids, "_MAX_GRID", 5)
    assert len(list(grids.points({"n": Int(1, 5)}))) == 5
    with pytest.raises(SpaceError, match="more than 5 points; use another sampler or fewer values"):
        list(grids.points({"n": Int(1, 2), "m": Int(1, 3)}))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), needed=st.sets(st.integers(1, 4), min_size=1)
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_a_grid_has_every_point_once(sizes: list[int], needed: set[int]) -> None:
    space: dict[str, Dimension] = {f"n{i}": Int(1, size) for i, size in enumerate(sizes)}
    space["child"] = Choice(["x", "y"], when={"n0": tuple(needed)})
    points = list(grids.points(space))
    assert len({json.dumps(point, sort_keys=True) for point in points}) == len(points)
    active = len(needed & set(range(1, sizes[0] + 1)))
    assert len(points) == (sizes[0] + active) * math.prod(sizes[1:])
    for point in points:
        assert set(point) == {name for name in space if is_active(space[name], point)}


@pytest.mark.parametrize(
    ("space", "where"),
    [
        ({"a": Int(1, 2, when={"a": (1,)})}, "space.a.when.a"),
        ({"a": Int(1, 2, when={"b": (1,)})}, "space.a.when.b"),
        ({"a": Int(1, 2, when={"b": (3,)}), "b": Int(1, 2)}, "space.a.when.b"),
        ({"a": Int(1, 2, when={"b": (1, "x")}), "b": Int(1, 2)}, "space.a.when.b"),
        ({"a": Int(1, 2, when={"b": (1.0,)}), "b": Int(1, 2)}, "space.a.when.b"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_check_space_names_the_condition(space: dict[str, Dimension], where: str) -> None:
    assert where in [problem.where for problem in check_space(space)]


def test_one_mistake_is_one_problem() -> None:
    assert len(check_space({"a": Int(1, 2, when={"a": (1,)})})) == 1
    assert check_space(CONDITIONAL) == []
