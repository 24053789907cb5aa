"""What all trainers share: segments and their results, data order, model set-up, evaluation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from hpt_torch.data import Part, Rows
from hpt_torch.hparams import CLASSIFICATION, TRAINING
from hpt_torch.models.layers import Dropout, make_stateless, set_noise, stateless_layers
from hpt_torch.seeding import derive_seed, generator, torch_seeded
from hpt_torch.task import Task
from hpt_torch.trainers.draws import Draws
from hpt_torch.types import HParams, Report, TaskError

EVALUATION_BATCH = 1024
NORMS = 4  # steps of an epoch at which the gradient's norm is measured where nothing is clipped


@dataclass
class SegmentResult:
    """What a segment brought: reports, members that ended badly, and whether it was left half-way."""

    reports: list[Report] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)  # trial -> why
    paused: bool = False  # `should_pause` said so: the population stands inside an epoch


ShouldPause = Callable[[], bool]


class DataOrder:
    """Which rows make up which batch: a function of (seed, epoch), shared by all members.

    Every epoch has a new order; its last partial batch is dropped; a batch size above the number of rows
    means all of them.
    """

    def __init__(self, rows: int, seed: int, device: torch.device) -> None:
        self.rows, self.seed, self.device = rows, seed, device
        self._cached: tuple[int, Tensor] | None = None

    def batches(self, batch_size: int) -> int:
        """Batches an epoch."""
        return self.rows // min(batch_size, self.rows)

    def epoch(self, epoch: int) -> Tensor:
        """The rows in the order of this epoch (0-based), shape (rows,)."""
        if self._cached is None or self._cached[0] != epoch:
            order = generator(self.seed, "order", 0, epoch).permutation(self.rows)
            self._cached = epoch, torch.from_numpy(order).to(self.device)
        return self._cached[1]


def build(
    task: Task, hparams: HParams, trial: int, seed: int, rows: Part | None = None, *, plain: bool = False
) -> nn.Module:
    """The member's model with its initial weights: a function of (seed, trial), made on the CPU.

    rows: from the first of them lazy layers (``nn.LazyLinear``) take their shapes; without, these stay lazy.
    plain: as the task builds it, not to be trained here.
    """
    with torch_seeded(seed, "init", trial):
        model = task.build_model(hparams) if plain else task.build_marked(hparams)
        if rows is not None and any(map(is_lazy, (*model.parameters(), *model.buffers()))):
            row = {n: t.float() if t.is_floating_point() else t for n, t in one_row(rows).items()}
            with torch.no_grad():
                task.metrics(model.eval(), row)
    return model if plain else make_stateless(model, marked=bool(task.rate_hparams)).train()


def one_row(rows: Part) -> dict[str, Tensor]:
    """The first row as a batch of one, on the CPU."""
    return {n: t.cpu() for n, t in rows.select(torch.zeros(1, dtype=torch.int64, device=rows.device)).items()}


_OF_TRAINING = frozenset(spec.name for spec in (*TRAINING, *CLASSIFICATION))


def hparam_buffers(model: nn.Module, named: frozenset[str]) -> dict[str, str]:
    """The model's buffers that are hyperparameters of it, by name: which. named: `Task.buffer_hparams`. One
    that is called `eps` or `alpha` has nothing to do with the optimizer's."""
    found = {}
    for path, module in model.named_modules():
        for leaf, _ in module.named_buffers(recurse=False):
            argument = module.hparam if isinstance(module, Dropout) and leaf == "dropout" else None
            hparam = leaf if argument is None and leaf in named - _OF_TRAINING else argument
            if hparam:
                found[f"{path}.{leaf}" if path else leaf] = hparam
    return found


def is_noise_key(name: str) -> bool:
    """Whether a buffer is the key of a layer's noise."""
    return name.rpartition(".")[2] == "noise_key"


def set_hparams(model: nn.Module, hparams: HParams, named: frozenset[str]) -> None:
    """Fills the model's hyperparameter buffers with these values."""
    buffers = dict(model.named_buffers())
    for name, hparam in hparam_buffers(model, named).items():
        if hparam in hparams:
            buffers[name].fill_(float(hparams[hparam]))  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, Dropout):
            module.rate = float(module.dropout)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], hparams: HParams, named: frozenset[str]
) -> nn.Module:
    """The model with these weights and hyperparameters, in evaluation mode."""
    # What a module keeps besides tensors (`get_extra_state`) stays as the new model has it.
    own = {n: v for n, v in model.state_dict().items() if n.rpartition(".")[2] == "_extra_state"}
    model.load_state_dict({**own, **weights})
    set_hparams(model, hparams, named)
    return model.eval()


def probe(train: Part, valid: Part, seed: int) -> Part:
    """The train rows on which train metrics are measured: as many as there are valid rows, chosen once.

    So that the gap between train and valid is that of two equally large samples, both in evaluation mode,
    at a cost that does not grow with the train split. They are in memory where the valid rows are.
    """
    count = min(len(train), len(valid))
    index = torch.from_numpy(generator(seed, "probe").permutation(len(train))[:count])
    if isinstance(valid, Rows):
        return Rows(train.select(index.to(train.device)))
    return train.subset(index)


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, rows: Part, autocast: torch.dtype | None = None
) -> dict[str, float]:
    """The task's metrics over all rows, in evaluation mode."""
    was_training = model.training
    model.eval()
    totals: dict[str, Tensor | list[Tensor]] = {}
    layers = stateless_layers(model)
    for index, batch in rows.batches(None, EVALUATION_BATCH):
        with Draws(*evaluation_noise(index, rows.device, layers)), cast(rows, autocast):
            sums = task.metrics(model, batch)
        for name, value in sums.items():
            if name.startswith("each_"):
                totals.setdefault(name, []).append(value)  # type: ignore[union-attr]
            else:
                totals[name] = totals[name] + value if name in totals else value  # type: ignore[operator]
    model.train(was_training)
    return finalized(task, {n: torch.cat(t) if isinstance(t, list) else t for n, t in totals.items()})


def finalized(task: Task, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The task's metrics from its sums, as Python's numbers: a task may return tensors or NumPy's."""
    return {name: float(value) for name, value in task.finalize(sums).items()}


def loss_of(task: Task, model: nn.Module, batch: Mapping[str, Tensor], hparams: Mapping[str, Any]) -> Tensor:
    """The task's loss. Raises TaskError where it is not one number."""
    loss: Any = task.loss(model, batch, hparams)
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    rule = f"{type(task).__name__}.loss must return a tensor of shape ()"
    raise TaskError(f"{rule}, got {found}; take the mean over the batch")


def cast(rows: Part, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype` on the device of the rows (None: as they are), and for images `view` as a user
    knows it: they are laid out channels-last."""
    entered = contextlib.ExitStack()
    if dtype is not None:
        entered.enter_context(torch.autocast(rows.device.type, dtype=dtype))
    if rows.has_images:
        entered.enter_context(_Views())
    return entered


def evaluation_noise(index: int, device: torch.device, layers: Sequence[Dropout]) -> tuple[Tensor, int]:
    """The noise key of a batch in evaluation, as a tensor and as 32 bits: the same for all members, at all
    times. Those of the layers, which a model may keep in training mode, are set."""
    key = batch_key(_EVALUATION, index)
    set_noise(layers, key)
    return torch.tensor(key, dtype=torch.int32, device=device), key & 0xFFFFFFFF


_EVALUATION = 0x5EED


class _Views(TorchFunctionMode):
    """`x.view(...)` where x lies in memory so that it cannot be: a copy, as of a tensor laid out as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.view:
            return func(*args, **(kwargs or {}))
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            return Tensor.reshape(*args, **(kwargs or {}))


def norm_is_measured(index: int, batches: int) -> bool:
    """Whether the gradient's norm is measured at this step of an epoch also where nothing is clipped: at
    NORMS of them, spread evenly, for at every step it would cost a tenth of the training."""
    count = min(NORMS, batches)
    return (index + 1) * count // batches > index * count // batches


def gradient_metrics(norms: float, clipped: float, batches: int, clips: bool) -> dict[str, float]:
    """What a report says of an epoch's gradients. norms, clipped: sums over the steps at which they were
    measured: all where the trial clips, else those of `norm_is_measured`."""
    if not clips:
        return {"train/grad_norm": norms / min(NORMS, batches)}
    return {"train/grad_norm": norms / batches, "train/clipped_share": clipped / batches}


def noise_seed(seed: int, epoch: int) -> int:
    """The epoch's 32 bits from which the noise of each of its batches derives; shared by all members."""
    return derive_seed(seed, "noise", epoch, bits=32)


def batch_key(noise: int, batch: int, part: int = 0) -> int:
    """The noise key of a batch of the epoch, or of one part of it, as a signed 32-bit integer."""
    value = (noise + 0x9E3779B9 * (batch + 1)) & 0xFFFFFFFF
    if part:
        value = (value + 0x9E3779B9 * (part + 1)) & 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def noise_keys(noise: int, batches: int, parts: int, layers: Sequence[int]) -> Any:
    """`batch_key`, and `stream_key` of each layer from it, of all batches of an epoch at once.

    int32, shape (S, A, L + 1), for S batches of A parts; the last of the L + 1 is the batch's own key.
    """
    low, golden = np.uint64(0xFFFFFFFF), np.uint64(0x9E3779B9)
    batch_S = np.arange(batches, dtype=np.uint64)
    key_S = (np.uint64(noise) + golden * (batch_S + np.uint64(1))) & low
    offset_A = np.array([0, *range(2, parts + 1)], dtype=np.uint64)
    key_SA = (key_S[:, None] + golden * offset_A) & low
    streams_L = np.array(layers, dtype=np.uint64) + np.uint64(1)
    x = (key_SA[..., None] + golden * streams_L) & low
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & low
    x = x ^ (x >> np.uint64(16))
    return np.concatenate((x, key_SA[..., None]), axis=-1).astype(np.uint32).view(np.int32)


def unfit(metrics: Mapping[str, float], epoch: int, train_loss: float, scored: str | None) -> str | None:
    """Why the member cannot go on, or None: it diverged, or lacks the metric that it is scored by."""
    if not math.isfinite(train_loss):
        return f"diverged: the training loss is {train_loss} in epoch {epoch}"
    if scored is not None and scored not in metrics:
        return (
            f"the objective {scored} was not measured in epoch {epoch}, only {', '.join(sorted(metrics))}; "
            "the task's finalize() must return it, and roc_auc needs rows of every class"
        )
    telling = [name for name in sorted(metrics) if scored is None or _tells(name, scored)]
    bad = [name for name in telling if not math.isfinite(metrics[name])]
    return f"diverged: {bad[0]} is {metrics[bad[0]]} after epoch {epoch}" if bad else None


def _tells(name: str, scored: str) -> bool:
    return name in (scored, "train/grad_norm") or name.endswith("/loss")


def told(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that have a value: of a class without rows some have none."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer members may fit. (On the CPU torch raises a RuntimeError of its allocator.)"""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
