"""Who may import what, who may draw random numbers, who may write files: read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hpt_torch

PACKAGE = Path(hpt_torch.__file__).parent
MAX_LINES = 400


@dataclass(frozen=True)
class Rule:
    """In modules `where`, none of `forbidden` is imported, on any level; `allowed` are the exceptions."""

    name: str
    where: tuple[str, ...]
    forbidden: tuple[str, ...]
    allowed: tuple[tuple[str, str], ...] = ()  # (module, import)
    but: tuple[str, ...] = ()  # imports below a forbidden one that are allowed everywhere in `where`


DECISIONS = (
    "types", "seeding", "hparams", "space", "grids", "recipe", "recipe_sections", "recipe_checks",
    "overrides", "samplers", "schedulers", "record", "bodies", "head", "steered", "report", "points",
    "evidence", "refine", "needs",
)  # fmt: skip
TENSORS = (
    "task", "tasks", "models", "data", "optim", "lr_schedules", "metrics", "population", "trainers",
    "checkpoint",
)  # fmt: skip
# What brings torch with it when it is imported
HEAVY = ("torch", "torchvision", "safetensors.torch", "tensorboard.compat.tensorflow_stub")

RULES = (
    # seeding swaps torch's own generator for one block; the import waits until that is asked for
    Rule("decisions: no torch", DECISIONS, HEAVY, allowed=(("seeding", "torch"),)),
    Rule(
        "tensors: no search and no run files",
        TENSORS,
        (
            "optuna",
            "sqlite3",
            *(f"hpt_torch.{name}" for name in ("recipe", "recipe_checks", "record", "samplers", "tuner")),
        ),
    ),
    Rule("models: nothing of hpt_torch", ("models",), ("hpt_torch",), but=("hpt_torch.models",)),
    Rule("trainers: told until when, never why", ("trainers",), ("hpt_torch.schedulers",)),
    Rule("only the record speaks SQL", ("",), ("sqlite3",), allowed=(("record", "sqlite3"),)),
)

# Calls that make a generator of their own instead of deriving it
GENERATORS = (
    "numpy.random.default_rng", "numpy.random.Generator", "numpy.random.RandomState", "numpy.random.seed",
    "numpy.random.PCG64", "random.Random", "random.SystemRandom", "random.seed", "torch.Generator",
    "torch.manual_seed", "torch.random.fork_rng", "torch.seed", "torch.default_generator.manual_seed",
)  # fmt: skip
MAKES_GENERATORS = ("seeding",)
# a member's own torch draws (a user's module) repeat, because its key seeds them before each step; those that
# are replaced are counted in torch's generator
SEEDS = (("trainers.drawn", "torch.default_generator.manual_seed"),)

# Methods and functions that change files. `open` counts where its mode does
WRITES = (
    "os.replace", "os.rename", "os.remove", "os.unlink", "os.mkdir", "os.makedirs", "os.truncate",
    "shutil.rmtree", "shutil.move", "shutil.copy", "shutil.copyfile", "shutil.copytree",
    "numpy.save", "numpy.savez", "torch.save", "safetensors.torch.save_file", "json.dump", "pickle.dump",
    "tomli_w.dump",
)  # fmt: skip
WRITE_METHODS = ("write_text", "write_bytes", "mkdir", "unlink", "touch", "rmdir", "savefig", "save_file")
WRITERS = (
    "record", "head", "checkpoint",  # the truth of a run
    "crash",
    "report.export", "rundir", "room", "session", "observers",  # what is derived from it, and where it lies
    "result", "commands",  # where the user says: Result.to_csv(path), hpt compare --html, hpt refine --out
    "steering",  # what people ask of it
    "data.cache", "data.image_sources",  # downloaded data sets: no part of a run
)  # fmt: skip


# -- reading the source --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    name: str  # without "hpt_torch.": "", "space", "models.mlp"
    tree: ast.Module
    lines: int

    @classmethod
    def parse(cls, name: str, source: str) -> Module:
        return cls(name, ast.parse(source), len(source.splitlines()))

    def within(self, names: tuple[str, ...]) -> bool:
        return any(name == "" or self.name == name or self.name.startswith(f"{name}.") for name in names)

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, full name) of everything imported anywhere in the file, also for type checkers only."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = ["hpt_torch", *self.name.split(".")][: -node.level] if self.name else ["hpt_torch"]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def aliases(self) -> dict[str, str]:
        """What a name in this file stands for: np -> numpy, replace -> os.replace."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found[alias.asname or alias.name] = f"{self._base(node)}.{alias.name}"
        return found

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        """(call, full dotted name): np.random.default_rng() is numpy.random.default_rng."""
        aliases = self.aliases()
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Call):
                continue
            dotted = _dotted(node.func)
            head, _, rest = dotted.partition(".")
            head = aliases.get(head, head)
            yield node, f"{head}.{rest}" if rest else head


def _dotted(node: ast.expr) -> str:
    """`a.b.c` as text; anything before that is not a name becomes "?": path().write_text is ?.write_text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def package() -> list[Module]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module.parse(name, path.read_text()))
    return modules


# -- the rules -----------------------------------------------------------------------------------------


def _is_or_below(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def import_breaches(module: Module, rule: Rule) -> list[str]:
    if not module.within(rule.where):
        return []
    return [
        f"{module.name or 'hpt_torch'}:{line} imports {name} ({rule.name})"
        for line, name in module.imports()
        if _is_or_below(name, rule.forbidden)
        and not _is_or_below(name, rule.but)
        and not any(module.name == m and _is_or_below(name, (i,)) for m, i in rule.allowed)
    ]


def generator_breaches(module: Module) -> list[str]:
    if module.within(MAKES_GENERATORS):
        return []
    return [
        f"{module.name}:{call.lineno} calls {name}; only seeding makes generators"
        for call, name in module.calls()
        if name in GENERATORS and (module.name, name) not in SEEDS
    ]


def write_breaches(module: Module) -> list[str]:
    if module.within(WRITERS):
        return []
    return [
        f"{module.name}:{call.lineno} writes files with {name}"
        for call, name in module.calls()
        if name in WRITES
        or ("." in name and name.rpartition(".")[2] in WRITE_METHODS)
        or (name in ("open", "io.open", "os.fdopen") and _opens_for_writing(call, 1))
        or (name.endswith(".open") and name != "io.open" and _opens_for_writing(call, 0))
    ]


def _opens_for_writing(call: ast.Call, position: int) -> bool:
    mode: ast.expr | None = call.args[position] if len(call.args) > position else None
    mode = next((keyword.value for keyword in call.keywords if keyword.arg == "mode"), mode)
    if mode is None:
        return False
    return not (isinstance(mode, ast.Constant) and isinstance(mode.value, str)) or bool(
        set("wax+") & set(mode.value)
    )


def long_files(modules: list[Module]) -> list[str]:
    return [f"{m.name} has {m.lines} lines" for m in modules if m.lines > MAX_LINES]


MODULES = package()
each_module = pytest.mark.parametrize("module", MODULES, ids=[m.name or "hpt_torch" for m in MODULES])


@each_module
def test_imports(module: Module) -> None:
    assert [breach for rule in RULES for breach in import_breaches(module, rule)] == []


@each_module
def test_only_seeding_makes_generators(module: Module) -> None:
    assert generator_breaches(module) == []


@each_module
def test_only_some_write_files(module: Module) -> None:
    assert write_breaches(module) == []


def test_no_file_is_longer_than_400_lines() -> None:
    assert long_files(MODULES) == []


def test_decisions_bring_no_torch_with_them() -> None:
    """Not by a detour either: what they import of hpt_torch when they are imported is of their own layer."""
    by_name = {module.name: module for module in MODULES}
    for module in MODULES:
        if not module.within(DECISIONS):
            continue
        for node in module.tree.body:
            at_top = Module(module.name, ast.Module([node], []), 0).imports()
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for line, name in at_top:
                    target = name.removeprefix("hpt_torch.")
                    while target and target not in by_name:
                        target = target.rpartition(".")[0]
                    if name.startswith("hpt_torch.") and target:
                        assert by_name[target].within(DECISIONS), f"{module.name}:{line} imports {name}"


def test_the_rules_name_modules_that_exist() -> None:
    """A renamed module must not slip out of its rule."""
    for names in (DECISIONS, TENSORS, WRITERS, MAKES_GENERATORS):
        for name in set(names):
            assert any(module.within((name,)) for module in MODULES), name


# -- the rules can fail --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "breaches"),
    [
        ("space", "import torch", 1),
        ("space", "import torch.nn as nn", 1),
        ("space", "from torch import Tensor", 1),
        ("space", "def f():\n    import torch", 1),
        ("space", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor", 1),
        ("report.html", "import torch", 1),
        ("schedulers.pbt", "import torch", 1),
        ("record", "from safetensors.torch import load", 1),
        ("seeding", "def f():\n    import torch", 0),
        ("space", "import torchmetrics", 0),  # another package, whose name begins alike
        ("space", "import optuna", 0),
        ("models.cnn", "import optuna", 1),
        ("trainers.fused", "from hpt_torch import recipe", 1),
        ("trainers.fused", "from hpt_torch.recipe import Recipe", 1),
        ("trainers.fused", "from ..recipe import Recipe", 1),
        ("trainers.fused", "from .. import tuner", 1),
        ("trainers.fused", "from hpt_torch.schedulers import pbt", 1),
        ("trainers.fused", "from hpt_torch.population import stack", 0),
        ("models.cnn", "from hpt_torch.types import HParams", 1),
        ("models.cnn", "from hpt_torch.models.layers import Dropout", 0),
        ("models.cnn", "from .layers import Dropout", 0),
        ("models.cnn", "import torch", 0),
        ("data", "import sqlite3", 2),
        ("catalog", "import sqlite3", 1),
        ("record", "import sqlite3", 0),
    ],
)
def test_a_wrong_import_is_seen(name: str, source: str, breaches: int) -> None:
    module = Module.parse(name, source)
    assert len([breach for rule in RULES for breach in import_breaches(module, rule)]) == breaches


@pytest.mark.parametrize(
    ("source", "breaches"),
    [
        ("import numpy as np\nrng = np.random.default_rng(0)", 1),
        ("import numpy\nrng = numpy.random.RandomState(0)", 1),
        ("from numpy.random import default_rng as make\nrng = make()", 1),
        ("from numpy import random\nrng = random.Generator(None)", 1),
        ("import random\nrng = random.Random(0)", 1),
        ("from random import Random\nrng = Random(0)", 1),
        ("import torch\ng = torch.Generator()", 1),
        ("def f():\n    import torch\n    return torch.manual_seed(0)", 1),
        ("import torch\ntorch.default_generator.manual_seed(0)", 1),
        ("from hpt_torch.seeding import generator\nrng = generator(0, 'x')", 0),
        ("import numpy as np\ndef f(rng: np.random.Generator): return rng.random()", 0),
    ],
)
def test_a_generator_is_seen(source: str, breaches: int) -> None:
    assert len(generator_breaches(Module.parse("trainers.loop", source))) == breaches
    assert generator_breaches(Module.parse("seeding", source)) == []


@pytest.mark.parametrize(
    ("source", "breaches"),
    [
        ("open('x', 'w')", 1),
        ("open('x', mode='ab')", 1),
        ("open('x', mode)", 1),  # unknown is taken for the worst
        ("open('x')\nopen('x', 'rb')", 0),
        ("p.open('w')\np.open()", 1),
        ("Path('x').write_text('')", 1),
        ("(a / b).mkdir()", 1),
        ("import os\nos.replace('a', 'b')", 1),
        ("from os import replace as move\nmove('a', 'b')", 1),
        ("import torch\ntorch.save({}, 'x')", 1),
        ("p.read_text()\ntext.replace('a', 'b')", 0),
    ],
)
def test_a_write_is_seen(source: str, breaches: int) -> None:
    assert len(write_breaches(Module.parse("trainers.loop", source))) == breaches
    assert write_breaches(Module.parse("record", source)) == []


def test_a_long_file_is_seen() -> None:
    assert long_files([Module.parse("a", "\n" * 400), Module.parse("b", "\n" * 401)]) == ["b has 401 lines"]
