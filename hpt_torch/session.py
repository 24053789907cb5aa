"""One session of a run: check everything, open or continue the directory, tune, close.

What `hpt run` and `hpt_torch.tune` have in common. All checks come before the first write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from hpt_torch import __version__, calibration, engines, optim, reach
from hpt_torch import recipe as recipes
from hpt_torch.crash import CrashLog
from hpt_torch.data import Rows
from hpt_torch.data import folds as cross_validation
from hpt_torch.finale import choose
from hpt_torch.hparams import HParamSpec
from hpt_torch.machine import keep_freed_memory, settings_restored, use_threads
from hpt_torch.objectives import objective_of
from hpt_torch.observers import Observer
from hpt_torch.points import points_of, taken_before
from hpt_torch.recipe import Recipe
from hpt_torch.recipe_checks import check_hparams, is_read
from hpt_torch.record import FORMAT, Event, Record
from hpt_torch.room import check_free
from hpt_torch.rundir import RunDir, changes, environment, repository
from hpt_torch.space import Choice, defaults, freeze
from hpt_torch.steered import steered
from hpt_torch.steering import Steering
from hpt_torch.task import Task
from hpt_torch.trainers import inductor
from hpt_torch.trainers.sizes import parameters
from hpt_torch.tuner import Tuner
from hpt_torch.types import (
    HParams,
    InfeasibleError,
    Interrupted,
    Objective,
    Problem,
    RecipeError,
    RunError,
    RunMismatchError,
    TaskError,
)

RUN_ROOT = Path("runs")


@dataclass(frozen=True)
class Checked:
    """A recipe that fits its task: what a session needs and a run's record begins with."""

    recipe: Recipe  # with every default of the task filled in
    task: Task
    hparams: HParams  # the fixed ones
    objective: Objective
    warm: tuple[str, int] | None = None  # the run that the first points came from, and how many were wanted


@settings_restored()
def check(recipe: Recipe, task: Task, *, source: str, run_dir: Path | None = None) -> Checked:
    """Fits the recipe to the task. Raises RecipeError with every problem found; writes nothing.

    run_dir: of a run that may have begun with the recipe. What it took from another run it has written down.
    """
    specs, search = task.hparam_specs(), recipe.search
    warm = None if search.warm_start is None else (search.warm_start, search.warm_start_trials)
    recipe, problems = _warm_started(recipe, run_dir)
    problems += check_hparams(recipe, specs)
    objective, wrong = objective_of(recipe, task)
    problems += wrong
    problems += engines.problems(recipe, task.data())
    problems += _check_folds(recipe, task)
    if not problems:
        problems += _check_model(recipe, specs, task)
    if problems:
        raise RecipeError(source, problems)
    fixed = _fixed(recipe, specs)
    filled = {
        n: value
        for n, value in fixed.items()
        if n not in recipe.space and value is not None and is_read(n, recipe, specs)
    }
    return Checked(recipe.model_copy(update={"hparams": filled}), task, fixed, objective, warm)


def _warm_started(recipe: Recipe, run_dir: Path | None) -> tuple[Recipe, list[Problem]]:
    """The recipe with another run's points written out, so that it stands for itself."""
    search = recipe.search
    if search.warm_start is None:
        return recipe, []
    warm = search.warm_start, search.warm_start_trials
    points, problems = taken_before(run_dir, warm, search.points), list[Problem]()
    if points is None:
        found, problems = points_of(*warm, recipe.space)
        if search.trials is not None:  # a point more would not be tried
            declared = search.start_with_defaults and bool(defaults(recipe.space))
            found = found[: max(search.trials - len(search.points) - declared, 0)]
        points = [*found, *search.points]
    changed = search.model_copy(update={"points": points, "warm_start": None})
    return recipe.model_copy(update={"search": changed}), problems


def _fixed(recipe: Recipe, specs: Mapping[str, HParamSpec]) -> dict[str, Any]:
    """What a trial has where it has no value of its own: also of what is searched under a condition."""
    always = {name for name, dimension in recipe.space.items() if not dimension.when}
    defaults = {name: spec.default for name, spec in specs.items() if name not in always}
    return {name: freeze(value) for name, value in {**defaults, **recipe.hparams}.items()}


def _check_model(recipe: Recipe, specs: Mapping[str, HParamSpec], task: Task) -> list[Problem]:
    """Where no static hyperparameter is searched there is one model, and it must be possible."""
    if any(not specs[name].dynamic for name in recipe.space if name != "batch_size"):
        return []
    lows = {
        name: d.default if d.default is not None else d.options[0] if isinstance(d, Choice) else d.low
        for name, d in recipe.space.items()
    }
    hparams, limit = {**_fixed(recipe, specs), **lows}, recipe.search.max_parameters
    try:
        model = task.build_model(hparams)
    except (InfeasibleError, RuntimeError, MemoryError) as error:
        return [Problem("hparams", f"allow no model: {error}")]
    if wrong := optim.unmatched([name for name, _ in model.named_parameters()], hparams):
        return [Problem(f"hparams.{wrong[0]}", wrong[1])]
    if limit is not None and (count := parameters(model, hparams["freeze"])) > limit:
        rule = f"must be at least {count:,}, the trainable parameters of the one model that is searched"
        return [Problem("search.max_parameters", f"{rule}, got {limit:,}; raise it, or search smaller ones")]
    return []


def _check_folds(recipe: Recipe, task: Task) -> list[Problem]:
    """Whether the rows can be cut as [evaluation] and [final] want it."""
    folding = recipes.folding_of(recipe)
    try:
        if recipes.refits(recipe):
            cross_validation.check(task.data(), folding, recipe.seed)
    except TaskError as error:
        return [Problem("evaluation.folds" if folding is not None else "final.refit", str(error))]
    return []


@settings_restored()
def run(
    checked: Checked,
    path: Path,
    *,
    observers: Sequence[Observer] = (),
    accept_changed_code: bool = False,
    reopen_holdout: bool = False,
    only_search: bool = False,
    costs: Mapping[str, Any] | None = None,
) -> None:
    """Runs or continues the run at `path`. Raises Interrupted after a graceful stop.

    only_search: nothing is chosen at the end, and no hold-out row is read. costs: what a new run plans with,
    as the run that it is a part of has it recorded; default: this machine's cost table.
    """
    directory = RunDir(path)
    directory.check_usable()
    check_free(path)
    wanted = identity(checked)
    goes_on = _check_continues(directory, wanted, checked, accept_changed_code, reopen_holdout)
    with contextlib.ExitStack() as opened:
        # Before anything in this process uses CUDA.
        workers = engines.on_devices(checked.recipe, checked.objective, checked.task)
        if workers is not None:
            opened.callback(workers.close)
        first = None if goes_on else _first_event(checked, wanted, costs)
        opened.enter_context(directory)
        record = opened.enter_context(Record(directory.record))
        if first is not None and record.last("run") is None:
            record.append(first)
        begun = record.of_kind("run")[0].body
        use_threads(begun["threads"])
        device = engines.resume_device(checked.recipe, begun["device"], path)
        engines.settle(checked.recipe, device)
        where = environment(str(device), begun["threads"]) | {"keeps_freed_memory": keep_freed_memory()}
        data = engines.data_on(checked.task.data(), checked.recipe, device)
        where["train_rows"] = f"{'on' if isinstance(data.train, Rows) else 'streamed to'} {device}"
        where["valid_rows"] = len(data.valid)  # how far a score can be trusted
        session = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "budget": _budget(checked.recipe),
            **where,
        }
        earlier, lost = record.last("session"), record.lost
        if lost:
            session["lost_events"] = lost
        record.append(Event(kind="session", body=session))
        directory.write_json(directory.environment, where | {"repository": repository(Path.cwd())})
        directory.write(directory.recipe, checked.recipe.to_toml().encode())
        trainers = engines.trainers(checked.task, checked.recipe, checked.objective, data, device)
        crash, notes = CrashLog(path), _notes(earlier, where, lost)
        if checked.recipe.trainer.devices is not None and workers is None:
            notes.append(
                f"all trains on {device}: workers of other devices are forked, on Linux, by a process that "
                "has not used CUDA before"
            )
        executor = workers or engines.executor(
            checked.recipe, checked.objective, data, device, trainers, crash
        )
        with (
            contextlib.closing(executor),
            contextlib.closing(trainers["loop"]),
            crash.watching(),
            _stop_signals(observers) as received,
        ):
            tuner = Tuner(
                recipe=checked.recipe,
                hparams=checked.hparams,
                task=checked.task,
                objective=checked.objective,
                directory=directory,
                record=record,
                trainers=trainers,
                executor=executor,
                crash=crash,
                observers=observers,
                should_stop=lambda: bool(received),
                finish=None if only_search else choose,
                notes=notes,
            )
            tuner.run()
        if received:
            raise Interrupted(received[0], f"stopped; everything is saved in {path}")


# -- continuing ----------------------------------------------------------------------------------------


def identity(checked: Checked) -> dict[str, Any]:
    """What must be equal for a run to be continued, as its first event holds it."""
    second = recipes.second_of(checked.recipe)
    return {
        "format": FORMAT,
        "version": __version__,
        "recipe": tomllib.loads(checked.recipe.to_toml()),
        "objective": dataclasses.asdict(checked.objective),
        **({} if second is None else {"second": dataclasses.asdict(second)}),
        "data": checked.task.data().fingerprint(),
        **({} if checked.warm is None else {"warm_start": list(checked.warm)}),
        **reach.code_of(checked.task, checked.task.sources()),
    }


def _first_event(checked: Checked, wanted: Mapping[str, Any], costs: Mapping[str, Any] | None) -> Event:
    """What a new run is, and what it keeps to its end though the machine or the cost table changes."""
    device, threads = engines.devices_of(checked.recipe)[0], checked.recipe.trainer.threads
    kept = {
        "device": device.type,
        "threads": threads or (1 if engines.forks(checked.recipe, device) else torch.get_num_threads()),
        "costs": costs
        or {
            **calibration.present().as_recorded(device.type),
            "memory": engines.memory_of(checked.recipe, device, checked.task.data()),
        },
    }
    return Event(kind="run", body={**wanted, **kept})


def _notes(earlier: Event | None, where: Mapping[str, Any], lost: int) -> list[str]:
    """What the user should know before the session goes on."""
    notes = [f"since the last session: {line}" for line in changes(earlier.body, where)] if earlier else []
    if lost:
        notes.append(
            f"the end of the record is lost ({lost} events: the log was cut, or the disk had not kept it); "
            "the run goes on from an earlier point and repeats what came after it, to the same result"
        )
    return notes


def _budget(recipe: Recipe) -> dict[str, Any]:
    return {"trials": recipe.search.trials, "timeout": recipe.search.timeout}


def _few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_continues(
    directory: RunDir, wanted: Mapping[str, Any], checked: Checked, accept_code: bool, reopen: bool
) -> bool:
    """Whether there is a run to continue. Raises RunMismatchError where it cannot be continued so."""
    if not directory.record.exists():
        return False
    with Record(directory.record, readonly=True) as record:
        begun = record.last("run")
        if begun is None:
            return False
        old = begun.body
        lines = recipes.differences(old["recipe"], wanted["recipe"])
        if old["data"] != wanted["data"]:
            lines.append("the data set's tensors are not the same")
        if lines:
            shown = "\n  ".join(lines)
            raise RunMismatchError(
                f"{directory.path} belongs to another recipe:\n  {shown}\n"
                "Use that recipe to continue it, or another --run-dir for this one"
            )
        if not accept_code and (changed := reach.changes(old, wanted)):
            raise RunMismatchError(
                f"{directory.path}: the code of {_few(changed)} changed since the run began. Trials "
                "before and after would not be comparable: use another run directory, or go on all the same "
                "with --accept-changed-code (accept_changed_code=True)"
            )
        lacking = inductor.missing(old["device"]) if _compiles(record) else None
        if lacking is not None:
            raise RunMismatchError(
                f"{directory.path} has trials that train by compiled steps, and {lacking}; or continue it "
                "where that is there"
            )
        if record.last("holdout") and not reopen and _has_more_work(record, checked.recipe):
            raise RunMismatchError(
                f"{directory.path} is finished and its hold-out rows were read. Searching on and reading "
                "them again makes that figure less honest: --reopen-holdout (reopen_holdout=True) does so, "
                "and the report counts the readings"
            )
    return True


def _compiles(record: Record) -> bool:
    """Whether trials are left that the plan wants compiled."""
    chunks = [chunk for plan in record.of_kind("plan") for chunk in plan.body["chunks"]]
    compiled = {trial for chunk in chunks if chunk["engine"] == "compiled" for trial in chunk["trials"]}
    return any(not record.trials[trial].state.is_finished for trial in compiled)


def _has_more_work(record: Record, recipe: Recipe) -> bool:
    """Whether the recipe's budgets would let this finished run train anything more."""
    timeout, total, so_far = recipe.search.timeout, recipes.planned_trials(recipe), steered(record)
    asked = [request for _, request in Steering(record.path.parent).waiting() if request]
    if any(request.kind != "stop" for request in asked):
        return True
    if timeout is not None and record.seconds_used() >= timeout + so_far.seconds:
        return False
    if recipe.final.confirm is not None and record.last("confirmed") is None:
        return True
    unfinished = any(not trial.state.is_finished for trial in record.trials.values())
    return unfinished or total is None or len(record.trials) < total + so_far.trials + len(so_far.points)


# -- signals and places -------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_signals(observers: Sequence[Observer]) -> Iterator[list[int]]:
    """The first SIGINT, SIGTERM or SIGUSR1 asks for a stop at the next step; a second one stops at once."""
    received: list[int] = []
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)

    try:
        before = {number: signal.signal(number, on_signal) for number in numbers}
    except ValueError:  # not the main thread: signals are not ours to handle
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_dir_for(name: str, root: Path = RUN_ROOT) -> Path:
    """The directory of a run of this name, inside the run root."""
    path = root / name
    if path.resolve().parent != root.resolve():
        raise RunError(f"the run name {name!r} leads outside {root}; use another name")
    return path
