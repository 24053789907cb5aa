"""A race: the trials of a round train from boundary to boundary, and at each a pruner says who stops.

Like the tuner, whose record and executor it uses, it sees both the deciding half and the training half.
Between boundaries the states of the chunks are held in memory; files are for going on after a stop or a kill.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hpt_torch import promotion
from hpt_torch.crossval import end_of, has_failed
from hpt_torch.executors import Boundary, Segment
from hpt_torch.record import Event, finish_event
from hpt_torch.schedulers import Member, Pruner
from hpt_torch.trainers.planner import Chunk
from hpt_torch.types import TrialState

if TYPE_CHECKING:
    from hpt_torch.tuner import Tuner


class Race:
    """One session of a round's training under a pruner."""

    def __init__(self, tuner: Tuner, pruner: Pruner, chunks: Sequence[Chunk]) -> None:
        self.tuner, self.pruner, self.record = tuner, pruner, tuner.record
        self.chunks = {chunk.key: chunk for chunk in chunks}
        self.segments = {chunk.key: tuner.segment(chunk) for chunk in chunks}
        self._saved_at = dict.fromkeys(self.chunks, time.monotonic())
        self.round = self.record.trials[chunks[0].trials[0]].round

    def run(self) -> None:
        """Trains to the end, or until a stop is asked for, or a group has to be taken apart: then the tuner
        comes back with what is still open."""
        epoch, epochs = 0, self.tuner.recipe.trainer.epochs
        while epoch < epochs:
            epoch = self.pruner.next_boundary(epoch, epochs)
            if not self._train(epoch):
                return
            if epoch < epochs:
                self._decide(epoch)

    def _train(self, until: int) -> bool:
        """All that are left to `until` epochs; False where that was not possible."""
        waiting = {key: self._to_train(key, until) for key in self.chunks}
        segments = [segment for segment in waiting.values() if segment is not None]
        segments.sort(key=self._steps, reverse=True)  # so that no worker is left alone with much in the end
        whole = True
        for boundary in self.tuner.executor.run(iter(segments), lambda: self.tuner.leaving):
            if boundary.broken:
                self.tuner.fall_back(self.chunks[boundary.key], boundary)
                whole = False
            else:
                self._take(boundary)
        return whole and not self.tuner.leaving

    def _to_train(self, key: str, until: int) -> Segment | None:
        """The chunk's segment to the boundary, where a trial of it that has not ended is not there yet."""
        segment = self.segments[key]
        ended = tuple(n for n in segment.trials if self.tuner.planning.is_done(n, segment.fold))
        epochs = [0] * len(segment.trials) if segment.state is None else segment.state[1]["epoch"]
        left = [epoch for n, epoch in zip(segment.trials, epochs, strict=True) if n not in ended]
        if not left or min(left) >= until:
            return None
        return replace(segment, until_epoch=until, ended=ended, bar=self.tuner.bar)

    def _steps(self, segment: Segment) -> int:
        """Of an epoch of those that are left."""
        return (len(segment.trials) - len(segment.ended)) * self.tuner.planning.steps(segment.hparams[0])

    def _take(self, boundary: Boundary) -> None:
        key = boundary.key
        events = self.tuner.events_of(boundary, self.chunks[key].fold)
        if boundary.state is not None:
            self.segments[key] = replace(self.segments[key], state=boundary.state)
            due = time.monotonic() - self._saved_at[key] >= self.tuner.recipe.run.checkpoint_every_seconds
            if due or self.tuner.leaving:
                self._saved_at[key] = time.monotonic()
                events.append(self.tuner.save(key, boundary.state))
        self.tuner.commit(*events)
        self.tuner.drop_old_states(key, ended=boundary.over and boundary.state is None)

    # -- decisions -------------------------------------------------------------------------------------

    def _decide(self, epoch: int) -> None:
        """Records who stops at this boundary, unless that is recorded already."""
        plan = self.record.last("plan")
        made = [event for event in self.record.of_kind("pruning") if plan is None or event.seq > plan.seq]
        if any(event.body["epoch"] == epoch for event in made):
            return
        # Where a fold has failed the trial goes no further: all folds are at this boundary now.
        failed = [t for t in self.record.in_order() if t.round == self.round and has_failed(t)]
        self.tuner.commit(*(end_of(trial) for trial in failed if not trial.state.is_finished))
        trials = self.record.in_order()
        ahead = {number for number, start in promotion.arrivals(self.record).items() if start >= epoch}
        racing = [
            t for t in trials if t.round == self.round and not t.state.is_finished and t.number not in ahead
        ]
        metric = self.tuner.objective.metric
        stops = self.pruner.decide(
            [
                Member(
                    number=trial.number,
                    epoch=epoch,
                    hparams=trial.hparams,
                    scores=[(r.epoch, r.metrics[metric]) for r in trial.reports if r.epoch <= epoch],
                )
                for trial in racing
            ],
            history=[trial for trial in trials if trial not in racing],
            objective=self.tuner.objective,
            epochs=self.tuner.recipe.trainer.epochs,
            seed=self.tuner.recipe.seed,
        )
        body: dict[str, Any] = {"round": self.round, "epoch": epoch, "stopped": [s.trial for s in stops]}
        states, gone = list[Event](), list[str]()
        if promotion.promotes(self.pruner):
            body["kept"], states, gone = promotion.keep(
                self.tuner, epoch, body["stopped"], list(self.segments.values())
            )
        ends = (finish_event(stop.trial, TrialState.PRUNED, stop.reason) for stop in stops)
        self.tuner.commit(*states, Event(kind="pruning", body=body), *ends)
        for key in gone:
            self.tuner.drop_old_states(key, ended=True)
        for key, chunk in self.chunks.items():
            if all(self.record.trials[number].state.is_finished for number in chunk.trials):
                self.tuner.drop_old_states(key, ended=True)
