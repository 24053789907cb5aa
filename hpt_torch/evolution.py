"""Evolution: the training of a population from decision to decision (Population Based Training).

Like the tuner, whose record and executor it uses, it sees both the deciding half and the training half. A
generation trains every member to the next boundary; then the scheduler decides, the decision is recorded, and
only then copies are made. The members' states lie in one population, in the order of their trials, whatever
groups they train in.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpt_torch import checkpoint
from hpt_torch.executors import Boundary, Segment
from hpt_torch.hparams import signature
from hpt_torch.population import Population
from hpt_torch.record import Event, finish_event
from hpt_torch.schedulers import Member, Scheduler
from hpt_torch.schedulers.lineage import phase_at, scores
from hpt_torch.trainers.planner import Chunk
from hpt_torch.types import DamageError, HParams, InfeasibleError, TrialState

if TYPE_CHECKING:
    from hpt_torch.tuner import Tuner

POPULATION = "population"  # the key of its state files


def evolve(tuner: Tuner, scheduler: Scheduler) -> None:
    """Trains all trials, as one population. A model that cannot be built ends them all."""
    if all(trial.state.is_finished for trial in tuner.record.trials.values()):
        return
    try:
        evolution = Evolution(tuner, scheduler)
    except InfeasibleError as error:
        ends = (finish_event(n, TrialState.INFEASIBLE, str(error)) for n in tuner.record.trials)
        tuner.commit(*ends)
        return
    evolution.run()


class Evolution:
    """One session of a population's training."""

    def __init__(self, tuner: Tuner, scheduler: Scheduler) -> None:
        self.tuner, self.scheduler, self.record = tuner, scheduler, tuner.record
        self.epochs = tuner.recipe.trainer.epochs
        self.trials = sorted(self.record.trials)
        self.boundaries = [0]  # the epoch at which each generation ends; generation 0 has no training
        while self.boundaries[-1] < self.epochs:
            self.boundaries.append(scheduler.next_boundary(self.boundaries[-1], self.epochs))
        self._saved_at = time.monotonic()
        self.generation = 0  # decisions that the states in `population` have behind them
        self.population = self._restore(tuner.trainer.init(self.trials, self._all_hparams()))

    def run(self) -> None:
        """Trains to the end, or until a stop is asked for; then the state is saved."""
        for epoch in self.boundaries[self.generation + 1 :]:
            if not self._train(epoch):
                return
            if epoch < self.epochs:
                self._decide(epoch)
        self._end()

    # -- states ----------------------------------------------------------------------------------------

    def _restore(self, population: Population) -> Population:
        """The members in their newest good state, if there is one."""
        for file in reversed(self.record.state_files.get(POPULATION, [])):
            try:
                tensors, meta = checkpoint.load(self.tuner.dir.checkpoints / file.name, file.sha256)
            except DamageError as error:
                self.tuner.say(f"{error}; going back to the state before it")
                continue
            population.restore(tensors, meta)
            self.generation = int(meta["generation"])
            population.hparams = self._all_hparams()
            break
        return population

    def _all_hparams(self) -> list[HParams]:
        return [self._hparams(number) for number in self.trials]

    def _hparams(self, number: int) -> HParams:
        """All hyperparameters of a member in this generation, fixed ones included."""
        return {**self.tuner.fixed, **phase_at(self.record.trials[number], self.generation).hparams}

    def _save(self) -> Event:
        self._saved_at = time.monotonic()
        tensors, meta = self.population.state()
        return self.tuner.save(POPULATION, (tensors, {**meta, "generation": self.generation}))

    def _save_due(self) -> bool:
        return time.monotonic() - self._saved_at >= self.tuner.recipe.run.checkpoint_every_seconds

    # -- one generation --------------------------------------------------------------------------------

    def _train(self, until: int) -> bool:
        """Every living member to `until` epochs; False where it was left before, the states saved."""
        while waiting := self._waiting(until):
            chunks = self._plan(waiting)
            by_key = {chunk.key: chunk for chunk in chunks}
            segments = (self._segment(chunk, until) for chunk in chunks)
            for boundary in self.tuner.executor.run(segments, lambda: self.tuner.interrupted):
                if boundary.broken:
                    self.tuner.fall_back(by_key[boundary.key], boundary)
                    continue
                self._take(by_key[boundary.key], boundary)
            if self.tuner.interrupted:
                return False
        return not self.tuner.interrupted

    def _waiting(self, until: int) -> list[int]:
        population = self.population
        return [i for i in range(len(population)) if population.active[i] and population.epoch[i] < until]

    def _plan(self, members: Sequence[int]) -> list[Chunk]:
        """Groups by signature, as recorded; the plan of a generation is made and committed once."""
        for event in self.record.of_kind("plan"):
            if event.body.get("generation") == self.generation:
                chunks = [Chunk(**{**c, "trials": tuple(c["trials"])}) for c in event.body["chunks"]]
                break
        else:
            hparams = {self.trials[i]: self._hparams(self.trials[i]) for i in members}
            chunks = [
                dataclasses.replace(chunk, key=f"generation-{self.generation}-{chunk.trials[0]}")
                for chunk in self.tuner.planning.chunks_of(hparams)
            ]
            self.tuner.commit(self.tuner.planning.event(chunks, generation=self.generation))
            if self.generation == 0:
                self.tuner.planning.tell(chunks)
        wanted, found = {self.trials[i] for i in members}, []
        for planned in chunks:
            for chunk in self.tuner.planning.taken_apart(planned):
                if trials := tuple(number for number in chunk.trials if number in wanted):
                    found.append(dataclasses.replace(chunk, trials=trials))
        return found

    def _segment(self, chunk: Chunk, until: int) -> Segment:
        return Segment(
            key=chunk.key,
            trials=chunk.trials,
            hparams=[self._hparams(number) for number in chunk.trials],
            engine=chunk.engine,
            until_epoch=until,
            state=self.population.take([self.trials.index(number) for number in chunk.trials]).state(),
            bar=self.tuner.bar,
        )

    def _take(self, chunk: Chunk, boundary: Boundary) -> None:
        """Records what a boundary brought, and keeps the states that came with it."""
        diverged = {t: why for t, (_, why) in boundary.ended_badly.items()}
        boundary.ended_badly = {}
        events = self.tuner.events_of(boundary)
        if boundary.state is not None:
            tensors, meta = boundary.state
            rows = [self.trials.index(number) for number in chunk.trials]
            self.population.put(rows, tensors, meta)
        for done in boundary.finished:
            self.population.active[self.trials.index(done.trial)] = False
        for number, reason in diverged.items():
            self.population.active[self.trials.index(number)] = False
            body = {"trial": number, "generation": self.generation, "reason": reason}
            if not any(event.body == body for event in self.record.of_kind("diverged")):
                events.append(Event(kind="diverged", body=body))
        if boundary.state is not None and (self.tuner.interrupted or self._save_due()):
            events.append(self._save())
        self.tuner.commit(*events)
        self.tuner.drop_old_states(POPULATION)

    # -- decisions -------------------------------------------------------------------------------------

    def _decide(self, epoch: int) -> None:
        """Records the next generation's exploits, or finds them recorded, and then makes the copies."""
        following = self.generation + 1
        copies = self._recorded(following)
        if copies is None:
            exploits = self.scheduler.decide(
                self._members(epoch),
                objective=self.tuner.objective,
                space=self.tuner.recipe.space,
                seed=self.tuner.recipe.seed,
                generation=following,
            )
            copies = [{**dataclasses.asdict(e), "signature": self._signature(e.hparams)} for e in exploits]
            body = {"generation": following, "epoch": epoch, "exploits": copies}
            self.tuner.commit(Event(kind="generation", body=body))
        positions = {number: i for i, number in enumerate(self.trials)}
        self.population.copy_members({positions[c["target"]]: positions[c["source"]] for c in copies})
        self.generation = following
        self.population.hparams = self._all_hparams()
        if self._save_due():
            self.tuner.commit(self._save())
            self.tuner.drop_old_states(POPULATION)

    def _recorded(self, generation: int) -> list[dict[str, Any]] | None:
        """The exploits with which this generation began, or None where it is not decided yet."""
        decided = {e.body["generation"]: e.body["exploits"] for e in self.record.of_kind("generation")}
        return decided.get(generation)

    def _signature(self, hparams: HParams) -> str:
        return signature({**self.tuner.fixed, **hparams}, self.tuner.trainer.dynamic)

    def _members(self, epoch: int) -> list[Member]:
        metric = self.tuner.objective.metric
        return [
            Member(
                number=self.trials[i],
                epoch=self.population.epoch[i],
                hparams=phase_at(self.record.trials[self.trials[i]], self.generation).hparams,
                scores=tuple(scores(self.record.trials, self.trials[i], epoch, metric)),
                alive=self.population.active[i],
                epochs=self.epochs,
            )
            for i in range(len(self.trials))
        ]

    def _end(self) -> None:
        """Members that diverged and were not replaced have failed."""
        reasons = {event.body["trial"]: event.body["reason"] for event in self.record.of_kind("diverged")}
        left = [n for n in self.trials if not self.record.trials[n].state.is_finished]
        self.tuner.commit(*(finish_event(n, TrialState.FAILED, reasons.get(n, "diverged")) for n in left))
        self.tuner.drop_old_states(POPULATION, ended=True)
