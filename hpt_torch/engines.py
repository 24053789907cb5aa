"""What a session trains with: a device, the data on it, the trainers, and the executor that runs them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from hpt_torch import limits
from hpt_torch import recipe as recipes
from hpt_torch.crash import CrashLog
from hpt_torch.data import Data, Rows, stream
from hpt_torch.data.folds import folds, pooled
from hpt_torch.executors import InlineExecutor, ProcessExecutor, Training, processes
from hpt_torch.executors.segment import trainer_name
from hpt_torch.recipe import Recipe
from hpt_torch.report.confirmation import REFIT
from hpt_torch.task import Task
from hpt_torch.trainers import base
from hpt_torch.trainers.compiled import CompiledTrainer
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import Objective, RunMismatchError

ENGINES: Mapping[str, type[LoopTrainer]] = {
    "loop": LoopTrainer,
    "fused": FusedTrainer,
    "compiled": CompiledTrainer,
}


def device_named(name: str) -> torch.device:
    """The device of `trainer.device`; auto is CUDA where there is one."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def resume_device(name: str, begun: str, path: Path) -> torch.device:
    """The device of this session: of the kind on which the run began, for other kinds round differently."""
    device = torch.device("cpu") if name == "auto" and begun == "cpu" else device_named(name)
    if device.type != begun:
        raise RunMismatchError(
            f"{path} began on {begun}, and this machine would continue it on {device.type}, where results "
            "are not the same bit for bit; continue it there, or use another --run-dir"
        )
    return device


def make_deterministic(device: torch.device) -> None:
    """Chooses kernels that repeat bit for bit. On the CPU all that we use do; CUDA has to be asked."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


_SHARE = 0.8  # of the memory that is free


def memory_of(recipe: Recipe, device: torch.device, data: Data) -> int | None:
    """What trials that train together may take of the device's memory, in bytes; None where the system does
    not tell. On the CPU several such groups train at once, one a core, however many workers there are."""
    if recipe.trainer.memory is not None:
        return int(recipe.trainer.memory)
    if device.type == "cuda":
        dtype = getattr(torch, recipe.trainer.dtype)
        free: int = torch.cuda.mem_get_info(device)[0]
        return int(_SHARE * max(free - stream.needed_bytes(data, dtype), 0))
    found = limits.free_bytes() if device.type == "cpu" else None
    return None if found is None else int(_SHARE * found / processes.cores())


def data_on(data: Data, recipe: Recipe, device: torch.device) -> Data:
    """The data on the device; train rows that are too many for it are left in memory and streamed."""
    dtype = getattr(torch, recipe.trainer.dtype)
    if device.type == "cuda":
        data = stream.fitted(data, dtype, torch.cuda.mem_get_info(device)[0])
    return data.to(device, dtype)


def trainers(
    task: Task, recipe: Recipe, objective: Objective, data: Data, device: torch.device
) -> dict[str, LoopTrainer]:
    """The trainers, by `trainer_name`: one an engine, with cross-validation one more an engine and fold, and
    "refit" where the chosen trial is trained again. data: what `data_on` gave."""
    settings = recipe.trainer
    seed = recipe.seed if settings.seed is None else settings.seed
    keeps_best = settings.keep == "best" or settings.patience is not None
    dtype = getattr(torch, settings.dtype)

    def make(kind: type[LoopTrainer], rows: Data, probe: object, keep: Objective | None) -> LoopTrainer:
        return kind(
            task,
            rows,
            device=device,
            dtype=dtype,
            seed=seed,
            epochs=settings.epochs,
            keep=keep,
            autocast=torch.bfloat16 if settings.autocast == "bfloat16" else None,
            probe=probe,  # type: ignore[arg-type]
        )

    keep = objective if keeps_best else None
    parts: list[tuple[int | None, Data]] = [(None, data)]
    folding = recipes.folding_of(recipe)
    if folding is not None:
        cut = folds(task.data(), folding, recipe.seed)
        parts += [(number, part.to(device, dtype)) for number, part in enumerate(cut)]
    made = {}
    for fold, rows in parts:
        probe = base.probe(rows.train, rows.valid, recipe.seed)
        for name, kind in ENGINES.items():
            made[trainer_name(name, fold)] = make(kind, rows, probe, keep)
    if recipes.refits(recipe):
        everything = pooled(task.data()).to(device, dtype)
        made[REFIT] = make(LoopTrainer, everything, everything.valid, None)
    return made


def forks(recipe: Recipe, device: torch.device) -> bool:
    """Whether trials train in worker processes of one thread each: two of those beat one of two threads."""
    if recipe.executor != "auto":
        return recipe.executor == "processes"
    alone = recipes.planned_trials(recipe) == 1  # nobody else would use the other cores
    return device.type == "cpu" and processes.supported() and not alone and processes.can_train()


def executor(
    recipe: Recipe,
    objective: Objective,
    data: Data,
    device: torch.device,
    made: Mapping[str, LoopTrainer],
    crash: CrashLog,
) -> InlineExecutor | ProcessExecutor:
    settings = recipe.trainer
    training = Training(
        trainers=made,
        objective=objective,
        epochs=settings.epochs,
        patience=settings.patience,
        save_every_seconds=recipe.run.checkpoint_every_seconds,
    )
    whole = isinstance(data.train, Rows) and isinstance(data.valid, Rows)  # a stream has processes of its own
    if not forks(recipe, device) or not whole or device.type != "cpu":
        return InlineExecutor(training, crash)
    started = ProcessExecutor(
        training, recipe.run.workers or processes.cores(), patience_seconds=recipe.run.epoch_timeout
    )
    started.start()  # before observers start threads
    return started
