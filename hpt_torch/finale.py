"""The end of a run: the best trials are confirmed, one is chosen, trained again, and its hold-out rows read.

Each of these only where the recipe asks for it, in this order, once. The last training is on the rows of
train and valid together. With cross-validation, and after a confirmation, it gives the model, for there is no
other. Else its hold-out figure stands beside the chosen model's; it is never a candidate itself.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hpt_torch import checkpoint
from hpt_torch.recipe import refits
from hpt_torch.record import Event, Record, StateFile, state_event
from hpt_torch.report.confirmation import REFIT, chosen, refitted, weights_of
from hpt_torch.trainers.base import evaluate
from hpt_torch.trainers.bootstrap import intervals
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.trainers.planner import Chunk
from hpt_torch.types import DamageError, Trial

if TYPE_CHECKING:
    from hpt_torch.tuner import Tuner


def choose(tuner: Tuner) -> None:
    """The end of the run. Raises Interrupted where a stop is asked for during a confirmation."""
    if tuner.recipe.final.confirm is not None:
        from hpt_torch.confirm import confirm  # which runs sessions of its own

        confirm(tuner)
    best = chosen(tuner.record, tuner.objective)
    if best is None:
        return
    if refits(tuner.recipe):
        refit(tuner, best)
    kept, again = weights_of(tuner.record, best), refitted(tuner.record, best)
    for file in [kept] if kept is again else [kept, again]:
        if file is not None:
            _see_whole(tuner, best, file)
    if not tuner.stopped:
        _read_holdout(tuner, best)


def _see_whole(tuner: Tuner, trial: Trial, file: StateFile) -> None:
    """Makes a file of weights again that is damaged: by the same training, to the same bytes. Leaves where a
    stop is asked for. Raises DamageError where the training cannot be repeated."""
    path = tuner.dir.checkpoints / file.name
    try:
        checkpoint.load(path, file.sha256)
        return
    except DamageError as error:
        if tuner.scheduler is not None:  # its weights have passed through members that are gone
            raise DamageError(
                f"{error}; restore it from a backup, or run again with another --run-dir"
            ) from error
        tuner.say(f"{error}; training it again")
    if file.key == REFIT:
        segment = tuner.segment(_last_training(trial), trial.kept_epoch, anew=True)
    else:
        segment = tuner.segment(tuner.planning.chunk_of(trial.number), anew=True)
    segment, weights = dataclasses.replace(segment, bar=None), None
    for boundary in tuner.executor.run(iter([segment]), lambda: tuner.stopped):
        if boundary.best is not None and boundary.best[0] == trial.number:
            weights = boundary.best[1]
    if tuner.stopped:
        return
    wanted = file.meta.get("weights_sha256", trial.weights_sha256)
    if weights is None or checkpoint.weights_sha256(weights) != wanted:
        raise DamageError(
            f"{path} is damaged, and training trial {trial.number} again gave other weights: the environment "
            "changed (see environment.json). Restore the file from a backup"
        )
    made = tuner.write_state(file.key, file.name, weights, dict(file.meta))
    if made != state_event(file):  # another version of safetensors
        tuner.commit(made)


def _last_training(trial: Trial) -> Chunk:
    return Chunk(f"refitting-{trial.number}", (trial.number,), "refit", "the chosen trial")


def refit(tuner: Tuner, trial: Trial) -> None:
    """Trains the trial again unless that is done; leaves, with its state saved, where a stop is asked for."""
    if refitted(tuner.record, trial) is not None or _has_failed(tuner.record, trial):
        return
    chunk = _last_training(trial)
    segment = tuner.segment(chunk, trial.kept_epoch)
    tuner.say(f"training trial {trial.number} on train and valid rows together, {trial.kept_epoch} epochs")
    for boundary in tuner.executor.run(iter([segment]), lambda: tuner.stopped):
        events = []
        if boundary.state is not None:
            events.append(tuner.save(chunk.key, boundary.state))
        for _, reason in boundary.ended_badly.values():
            events.append(Event(kind="refit_failed", body={"trial": trial.number, "reason": reason}))
            tuner.say(f"that training failed: {reason.strip().splitlines()[-1]}")
        if boundary.best is not None:
            meta = {"trial": trial.number, "weights_sha256": boundary.finished[0].weights_sha256}
            name = f"{REFIT}-{trial.number}.safetensors"
            events.append(tuner.write_state(REFIT, name, boundary.best[1], meta))
        tuner.commit(*events)
        tuner.drop_old_states(chunk.key, ended=boundary.over and boundary.state is None)


def _has_failed(record: Record, trial: Trial) -> bool:
    return any(event.body["trial"] == trial.number for event in record.of_kind("refit_failed"))


def _read_holdout(tuner: Tuner, best: Trial) -> None:
    """Scores the chosen model on the hold-out rows: once, after the search, only to report it."""
    data, read = tuner.trainer.data, tuner.record.last("holdout")
    file, again = weights_of(tuner.record, best), refitted(tuner.record, best)
    if data.holdout is None or file is None:
        return  # none are held out, or the last training failed
    of = {"trial": best.number, "weights": file.sha256}
    if read is not None and read.body.items() >= of.items():
        return
    trainer = tuner.trainers[REFIT] if file is again else tuner.trainer
    metrics, interval = _held_out(tuner, trainer, best, file)
    body: dict[str, Any] = {**of, "metrics": metrics, "interval": interval}
    if again is not None and again is not file:
        body["refit"], _ = _held_out(tuner, tuner.trainers[REFIT], best, again)
    tuner.commit(Event(kind="holdout", body={**body, "rows": len(data.holdout)}))


def _held_out(
    tuner: Tuner, trainer: LoopTrainer, trial: Trial, file: StateFile
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The metrics of these weights on the hold-out rows, and their bootstrap intervals."""
    rows = trainer.data.holdout
    assert rows is not None
    weights, _ = checkpoint.load(tuner.dir.checkpoints / file.name, file.sha256)
    model = trainer.load(tuner.hparams_of(trial), trial.number, weights)
    found, bounds = evaluate(tuner.task, model, rows), dict[str, tuple[float, float]]()
    try:
        bounds = intervals(tuner.task, model, rows, tuner.recipe.seed)
    except Exception as error:  # user code, on few rows or on one class alone; the figure itself is there
        tuner.say(f"the hold-out figure has no bootstrap interval ({type(error).__name__}: {error})")
    return {f"holdout/{n}": v for n, v in found.items()}, {f"holdout/{n}": v for n, v in bounds.items()}
