"""Children of hyperparameters: always inside the space, never stuck, and what each kind of dimension does."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from drawn import check_point, dimensions, rng_of, seeds, spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from hpt_torch.schedulers.explore import clip, crossover, explore, is_ordered, perturb, resample
from hpt_torch.space import Choice, Dimension, Float, Int, Space, encode
from hpt_torch.types import HParams, HParamValue

FACTORS = (0.8, 1.2)
shares = st.sampled_from([0.0, 0.25, 1.0])
factors = st.tuples(st.floats(0.01, 0.99), st.floats(1.01, 100))


def children(
    dimension: Dimension, value: HParamValue, n: int = 60, name: str = "x", factors: Any = FACTORS
) -> list[Any]:
    """What perturbing gives, each once, smallest first."""
    return sorted({perturb(name, dimension, value, factors, rng_of(i)) for i in range(n)})


# -- every space ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300, derandomize=True)
@given(space=spaces(), seed=seeds, resampled=shares, crossed=shares, factors=factors)
def test_a_child_lies_in_the_space(
    space: Space, seed: int, resampled: float, crossed: float, factors: tuple[float, float]
) -> None:
    first, second = (explore({}, space, rng=rng_of(seed, who)) for who in "ab")
    check_point(space, first)
    for generation in range(5):
        first = explore(
            first, space, mates=[second], rng=rng_of(seed, generation), resample_probability=resampled,
            crossover_probability=crossed, perturbation_factors=factors,
        )  # fmt: skip
        check_point(space, first)


@settings(deadline=None, derandomize=True)
@given(space=spaces(), seed=seeds)
def test_the_same_seed_gives_the_same_child_in_whatever_order(space: Space, seed: int) -> None:
    parent, mate = (explore({}, space, rng=rng_of(seed, who)) for who in "ab")
    backwards = [dict(reversed(list(x.items()))) for x in (parent, space, mate)]
    first, again = (
        explore(p, s, mates=[m], rng=rng_of(seed), crossover_probability=0.5)
        for p, s, m in ((parent, space, mate), backwards)
    )
    assert first == again


def test_another_seed_gives_another_child() -> None:
    space = {"a": Float(0, 1), "b": Float(0, 1)}
    assert len({tuple(explore({"a": 0.5, "b": 0.5}, space, rng=rng_of(i)).items()) for i in range(50)}) > 20


@settings(deadline=None, derandomize=True)
@given(dimension=dimensions(), seed=seeds)
def test_a_parent_is_not_changed(dimension: Dimension, seed: int) -> None:
    parent = {"x": resample("x", dimension, rng_of(seed)), "y": 1}
    before = dict(parent)
    explore(parent, {"x": dimension}, rng=rng_of(seed))
    assert parent == before


# -- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dimension", "value"),
    [("lr", Float(1e-5, 1), 1e-3), ("x", Float(0.1, 10), 1.0), ("x", Float(-10, -0.1), -1.0),
     ("x", Float(0, 1), 0.5), ("x", Float(-1, 1), -0.5), ("x", Int(10, 1000, log=True), 100),
     ("x", Int(0, 1000), 200)],
)  # fmt: skip
def test_a_number_is_multiplied(name: str, dimension: Any, value: Any) -> None:
    for down, up in (FACTORS, (0.5, 1.5)):
        found = children(dimension, value, name=name, factors=(down, up))
        assert found == pytest.approx(sorted([value * down, value * up]))


def test_a_number_stays_within_its_bounds() -> None:
    """Ray's mutation of 0.9 gave a dropout of 1.08 (ray #5035)."""
    assert children(Float(0, 0.95), 0.9) == pytest.approx([0.72, 0.95])
    assert children(Float(1e-4, 1e-1), 1e-4, name="lr") == pytest.approx([1e-4, 1.2e-4])
    assert children(Int(4, 10), 10) == [8, 10]


def test_both_factors_come_as_often() -> None:
    ups = sum(perturb("x", Float(0.1, 10), 1.0, FACTORS, rng_of(i)) > 1 for i in range(1000))  # type: ignore[operator]
    assert 440 < ups < 560


@pytest.mark.parametrize("dimension", [Float(0, 1), Float(-1, 0), Float(-1, 1), Int(0, 1000), Int(-1000, 0)])
def test_a_number_can_leave_0(dimension: Any) -> None:
    far = 0.5 * max(abs(dimension.low), abs(dimension.high))
    value, farthest = clip(dimension, 0), 0.0
    for i in range(2000):
        value = perturb("x", dimension, value, FACTORS, rng_of(i))  # type: ignore[assignment]
        farthest = max(farthest, abs(value))
    assert farthest > far


def test_a_number_can_change_its_sign() -> None:
    value, signs = 0.5, set()
    for i in range(2000):
        value = perturb("x", Float(-1, 1), value, FACTORS, rng_of(i))  # type: ignore[assignment]
        signs.add(math.copysign(1, value))
    assert signs == {-1, 1}


def test_one_becomes_two() -> None:
    """Rounded, 1 x 1.2 stays 1 for ever."""
    assert children(Int(1, 8), 1) == [1, 2]
    assert children(Int(1, 8, log=True), 1) == [1, 2]
    assert children(Int(1, 8), 2) == [1, 3]


def test_an_integer_is_rounded_to_the_product_in_the_mean() -> None:
    drawn = [perturb("x", Int(1, 100), 12, (0.8, 1.2), rng_of(i)) for i in range(4000)]
    assert set(drawn) == {9, 10, 14, 15}
    assert sum(drawn) / len(drawn) == pytest.approx(12, abs=0.15)  # type: ignore[arg-type]


def reachable(dimension: Dimension, start: HParamValue) -> set[str]:
    """Everything that perturbations alone lead to."""
    found, left = {encode(start)}, [start]
    while left:
        for child in children(dimension, left.pop()):
            if encode(child) not in found:
                found.add(encode(child))
                left.append(child)
    return found


@pytest.mark.parametrize(
    "dimension",
    [Int(1, 2), Int(1, 13), Int(1, 13, log=True), Int(0, 9), Int(-9, 0), Int(-7, 7), Int(-13, -1),
     Int(30, 50), Int(-4, 12, step=4), Int(0, 10, step=3), Choice([32, 64, 128, 256]), Choice([3, 1, 2.5]),
     Float(0, 1, step=0.1), Float(-1, 1, step=0.3)],
)  # fmt: skip
def test_every_value_can_be_reached_from_every_other(dimension: Dimension) -> None:
    """By perturbations alone, without a single draw from the prior."""
    every = {encode(value) for value in dimension.values()}
    for value in dimension.values():
        assert reachable(dimension, value) == every


# -- steps and choices ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "value", "expected"),
    [
        (Int(0, 100, step=10), 50, {40, 60}),
        (Int(0, 100, step=10), 0, {0, 10}),
        (Int(0, 25, step=10), 20, {10, 20}),
        (Float(0, 1, step=0.25), 0.5, {0.25, 0.75}),
        (Float(0, 1, step=0.25), 1.0, {0.75, 1.0}),
        (Float(0, 1, step=0.3), 0.6, {0.3, 0.9}),
        (Float(0, 1, step=0.3), 0.9, {0.6, 0.9}),
        (Choice([128, 32, 64]), 64, {32, 128}),  # by value, not by place
        (Choice([128, 32, 64]), 128, {64, 128}),
        (Choice([0.1, 1, 10.0]), 1, {0.1, 10.0}),
        (Choice([7]), 7, {7}),
        (Choice(["sgd", "adam"]), "adam", {"adam"}),
        (Choice([True, False]), True, {True}),
        (Choice([0, 1, "auto"]), 1, {1}),
        (Choice([[1], [2]]), (2,), {(2,)}),
        (Int(3, 3), 3, {3}),
        (Int(0, 0), 0, {0}),
        (Float(0, 0), 0.0, {0.0}),
    ],
)
def test_steps_and_choices(dimension: Dimension, value: Any, expected: set[Any]) -> None:
    found = children(dimension, value)
    assert found == (pytest.approx(sorted(expected)) if isinstance(value, float) else sorted(expected))
    assert {type(child) for child in found} == {type(child) for child in expected}


def test_true_is_no_number() -> None:
    assert not is_ordered(Choice([True, False]))
    assert not is_ordered(Choice([0, True]))
    assert is_ordered(Choice([0, 1.5]))


def test_a_choice_without_order_changes_only_by_a_draw() -> None:
    space = {"mode": Choice(["a", "b", "c"])}
    for probability, expected in ((0.0, {"a"}), (0.5, {"a", "b", "c"})):
        seen = {
            explore({"mode": "a"}, space, rng=rng_of(i), resample_probability=probability)["mode"]
            for i in range(50)
        }
        assert seen == expected


def test_clip_gives_the_nearest_value() -> None:
    assert clip(Float(0, 1), 1.5) == 1.0
    assert clip(Float(0, 1, step=0.3), 2) == pytest.approx(0.9)
    assert clip(Float(0, 1, step=0.3), 0.4) == pytest.approx(0.3)
    assert clip(Int(1, 8), -3) == 1
    assert clip(Int(1, 8), 4.4) == 4
    assert clip(Int(0, 25, step=10), 24) == 20


# -- the prior -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dimension"),
    [("x", Int(1, 4)), ("x", Int(0, 9, step=3)), ("x", Float(0, 0.9, step=0.3)),
     ("x", Choice([["a"], "b", True, 1]))],
)  # fmt: skip
def test_values_that_can_be_counted_are_drawn_evenly(name: str, dimension: Dimension) -> None:
    counts = Counter(encode(resample(name, dimension, rng_of(i))) for i in range(2000))
    assert len(counts) == 4
    assert all(430 < count < 570 for count in counts.values()), counts


@pytest.mark.parametrize(
    ("name", "dimension", "median"),
    [("lr", Float(1e-4, 1.0), 1e-2), ("x", Float(1e-4, 1.0, log=True), 1e-2), ("x", Float(1e-4, 1.0), 0.5),
     ("x", Float(-2, 4), 1), ("x", Int(1, 10_000, log=True), 71), ("x", Int(0, 1000), 500)],
)  # fmt: skip
def test_half_of_the_draws_lie_below_the_median(name: str, dimension: Any, median: float) -> None:
    below = sum(resample(name, dimension, rng_of(i)) < median for i in range(2000))  # type: ignore[operator]
    assert 900 < below < 1100


def test_the_ends_of_a_log_integer_are_drawn() -> None:
    drawn = [resample("x", Int(1, 4, log=True), rng_of(i)) for i in range(2000)]
    for value in range(1, 5):
        share = math.log((value + 0.5) / (value - 0.5)) / math.log(9)
        assert drawn.count(value) / 2000 == pytest.approx(share, abs=0.04)


def test_a_huge_range_does_not_overflow() -> None:
    space = {"x": Float(-1.7e308, 1.7e308), "y": Int(-(2**53), 2**53), "z": Float(0, 1e9, step=1.0)}
    point = explore({}, space, rng=rng_of(0))
    drawn = [resample("x", space["x"], rng_of(i)) for i in range(100)]
    assert len(set(drawn)) == 100
    for i in range(200):
        point = explore(point, space, rng=rng_of(i), resample_probability=0.1)
        check_point(space, point)


def test_how_often_a_value_is_drawn_anew() -> None:
    space: Space = {name: Float(0.1, 10.0) for name in "abcdefghij"}
    parent = dict.fromkeys(space, 1.0)
    new = 0
    for i in range(200):
        child = explore(parent, space, rng=rng_of(i), resample_probability=0.25)
        new += sum(value not in (0.8, 1.2) for value in child.values())
    assert 420 < new < 580  # of 2000


# -- conditions ----------------------------------------------------------------------------------------

CONDITIONAL: Space = {
    "momentum": Float(0.5, 0.9, when={"mode": ["slow"]}),
    "mode": Choice(["slow", "fast"]),
    "sub": Int(1, 8, when={"momentum": [0.9]}),
}


def test_a_dimension_that_is_not_active_is_dropped_and_one_that_becomes_active_is_drawn() -> None:
    from_slow = [explore({"mode": "slow", "momentum": 0.7}, CONDITIONAL, rng=rng_of(i)) for i in range(200)]
    from_fast = [explore({"mode": "fast"}, CONDITIONAL, rng=rng_of(i)) for i in range(200)]
    for child in (*from_slow, *from_fast):
        check_point(CONDITIONAL, child)
    assert {child["mode"] for child in from_slow} == {"slow", "fast"}
    drawn = {child["momentum"] for child in from_fast if child["mode"] == "slow"}
    assert len(drawn) > 5  # from the prior: each its own


def test_a_value_outside_its_dimension_is_drawn_anew() -> None:
    space: Space = {"x": Float(0.1, 1), "n": Int(1, 4), "c": Choice([1, 2])}
    for parent in ({"x": 7.0, "n": 9, "c": 3}, {"x": math.nan, "n": True, "c": None}, {"x": "a", "n": 1.5}):
        child = explore(parent, space, rng=rng_of(0), resample_probability=0)  # type: ignore[arg-type]
        check_point(space, child)


def test_names_outside_the_space_are_left_out() -> None:
    assert set(explore({"x": 0.5, "depth": 3}, {"x": Float(0, 1)}, rng=rng_of(0))) == {"x"}


# -- crossover -----------------------------------------------------------------------------------------


def test_crossover_takes_each_value_from_either() -> None:
    first, second = {"a": 1, "b": 1, "c": 1}, {"b": 2, "a": 2, "z": 2}
    assert crossover(first, second, 0.0, rng_of(0)) == first
    assert crossover(first, second, 1.0, rng_of(0)) == {"a": 2, "b": 2, "c": 1}
    mixed = Counter(tuple(crossover(first, second, 0.5, rng_of(i)).values()) for i in range(400))
    assert set(mixed) == {(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1)}
    assert min(mixed.values()) > 70


def test_explore_crosses_only_when_asked() -> None:
    space: Space = {"mode": Choice(["a", "b", "c"]), "x": Float(0.1, 10)}
    mates: list[HParams] = [{"mode": "b", "x": 5.0}, {"mode": "c", "x": 5.0}]

    def modes(**settings: Any) -> set[Any]:
        parent: HParams = {"mode": "a", "x": 1.0}
        options = {"resample_probability": 0.0, **settings}
        return {explore(parent, space, rng=rng_of(i), **options)["mode"] for i in range(100)}

    assert modes() == modes(mates=mates) == modes(crossover_probability=1.0) == {"a"}
    assert modes(mates=mates, crossover_probability=1.0) == {"b", "c"}
    assert modes(mates=mates, crossover_probability=0.5) == {"a", "b", "c"}
