"""Streamed rows train with the same bits as rows in memory; workers, order and errors of a stream."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import canonical_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import hpt_torch as hpt
from hpt_torch.data.stream import fitted, needed_bytes
from hpt_torch.population import Population
from hpt_torch.seeding import generator
from hpt_torch.trainers import base
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import TaskError

CPU = torch.device("cpu")
WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


class Mappings(Dataset[dict[str, Any]]):
    """Items that are mappings, as users write them."""

    def __init__(self, rows: hpt.Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: tensor[row] for name, tensor in self.rows.tensors.items()}


class Drawing(Dataset[tuple[Any, ...]]):
    """Augments with every global generator there is."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return torch.rand(2) + np.random.rand() + random.random(), row % 2


class Flat(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        size = int(torch.tensor(input_shape).prod())
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(size, 7), nn.Tanh(), nn.Linear(7, out_features))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        if lengths is not None:
            x = x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        return self.layers(x)


class Conv(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], out_features: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(input_shape[0], 5, 3), nn.Linear(5, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((-1, -2)))


def _rows(count: int, *shape: int, pixels: bool = False, lengths: bool = False) -> hpt.Rows:
    draw = generator(count, "stream-test")
    x = draw.integers(0, 256, (count, *shape)) if pixels else draw.normal(size=(count, *shape))
    tensors = {"inputs": torch.from_numpy(x).to(torch.uint8 if pixels else torch.float32)}
    tensors["targets"] = torch.from_numpy(draw.integers(0, 3, count))
    if lengths:
        tensors["lengths"] = torch.from_numpy(draw.integers(1, shape[0] + 1, count))
    return hpt.Rows(tensors)


def _stream(rows: hpt.Rows, workers: int) -> hpt.Stream:
    return hpt.Stream(TensorDataset(*rows.tensors.values()), workers=workers, names=tuple(rows.tensors))


def _train(
    data: hpt.Data, model: Any, epochs: int = 3, stop_every: int | None = None, **given: Any
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    task = hpt.Classification(model, data)
    hparams = {name: spec.default for name, spec in task.hparam_specs().items()} | {"batch_size": 7, **given}
    reports, polls, state = [], 0, None

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return stop_every is not None and polls % stop_every == 0

    while True:
        moved = data.to(CPU, torch.float32)
        trainer = LoopTrainer(task, moved, device=CPU, dtype=torch.float32, seed=1, epochs=epochs)
        population: Population = trainer.init([0, 1], [hparams, {**hparams, "lr": 0.01}])
        if state is not None:
            population.restore(*state)
        result = trainer.train(population, epochs, should_pause=stop)
        assert not result.failed, result.failed
        reports += [(r.trial, r.epoch, r.metrics) for r in result.reports]
        trainer.close()
        if not result.paused:
            break
        tensors, meta = population.state()
        state = {name: tensor.clone() for name, tensor in tensors.items()}, meta
    weights = {f"{i}/{n}": t for i in range(2) for n, t in trainer.weights(population, i).items()}
    return weights, sorted(reports, key=lambda report: report[:2])


def _same(a: tuple[Mapping[str, torch.Tensor], Any], b: tuple[Mapping[str, torch.Tensor], Any]) -> None:
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


def _workers() -> list[Any]:
    return multiprocessing.active_children()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("case", ["vectors", "images", "one channel", "lengths"])
def test_the_bits_of_rows_in_memory(case: str, workers: int) -> None:
    shape = {"vectors": (5,), "images": (3, 6, 5), "one channel": (1, 6, 6), "lengths": (4, 3)}[case]
    pixels = "e" in case and case != "vectors" and case != "lengths"
    train, valid = (_rows(n, *shape, pixels=pixels, lengths=case == "lengths") for n in (131, 30))
    statistics = {}
    if pixels:
        mean = torch.linspace(0.4, 0.5, shape[0]).reshape(-1, 1, 1)
        statistics = {"mean": mean, "std": mean / 2}
    model = Conv if pixels else Flat
    whole = _train(hpt.Data(train=train, valid=valid, out_features=3, **statistics), model)
    for streamed_valid in (valid, _stream(valid, workers)):
        data = hpt.Data(train=_stream(train, workers), valid=streamed_valid, out_features=3, **statistics)
        _same(_train(data, model), whole)
    assert not _workers()
    mapped = hpt.Stream(Mappings(train), workers=workers)
    _same(_train(hpt.Data(train=mapped, valid=valid, out_features=3, **statistics), model), whole)
    held = hpt.Data(train=hpt.Stream(train), valid=valid, out_features=3, **statistics)
    _same(_train(held, model), whole)
    assert not _workers()


@pytest.mark.parametrize("workers", WORKERS)
def test_stopped_in_the_middle_of_an_epoch_and_continued(workers: int) -> None:
    """18 batches an epoch: stops fall before, on and after a boundary of gathered blocks."""
    train, valid = _rows(131, 5), _rows(30, 5)
    data = hpt.Data(train=_stream(train, workers), valid=valid, out_features=3)
    whole = _train(hpt.Data(train=train, valid=valid, out_features=3), Flat)
    for every in (5, 16, 17) if not workers else (17,):
        _same(_train(data, Flat, stop_every=every), whole)


def test_batches_of_rows_lie_the_same_wherever_a_pass_begins() -> None:
    rows = _rows(100, 3, 4, 5).to(CPU, torch.float32)
    stream = _stream(_rows(100, 3, 4, 5), 0).to(CPU, torch.float32)
    order = torch.from_numpy(generator(0, "order").permutation(100))
    for sequence in (order, None):
        expected = dict(rows.batches(sequence, 3))
        assert list(expected) == list(range(34))
        assert len(expected[33]["inputs"]) == 1
        for start in (0, 1, 15, 16, 20, 33, 34):
            for part in (rows, stream):
                got = dict(part.batches(sequence, 3, start))
                assert list(got) == list(range(start, 34))
                for index, batch in got.items():
                    other = expected[index]["inputs"]
                    assert torch.equal(batch["inputs"], other)
                    assert batch["inputs"].stride() == other.stride()
                    assert batch["inputs"].data_ptr() % 64 == other.data_ptr() % 64
                    assert torch.equal(batch["targets"], expected[index]["targets"])
    assert expected[0]["inputs"].is_contiguous(memory_format=torch.channels_last)
    for a, b in ((rows.select(order[:9]), stream.select(order[:9])), (rows.slice(3, 9), stream.slice(3, 9))):
        assert torch.equal(a["inputs"], b["inputs"])
        assert a["inputs"].stride() == b["inputs"].stride()
    subset = stream.subset(order[:5])
    assert len(subset) == 5
    assert torch.equal(subset.slice(0, 5)["inputs"], rows.select(order[:5])["inputs"])


@pytest.mark.parametrize("workers", WORKERS)
def test_what_a_data_set_draws_repeats_and_leaves_the_generators_alone(workers: int) -> None:
    order = base.DataOrder(40, 0, CPU)
    stream = hpt.Stream(Drawing(), workers=workers)

    def epoch(number: int, start: int = 0) -> list[list[float]]:
        return [b["inputs"].flatten().tolist() for _, b in stream.batches(order.epoch(number), 8, start)]

    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    first = epoch(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[2], random.getstate())
    assert len({value for batch in first for value in batch}) == 80
    assert epoch(1) != first
    half = stream.batches(order.epoch(0), 8)
    next(half)
    half.close()  # left half-way: what was read ahead is thrown away
    assert epoch(0, 2) == first[2:]
    if workers:
        other = hpt.Stream(Drawing())
        assert [b["inputs"].flatten().tolist() for _, b in other.batches(order.epoch(0), 8)] == first
    pids = [process.pid for process in _workers()]
    assert len(pids) == workers
    if workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for pid in pids:
                os.kill(pid or 0, number)  # as a terminal or a batch system signals the whole group
        assert epoch(0) == first
        assert [process.pid for process in _workers()] == pids
    stream.close()
    assert not _workers()
    assert epoch(0) == first  # and it can be used again
    del half
    stream.close()


class _Numbers(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class _NoLength:
    def __getitem__(self, row: int) -> int:
        return row


@pytest.mark.parametrize(
    ("dataset", "options", "text"),
    [
        (DataLoader(TensorDataset(torch.zeros(3, 1))), {}, "a DataLoader does not allow; pass .*loader.data"),
        (_Numbers(), {}, "a _Numbers does not allow; pass a map-style data set .of a DataLoader: `loader."),
        (_NoLength(), {}, "needs a data set with __len__ and __getitem__, got a _NoLength without __len__"),
        ([], {}, "at least one row, got a data set of length 0"),
        ([1], {"workers": -1}, "workers must be 0 or more, got -1"),
        ([1], {"names": ()}, r"names must be different names, .*, got \(\)"),
        ([1], {"names": "inputs"}, "names must be different names, .*, got 'inputs'"),
        ([1], {"names": ("a", "a")}, r"names must be different names, .*, got \('a', 'a'\)"),
    ],
)
def test_what_cannot_be_streamed(dataset: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(TaskError, match=text):
        hpt.Stream(dataset, **options)


@pytest.mark.parametrize(
    ("items", "collate_fn", "text"),
    [
        ([(1, 2, 3)] * 2, None, r"has 3 values, but names are inputs, targets; pass names=\(…\)"),
        ([1, 2], None, "has 1 values, but names are inputs, targets"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], None, "made a batch: stack expects each .* collate_fn"),
        ([(object(), 0)] * 2, None, "made a batch: .*object.*add a transform that makes it so"),
        ([("text", 0)] * 2, None, "inputs of an item must be a tensor, an array or a number, got a list"),
        (
            [(1, 0)] * 2,
            lambda items: (torch.zeros(3), torch.zeros(2)),
            r"of 2 items must have 2 rows, got sh",
        ),
    ],
)
def test_items_that_cannot_be_a_batch(items: list[Any], collate_fn: Any, text: str) -> None:
    with pytest.raises(TaskError, match=text):
        hpt.Stream(items, collate_fn=collate_fn).slice(0, 2)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_users_to_read() -> None:
    stream = hpt.Stream([(1, 2, 3)] * 4, workers=1)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="has 3 values, but names are inputs, targets"):
        list(stream.batches(None, 2))
    stream.close()
    assert not _workers()


def test_items_of_numbers_arrays_and_small_integers() -> None:
    items = [(np.float32(i), np.int16(i)) for i in range(4)]
    batch = hpt.Stream(items).to(CPU, torch.float64).slice(1, 3)  # type: ignore[arg-type]
    assert batch["inputs"].tolist() == [1.0, 2.0]
    assert batch["inputs"].dtype == torch.float64
    assert batch["targets"].dtype == torch.int64

    def pad(items: list[Any]) -> dict[str, torch.Tensor]:
        padded = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        return {"inputs": padded, "lengths": torch.tensor([len(x) for x, _ in items])}

    ragged = hpt.Stream([(torch.ones(n), 0) for n in (1, 3)], collate_fn=pad)  # type: ignore[arg-type]
    assert ragged.slice(0, 2)["inputs"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_data_of_streams() -> None:
    train, valid = _rows(50, 3, 4, 4, pixels=True), _rows(9, 3, 4, 4, pixels=True)
    data = hpt.Data(train=_stream(train, 0), valid=valid, out_features=3)
    assert data.input_shape == (3, 4, 4)
    task = hpt.Classification(Conv, data)
    assert "augment" in task.hparam_specs()
    assert hpt.Classification(Conv, data, metrics=["roc_auc"]).objective.metric == "valid/roc_auc"
    hparams = {name: spec.default for name, spec in task.hparam_specs().items()}
    with pytest.raises(
        TaskError, match="class_weights: balanced counts the targets of all train rows, .*use"
    ):
        task.build_model({**hparams, "class_weights": "balanced"})
    with pytest.raises(TaskError, match="class_weights: balanced"):
        hpt.tune(task, {"lr": hpt.Float(0.1, 1)}, trials=1, hparams={"class_weights": "balanced"})
    with pytest.raises(
        TaskError, match="train must be a hpt_torch.Rows or a hpt_torch.Stream, got a DataLoa"
    ):
        hpt.Data(train=DataLoader(TensorDataset(torch.zeros(3, 1))), valid=valid)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="classification needs integer targets"):
        hpt.Classification(Conv, hpt.Data(train=hpt.Stream([(1.0, 2.0)]), valid=valid))  # type: ignore[arg-type]


def test_fingerprint_tells_lengths_and_items_apart() -> None:
    rows, valid = _rows(50, 5), _rows(9, 5)

    def fingerprint(changed: hpt.Rows) -> str:
        return hpt.Data(train=_stream(changed, 0), valid=valid, out_features=3).fingerprint()

    first = fingerprint(rows)
    assert first == fingerprint(_rows(50, 5))
    assert first != fingerprint(hpt.Rows(rows.slice(0, 49)))
    for row in (0, 49):
        inputs = rows.tensors["inputs"].clone()
        inputs[row] += 1
        assert first != fingerprint(hpt.Rows({**rows.tensors, "inputs": inputs}))
    drawing = hpt.Data(train=hpt.Stream(Drawing()), valid=valid)
    assert drawing.fingerprint() == drawing.fingerprint()


def test_train_rows_too_large_for_the_device_are_streamed() -> None:
    train, valid = _rows(100, 3, 4, 4, pixels=True), _rows(10, 3, 4, 4, pixels=True)
    mean = torch.full((3, 1, 1), 0.5)
    data = hpt.Data(train=train, valid=valid, holdout=valid, out_features=3, mean=mean, std=mean)
    needed = (100 + 10 + 10 + 10) * (48 * 4 + 8)  # train, valid, holdout and as many train rows to measure
    assert needed_bytes(data, torch.float32) == needed
    assert needed_bytes(data, torch.float64) == 130 * (48 * 8 + 8)
    free = needed * 5 // 4  # exactly 80 %
    assert fitted(data, torch.float32, free) is data
    streamed = fitted(data, torch.float32, free - 1)
    assert isinstance(streamed.train, hpt.Stream)
    assert streamed.valid is valid
    _same(_train(streamed, Conv), _train(data, Conv))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_search_and_its_continuation(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid, holdout = _rows(120, 5), _rows(30, 5), _rows(31, 5)

    def tune(path: Path, part: Any) -> str:
        data = hpt.Data(train=part(train), valid=part(valid), holdout=part(holdout), out_features=3)
        hpt.tune(
            hpt.Classification(Flat, data), {"lr": hpt.Float(1e-3, 1e-1)}, trials=3, epochs=2, device="cpu",
            sampler="random", hparams={"batch_size": 8}, run_dir=path, progress=False, tensorboard=False,
            engine="loop",
        )  # fmt: skip
        assert not _workers()
        return canonical_of(path)

    whole = tune(tmp_path / "whole", lambda rows: _stream(rows, workers))
    assert (
        json.loads((tmp_path / "whole" / "environment.json").read_text())["train_rows"] == "streamed to cpu"
    )
    in_memory = tune(tmp_path / "memory", lambda rows: rows)
    assert json.loads((tmp_path / "memory" / "environment.json").read_text())["train_rows"] == "on cpu"
    assert whole == in_memory
    sessions, original = 0, hpt.Stream._moved
    for _ in range(30):
        moved = 0

        def stop(stream: hpt.Stream, raw: Any, first: int) -> Any:
            nonlocal moved
            moved += 1
            if moved == 25:  # in an epoch of 15 batches
                os.kill(os.getpid(), signal.SIGINT)
            return original(stream, raw, first)

        monkeypatch.setattr(hpt.Stream, "_moved", stop)
        sessions += 1
        try:
            got = tune(tmp_path / "stopped", lambda rows: _stream(rows, workers))
            break
        except KeyboardInterrupt:
            assert not _workers()
    assert sessions > 2
    assert got == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_cuda_the_bits_of_rows_on_the_device() -> None:
    rows, cuda = _rows(100, 3, 6, 5, pixels=True), torch.device("cuda")
    mean = torch.full((3, 1, 1), 0.5)
    order = torch.from_numpy(generator(0, "order").permutation(100)).to(cuda)
    there = rows.to(cuda, torch.float32, scale=(mean, mean))
    for source in (hpt.Stream(rows), _stream(rows, 2)):
        stream = source.to(cuda, torch.float32, scale=(mean, mean))
        for (_, a), (_, b) in zip(there.batches(order, 7), stream.batches(order, 7), strict=True):
            assert torch.equal(a["inputs"], b["inputs"])
            assert a["inputs"].stride() == b["inputs"].stride()
            assert a["inputs"].data_ptr() % 512 == b["inputs"].data_ptr() % 512
        stream.close()
