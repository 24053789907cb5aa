"""Cross-validation in the record: what folds report, and what follows from it for their trials.

Folds of a trial train in chunks of their own, in any order. A trial's report of an epoch is the mean of its
folds', recorded with the last of them; a trial ends when all of its folds have.
"""

from __future__ import annotations

import hashlib

from hpt_torch.executors import Boundary
from hpt_torch.record import Event, Record, finish_event, report_event, with_fold
from hpt_torch.types import Report, Trial, TrialState, means


def recorded(record: Record, trial: int, fold: int, epoch: int) -> Report | None:
    """The fold's report of this epoch, where it is recorded."""
    return next((r for r in reversed(record.trials[trial].folds[fold].reports) if r.epoch == epoch), None)


def fold_events(record: Record, boundary: Boundary, fold: int, new: list[Report]) -> list[Event]:
    """What the boundary of a chunk of this fold brought, and what follows for its trials.

    new: its reports that are not recorded yet.
    """
    events = [Event(kind="fold_report", body={**vars(report), "fold": fold}) for report in new]
    for number, (state, reason) in boundary.ended_badly.items():
        events.append(_fold_finish(number, fold, state, reason, "", 0))
    for done in boundary.finished:
        events.append(
            _fold_finish(done.trial, fold, TrialState.COMPLETE, "", done.weights_sha256, done.kept_epoch)
        )
    after: dict[int, Trial] = {}
    kept = []
    for event in events:
        number = event.body["trial"]
        trial = after.get(number, record.trials[number])
        if trial.state.is_finished or trial.folds[fold].state.is_finished:
            continue  # a replay of what is recorded
        after[number] = with_fold(trial, event)
        kept.append(event)
    return kept + [event for trial in after.values() for event in _following(trial)]


def _fold_finish(
    number: int, fold: int, state: TrialState, reason: str, weights_sha256: str, kept_epoch: int
) -> Event:
    body = finish_event(number, state, reason, weights_sha256, kept_epoch).body
    return Event(kind="fold_finish", body={**body, "fold": fold})


def _following(trial: Trial) -> list[Event]:
    """The reports and the end of a trial that its folds now allow."""
    events = []
    for epoch in range(len(trial.reports), min(len(fold.reports) for fold in trial.folds)):
        reports = [fold.reports[epoch] for fold in trial.folds]
        events.append(
            report_event(
                Report(
                    trial=trial.number,
                    epoch=reports[0].epoch,
                    metrics=means([report.metrics for report in reports]),
                    seconds=sum(report.seconds for report in reports),
                )
            )
        )
    if all(fold.state.is_finished for fold in trial.folds):
        events.append(end_of(trial))
    return events


def end_of(trial: Trial) -> Event:
    """The end of a trial whose folds have ended, or of which one has failed."""
    for number, fold in enumerate(trial.folds):
        if fold.state.is_finished and fold.state is not TrialState.COMPLETE:
            where = f"fold {number + 1} of {len(trial.folds)}: {fold.reason}"
            infeasible = fold.state is TrialState.INFEASIBLE
            return finish_event(trial.number, fold.state, fold.reason if infeasible else where)
    digest = hashlib.sha256("".join(fold.weights_sha256 for fold in trial.folds).encode()).hexdigest()
    kept = round(sum(fold.kept_epoch for fold in trial.folds) / len(trial.folds))
    return finish_event(trial.number, TrialState.COMPLETE, "", digest, kept)


def has_failed(trial: Trial) -> bool:
    """Whether one of its folds has ended badly."""
    return any(f.state.is_finished and f.state is not TrialState.COMPLETE for f in trial.folds)
