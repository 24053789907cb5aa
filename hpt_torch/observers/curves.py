"""What TensorBoard shows of a trial: curves, text for what a curve cannot say, and how both are laid out."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from tensorboard.plugins.custom_scalar import layout_pb2

from hpt_torch import lr_schedules
from hpt_torch.report.terminal import show_value
from hpt_torch.schedulers.lineage import phases
from hpt_torch.tuner import Tuner
from hpt_torch.types import HParams, Phase, Report, Trial, TrialState, is_number

_SCHEDULED = ("warmup_epochs", "step_epochs", "step_gamma", "exponential_gamma", "cosine_min",
              "one_cycle_start", "one_cycle_div", "one_cycle_final_div")  # fmt: skip


def values(tuner: Tuner, trial: Trial, report: Report) -> Iterator[tuple[str, float]]:
    """The metrics, how far train is ahead of valid, and with which hyperparameters the epoch was trained."""
    yield from report.metrics.items()
    yield "time/epoch_seconds", report.seconds
    for name, sign in _compared(tuner).items():
        train, valid = report.metrics.get(f"train/{name}"), report.metrics.get(f"valid/{name}")
        if train is not None and valid is not None:
            yield f"gap/{name}", sign * (train - valid)
    phase = _phase_of(trial, report.epoch)
    yield "lr", _lr(tuner, {**tuner.fixed, **phase.hparams}, report.epoch)
    for name in _shown(tuner):
        value = phase.hparams.get(name)
        if is_number(value):
            yield f"hparams/{name}", float(value)  # type: ignore[arg-type]
    if _copied(trial, phase, report.epoch):
        yield "pbt/copied_trial", float(phase.source)  # type: ignore[arg-type]


def copy_text(trial: Trial, report: Report) -> str:
    """Whom the member copied just before this epoch, and what was changed then; "" where it went on."""
    phase = _phase_of(trial, report.epoch)
    if not _copied(trial, phase, report.epoch):
        return ""
    before = _phase_of(trial, report.epoch - 1).hparams
    changes = [
        f"{name} {show_value(before[name])} → {show_value(value)}"
        for name, value in phase.hparams.items()
        if name in before and before[name] != value
    ]
    head = f"After epoch {phase.epoch} (generation {phase.generation}) a copy of **trial {phase.source}**"
    return f"{head}; {', '.join(changes)}" if changes else head


def end_text(trial: Trial) -> str:
    """Why the trial ended before its time; "" for one that did not."""
    if trial.state is TrialState.COMPLETE:
        return ""
    indented = "\n".join(f"    {line}" for line in trial.reason.strip().splitlines())  # as it is, in Markdown
    return f"**{trial.state.value}** after epoch {trial.epoch}\n\n{indented}".rstrip()


def layout(tuner: Tuner) -> layout_pb2.Layout:
    """Charts for the Custom Scalars tab: train and valid in one, then what they were trained with."""
    compared = list(_compared(tuner))
    charts = {
        "Learning": {
            **{f"{name}, train and valid": [f"train/{name}", f"valid/{name}"] for name in compared},
            **{f"{name}, gap (positive: better on train)": [f"gap/{name}"] for name in compared},
        },
        "Hyperparameters": {
            "lr, mean of the epoch": ["lr"],
            **{name: [f"hparams/{name}"] for name in _shown(tuner) if name != "lr"},
        },
        "Training": {"seconds of an epoch": ["time/epoch_seconds"]},
    }
    clips = ("grad_clip_norm", "grad_clip_value")
    if any(name in tuner.recipe.space or is_number(tuner.fixed.get(name)) for name in clips):
        charts["Training"] |= {
            "norm of the gradient": ["train/grad_norm"],
            "share of steps that were clipped": ["train/clipped_share"],
        }
    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=title,
                chart=[
                    layout_pb2.Chart(
                        title=chart,
                        multiline=layout_pb2.MultilineChartContent(tag=[f"^{re.escape(t)}$" for t in tags]),
                    )
                    for chart, tags in found.items()
                ],
            )
            for title, found in charts.items()
        ]
    )


def _compared(tuner: Tuner) -> dict[str, float]:
    """What is measured on train and valid alike -> 1 where more is better, else -1."""
    metric = tuner.objective.metric.removeprefix("valid/")
    return {metric: 1.0 if tuner.objective.direction == "maximize" else -1.0} | (
        {"loss": -1.0} if metric != "loss" else {}
    )


def _shown(tuner: Tuner) -> list[str]:
    """The searched hyperparameters that may change while a trial trains."""
    names = tuner.recipe.space
    return list(names) if tuner.scheduler is not None else [n for n in names if n in tuner.trainer.dynamic]


def _phase_of(trial: Trial, epoch: int) -> Phase:
    """The phase in which this epoch (1-based) was trained; the first one for what lies before it."""
    parts = phases(trial)
    return next((phase for phase in reversed(parts) if phase.epoch < epoch), parts[0])


def _copied(trial: Trial, phase: Phase, epoch: int) -> bool:
    return phase.source is not None and phase.source != trial.number and phase.epoch == epoch - 1


def _lr(tuner: Tuner, hparams: HParams, epoch: int) -> float:
    """The mean learning rate of the epoch's steps (of a fold, of about as many)."""
    lr, schedule = float(hparams["lr"]), str(hparams["schedule"])  # type: ignore[arg-type]
    if schedule == "constant" and not hparams["warmup_epochs"]:
        return lr
    settings = tuple((name, float(hparams[name])) for name in _SCHEDULED)  # type: ignore[arg-type]
    batches = tuner.trainer.order.batches(int(hparams["batch_size"]))  # type: ignore[arg-type]
    return lr * _factor(schedule, epoch - 1, batches, tuner.recipe.trainer.epochs, settings)


@functools.lru_cache(maxsize=4096)  # the members of a group differ in lr, but hardly in these
def _factor(
    schedule: str, epoch: int, batches: int, epochs: int, settings: tuple[tuple[str, float], ...]
) -> float:
    return float(lr_schedules.factors(schedule, epoch, batches, epochs, dict(settings)).mean())
