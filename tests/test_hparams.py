"""The table of standard hyperparameters, and the signature by which trials are grouped."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpt_torch.hparams import (
    ALWAYS_LOG,
    CLASSIFICATION,
    MODEL,
    TRAINING,
    HParamSpec,
    by_name,
    signature,
)

ALL = (*TRAINING, *CLASSIFICATION, *MODEL)


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_every_entry_is_explained_and_allows_its_own_default(spec: HParamSpec) -> None:
    assert spec.doc
    assert spec.problem(spec.default) is None
    assert not (spec.dynamic and spec.type in ("str", "ints", "bool")), "no tensor holds it"
    assert spec.low < spec.high


def test_names_are_unique_and_what_is_needed_exists() -> None:
    assert len(by_name(ALL)) == len(ALL)
    for spec in ALL:
        for parent, values in (spec.needs or {}).items():
            assert [by_name(ALL)[parent].problem(value) for value in values] == [None] * len(values)
    assert {spec.name for spec in ALL if spec.log} <= ALWAYS_LOG


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("lr", [1e-9, 1, 10.0], [0, -1.0, math.nan, "1", True, None, [1.0], {"a": 1}]),
        ("dropout", [0, 0.0, 0.999], [1, 1.0, -0.1, True]),
        ("batch_size", [1, 10**6], [0, 1.0, True, "1", math.inf]),
        ("grad_clip_norm", [1e-3, math.inf], [0, -math.inf, math.nan]),
        ("batch_norm_momentum", [1.0, 1e-3], [0.0, 1.1]),
        ("nesterov", [True, False], [0, 1, "true", 1.0]),
        ("optimizer", ["sgd", "adam", "adamw"], ["Adam", "", 3, ["adam"], True]),
        ("hidden_sizes", [[], [1], (64, 64), None], [64, [0], [1.0], [True], "64", [[64]], [1, -1]]),
    ],
)
def test_problem(name: str, right: list[Any], wrong: list[Any]) -> None:
    spec = by_name(ALL)[name]
    assert [spec.problem(value) for value in right] == [None] * len(right)
    for value in wrong:
        what = spec.problem(value)
        assert what is not None, value
        assert "must be" in what
        assert "got" in what


@pytest.mark.parametrize("name", ["lr", "batch_size", "hidden_sizes"])
def test_an_integer_that_no_float_holds(name: str) -> None:
    huge = 10**400
    by_name(ALL)[name].problem([huge] if name == "hidden_sizes" else huge)  # any answer, but no OverflowError


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (HParamSpec(name="x", type="float"), "(-inf, inf)"),
        (HParamSpec(name="x", type="float", low=0, open_low=True), "(0, inf)"),
        (HParamSpec(name="x", type="float", low=0, high=1, open_high=True), "[0, 1)"),
        (HParamSpec(name="x", type="float", low=0, high=1), "[0, 1]"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_interval(spec: HParamSpec, text: str) -> None:
    assert spec.interval() == text


def test_signature_ignores_order_and_dynamic_values() -> None:
    dynamic = {"lr", "dropout"}
    one = signature({"width": 64, "lr": 0.1, "activation": "relu"}, dynamic)
    assert one == signature({"activation": "relu", "lr": 0.9, "dropout": 0.5, "width": 64}, dynamic)
    assert one == '{"activation":"relu","width":64}'
    assert signature({}, dynamic) == "{}"


def test_signature_tells_every_static_value_apart() -> None:
    values: list[Any] = [1, 1.0, True, "1", (1,), ((1,),), (1, 1), "", (), "true", 1.5]
    assert len({signature({"x": value}, ()) for value in values}) == len(values)
    assert signature({"unknown": 1}, {"lr"}) != signature({"unknown": 2}, {"lr"})  # unknown: static


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.integers()
        | st.floats(allow_nan=False)
        | st.booleans()
        | st.text(max_size=5)
        | st.tuples(st.integers()),
    ),
    st.sets(st.text(max_size=5)),
)
@settings(deadline=None, derandomize=True)
def test_signature_is_the_static_items(hparams: dict[str, Any], dynamic: set[str]) -> None:
    numbers = {name for name, value in hparams.items() if isinstance(value, (int, float))}
    static = {name: value for name, value in hparams.items() if name not in dynamic & numbers}
    text = signature(hparams, dynamic)
    assert text == signature(dict(reversed(hparams.items())), dynamic)
    assert json.loads(text) == json.loads(json.dumps(static))


def test_the_readme_names_every_hyperparameter_and_data_set() -> None:
    from conftest import ROOT

    from hpt_torch import hparams
    from hpt_torch.data import DATASETS

    text = (ROOT / "README.md").read_text()
    groups = ("TRAINING", "CLASSIFICATION", "REGRESSION", "RECONSTRUCTION", "AUGMENTATION", "MODEL")
    names = {spec.name for group in groups for spec in getattr(hparams, group)} | set(DATASETS)
    assert sorted(name for name in names if f"`{name}`" not in text) == []
