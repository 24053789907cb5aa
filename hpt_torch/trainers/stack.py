"""`Stack`: the members that train now, as one: their step, mapped with torch.func.vmap, and evaluation."""

# P members, S steps of an epoch, A parts of a batch, L stateless layers

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hpt_torch import lr_schedules, optim
from hpt_torch.data import Part
from hpt_torch.hparams import signature
from hpt_torch.models.layers import Dropout, stateless_layers
from hpt_torch.models.rates import given
from hpt_torch.population import Population
from hpt_torch.task import Task
from hpt_torch.trainers import base
from hpt_torch.trainers.draws import Draws
from hpt_torch.trainers.gradients import grad_and_value
from hpt_torch.trainers.programs import shapes

if TYPE_CHECKING:
    from hpt_torch.trainers.fused import FusedTrainer

_SMALLEST = 2  # a stack of one takes other kernels, which round differently


class _Mapped(nn.Module):
    """A method of the task as a module around the model, so that functional_call can swap its tensors."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model, self._task = model, (task,)

    def forward(self, batch: Mapping[str, Tensor], hparams: Mapping[str, Any] | None) -> Any:
        (task,) = self._task
        if hparams is None:
            return task.metrics(self.model, batch)
        return base.loss_of(task, self.model, batch, hparams)


@dataclass
class _Update:
    """One call of the optimizer's kernel: members with the same numbers, parameters treated alike."""

    row: int  # one of the members, whose count of steps is that of all
    places: list[tuple[str, int]]  # name and row of each tensor
    params: list[Tensor]
    slots: dict[str, list[Tensor]]
    h: dict[str, Any]
    lr_S: list[float]


class Stack:
    """The members that train now: the population's own tensors, or a copy of the chosen rows of them."""

    def __init__(self, trainer: FusedTrainer, population: Population, chosen: Sequence[int]) -> None:
        self.trainer, self.population, self.chosen = trainer, population, list(chosen)
        self.rows = self._rows()
        self._whole = self.rows == list(range(len(population)))
        index = torch.tensor(self.rows, device=trainer.device)
        self.groups = {
            name: tensors if self._whole else {n: t.index_select(0, index) for n, t in tensors.items()}
            for name, tensors in population.stacks()
        }
        self.params, self.buffers, self.slots = (self.groups[name] for name in ("params", "buffers", "slots"))
        self.sums = self.groups["sums"]
        self.seed, self.seeds_A = (
            0,
            [0],
        )  # 32 bits for the noise of the rows that are trained on; for all parts
        self.steps_left = 0  # of the trials, this epoch's included: decides whether tracing pays
        self.steps = [population.step[i] for i in self.rows]
        self.hparams = [population.hparams[i] for i in self.rows]
        self.static: dict[str, Any] = {n: v for n, v in self.hparams[0].items() if n not in trainer.dynamic}
        self.optimizer = str(self.static["optimizer"])
        self.names = list(self.params)
        self.module = _Mapped(trainer.task, trainer.module(self.hparams[0], population.trials[self.rows[0]]))
        self.rates = trainer.module_rates
        self.watched = trainer.task, *self.module.modules()
        self._read_hparams()

    def _rows(self) -> list[int]:
        """The chosen members, and again some of them where a stack of so many would not do."""
        return self.chosen if len(self.chosen) >= _SMALLEST else self.chosen * _SMALLEST

    def _read_hparams(self) -> None:
        """Each dynamic hyperparameter as (P,): float64 on the CPU for schedules, `dtype` on the device."""
        trainer = self.trainer
        self.values_P = {
            name: torch.tensor([_float(h[name]) for h in self.hparams], dtype=torch.float64)
            for name in sorted(trainer.dynamic)
            if self.hparams[0].get(name) is not None
        }
        self.h = {name: t.to(trainer.device, trainer.dtype) for name, t in self.values_P.items()}
        finite = torch.isfinite(self.values_P["grad_clip_norm"]) | torch.isfinite(
            self.values_P["grad_clip_value"]
        )
        self.clips_P, self.clipping_P = finite.tolist(), finite.to(trainer.device)
        # What is not so of any member is left out of the step.
        self.penalties = [name for name in ("l1", "l2") if bool((self.values_P[name] > 0).any())]
        self.clips_values = bool(torch.isfinite(self.values_P["grad_clip_value"]).any())
        dims = [self.params[name].dim() - 1 for name in self.names]
        self.treatments = optim.groups(
            self.names,
            dims,
            self.static["head"],
            bool(self.static["decay_norm_and_bias"]),
        )
        self.noisy = stateless_layers(self.module)
        own = base.hparam_buffers(self.module, trainer.named)
        self.hparam_buffers = {name: hparam for name, hparam in own.items() if hparam in self.h}
        for name, module in self.module.named_modules():
            if isinstance(module, Dropout) and module in self.noisy:
                mine = self.hparam_buffers.get(f"{name}.dropout")
                fixed = float(module.dropout) == 0 if mine is None else bool((self.h[mine] == 0).all())
                module.rate = 0.0 if fixed else None
        self.noise_names = [
            (self.noisy.index(module), f"{name}.noise_key")
            for name, module in self.module.named_modules()
            if isinstance(module, Dropout) and module in self.noisy and module.rate != 0
        ]
        rates = tuple(layer.rate for layer in self.noisy)
        self.program_key = signature(self.hparams[0], trainer.dynamic), len(self.rows), tuple(self.h), rates

    def begin_epoch(self, epoch: int, batches: int) -> None:
        """What is known of every step beforehand: learning rates (P, S) and noise keys (S, A, L + 1)."""
        self.batches = batches
        self.state = self.trainer.programs.state(self.watched)
        columns = {name: t.unsqueeze(1) for name, t in self.values_P.items()}
        factors_PS = lr_schedules.factors(
            str(self.static["schedule"]), epoch, batches, self.trainer.epochs, columns
        )
        self._schedule(columns["lr"] * factors_PS)
        layers = [layer.layer or 0 for layer in self.noisy]
        noise, parts = base.noise_seed(self.trainer.seed, epoch), int(self.static["accumulation_steps"])
        keys_SAL = base.noise_keys(noise, batches, parts, layers)
        self.keys_SAL = torch.from_numpy(keys_SAL).to(self.trainer.device)
        self.seeds_SA = keys_SAL[..., -1].view(np.uint32).tolist()
        self.seeds_A = self.seeds_SA[0]

    def _schedule(self, lr_PS: Tensor) -> None:
        """Takes note of the epoch's learning rates."""
        self._updates = self._optimizer_calls(lr_PS.tolist())

    def read(self, order: Tensor, size: int, start: int) -> Iterable[tuple[int, dict[str, Tensor]]]:
        """(index, batch) of the epoch's batches from `start` on. order: the rows of all of them."""
        return self.trainer.data.train.batches(order, size, start)

    def _optimizer_calls(self, lr_PS: list[list[float]]) -> list[_Update]:
        """One call of the optimizer's kernel for all that have the same numbers in it: a call costs as much
        as its arithmetic where models are small."""
        floats = {name: t.tolist() for name, t in self.values_P.items() if name in optim.READ}
        buckets: dict[Any, list[int]] = {}
        for row, lr_S in enumerate(lr_PS):
            numbers = tuple(values[row] for values in floats.values())
            buckets.setdefault((self.steps[row], tuple(lr_S), numbers), []).append(row)
        updates = []
        for rows in buckets.values():
            h = {**self.static, **{name: values[rows[0]] for name, values in floats.items()}}
            for group in self.treatments:
                places = [(self.names[i], row) for row in rows for i in group.indices]
                slots = {
                    slot: [self.slots[f"{slot}/{name}"][row] for name, row in places]
                    for slot in optim.SLOTS[self.optimizer]
                }
                mine = {**h, "weight_decay": h["weight_decay"] if group.decays else 0.0}
                factor = h["head_lr_factor"] if group.head else 1.0
                lr_S = [lr * factor for lr in lr_PS[rows[0]]]
                views = [self.params[name][row] for name, row in places]
                updates.append(_Update(rows[0], places, views, slots, mine, lr_S))
        return updates

    # -- one step --------------------------------------------------------------------------------------

    def step(self, batch: Mapping[str, Tensor], index: int) -> None:
        """One optimizer step of every member, on the same batch."""
        self.seeds_A = self.seeds_SA[index]
        losses_P, grads = self._gradients(batch, self.keys_SAL[index])
        self._penalise(grads)
        self._clip(grads, base.norm_is_measured(index, self.batches))
        self.steps = [steps + 1 for steps in self.steps]
        rows = {name: grads[name].unbind(0) for name in self.names}
        with torch.no_grad():  # once for all: it costs a small member as much as its arithmetic
            for update in self._updates:
                update.h["lr"] = update.lr_S[index]
                mine = [rows[name][row] for name, row in update.places]
                step = self.steps[update.row]
                optim.step_(self.optimizer, update.params, mine, update.slots, step, update.h)
        self._average()
        self.sums["loss"] += losses_P

    def _average(self) -> None:
        for name in self.names if self.static["ema"] else ():
            decay = column(self.h["ema_decay"], self.params[name])
            self.slots[f"ema/{name}"].mul_(decay).add_(self.params[name] * (1 - decay))

    def _gradients(self, batch: Mapping[str, Tensor], keys_AL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(losses (P,), gradients (P, *shape)) of the batch, in one piece or added up over its parts."""
        rows = len(next(iter(batch.values())))
        parts = min(int(self.static["accumulation_steps"]), rows)
        self.seed = self.seeds_A[0]
        if parts == 1:
            grads, losses_P = self._map(batch, keys_AL[0])
            return losses_P, grads
        total: dict[str, Tensor] = {}
        losses = torch.zeros(len(self.rows), device=self.trainer.device)
        for part in range(parts):
            start, stop = rows * part // parts, rows * (part + 1) // parts
            piece = {n: t[start:stop] for n, t in batch.items()}
            self.seed = self.seeds_A[part]
            grads, losses_P = self._map(piece, keys_AL[part])
            share = (stop - start) / rows
            total = {n: g * share + total[n] if total else g * share for n, g in grads.items()}
            losses = losses + share * losses_P
        return losses, total

    def _map(self, batch: Mapping[str, Tensor], keys_L: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(gradients (P, *shape), losses (P,)) of every member on these rows."""
        run = self._program("step", batch)
        grads, losses_P = run(self.mapped, self.params, self.buffers, self.h, keys_L, dict(batch))
        return grads, losses_P

    def _program(self, what: str, batch: Mapping[str, Tensor]) -> Callable[..., Any]:
        key = what, self.program_key, self.state, shapes(batch)
        return self.trainer.programs.get(key, self.steps_left, watched=self.watched, steady=self.h.values())

    def mapped(
        self,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        dynamic: dict[str, Tensor],
        keys_L: Tensor,
        batch: dict[str, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What `_map` returns, as a function of tensors alone. Writes into `buffers`."""

        def loss(
            params: dict[str, Tensor],
            buffers: dict[str, Tensor],
            values: dict[str, Tensor],
            rows: dict[str, Tensor],
        ) -> Tensor:
            tensors = {**{f"model.{n}": t for n, t in params.items()}, **buffers, **noise}
            with (
                given(self.rates, values),
                Draws(keys_L[-1], self.seed),
                base.cast(self.trainer.probe, self.trainer.autocast),
            ):
                arguments = rows, {**self.static, **values, "noise_key": keys_L[-1]}
                value: Tensor = functional_call(self.module, tensors, arguments)
            return value

        noise = {name: keys_L[position] for position, name in self.noise_names}
        own = {name: dynamic[leaf] for name, leaf in self.hparam_buffers.items()}
        stacked = {**{f"model.{n}": t for n, t in buffers.items()}, **own}
        gradients = vmap(grad_and_value(loss), in_dims=(0, 0, 0, None), randomness="error")
        grads, losses_P = gradients(params, stacked, dynamic, batch)
        return {n: optim.laid_out_as(params[n], grad) for n, grad in grads.items()}, losses_P

    def _penalise(self, grads: dict[str, Tensor]) -> None:
        """Adds the gradients of ``l1 * sum |W| + l2 * sum W**2``, one l1 and l2 a member."""
        for name in self.penalties:
            factor = {"l1": 1.0, "l2": 2.0}[name]
            for group in self.treatments:
                for i in group.indices if group.decays else ():
                    param = self.params[self.names[i]]
                    slope = param.sign() if name == "l1" else param
                    grads[self.names[i]] = grads[self.names[i]] + column(self.h[name], param) * factor * slope

    def _clip(self, grads: dict[str, Tensor], measured: bool | Tensor) -> None:
        """`optim.clip` for every member by itself: its own limits, its own norm. measured: the norms of those
        that do not clip count too."""
        if not any(self.clips_P):
            if measured:
                self.sums["grad_norm"] += self._norms(grads)
            return
        limit_P, value_P = self.h["grad_clip_norm"], self.h["grad_clip_value"]
        norm_P = self._norms(grads)
        touched_P = norm_P > limit_P
        if self.clips_values:
            largest_P = torch.stack([g.abs().reshape(len(g), -1).amax(1) for g in grads.values()]).amax(0)
            touched_P = touched_P | (largest_P > value_P)
            for name, grad in grads.items():
                largest = column(value_P, grad)
                grads[name] = torch.maximum(torch.minimum(grad, largest), -largest)
            now_P = self._norms(grads)
        else:
            now_P = norm_P
        scale_P = torch.where(torch.isfinite(limit_P), (limit_P / (now_P + 1e-6)).clamp(max=1.0), 1.0)
        for name, grad in grads.items():
            grads[name] = grad * column(scale_P, grad)
        self.sums["grad_norm"] += torch.where(self.clipping_P | measured, norm_P, 0)
        self.sums["clipped"] += touched_P

    def _norms(self, grads: Mapping[str, Tensor]) -> Tensor:
        """The 2-norm of each member's whole gradient, (P,).

        Member by member: a sum over the stack adds up in an order that depends on P.
        """
        tensors = list(grads.values())
        views = [tensor[row] for row in range(len(tensors[0])) for tensor in tensors]
        norms_P = torch.stack(torch._foreach_norm(views)).view(-1, len(tensors)).unbind(0)
        return torch.stack([torch.linalg.vector_norm(norms) for norms in norms_P])

    # -- between steps ---------------------------------------------------------------------------------

    def measure(self) -> list[dict[str, float]]:
        """For each member, its metrics on train and valid."""
        train, valid = (self.evaluate(rows) for rows in (self.trainer.probe, self.trainer.data.valid))
        return [
            {**{f"train/{n}": v for n, v in a.items()}, **{f"valid/{n}": v for n, v in b.items()}}
            for a, b in zip(train, valid, strict=True)
        ]

    @torch.no_grad()
    def evaluate(self, rows: Part) -> list[dict[str, float]]:
        """For each member, the task's metrics over all rows, in evaluation mode."""
        weights = {n: self.slots.get(f"ema/{n}", t) for n, t in self.params.items()}
        own = {name: self.h[leaf] for name, leaf in self.hparam_buffers.items()}
        fixed = {**{f"model.{n}": t for n, t in self.buffers.items()}, **own}

        def sums(
            params: dict[str, Tensor],
            fixed: dict[str, Tensor],
            rates: dict[str, Tensor],
            key: Tensor,
            part: dict[str, Tensor],
        ) -> Any:
            tensors = {**{f"model.{n}": t for n, t in params.items()}, **fixed}
            with given(self.rates, rates), Draws(key, self.seed), base.cast(rows, self.trainer.autocast):
                return functional_call(self.module, tensors, (part, None))

        self.module.eval()
        totals: dict[str, list[Tensor]] = {}
        rates = {rate.argument: self.h[rate.argument] for rate in self.rates}
        mapped = vmap(sums, in_dims=(0, 0, 0, None, None), randomness="error")
        for index, part in rows.batches(None, base.EVALUATION_BATCH):
            run = self._program("evaluate", part)
            key, self.seed = base.evaluation_noise(index, self.trainer.device, self.noisy)
            for name, value in run(mapped, weights, fixed, rates, key, dict(part)).items():
                totals.setdefault(name, []).append(value)
        self.module.train()
        summed = {  # off the device all at once, rather than number by number
            n: (torch.cat(t, 1) if n.startswith("each_") else torch.stack(t).sum(0)).cpu()
            for n, t in totals.items()
        }
        task = self.trainer.task
        return [
            base.finalized(task, {n: t[row] for n, t in summed.items()}) for row in range(len(self.chosen))
        ]

    def store(self, batch: int) -> None:
        """Back into the population; `batch` batches into the epoch (0: the epoch is done)."""
        if batch == 0:
            for tensor in self.sums.values():
                tensor.zero_()
        if not self._whole:
            index = torch.tensor(self.chosen, device=self.trainer.device)
            for name, tensors in self.population.stacks():
                if self.groups[name] is tensors:
                    continue
                for key, tensor in tensors.items():
                    tensor.index_copy_(0, index, self.groups[name][key][: len(self.chosen)])
        for row, i in enumerate(self.chosen):
            self.population.step[i] = self.steps[row]
            self.population.batch[i] = batch


def _float(value: Any) -> float:
    return float(value)


def column(values_P: Tensor, like: Tensor) -> Tensor:
    """(P,) shaped to broadcast against (P, *shape)."""
    return values_P.view(-1, *[1] * (like.dim() - 1))
