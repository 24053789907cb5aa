"""`Result`: what a run found, for Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpt_torch import checkpoint
from hpt_torch.data import Data
from hpt_torch.data.folds import pooled
from hpt_torch.record import Record
from hpt_torch.report import Summary, summarise
from hpt_torch.report.cards import result_card
from hpt_torch.report.confirmation import REFIT, weights_of
from hpt_torch.report.export import trials_csv, write_exports, write_page
from hpt_torch.report.figures import Plots
from hpt_torch.report.terminal import show_value
from hpt_torch.samplers import make_study
from hpt_torch.space import freeze
from hpt_torch.task import Task
from hpt_torch.trainers import base
from hpt_torch.types import Objective, RunError, Trial

if TYPE_CHECKING:
    from hpt_torch.replay import Replay


class Result:
    """The trials of a run, the best of them, and its model. Made by `tune`, or from a run directory.

    >>> import hpt_torch as hpt
    >>> from hpt_torch.models import Linear
    >>> task = hpt.Classification(Linear, hpt.data.iris())
    >>> hpt.tune(task, {"lr": hpt.Float(1e-3, 0.1)}, trials=4, epochs=2, run_dir="runs/iris", progress=False)
    Result('runs/iris': 4 complete; best is trial ... with valid/accuracy=0... at lr=0...)
    >>> result = hpt.Result("runs/iris", task)
    >>> result.best_model()
    Linear(...)
    """

    def __init__(self, path: str | Path, task: Task | None = None) -> None:
        self.path = Path(path).absolute()  # which a later os.chdir does not move
        self._shown, self._task = str(path), task
        with Record(self.path / "run.db", readonly=True) as record:
            self.summary: Summary = summarise(record)
            write_exports(record, self.summary, self.path)
            write_page(record, self.summary, self.path)
            recipe = record.of_kind("run")[0].body["recipe"]
            self._seed = int(recipe["trainer"].get("seed", recipe["seed"]))

    @property
    def trials(self) -> Sequence[Trial]:
        """Every trial, in the order of their numbers."""
        return self.summary.trials

    @property
    def best(self) -> Trial:
        """The complete trial with the best score. Raises RunError where no trial is complete."""
        if self.summary.best is None:
            states = ", ".join(f"{count} {state}" for state, count in self.summary.states.items())
            reason = next((t.reason for t in self.trials if t.reason), "")
            raise RunError(
                f"no trial of {self._shown} is complete ({states or 'none was planned'}). {reason}".strip()
            )
        return self.summary.best

    @property
    def objective(self) -> Objective:
        return self.summary.objective

    @property
    def holdout(self) -> dict[str, float]:
        """The best trial's metrics on the rows that no decision saw; empty before the search has ended."""
        return dict(self.summary.holdout)

    @property
    def holdout_interval(self) -> tuple[float, float] | None:
        """95 % interval of the objective's hold-out figure, for rows that are independent of each other."""
        return self.summary.holdout_bounds

    @property
    def pareto(self) -> tuple[Trial, ...]:
        """The complete trials that no other one beats in both objectives, best in the first one first; empty
        where there is one objective. What is `best` the first one alone decides."""
        return self.summary.pareto

    @property
    def study(self) -> Any:
        """The trials as an in-memory Optuna study, for optuna.visualization and optuna.importance; with two
        objectives it has both directions. Where a schedule changed hyperparameters on the way, it has the
        proposed values."""
        return make_study(
            self.summary.space, self.summary.as_searched.trials, self.objective, self.summary.second
        )

    @property
    def plot(self) -> Plots:
        """Interactive figures, such as ``result.plot.progress()``; they need plotly (the extra "plots")."""
        return Plots(self.summary)

    def hparams(self, trial: Trial | None = None) -> dict[str, Any]:
        """All hyperparameters of a trial (default: the best), the fixed ones included."""
        return self.summary.full_hparams(self.best if trial is None else trial)

    def best_model(self) -> nn.Module:
        """The best trial's trained model, on the CPU, in evaluation mode. Needs the task that `tune` got."""
        if self._task is None:
            raise RunError("best_model() needs the task: Result(path, task)")
        best = self.best
        with Record(self.path / "run.db", readonly=True) as record:
            file = weights_of(record, best)
        if file is None:
            raise RunError(f"{self._shown} has no model yet: its best trial is trained again at the end")
        weights, _ = checkpoint.load(self.path / "checkpoints" / file.name, file.sha256)
        hparams = {name: freeze(value) for name, value in self.hparams().items()}  # as in training: tuples
        model = base.build(self._task, hparams, best.number, self._seed, plain=True)
        dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), torch.float32)
        return base.load_weights(model.to(dtype), weights, hparams, self._task.buffer_hparams)

    @property
    def data(self) -> Data:
        """The data as the best model saw it, with what it was trained on as `train`: after a confirmation or
        with folds these are the rows of train and valid, standardised together. `prepared` makes new rows of
        the same kind. Needs the task that `tune` got."""
        if self._task is None:
            raise RunError("data needs the task: Result(path, task)")
        with Record(self.path / "run.db", readonly=True) as record:
            file = weights_of(record, self.best)
        refitted = file is not None and file.key == REFIT
        return pooled(self._task.data()) if refitted else self._task.data()

    def replay(self, seeds: int = 5, *, progress: bool = True) -> Replay:
        """Trains the best trial again from scratch, on its schedule, with `seeds` other seeds, and says
        whether that reaches its score. Needs the task that `tune` got; called again, it goes on."""
        from hpt_torch.observers.progress import ProgressObserver
        from hpt_torch.replay import replay

        if self._task is None:
            raise RunError("replay() needs the task: Result(path, task)")
        observers = [ProgressObserver()] if progress else []
        return replay(self.path, self._task, seeds=seeds, observers=observers)

    def to_csv(self, path: str | Path | None = None) -> str:
        """One row a trial, as text; also written to `path` if given."""
        text = trials_csv(self.summary)
        if path is not None:
            Path(path).write_text(text)
        return text

    def __repr__(self) -> str:
        states = ", ".join(f"{count} {state.lower()}" for state, count in self.summary.states.items())
        if self.summary.best is None:
            reason = next((f"; {t.reason.strip().splitlines()[-1]}" for t in self.trials if t.reason), "")
            return f"Result({self._shown!r}: {states or 'no trials'}{reason})"
        best = self.best
        score = self.objective.score(best)
        searched = ", ".join(f"{name}={show_value(value)}" for name, value in best.hparams.items())
        return (
            f"Result({self._shown!r}: {states}; best is trial {best.number} with "
            f"{self.objective.metric}={score:.4f} at {searched or 'the fixed hyperparameters'})"
        )

    def _repr_html_(self) -> str:
        return result_card(self.summary, Path(self._shown))
