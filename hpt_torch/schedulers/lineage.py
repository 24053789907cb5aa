"""Lineage: of which members' trainings a member's weights are made, and under which hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hpt_torch.types import HParams, Phase, Trial


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Epochs ``(after, until]`` of a lineage: who trained them, with what."""

    trial: int
    after: int
    until: int
    hparams: HParams  # the searched ones


def phases(trial: Trial) -> tuple[Phase, ...]:
    """The member's hyperparameters from its first epoch on; the first phase copies nobody."""
    return trial.phases or (Phase(generation=0, epoch=0, source=None, hparams=trial.hparams),)


def phase_at(trial: Trial, generation: int) -> Phase:
    """The phase that the member is in after the decision of this generation."""
    return [phase for phase in phases(trial) if phase.generation <= generation][-1]


def lineage(trials: Mapping[int, Trial], number: int, until: int) -> list[Stretch]:
    """How the weights that trial `number` has after `until` epochs came about, from the first epoch on."""
    stretches: list[Stretch] = []
    generation = 1 + max((phase.generation for phase in phases(trials[number])), default=0)
    while True:
        past = [p for p in phases(trials[number]) if p.generation < generation and p.epoch <= until]
        phase = past[-1]
        if phase.epoch < until:
            stretches.append(Stretch(trial=number, after=phase.epoch, until=until, hparams=phase.hparams))
        if phase.source is None:
            return stretches[::-1]
        # Before the copy the weights were the source's, as they were when that generation was decided.
        number, until, generation = phase.source, phase.epoch, phase.generation


def scores(trials: Mapping[int, Trial], number: int, until: int, metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of the metric along the lineage of the weights that the trial has now."""
    found = []
    for stretch in lineage(trials, number, until):
        for report in trials[stretch.trial].reports:
            if stretch.after < report.epoch <= stretch.until and metric in report.metrics:
                found.append((report.epoch, report.metrics[metric]))
    return found
