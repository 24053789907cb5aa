"""Optuna's pruners, asked at boundaries about the recorded history."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpt_torch.samplers import make_study
from hpt_torch.schedulers.exploit import Member
from hpt_torch.types import Objective, Stop, Trial

PruningName = Literal["median", "percentile", "threshold"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """``optuna.pruners.MedianPruner``, ``PercentilePruner`` or ``ThresholdPruner``; Optuna explains them.

    (Its successive halving and Hyperband depend on the order in which reports arrive: ours are `Halving`.)
    """

    kind: PruningName
    """median, percentile: worse than the median, or that percentile, of the complete trials at the same
    epoch. threshold: beyond `lower` or `upper`."""

    interval_epochs: int = 1
    burn_in_epochs: int = 0
    """Epochs before the first decision about a trial."""

    startup_trials: int = 5
    """median, percentile: complete trials before the first decision."""

    percentile: float = 25.0
    """percentile: this many percent of the trials, the best ones, are good enough; 50 is the median."""

    lower: float | None = None
    upper: float | None = None

    patience_epochs: int | None = None
    """Only trials whose score has not improved for so many epochs are stopped (``PatientPruner``)."""

    def next_boundary(self, epoch: int, epochs: int) -> int:
        earliest = max(epoch + 1, self.burn_in_epochs)
        return min(-(-earliest // self.interval_epochs) * self.interval_epochs, epochs)

    def decide(
        self,
        members: Sequence[Member],
        *,
        history: Sequence[Trial],
        objective: Objective,
        epochs: int,
        seed: int,
    ) -> list[Stop]:
        """Who stops now. members: the trials that have trained to this boundary; history: all others."""
        import optuna

        study = make_study({}, history, objective)
        stops = []
        for member in sorted(members, key=lambda m: m.number):
            trial = optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING, intermediate_values=dict(member.scores)
            )
            if self._pruner().prune(study, trial):
                scored = f"{objective.metric} {member.score:.6g} after epoch {member.epoch}"
                stops.append(Stop(trial=member.number, reason=f"{self.kind} pruner: {scored}"))
        return stops

    def _pruner(self) -> Any:
        import optuna

        pruners = optuna.pruners
        pruner: Any
        if self.kind == "threshold":
            pruner = pruners.ThresholdPruner(lower=self.lower, upper=self.upper)
        elif self.kind == "median":
            pruner = pruners.MedianPruner(n_startup_trials=self.startup_trials)
        else:
            pruner = pruners.PercentilePruner(self.percentile, n_startup_trials=self.startup_trials)
        if self.patience_epochs is None:
            return pruner
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return pruners.PatientPruner(pruner, patience=self.patience_epochs)
