"""The last training: the chosen trial once more, on the rows of train and valid together.

With cross-validation it gives the model, for those of the folds have each seen only a part of the rows.
Otherwise its figure on the hold-out rows stands beside the chosen model's; it is never a candidate itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpt_torch.record import REFIT, Event, Record, refitted
from hpt_torch.trainers.planner import Chunk
from hpt_torch.types import Trial

if TYPE_CHECKING:
    from hpt_torch.tuner import Tuner


def refit(tuner: Tuner, trial: Trial) -> None:
    """Trains the trial again unless that is done; leaves, with its state saved, where a stop is asked for."""
    if refitted(tuner.record, trial) is not None or _has_failed(tuner.record, trial):
        return
    chunk = Chunk(f"refitting-{trial.number}", (trial.number,), "refit", "the chosen trial")
    segment = tuner.segment(chunk, until_epoch=trial.kept_epoch)
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
