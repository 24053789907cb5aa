"""What a process is set to: numbers too small for their format count as 0 where a trial trains."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpt_torch.data import split
from hpt_torch.machine import are_denormals_zero, denormals_are_zero, settings_restored
from hpt_torch.seeding import bookmark
from hpt_torch.tasks import Classification
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer

_THREADS = """
import torch
from hpt_torch.machine import are_denormals_zero, denormals_are_zero, use_threads
use_threads(2)
assert torch.get_num_threads() == 2 and not are_denormals_zero()
tiny = torch.full((1 << 22,), 1e-20)
with denormals_are_zero():
    print(int((tiny * 1e-20).count_nonzero()))
"""


class _Decaying(nn.Module):
    """`tiny` gets no gradient, so that weight decay alone changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.tiny = nn.Parameter(torch.full((64,), 2e-38))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + 0 * self.tiny.sum()


@pytest.mark.parametrize("engine", [LoopTrainer, FusedTrainer])
def test_weights_do_not_decay_into_denormals(engine: type[LoopTrainer]) -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    task = Classification(_Decaying, split(x, (x[:, 0] > 0).long(), seed=0))
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    hparams = {**defaults, "optimizer": "adamw", "lr": 0.5, "weight_decay": 0.5, "batch_size": 4}
    cpu = torch.device("cpu")
    trainer = engine(task, task.data(), device=cpu, dtype=torch.float32, seed=0, epochs=1)
    population = trainer.init([0, 1], [hparams, hparams])
    trainer.train(population, 1, should_pause=lambda: False)
    assert not population.params["tiny"].any(), "what the format has no exponent for is left"
    assert not are_denormals_zero(), "the caller's own arithmetic is as it was"


def test_what_was_set_before_stays_set() -> None:
    with denormals_are_zero():
        with denormals_are_zero():
            assert are_denormals_zero()
        assert are_denormals_zero()
    assert not are_denormals_zero()


def test_the_threads_of_a_run_treat_denormals_alike() -> None:
    done = subprocess.run([sys.executable, "-c", _THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_a_callers_generators_and_precision_are_as_they_were() -> None:
    draw = lambda: (float(torch.rand(1)), np.random.rand(), random.random())  # noqa: E731
    go_back, precision = bookmark(), torch.backends.cuda.matmul.fp32_precision
    expected = draw()
    go_back()
    with settings_restored():
        draw()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert draw() == expected
    assert torch.backends.cuda.matmul.fp32_precision == precision


def test_what_needs_no_compiler_does_not_load_one() -> None:
    code = "import sys; from hpt_torch import cli\n"
    code += "cli.app(['validate', 'digits_mlp_grid'], standalone_mode=False)\n"
    code += "print([name for name in ('torch._inductor', 'torch._dynamo', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("warn_only", [True, False])
def test_a_caller_who_wants_warnings_only_still_gets_no_more(warn_only: bool) -> None:
    try:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        with settings_restored():
            torch.use_deterministic_algorithms(not warn_only)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
