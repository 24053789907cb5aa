"""Planning: which trials train together, by which engine, as it is decided once and recorded."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

from hpt_torch.crash import CrashLog
from hpt_torch.hparams import signature
from hpt_torch.proposing import Round
from hpt_torch.recipe import Recipe, pruner_of, scheduler_of
from hpt_torch.record import Event, Record, finish_event, trial_event
from hpt_torch.trainers import base, costs, planner, sizes
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.trainers.planner import Chunk
from hpt_torch.types import HParams, TrialState


def lasts(recipe: Recipe, dynamic: frozenset[str]) -> bool:
    """Whether trials that train together do so to the end, and there is time to compile their step."""
    regroups = scheduler_of(recipe) is not None and not dynamic.issuperset(recipe.space)
    early = pruner_of(recipe) is not None or recipe.trainer.patience is not None
    return not (regroups or early or recipe.run.epoch_timeout is not None)


class Planning:
    """The chunks of a run. engine: of the recipe; `say` tells the user why they are as they are. lasting:
    trials that train together do so to the end."""

    def __init__(
        self,
        record: Record,
        trainers: Mapping[str, LoopTrainer],
        engine: str,
        *,
        say: Callable[[str], None],
        crash: CrashLog,
        folds: int = 0,
        max_parameters: int | None = None,
        wants_flops: bool = False,
        lasting: bool = True,
    ) -> None:
        self.max_parameters, self.wants_flops, self.lasting = max_parameters, wants_flops, lasting
        self._sizes: dict[str, dict[str, int]] = {}  # by signature: what is known of the model
        self.record, self.trainers, self.trainer = record, trainers, trainers["loop"]
        self.engine, self.say, self.crash, self.folds = engine, say, crash, folds
        begun = record.last("run")
        self.costs = costs.recorded(begun.body if begun is not None else {}, self.trainer.device.type)
        self.memory: int | None = self.costs.get("memory")  # bytes that trials that train together may take
        # By signature, as measured when it was first planned; 0: not known.
        self._bytes_a_member: dict[str, int] = {}
        for plan in record.of_kind("plan"):
            self._bytes_a_member |= plan.body.get("bytes_a_member", {})
        self._measured: dict[str, int] = {}  # what of these no plan has recorded yet
        # By signature without batch size, and engine: why it cannot train such trials together.
        self._reasons: dict[tuple[str, str], str | None] = {}
        self._told: set[str] = set()

    def beginnings(self, round: Round, fixed: HParams) -> tuple[list[Event], dict[int, HParams]]:
        """The events with which the round's trials begin (and at once end, where a model is too large), and
        all hyperparameters, `fixed` ones included, of those that are to be trained."""
        events, hparams = list[Event](), dict[int, HParams]()
        for trial, point in round.points.items():
            full = {**fixed, **point}
            signed = signature(full, self.trainer.dynamic)
            known = self._sizes_of(signed, trial, full)
            more = {"folds": self.folds, "added": round.added}
            events.append(trial_event(trial, round.number, point, signed, known, **more))
            count = known.get("parameters", 0)
            if self.max_parameters is not None and count > self.max_parameters:
                reason = (
                    f"its model has {count:,} trainable parameters, more than search.max_parameters allows "
                    f"({self.max_parameters:,})"
                )
                events.append(finish_event(trial, TrialState.INFEASIBLE, reason))
            else:
                hparams[trial] = full
        return events, hparams

    def _sizes_of(self, signed: str, trial: int, hparams: HParams) -> dict[str, int]:
        """Some of `types.SIZES`: a function of the static hyperparameters, so known once a signature. Empty
        where the model cannot be built, which training will tell."""
        if signed in self._sizes:
            return self._sizes[signed]
        found = self._sizes[signed] = {}
        if self.crash.note(f"building {signed}"):
            return found
        trainer = self.trainer
        with contextlib.suppress(Exception):
            valid = trainer.data.valid
            model = base.build(trainer.task, hparams, trial, trainer.seed, valid).to(trainer.dtype)
            found["parameters"] = sizes.parameters(model, hparams["freeze"])  # type: ignore[arg-type]
            if self.wants_flops:
                found["flops"] = sizes.flops(trainer.task, model, base.one_row(valid))
        self.crash.note("")
        return found

    def chunks_of(self, hparams: Mapping[int, HParams], rounds: int = 1) -> list[Chunk]:
        """How trials with these hyperparameters (fixed ones included) are to be trained. rounds: that are
        left of the search, this one included, and train the same programs."""
        signatures = {trial: signature(full, self.trainer.dynamic) for trial, full in hparams.items()}
        # No longer than the plan, which a run that goes on finds recorded: later it would be of other trials.
        known: dict[Hashable, int] = {}
        return planner.plan(
            list(signatures.items()),
            engine=self.engine,
            device=self.trainer.device.type,
            slow=frozenset(self.costs["slow"]),
            traits=lambda trial: self.trainer.traits(hparams[trial], trial),
            why_not=lambda trials, engine: self._why_not(
                engine, trials, [hparams[trial] for trial in trials]
            ),
            pays=lambda trials, groups: self._pays(trials, hparams[trials[0]], groups, rounds),
            holds=lambda trials: self._holds(
                signatures[trials[0]], trials[:2], [hparams[trial] for trial in trials[:2]], known
            ),
            steps=lambda trial: self.steps(hparams[trial]),
            folds=self.folds,
            fits=self.fits(),
        )

    def steps(self, hparams: HParams) -> int:
        """How many optimizer steps such a trial takes in an epoch."""
        return self.trainer.order.batches(int(str(hparams["batch_size"])))

    def fits(self) -> int | None:
        """How many trials the memory holds at once, as far as groups that ran out of it have shown."""
        full = [e.body["members"] for e in self.record.of_kind("fallback") if e.body.get("out_of_memory")]
        return max(min(full) // 2, 1) if full else None

    def _why_not(self, engine: str, trials: Sequence[int], hparams: Sequence[HParams]) -> str | None:
        """Why this engine cannot train these trials together. A model that cannot be built is the loop's to
        tell."""
        signed = signature(hparams[0], self.trainer.dynamic | {"batch_size"})
        key, doing = (signed, engine), f"mapping {signed}" if engine == "fused" else f"recording {signed}"
        if key not in self._reasons and self.crash.note(doing):
            self._reasons[key] = "it crashed the process"
        elif key not in self._reasons:
            together = self.trainers[engine]
            assert isinstance(together, FusedTrainer)
            try:
                self._reasons[key] = together.why_not(together.init(trials, hparams))
            except Exception as error:
                self._reasons[key] = f"its model cannot be built ({error})"
            self.crash.note("")
        return self._reasons[key]

    def _pays(self, trials: Sequence[int], hparams: HParams, groups: int, rounds: int) -> str | None:
        """Why it pays to compile the step of these trials, of which the first has these hyperparameters, or
        None. Of so many groups like theirs a worker is taken to train half: that is measured for two."""
        if not self.lasting:
            return None  # their number would change, and each number is another program
        members = len(trials)
        if (signature(hparams, self.trainer.dynamic), members) in self._compiled():
            return f"{members} trials of one signature, whose step is compiled already"
        steps = self.trainer.epochs * self.steps(hparams)
        traits = self.trainer.traits(hparams, trials[0])
        after = costs.saved_after(self.costs.get("pays_after", {}), traits, members)
        if steps * rounds * max(groups / 2, 1) < after:
            return None
        often = f", in {groups} groups" if groups > 2 else ""
        often += f", in {rounds} rounds" if rounds > 1 else ""
        return f"{members} trials of {steps:,} steps{often}: compiling pays after {after:,.0f}"

    def _compiled(self) -> set[tuple[str, int]]:
        """(signature, members) of the chunks so far that were to be compiled."""
        chunks = [chunk for plan in self.record.of_kind("plan") for chunk in plan.body["chunks"]]
        found = [chunk["trials"] for chunk in chunks if chunk["engine"] == "compiled"]
        return {(self.record.trials[trials[0]].signature, len(trials)) for trials in found}

    def _holds(
        self, signed: str, trials: Sequence[int], hparams: Sequence[HParams], known: dict[Hashable, int]
    ) -> int | None:
        """How many trials of this signature the memory holds at once, measured with these two where no plan
        has recorded it; None: any number, or not known."""
        if self.memory is None:
            return None
        if signed not in self._bytes_a_member:
            fused, needed = self.trainers["fused"], self.memory + 1  # not even two: each is alone
            assert isinstance(fused, FusedTrainer)
            if not self.crash.note(f"measuring {signed}"):
                try:
                    few = self.memory / max(planner.LARGEST.values())
                    needed = fused.bytes_a_member(fused.init(trials, hparams), few, known)
                except Exception as error:  # user code
                    if not base.is_out_of_memory(error):
                        self.say(f"how much memory trials like {trials[0]} take is not known: {error!r}")
                        needed = 0
            self.crash.note("")
            self._bytes_a_member[signed] = self._measured[signed] = needed
        needed = self._bytes_a_member[signed]
        return self.memory // needed if needed else None

    def event(self, chunks: Sequence[Chunk], **about: int) -> Event:
        """The plan, with all that going on must not decide anew. about: its round, or generation."""
        measured, self._measured = self._measured, {}
        body = {**about, "chunks": [dataclasses.asdict(chunk) for chunk in chunks]}
        return Event(kind="plan", body=body | ({"bytes_a_member": measured} if measured else {}))

    def tell(self, chunks: Sequence[Chunk]) -> None:
        """Says once, for each reason, why trials are trained as they are."""
        for chunk in chunks:
            alone = chunk.engine not in planner.TOGETHER
            together = "one by one" if alone else f"{len(chunk.trials)} trials at once"
            line = f"engine {chunk.engine}: {together} ({chunk.why})"
            if chunk.start:
                line = f"trial {chunk.trials[0]} goes on, {chunk.why}"
            elif alone and "mapped" not in chunk.why and "memory" not in chunk.why:
                continue
            if line not in self._told:
                self._told.add(line)
                self.say(line)

    def open_chunks(self) -> list[Chunk]:
        """The planned chunks that still have unfinished trials, in their recorded order."""
        plan = self.record.last("plan")
        chunks = self._planned(plan) if plan is not None else []
        return [c for c in chunks if not all(self.is_done(n, c.fold) for n in c.trials)]

    def chunk_of(self, number: int) -> Chunk:
        """The chunk in which this trial was trained, the last one."""
        chunks = [chunk for plan in self.record.of_kind("plan") for chunk in self._planned(plan)]
        return next(chunk for chunk in reversed(chunks) if number in chunk.trials)

    def _planned(self, plan: Event) -> list[Chunk]:
        chunks = [Chunk(**{**c, "trials": tuple(c["trials"])}) for c in plan.body["chunks"]]
        return [piece for chunk in chunks for piece in self.taken_apart(chunk)]

    def taken_apart(self, chunk: Chunk) -> list[Chunk]:
        """The chunk; where its trials could not go on together its halves, in their turn: in the end the
        culprit is alone, and the others have trained together."""
        if not any(event.body["key"] == chunk.key for event in self.record.of_kind("fallback")):
            return [chunk]
        middle, pieces = len(chunk.trials) // 2, []
        for name, trials in (("a", chunk.trials[:middle]), ("b", chunk.trials[middle:])):
            engine = "loop" if len(trials) == 1 else chunk.engine
            half = Chunk(f"{chunk.key}-{name}", trials, engine, "fell back", chunk.fold)
            pieces += self.taken_apart(half) if trials else []
        return pieces

    def is_done(self, number: int, fold: int | None) -> bool:
        """Whether nothing is left to train of this trial (on this fold)."""
        trial = self.record.trials[number]
        return trial.state.is_finished or (fold is not None and trial.folds[fold].state.is_finished)

    def fallen(self) -> set[tuple[int, int | None]]:
        """(trial, fold) of the chunks that could not go on together."""
        plans = [chunk for plan in self.record.of_kind("plan") for chunk in plan.body["chunks"]]
        fallen = {event.body["key"] for event in self.record.of_kind("fallback")}
        return {(n, c.get("fold")) for c in plans if c["key"] in fallen for n in c["trials"]}
