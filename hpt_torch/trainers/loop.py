"""The loop trainer: one member after another, with plain autograd and torch's fused optimizer kernels.

The fallback for what cannot be mapped over members, and the oracle that the others are tested against.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpt_torch import optim
from hpt_torch.data import Data
from hpt_torch.population import Population, stack
from hpt_torch.task import Task
from hpt_torch.trainers import base
from hpt_torch.trainers.base import SegmentResult, ShouldPause
from hpt_torch.types import HParams, Report


class LoopTrainer:
    """Trains the members of a population one by one.

    data: on `device`, in `dtype`; `seed` is the run's. Every random draw derives from (seed, trial, step).
    """

    def __init__(
        self, task: Task, data: Data, *, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        self.task, self.data, self.device, self.dtype, self.seed = task, data, device, dtype, seed
        self.dynamic = task.dynamic_hparams
        self.order = base.DataOrder(len(data.train), seed, device)
        self.probe = base.probe(data.train, data.valid, seed)
        self._channels_last = any(t.dim() == 4 for t in data.train.tensors.values())

    # -- members ---------------------------------------------------------------------------------------

    def build(self, hparams: HParams, trial: int) -> nn.Module:
        """The trial's untrained model on the device. Raises InfeasibleError where there is none."""
        model = base.build(self.task, hparams, trial, self.seed).to(self.device, self.dtype)
        return model.to(memory_format=torch.channels_last) if self._channels_last else model

    def init(self, trials: Sequence[int], hparams: Sequence[HParams]) -> Population:
        """A new population, each member with its own initial weights."""
        params, buffers, slots = [], [], []
        for trial, values in zip(trials, hparams, strict=True):
            model = self.build(values, trial)
            learned, kept = self._tensors(model)
            params.append(learned)
            buffers.append(kept)
            names = optim.SLOTS[str(values["optimizer"])]
            slots.append(
                {f"{slot}/{name}": torch.zeros_like(t) for slot in names for name, t in learned.items()}
            )
        zeros = torch.zeros(len(trials), dtype=torch.float64, device=self.device)
        return Population(
            trials=list(trials),
            hparams=list(hparams),
            params=stack(params, self.device),
            buffers=stack(buffers, self.device),
            slots=stack(slots, self.device),
            sums={name: zeros.clone() for name in ("loss", "grad_norm", "clipped")},
        )

    def weights(self, population: Population, i: int) -> dict[str, Tensor]:
        """Member i's weights as its model's state_dict names them."""
        model = self.build(population.hparams[i], population.trials[i])
        names = set(model.state_dict())
        member = population.member(i)
        return {
            name: t.detach().clone()
            for name, t in (member["params"] | member["buffers"]).items()
            if name in names
        }

    def load(self, hparams: HParams, trial: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """A model in evaluation mode with these weights."""
        return base.load_weights(self.build(hparams, trial), weights, hparams, self.dynamic)

    def _tensors(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is learned, and everything else that training may change or weights must hold."""
        learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        kept = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        kept |= {n: b for n, b in model.named_buffers() if not base.is_hparam_buffer(n, self.dynamic)}
        return learned, kept

    # -- training --------------------------------------------------------------------------------------

    def train(self, population: Population, until_epoch: int, *, should_pause: ShouldPause) -> SegmentResult:
        """Trains every active member until it has `until_epoch` epochs, or until `should_pause()`.

        An exception in the task's code ends that member alone: it is in `failed` with its traceback.
        """
        result = SegmentResult()
        for i in range(len(population)):
            while population.active[i] and population.epoch[i] < until_epoch and not result.paused:
                try:
                    self._train_epoch(population, i, result, should_pause)
                except Exception:  # user code may raise anything; the traceback is the trial's reason
                    self._fail(population, i, result, traceback.format_exc(limit=-8))
        return result

    def _fail(self, population: Population, i: int, result: SegmentResult, reason: str) -> None:
        population.active[i] = False
        result.failed[population.trials[i]] = reason

    def _train_epoch(
        self, population: Population, i: int, result: SegmentResult, should_pause: ShouldPause
    ) -> None:
        started = time.perf_counter()
        hparams, trial = population.hparams[i], population.trials[i]
        member = _Member(self, population, i)
        order = self.order.epoch(population.epoch[i])
        size = min(int(hparams["batch_size"]), len(order))  # type: ignore[arg-type]
        batches = self.order.batches(size)
        for index in range(population.batch[i], batches):
            member.step(self.data.train.select(order[index * size : (index + 1) * size]))
            if should_pause() and index + 1 < batches:
                member.store(batch=index + 1)
                result.paused = True
                return
        metrics = base.measure(self.task, member.model, self.probe, self.data)
        train_loss = float(member.sums["loss"]) / batches
        if math.isfinite(float(hparams["grad_clip_norm"])):  # type: ignore[arg-type]
            metrics["train/grad_norm"] = float(member.sums["grad_norm"]) / batches
            metrics["train/clipped_share"] = float(member.sums["clipped"]) / batches
        member.store(batch=0)
        population.epoch[i] += 1
        if reason := base.diverged(metrics, population.epoch[i], train_loss):
            self._fail(population, i, result, reason)
            return
        seconds = time.perf_counter() - started
        result.reports.append(
            Report(trial=trial, epoch=population.epoch[i], metrics=metrics, seconds=seconds)
        )


class _Member:
    """One member taken out of its population: a real module with its own, aligned memory.

    Kernels may round differently on differently aligned memory, so members are trained in a copy and
    stored back: the result does not depend on the position in the stack.
    """

    def __init__(self, trainer: LoopTrainer, population: Population, i: int) -> None:
        self.trainer, self.population, self.i = trainer, population, i
        hparams, trial = population.hparams[i], population.trials[i]
        self.model = trainer.build(hparams, trial)
        base.set_hparams(self.model, hparams, trainer.dynamic)
        learned, kept = trainer._tensors(self.model)
        self.views = population.member(i)
        for mine, theirs in ((learned, self.views["params"]), (kept, self.views["buffers"])):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.learned, self.kept = learned, kept
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.slots = {
            name: t.clone(memory_format=torch.preserve_format) for name, t in self.views["slots"].items()
        }
        self.sums = {name: t.clone() for name, t in self.views["sums"].items()}
        self.steps = population.step[i]
        self.optimizer = str(hparams["optimizer"])
        self.slot_lists = {
            slot: [self.slots[f"{slot}/{name}"] for name in learned] for slot in optim.SLOTS[self.optimizer]
        }
        self.floats: dict[str, Any] = {
            name: float(value) if name in trainer.dynamic and isinstance(value, (int, float)) else value
            for name, value in hparams.items()
        }
        self.clip = self.floats["grad_clip_norm"]
        self.tensors = {
            name: torch.tensor(value, dtype=trainer.dtype, device=trainer.device)
            if name in trainer.dynamic
            else value
            for name, value in self.floats.items()
        }
        self.noise = base.noise_seed(trainer.seed, trial)
        self.noise_keys = [b for n, b in self.model.named_buffers() if n.rpartition(".")[2] == "noise_key"]

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """One optimizer step. Everything random in it derives from (seed, trial, step)."""
        key = base.step_key(self.noise, self.steps)
        for buffer in self.noise_keys:
            buffer.fill_(key)
        torch.default_generator.manual_seed(key & 0xFFFFFFFF)  # for draws of the user's own modules
        if self.trainer.device.type == "cuda":
            torch.cuda.manual_seed(key & 0xFFFFFFFF)
        loss = self.trainer.task.loss(self.model, batch, self.tensors)
        grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
        self.steps += 1
        if math.isfinite(self.clip):
            norm = optim.clip_norm_(grads, self.clip)
            self.sums["grad_norm"] += norm
            self.sums["clipped"] += norm > self.clip
        optim.step_(self.optimizer, self.params, grads, self.slot_lists, self.steps, self.floats)
        self.sums["loss"] += loss.detach()

    def store(self, batch: int) -> None:
        """Back into the population; `batch` batches into the epoch (0: the epoch is done)."""
        for mine, group in ((self.learned, "params"), (self.kept, "buffers"), (self.slots, "slots")):
            for name, tensor in mine.items():
                self.views[group][name].copy_(tensor)
        for name, tensor in self.sums.items():
            self.views["sums"][name].copy_(tensor if batch else torch.zeros_like(tensor))
        self.population.step[self.i] = self.steps
        self.population.batch[self.i] = batch
