"""Right recipes: what is written is read back, overrides, differences, the schema; and no input crashes."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpt_torch import session
from hpt_torch.recipe import Recipe, build, differences, load, schema
from hpt_torch.recipe_sections import parse_duration
from hpt_torch.space import Choice, Float, Int
from hpt_torch.tasks import from_names
from hpt_torch.types import RecipeError

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.toml"))

FULL = """
name = "full-1.0"
seed = 7
executor = "inline"

[task]
kind = "classification"
model = "mlp"
data = "digits"
valid_fraction = 0.25
holdout_fraction = 0.1
data_options = {path = "x.csv", rows = 100}
metrics = ["valid/accuracy", "valid/loss"]

[hparams]
batch_norm = true
grad_clip_norm = inf
hidden_sizes = [64, 32]

[space]
lr = {float = [1e-4, 1e-1], default = 1e-3}
dropout = {float = [0, 1], step = 0.25}
batch_size = {int = [16, 64], step = 16, default = 32}
width = {int = [8, 256], log = true}
optimizer = {choice = ["sgd", "adam"], default = "adam"}
momentum = {float = [0.0, 0.9], when = {optimizer = ["sgd"]}}
sizes = {choice = [[64], [64, 64], 1, 1.5, true, "é"], default = [64, 64]}

[objective]
metric = "valid/loss"
direction = "minimize"
second = {metric = "parameters", direction = "minimize"}

[search]
sampler = "random"
trials = 20
timeout = "1.5h"
round_size = 4
points = [{dropout = 0.25, sizes = [64]}]
warm_start = "runs/other"
warm_start_trials = 3
max_parameters = 100_000
start_with_defaults = false

[trainer]
seed = 7
epochs = 3
device = "cuda:1"
engine = "loop"
threads = 2
memory = "4GB"
devices = [0, 2]
dtype = "float64"
deterministic = false
keep = "best"
patience = 2
autocast = "bfloat16"
tf32 = true

[scheduler]
kind = "fifo"
interval_epochs = 3
burn_in_epochs = 1
exploit = "t_test"
quantile = 0.25
explore = false
resample_probability = 0.5
perturbation_factors = [0.5, 2.0]
crossover_probability = 0.1
window = 5
significance = 0.1
baseline = false
reduction_factor = 4
min_epochs = 2
startup_trials = 3
percentile = 30.0
lower = 0.1
upper = 0.9
patience_epochs = 2

[evaluation]
folds = 4
splitter = "kfold"
repeats = 2

[final]
refit = true
confirm = 3
seeds = 4

[run]
checkpoint_every_seconds = 1.5
max_failures = 9
max_disk = "2GB"
epoch_timeout = "2m"
workers = 3
tensorboard = false
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def again(recipe: Recipe) -> Recipe:
    return build(tomllib.loads(recipe.to_toml()), source="again")


# -- round trip ----------------------------------------------------------------------------------------


def test_every_field_survives_being_written_and_read(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, FULL))
    assert again(recipe) == recipe
    assert again(recipe).to_toml() == recipe.to_toml()
    assert recipe.search.timeout == 5400
    assert recipe.hparams["grad_clip_norm"] == math.inf
    assert recipe.space["sizes"] == Choice(((64,), (64, 64), 1, 1.5, True, "é"), default=(64, 64))
    assert recipe.space["momentum"] == Float(0.0, 0.9, when={"optimizer": ("sgd",)})
    assert recipe.space["width"] == Int(8, 256, log=True)
    # FULL names every field there is, so that a new one is not forgotten here
    given_fields = {name for name, value in tomllib.loads(FULL).items()}
    assert given_fields == set(Recipe.model_fields)
    for name in ("task", "objective", "search", "trainer", "scheduler", "run"):
        fields = set(type(getattr(recipe, name)).model_fields) - {"changes"}  # of another kind of scheduler
        assert set(tomllib.loads(FULL)[name]) == fields


def test_a_schedule_survives_being_written_and_read() -> None:
    changes = [{"after": 2, "lr": 0.1, "sizes": [1, 2]}, {"after": 4, "grad_clip_norm": math.inf}]
    recipe = build({"scheduler": {"kind": "schedule", "changes": changes}}, source="test")
    assert again(recipe) == recipe
    assert recipe.scheduler.changes == changes


def test_an_empty_recipe_has_only_defaults(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, ""))
    assert recipe == Recipe()
    assert again(recipe) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_survive_too(path: Path) -> None:
    recipe = load(path)
    assert again(recipe) == recipe


def test_there_are_shipped_recipes() -> None:
    assert RECIPES


names = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable()) | st.sampled_from(
    ["lr", "weight_decay", "dropout", "a.b", "", " ", '"', "\\"]
)
numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False)
scalars = numbers | st.booleans() | st.text(max_size=8)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
finite = st.floats(-1e6, 1e6)


@st.composite
def dimensions(draw: st.DrawFn) -> Float | Int | Choice:
    kind = draw(st.sampled_from(["float", "log", "step", "int", "choice"]))
    if kind == "choice":
        options = draw(
            st.lists(
                st.integers(-9, 9)
                | finite
                | st.text(max_size=3)
                | st.booleans()
                | st.lists(st.integers(1, 9)),
                min_size=1,
                max_size=4,
                unique_by=repr,
            )
        )
        return Choice(options, default=draw(st.none() | st.sampled_from(options)))
    if kind == "int":
        low, high = sorted([draw(st.integers(1, 999)), draw(st.integers(1, 999))])
        log = draw(st.booleans())
        step = 1 if log or low == high else draw(st.integers(1, high - low))
        return Int(low, high, log=log, step=step, default=draw(st.sampled_from([None, low])))
    low, high = sorted([draw(st.floats(1e-6, 1e6)), draw(st.floats(1e-6, 1e6))])
    log = kind == "log"
    step = (high - low) / 4 if kind == "step" and high - low > 1e-3 else None
    return Float(low, high, log=log, step=step, default=draw(st.sampled_from([None, low])))


@given(
    space=st.dictionaries(names, dimensions(), max_size=4), hparams=st.dictionaries(names, values, max_size=4)
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_any_space_and_hparams_survive(space: dict[str, Any], hparams: dict[str, Any]) -> None:
    hparams = {name: value for name, value in hparams.items() if name not in space}
    raw = {"space": space, "hparams": hparams, "search": {"trials": 3}}
    recipe = build(raw, source="test")
    read = again(recipe)
    assert read.space == recipe.space
    assert [type(d) for d in read.space.values()] == [type(d) for d in recipe.space.values()]
    assert repr(read.hparams) == repr(recipe.hparams)  # repr: True is not 1, 1.0 is not 1
    assert list(read.space) == list(recipe.space)


# -- overrides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "field", "expected"),
    [
        ("search.trials=20", "search", "trials", 20),
        (" search.trials = 20 ", "search", "trials", 20),
        ("search.timeout=30m", "search", "timeout", 1800.0),
        ('search.timeout="30m"', "search", "timeout", 1800.0),
        ("search.timeout=90", "search", "timeout", 90.0),
        ("search.sampler=random", "search", "sampler", "random"),
        ("search.start_with_defaults=false", "search", "start_with_defaults", False),
        ("trainer.device=cuda:1", "trainer", "device", "cuda:1"),
        ("task.model=my.module:Net", "task", "model", "my.module:Net"),
        ("objective.metric=valid/loss", "objective", "metric", "valid/loss"),
        ("run.checkpoint_every_seconds=1e3", "run", "checkpoint_every_seconds", 1000.0),
        ("hparams.lr=0.01", "hparams", "lr", 0.01),
        ("lr=0.01", "hparams", "lr", 0.01),
        ("lr=1e-3", "hparams", "lr", 0.001),
        ("lr=3", "hparams", "lr", 3),
        ("lr=1_000", "hparams", "lr", 1000),
        ("batch_norm=true", "hparams", "batch_norm", True),
        ("activation=tanh", "hparams", "activation", "tanh"),
        ('activation="tanh"', "hparams", "activation", "tanh"),
        ("activation='tanh'", "hparams", "activation", "tanh"),
        ("hidden_sizes=[64, 32]", "hparams", "hidden_sizes", [64, 32]),
        ("x={a = 1, b = [2]}", "hparams", "x", {"a": 1, "b": [2]}),
        ("x=a=b", "hparams", "x", "a=b"),
        ("x=two words", "hparams", "x", "two words"),
        ("x=", "hparams", "x", ""),
        ("x=True", "hparams", "x", "True"),
        ("x=1\ny=2", "hparams", "x", "1\ny=2"),  # never two keys
        ("x=1 # one", "hparams", "x", 1),
        ("grad_clip_norm=inf", "hparams", "grad_clip_norm", math.inf),
        ("space.lr={float=[0.1, 0.2]}", "space", "lr", Float(0.1, 0.2)),
        ("space.width={choice=[1, 2], default=2}", "space", "width", Choice((1, 2), default=2)),
    ],
)
def test_overrides(override: str, section: str, field: str, expected: Any) -> None:
    raw = {"search": {"trials": 3}, "objective": {"metric": "valid/accuracy", "direction": "maximize"}}
    recipe = build(raw, [override], source="test")
    held = getattr(recipe, section)
    value = held[field] if isinstance(held, dict) else getattr(held, field)
    assert value == expected
    assert type(value) is type(expected)


def test_fields_at_the_top_are_not_hyperparameters() -> None:
    recipe = build({}, ["seed=5", "name=other"], source="test")
    assert (recipe.seed, recipe.name, recipe.hparams) == (5, "other", {})


@pytest.mark.parametrize("key", ["lr", "hparams.lr"])
def test_fixing_a_hyperparameter_takes_it_out_of_the_space(key: str) -> None:
    raw = {
        "space": {"lr": {"float": [0.1, 0.2]}, "dropout": {"float": [0.0, 0.5]}},
        "search": {"trials": 3},
    }
    recipe = build(raw, [f"{key}=0.01"], source="test")
    assert recipe.hparams == {"lr": 0.01}
    assert list(recipe.space) == ["dropout"]
    assert list(raw["space"]) == ["lr", "dropout"]  # the caller's own is not touched


def test_searching_a_hyperparameter_takes_it_out_of_the_fixed_ones() -> None:
    raw = {"hparams": {"lr": 0.01}, "search": {"trials": 3}}
    recipe = build(raw, ["space.lr={float=[0.1, 0.2]}"], source="test")
    assert (recipe.hparams, list(recipe.space)) == ({}, ["lr"])
    assert raw["hparams"] == {"lr": 0.01}


def test_the_last_override_wins() -> None:
    assert build({"seed": 1}, ["seed=2", "seed=3"], source="test").seed == 3


# -- durations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("2h", 7200),
        ("1.5h", 5400),
        ("1d", 86400),
        ("2 h", 7200),
        (5, 5),
        (0.5, 0.5),
    ],
)
def test_durations(raw: Any, seconds: float) -> None:
    assert parse_duration(raw) == seconds


@pytest.mark.parametrize(
    "raw",
    ["", "s", "5", "5 weeks", "5S", "-5s", "+5s", "1e3s", "5s5s", " 5s", "5s\n", "٣s", None, True, [5],
     math.nan, math.inf, -1, 0, "0s", 1e9, 10**400],
)  # fmt: skip
def test_no_durations(raw: Any) -> None:
    with pytest.raises(ValueError, match="must be "):
        parse_duration(raw)


# -- differences ---------------------------------------------------------------------------------------


def plain(*overrides: str) -> dict[str, Any]:
    return tomllib.loads(build(tomllib.loads(FULL), overrides, source="test").to_toml())


@pytest.mark.parametrize(
    "override",
    [
        "search.trials=99",
        "search.timeout=9h",
        "run.tensorboard=true",
        "run.checkpoint_every_seconds=9",
        "name=other",
    ],
)
def test_budgets_and_logging_may_differ(override: str) -> None:
    assert plain() != plain(override)
    assert differences(plain(), plain(override)) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=8", "seed: 7 -> 8"),
        ("search.round_size=5", "search.round_size: 4 -> 5"),
        ("search.sampler=tpe", "search.sampler: random -> tpe"),
        ("trainer.epochs=4", "trainer.epochs: 3 -> 4"),
        ("trainer.dtype=float32", "trainer.dtype: float64 -> float32"),
        ("batch_norm=false", "hparams.batch_norm: True -> False"),
        ("weight_decay=0.1", "hparams.weight_decay: not given -> 0.1"),
        ("space.lr={float=[1e-4, 1.0]}", "space.lr: "),
        ("task.valid_fraction=0.3", "task.valid_fraction: 0.25 -> 0.3"),
    ],
)
def test_everything_else_is_a_difference(override: str, line: str) -> None:
    lines = differences(plain(), plain(override))
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_differences_of_equal_recipes_and_of_moved_names() -> None:
    assert differences(plain(), plain()) == []
    lines = differences(plain(), plain("lr=0.1"))
    assert [line.split(":")[0] for line in lines] == ["hparams.lr", "space.lr"]


# -- the schema ----------------------------------------------------------------------------------------

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "$ref", "$defs", "title", "description", "default", "type", "enum", "const", "pattern", "maxLength",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "items", "minItems", "maxItems",
    "properties", "additionalProperties", "required", "anyOf", "oneOf",
}  # fmt: skip


def valid(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON Schema that ours uses. An unknown keyword is an error, not a pass."""
    assert set(rule) <= _KNOWN, set(rule) - _KNOWN
    if "$ref" in rule:
        return valid(value, root["$defs"][rule["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in rule:
        return any(valid(value, option, root) for option in rule["anyOf"])
    if "oneOf" in rule:
        return sum(valid(value, option, root) for option in rule["oneOf"]) == 1
    types = rule.get("type", list(_TYPES))
    types = [types] if isinstance(types, str) else types
    allowed = tuple(python for name in types for python in _TYPES[name])
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        return False
    if value not in rule.get("enum", [value]) or value != rule.get("const", value):
        return False
    if isinstance(value, str):
        matches = re.search(rule.get("pattern", ""), value) is not None
        return matches and len(value) <= rule.get("maxLength", len(value))
    if isinstance(value, (int, float)):
        return (
            rule.get("minimum", value) <= value <= rule.get("maximum", value)
            and rule.get("exclusiveMinimum", -math.inf) < value
            and ("exclusiveMaximum" not in rule or value < rule["exclusiveMaximum"])
        )
    if isinstance(value, list):
        long_enough = rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value))
        return long_enough and all(valid(item, rule.get("items", {}), root) for item in value)
    if isinstance(value, dict):
        properties, rest = rule.get("properties", {}), rule.get("additionalProperties", True)
        for key, item in value.items():
            inner = properties.get(key, rest)
            if inner is False or (isinstance(inner, dict) and not valid(item, inner, root)):
                return False
        return all(key in value for key in rule.get("required", ()))
    return True


@pytest.mark.parametrize(
    "text", [*(path.read_text() for path in RECIPES), FULL, ""], ids=lambda text: text[:30]
)
def test_the_schema_accepts_right_recipes(text: str) -> None:
    assert valid(tomllib.loads(text), schema(), schema())
    resolved = build(tomllib.loads(text), source="test").to_toml()
    assert valid(tomllib.loads(resolved), schema(), schema())


@pytest.mark.parametrize(
    "text",
    [
        'seed = "0"',
        "seed = -1",
        "seed = true",
        "sede = 1",
        'name = "a/b"',
        "[search]\ntrials = 0",
        '[search]\nsampler = "bayes"',
        '[search]\ntimeout = "soon"',
        "[search]\nstart_with_defaults = 1",
        '[run]\ntensorboard = "yes"',
        "[run]\ncheckpoint_every_seconds = true",
        '[task]\nvalid_fraction = "0.2"',
        "[task]\nvalid_fraction = 1.0",
        '[trainer]\ndevice = "gpu"',
        "[search]\ntrials = 3\n[space]\nlr = {float = [0.1]}",
        "[search]\ntrials = 3\n[space]\nlr = {float = [0.1, 0.2], int = [1, 2]}",
        "[search]\ntrials = 3\n[space]\nlr = {choice = []}",
        "[search]\ntrials = 3\n[space]\nlr = {choice = [1], log = true}",
        "[search]\ntrials = 3\n[space]\nlr = 0.1",
    ],
)
def test_what_the_schema_refuses_is_refused(text: str, tmp_path: Path) -> None:
    assert not valid(tomllib.loads(text), schema(), schema())
    with pytest.raises(RecipeError):
        load(write(tmp_path, text))


def test_the_schema_explains_every_section() -> None:
    whole = schema()
    assert set(whole["properties"]) == set(Recipe.model_fields)
    assert whole["additionalProperties"] is False
    assert all(section["description"] for section in whole["$defs"].values())


# -- nothing but RecipeError ---------------------------------------------------------------------------

# What breaks careless code: values that no float holds, that JSON cannot write, or that would fill the memory
nasty = st.sampled_from(
    [10**400, -(10**400), 10**15, 2**63, math.inf, -math.inf, math.nan, -0.0, 1e-320, 5e-324, 1e308, "", "\0",
     "\ud800", "a" * 300, [], {}, [[]], [{}], datetime.date(1979, 5, 27), datetime.time(7, 32),
     datetime.datetime(1979, 5, 27, 7, 32)]
)  # fmt: skip
# Small: a grid over wide integer ranges is allowed, and slow
small = st.integers(-5, 20) | st.floats(-2, 2) | st.booleans() | st.text(max_size=4)
anything = st.recursive(
    small | nasty,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
likely_names = st.sampled_from(
    ["lr", "weight_decay", "dropout", "batch_size", "optimizer", "momentum", "xyz"]
)
pairs = st.lists(small | nasty, min_size=2, max_size=2)
ranges = st.lists(st.floats(1, 9) | st.integers(1, 9), min_size=2, max_size=2).map(sorted)
conditions = st.dictionaries(likely_names, st.lists(small | nasty, max_size=3), max_size=2)
options = {
    "log": st.booleans(),
    "step": small | nasty,
    "default": small | nasty,
    "when": conditions | anything,
}
likely_dimension = st.one_of(
    st.fixed_dictionaries({"float": ranges | pairs}, optional=options),
    st.fixed_dictionaries({"int": ranges | pairs}, optional=options),
    st.fixed_dictionaries(
        {"choice": st.lists(anything, max_size=3)}, optional={k: options[k] for k in ("default", "when")}
    ),
    st.dictionaries(st.sampled_from(["float", "int", "choice", "log", "low"]), anything, max_size=3),
)
_SECTIONS = {
    name: sorted(info.annotation.model_fields) if hasattr(info.annotation, "model_fields") else []
    for name, info in Recipe.model_fields.items()
}
likely_recipe = st.fixed_dictionaries(
    {},
    optional={
        "seed": anything,
        "name": anything,
        "hparams": st.dictionaries(likely_names, anything, max_size=3),
        "space": st.dictionaries(likely_names, likely_dimension | anything, max_size=3),
        **{
            name: st.dictionaries(st.sampled_from(fields), anything, max_size=3)
            for name, fields in _SECTIONS.items()
            if fields
        },
    },
)
keys = st.sampled_from(
    [*_SECTIONS, *(f"{section}.{field}" for section, fields in _SECTIONS.items() for field in fields), "lr",
     "space.lr", "hparams.lr", "a.b.c", "", ".", "lr ", "é"]
)  # fmt: skip
texts = st.text(max_size=30) | st.sampled_from(
    ["1" * 5000, "[" * 5000, "{a=" * 2000, "nan", "1979-05-27", "\0"]
)
fuzz = settings(
    deadline=None, max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.slow
@given(raw=likely_recipe | st.dictionaries(st.text(max_size=4), anything, max_size=3))
@fuzz
def test_no_data_crashes(raw: dict[str, Any]) -> None:
    with contextlib.suppress(RecipeError):
        recipe = build(raw, source="test")
        if not {"nan", "\\ud800"} & set(re.findall(r"nan|\\ud800", repr(raw))):  # equal to nothing; no TOML
            assert again(recipe).to_toml() == recipe.to_toml()


@pytest.mark.slow
@given(
    space=st.dictionaries(likely_names, likely_dimension, min_size=1, max_size=2),
    sampler=st.sampled_from(["grid", "tpe"]),
)
@fuzz
def test_no_space_crashes(space: dict[str, Any], sampler: str) -> None:
    with contextlib.suppress(RecipeError):
        build({"space": space, "search": {"sampler": sampler, "timeout": 1}}, source="test")


@given(overrides=st.lists(st.text(max_size=30) | st.builds("{}={}".format, keys, texts), max_size=3))
@fuzz
def test_no_override_crashes(overrides: list[str]) -> None:
    with contextlib.suppress(RecipeError):
        build(tomllib.loads(FULL), overrides, source="test")


@pytest.mark.slow
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass"))
    | likely_recipe.map(lambda raw: _toml_or_nothing(raw))
)
@fuzz
def test_no_file_crashes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    with contextlib.suppress(RecipeError):
        load(path)


def _toml_or_nothing(raw: dict[str, Any]) -> bytes:
    try:
        return tomli_w.dumps(raw).encode()
    except (TypeError, ValueError):  # lone surrogates
        return b""


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + b'name = "marked"\r\n[search]\r\ntrials = 1\r\n')
    assert load(path).name == "marked"


def test_the_recipe_of_the_readme_is_one() -> None:
    (whole,) = [
        text
        for text in re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        if text.startswith("name")
    ]
    recipe = build(tomllib.loads(whole), source="README.md")
    task = from_names(**recipe.task.model_dump())
    assert set(session.check(recipe, task, source="README.md").recipe.space) == set(recipe.space)
