"""What a session trains with: a device, the data on it, the trainers, and the executor that runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hpt_torch import limits
from hpt_torch import recipe as recipes
from hpt_torch.crash import CrashLog
from hpt_torch.data import Data, Rows, Stream, stream
from hpt_torch.data.folds import folds, pooled
from hpt_torch.executors import InlineExecutor, ProcessExecutor, Training, processes
from hpt_torch.executors.segment import trainer_name
from hpt_torch.recipe import Recipe
from hpt_torch.report.confirmation import REFIT
from hpt_torch.task import Task
from hpt_torch.trainers import base, inductor
from hpt_torch.trainers.compiled import CompiledTrainer
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.trainers.programs import Programs
from hpt_torch.types import Objective, Problem, RunMismatchError

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


def devices_of(recipe: Recipe) -> list[torch.device]:
    """The devices that train, each as often as it has worker processes; this process uses the first."""
    numbers = recipe.trainer.devices
    if numbers is None:
        return [device_named(recipe.trainer.device)]
    return [torch.device("cuda", number) for number in numbers]


def problems(recipe: Recipe, data: Data) -> list[Problem]:
    """What of the recipe this machine, or this process, cannot do."""
    name, numbers = recipe.trainer.device, recipe.trainer.devices
    found, device = list(_missing_devices(recipe)), devices_of(recipe)[0]
    if numbers is not None:
        if recipe.executor == "inline":
            rule = "inline trains on one device, and trainer.devices names several places; use auto"
            found.append(Problem("executor", rule))
        if recipe.run.workers is not None:
            rule = "trainer.devices has one worker for each number; leave one of the two out"
            found.append(Problem("run.workers", rule))
        if any(isinstance(part, Stream) and part.workers for part in (data.train, data.valid)):
            rule = "workers of devices have none of their own, and a Stream does; give it workers=0"
            found.append(Problem("trainer.devices", rule))
    elif recipe.executor == "processes" and not (processes.supported() and device.type == "cpu"):
        rule = "processes are forked, which needs Linux and device cpu (or trainer.devices); use auto"
        found.append(Problem("executor", rule))
    elif recipe.executor == "processes" and not processes.can_train():
        rule = "processes are forked, and forks of this one cannot train: it has used CUDA or torch.compile"
        found.append(Problem("executor", f"{rule}; use auto or inline, or a process that has not"))
    if recipe.executor == "processes" and numbers is None and (recipe.trainer.threads or 1) > 1:
        rule = "must be 1 where trials train in worker processes, of one thread each, got"
        remedy = "leave it out, or set executor to inline"
        found.append(Problem("trainer.threads", f"{rule} {recipe.trainer.threads}; {remedy}"))
    if recipe.run.epoch_timeout is not None and numbers is None and not forks(recipe, device):
        rule = "needs worker processes, which can be stopped from outside"
        found.append(Problem("run.epoch_timeout", f"{rule}; set executor to processes, or leave it out"))
    if recipe.trainer.engine == "compiled" and (lacking := inductor.missing(device.type)) is not None:
        found.append(Problem("trainer.engine", f"is compiled, but {lacking}, or take trainer.engine=fused"))
    if name == "mps" and recipe.trainer.dtype == "float64":
        found.append(Problem("trainer.dtype", "float64 is not supported on mps; use float32"))
    return found


def _missing_devices(recipe: Recipe) -> Iterator[Problem]:
    name, numbers, count = recipe.trainer.device, recipe.trainer.devices, torch.cuda.device_count()
    if numbers is not None:
        if name not in ("auto", "cuda"):
            yield Problem("trainer.devices", f"are CUDA's, and trainer.device is {name}; leave one out")
        elif not torch.cuda.is_available():
            rule = f"is {numbers}, but this machine has no CUDA device; leave it out"
            yield Problem("trainer.devices", rule)
        elif max(numbers) >= count:
            yield Problem("trainer.devices", f"names {max(numbers)}, but there are {count}, from 0 on")
    elif name.startswith("cuda") and not torch.cuda.is_available():
        rule = f"is {name}, but this machine has no CUDA device; use auto or cpu"
        yield Problem("trainer.device", rule)
    elif name.startswith("cuda:") and int(name[5:]) >= count:
        yield Problem("trainer.device", f"is {name}, but there are {count} devices")
    elif name == "mps" and not torch.backends.mps.is_available():
        yield Problem("trainer.device", "is mps, but this machine has no Apple GPU; use auto or cpu")


def resume_device(recipe: Recipe, begun: str, path: Path) -> torch.device:
    """The device of this session: of the kind on which the run began, for other kinds round differently."""
    device = devices_of(recipe)[0]
    if recipe.trainer.device == "auto" and recipe.trainer.devices is None and begun == "cpu":
        device = torch.device("cpu")
    if device.type != begun:
        raise RunMismatchError(
            f"{path} began on {begun}, and this machine would continue it on {device.type}, where results "
            "are not the same bit for bit; continue it there, or use another --run-dir"
        )
    return device


def settle(recipe: Recipe, device: torch.device) -> None:
    """Makes this process use the device as the recipe wants it. Kernels that repeat bit for bit: on the CPU
    all that we use do; CUDA has to be asked for them."""
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    if recipe.trainer.deterministic:
        make_deterministic()
    if recipe.trainer.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"


def make_deterministic() -> None:
    """Chooses CUDA's kernels that repeat bit for bit."""
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
        devices = devices_of(recipe)
        return min(_share_of(recipe, data, one, devices) for one in devices)
    found = limits.free_bytes() if device.type == "cpu" else None
    return None if found is None else int(_SHARE * found / processes.cores())


def _share_of(recipe: Recipe, data: Data, device: torch.device, devices: Sequence[torch.device]) -> int:
    """Of a CUDA device, for a group in each of its workers, beside their rows: of the split, of each fold and
    of the last training. This process, too, has these on the first device."""
    folding = recipes.folding_of(recipe)
    copies = 1 + (folding.count if folding is not None else 0) + recipes.refits(recipe)
    rows = copies * stream.needed_bytes(data, getattr(torch, recipe.trainer.dtype))
    free: int = torch.cuda.mem_get_info(device)[0]
    if recipe.trainer.devices is not None and device == devices[0]:
        free -= rows
    return int(_SHARE * max(free / devices.count(device) - rows, 0))


def data_on(data: Data, recipe: Recipe, device: torch.device) -> Data:
    """The data on the device; train rows that are too many for it are left in memory and streamed."""
    dtype = getattr(torch, recipe.trainer.dtype)
    if device.type == "cuda":
        shares = max(devices_of(recipe).count(device), 1)
        data = stream.fitted(data, dtype, torch.cuda.mem_get_info(device)[0] // shares)
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

    programs = {kind: Programs() for kind in ENGINES.values()}  # folds differ in their rows alone

    def make(kind: type[LoopTrainer], rows: Data, probe: object, keep: Objective | None) -> LoopTrainer:
        return kind(
            task,
            rows,
            device=device,
            dtype=dtype,
            seed=seed,
            epochs=settings.epochs,
            keep=keep,
            scored=objective.metric,
            autocast=torch.bfloat16 if settings.autocast == "bfloat16" else None,
            probe=probe,  # type: ignore[arg-type]
            programs=programs[kind],
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
    """Whether trials train in worker processes: on the CPU of one thread each, for two of those beat one of
    two threads; on CUDA where the recipe names its devices."""
    if recipe.trainer.devices is not None:
        return processes.supported() and processes.can_use_cuda()
    if recipe.executor != "auto":
        return recipe.executor == "processes"
    alone = recipes.planned_trials(recipe) == 1  # nobody else would use the other cores
    if alone or (recipe.trainer.threads or 1) > 1:  # a fork has no threads to share its work with
        return False
    return device.type == "cpu" and processes.supported() and processes.can_train()


def training(recipe: Recipe, objective: Objective, made: Mapping[str, LoopTrainer]) -> Training:
    return Training(
        trainers=made,
        objective=objective,
        epochs=recipe.trainer.epochs,
        patience=recipe.trainer.patience,
        save_every_seconds=recipe.run.checkpoint_every_seconds,
    )


def on_devices(recipe: Recipe, objective: Objective, task: Task) -> ProcessExecutor | None:
    """Workers on the devices that the recipe names, if it does so; to be called before this process uses
    CUDA, or else there are none, and it trains by itself on the first of them."""
    if recipe.trainer.devices is None or not forks(recipe, torch.device("cuda")):
        return None
    devices = devices_of(recipe)

    def make(position: int) -> Training:
        device = devices[position]
        torch.set_num_threads(1)
        settle(recipe, device)
        data = data_on(task.data(), recipe, device)
        return training(recipe, objective, trainers(task, recipe, objective, data, device))

    limit = recipe.run.epoch_timeout
    started = ProcessExecutor(make, len(devices), spares=processes.SPARES, patience_seconds=limit)
    started.start()
    return started


def executor(
    recipe: Recipe,
    objective: Objective,
    data: Data,
    device: torch.device,
    made: Mapping[str, LoopTrainer],
    crash: CrashLog,
) -> InlineExecutor | ProcessExecutor:
    """What trains in this process, or in workers that are forked from it now."""
    here = training(recipe, objective, made)
    whole = isinstance(data.train, Rows) and isinstance(data.valid, Rows)  # a stream has processes of its own
    if not forks(recipe, device) or not whole or device.type != "cpu":
        return InlineExecutor(here, crash)
    count, limit = recipe.run.workers or processes.cores(), recipe.run.epoch_timeout
    started = ProcessExecutor(lambda position: here, count, patience_seconds=limit)
    started.start()  # before observers start threads
    return started
