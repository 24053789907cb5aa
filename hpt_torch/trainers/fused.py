"""The fused trainer: all members of a population in one program, mapped over the stack with torch.func.vmap.

The training step is the loop trainer's, written for one member: loss and gradient are mapped, penalties,
clipping and learning rates have one value a member, and the optimizer's kernels run on views of the stack. A
member's result does not depend on its company: nothing adds up over members, and what leaves is simply not
trained on.
"""

# P members, S steps of an epoch, A parts of a batch, L stateless layers

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from hpt_torch import lr_schedules, optim
from hpt_torch.data import Part, Rows
from hpt_torch.models.layers import Dropout, stateless_layers
from hpt_torch.population import Population
from hpt_torch.task import Task
from hpt_torch.trainers import base
from hpt_torch.trainers.base import SegmentResult, ShouldPause
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.types import Report

_SMALLEST = 2  # a stack of one takes other kernels, which round differently


class FusedTrainer(LoopTrainer):
    """Trains the members of a population together. They share their signature, epoch and batch."""

    def train(self, population: Population, until_epoch: int, *, should_pause: ShouldPause) -> SegmentResult:
        """Trains every active member until it has `until_epoch` epochs, or until `should_pause()`."""
        result = SegmentResult()
        while not result.paused:
            chosen = [
                i
                for i in range(len(population))
                if population.active[i] and population.epoch[i] < until_epoch
            ]
            if not chosen:
                break
            self._train_together(population, chosen, result, should_pause)
        return result

    def _train_together(
        self, population: Population, chosen: list[int], result: SegmentResult, should_pause: ShouldPause
    ) -> None:
        """One epoch, or what is left of it, of the chosen members."""
        started = time.perf_counter()
        stack = _Stack(self, population, chosen)
        first, epoch = chosen[0], population.epoch[chosen[0]]
        order = self.order.epoch(epoch)
        size = min(int(stack.static["batch_size"]), len(order))
        batches = self.order.batches(size)
        stack.begin_epoch(epoch, population.batch[first], batches)
        rows = self.data.train.batches(order[: batches * size], size, population.batch[first])
        for index, batch in rows:
            stack.step(batch, index)
            if should_pause() and index + 1 < batches:
                stack.store(batch=index + 1)
                result.paused = True
                return
        metrics = stack.measure()
        losses = (stack.sums["loss"] / batches).tolist()
        norms, clipped = ((stack.sums[name] / batches).tolist() for name in ("grad_norm", "clipped"))
        stack.store(batch=0)
        seconds = (time.perf_counter() - started) / len(chosen)
        for position, i in enumerate(chosen):
            mine = metrics[position]
            if stack.clips_P[position]:
                mine |= {"train/grad_norm": norms[position], "train/clipped_share": clipped[position]}
            population.epoch[i] += 1
            if reason := base.diverged(mine, population.epoch[i], losses[position]):
                self._fail(population, i, result, reason)
                continue
            if self.keep is not None:
                self._keep_from_stack(population, i, mine[self.keep.metric])
            result.reports.append(
                Report(trial=population.trials[i], epoch=population.epoch[i], metrics=mine, seconds=seconds)
            )

    def _keep_from_stack(self, population: Population, i: int, score: float) -> None:
        before = population.best[i]
        if before is not None and (self.keep is None or not self.keep.better(score, before)):
            return
        population.best[i], population.best_epoch[i] = score, population.epoch[i]
        member = population.member(i)
        for name, tensor in {**member["params"], **member["buffers"]}.items():
            member["kept"][name].copy_(member["slots"].get(f"ema/{name}", tensor))

    def why_not(self, population: Population) -> str | None:
        """Why these members cannot be trained together, or None: found by mapping one step and an evaluation
        of a copy of them over two rows."""
        rows = self.data.train.slice(0, min(2, len(self.data.train)))
        copy = population.copy()
        try:
            with warnings.catch_warnings():
                # torch warns where an operation has no batching rule and falls back to a slow loop.
                warnings.filterwarnings("error", message=".*batching rule.*")
                stack = _Stack(self, copy, list(range(len(copy))))
                stack.begin_epoch(0, 0, 1)
                stack.step(rows, 0)
                stack.evaluate(Rows(rows))
        except Exception as error:  # whatever the user's module does that cannot be mapped
            text = str(error).strip().splitlines()
            return f"{type(error).__name__}: {text[0] if text else 'no message'}"
        return None


class _Mapped(nn.Module):
    """A method of the task as a module around the model, so that functional_call can swap its tensors."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.model, self._task = model, (task,)

    def forward(self, batch: Mapping[str, Tensor], hparams: Mapping[str, Any] | None) -> Any:
        (task,) = self._task
        return task.metrics(self.model, batch) if hparams is None else task.loss(self.model, batch, hparams)


class _Stack:
    """The members that train now: the population's own tensors, or a copy of the chosen rows of them."""

    def __init__(self, trainer: FusedTrainer, population: Population, chosen: Sequence[int]) -> None:
        self.trainer, self.population, self.chosen = trainer, population, list(chosen)
        self.rows = self.chosen if len(self.chosen) >= _SMALLEST else self.chosen * _SMALLEST
        self._whole = self.rows == list(range(len(population)))
        index = torch.tensor(self.rows, device=trainer.device)
        self.groups = {
            name: tensors if self._whole else {n: t.index_select(0, index) for n, t in tensors.items()}
            for name, tensors in population.stacks()
        }
        self.params, self.buffers, self.slots = (self.groups[name] for name in ("params", "buffers", "slots"))
        self.sums = self.groups["sums"]
        self.steps = [population.step[i] for i in self.rows]
        self.hparams = [population.hparams[i] for i in self.rows]
        self.static: dict[str, Any] = {n: v for n, v in self.hparams[0].items() if n not in trainer.dynamic}
        self.optimizer = str(self.static["optimizer"])
        self.names = list(self.params)
        self.module = _Mapped(trainer.task, trainer.module(self.hparams[0], population.trials[self.rows[0]]))
        self._read_hparams()

    def _read_hparams(self) -> None:
        """Each dynamic hyperparameter as (P,): float64 on the CPU for schedules, `dtype` on the device."""
        trainer = self.trainer
        self.values_P = {
            name: torch.tensor([_float(h[name]) for h in self.hparams], dtype=torch.float64)
            for name in trainer.dynamic
            if self.hparams[0].get(name) is not None
        }
        self.h = {name: t.to(trainer.device, trainer.dtype) for name, t in self.values_P.items()}
        finite = torch.isfinite(self.values_P["grad_clip_norm"]) | torch.isfinite(
            self.values_P["grad_clip_value"]
        )
        self.clips_P = finite.tolist()
        dims = [self.params[name].dim() - 1 for name in self.names]
        self.treatments = optim.groups(
            self.names,
            dims,
            self.static["head"],
            bool(self.static["decay_norm_and_bias"]),
        )
        self.noisy = stateless_layers(self.module)
        self.hparam_buffers: dict[str, Tensor] = {}
        for name, _ in self.module.named_buffers():
            leaf = name.rpartition(".")[2]
            if leaf in self.h:
                self.hparam_buffers[name] = self.h[leaf]
        for name, module in self.module.named_modules():
            if isinstance(module, Dropout) and module in self.noisy:
                mine = self.hparam_buffers.get(f"{name}.dropout")
                fixed = float(module.dropout) == 0 if mine is None else bool((mine == 0).all())
                module.rate = 0.0 if fixed else None
        self.noise_names = [
            (self.noisy.index(module), f"{name}.noise_key")
            for name, module in self.module.named_modules()
            if isinstance(module, Dropout) and module in self.noisy and module.rate != 0
        ]
        self._kernels = [self._kernel_arguments(row) for row in range(len(self.rows))]

    def _kernel_arguments(
        self, row: int
    ) -> list[tuple[list[Tensor], dict[str, list[Tensor]], dict[str, Any], bool, list[int]]]:
        """For each treatment of one member: views of parameters and slots, floats, head or not, positions."""
        floats = {**self.static, **{name: float(t[row]) for name, t in self.values_P.items()}}
        arguments = []
        for group in self.treatments:
            names = [self.names[i] for i in group.indices]
            slots = {
                slot: [self.slots[f"{slot}/{name}"][row] for name in names]
                for slot in optim.SLOTS[self.optimizer]
            }
            h = floats if group.decays else {**floats, "weight_decay": 0.0}
            views = [self.params[name][row] for name in names]
            arguments.append((views, slots, dict(h), group.head, list(group.indices)))
        return arguments

    def begin_epoch(self, epoch: int, batch: int, batches: int) -> None:
        """What is known of every step beforehand: learning rates (P, S) and noise keys (S, A, P, L + 1)."""
        columns = {name: t.unsqueeze(1) for name, t in self.values_P.items()}
        factors_PS = lr_schedules.factors(
            str(self.static["schedule"]), epoch, batches, self.trainer.epochs, columns
        )
        self.lr_PS = (columns["lr"] * factors_PS).tolist()
        trials = [self.population.trials[i] for i in self.rows]
        noise_P = np.array([base.noise_seed(self.trainer.seed, trial) for trial in trials], dtype=np.uint64)
        steps_P = np.array(self.steps, dtype=np.uint64) - np.uint64(batch)
        layers = [layer.layer or 0 for layer in self.noisy]
        parts = int(self.static["accumulation_steps"])
        keys_SAPL = base.noise_keys(noise_P, steps_P, batches, parts, layers)
        self.keys_SAPL = torch.from_numpy(keys_SAPL).to(self.trainer.device)

    # -- one step --------------------------------------------------------------------------------------

    def step(self, batch: Mapping[str, Tensor], index: int) -> None:
        """One optimizer step of every member, on the same batch."""
        losses_P, grads = self._gradients(batch, self.keys_SAPL[index])
        self._penalise(grads)
        if any(self.clips_P):
            self._clip(grads)
        for row, arguments in enumerate(self._kernels):
            self.steps[row] += 1
            for views, slots, h, head, positions in arguments:
                lr = self.lr_PS[row][index]
                h["lr"] = lr * h["head_lr_factor"] if head else lr
                mine = [grads[self.names[i]][row] for i in positions]
                optim.step_(self.optimizer, views, mine, slots, self.steps[row], h)
        if self.static["ema"]:
            for name in self.names:
                decay = _column(self.h["ema_decay"], self.params[name])
                self.slots[f"ema/{name}"].mul_(decay).add_(self.params[name] * (1 - decay))
        self.sums["loss"] += losses_P

    def _gradients(self, batch: Mapping[str, Tensor], keys_APL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(losses (P,), gradients (P, *shape)) of the batch, in one piece or added up over its parts."""
        rows = len(next(iter(batch.values())))
        parts = min(int(self.static["accumulation_steps"]), rows)
        if parts == 1:
            grads, losses_P = self._map(batch, keys_APL[0])
            return losses_P, grads
        total: dict[str, Tensor] = {}
        losses = torch.zeros(len(self.rows), device=self.trainer.device)
        for part in range(parts):
            start, stop = rows * part // parts, rows * (part + 1) // parts
            piece = {n: t[start:stop] for n, t in batch.items()}
            grads, losses_P = self._map(piece, keys_APL[part])
            share = (stop - start) / rows
            total = {n: g * share + total[n] if total else g * share for n, g in grads.items()}
            losses = losses + share * losses_P
        return losses, total

    def _map(self, batch: Mapping[str, Tensor], keys_PL: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(gradients (P, *shape), losses (P,)) of every member on these rows."""

        def loss(
            params: dict[str, Tensor],
            buffers: dict[str, Tensor],
            values: dict[str, Tensor],
            rows: dict[str, Tensor],
        ) -> Tensor:
            tensors = {**{f"model.{n}": t for n, t in params.items()}, **buffers}
            with base.cast(self.trainer.probe, self.trainer.autocast):
                value: Tensor = functional_call(self.module, tensors, (rows, {**self.static, **values}))
            return value

        noise = {name: keys_PL[:, position] for position, name in self.noise_names}
        dynamic = {**self.h, "noise_key": keys_PL[:, -1]}
        buffers = {**{f"model.{n}": t for n, t in self.buffers.items()}, **self.hparam_buffers, **noise}
        mapped = vmap(grad_and_value(loss), in_dims=(0, 0, 0, None), randomness="error")
        grads, losses_P = mapped(self.params, buffers, dynamic, dict(batch))
        return grads, losses_P.detach()

    def _penalise(self, grads: dict[str, Tensor]) -> None:
        """Adds the gradients of ``l1 * sum |W| + l2 * sum W**2``, one l1 and l2 a member."""
        for name, factor in (("l1", 1.0), ("l2", 2.0)):
            if not bool((self.values_P[name] > 0).any()):
                continue
            for group in self.treatments:
                for i in group.indices if group.decays else ():
                    param = self.params[self.names[i]]
                    slope = param.sign() if name == "l1" else param
                    grads[self.names[i]] = (
                        grads[self.names[i]] + _column(self.h[name], param) * factor * slope
                    )

    def _clip(self, grads: dict[str, Tensor]) -> None:
        """`optim.clip` for every member by itself: its own limits, its own norm."""
        limit_P, value_P = self.h["grad_clip_norm"], self.h["grad_clip_value"]
        norm_P = _norms(grads)
        touched_P = norm_P > limit_P
        if bool(torch.isfinite(self.values_P["grad_clip_value"]).any()):
            largest_P = torch.stack([g.abs().flatten(1).amax(1) for g in grads.values()]).amax(0)
            touched_P = touched_P | (largest_P > value_P)
            for name, grad in grads.items():
                column = _column(value_P, grad)
                grads[name] = torch.maximum(torch.minimum(grad, column), -column)
            now_P = _norms(grads)
        else:
            now_P = norm_P
        scale_P = torch.where(torch.isfinite(limit_P), (limit_P / (now_P + 1e-6)).clamp(max=1.0), 1.0)
        for name, grad in grads.items():
            grads[name] = grad * _column(scale_P, grad)
        self.sums["grad_norm"] += norm_P
        self.sums["clipped"] += touched_P

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
        buffers = {**{f"model.{n}": t for n, t in self.buffers.items()}, **self.hparam_buffers}

        def sums(params: dict[str, Tensor], fixed: dict[str, Tensor], part: dict[str, Tensor]) -> Any:
            tensors = {**{f"model.{n}": t for n, t in params.items()}, **fixed}
            with base.cast(rows, self.trainer.autocast):
                return functional_call(self.module, tensors, (part, None))

        self.module.eval()
        totals: dict[str, list[Tensor]] = {}
        for _, part in rows.batches(None, base.EVALUATION_BATCH):
            mapped = vmap(sums, in_dims=(0, 0, None), randomness="error")(weights, buffers, part)
            for name, value in mapped.items():
                totals.setdefault(name, []).append(value)
        self.module.train()
        summed = {
            n: torch.cat(t, 1) if n.startswith("each_") else torch.stack(t).sum(0) for n, t in totals.items()
        }
        task = self.trainer.task
        return [dict(task.finalize({n: t[row] for n, t in summed.items()})) for row in range(len(self.rows))]

    def store(self, batch: int) -> None:
        """Back into the population; `batch` batches into the epoch (0: the epoch is done)."""
        if batch == 0:
            for tensor in self.sums.values():
                tensor.zero_()
        if not self._whole:
            index = torch.tensor(self.chosen, device=self.trainer.device)
            for name, tensors in self.population.stacks():
                for key, tensor in tensors.items():
                    tensor.index_copy_(0, index, self.groups[name][key][: len(self.chosen)])
        for row, i in enumerate(self.chosen):
            self.population.step[i] = self.steps[row]
            self.population.batch[i] = batch


def _float(value: Any) -> float:
    return float(value)


def _column(values_P: Tensor, like: Tensor) -> Tensor:
    """(P,) shaped to broadcast against (P, *shape)."""
    return values_P.view(-1, *[1] * (like.dim() - 1))


def _norms(grads: Mapping[str, Tensor]) -> Tensor:
    """The 2-norm of each member's whole gradient, (P,).

    Member by member: a sum over the stack adds up in an order that depends on P.
    """
    tensors = list(grads.values())
    views = [tensor[row] for row in range(len(tensors[0])) for tensor in tensors]
    norms_P = torch.stack(torch._foreach_norm(views)).view(-1, len(tensors)).unbind(0)
    return torch.stack([torch.linalg.vector_norm(norms) for norms in norms_P])
