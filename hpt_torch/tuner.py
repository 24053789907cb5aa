"""The tuner: the loop that proposes trials, trains them, records what came of it, and goes on where it was.

The only place that sees both the deciding half (space, samplers, record) and the training half (tasks,
trainers). Everything that it does is a function of the recipe and of what is already recorded, so that
running is resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hpt_torch import checkpoint, crossval, promotion, samplers
from hpt_torch.crash import CrashLog
from hpt_torch.evolution import POPULATION, evolve
from hpt_torch.executors import Boundary, Executor, Finished, Segment
from hpt_torch.executors.segment import State
from hpt_torch.observers import Observer
from hpt_torch.planning import Planning, lasts
from hpt_torch.proposing import next_round
from hpt_torch.race import Race
from hpt_torch.recipe import Recipe, folding_of, planned_trials, pruner_of, scheduler_of, second_of
from hpt_torch.record import (
    Event,
    Record,
    StateFile,
    finish_event,
    pause_event,
    report_event,
    state_event,
)
from hpt_torch.report.confirmation import REFIT, best_of, chosen, refitted
from hpt_torch.room import Room
from hpt_torch.rundir import RunDir
from hpt_torch.steered import steered
from hpt_torch.steering import Steering, take_up
from hpt_torch.task import Task
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.trainers.planner import Chunk
from hpt_torch.types import (
    DamageError,
    HParams,
    Objective,
    Report,
    RunError,
    Trial,
    TrialState,
    writing,
)

KEEP_STATES = 2  # the newest state files of a chunk: if one is damaged, the one before serves


class Tuner:
    """One session of a run. `run` returns when every budget is used; it raises what it cannot handle."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        hparams: HParams,
        task: Task,
        objective: Objective,
        directory: RunDir,
        record: Record,
        trainers: Mapping[str, LoopTrainer],
        executor: Executor,
        crash: CrashLog,
        observers: Sequence[Observer] = (),
        should_stop: Callable[[], bool] = lambda: False,
        finish: Callable[[Tuner], None] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.recipe, self.task, self.objective = recipe, task, objective
        self.fixed = hparams  # the fixed hyperparameters, defaults included
        self.dir, self.record = directory, record
        self.trainers, self.trainer = trainers, trainers["loop"]
        self.executor = executor
        self.observers, self._should_stop, self._finish = observers, should_stop, finish
        self._notes = notes  # said at the start
        self.room = Room(directory.path, recipe.run.max_disk, lambda line: self.say(line))
        self._used_before = record.seconds_used()
        self.best = best_of(record, objective)
        self.finished = sum(trial.state.is_finished for trial in record.trials.values())
        search = recipe.search
        self.steering, self.steered = Steering(directory.path), steered(record)
        folding = folding_of(recipe)
        self.folds = folding.count if folding is not None else 0
        self.scheduler, self.pruner = scheduler_of(recipe), pruner_of(recipe)
        self.planning = Planning(
            record,
            trainers,
            recipe.trainer.engine,
            say=self.say,
            crash=crash,
            folds=self.folds,
            max_parameters=search.max_parameters,
            wants_flops=(second := second_of(recipe)) is not None and second.metric == "flops",
            lasting=lasts(recipe, self.trainer.dynamic),
        )
        self.round_size = search.round_size or samplers.ROUND_SIZES[search.sampler]
        if self.scheduler is not None and self.budget is not None:
            self.round_size = self.budget  # the population

    # -- the loop --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains until the budgets are used or a stop is asked for (then everything is saved)."""
        try:
            for observer in self.observers:
                observer.started(self)
            for note in self._notes:
                self.say(note)
            self.dir.remove_strays(self._needed_files())
            if self.scheduler is not None:
                while self._plan_round():
                    pass
                evolve(self, self.scheduler)
            while self.scheduler is None and not self.stopped:
                self._take_requests()
                if self.timed_out:  # and not extended just now
                    break
                self._check_failures()
                chunks = self.planning.open_chunks()
                if chunks and self.pruner is not None:
                    Race(self, self.pruner, chunks).run()
                elif chunks:
                    self._train(chunks)
                elif not self._plan_round() and not self._take_requests():
                    break
            if self.timed_out and not self.stopped:
                self._pause()
            if not self.stopped and self._finish is not None:
                self._finish(self)
        finally:
            for observer in self.observers:
                observer.ended(self)

    @property
    def interrupted(self) -> bool:
        """Whether training is to be left, and saved, at the next step."""
        return self.stopped or self.timed_out

    @property
    def leaving(self) -> bool:
        """Whether segments are to be left at the next step: to stop, or because a trial of one is stopped."""
        return self.interrupted or self.steering.urgent()

    @property
    def stopped(self) -> bool:
        return self._should_stop()

    @property
    def timed_out(self) -> bool:
        limit = self.recipe.search.timeout
        if limit is None:
            return False
        return self._used_before + self.record.elapsed() >= limit + self.steered.seconds

    @property
    def budget(self) -> int | None:
        """How many trials the sampler may propose; None: as many as fit into the time."""
        planned = planned_trials(self.recipe)
        return None if planned is None else planned + self.steered.trials

    @property
    def total(self) -> int | None:
        """How many trials there will be."""
        return None if self.budget is None else self.budget + len(self.steered.points)

    def hparams_of(self, trial: Trial) -> HParams:
        """All hyperparameters of a trial: the fixed ones and its own."""
        return {**self.fixed, **trial.hparams}

    # -- planning --------------------------------------------------------------------------------------

    def _plan_round(self) -> bool:
        """Proposes and records the next trials; False when there are none left to propose."""
        proposed = next_round(
            self.record, self.recipe, self.objective, size=self.round_size, budget=self.budget
        )
        rounds = [trial.round for trial in self.record.trials.values()]
        number = max(rounds, default=-1) + 1 if proposed is None else proposed.number
        promotions, going_on = promotion.promotions(self, number)
        if proposed is None and not going_on:
            return False
        events, hparams = self.planning.beginnings(proposed, self.fixed) if proposed else ([], {})
        if self.scheduler is not None:  # its members are grouped anew in every generation
            self.commit(*events)
            return True
        chunks = [*going_on, *self.planning.chunks_of(hparams, self._rounds_like(hparams))]
        self.commit(*events, self.planning.event(chunks, round=number), *promotions)
        self.planning.tell(chunks)
        return True

    def _rounds_like(self, hparams: Mapping[int, HParams]) -> int:
        """How many rounds are left that train the same programs as the next one, of these trials."""
        alike = len(hparams) == self.round_size and self.trainer.dynamic.issuperset(self.recipe.space)
        left = (self.budget or 0) + self.steered.added - len(self.record.trials)
        return max(left // self.round_size, 1) if alike else 1

    def _take_requests(self) -> bool:
        """Records what was asked of the run meanwhile; whether there was anything."""
        waiting = self.steering.waiting()
        for file, request in waiting:
            if not self.steering.is_recorded(self.record, file):
                events, said = take_up(self.record, request) if request else ([], f"{file} is no request")
                self.commit(*events)
                self.say(said)
            self.steering.remove(file)
        self.steered = steered(self.record)
        return bool(waiting)

    # -- training --------------------------------------------------------------------------------------

    def _train(self, chunks: Sequence[Chunk]) -> None:
        """Trains the chunks to their ends, or until a stop is asked for; then their states are saved."""
        by_key = {chunk.key: chunk for chunk in chunks}
        segments = (self.segment(chunk) for chunk in chunks)
        for boundary in self.executor.run(segments, lambda: self.leaving):
            chunk = by_key[boundary.key]
            if boundary.broken:
                self.fall_back(chunk, boundary)
                continue
            events = self.events_of(boundary, chunk.fold)
            if boundary.state is not None:
                events.append(self.save(chunk.key, boundary.state))
            self.commit(*events)
            self.drop_old_states(chunk.key, ended=boundary.over and boundary.state is None)
            if boundary.ended_badly:
                self._check_failures()

    def _check_failures(self) -> None:
        """Raises RunError once too many trials have failed: more of them would only cost time."""
        limit = self.recipe.run.max_failures
        failed = [t for t in self.record.in_order() if t.state is TrialState.FAILED]
        if limit is not None and len(failed) >= limit:
            raise RunError(
                f"{len(failed)} trials have failed, and run.max_failures is {limit}. The first, trial "
                f"{failed[0].number}, ended so:\n{failed[0].reason.strip()}\nMend the cause and use another "
                "run directory, or go on all the same with a larger run.max_failures"
            )

    def fall_back(self, chunk: Chunk, boundary: Boundary) -> None:
        """Records that these trials cannot go on together."""
        body = {"key": chunk.key, "reason": boundary.broken, "members": len(chunk.trials)}
        self.commit(Event(kind="fallback", body={**body, "out_of_memory": boundary.out_of_memory}))
        self.say(f"trials {list(chunk.trials)} failed together and are trained again in halves")

    def segment(self, chunk: Chunk, until_epoch: int | None = None, *, anew: bool = False) -> Segment:
        """The chunk to its end (default: the recipe's epochs), from its newest good state unless `anew`."""
        state, files = None, self.record.state_files.get(chunk.start, [])[-1:]
        files = files + ([] if anew else self.record.state_files.get(chunk.key, [])[-KEEP_STATES:])
        for file in reversed(files):
            try:
                state = checkpoint.load(self.dir.checkpoints / file.name, file.sha256)
                break
            except DamageError as error:
                if chunk.start == file.key:
                    raise  # trained again from the start it would have another engine
                self.say(f"{error}; going back to the state before it")
        return Segment(
            key=chunk.key,
            trials=chunk.trials,
            hparams=[self.hparams_of(self.record.trials[n]) for n in chunk.trials],
            engine=chunk.engine,
            until_epoch=self.recipe.trainer.epochs if until_epoch is None else until_epoch,
            state=state,
            ended=() if anew else tuple(self.steered.stopped.intersection(chunk.trials)),
            bar=self.bar if chunk.engine != REFIT else None,
            fold=chunk.fold,
        )

    @property
    def bar(self) -> float | None:
        """The best trial's score so far."""
        return self.objective.score(self.best) if self.best is not None else None

    def events_of(self, boundary: Boundary, fold: int | None = None) -> list[Event]:
        """What the boundary brought that is not recorded yet; the best weights' file is written first."""
        new = [report for report in boundary.reports if self._is_new(report, fold)]
        if fold is not None:
            return crossval.fold_events(self.record, boundary, fold, new)
        events = [report_event(report) for report in new]
        for trial, (state, reason) in boundary.ended_badly.items():
            if not self.record.trials[trial].state.is_finished:  # it may be a replay
                events.append(finish_event(trial, state, reason))
        best = self.best
        for done in boundary.finished:
            if self.record.trials[done.trial].state.is_finished:
                continue
            events.append(
                finish_event(done.trial, TrialState.COMPLETE, "", done.weights_sha256, done.kept_epoch)
            )
            if boundary.best is not None and boundary.best[0] == done.trial and self._beats(done, best):
                name, weights = f"best-{done.trial}.safetensors", boundary.best[1]
                events.append(self.write_state("best", name, weights, {"trial": done.trial}))
        return events

    def _beats(self, done: Finished, best: Trial | None) -> bool:
        """Whether it is the new best trial; where scores are equal the lower number is."""
        score = self.objective.score(best) if best is not None else None
        if best is None or score is None or done.score is None:
            return done.score is not None
        if done.score == score:
            return done.trial < best.number
        return self.objective.better(done.score, score)

    def _is_new(self, report: Report, fold: int | None) -> bool:
        """False for a report that is already recorded; a replay that differs from it is an error."""
        recorded = self.record.report_at(report.trial, report.epoch)
        if fold is not None:
            recorded = crossval.recorded(self.record, report.trial, fold, report.epoch)
        if recorded is None:
            return True
        if (report.trial, fold) in self.planning.fallen():
            return False  # trained by another engine since, which rounds differently
        if dict(recorded.metrics) != dict(report.metrics):
            name = next(n for n in recorded.metrics if recorded.metrics[n] != report.metrics.get(n))
            raise RunError(
                f"trial {report.trial} did not repeat: {name} after epoch {report.epoch} was recorded as "
                f"{recorded.metrics[name]!r} and is now {report.metrics.get(name)!r}. The environment "
                "changed (see environment.json), or the task draws random numbers that are not torch's. "
                "Nothing was overwritten"
            )
        return False

    # -- state files -----------------------------------------------------------------------------------

    def save(self, key: str, state: State) -> Event:
        """The next state file of a chunk."""
        count = len(self.record.state_files.get(key, []))
        return self.write_state(key, f"{key}-{count}.safetensors", *state)

    def write_state(self, key: str, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Event:
        """Writes a state file; it counts once the event that names it is committed."""
        with writing(self.dir.checkpoints / name):
            sha256 = checkpoint.save(self.dir.checkpoints / name, tensors, meta)
        return state_event(StateFile(name=name, sha256=sha256, key=key, meta=meta))

    def _needed_files(self) -> set[str]:
        """The state files that going on may read."""
        needed = {f.name for key in ("best", REFIT) for f in self.record.state_files.get(key, [])[-1:]}
        open_keys = [chunk.key for chunk in self.planning.open_chunks()]
        final = chosen(self.record, self.objective)
        if final is not None and refitted(self.record, final) is None:
            open_keys.append(f"refitting-{final.number}")
        if self.scheduler is not None:
            left = any(not trial.state.is_finished for trial in self.record.trials.values())
            open_keys = [POPULATION] if left else []
        for key in (*open_keys, *promotion.needed(self.record)):
            needed |= {file.name for file in self.record.state_files.get(key, [])[-KEEP_STATES:]}
        return needed

    def drop_old_states(self, key: str, *, ended: bool = False) -> None:
        """Removes what a newer committed file replaces: only now, after the commit."""
        states = self.record.state_files.get(key, [])
        old = states if ended else states[: -1 if self.room.is_full else -KEEP_STATES]
        self.dir.remove(file.name for file in (*old, *self.record.state_files.get("best", [])[:-1]))

    # -- ends ------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        """The time budget is used: what is not finished waits for a larger one. Recorded also where there is
        nothing yet, as the record would not tell the time."""
        left = [
            t.number
            for t in self.record.in_order()
            if not t.state.is_finished and t.state != TrialState.PAUSED
        ]
        if left or not self.record.trials:
            self.commit(pause_event(left))
        self.say("search.timeout is used up; go on with a larger one, e.g. search.timeout=2h")

    # -- telling ---------------------------------------------------------------------------------------

    def commit(self, *events: Event) -> None:
        """Records the events, then brings what is derived from them up to date."""
        if not events:
            return
        before = len(self.record.events)
        self.record.append(*events)
        for event in events:
            self.finished -= len(event.body["trials"]) if event.kind == "promotion" else 0
            if event.kind == "finish":
                trial = self.record.trials[event.body["trial"]]
                self.finished += 1
                ranked = self.objective.ranked(
                    [t for t in (self.best, trial) if t and t.state is TrialState.COMPLETE]
                )
                self.best = ranked[0] if ranked else None
        for observer in self.observers:
            observer.recorded(self, self.record.events[before:])

    def say(self, line: str) -> None:
        for observer in self.observers:
            observer.say(line)
