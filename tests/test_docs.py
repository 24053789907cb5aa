"""Every public name has an example, and it runs."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import hpt_torch


@pytest.mark.parametrize("name", hpt_torch.__all__)
def test_the_example_of_a_public_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thing = getattr(hpt_torch, name)
    module = importlib.import_module(thing.__module__)
    found = doctest.DocTestFinder(recurse=False).find(thing, name, module=module, globs={})
    assert sum(len(test.examples) for test in found) >= 2, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    said: list[str] = []
    for test in found:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
