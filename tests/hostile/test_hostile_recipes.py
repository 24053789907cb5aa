"""Recipes that try to get something in: each is refused with one message, and nothing is written or run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import MARKER, Bomb, bomb, cases, hpt, tree

from hpt_torch import recipe as recipes
from hpt_torch.types import RecipeError

RECIPES = Path(__file__).parent / "recipes"


def _plant(folder: Path) -> None:
    """What a hostile recipe may find beside it."""
    (folder / "planted.py").write_text(f"open({MARKER!r}, 'w')\ndef make(*a, **k): open({MARKER!r}, 'w')\n")
    (folder / "planted.pkl").write_bytes(bomb(folder))
    np.savez(folder / "planted.npz", inputs=np.array([Bomb(folder)], dtype=object), targets=np.zeros(1))


def test_what_is_planted_goes_off(tmp_path: Path) -> None:
    """Else the tests below would see nothing."""
    _plant(tmp_path)
    np.load(tmp_path / "planted.npz", allow_pickle=True)["inputs"]
    assert (tmp_path / MARKER).is_dir()


@pytest.mark.parametrize("name", cases(path.stem for path in RECIPES.glob("*.toml")))
def test_a_hostile_recipe_is_refused(name: str, tmp_path: Path) -> None:
    recipe = RECIPES / f"{name}.toml"
    tries, told, *_ = recipe.read_text().splitlines()
    assert tries.startswith("# Tries: ")
    shutil.copy(recipe, tmp_path / "recipe.toml")
    _plant(tmp_path)
    before = tree(tmp_path)
    for command in ("validate", "run"):
        done = hpt(command, "recipe.toml", cwd=tmp_path)
        done.refused("hpt: recipe.toml: ", told.removeprefix("# Told: "))
        forged = [line for line in done.stderr.splitlines()[1:] if not line.startswith("  ")]
        assert not forged
    assert tree(tmp_path) == before
    assert "planted" not in sys.modules


# What cannot be committed well: (content, what is told)
FILES = {
    "nul": (b"seed = 1\0", "is not valid TOML"),
    "nul in a comment": (b"# \0\nseed = 1", "is not valid TOML"),
    "escape in a comment": (b"# \x1b[2J\nseed = 1", "is not valid TOML"),
    "second byte order mark": (b"\xef\xbb\xbf\xef\xbb\xbfseed = 1", "is not valid TOML"),
    "utf-16": ("seed = 1".encode("utf-16"), "must be UTF-8 text"),
    "latin-1": ('name = "Größe"'.encode("latin-1"), "must be UTF-8 text"),
    "lone surrogate": (b'name = "\xed\xa0\x80"', "must be UTF-8 text"),
    "overlong slash": (b'name = "..\xc0\xaf"', "must be UTF-8 text"),
    "10 MB": (b"# tries to be read whole\n" * 400_000, "must be at most 1,000,000 bytes"),
    "a line of a megabyte": (b'name = "' + b"a" * 900_000 + b'"', "name: must be a letter or digit"),
    "a key of a megabyte": (b"a" * 900_000 + b" = 1", "unknown field"),
    "deep array": (b"[hparams]\nlr = " + b"[" * 450 + b"]" * 450, "hparams.lr: must be a number"),
    "deeper array": (b"seed = " + b"[" * 400_000, "nested too deeply"),
    "deep inline tables": (b"seed = " + b"{a=" * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "deep dotted key": (b"[hparams]\n" + b"a." * 2_000 + b"a = 1", "hparams.a"),
    "a pickle": (b"\x80\x04cos\nsystem\n.", "must be UTF-8 text"),
    "a database": (b"SQLite format 3\0" + bytes(4096), "is not valid TOML"),
    "a zip": (b"PK\x03\x04" + b"\xff" * 30, "must be UTF-8 text"),
    "line ends of a Mac": (b"seed = 1\rname = 'x'", "is not valid TOML"),
}


@pytest.mark.parametrize("case", cases(FILES))
def test_a_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    content, told = FILES[case]
    (tmp_path / "recipe.toml").write_bytes(content)
    for command in ("validate", "run"):
        hpt(command, "recipe.toml", cwd=tmp_path).refused("hpt: recipe.toml: ", told)
    assert tree(tmp_path) == {"recipe.toml": content}


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("recipe.toml", "cannot be read: Too many levels of symbolic links"),
        ("nowhere", "cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("secret", "is not valid TOML"),
        pytest.param(os.devnull.replace("null", "zero"), "must be at most 1,000,000 bytes",
                     marks=pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no /dev/zero")),
    ],
    ids=["itself", "nothing", "folder", "secret", "endless"],
)  # fmt: skip
def test_a_link_as_a_recipe(target: str, told: str, tmp_path: Path) -> None:
    """It is read where it leads, as any program does; what it holds is not shown."""
    (tmp_path / "secret").write_text("password is hunter2")
    (tmp_path / "recipe.toml").symlink_to(target)
    before = tree(tmp_path)
    done = hpt("validate", "recipe.toml", cwd=tmp_path)
    done.refused("recipe.toml: ", told)
    assert "hunter2" not in done.stderr
    assert tree(tmp_path) == before


NAMES = {
    "../" * 40 + "etc/hostname.toml": "cannot be read",
    "../x": "cannot be read: No such file",
    "x" * 600: "neither a file nor a known recipe",
    "x" * 600 + ".toml": "cannot be read: File name too long",
    "x" * 5000: "is too long or has a NUL",
    "a\0b": "is too long or has a NUL",
    "a\0b.toml": "is too long or has a NUL",
    "$(touch pwned)": "neither a file nor a known recipe",
    "*": "neither a file nor a known recipe",
    "": "neither a file nor a known recipe",
    "os:system": "neither a file nor a known recipe",
    "digits_mlp_tpe/../../x": "cannot be read",
}


@pytest.mark.parametrize("name", cases(NAMES))
def test_a_hostile_name_of_a_recipe(name: str, tmp_path: Path) -> None:
    for command in ("validate", "run"):
        hpt(command, name, cwd=tmp_path).refused(NAMES[name])
    assert not any(tmp_path.iterdir())


OVERRIDES = {
    "__class__=1": "hparams.__class__: is not a hyperparameter",
    "search.__class__=1": "search.__class__: unknown field",
    "run.__dict__.x=1": "names a field or section.field",
    "task.kind=os:system": "task.kind: would import 'os'",
    "task.allow_import=['os']": "task.allow_import: unknown field",
    "name=../../outside": "name: must be a letter or digit",
    "name='a'\nseed=3": "name: must be a letter or digit",
    "seed=1\n[task]\nkind='os:system'": "seed: ",
    "seed=1 # ]\n": None,  # a comment: as in a recipe
    "\x1b[2Jlr=1": "an override must look like",
    "lr=\x1b[2J": "hparams.lr: must be a number",
    "lr=1e400": "hparams.lr: must be",
    f"lr={'[' * 5000}": "hparams.lr: must be a number",
    f"{'a.' * 5000}a=1": "names a field or section.field",
    f"{'a' * 5000}=1": "an override must look like",
    "lr=" + "1" * 5000: "hparams.lr: must be a number",
    "ｌｒ=1": "an override must look like",
    "=": "an override must look like",
    ".=1": "an override must look like",
    "lr.=1": "an override must look like",
    "lr\n=1": None,
    "seed.seed=1": "seed is not a table",
    "lr={float=[0.1,0.2]}": "hparams.lr: must be a number",
}


@pytest.mark.parametrize("override", cases(OVERRIDES))
def test_a_hostile_override(override: str, tmp_path: Path) -> None:
    told = OVERRIDES[override]
    (tmp_path / "recipe.toml").write_text("")
    done = hpt("validate", "recipe.toml", override, cwd=tmp_path)
    if told is None:
        assert (done.status, done.stderr) == (0, "")
    else:
        done.refused("recipe.toml: ", told)
    assert tree(tmp_path) == {"recipe.toml": b""}


def test_from_python_too(tmp_path: Path) -> None:
    """Plain data need not come from TOML: circles and types that TOML does not have."""
    circle: list[object] = []
    circle.append(circle)
    for value in (circle, {1: 2}, object(), b"x", float("nan"), {"float": circle}, {"choice": [circle]}):
        for section in ("space", "task", "scheduler"):
            with pytest.raises(RecipeError):
                recipes.build({section: value}, source="test")
        with pytest.raises(RecipeError):
            recipes.build({"space": {"lr": value}, "search": {"trials": 1}}, source="test")
