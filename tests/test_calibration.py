"""The cost table of this machine: measured, kept, damaged, absent; what a run does with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evolution import POPULATION
from test_resume import Killed, PowerSwitch

from hpt_torch import baselines, calibration, limits, session
from hpt_torch import recipe as recipes
from hpt_torch.data import cache
from hpt_torch.record import Record
from hpt_torch.task import Task
from hpt_torch.trainers import costs, inductor
from hpt_torch.trainers.costs import SHIPPED, Costs
from hpt_torch.types import DamageError, RunError

RunQuick = Callable[..., str]
# What the shipped table never says: that dense models are slow together.
OWN = Costs(ratios={"cpu": {"dense": {2: 0.5}}}, measured="2026-01-01T00:00:00+00:00", torch="2.0")
TOGETHER = ("trainer.engine=auto", "activation=relu")  # all trials have one signature


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's table lies; there is none yet."""
    monkeypatch.setenv("HPT_TORCH_CACHE", str(tmp_path / "cache"))
    return calibration.path()


def _put(table: Path, costs: Costs = OWN) -> None:
    cache.write(table, costs.dumps().encode())


def _engines(run: Path) -> set[str]:
    with Record(run / "run.db", readonly=True) as record:
        return {chunk["engine"] for plan in record.of_kind("plan") for chunk in plan.body["chunks"]}


def _recorded(run: Path) -> dict[str, Any]:
    with Record(run / "run.db", readonly=True) as record:
        found: dict[str, Any] = record.of_kind("run")[0].body["costs"]
    return {name: value for name, value in found.items() if name != "memory"}


# -- the table -----------------------------------------------------------------------------------------


def test_the_folder_is_the_named_one_or_in_the_users_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPT_TORCH_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert calibration.path() == tmp_path / "named" / "costs.json"
    monkeypatch.delenv("HPT_TORCH_CACHE")
    assert calibration.path() == tmp_path / "xdg" / "hpt_torch" / "costs.json"
    for unset in ("", "relative/path"):  # which the XDG specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert calibration.path() == tmp_path / "home" / ".cache" / "hpt_torch" / "costs.json"


def test_without_a_file_it_is_the_shipped_one(table: Path) -> None:
    assert calibration.present() is SHIPPED
    table.parent.write_text("a file where the folder should be")
    assert calibration.present() is SHIPPED


def test_a_file_that_cannot_be_read_is_not_waited_for(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.mkdir(parents=True)
    assert calibration.present() is SHIPPED
    assert "the shipped cost table is used" in caplog.text


def test_what_is_written_is_read(table: Path) -> None:
    _put(table)
    assert calibration.present() == OWN
    assert dataclasses.replace(OWN, measured="later", torch="3.0").sha256 == OWN.sha256


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[1, 2]", "not a cost table"),
        (lambda text: '{"format": 2}', "not a cost table"),
        (lambda text: text.replace("0.5", "0.6"), "SHA-256"),
        (lambda text: text.replace("0.5", "-1"), "above 0"),
        (lambda text: text.replace("0.5", "NaN"), "above 0"),
        (lambda text: text.replace('"2": 0.5', ""), "above 0"),
        (lambda text: text.replace('"format": 2', '"format": 3'), "this version reads 2"),
        (lambda text: "[" * 100_000, "damaged"),
        (lambda text: "\udcff", "damaged"),
    ],
    ids=["cut", "empty", "list", "keys", "changed", "negative", "nan", "no_ratio", "format", "deep", "bytes"],
)
def test_a_damaged_table_stops_a_new_run_before_anything_is_written(
    table: Path, tmp_path: Path, run_quick: RunQuick, damage: Callable[[str], str], why: str
) -> None:
    cache.write(table, damage(OWN.dumps()).encode(errors="surrogateescape"))
    with pytest.raises(DamageError, match=why) as caught:
        run_quick(tmp_path / "run")
    assert str(table) in str(caught.value)
    assert "hpt doctor --calibrate, or remove the file" in str(caught.value)
    assert not (tmp_path / "run").exists()


# -- what a run does with it ---------------------------------------------------------------------------


def test_a_run_plans_with_the_table_of_its_beginning(
    table: Path, tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = run_quick(tmp_path / "shipped", *TOGETHER)
    assert _engines(tmp_path / "shipped") == {"fused"}
    assert _recorded(tmp_path / "shipped") == SHIPPED.as_recorded("cpu")
    _put(table)
    expected = run_quick(tmp_path / "whole", *TOGETHER)
    assert _engines(tmp_path / "whole") == {"loop"}
    assert _recorded(tmp_path / "whole") == OWN.as_recorded("cpu")
    assert expected != shipped  # the engines round differently
    switch = PowerSwitch(monkeypatch)
    switch.arm(8, after=True)
    with pytest.raises(Killed):
        run_quick(tmp_path / "cut", *TOGETHER)
    switch.arm(-1, after=True)
    table.write_text("damaged")  # neither read nor in the way
    assert run_quick(tmp_path / "cut", *TOGETHER) == expected
    table.unlink()
    assert run_quick(tmp_path / "cut", *TOGETHER, "search.trials=6", reopen_holdout=True) != expected
    assert _engines(tmp_path / "cut") == {"loop"}


def test_a_run_that_was_cut_before_it_began_takes_the_table_there_is(
    table: Path, tmp_path: Path, run_quick: RunQuick, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = PowerSwitch(monkeypatch)
    switch.arm(1, after=False)
    with pytest.raises(Killed):
        run_quick(tmp_path / "run", *TOGETHER)
    switch.arm(-1, after=False)
    _put(table)
    run_quick(tmp_path / "run", *TOGETHER)
    assert _recorded(tmp_path / "run") == OWN.as_recorded("cpu")


def test_a_record_of_before_plans_with_the_shipped_table(table: Path) -> None:
    _put(table)
    shipped = SHIPPED.as_recorded("cpu")
    assert costs.recorded({"device": "cpu"}, "cpu") == {**shipped, "pays_after": {}}  # nothing was compiled
    assert costs.recorded({"costs": OWN.as_recorded("cpu")}, "cpu") == OWN.as_recorded("cpu")


def test_the_canonical_report_does_not_know_the_table(
    table: Path, tmp_path: Path, run_quick: RunQuick
) -> None:
    shipped = run_quick(tmp_path / "shipped")
    _put(table)
    assert run_quick(tmp_path / "own") == shipped  # in QUICK the recipe says which engine
    assert _recorded(tmp_path / "own") != _recorded(tmp_path / "shipped")


@pytest.mark.slow
def test_confirmations_and_baselines_plan_as_the_run_that_they_belong_to(
    table: Path, tmp_path: Path, run_quick: RunQuick, digits_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def population(baseline: bool) -> None:
        raw = {**POPULATION, "scheduler": {**POPULATION["scheduler"], "baseline": baseline}}
        checked = session.check(recipes.build(raw, source="test"), digits_task, source="test")
        baselines.run(checked, tmp_path / "population")

    _put(table)
    run_quick(tmp_path / "search", *TOGETHER)
    population(baseline=False)
    table.write_text("damaged")
    monkeypatch.setattr(limits, "free_bytes", lambda: 10)
    run_quick(tmp_path / "search", *TOGETHER, "final.confirm=2", "final.seeds=2", reopen_holdout=True)
    population(baseline=True)
    inner = [*tmp_path.glob("search/confirmations/*"), *tmp_path.glob("population/baselines/*")]
    assert len(inner) == 4
    for run in inner:
        assert _recorded(run) == OWN.as_recorded("cpu")
        with Record(run / "run.db", readonly=True) as record:
            assert record.of_kind("run")[0].body["costs"]["memory"] > 10


# -- measuring it --------------------------------------------------------------------------------------

TINY = calibration.Effort(members=(2,), compiled=(), rows=64, repeats=1, seconds=0.0)


def test_what_is_measured_is_kept_and_planned_with(table: Path) -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    found = calibration.calibrate(said.append, TINY)
    assert calibration.present() == found
    assert set(found.ratios["cpu"]) == set(costs.TRAITS)
    assert len(said) == sum(len(row) for kinds in found.ratios.values() for row in kinds.values())
    assert found.torch == torch.__version__
    assert torch.get_num_threads() == threads
    assert [path.name for path in table.parent.iterdir()] == ["costs.json"]


def test_each_example_is_of_the_kind_that_it_stands_for() -> None:
    from hpt_torch.trainers.loop import LoopTrainer

    for trait in costs.TRAITS:
        training = calibration._Training(LoopTrainer, trait, 1, torch.device("cpu"), 64)
        population = training._population
        assert training._trainer.traits(population.hparams[0], 0) == {trait}


def test_what_is_cut_leaves_the_table_as_it_was(table: Path) -> None:
    def cut(line: str) -> None:
        raise KeyboardInterrupt

    _put(table)
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(cut, TINY)
    assert calibration.present() == OWN
    assert [path.name for path in table.parent.iterdir()] == ["costs.json"]


def test_a_folder_that_cannot_be_written_is_an_error_of_one_message(table: Path) -> None:
    table.parent.write_text("a file where the folder should be")
    with pytest.raises(RunError, match="costs.json could not be written"):
        calibration.calibrate(lambda line: None, TINY)


def test_the_shipped_table_reads_as_written() -> None:
    assert costs.loads(SHIPPED.dumps()) == SHIPPED
    assert json.loads(SHIPPED.dumps())["measured"] == ""
    assert SHIPPED.slow_together("cpu") == {"convolution", "lstm"}
    assert SHIPPED.slow_together("cuda") == frozenset()


def test_what_pays_for_compiling_is_known_of_so_many_members_or_fewer() -> None:
    table = {"dense": {"2": 100.0, "8": 40.0}, "rnn": {"4": 500.0}}
    found = [costs.saved_after(table, ["dense"], members) for members in (1, 2, 7, 8, 32)]
    assert found == [math.inf, 100.0, 100.0, 40.0, 40.0]
    assert costs.saved_after(table, ["dense", "rnn"], 8) == 500.0
    assert costs.saved_after(table, ["lstm"], 8) == costs.saved_after({}, ["dense"], 8) == math.inf


@pytest.mark.slow
def test_compiling_is_measured(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TRAITS", ())
    # From torch's cache on disk, where it is there: this is not about how long compiling takes.
    monkeypatch.setattr(inductor, "nothing_cached", lambda device: contextlib.nullcontext())
    said: list[str] = []
    effort = calibration.Effort(compiled=(8,), rows=512, repeats=3, seconds=0.05)
    found = calibration.calibrate(said.append, effort)
    (steps,) = found.pays_after["cpu"]["dense"].values()
    assert 10 < steps < 10**6
    assert said == [line for line in said if "8 compiled in" in line]
    assert calibration.present() == found
