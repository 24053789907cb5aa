"""TensorBoard files: one folder a trial, with its curves and its HParams record.

Written in TensorBoard's own record format, without a writer thread or an open file a trial. The files are
derived from the record: the first write of a session to a trial's folder makes the folder anew, so a resumed
run has each step once. A file is complete when its last record ends the trial's session (a marker file would
cost as much as all that is written into this one).
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event as EventProto
from tensorboard.compat.proto.summary_pb2 import Summary as SummaryProto
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.text import metadata as text_metadata

from hpt_torch.observers import curves
from hpt_torch.observers.record_file import framed
from hpt_torch.record import Event
from hpt_torch.space import Choice, thaw
from hpt_torch.tuner import Tuner
from hpt_torch.types import Trial, TrialState, writing

_WRITE_EVERY_SECONDS = 2.0


class TensorBoardObserver:
    """Keeps `tensorboard/trial-00012/` up to date with trial 12's reports."""

    def __init__(self) -> None:
        self._files: dict[int, Path] = {}  # of this session
        self._written: dict[int, int] = {}  # reports that are in the file
        self._told: dict[int, float] = {}

    def started(self, tuner: Tuner) -> None:
        """Writes again what a killed session left incomplete."""
        for trial in tuner.record.in_order():
            if trial.state.is_finished and not _is_complete(self._folder(tuner, trial.number)):
                self._write(tuner, trial)

    def recorded(self, tuner: Tuner, events: Sequence[Event]) -> None:
        finished = {event.body["trial"] for event in events if event.kind == "finish"}
        reported = {event.body["trial"] for event in events if event.kind == "report"}
        for number in sorted(finished | reported):
            # A short trial is written once, at its end: opening a file costs as much as ten epochs of curves.
            now = time.monotonic()
            due = now - self._told.setdefault(number, now) >= _WRITE_EVERY_SECONDS
            if due or number in finished:
                self._write(tuner, tuner.record.trials[number])

    def ended(self, tuner: Tuner) -> None:
        for number in list(self._told):
            self._write(tuner, tuner.record.trials[number])

    def say(self, line: str) -> None:
        """Messages are for people at the terminal."""

    @staticmethod
    def _folder(tuner: Tuner, number: int) -> Path:
        return tuner.dir.tensorboard / f"trial-{number:05d}"

    def _write(self, tuner: Tuner, trial: Trial) -> None:
        """Appends the reports that are not in the trial's file yet; the first time, makes its folder anew."""
        if tuner.room.is_full:
            return
        folder, number = self._folder(tuner, trial.number), trial.number
        self._told[number] = time.monotonic()
        protos: list[EventProto] = []
        if number not in self._files:
            shutil.rmtree(folder, ignore_errors=True)
            with writing(folder):
                folder.mkdir(parents=True)
            self._files[number] = folder / f"events.out.tfevents.{int(time.time()):010d}.hpt.{os.getpid()}"
            self._written[number] = 0
            protos.append(EventProto(wall_time=time.time(), file_version="brain.Event:2"))
            protos.append(_hparams_event(tuner, trial))
            if number == 0:
                protos.append(_experiment_event(tuner))
                protos.append(_layout_event(tuner))
        for report in trial.reports[self._written[number] :]:
            at = tuner.record.reported_at(number, report.epoch)
            protos.append(_scalars(report.epoch, at, curves.values(tuner, trial, report)))
            if text := curves.copy_text(trial, report):
                protos.append(_note(report.epoch, at, "pbt/copies", text))
        self._written[number] = len(trial.reports)
        if trial.state.is_finished:
            if text := curves.end_text(trial):
                protos.append(_note(trial.epoch, time.time(), "ended", text))
            protos.append(_end_event(trial))
        with writing(self._files[number]), open(self._files[number], "ab") as file:
            file.write(b"".join(framed(proto.SerializeToString()) for proto in protos))
        if trial.state.is_finished:
            del self._files[number], self._written[number], self._told[number]


def _is_complete(folder: Path) -> bool:
    """Whether the folder's one file holds whole records, of which the last ends a session."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    data = files[0].read_bytes() if len(files) == 1 else b""
    at, last = 0, b""
    while at + 16 <= len(data):  # length (8 bytes), its checksum (4), the record, its checksum (4)
        size = int.from_bytes(data[at : at + 8], "little")
        last, at = data[at + 12 : at + 12 + size], at + 16 + size
    return at == len(data) and metadata.SESSION_END_INFO_TAG.encode() in last


def _scalars(step: int, at: float, values: Iterable[tuple[str, float]]) -> EventProto:
    """All metrics of one step in one record (tag: a metric's name as in the report)."""
    summary = SummaryProto(value=[SummaryProto.Value(tag=tag, simple_value=value) for tag, value in values])
    return EventProto(wall_time=at, step=step, summary=summary)


def _note(step: int, at: float, tag: str, markdown: str) -> EventProto:
    """For the Text tab."""
    return _string(step, at, tag, markdown.encode(), text_metadata.create_summary_metadata(None, None))


def _layout_event(tuner: Tuner) -> EventProto:
    """How the Custom Scalars tab is laid out; one trial's file says so for all."""
    content, kind = curves.layout(tuner).SerializeToString(), custom_scalars.create_summary_metadata()
    return _string(0, time.time(), custom_scalars.CONFIG_SUMMARY_TAG, content, kind)


def _string(step: int, at: float, tag: str, content: bytes, kind: Any) -> EventProto:
    tensor = TensorProto(dtype=DT_STRING, string_val=[content])
    value = SummaryProto.Value(tag=tag, metadata=kind, tensor=tensor)
    return EventProto(wall_time=at, step=step, summary=SummaryProto(value=[value]))


def _hparams_event(tuner: Tuner, trial: Trial) -> EventProto:
    start = plugin_data_pb2.SessionStartInfo(
        start_time_secs=time.time(), group_name=f"trial-{trial.number:05d}"
    )
    for name, value in trial.hparams.items():
        _set_value(start.hparams[name], value)
    return _plugin_event(
        metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start)
    )


def _end_event(trial: Trial) -> EventProto:
    good = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    status = api_pb2.STATUS_SUCCESS if good else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    return _plugin_event(
        metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end)
    )


def _experiment_event(tuner: Tuner) -> EventProto:
    """Names, types and domains of the searched hyperparameters, and the metrics worth a column."""
    infos = []
    for name, dimension in tuner.recipe.space.items():
        if isinstance(dimension, Choice):
            numbers = all(_is_number(option) for option in dimension.options)
            kind = api_pb2.DATA_TYPE_FLOAT64 if numbers else api_pb2.DATA_TYPE_STRING
            info = api_pb2.HParamInfo(name=name, type=kind)
            for option in dimension.options:
                _set_value(info.domain_discrete.values.add(), option if numbers else _text(option))
        else:
            info = api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_FLOAT64)
            info.domain_interval.min_value, info.domain_interval.max_value = dimension.low, dimension.high
        infos.append(info)
    metric = tuner.objective.metric
    train = "train/" + metric.removeprefix("valid/")
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag)
        for tag in dict.fromkeys((metric, train, "valid/loss", "train/loss"))
    ]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics, time_created_secs=time.time())
    return _plugin_event(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment))


def _plugin_event(tag: str, data: Any) -> EventProto:
    value = SummaryProto.Value(tag=tag, metadata=metadata.create_summary_metadata(data))
    return EventProto(wall_time=time.time(), summary=SummaryProto(value=[value]))


def _set_value(target: Any, value: Any) -> None:
    if isinstance(value, bool):
        target.bool_value = value
    elif _is_number(value):
        target.number_value = value
    else:
        target.string_value = _text(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(thaw(value))
