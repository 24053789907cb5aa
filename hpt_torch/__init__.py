"""hpt_torch tunes PyTorch models: durable runs, Optuna's samplers, an honest hold-out figure at the end.

    result = hpt_torch.tune(task, {"lr": hpt_torch.Float(1e-4, 1e-1)}, trials=30)

The names below are the public ones; they are imported when first used, so that `hpt --help` needs no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Then torch counts CUDA devices without the driver, after whose first use no fork can use them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

if TYPE_CHECKING:
    from hpt_torch.api import tune
    from hpt_torch.data import Data, Rows, Stream, split
    from hpt_torch.result import Result
    from hpt_torch.space import Choice, Float, Int
    from hpt_torch.task import Task
    from hpt_torch.tasks import Classification, Reconstruction, Regression
    from hpt_torch.types import (
        HptError,
        InfeasibleError,
        Objective,
        RecipeError,
        Report,
        RunError,
        TaskError,
        Trial,
        TrialState,
    )

_HOMES = {
    "api": ("tune",),
    "data": ("Data", "Rows", "Stream", "split"),
    "result": ("Result",),
    "space": ("Choice", "Float", "Int"),
    "task": ("Task",),
    "tasks": ("Classification", "Reconstruction", "Regression"),
    "types": (
        "HptError",
        "InfeasibleError",
        "Objective",
        "RecipeError",
        "Report",
        "RunError",
        "TaskError",
        "Trial",
        "TrialState",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Choice",
    "Classification",
    "Data",
    "Float",
    "HptError",
    "InfeasibleError",
    "Int",
    "Objective",
    "RecipeError",
    "Reconstruction",
    "Regression",
    "Report",
    "Result",
    "Rows",
    "RunError",
    "Stream",
    "Task",
    "TaskError",
    "Trial",
    "TrialState",
    "split",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hpt_torch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hpt_torch.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
