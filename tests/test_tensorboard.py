"""TensorBoard files, read back with TensorBoard's own readers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from hpt_torch.observers.record_file import framed
from hpt_torch.observers.tensorboard import TensorBoardObserver, _is_complete
from hpt_torch.record import Record

RunQuick = Callable[..., str]


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def _texts(reader: EventAccumulator, tag: str) -> dict[int, str]:
    if tag not in reader.Tags()["tensors"]:
        return {}
    assert reader.SummaryMetadata(tag).plugin_data.plugin_name == "text"
    return {e.step: e.tensor_proto.string_val[0].decode() for e in reader.Tensors(tag)}


def _check(run: Path) -> None:
    """Every report of the record once, and nothing else."""
    with Record(run / "run.db", readonly=True) as record:
        trials = record.in_order()
    folders = sorted(p.name for p in (run / "tensorboard").iterdir())
    assert folders == [f"trial-{trial.number:05d}" for trial in trials]
    for trial in trials:
        curves = _curves(run / "tensorboard" / f"trial-{trial.number:05d}")
        ours = {"time/epoch_seconds", "gap/accuracy", "gap/loss", "lr", "hparams/lr", "hparams/dropout"}
        assert set(curves) == {*trial.metrics, *ours}
        for name in trial.metrics:
            expected = [(r.epoch, r.metrics[name]) for r in trial.reports]
            assert [step for step, _ in curves[name]] == [step for step, _ in expected]
            assert [v for _, v in curves[name]] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_curves_are_the_reports(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run", "trainer.epochs=3", observers=[TensorBoardObserver()])
    _check(tmp_path / "run")


def test_records_are_framed_as_tensorboard_does() -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    for length in (0, 1, 7, 8, 255, 4095, 4096, 4097, 9000):
        record = bytes((i * i + length) % 256 for i in range(length))
        expected = io.BytesIO()
        RecordWriter(expected).write(record)
        assert framed(record) == expected.getvalue(), length


def test_after_kills_each_step_stands_once(
    tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_resume import Killed, PowerSwitch

    monkeypatch.setattr("hpt_torch.observers.tensorboard._WRITE_EVERY_SECONDS", 0.0)
    switch = PowerSwitch(monkeypatch)
    for step in (9, 7, 8):
        switch.arm(step, True)
        with pytest.raises(Killed):
            run_quick(tmp_path / "run", "trainer.epochs=3", observers=[TensorBoardObserver()])
    switch.arm(-1, False)
    run_quick(tmp_path / "run", "trainer.epochs=3", observers=[TensorBoardObserver()])
    _check(tmp_path / "run")
    torn = next((tmp_path / "run" / "tensorboard" / "trial-00001").iterdir())
    torn.write_bytes(torn.read_bytes()[:-3])  # as a kill inside a write leaves it: it is made again
    assert not _is_complete(torn.parent)
    run_quick(tmp_path / "run", "trainer.epochs=3", observers=[TensorBoardObserver()])
    _check(tmp_path / "run")
    assert _is_complete(torn.parent)
    import shutil

    shutil.rmtree(tmp_path / "run" / "tensorboard")  # derived: deleted, they are made again
    run_quick(tmp_path / "run", "trainer.epochs=3", observers=[TensorBoardObserver()])
    _check(tmp_path / "run")


def test_the_hparams_plugin_lists_every_trial(tmp_path: Path, run_quick: RunQuick) -> None:
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    run_quick(tmp_path / "run", observers=[TensorBoardObserver()])
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path / "run" / "tensorboard"))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = Context(TBContext(data_provider=provider))
    request_context: Any = RequestContext()
    experiment = context.experiment_from_metadata(
        request_context, "", False, context.hparams_metadata(request_context, ""), None
    )
    infos = {info.name: info for info in experiment.hparam_infos}
    assert set(infos) == {"lr", "dropout", "activation"}
    assert infos["dropout"].domain_interval.max_value == 0.5
    assert [v.string_value for v in infos["activation"].domain_discrete.values] == ["relu", "tanh"]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10,
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING],
    )  # fmt: skip
    groups = Handler(request_context, context, "", request).run().session_groups
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        trials = record.in_order()
    assert len(groups) == len(trials)
    by_name = {group.name: group for group in groups}
    for trial in trials:
        group = by_name[f"trial-{trial.number:05d}"]
        assert group.hparams["lr"].number_value == trial.hparams["lr"]
        assert group.hparams["activation"].string_value == trial.hparams["activation"]
        values = {value.name.tag: value.value for value in group.metric_values}
        assert values["valid/accuracy"] == pytest.approx(trial.metrics["valid/accuracy"], rel=1e-6)


def test_the_rate_and_the_gap_are_curves(tmp_path: Path, run_quick: RunQuick) -> None:
    from conftest import QUICK

    raw = {**QUICK, "hparams": {**QUICK["hparams"], "schedule": "cosine", "warmup_epochs": 1.0}}
    run_quick(tmp_path / "run", "trainer.epochs=4", raw=raw, observers=[TensorBoardObserver()])
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        trials = record.in_order()
    for trial in trials:
        curves = _curves(tmp_path / "run" / "tensorboard" / f"trial-{trial.number:05d}")
        rates = [value / float(trial.hparams["lr"]) for _, value in curves["lr"]]  # type: ignore[arg-type]
        # 1077 train rows make 4 batches an epoch: a warm-up of one epoch in four steps, then the cosine.
        done = [(e + b / 4) / 4 for e in range(4) for b in range(4)]
        cosine = [(1 + math.cos(math.pi * share)) / 2 for share in done]
        steps = [c * min(1.0, (i + 1) / 4) for i, c in enumerate(cosine)]
        assert rates == pytest.approx([sum(steps[e * 4 : e * 4 + 4]) / 4 for e in range(4)], rel=1e-5)
        values = [value for _, value in curves["hparams/dropout"]]
        assert values == pytest.approx([trial.hparams["dropout"]] * 4, rel=1e-6)
        for name, sign in (("accuracy", 1), ("loss", -1)):
            expected = [
                sign * (r.metrics[f"train/{name}"] - r.metrics[f"valid/{name}"]) for r in trial.reports
            ]
            assert [value for _, value in curves[f"gap/{name}"]] == pytest.approx(
                expected, rel=1e-5, abs=1e-7
            )


def test_the_layout_names_tags_that_are_there(tmp_path: Path, run_quick: RunQuick) -> None:
    from conftest import QUICK

    raw = {**QUICK, "hparams": {**QUICK["hparams"], "grad_clip_norm": 1.0}}
    run_quick(tmp_path / "run", raw=raw, observers=[TensorBoardObserver()])
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "trial-00000"))
    reader.Reload()
    tags = reader.Tags()["scalars"]
    (event,) = reader.Tensors(custom_scalars.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag for category in layout.category for chart in category.chart}
    assert [category.title for category in layout.category] == ["Learning", "Hyperparameters", "Training"]
    for title, patterns in charts.items():
        for pattern in patterns:
            assert [tag for tag in tags if re.match(pattern, tag)], (title, pattern)
    assert set(charts["accuracy, train and valid"]) == {"^train/accuracy$", "^valid/accuracy$"}
    assert "norm of the gradient" in charts
    other = tmp_path / "run" / "tensorboard" / "trial-00001"
    assert custom_scalars.CONFIG_SUMMARY_TAG.encode() not in next(other.iterdir()).read_bytes()


def test_a_failed_trial_ends_as_a_failure(tmp_path: Path, run_quick: RunQuick) -> None:
    from conftest import QUICK

    raw = {**QUICK, "space": {"lr": {"float": [9e5, 1e6]}}, "search": {"sampler": "random", "trials": 1}}
    raw["hparams"] = {**QUICK["hparams"], "optimizer": "sgd", "batch_norm": False}
    run_quick(tmp_path / "run", raw=raw, observers=[TensorBoardObserver()])
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "trial-00000"))
    reader.Reload()
    content = reader.SummaryMetadata(metadata.SESSION_END_INFO_TAG).plugin_data.content
    end = plugin_data_pb2.HParamsPluginData.FromString(content).session_end_info
    assert end.status == api_pb2.STATUS_FAILURE
    (text,) = _texts(reader, "ended").values()
    assert text.startswith("**FAILED** after epoch ")
    assert "diverged" in text


def test_a_population_shows_its_schedules(tmp_path: Path, run_quick: RunQuick) -> None:
    from test_evolution import POPULATION

    run_quick(tmp_path / "run", "trainer.epochs=5", observers=[TensorBoardObserver()], raw=POPULATION)
    with Record(tmp_path / "run" / "run.db", readonly=True) as record:
        trials = record.in_order()
    assert any(trial.phases for trial in trials)
    for trial in trials:
        curves = _curves(tmp_path / "run" / "tensorboard" / f"trial-{trial.number:05d}")
        for name in ("lr", "dropout", "batch_size"):
            expected = [
                [p.hparams[name] for p in trial.phases if p.epoch < epoch][-1:] or [trial.hparams[name]]
                for epoch in range(1, 6)
            ]
            values = [value for _, value in curves[f"hparams/{name}"]]
            assert values == pytest.approx([value for (value,) in expected], rel=1e-6)
        copied = [(phase.epoch + 1, phase.source) for phase in trial.phases if phase.source is not None]
        assert curves.get("pbt/copied_trial", []) == copied
        reader = EventAccumulator(str(tmp_path / "run" / "tensorboard" / f"trial-{trial.number:05d}"))
        reader.Reload()
        texts = _texts(reader, "pbt/copies")
        assert [(step, f"**trial {source}**" in texts[step]) for step, source in copied] == [
            (step, True) for step in texts
        ]
        for phase in trial.phases[1:]:
            changed = (
                phase.hparams["lr"] != [p for p in trial.phases if p.epoch < phase.epoch][-1].hparams["lr"]
            )
            assert ("lr " in texts[phase.epoch + 1]) == changed
