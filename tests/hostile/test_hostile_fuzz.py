"""Any text as a recipe, any text as an override: a recipe, or a RecipeError; nothing else, ever."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpt_torch import recipe as recipes
from hpt_torch import session
from hpt_torch.hparams import CLASSIFICATION
from hpt_torch.task import Task
from hpt_torch.types import RecipeError

fuzz = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SECTIONS = sorted(recipes.Recipe.model_fields)
FIELDS = sorted(
    {
        name
        for section in recipes.Recipe.model_fields.values()
        for name in getattr(section.annotation, "model_fields", {})
    }
)
HPARAMS = [
    "lr",
    "dropout",
    "batch_size",
    "optimizer",
    "momentum",
    "hidden_sizes",
    *(spec.name for spec in CLASSIFICATION),
]
WORDS = st.sampled_from(
    [*SECTIONS, *FIELDS, *HPARAMS, "float", "int", "choice", "when", "log", "step", "default", "after", "x"]
)
KEYS = WORDS | st.text(max_size=6).map(lambda text: repr(text).replace("'", '"'))
VALUES = st.recursive(
    st.one_of(
        st.integers().map(str),
        st.floats().map(repr),
        st.sampled_from(
            ["true", "1e400", "-0.0", "1e-400", str(2**63), str(2**53 + 1), "inf", "nan", "0x7f"]
        ),
        st.sampled_from(["tpe", "grid", "pbt", "sgd", "adam", "relu", "asha", "mlp", "os:x"])
        .map(repr),
        st.text(max_size=8).map(repr),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(KEYS, inner), max_size=3).map(
            lambda items: "{" + ", ".join(f"{key} = {value}" for key, value in items) + "}"
        ),
    ),
    max_leaves=8,
)  # fmt: skip
NUMBERS = st.one_of(
    st.just(1), st.integers(-5, 5), st.integers(), st.floats(), st.sampled_from([2**53, 10**400])
)
DIMENSIONS = st.builds(
    lambda kind, low, high, rest: f"{{ {kind} = [{low!r}, {high!r}]{rest} }}",
    st.sampled_from(["float", "int", "choice"]),
    NUMBERS,
    NUMBERS,
    st.sampled_from(["", ", log = true", ", log = false", ", default = 1", ", step = 1", ", step = 1e-300"]),
)
LINES = st.one_of(
    st.builds("{} = {}".format, KEYS, VALUES),
    st.builds("{} = {}".format, st.sampled_from(HPARAMS), DIMENSIONS),
    st.sampled_from(SECTIONS).map("[{}]".format),
    st.just("[space]"),
)
OVERRIDES = st.one_of(
    st.text(max_size=30),
    st.builds("{}={}".format, WORDS, VALUES),
    st.builds("{}.{}={}".format, st.sampled_from(SECTIONS), WORDS, VALUES | st.text(max_size=10)),
    st.builds("space.{}={}".format, st.sampled_from(HPARAMS), DIMENSIONS),
)


def check(data: bytes, overrides: list[str], task: Task) -> str:
    """How far it came."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_bytes(data)
        try:
            recipe = recipes.load(path, overrides)
        except RecipeError as error:
            assert str(error).startswith(f"{path}: ")
            assert error.problems
            return "refused"
        written = recipe.to_toml()  # what a run writes is what it read; as text, for nan is unlike itself
        assert recipes.load(_write(path, recipe)).to_toml() == written
        # A model may be as large as its recipe says; to build it is another test's matter.
        if not {"width", "depth", "hidden_sizes"} & {*recipe.hparams, *recipe.space}:
            with contextlib.suppress(RecipeError):
                session.check(recipe, task, source=str(path))
                return "valid"
        assert [entry.name for entry in Path(folder).iterdir()] == ["recipe.toml"]
        return "read"


def _write(path: Path, recipe: recipes.Recipe) -> Path:
    path.write_text(recipe.to_toml())
    return path


@fuzz
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_as_a_recipe(data: bytes, digits_task: Task) -> None:
    check(data, [], digits_task)


@pytest.mark.slow
def test_almost_recipes(digits_task: Task) -> None:
    seen: set[str] = set()

    @settings(fuzz, max_examples=800)
    @given(lines=st.lists(LINES, max_size=8))
    def run(lines: list[str]) -> None:
        seen.add(check("\n".join(lines).encode("utf-8", "replace"), [], digits_task))

    run()
    assert seen >= {"refused", "valid"}  # the texts come as far as they should; which ones, chance says


@pytest.mark.slow
def test_any_overrides(digits_task: Task) -> None:
    seen: set[str] = set()

    @settings(fuzz, max_examples=800)
    @given(overrides=st.lists(OVERRIDES, min_size=1, max_size=4))
    def run(overrides: list[str]) -> None:
        seen.add(check(b"[search]\ntrials = 3\n", overrides, digits_task))

    run()
    assert seen >= {"refused", "valid"}
