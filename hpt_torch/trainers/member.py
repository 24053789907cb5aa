"""One member taken out of its population: a real module that is trained with plain autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpt_torch import lr_schedules, optim
from hpt_torch.models.layers import set_noise, stateless_layers
from hpt_torch.population import Population
from hpt_torch.trainers import base
from hpt_torch.trainers.drawn import seed_torch
from hpt_torch.trainers.draws import Draws
from hpt_torch.trainers.programs import shapes

if TYPE_CHECKING:
    from hpt_torch.trainers.loop import LoopTrainer


class Member:
    """Member i of a population, in memory of its own.

    Kernels may round differently on differently aligned memory, so members are trained in a copy and stored
    back: the result does not depend on the position in the stack.
    """

    def __init__(self, trainer: LoopTrainer, population: Population, i: int) -> None:
        self.trainer, self.population, self.i = trainer, population, i
        hparams, trial = population.hparams[i], population.trials[i]
        self.model = trainer.module(hparams, trial)
        base.set_hparams(self.model, hparams, trainer.named)
        self.views = population.member(i)
        self.learned, self.fixed = trainer.split(self.model, hparams)
        for mine, group in ((self.learned, "params"), (self.fixed, "buffers")):
            for name, tensor in mine.items():
                tensor.copy_(self.views[group][name])
        named = dict(self.model.named_parameters())
        self.params = [named[name] for name in self.learned]
        self.slots = {  # laid out as the parameters are
            n: torch.empty_like(self.learned[n.partition("/")[2]]).copy_(t)
            for n, t in self.views["slots"].items()
        }
        self.sums = {name: t.clone() for name, t in self.views["sums"].items()}
        self.steps = population.step[i]
        self._read_hparams(hparams)
        self.noisy = stateless_layers(self.model)
        self.noise = base.noise_seed(trainer.seed, population.epoch[i])
        self._cuda = trainer.device.type == "cuda"
        self.batches = 1  # of the epoch
        self.steps_left = 0  # with these hyperparameters, this epoch's included: whether tracing pays
        self.buffers = dict(self.model.named_buffers())
        self.replaced = ""  # a buffer in whose place the model puts another tensor
        self.h_tensors = {n: t for n, t in self.tensors.items() if isinstance(t, Tensor)}
        own = base.hparam_buffers(self.model, trainer.named)
        fixed = {n: t for n, t in self.buffers.items() if n in own or base.is_noise_key(n)}
        fixed |= {n: t for n, t in self.h_tensors.items() if n in trainer.dynamic}
        self.constants = list(fixed.values())
        self.steady = [*self.constants, *(t for n, t in self.h_tensors.items() if n != "noise_key")]
        self.watched = [trainer.task, *self.model.modules()]
        self.state = trainer.module_programs.state(self.watched)

    def _read_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Hyperparameters as the step reads them: floats for kernels, tensors for the task's loss."""
        trainer = self.trainer
        self.h: dict[str, Any] = {
            name: float(value) if name in trainer.dynamic and value is not None else value
            for name, value in hparams.items()
        }
        self.tensors: dict[str, Any] = {
            name: torch.tensor(value, dtype=trainer.dtype, device=trainer.device)
            if name in trainer.dynamic and value is not None
            else value
            for name, value in self.h.items()
        }
        self.tensors["noise_key"] = torch.zeros((), dtype=torch.int32, device=trainer.device)
        self.optimizer = str(hparams["optimizer"])
        dims = [parameter.dim() for parameter in self.params]
        self.groups = optim.groups(
            list(self.learned), dims, self.h["head"], bool(self.h["decay_norm_and_bias"])
        )
        names = list(self.learned)
        self.group_slots = [
            {
                slot: [self.slots[f"{slot}/{names[i]}"] for i in group.indices]
                for slot in optim.SLOTS[self.optimizer]
            }
            for group in self.groups
        ]
        decay = self.h["weight_decay"]
        self.group_h = [{**self.h, "weight_decay": decay if g.decays else 0.0} for g in self.groups]
        self.averaged = [self.slots[f"ema/{name}"] for name in names] if self.h["ema"] else []
        self.clips = math.isfinite(self.h["grad_clip_norm"]) or math.isfinite(self.h["grad_clip_value"])

    def lr_factors(self, batches: int) -> list[float]:
        """The schedule's factors at every step of the epoch that the member is in."""
        epoch, epochs = self.population.epoch[self.i], self.trainer.epochs
        factors: list[float] = lr_schedules.factors(
            str(self.h["schedule"]), epoch, batches, epochs, self.h
        ).tolist()
        return factors

    # -- one step --------------------------------------------------------------------------------------

    def step(self, batch: Mapping[str, Tensor], lr_factor: float, index: int) -> None:
        """One optimizer step, on batch `index` of the epoch. Everything random in it derives from (seed,
        epoch, index)."""
        key = base.batch_key(self.noise, index)
        self._set_noise(key)
        loss, grads = self._gradients(batch, index)
        self.steps += 1
        for group in self.groups:
            if group.decays and (self.h["l1"] or self.h["l2"]):
                added = optim.add_penalty(
                    [self.params[i] for i in group.indices],
                    [grads[i] for i in group.indices],
                    self.h["l1"],
                    self.h["l2"],
                )
                for i, grad in zip(group.indices, added, strict=True):
                    grads[i] = grad
        if self.clips:
            grads, norm, touched = optim.clip(grads, self.h["grad_clip_norm"], self.h["grad_clip_value"])
            self.sums["grad_norm"] += norm
            self.sums["clipped"] += touched
        elif base.norm_is_measured(index, self.batches):
            self.sums["grad_norm"] += optim.norm_of(grads)
        lr = self.h["lr"] * lr_factor
        with torch.no_grad():
            for group, slots, h in zip(self.groups, self.group_slots, self.group_h, strict=True):
                h["lr"] = lr * self.h["head_lr_factor"] if group.head else lr
                members = [self.params[i] for i in group.indices]
                optim.step_(self.optimizer, members, [grads[i] for i in group.indices], slots, self.steps, h)
            if self.averaged:
                torch._foreach_lerp_(self.averaged, list(self.learned.values()), 1 - self.h["ema_decay"])
        self.sums["loss"] += loss

    def _set_noise(self, key: int) -> None:
        set_noise(self.noisy, key)
        self.tensors["noise_key"].fill_(key)
        self._seed = key & 0xFFFFFFFF
        seed_torch(self._seed)
        if self._cuda:
            torch.cuda.manual_seed(self._seed)

    def _gradients(self, batch: Mapping[str, Tensor], index: int) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of the batch, in one piece or added up over its parts."""
        rows = len(next(iter(batch.values())))
        parts = min(int(self.h["accumulation_steps"]), rows)
        if parts == 1:
            return self._differentiate(batch)
        loss, grads = torch.zeros((), device=self.trainer.device), None
        for part in range(parts):
            start, stop = rows * part // parts, rows * (part + 1) // parts
            if part:
                self._set_noise(base.batch_key(self.noise, index, part))
            piece = {name: tensor[start:stop] for name, tensor in batch.items()}
            share, new = self._differentiate(piece)
            weight = (stop - start) / rows
            new = list(torch._foreach_mul(new, weight))
            grads = new if grads is None else list(torch._foreach_add(grads, new))
            loss = loss + share * weight
        assert grads is not None
        return loss, grads

    def _differentiate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of these rows."""
        run = self.trainer.module_programs.get(
            ("step", self.state, shapes(batch)),
            self.steps_left,
            constants=self.constants,
            watched=self.watched,
            steady=self.steady,
        )
        loss, grads = run(self._plain, self.learned, self.buffers, self.h_tensors, batch)
        return loss, list(grads)

    def _plain(self, params: Any, buffers: Any, h_tensors: Any, batch: Mapping[str, Tensor]) -> Any:
        """`_differentiate`, with plain autograd. The arguments are the model's own tensors and `tensors`."""
        with Draws(self.tensors["noise_key"], self._seed):  # also where gradients compute something again
            with torch.enable_grad(), base.cast(self.trainer.probe, self.trainer.autocast):
                loss = base.loss_of(self.trainer.task, self.model, batch, self.tensors)
            self._take_back_buffers()
            grads = torch.autograd.grad(loss, self.params, allow_unused=True, materialize_grads=True)
        return loss.detach(), [optim.laid_out_as(p, g) for p, g in zip(self.params, grads, strict=True)]

    def _take_back_buffers(self) -> None:
        """Writes into a buffer what the model has put in its place (``self.mean = 0.9 * self.mean``)."""
        for name, tensor in list(self.model.named_buffers()):
            mine = self.buffers.get(name)
            if mine is not None and tensor is not mine:
                owner, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(owner), leaf, mine)
                mine.copy_(tensor.detach())
                self.replaced = name

    # -- between steps ---------------------------------------------------------------------------------

    def measure(self) -> dict[str, float]:
        """Metrics on train and valid, with the averaged weights where the member has them."""
        self._swap_averaged()
        try:
            return {
                f"{part}/{name}": value
                for part, rows in (("train", self.trainer.probe), ("valid", self.trainer.data.valid))
                for name, value in base.evaluate(
                    self.trainer.task, self.model, rows, self.trainer.autocast
                ).items()
            }
        finally:
            self._swap_averaged()

    def _swap_averaged(self) -> None:
        for parameter, average in zip(self.params, self.averaged, strict=False):
            mine = parameter.detach().clone()
            parameter.detach().copy_(average)
            average.copy_(mine)

    def keep(self) -> None:
        """Makes the weights of this epoch the ones that the trial keeps."""
        for name, tensor in self.learned.items():
            source = self.slots[f"ema/{name}"] if self.averaged else tensor
            self.views["kept"][name].copy_(source)
        for name, tensor in self.fixed.items():
            self.views["kept"][name].copy_(tensor)

    def store(self, batch: int) -> None:
        """Back into the population; `batch` batches into the epoch (0: the epoch is done)."""
        for mine, group in ((self.learned, "params"), (self.fixed, "buffers"), (self.slots, "slots")):
            for name, tensor in mine.items():
                self.views[group][name].copy_(tensor)
        for name, tensor in self.sums.items():
            self.views["sums"][name].copy_(tensor if batch else torch.zeros_like(tensor))
        self.population.step[self.i] = self.steps
        self.population.batch[self.i] = batch
