"""The fused trainer: all members of a population in one program, mapped over the stack with torch.func.vmap.

The training step is the loop trainer's, written for one member: loss and gradient are mapped, penalties,
clipping and learning rates have one value a member, and the optimizer's kernels run on views of the stack. A
member's result does not depend on its company: nothing adds up over members, and what leaves is simply not
trained on.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpt_torch.data import Rows
from hpt_torch.hparams import signature
from hpt_torch.machine import denormals_are_zero
from hpt_torch.models.rates import are_alike, given, kept_rates
from hpt_torch.population import Population
from hpt_torch.trainers import base
from hpt_torch.trainers.base import SegmentResult, ShouldPause
from hpt_torch.trainers.draws import watching
from hpt_torch.trainers.loop import LoopTrainer
from hpt_torch.trainers.member import Member
from hpt_torch.trainers.stack import Stack
from hpt_torch.trainers.traced import computed_bytes
from hpt_torch.types import Report


class FusedTrainer(LoopTrainer):
    """Trains the members of a population together. They share their signature, epoch and batch."""

    stack: type[Stack] = Stack

    @denormals_are_zero()
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
        stack = self.stack(self, population, chosen)
        first, epoch = chosen[0], population.epoch[chosen[0]]
        order = self.order.epoch(epoch)
        size = min(int(stack.static["batch_size"]), len(order))
        batches = self.order.batches(size)
        stack.begin_epoch(epoch, batches)
        stack.steps_left = (self.epochs - epoch) * batches
        for index, batch in stack.read(order[: batches * size], size, population.batch[first]):
            stack.step(batch, index)
            if should_pause() and index + 1 < batches:
                stack.store(batch=index + 1)
                result.paused = True
                return
        metrics = stack.measure()
        losses = (stack.sums["loss"] / batches).tolist()
        norms, clipped = (stack.sums[name].tolist() for name in ("grad_norm", "clipped"))
        stack.store(batch=0)
        seconds = (time.perf_counter() - started) / len(chosen)
        for position, i in enumerate(chosen):
            mine = metrics[position]
            clips = stack.clips_P[position]
            mine |= base.gradient_metrics(norms[position], clipped[position], batches, clips)
            population.epoch[i] += 1
            if reason := base.unfit(mine, population.epoch[i], losses[position], self.scored):
                self._fail(population, i, result, reason)
                continue
            if self.keep is not None:
                self._keep_from_stack(population, i, mine[self.keep.metric])
            trial, epoch, measured = population.trials[i], population.epoch[i], base.told(mine)
            result.reports.append(Report(trial=trial, epoch=epoch, metrics=measured, seconds=seconds))

    def _keep_from_stack(self, population: Population, i: int, score: float) -> None:
        before = population.best[i]
        if before is not None and (self.keep is None or not self.keep.better(score, before)):
            return
        population.best[i], population.best_epoch[i] = score, population.epoch[i]
        member = population.member(i)
        for name, tensor in {**member["params"], **member["buffers"]}.items():
            member["kept"][name].copy_(member["slots"].get(f"ema/{name}", tensor))

    def bytes_a_member(self, population: Population, few: float, known: dict[Hashable, int]) -> int:
        """The memory that a further member like these takes: its state, that again to be saved, and all that
        a step on a whole batch, or an evaluation, computes. An upper bound where that is at most `few`.

        Measured with copies of these members on two rows and on four (of each part of an accumulated batch):
        what is computed is linear in them. known: what is measured is kept there, and not measured again for
        members that differ from those in their batch size alone.
        """
        state = 2 * sum(t.nbytes for _, tensors in population.stacks() for t in tensors.values())
        hparams = population.hparams[0]
        alike = signature(hparams, self.dynamic | {"batch_size"})
        batch = min(int(str(hparams["batch_size"])), len(self.data.train))
        parts = {"step": min(int(str(hparams["accumulation_steps"])), batch), "evaluate": 1}
        sizes = {"step": batch, "evaluate": min(len(self.data.valid), base.EVALUATION_BATCH)}
        few_rows, more_rows = (
            {what: min(rows * parts[what], size) for what, size in sizes.items()} for rows in (2, 4)
        )

        def needed(at: Callable[[str], float]) -> int:
            return math.ceil((state + max(map(at, sizes))) / len(population))

        def measured(what: str, rows: int) -> int:
            key = alike, len(population), what, rows
            if key not in known:
                known[key] = measure(what, rows)
            return known[key]

        def measure(what: str, rows: int) -> int:
            stack = Stack(self, population.copy(), list(range(len(population))))
            stack.begin_epoch(0, 1)
            part = (self.data.train if what == "step" else self.data.valid).slice(0, rows)
            return computed_bytes(
                lambda: stack.step(part, 0) if what == "step" else stack.evaluate(Rows(part))
            )

        def extended(what: str) -> float:
            rows = more_rows[what] - few_rows[what]
            each = (measured(what, more_rows[what]) - first[what]) / rows if rows else 0  # 0: that is all
            return first[what] + each * (sizes[what] - few_rows[what])

        first = {what: measured(what, rows) for what, rows in few_rows.items()}
        bound = needed(lambda what: first[what] * sizes[what] / few_rows[what])
        return bound if bound <= few else needed(extended)

    def why_not(self, population: Population) -> str | None:
        """Why these members cannot be trained together, or None: found by mapping one step and an evaluation
        of a copy of them over two rows."""
        if reason := self.task.why_not_together(population.hparams[0]):
            return reason
        module = self.module(population.hparams[0], population.trials[0])
        for name, parameter in module.named_parameters():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return f"a hook on the gradient of {name}"
        kept = _kept_tensors(module)
        if inner := [name for name, value in kept.items() if isinstance(value, nn.Parameter)]:
            return f"{inner[0]} is a parameter that the module reaches otherwise than by its name"
        parts = int(str(population.hparams[0]["accumulation_steps"]))
        rows = self.data.train.slice(0, min(2 * parts, len(self.data.train)))
        copy = population.copy()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the module's own, which it gives when it is trained
                # torch warns where an operation has no batching rule and falls back to a slow loop.
                warnings.filterwarnings("error", message=".*batching rule.*")
                alone = Member(self, population.copy(), 0)
                if self.module_rates and (argument := self._reads_rates(alone)):
                    return f"{argument} is read otherwise than as a rate of dropout"
                alone.step(rows, 1.0, 0)
                now = _kept_tensors(module)
                changed = [alone.replaced, *(n for n in kept | now if kept.get(n) is not now.get(n))]
                if replaced := next(filter(None, changed), ""):
                    return f"it puts another tensor in the place of {replaced}; write into it"
                stack = Stack(self, copy, list(range(len(copy))))
                stack.begin_epoch(0, 1)
                stack.step(rows, 0)
                stack.evaluate(Rows(rows))
        except Exception as error:  # whatever the user's module does that cannot be mapped
            text = str(error).strip().splitlines()
            return f"{type(error).__name__}: {text[0] if text else 'no message'}"
        return None

    def _reads_rates(self, member: Member) -> str | None:
        """The argument, a rate of dropout, that something else reads too: seen by what is called with it, and
        by whether anything changes with the number where the rates do not."""
        population, names = member.population, sorted(self.task.rate_hparams)
        found: list[list[Tensor]] = []
        read, models = set[str](), list[nn.Module]()
        same = dict.fromkeys(names, torch.tensor(0.375, dtype=self.dtype, device=self.device))
        for value in (0.25, 0.5):
            hparams = {**population.hparams[0], **dict.fromkeys(names, value)}
            models.append(model := self.build(hparams, population.trials[0]))
            base.set_hparams(model, {**hparams, **dict.fromkeys(names, 0.375)}, self.named)
            rates = kept_rates(model)
            rows = self.data.train.slice(0, min(8, len(self.data.train)))
            noise = watching(member.tensors["noise_key"])
            with given(rates, same), noise, base.cast(self.probe, self.autocast):
                loss = base.loss_of(self.task, model.train(), rows, member.tensors)
                learned = [p for p in model.parameters() if p.requires_grad]
                grads = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
                with torch.no_grad():
                    rows = self.data.train.slice(0, min(8, len(self.data.train)))
                    found.append([loss, *grads, *self.task.metrics(model.eval(), rows).values()])
            read |= {rate.argument for rate in rates if rate.used}
        changed = not are_alike(*models) or not all(
            torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*found, strict=True)
        )
        return min(read, default=names[0] if changed else None)


def _kept_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules have as plain attributes, or in lists and dicts of their own."""
    found, known = {}, {"_parameters", "_buffers", "_modules"}
    for path, one in module.named_modules():
        # nn.GRU and its like keep such a list, and keep it up to date.
        skipped = known | {"_flat_weights"} if isinstance(one, nn.RNNBase) else known
        for name, value in vars(one).items():
            if name not in skipped:
                for i, leaf in enumerate(tree_leaves(value)):
                    if isinstance(leaf, Tensor):
                        found[f"{path}.{name}[{i}]".lstrip(".")] = leaf
    return found
