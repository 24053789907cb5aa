"""`Stream`: rows that are read while they are trained on, for data larger than the device or the memory."""

# N rows, B batch, C channels, H height, W width

from __future__ import annotations

import dataclasses
import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from hpt_torch.data.base import GATHER, Data, Part, Rows, digest_tensor, laid_out, normalised
from hpt_torch.seeding import derive_seed, globally_seeded, torch_seeded
from hpt_torch.types import TaskError

_ALIGNMENT = 512  # bytes; what CUDA's allocator keeps, and a multiple of what the CPU's does
_READ_ROWS = 256  # that a worker reads at once where no batch size is given
_FINGERPRINT_ROWS = 16
_FREE_SHARE = 0.8  # of the device's free memory that data may take; models and their steps need the rest

Key = tuple[int, int, Sequence[int]]  # seed of the order, place of the first row in it, row numbers


class Stream(Part):
    """A map-style data set, read in batches by `workers` processes as they are needed.

    dataset: anything with ``__len__`` and ``__getitem__``; an item is a tuple of tensors, arrays or numbers,
    in the order of `names`, or a mapping of them. (`Rows` may be given too: tensors that stay where they are,
    batches of which are moved.) Integers become int64, but for `inputs`, whose uint8 pixels are kept.
    workers: processes that read ahead; 0 reads in this one.
    collate_fn: makes of a list of B items what an item is, with B rows; needed where the items of a set
    differ in shape.

    What a data set draws at random (torch's, NumPy's and Python's global generators) repeats: the generators
    are seeded for every batch from the order of the epoch and the batch's place in it, for any number of
    workers. Raises TaskError where the data set cannot be read by row number.

    >>> import torch, hpt_torch as hpt
    >>> images = torch.utils.data.TensorDataset(torch.zeros(8, 3, 4, 4), torch.arange(8))
    >>> data = hpt.Data(train=hpt.Stream(images, workers=2), valid=hpt.Stream(images), out_features=8)
    >>> len(data.train)
    8
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Rows,
        *,
        workers: int = 0,
        names: Sequence[str] = ("inputs", "targets"),
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if isinstance(dataset, (DataLoader, IterableDataset)):
            raise TaskError(
                f"a Stream reads rows by their number, in an order of its own, which {_a(dataset)} does not "
                "allow; pass a map-style data set (of a DataLoader: `loader.dataset`)"
            )
        for method in ("__len__", "__getitem__"):
            if not hasattr(dataset, method) and not isinstance(dataset, Rows):
                raise TaskError(
                    f"a Stream needs a data set with __len__ and __getitem__, got {_a(dataset)} without "
                    f"{method}"
                )
        if not len(dataset):  # type: ignore[arg-type]
            raise TaskError("a Stream needs at least one row, got a data set of length 0")
        if workers < 0:
            raise TaskError(f"workers must be 0 or more, got {workers}")
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise TaskError(f"names must be different names, one for each value of an item, got {names!r}")
        self.dataset, self.workers = dataset, workers
        self._reader = _Reader(dataset, tuple(names), collate_fn)
        self._device, self._dtype = torch.device("cpu"), None  # type: tuple[torch.device, torch.dtype | None]
        self._scale: tuple[Tensor, Tensor] | None = None
        self._keys = _Keys()
        self._loader: DataLoader[dict[str, Tensor]] | None = None
        self._turn = 0
        self._first: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self._device

    def first(self) -> dict[str, Tensor]:
        if self._first is None:
            self._first = self._reader[0, 0, [0]]
        return self._first

    def to(
        self, device: torch.device, dtype: torch.dtype, *, scale: tuple[Tensor, Tensor] | None = None
    ) -> Stream:
        """The same rows, whose batches come on `device`, as `Rows.to` makes them."""
        moved = self._like(self.dataset)
        moved._device, moved._dtype = device, dtype
        moved._scale = (scale[0].to(device), scale[1].to(device)) if scale is not None else None
        return moved

    def subset(self, index: Tensor) -> Stream:
        """The rows at `index`, shape (B,), as a stream of their own."""
        if isinstance(self.dataset, Rows):
            subset = self._like(self.dataset.subset(index))
        else:
            subset = self._like(_Chosen(self.dataset, index.tolist()))
        subset._device, subset._dtype, subset._scale = self._device, self._dtype, self._scale
        return subset

    def _like(self, dataset: Dataset[Any] | Rows) -> Stream:
        reader = self._reader
        return Stream(dataset, workers=self.workers, names=reader.names, collate_fn=reader.collate_fn)

    # -- reading ---------------------------------------------------------------------------------------

    def select(self, index: Tensor) -> dict[str, Tensor]:
        """The rows at `index`, shape (B,), as one batch on the device."""
        raw = list(self._read(index.tolist(), _READ_ROWS, 0, _seed_of(index)))
        return self._moved({name: torch.cat([part[name] for part in raw]) for name in raw[0]}, 0)

    def slice(self, start: int, stop: int) -> dict[str, Tensor]:
        rows = range(len(self))[start:stop]
        return self._moved(self._reader[0, rows.start, rows], 0)

    def batches(
        self, order: Tensor | None, size: int, start: int = 0
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """As `Rows.batches`; the next batches are read while one is used. One pass at a time."""
        rows = range(len(self)) if order is None else order.tolist()
        seed = 0 if order is None else _seed_of(order)
        for index, raw in enumerate(self._read(rows, size, start, seed), start):
            yield index, self._moved(raw, 0 if order is None else index % GATHER * size)

    def _read(self, rows: Sequence[int], size: int, start: int, seed: int) -> Iterator[dict[str, Tensor]]:
        if self._loader is None:
            self._loader = DataLoader(
                self._reader,
                batch_size=None,  # a key is a whole batch
                sampler=self._keys,
                num_workers=self.workers,
                collate_fn=_same,
                pin_memory=self._device.type == "cuda",
                persistent_workers=self.workers > 0,
                worker_init_fn=_init_worker,
            )
        self._turn += 1
        turn = self._turn
        self._keys.keys = [(seed, at, rows[at : at + size]) for at in range(start * size, len(rows), size)]
        with torch_seeded(0, "stream"):  # a DataLoader draws a seed for its workers from torch's generator
            batches = iter(self._loader)
        for raw in batches:
            yield raw
            assert turn == self._turn, "a stream is read once at a time"

    def _moved(self, raw: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
        """On the device, each where its row `first` would lie among those that `Rows` gathers with it.

        Kernels may round differently on differently aligned memory, and the bits are to be those of `Rows`.
        """
        moved = {}
        for name, tensor in raw.items():
            tensor = tensor.to(self._device, non_blocking=True)
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            if self._scale is not None and name == "inputs" and tensor.dtype == torch.uint8:
                assert self._dtype is not None
                dtype = self._dtype
                tensor = normalised(tensor, *self._scale, self._device, dtype)
            row = tensor[:1].numel()
            lead = first * row % (_ALIGNMENT // dtype.itemsize)
            flat = torch.empty(lead + tensor.numel(), dtype=dtype, device=self._device)[lead:]
            moved[name] = laid_out(flat, tensor.shape).copy_(tensor)
        return moved

    def digest(self, digest: Any) -> None:
        """Covers the length and a few items spread over the set: reading it all may take hours."""
        count = min(len(self), _FINGERPRINT_ROWS)
        digest.update(f"stream of {len(self)}\n".encode())
        for i in range(count):
            at = i * (len(self) - 1) // max(count - 1, 1)
            for name, tensor in sorted(self._reader[0, at, [at]].items()):
                digest_tensor(digest, name, tensor)

    def close(self) -> None:
        """Ends the workers. They are started again when they are needed."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._loader = None


class _Reader(Dataset[dict[str, Tensor]]):
    """Makes a batch of a key; what is sent to the workers."""

    def __init__(
        self, dataset: Any, names: tuple[str, ...], collate_fn: Callable[[list[Any]], Any] | None
    ) -> None:
        self.dataset, self.names, self.collate_fn = dataset, names, collate_fn

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        seed, at, rows = key
        if isinstance(self.dataset, Rows):
            return self.dataset.select(torch.tensor(rows))
        with globally_seeded(seed, "stream", at):
            items = [self.dataset[row] for row in rows]
            return self._collated(items)

    def _collated(self, items: list[Any]) -> dict[str, Tensor]:
        if self.collate_fn is not None:
            return _tensors(self._named(self.collate_fn(items)), len(items))
        named = [self._named(item) for item in items]
        try:
            batch = default_collate(named)
        except (RuntimeError, TypeError, KeyError) as error:
            text = str(error).strip().splitlines()[0]
            raise TaskError(
                f"items of the data set cannot be made a batch: {text}. Every value must be a tensor, an "
                "array or a number, of the same shape in every item: add a transform that makes it so, or "
                "pass a collate_fn that pads"
            ) from error
        return _tensors(batch, len(items))

    def _named(self, item: Any) -> Mapping[str, Any]:
        if isinstance(item, Mapping):
            return item
        values = item if isinstance(item, (tuple, list)) else (item,)
        if len(values) != len(self.names):
            raise TaskError(
                f"an item of the data set has {len(values)} values, but names are {', '.join(self.names)}; "
                "pass names=(…), one for each value"
            )
        return dict(zip(self.names, values, strict=True))


class _Chosen(Dataset[Any]):
    """Some rows of a data set. torch's Subset would call a set's own way to read several at once."""

    def __init__(self, dataset: Any, rows: list[int]) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[self.rows[row]]


class _Keys:
    """The keys of the pass that is about to begin: workers outlive a pass, so their sampler does too."""

    keys: Iterable[Key] = ()

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)


def needed_bytes(data: Data, dtype: torch.dtype) -> int:
    """What the tensors of `data` take on a device, with the train rows that are measured."""
    train = sum(_row_bytes(data, tensor, name, dtype) for name, tensor in data.train.first().items())
    total = train * min(len(data.train), len(data.valid))
    for part in (data.train, data.valid, data.holdout):
        if isinstance(part, Rows):
            row = sum(_row_bytes(data, tensor, name, dtype) for name, tensor in part.first().items())
            total += row * len(part)
    return total


def fitted(data: Data, dtype: torch.dtype, free_bytes: int) -> Data:
    """The data, with the train rows left in memory and streamed where all would need more than 80 % of the
    device's free bytes."""
    if not isinstance(data.train, Rows) or needed_bytes(data, dtype) <= _FREE_SHARE * free_bytes:
        return data
    return dataclasses.replace(data, train=Stream(data.train))


def _row_bytes(data: Data, row: Tensor, name: str, dtype: torch.dtype) -> int:
    becomes_real = data.mean is not None and name == "inputs" and row.dtype == torch.uint8
    size = dtype.itemsize if becomes_real or row.is_floating_point() else row.dtype.itemsize
    return row.numel() * size


def _tensors(batch: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    tensors = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise TaskError(
                f"{name} of an item must be a tensor, an array or a number, got {_a(value)}; convert it in "
                "the data set, or pass a collate_fn"
            )
        if not value.dim() or len(value) != rows:
            raise TaskError(
                f"{name} of a batch of {rows} items must have {rows} rows, got shape {tuple(value.shape)}; "
                "collate_fn must keep them"
            )
        whole = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        keep = name == "inputs" and value.dtype == torch.uint8
        tensors[name] = value.long() if whole and not keep else value
    return tensors


def _seed_of(order: Tensor) -> int:
    """What a pass in this order may draw from: orders differ between epochs, so do the draws."""
    digest = hashlib.blake2b(order.cpu().contiguous().numpy().tobytes(), digest_size=8)
    return derive_seed(int.from_bytes(digest.digest(), "big"), "stream")


def _init_worker(worker: int) -> None:
    """Signals are for the main process: it stops at the next step, and reads until then."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _spare_once)
    # A fork holds the run's lock too, so it must not outlive a killed run by the seconds it would take to
    # notice by itself.
    die_with_parent = getattr(torch.multiprocessing, "_prctl_pr_set_pdeathsig", None)
    if die_with_parent is not None:
        die_with_parent(signal.SIGKILL)


def _spare_once(number: int, frame: FrameType | None) -> None:
    """The first one went to the whole process group; a second one is meant for the worker."""
    signal.signal(number, signal.SIG_DFL)


def _same(batch: Any) -> Any:
    return batch


def _a(value: Any) -> str:
    return f"a {type(value).__name__}"
