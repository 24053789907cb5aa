"""What the hostile tests share: the command line in this process, and a run directory to damage."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tomli_w
from conftest import QUICK

from hpt_torch.cli import main
from hpt_torch.report import summary as _imported_before_the_folder_changes

assert _imported_before_the_folder_changes
MARKER = "code-was-run"


def cases(names: Iterable[str]) -> list[Any]:
    """Parameters, in order of their names, with ids that a terminal can show."""
    return [pytest.param(name, id=repr(name)[1:-1][:40]) for name in sorted(names)]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    def refused(self, *pieces: str) -> None:
        """Status 2 and one message on stderr: no traceback, nothing that steers a terminal, all pieces."""
        assert self.status == 2, (self.status, self.stdout, self.stderr)
        assert self.stderr.startswith("hpt: ")
        assert "Traceback" not in self.stderr
        assert len(self.stderr) < 4000
        strange = re.findall(r"[^\n\x20-\x7e\xa0-\u200a\u2010-\u2027\u2030-\u205f\u2070-\uffff]", self.stderr)
        assert not strange, strange
        for piece in pieces:
            assert piece in self.stderr, self.stderr


class _Terminal(io.StringIO):
    """A stream from which click does not strip what steers a terminal."""

    def isatty(self) -> bool:
        return True


def hpt(*arguments: str, cwd: Path) -> Ended:
    """`hpt` as its entry point runs it. Any exception that it does not turn into a message comes out."""
    stdout, stderr, status = io.StringIO(), _Terminal(), 0
    before = os.getcwd()
    path = list(sys.path)
    os.chdir(cwd)
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            mock.patch.object(sys, "argv", ["hpt", *arguments]),
        ):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os.chdir(before)
        sys.path[:] = path
    return Ended(status, stdout.getvalue(), stderr.getvalue())


def tree(folder: Path, *, without: Path | None = None) -> dict[str, object]:
    """Everything below a folder and what it holds, so that two looks can be compared."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if without is not None and path.is_relative_to(without):
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.mkdir, (self.folder / MARKER,)


def bomb(folder: Path) -> bytes:
    return pickle.dumps(Bomb(folder))


@functools.cache
def _template() -> Path:
    """A working directory with a recipe and a finished run of it."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    (folder / "recipe.toml").write_text(tomli_w.dumps({**QUICK, "name": "small"}))
    done = hpt("run", "recipe.toml", "--quiet", cwd=folder)
    assert done.status == 0, done.stderr
    return folder


def finished(folder: Path) -> Path:
    """Puts the recipe and its finished run into the folder; returns the run's directory."""
    shutil.copytree(_template(), folder, dirs_exist_ok=True)
    return folder / "runs" / "small"
