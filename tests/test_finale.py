"""The end of a run: files of weights that were damaged are made again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ear, canonical_of
from test_race import RACE

from hpt_torch.record import Record
from hpt_torch.types import DamageError

RunQuick = Callable[..., str]


class _Power(Exception):
    """The power went off."""


CASES: dict[str, dict[str, Any]] = {
    "loop": {"overrides": ("trainer.engine=loop",)},
    "fused": {"overrides": ("trainer.engine=fused", "activation=relu", "search.trials=6")},
    "patience": {"overrides": ("trainer.patience=1", "trainer.epochs=6", "trainer.keep=best")},
    "raced": {"overrides": ("scheduler.kind=asha", "trainer.engine=fused"), "raw": RACE},
    "folds": {"overrides": ("evaluation.folds=3", "batch_size=512")},
    "confirmed": {"overrides": ("final.confirm=2", "final.seeds=2", "search.trials=4")},
    "refitted": {"overrides": ("final.refit=true",)},
}


@pytest.mark.slow
@pytest.mark.parametrize("before_reading", [True, False], ids=["before the hold-out is read", "after"])
@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_of_weights_is_made_again(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch, case: str, before_reading: bool
) -> None:
    given = {"raw": CASES[case].get("raw")} if "raw" in CASES[case] else {}
    settings = CASES[case]["overrides"]
    expected = run_quick(tmp_path / "whole", *settings, **given)
    path = tmp_path / "run"
    append = Record.append

    def cut(record: Record, *events: Any) -> None:
        if any(event.kind == "holdout" for event in events):
            raise _Power
        append(record, *events)

    if before_reading:
        with monkeypatch.context() as patch:
            patch.setattr(Record, "append", cut)
            with pytest.raises(_Power):
                run_quick(path, *settings, **given)
    else:
        run_quick(path, *settings, **given)
    files = {file: file.read_bytes() for file in sorted((path / "checkpoints").glob("*.safetensors"))}
    assert files
    for i, (file, data) in enumerate(files.items()):
        if i % 2:
            file.unlink()
        else:
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ear = Ear()
    assert run_quick(path, *settings, **given, observers=[ear]) == expected
    needed = [file for file in files if any(f"{file.name} " in line for line in ear.said)]
    assert needed
    assert all(line.endswith("; training it again") for line in ear.said if ".safetensors" in line)
    for file in needed:
        assert file.read_bytes() == files[file]


def test_weights_that_do_not_come_again_are_an_error(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_quick(tmp_path / "run", "trainer.engine=loop")
    (file,) = (tmp_path / "run" / "checkpoints").iterdir()
    file.unlink()
    monkeypatch.setattr("hpt_torch.trainers.base.torch_seeded", lambda *parts: contextlib.nullcontext())
    with pytest.raises(DamageError, match="gave other weights"):
        run_quick(tmp_path / "run", "trainer.engine=loop")
    assert canonical_of(tmp_path / "run") == expected
