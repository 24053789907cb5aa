"""TensorBoard files, read back with TensorBoard's own readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from hpt_torch.observers.tensorboard import TensorBoardObserver, _is_complete
from hpt_torch.record import Record

RunQuick = Callable[..., str]


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def _check(run: Path) -> None:
    """Every report of the record once, and nothing else."""
    with Record(run / "run.db", readonly=True) as record:
        trials = record.in_order()
    folders = sorted(p.name for p in (run / "tensorboard").iterdir())
    assert folders == [f"trial-{trial.number:05d}" for trial in trials]
    for trial in trials:
        curves = _curves(run / "tensorboard" / f"trial-{trial.number:05d}")
        assert set(curves) == {*trial.metrics, "time/epoch_seconds"}
        for name in trial.metrics:
            expected = [(r.epoch, r.metrics[name]) for r in trial.reports]
            assert [step for step, _ in curves[name]] == [step for step, _ in expected]
            assert [v for _, v in curves[name]] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_curves_are_the_reports(tmp_path: Path, run_quick: RunQuick) -> None:
    run_quick(tmp_path / "run", "trainer.epochs=3", observers=[TensorBoardObserver()])
    _check(tmp_path / "run")


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
