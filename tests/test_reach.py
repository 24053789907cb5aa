"""Which code and values decide a result: what is told of them, and what a run refuses to go on with."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import hpt_torch as hpt
from hpt_torch.reach import changes, code_of, digests
from hpt_torch.types import RunMismatchError

SCRIPT = """
import functools, enum, types
import torch
from torch import nn
import hpt_torch as hpt

ACTIVATION = nn.ReLU
WEIGHTS = torch.tensor([1.0, 2.0])
SETTINGS = {"scale": 2.0, "sizes": [1, 2], "started": "today"}
HISTORY = [0]
STRANGE = [torch.tensor([1j]).conj(), torch.empty(1, device="meta"), {}]
STRANGE[2]["itself"] = STRANGE
weight = 1

def sized(x):
    return abs(x)

FUNCTIONS = {"size": sized}
OPTIONS = types.SimpleNamespace(shift=0.5, unused=1)
CALLS = 0

def shifted(x, by=0.25):
    return x + by + OPTIONS.shift

def scaled(factor):
    def scale(x):
        return x * factor
    return scale

class Block(nn.Module):
    kinds = ("a", "b")

    def __init__(self, width):
        super().__init__()
        self.linear, self.activation = nn.Linear(4, width), ACTIVATION()

    def forward(self, x):
        global CALLS
        CALLS += 1
        HISTORY.append(len(STRANGE))
        self.linear.weight.shape
        FUNCTIONS["size"](x)
        return shifted(self.activation(self.linear(x)) * SETTINGS["scale"])

class Net(nn.Module):
    scale = staticmethod(scaled(3.0))

    def __init__(self, width: int = 3):
        super().__init__()
        self.block, self.head = Block(width), nn.Linear(width, 2)

    def forward(self, x):
        return self.scale(self.head(self.block(x))) * WEIGHTS if "x" in {"x", "y"} else x
"""


def _module(source: str) -> types.ModuleType:
    """As `python -i`, `exec` or a notebook has it: without a file."""
    module = types.ModuleType("script_of_a_user")
    sys.modules[module.__name__] = module
    exec(source, vars(module))
    return module


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    sys.modules.pop("script_of_a_user", None)


def _found(source: str) -> dict[str, str]:
    return digests([_module(source).Net])


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("ACTIVATION = nn.ReLU", "ACTIVATION = nn.Tanh", "script_of_a_user.ACTIVATION"),
        ("tensor([1.0, 2.0])", "tensor([1.0, 2.5])", "script_of_a_user.WEIGHTS"),
        ('"scale": 2.0', '"scale": 2.5', "script_of_a_user.SETTINGS.scale"),
        ("shift=0.5", "shift=0.75", "script_of_a_user.OPTIONS.shift"),
        ("by=0.25", "by=0.5", "script_of_a_user.shifted(0)"),
        ("x + by", "x - by", "script_of_a_user.shifted"),
        ("scaled(3.0)", "scaled(4.0)", "script_of_a_user.scaled.<locals>.scale.factor"),
        ("x * factor", "x / factor", "script_of_a_user.scaled.<locals>.scale"),
        ("nn.Linear(4, width)", "nn.Linear(4, width, bias=False)", "script_of_a_user.Block.__init__"),
        ('kinds = ("a", "b")', 'kinds = ("a", "c")', "Block.kinds"),
        ("abs(x)", "-abs(x)", "script_of_a_user.sized"),
        ('{"x", "y"}', '{"x", "z"}', "script_of_a_user.Net.forward"),
        ("width: int = 3", "width: int = 4", "script_of_a_user.Net.__init__(0)"),
    ],
)
def test_a_change_anywhere_is_told(old: str, new: str, name: str) -> None:
    before = {"code": {}, "reached": {"python": "3", **_found(SCRIPT)}}
    assert SCRIPT.count(old) == 1
    after = {"code": {}, "reached": {"python": "3", **_found(SCRIPT.replace(old, new))}}
    assert changes(before, after) == [name]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("unused=1", "unused=2"),
        ("CALLS = 0", "CALLS = 7"),  # which the code changes itself
        ("HISTORY = [0]", "HISTORY = [0, 1]"),
        ('"started": "today"', '"started": "now"'),  # which it does not read
        ("weight = 1", "weight = 2"),  # the name of an attribute
        ("CALLS += 1\n", "CALLS += 1  # counted\n"),
        ("class Block", "UNRELATED = 5\n\nclass Block"),
    ],
)
def test_what_decides_nothing_is_not_told(old: str, new: str) -> None:
    assert SCRIPT.count(old) == 1
    assert _found(SCRIPT.replace(old, new)) == _found(SCRIPT)


def test_another_process_tells_the_same(tmp_path: Path) -> None:
    code = "from script_of_a_user import Net\nfrom hpt_torch.reach import digests\nprint(digests([Net]))"
    (tmp_path / "script_of_a_user.py").write_text(SCRIPT)
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1


def test_a_runs_code_is_compared_as_far_as_it_can_be_told() -> None:
    new = code_of(None, [_module(SCRIPT).Net])
    assert changes(new, new) == []
    assert changes({"code": new["code"]}, new) == []  # begun before what is reached was kept
    assert changes({**new, "reached": {"python": "2.7", "f": "1"}}, new) == []
    assert changes({**new, "code": {"Net": "1"}}, new) == ["Net"]


def test_a_model_without_source_is_not_taken_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def tuned(source: str, **more: Any) -> hpt.Result:
        task = hpt.Classification(_module(source).Net, hpt.data.iris())
        return hpt.tune(
            task, {"lr": hpt.Float(1e-3, 0.1)}, trials=2, epochs=1, executor="inline", progress=False,
            tensorboard=False, **more,
        )  # fmt: skip

    other = SCRIPT.replace("x + by", "x - by")
    source = SCRIPT.replace("nn.Linear(width, 2)", "nn.Linear(width, 3)").replace(") * WEIGHTS", ")")
    changed = other.replace("nn.Linear(width, 2)", "nn.Linear(width, 3)").replace(") * WEIGHTS", ")")
    first = tuned(source)
    assert tuned(source).path == first.path
    second = tuned(changed)
    assert second.path != first.path
    assert second.trials[0].weights_sha256 != first.trials[0].weights_sha256
    with pytest.raises(RunMismatchError, match="the code of script_of_a_user.shifted changed"):
        tuned(changed, run_dir=first.path)
