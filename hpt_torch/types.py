"""The words of the project: trials, reports, decisions, objectives and errors. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

HParamValue = bool | int | float | str | tuple[Any, ...]
HParams = Mapping[str, HParamValue]


def printable(text: str, limit: int = 1000) -> str:
    """The text on one line of bounded length, with nothing in it that would steer a terminal."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def is_int(value: Any) -> bool:
    """A whole number that a float holds exactly; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53


def is_number(value: Any) -> bool:
    """A finite real number; true and false are none, nor is an integer beyond 2**53."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


class TrialState(StrEnum):
    """Where a trial stands. The names are Optuna's, with two of our own.

    >>> import hpt_torch as hpt
    >>> hpt.TrialState.PRUNED.is_finished, hpt.TrialState.PAUSED.is_finished
    (True, False)
    """

    WAITING = "WAITING"  # planned, not yet begun
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"  # stopped by the run's time budget; goes on when the budget is extended
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"  # diverged, or its code raised
    INFEASIBLE = "INFEASIBLE"  # its hyperparameters allow no model

    @property
    def is_finished(self) -> bool:
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.INFEASIBLE)


# Known of a trial's model before it is trained: its trainable parameters, the FLOPs of a row's forward pass
SIZES = ("parameters", "flops")
SplitterName = Literal["auto", "kfold", "stratified", "grouped", "time"]


@dataclass(frozen=True, kw_only=True)
class Folding:
    """How the pool is cut. repeats: so often, each time into other folds (not for time).

    splitter: stratified keeps the share of each class, grouped keeps the rows of a group together (classes
    kept too), time trains on what lies before; auto is what the data calls for: time where it is ordered,
    grouped where it has groups, stratified for one class a row, else kfold.
    """

    folds: int
    splitter: SplitterName = "auto"
    repeats: int = 1

    @property
    def count(self) -> int:
        return self.folds * self.repeats


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one member measured at a boundary.

    >>> import hpt_torch as hpt
    >>> hpt.Report(trial=0, epoch=1, metrics={"valid/accuracy": 0.9}, seconds=0.1).metrics["valid/accuracy"]
    0.9
    """

    trial: int
    epoch: int  # epochs trained so far, 1-based
    metrics: Mapping[str, float]  # "valid/accuracy", "train/loss", …
    seconds: float  # wall-clock of this epoch, evaluation included


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A member's training between two decisions of its scheduler that changed it."""

    generation: int  # the decision with which it began; 0: the start of the run
    epoch: int  # epochs trained before it
    source: int | None  # the trial whose weights it goes on with; None: its own first ones
    hparams: HParams  # the searched values


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the search space and what became of it. Read-only: the record makes new ones.

    >>> import hpt_torch as hpt
    >>> report = hpt.Report(trial=3, epoch=1, metrics={"valid/accuracy": 0.9}, seconds=0.1)
    >>> hpt.Trial(number=3, round=0, hparams={"lr": 0.1}, signature="", reports=(report,)).epoch
    1
    """

    number: int
    round: int
    hparams: HParams  # the searched values; `Result.hparams(trial)` adds the fixed ones
    signature: str
    state: TrialState = TrialState.WAITING
    reports: tuple[Report, ...] = ()
    reason: str = ""  # why it was pruned, failed or is infeasible; a traceback where code raised
    weights_sha256: str = ""
    kept_epoch: int = 0  # the epoch whose weights were kept; 0: not finished
    phases: tuple[Phase, ...] = ()  # where a scheduler changed it; then `hparams` are those of the last one
    folds: tuple[Trial, ...] = ()  # with cross-validation: its training on each fold; reports are their means
    parameters: int | None = None  # of its model, trainable ones; None: not recorded
    flops: int | None = None  # of a row's forward pass; None: nothing asked for them

    @functools.cached_property
    def metrics(self) -> Mapping[str, float]:
        """The metrics that belong to the weights that were kept (with folds the means of theirs); the last
        ones while it is trained."""
        if self.folds and self.state is TrialState.COMPLETE:
            return means([fold.metrics for fold in self.folds])
        for report in reversed(self.reports):
            if self.kept_epoch in (0, report.epoch):
                return report.metrics
        return {}

    @property
    def epoch(self) -> int:
        return self.reports[-1].epoch if self.reports else 0

    def _repr_html_(self) -> str:
        from hpt_torch.report.cards import trial_card

        return trial_card(self)


def changed(trial: Trial, **fields: Any) -> Trial:
    """The trial with these fields, as `dataclasses.replace` gives it at seven times the price: a run's trials
    change with every report, and a run of folds has ten thousands of them."""
    new = object.__new__(Trial)
    new.__dict__.update(vars(trial), **fields)
    new.__dict__.pop("metrics", None)  # what was computed of the fields that they had
    return new


def means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric that all of them have."""
    names = [name for name in metrics[0] if all(name in other for other in metrics)]
    return {name: sum(other[name] for other in metrics) / len(metrics) for name in names}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is optimised: a metric's value at a trial's last report, or one of `SIZES`.

    >>> import hpt_torch as hpt
    >>> hpt.Objective(metric="valid/accuracy", direction="maximize").better(0.9, 0.8)
    True
    """

    metric: str
    direction: Literal["maximize", "minimize"]

    def score(self, trial: Trial) -> float | None:
        """The trial's value, or None where it has none that is finite."""
        value = getattr(trial, self.metric) if self.metric in SIZES else trial.metrics.get(self.metric)
        return float(value) if value is not None and math.isfinite(value) else None

    def standard_error(self, trial: Trial) -> float | None:
        """Of the mean over the trial's folds; None without folds. Folds share train rows, so it is too small
        rather than too large (Bengio and Grandvalet 2004)."""
        values = [score for fold in trial.folds if (score := self.score(fold)) is not None]
        if len(values) < 2 or len(values) < len(trial.folds):
            return None
        return statistics.stdev(values) / math.sqrt(len(values))

    def better(self, a: float, b: float) -> bool:
        return a > b if self.direction == "maximize" else a < b

    def ranked(self, trials: list[Trial]) -> list[Trial]:
        """Best first; only trials that have a score; ties go to the lower number."""
        scored = [(score, trial) for trial in trials if (score := self.score(trial)) is not None]
        sign = -1.0 if self.direction == "maximize" else 1.0
        return [trial for _, trial in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].number))]


# -- decisions: what a scheduler may say at a boundary -------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End the trial early; it keeps its last report."""

    trial: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Exploit:
    """Replace one member by a copy of another: weights, buffers, optimizer state, schedule position."""

    target: int  # the trial that is replaced
    source: int  # the trial that is copied; never a target of the same boundary
    hparams: HParams  # the searched values with which the target goes on


Decision = Stop | Exploit  # Continue is saying nothing; Pause and Resume join with their schedulers


# -- errors --------------------------------------------------------------------------------------------


class HptError(Exception):
    """Every error that hpt_torch raises on purpose. The message says rule, value and remedy.

    >>> import hpt_torch as hpt
    >>> try:
    ...     hpt.Float(1.0, 0.1)
    ... except hpt.HptError as error:
    ...     print(error)
    low must be at most high, got [1, 0.1]
    """


class UserInputError(HptError, ValueError):
    """Something the user gave is wrong; nothing was written."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe or a call: which field, and what about it."""

    where: str
    what: str

    def __str__(self) -> str:
        what = "\n    ".join(printable(line) for line in self.what.splitlines()[:20])
        return f"{printable(self.where, 200)}: {what}" if self.where else what


class RecipeError(UserInputError):
    """All the problems of a recipe (or of the arguments of `tune`), shown at once.

    >>> import hpt_torch as hpt
    >>> try:
    ...     hpt.tune("no task", {"lr": hpt.Float(0.1, 1.0)}, trials=3)
    ... except hpt.RecipeError as error:
    ...     print(error.problems[0])
    task: must be a hpt_torch.Task, got str
    """

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source, self.problems = source, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))


class SpaceError(UserInputError):
    """A dimension of the search space that cannot be."""


class TaskError(UserInputError):
    """A task, model or data set that cannot be used as given.

    >>> import torch, hpt_torch as hpt
    >>> hpt.split(torch.zeros(10, 3), torch.zeros(9))
    Traceback (most recent call last):
    hpt_torch.types.TaskError: inputs and targets must have the same number of rows, got 10 and 9
    """


class InfeasibleError(HptError):
    """These hyperparameters allow no model. Raised by `build_model`; the trial ends INFEASIBLE.

    >>> import torch, hpt_torch as hpt
    >>> def build_model(hparams):
    ...     if hparams["heads"] > 8:
    ...         raise hpt.InfeasibleError(f"64 features are too few for {hparams['heads']} heads")
    ...     return torch.nn.MultiheadAttention(64, hparams["heads"])
    >>> build_model({"heads": 16})
    Traceback (most recent call last):
    hpt_torch.types.InfeasibleError: 64 features are too few for 16 heads
    """


class RunError(HptError):
    """A run directory that cannot be used as asked.

    >>> import hpt_torch as hpt
    >>> hpt.Result("no/such/run")
    Traceback (most recent call last):
    hpt_torch.types.RunError: no/such/run is not a run directory: it has no run.db
    """


@contextlib.contextmanager
def writing(path: object) -> Iterator[None]:
    """A RunError where the disk is full or broken, with what that means for the run."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}). Everything recorded before is intact: "
            "make room or restore access, then run the same command again"
        ) from error


class RunLockedError(RunError):
    """Another process is writing this run."""


class RunMismatchError(RunError):
    """The run directory belongs to a different recipe."""


class DamageError(RunError):
    """The record or a state file is not what was written."""


@dataclass
class Interrupted(BaseException):
    """The run was asked to stop and has saved its state. Not an error of the user's code."""

    signal: int
    message: str = field(default="")
