"""`tune`: a search from Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpt_torch import baselines, session
from hpt_torch import recipe as recipes
from hpt_torch.observers.progress import ProgressObserver
from hpt_torch.observers.tensorboard import TensorBoardObserver
from hpt_torch.result import Result
from hpt_torch.space import Dimension
from hpt_torch.task import Task
from hpt_torch.types import Interrupted, Problem, RecipeError


def tune(
    task: Task,
    space: Mapping[str, Dimension | Mapping[str, Any]],
    *,
    trials: int | None = None,
    epochs: int = 10,
    sampler: str = "tpe",
    seed: int = 0,
    hparams: Mapping[str, Any] | None = None,
    timeout: str | float | None = None,
    round_size: int | None = None,
    max_parameters: int | None = None,
    metric: str | None = None,
    direction: str | None = None,
    second: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    folds: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    refit: bool | None = None,
    confirm: int | None = None,
    device: str = "auto",
    engine: str = "auto",
    trainer: Mapping[str, Any] | None = None,
    executor: str = "auto",
    workers: int | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    tensorboard: bool = True,
    accept_changed_code: bool = False,
    reopen_holdout: bool = False,
) -> Result:
    """Searches `space` for the hyperparameters with which `task` scores best.

    task: what is trained, e.g. ``Classification(Net, data)``.
    space: name -> Float, Int or Choice. hparams: fixed values, name -> value.
    trials, timeout ("30m", or seconds): budgets over all resumes; at least one is needed, except for "grid".
    max_parameters: a trial whose model has more trainable ones is infeasible, and is not trained.
    epochs: of each trial. sampler: tpe, random, grid, gp, qmc, nsga2.
    metric, direction: default to the task's.
    second: a second objective, as a recipe's [objective.second], e.g. ``{"metric": "parameters"}``:
    `Result.pareto` has the trials that no other one beats in both; what is best the first alone decides.
    scheduler: as a recipe's [scheduler], e.g. ``{"kind": "pbt", "interval_epochs": 2}`` for Population Based
    Training, where `trials` is the size of the population (`hpt_torch.schedulers.PBT` has the settings).
    folds: cross-validation: each trial is trained on so many folds, its score is their mean, and the best is
    trained again on all their rows. evaluation: as a recipe's [evaluation], e.g. ``{"repeats": 2}``.
    refit: without folds too. confirm: the best so many trials are trained again with five new seeds, and the
    one with the best mean is chosen.
    engine: auto, loop, fused, compiled. trainer: more of a recipe's [trainer], e.g. ``{"patience": 5}``, or
    ``{"devices": [0, 1]}`` for a worker on each of two GPUs. executor: auto, inline, processes; workers: how
    many, no matter to the result.
    run_dir: everything is kept there, and calling again with the same arguments goes on where it was. By
    default a directory under ``runs/`` named after the task and a hash of these arguments, the data and the
    model's source, so that running a changed script is a new run and an unchanged one continues.

    Raises RecipeError (a ValueError) for wrong arguments, before anything is written; RunMismatchError when
    `run_dir` belongs to other arguments. Ctrl-C saves and raises KeyboardInterrupt.

    >>> import hpt_torch as hpt
    >>> from hpt_torch.models import MLP
    >>> task = hpt.Classification(MLP, hpt.data.digits())
    >>> space = {"lr": hpt.Float(1e-3, 0.1), "dropout": hpt.Float(0.0, 0.5)}
    >>> result = hpt.tune(task, space, trials=4, epochs=2, progress=False)
    >>> sorted(result.best.hparams), 0.5 < result.holdout["holdout/accuracy"] <= 1
    (['dropout', 'lr'], True)
    """
    if not isinstance(task, Task):
        raise RecipeError("tune()", [Problem("task", f"must be a hpt_torch.Task, got {type(task).__name__}")])
    given = {"hparams": hparams, "second": second, "scheduler": scheduler, "evaluation": evaluation}
    given = {name: value for name, value in {**given, "trainer": trainer}.items() if value is not None}
    wrong = {
        name: value for name, value in {"space": space, **given}.items() if not isinstance(value, Mapping)
    }
    if wrong:
        rule = "must be a mapping of names to values, got"
        raise RecipeError("tune()", [Problem(name, f"{rule} {value!r}") for name, value in wrong.items()])
    own = sorted({"epochs", "device", "engine"}.intersection(trainer or ()))
    if own:
        problems = [Problem(f"trainer.{n}", f"is an argument of its own: tune(…, {n}=…)") for n in own]
        raise RecipeError("tune()", problems)
    raw: dict[str, Any] = {
        "seed": seed,
        "task": {"kind": "python", "model": task.name, "data": "python"},
        "hparams": dict(hparams or {}),
        "space": dict(space),
        "search": {
            "sampler": sampler,
            "trials": trials,
            "timeout": timeout,
            "round_size": round_size,
            "max_parameters": max_parameters,
        },
        "objective": {"metric": metric, "direction": direction, "second": second},
        "trainer": {"epochs": epochs, "device": device, "engine": engine, **(trainer or {})},
        "scheduler": dict(scheduler or {}),
        "evaluation": {**(evaluation or {}), **({"folds": folds} if folds is not None else {})},
        "final": {"refit": refit, "confirm": confirm},
        "run": {"tensorboard": tensorboard, "workers": workers},
        "executor": executor,
    }
    recipe = recipes.build(raw, source="tune()")
    checked = session.check(recipe, task, source="tune()")
    path = Path(run_dir) if run_dir is not None else session.run_dir_for(_default_name(checked))
    observers: list[Any] = [ProgressObserver()] if progress else []
    observers += [TensorBoardObserver()] if tensorboard else []
    try:
        baselines.run(
            checked,
            path,
            observers=observers,
            accept_changed_code=accept_changed_code,
            reopen_holdout=reopen_holdout,
        )
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from None
    return Result(path, task)


def _default_name(checked: session.Checked) -> str:
    identity = session.identity(checked)
    for free in ("trials", "timeout"):
        identity["recipe"]["search"].pop(free, None)
    for free in ("run", "executor"):
        identity["recipe"].pop(free, None)
    identity["recipe"]["trainer"].pop("devices", None)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in checked.task.name)[:50].strip("._-")
    return f"{stem or 'tune'}-{digest}"
