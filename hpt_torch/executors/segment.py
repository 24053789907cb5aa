"""Segments: what is trained without asking back, and what comes of it, boundary by boundary.

The same code runs a segment in this process and in a worker, so that its results cannot differ.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hpt_torch import checkpoint
from hpt_torch.population import Population
from hpt_torch.trainers import base, planner
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import HParams, InfeasibleError, Objective, Report, TrialState

State = tuple[dict[str, Tensor], dict[str, Any]]  # what `Population.state` returns


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Members of one signature, from their state, until they have `until_epoch` epochs."""

    key: str  # names its state files
    trials: Sequence[int]
    hparams: Sequence[HParams]  # all of each trial's
    engine: str  # loop, fused, compiled, or refit
    until_epoch: int
    state: State | None = None  # None: they are new
    ended: Sequence[int] = ()  # trials of it that are not to be trained any more
    bar: float | None = None  # the best score so far: weights that do not beat it are not sent
    fold: int | None = None  # of cross-validation: whose data it trains on; no weights are sent

    @property
    def trainer(self) -> str:
        """The name of its trainer."""
        return trainer_name(self.engine, self.fold)


def trainer_name(engine: str, fold: int | None) -> str:
    return engine if fold is None else f"{engine}/{fold}"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A member that has all its epochs, or none left to hope for."""

    trial: int
    weights_sha256: str
    kept_epoch: int
    score: float | None


@dataclass(kw_only=True)
class Boundary:
    """What a segment brought since the boundary before."""

    key: str
    reports: list[Report] = field(default_factory=list)
    ended_badly: dict[int, tuple[TrialState, str]] = field(default_factory=dict)  # trial -> how, and why
    finished: list[Finished] = field(default_factory=list)
    best: tuple[int, dict[str, Tensor]] | None = None  # the trial that beats the bar, and its weights
    state: State | None = None  # of the members, where it is to be saved or handed on
    broken: str = ""  # why the members cannot go on together: they are to be trained in halves
    out_of_memory: bool = False  # that is why
    over: bool = False  # nothing more comes of this segment


@dataclass(frozen=True, kw_only=True)
class Training:
    """Runs segments. patience: a trial ends after so many epochs without a better score."""

    trainers: Mapping[str, LoopTrainer]  # by `trainer_name`; "refit": of the rows of train and valid together
    objective: Objective
    epochs: int
    patience: int | None
    save_every_seconds: float

    def run(self, segment: Segment, should_stop: Callable[[], bool]) -> Iterator[Boundary]:
        """Trains until the segment's end or until `should_stop()`; then the last boundary has the state.

        The state comes as well whenever `save_every_seconds` have passed, also inside an epoch.
        """
        trainer = self.trainers[segment.trainer]
        try:
            population = trainer.init(segment.trials, segment.hparams)
        except InfeasibleError as error:
            yield self._lost(segment, TrialState.INFEASIBLE, str(error))
            return
        except Exception as error:  # user code; its traceback is the reason
            if len(segment.trials) > 1:
                yield self._broken(segment, error)
            else:
                yield self._lost(segment, TrialState.FAILED, traceback.format_exc(limit=-8))
            return
        if segment.state is not None:
            population.restore(*segment.state)
        for trial in segment.ended:
            population.active[population.trials.index(trial)] = False
        bar, saved_at = segment.bar, time.monotonic()

        def should_pause() -> bool:
            return should_stop() or time.monotonic() - saved_at >= self.save_every_seconds

        while True:
            ready = [e for e, on in zip(population.epoch, population.active, strict=True) if on]
            until = min([*(epoch + 1 for epoch in ready), segment.until_epoch])
            try:
                result = trainer.train(population, until, should_pause=should_pause)
            except (Exception, SystemExit) as error:  # user code
                if segment.engine not in planner.TOGETHER:
                    raise
                yield self._broken(segment, error)
                return
            boundary = Boundary(key=segment.key, reports=result.reports)
            boundary.ended_badly = {t: (TrialState.FAILED, why) for t, why in result.failed.items()}
            bar = self._finish(segment, population, boundary, bar)
            left = [e for e, on in zip(population.epoch, population.active, strict=True) if on]
            stopping = should_stop()
            boundary.over = stopping or not left or min(left) >= segment.until_epoch
            if left and (boundary.over or should_pause()):
                boundary.state = population.state()
                saved_at = time.monotonic()
            yield boundary
            if boundary.over:
                return

    def _lost(self, segment: Segment, state: TrialState, reason: str) -> Boundary:
        return Boundary(
            key=segment.key, ended_badly={trial: (state, reason) for trial in segment.trials}, over=True
        )

    def _broken(self, segment: Segment, error: BaseException) -> Boundary:
        """In halves the culprit will show. To be called where the error is handled."""
        why = traceback.format_exc(limit=-8)
        return Boundary(key=segment.key, broken=why, out_of_memory=base.is_out_of_memory(error), over=True)

    def _finish(
        self, segment: Segment, population: Population, boundary: Boundary, bar: float | None
    ) -> float | None:
        """Takes out the members that are done; returns the best score so far."""
        trainer = self.trainers[segment.trainer]
        scores = {report.trial: report.metrics.get(self.objective.metric) for report in boundary.reports}
        for i, trial in enumerate(population.trials):
            if not population.active[i] or population.batch[i] or not self._is_done(segment, population, i):
                continue
            population.active[i] = False
            weights = trainer.weights(population, i)
            kept = population.best_epoch[i] if trainer.keep is not None else population.epoch[i]
            score = population.best[i] if trainer.keep is not None else scores.get(trial)
            if score is not None and not math.isfinite(score):
                score = None
            sha256 = checkpoint.weights_sha256(weights)
            boundary.finished.append(
                Finished(trial=trial, weights_sha256=sha256, kept_epoch=kept, score=score)
            )
            if (
                segment.fold is not None
                or score is None
                or (bar is not None and self.objective.better(bar, score))
            ):
                continue
            # As good as the bar is sent too: where scores are equal the lower number is the best.
            if boundary.best is None or bar is None or self.objective.better(score, bar):
                boundary.best = trial, weights
            bar = score
        return bar

    def _is_done(self, segment: Segment, population: Population, i: int) -> bool:
        epoch = population.epoch[i]
        if segment.engine == "refit":
            return epoch >= segment.until_epoch
        waited = epoch - population.best_epoch[i]
        return epoch >= self.epochs or (self.patience is not None and waited >= self.patience)


def gave_up(segment: Segment, reason: str) -> Boundary:
    """Of a segment that cannot be trained: its members are to be tried in halves, or the one that is alone
    ends."""
    if len(segment.trials) > 1:
        return Boundary(key=segment.key, broken=reason, over=True)
    ended = {segment.trials[0]: (TrialState.FAILED, reason)}
    return Boundary(key=segment.key, ended_badly=ended, over=True)
