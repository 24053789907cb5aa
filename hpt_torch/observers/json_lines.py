"""One JSON object a line for other programs: what `hpt run --json-lines` writes to standard output."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from hpt_torch.record import Event
from hpt_torch.space import thaw
from hpt_torch.tuner import Tuner
from hpt_torch.types import RunError, Trial


def own_stdout() -> TextIO:
    """Standard output for this observer alone: what tasks print goes to standard error, also in workers."""
    sys.stdout.flush()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


class JsonLinesObserver:
    """Writes `started`, `round`, `trial`, `best`, `message` and `end`, each as it happens.

    `started` comes again for every baseline and its run directory; a number that is not finite is a string
    ("inf", "nan"), which JSON does not have.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._best: int | None = None

    def started(self, tuner: Tuner) -> None:
        self._best = None if tuner.best is None else tuner.best.number
        self._write(
            "started",
            run=str(tuner.dir.path),
            name=tuner.recipe.name,
            metric=tuner.objective.metric,
            direction=tuner.objective.direction,
            trials=tuner.total,
            epochs=tuner.recipe.trainer.epochs,
            device=str(tuner.trainer.device),
            finished=tuner.finished,
            best=_told(tuner, tuner.best),
        )

    def recorded(self, tuner: Tuner, events: Sequence[Event]) -> None:
        for event in events:
            match event.kind:
                case "plan" if "round" in event.body:
                    self._write("round", round=event.body["round"], trials=len(tuner.record.trials))
                case "generation":
                    copies = len(event.body["exploits"])
                    self._write(
                        "round", generation=event.body["generation"], epoch=event.body["epoch"], copies=copies
                    )
                case "finish":
                    trial = tuner.record.trials[event.body["trial"]]
                    self._write("trial", **(_told(tuner, trial) or {}), finished=tuner.finished)
        if tuner.best is not None and tuner.best.number != self._best:
            self._best = tuner.best.number
            self._write("best", **(_told(tuner, tuner.best) or {}))

    def ended(self, tuner: Tuner) -> None:
        state = "failed" if sys.exception() is not None else "stopped" if tuner.stopped else "finished"
        reading = tuner.record.last("holdout")
        self._write(
            "end",
            state=state,
            run=str(tuner.dir.path),
            finished=tuner.finished,
            seconds=round(tuner.record.elapsed(), 3),
            best=_told(tuner, tuner.best),
            holdout={} if reading is None else reading.body["metrics"],
        )

    def say(self, line: str) -> None:
        self._write("message", text=line)

    def _write(self, event: str, **body: Any) -> None:
        try:
            self.stream.write(json.dumps(_plain({"event": event, **body}), allow_nan=False) + "\n")
            self.stream.flush()
        except BrokenPipeError as error:
            # Python would flush once more at its end, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            raise RunError(
                "the program that read the JSON lines has ended. Everything recorded is intact: "
                "the same command goes on"
            ) from error


def _told(tuner: Tuner, trial: Trial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {
        "trial": trial.number,
        "state": trial.state.value,
        "score": tuner.objective.score(trial),
        "epoch": trial.epoch,
        "hparams": dict(trial.hparams),
        "metrics": dict(trial.metrics),
        "reason": trial.reason.strip(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in thaw(value)]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
