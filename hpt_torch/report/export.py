"""Derived files: `trials.csv`, `best/`, `report.html`. Made from the record, so they can be deleted."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
from pathlib import Path
from typing import Any

import tomli_w

from hpt_torch.record import Record, StateFile
from hpt_torch.report.confirmation import refitted, weights_of
from hpt_torch.report.page import page
from hpt_torch.report.schedule import schedule_csv, schedule_recipe
from hpt_torch.report.summary import Summary
from hpt_torch.space import thaw
from hpt_torch.types import DamageError, Trial, writing

_log = logging.getLogger(__name__)


def trials_csv(summary: Summary) -> str:
    """One row a trial: number, state, searched hyperparameters, last metrics, epochs, seconds, reason."""
    summary = summary.as_searched
    hparams = sorted({name for trial in summary.trials for name in trial.hparams})
    metrics = sorted({name for trial in summary.trials for name in trial.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "state", *hparams, *metrics, *summary.sizes, "epoch", "seconds", "reason"])
    for trial in summary.trials:
        reason = trial.reason.strip().splitlines()[-1] if trial.reason.strip() else ""
        seconds = round(sum(report.seconds for report in trial.reports), 4)
        writer.writerow(
            [
                trial.number,
                trial.state.value,
                *(_cell(trial.hparams.get(name)) for name in hparams),
                *(trial.metrics.get(name, "") for name in metrics),
                *(_cell(getattr(trial, name)) for name in summary.sizes),
                trial.epoch,
                seconds,
                _cell(reason),
            ]
        )
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Lists as text; a text that a spreadsheet would run as a formula is quoted."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return str(thaw(value))
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def write_exports(record: Record, summary: Summary, path: Path) -> None:
    """Writes `trials.csv` and, once a trial is complete, `best/`: its weights, its hyperparameters, and,
    where those changed on the way, the schedule and a recipe that trains with it.

    Raises DamageError where the best weights are not the ones that were recorded, RunError where the disk is
    full or broken.
    """
    with writing(path / "trials.csv"):
        (path / "trials.csv").write_text(trials_csv(summary))
    if summary.best is None:
        return
    best = path / "best"
    with writing(best):
        _write_best(record, summary, summary.best, path, best)


def _write_best(record: Record, summary: Summary, trial: Trial, path: Path, best: Path) -> None:
    best.mkdir(exist_ok=True)
    again = refitted(record, trial)
    file = weights_of(record, trial)
    if file is not None:
        (best / "weights.safetensors").write_bytes(_read(path, file))
    if again is not None and again is not file:
        (best / "refit.safetensors").write_bytes(_read(path, again))
    (best / "hparams.toml").write_text(hparams_toml(summary))
    if trial.phases:
        (best / "schedule.csv").write_text(schedule_csv(summary))
        recipe = schedule_recipe(record.of_kind("run")[0].body["recipe"], summary)
        (best / "schedule.toml").write_text(tomli_w.dumps(recipe))


def _read(path: Path, file: StateFile) -> bytes:
    """The bytes of a weights file of the run at `path`, which must be those that were recorded."""
    source = path / "checkpoints" / file.name
    try:
        data = source.read_bytes()
    except OSError as error:
        raise DamageError(f"the best trial's weights, {source}, cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamageError(
            f"the best trial's weights, {source}, are damaged: their SHA-256 is not the recorded one"
        )
    return data


def hparams_toml(summary: Summary) -> str:
    """The best trial's hyperparameters and metrics as a TOML document."""
    best = summary.best
    assert best is not None
    hparams = {
        name: thaw(value) for name, value in sorted(summary.full_hparams(best).items()) if value is not None
    }
    metrics = {name: value for name, value in sorted(best.metrics.items()) if math.isfinite(value)}
    return tomli_w.dumps({"trial": best.number, "hparams": hparams, "metrics": metrics})


def write_page(record: Record, summary: Summary, path: Path) -> Path | None:
    """Writes `report.html` and returns where it is; None, with a line in the log, where that fails.

    A run's result is safe before its page is drawn, so nothing that goes wrong here may fail the run.
    """
    target = path / "report.html"
    try:
        target.write_bytes(page(record, summary).encode("utf-8", "replace"))  # names may hold lone surrogates
    except Exception as error:
        _log.warning("%s could not be written: %s: %s", target, type(error).__name__, error)
        return None
    return target
