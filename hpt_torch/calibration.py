"""The cost table of this machine: `hpt doctor --calibrate` measures and keeps it, new runs plan with it."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hpt_torch.data import Data, Rows, cache
from hpt_torch.machine import keep_freed_memory
from hpt_torch.seeding import generator
from hpt_torch.tasks import MODELS, Classification
from hpt_torch.trainers import inductor
from hpt_torch.trainers.compiled import CompiledTrainer
from hpt_torch.trainers.costs import SHIPPED, TRAITS, Costs, loads
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import DamageError, HParams, writing

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How long is measured."""

    members: Sequence[int] = (2, 8, 32)
    compiled: Sequence[int] = (8,)  # members of which the step is compiled
    rows: int = 512
    repeats: int = 5  # pairs of a time one way and one the other
    seconds: float = 0.1  # of training, at least, behind each time


_BATCH = 64
# Compiling takes a worker so many times what is measured here: it has torch.compile to load first, and
# another worker compiles beside it (20 s, where this process took 11; notebooks/LOG.md).
_IN_A_WORKER = 1.8
# Model, its input's shape, its hyperparameters: of each trait a small model of usual sizes.
_EXAMPLES: Mapping[str, tuple[str, tuple[int, ...], HParams]] = {
    "convolution": ("cnn", (1, 16, 16), {"channels": (16, 32)}),
    "dense": ("mlp", (64,), {"hidden_sizes": (128, 128)}),
    **{cell: ("rnn", (16, 8), {"cell": cell, "hidden_size": 64}) for cell in ("gru", "lstm", "rnn")},
}


def path() -> Path:
    """Where the table of this machine lies."""
    return cache.directory() / "costs.json"


def present() -> Costs:
    """The table that was measured on this machine, else the shipped one. Raises DamageError."""
    file = path()
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return SHIPPED
    except OSError as error:
        _log.warning("%s cannot be read (%s); the shipped cost table is used", file, error.strerror)
        return SHIPPED
    except UnicodeDecodeError as error:
        raise _damaged(file, error) from error
    try:
        return loads(text)
    except ValueError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: ValueError) -> DamageError:
    return DamageError(
        f"{file}, the cost table of this machine, is damaged ({error}); measure it again with "
        "hpt doctor --calibrate, or remove the file to plan with the shipped table"
    )


def calibrate(say: Callable[[str], None], effort: Effort | None = None) -> Costs:
    """Measures the table on this machine's CPU, and its CUDA device if there is one, and keeps it."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    costs = measure([torch.device(device) for device in devices], effort or Effort(), say)
    file = path()
    with writing(file):
        cache.write(file, costs.dumps().encode())
    return costs


def measure(devices: Sequence[torch.device], effort: Effort, say: Callable[[str], None]) -> Costs:
    """The table of these devices, on one thread; `say` is told each ratio."""
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios: dict[str, dict[str, dict[int, float]]] = {}
    pays_after: dict[str, dict[str, dict[int, float]]] = {}
    try:
        for device in devices:
            for trait in TRAITS:
                row = ratios.setdefault(device.type, {}).setdefault(trait, {})
                for members in effort.members:
                    row[members] = round(_ratio(trait, members, device, effort), 3)
                    say(f"{device.type}, {trait}: {members} together at {row[members]:.2f} x")
            if inductor.missing(device.type) is None:
                steps = _pays_after("dense", device, effort, say)
                pays_after[device.type] = {"dense": steps} if steps else {}
    finally:
        torch.set_num_threads(threads)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Costs(ratios=ratios, pays_after=pays_after, measured=now, torch=str(torch.__version__))


def _ratio(trait: str, members: int, device: torch.device, effort: Effort) -> float:
    """The median over pairs of times, taken in turn: what else the machine does meets both engines alike."""
    alone = _Training(LoopTrainer, trait, 1, device, effort.rows)
    together = _Training(FusedTrainer, trait, members, device, effort.rows)
    for training in (alone, together):
        training.epoch_seconds(0.0)  # records its program
        training.epoch_seconds(effort.seconds / 4)
    pairs = [
        members * alone.epoch_seconds(effort.seconds) / together.epoch_seconds(effort.seconds)
        for _ in range(effort.repeats)
    ]
    return statistics.median(pairs)


def _pays_after(
    trait: str, device: torch.device, effort: Effort, say: Callable[[str], None]
) -> dict[int, float]:
    """By members: the steps after which the time to compile one has been saved, where a compiled one saves
    any."""
    found = {}
    for members in effort.compiled:
        fused = _Training(FusedTrainer, trait, members, device, effort.rows)
        fused.epoch_seconds(0.0)
        with inductor.nothing_cached(device):
            started = time.perf_counter()
            compiled = _Training(CompiledTrainer, trait, members, device, effort.rows)
            compiled.epoch_seconds(0.0)
            seconds = _IN_A_WORKER * (time.perf_counter() - started)
        pairs = [
            (fused.epoch_seconds(effort.seconds), compiled.epoch_seconds(effort.seconds))
            for _ in range(effort.repeats)
        ]
        saved = statistics.median(a - b for a, b in pairs) / (effort.rows // _BATCH)
        if saved > 0:
            found[members] = float(math.ceil(seconds / saved))
            says = f"{members} compiled in {seconds:.0f} s, which {found[members]:,.0f} steps save"
            say(f"{device.type}, {trait}: {says}")
    return found


class _Training:
    """A population of equal models that is trained for as long as one likes."""

    def __init__(
        self, engine: type[LoopTrainer], trait: str, members: int, device: torch.device, rows: int
    ) -> None:
        task, hparams = _example(trait, rows)
        data = task.data().to(device, torch.float32)
        self._trainer = engine(task, data, device=device, dtype=torch.float32, seed=0, epochs=10_000)
        # Numbers that differ, as in a search: equal ones share calls of the optimizer's kernel.
        own = [{**hparams, "lr": 1e-5 * (1 + i)} for i in range(members)]
        self._population = self._trainer.init(list(range(members)), own)
        self._epochs = 0

    def epoch_seconds(self, least: float) -> float:
        """Seconds an epoch, the mean over as many epochs as take `least` seconds together."""
        started, before = time.perf_counter(), self._epochs
        while True:
            self._epochs += 1
            result = self._trainer.train(self._population, self._epochs, should_pause=lambda: False)
            seconds = _IN_A_WORKER * (time.perf_counter() - started)
            assert not result.failed, result.failed
            if seconds >= least:
                return seconds / (self._epochs - before)


def _example(trait: str, rows: int) -> tuple[Classification, dict[str, Any]]:
    model, shape, own = _EXAMPLES[trait]
    inputs = generator(0, "calibration", trait).standard_normal((rows, *shape), dtype="float32")
    whole = Rows({"inputs": torch.from_numpy(inputs), "targets": torch.arange(rows) % 10})
    few = Rows(whole.slice(0, 16))  # training is timed, not evaluation
    task = Classification(MODELS[model], Data(train=whole, valid=few, out_features=10))
    defaults = {name: spec.default for name, spec in task.hparam_specs().items()}
    return task, {**defaults, **own, "batch_size": _BATCH}
