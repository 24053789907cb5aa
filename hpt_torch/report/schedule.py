"""The schedule that the best trial ended with: its ancestors' hyperparameters, from the first epoch on."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Mapping
from typing import Any

from hpt_torch.needs import still_read
from hpt_torch.report.summary import Summary
from hpt_torch.schedulers.lineage import Stretch, lineage
from hpt_torch.space import thaw


def best_schedule(summary: Summary) -> list[Stretch]:
    """Who trained the best trial's weights, in which epochs, with what; one stretch where nothing changed."""
    assert summary.best is not None
    trials = {trial.number: trial for trial in summary.trials}
    return lineage(trials, summary.best.number, summary.best.kept_epoch or summary.best.epoch)


def schedule_csv(summary: Summary) -> str:
    """One row an epoch: the epoch (from 1), the trial that trained it, the searched hyperparameters."""
    names = list(summary.space)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", "trial", *names])
    for stretch in best_schedule(summary):
        for epoch in range(stretch.after + 1, stretch.until + 1):
            writer.writerow([epoch, stretch.trial, *(thaw(stretch.hparams.get(name, "")) for name in names)])
    return text.getvalue()


def schedule_recipe(recipe: Mapping[str, Any], summary: Summary) -> dict[str, Any]:
    """The run's recipe with nothing left to search: one trial with the best one's hyperparameters, which
    change as they did on the way to it. What is read only under other options is not in it."""
    first, *later = best_schedule(summary)
    changes, now = [], dict(first.hparams)
    for stretch in later:
        new = {name: value for name, value in stretch.hparams.items() if now.get(name) != value}
        now.update(new)
        if new:
            changes.append({"after": stretch.after, **{name: thaw(value) for name, value in new.items()}})
    raw = {name: copy.deepcopy(section) for name, section in recipe.items() if name != "search"}
    raw["trainer"] = {n: value for n, value in raw.get("trainer", {}).items() if n != "devices"}  # one trial
    hparams = {**raw["hparams"], **{name: thaw(value) for name, value in first.hparams.items()}}
    return raw | {
        "name": f"{recipe['name'][:55]}-schedule",
        "hparams": still_read(hparams, recipe["space"]),
        "space": {},
        "scheduler": {"kind": "schedule", "changes": changes} if changes else {},
    }
