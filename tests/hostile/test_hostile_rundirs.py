"""Run directories that lead elsewhere or cannot be: nothing outside of them is read, written or removed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hostile import MARKER, Ended, bomb, cases, finished, hpt, tree

from hpt_torch import checkpoint
from hpt_torch.record import Record
from hpt_torch.rundir import RunDir
from hpt_torch.types import DamageError, RunError, RunLockedError

LONG = "x" * 600


def run(folder: Path, *arguments: str) -> Ended:
    return hpt("run", "recipe.toml", "--quiet", *arguments, cwd=folder)


# -- paths that cannot be a run directory --------------------------------------------------------------


def _file(folder: Path) -> str:
    (folder / "target").write_text("mine")
    return "target"


def _link_to_file(folder: Path) -> str:
    (folder / "link").symlink_to(_file(folder))
    return "link"


def _link_to(target: str, folder: Path) -> str:
    (folder / "link").symlink_to(target)
    return "link"


def _pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return "pipe"


def _foreign(folder: Path) -> str:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "run.lock.tex").write_text("important")
    return "thesis"


PLACES = {
    "a file": (_file, "is a file or a link to nothing; name a directory"),
    "below a file": (lambda folder: f"{_file(folder)}/run", "cannot be read: Not a directory; name another"),
    "a link to a file": (_link_to_file, "is a file or a link to nothing"),
    "a link to nothing": (lambda folder: _link_to("nowhere", folder), "is a file or a link to nothing"),
    "a link to itself": (lambda folder: _link_to("link", folder), "is a file or a link to nothing"),
    "a pipe": (_pipe, "is a file or a link to nothing"),
    "another's directory": (_foreign, "is not a run directory (it has no run.db but holds run.lock.tex)"),
    "600 characters": (lambda folder: LONG, "cannot be read: File name too long; name another"),
    "below 600 characters": (lambda folder: f"{LONG}/b", "File name too long; name another"),
}


@pytest.mark.parametrize("case", cases(PLACES))
def test_a_path_that_cannot_be_a_run_directory(case: str, tmp_path: Path) -> None:
    make, told = PLACES[case]
    (tmp_path / "recipe.toml").write_text("")
    name = make(tmp_path)
    before = tree(tmp_path)
    run(tmp_path, "--run-dir", name).refused(told)
    hpt("report", name, cwd=tmp_path).refused("is not a run directory: it has no run.db")
    assert tree(tmp_path) == before


def test_a_path_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read: .*null.*; name another"):
        RunDir(tmp_path / "a\0b").check_usable()
    with pytest.raises(RunError, match="is not a run directory"):
        Record(tmp_path / "a\0b" / "run.db", readonly=True)


def test_runs_that_leads_out_of_itself(tmp_path: Path) -> None:
    """runs/small is a link: the name in a recipe must not choose another directory."""
    finished(tmp_path)
    (tmp_path / "runs" / "small").rename(tmp_path / "moved")
    (tmp_path / "runs" / "small").symlink_to("../moved")
    before = tree(tmp_path)
    run(tmp_path).refused("the run name 'small' leads outside runs; use another name")
    assert tree(tmp_path) == before
    assert run(tmp_path, "--run-dir", "runs/small").status == 0  # named by hand, it is meant


@pytest.mark.parametrize("call", ["mkdir", "scandir", "open"])
def test_no_access(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As any user but root sees it, who may do everything."""

    def refuse(path: object, *arguments: object, **options: object) -> object:
        if str(tmp_path) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)  # type: ignore[no-any-return]

    original = getattr(os, call)
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(RunError, match=r"cannot be (read|created|locked): Permission denied; name another"):
        RunDir(tmp_path / "run").__enter__()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_not_writable(tmp_path: Path) -> None:
    place = finished(tmp_path)
    place.chmod(0o500)
    try:
        run(tmp_path, "search.trials=5", "--reopen-holdout").refused("Permission denied")
    finally:
        place.chmod(0o700)


# -- entries that lead out -----------------------------------------------------------------------------

FILES = ["run.lock", "owner.json", "recipe.toml", "environment.json", "trials.csv", "report.html"]
FOLDERS = ["checkpoints", "tensorboard", "best", "replays", "baselines"]


def _victims(folder: Path) -> None:
    (folder / "victim").write_text("all that I have")
    (folder / "victims").mkdir()
    for name in ("mine.safetensors", ".mine.tmp", "weights.safetensors"):
        (folder / "victims" / name).write_text(name)


def _replace(path: Path, target: str) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS, "run.db"])
def test_a_link_inside_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    place = finished(tmp_path)
    _victims(tmp_path)
    (tmp_path / "other.db").write_bytes((place / "run.db").read_bytes())
    targets = {"run.db": "../../other.db"} | dict.fromkeys(FOLDERS, "../../victims")
    _replace(place / name, targets.get(name, "../../victim"))
    before = tree(tmp_path)
    kind = "folder" if name in FOLDERS else "file"
    run(tmp_path, "search.trials=5", "--reopen-holdout").refused(
        f"runs/small/{name} must be a {kind} and not a link, so that nothing is written outside of runs/small"
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["best/weights.safetensors", "best/hparams.toml", "tensorboard/0", "replays/trial-1-seed-1"]
)
def test_a_link_below_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    place = finished(tmp_path)
    _victims(tmp_path)
    (place / name).parent.mkdir(exist_ok=True)
    _replace(place / name, str(tmp_path / ("victim" if "." in name else "victims")))
    before = tree(tmp_path)
    run(tmp_path, "search.trials=5", "--reopen-holdout").refused(f"runs/small/{name} must not be a link")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", cases(["trials.csv", "report.html", "best", "best/weights.safetensors"]))
def test_a_report_does_not_write_through_links(name: str, tmp_path: Path) -> None:
    place = finished(tmp_path)
    _victims(tmp_path)
    _replace(place / name, "../../victims" if name == "best" else str(tmp_path / "victim"))
    before = tree(tmp_path, without=place)
    hpt("report", "runs/small", cwd=tmp_path)
    assert tree(tmp_path, without=place) == before


@pytest.mark.parametrize("name", [".recipe.toml.tmp", ".environment.json.tmp", "checkpoints/.best-4.tmp"])
def test_a_temporary_file_that_is_a_link(name: str, tmp_path: Path) -> None:
    place = finished(tmp_path)
    _victims(tmp_path)
    (place / name).symlink_to(tmp_path / "victim")
    before = tree(tmp_path, without=place)
    assert run(tmp_path, "search.trials=5", "--reopen-holdout").status == 0
    assert tree(tmp_path, without=place) == before
    assert not (place / name).is_symlink()


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_the_wrong_kind_of_entry(name: str, tmp_path: Path) -> None:
    """A pipe would be waited for, a folder cannot be replaced by a file."""
    place = finished(tmp_path)
    for kind in ("pipe", "other"):
        if (place / name).is_dir():
            shutil.rmtree(place / name)
        (place / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(place / name)
        else:
            (place / name).touch() if name in FOLDERS else (place / name).mkdir()
        run(tmp_path).refused(f"runs/small/{name} must be a {'folder' if name in FOLDERS else 'file'}")


def test_an_emptied_record_is_not_begun_again(tmp_path: Path) -> None:
    """As a file system may leave it after a crash. The state files of the run are still there."""
    place = finished(tmp_path)
    os.truncate(place / "run.db", 0)
    before = tree(tmp_path)
    run(tmp_path).refused("runs/small/run.db is empty, but a run was in it; restore it from a backup")
    hpt("report", "runs/small", cwd=tmp_path).refused("has not begun")
    assert tree(tmp_path) == before


# -- files that were replaced --------------------------------------------------------------------------


def test_a_replaced_recipe_runs_nothing(tmp_path: Path) -> None:
    """What was recorded counts; the file is a copy for people, and `hpt replay` reads it as any recipe."""
    place = finished(tmp_path)
    (tmp_path / "planted.py").write_text(f"open({MARKER!r}, 'w')\n")
    for text, told in (
        ('[task]\nkind = "planted:make"\n', "add --allow-import planted"),
        ("\0", "is not valid TOML"),
        ("a" * 1_000_001, "must be at most 1,000,000 bytes"),
    ):
        (place / "recipe.toml").write_text(text)
        hpt("replay", "runs/small", "--quiet", cwd=tmp_path).refused("runs/small/recipe.toml", told)
        assert hpt("report", "runs/small", cwd=tmp_path).status == 0
    assert not (tmp_path / MARKER).exists()
    assert run(tmp_path).status == 0
    assert "planted" not in (place / "recipe.toml").read_text()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[" * 99_999,
        b"[]",
        b"{}",
        b'{"pid": "\\u001b[2J", "host": "x"}',
        b'{"pid": 1, "host": 3}',
    ],
)
def test_whatever_the_owner_file_says(text: bytes, tmp_path: Path) -> None:
    with RunDir(tmp_path / "run"):
        (tmp_path / "run" / "owner.json").write_bytes(text)
        with pytest.raises(RunLockedError, match="is being written by .*; wait for it or stop it") as caught:
            RunDir(tmp_path / "run").__enter__()
    assert str(caught.value).isprintable()


def test_environment_files_are_never_read(tmp_path: Path) -> None:
    place = finished(tmp_path)
    for name in ("environment.json", "trials.csv", "report.html"):
        (place / name).write_bytes(b"\xff\0[" * 9999)
    (place / "best" / "hparams.toml").write_bytes(b"\xff")
    assert run(tmp_path).status == 0
    assert json.loads((place / "environment.json").read_text())["threads"] == 1


# -- the best weights ----------------------------------------------------------------------------------

WEIGHTS = {
    "cut": lambda path, folder: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path, folder: path.write_bytes(b""),
    "flipped": lambda path, folder: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "a pickle": lambda path, folder: path.write_bytes(bomb(folder)),
    "of another trial": lambda path, folder: checkpoint.save(path, {}, {"trial": 0}),
    "removed": lambda path, folder: path.unlink(),
    "a folder": lambda path, folder: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path, folder: _replace(path, "nowhere"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_damaged_weights_are_named_and_not_copied(case: str, tmp_path: Path) -> None:
    place = finished(tmp_path)
    (path,) = (place / "checkpoints").glob("best-*.safetensors")
    good = (place / "best" / "weights.safetensors").read_bytes()
    WEIGHTS[case](path, tmp_path)
    hpt("report", "runs/small", cwd=tmp_path).refused("the best trial's weights", path.name)
    assert (place / "best" / "weights.safetensors").read_bytes() == good
    with Record(place / "run.db", readonly=True) as record:
        file = record.state_files["best"][-1]
    with pytest.raises(DamageError, match=path.name):
        checkpoint.load(path, file.sha256)
    assert not (tmp_path / MARKER).exists()


def test_the_pickle_would_have_gone_off(tmp_path: Path) -> None:
    pickle.loads(bomb(tmp_path))
    assert (tmp_path / MARKER).is_dir()
