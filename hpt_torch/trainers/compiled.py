"""The compiled trainer: the whole step of a population, from the batch to the new weights, as one program.

Nothing in it depends on a member's numbers, which are tensors: a change of hyperparameters compiles nothing.
A population whose members leave goes on in the size it had, with repeated members in the empty places, until
half of them suffice.
"""

# P members, S steps of an epoch, K factors of a step, A parts of a batch, L stateless layers

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from hpt_torch import optim
from hpt_torch.data import Rows
from hpt_torch.population import Population
from hpt_torch.trainers import base, inductor, traced
from hpt_torch.trainers.fused import FusedTrainer
from hpt_torch.trainers.programs import shapes
from hpt_torch.trainers.stack import Stack, column
from hpt_torch.trainers.watching import state_of

_MOST_PROGRAMS = 64


class CompiledStack(Stack):
    """Members whose steps are compiled."""

    trainer: CompiledTrainer

    def _rows(self) -> list[int]:
        places = max(len(self.population), 2)
        while -(-places // 2) >= max(len(self.chosen), 2) and places > 2:
            places = -(-places // 2)
        return [*self.chosen, *self.chosen[:1] * (places - len(self.chosen))]

    def _schedule(self, lr_PS: Tensor) -> None:
        """The factors of each step, (S, K, P): learning rate, Adam's corrections, and whether the norm of the
        gradient is measured of members that do not clip it."""
        steps = lr_PS.shape[1]
        taken = self.population.batch[self.chosen[0]]  # of this epoch, where it goes on in the middle
        count_PS = torch.tensor(self.steps, dtype=torch.float64)[:, None] + torch.arange(1, steps + 1) - taken
        corrections = [torch.ones_like(lr_PS)] * 2
        if self.optimizer in optim.ADAMS:
            betas = {name: self.values_P[name][:, None] for name in ("beta1", "beta2")}
            corrections = list(optim.corrections(count_PS, betas))  # type: ignore[arg-type]
        measured = torch.tensor([float(base.norm_is_measured(s, steps)) for s in range(steps)])
        factors_SKP = torch.stack([lr_PS, *corrections, measured.expand_as(lr_PS)]).permute(2, 0, 1)
        self.factors_SKP = factors_SKP.to(self.trainer.device, self.trainer.dtype).contiguous()

    def step(self, batch: Mapping[str, Tensor], index: int) -> None:
        arguments = self.arguments(batch, index)
        key = self.key(batch)
        if key not in self.trainer.compiled:
            self.trainer.hold(key, self.program(self.whole, arguments))
        self._count(self.trainer.compiled[key](*arguments), index)

    def arguments(self, batch: Mapping[str, Tensor], index: int) -> tuple[Any, ...]:
        """Those of `whole` for a step on this batch."""
        own = {**self.h, "clipping": self.clipping_P}
        state = self.params, self.buffers, self.slots, self.sums
        return *state, own, self.factors_SKP[index], self.keys_SAL[index], dict(batch)

    def _count(self, grads: Mapping[str, Tensor], index: int) -> None:
        """Takes note of a step, and of its gradient's norm where the step has not."""
        if not any(self.clips_P) and base.norm_is_measured(index, self.batches):
            self.sums["grad_norm"] += self._norms(grads)
        self.steps = [steps + 1 for steps in self.steps]

    def key(self, batch: Mapping[str, Tensor]) -> Hashable:
        """All that a program depends on besides its arguments."""
        left_out = *self.penalties, any(self.clips_P), self.clips_values
        return self.program_key, shapes(batch), left_out

    def program(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """The compiled function (`whole`, say) for arguments of these shapes."""
        recorded = self.recorded(function, arguments)
        if recorded is None:
            raise RuntimeError(
                "the step reads the values of tensors; `CompiledTrainer.why_not` tells beforehand"
            )
        return inductor.compiled(recorded)

    def recorded(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> traced.Flat | None:
        """What the function does. Changes nothing: it runs once, on copies of what it changes."""
        copies = [
            one.clone() if isinstance(one, Tensor) else {n: t.clone() for n, t in one.items()}
            for one in arguments
        ]
        recorded, _ = traced.record(function, *copies)
        return recorded

    def whole(
        self,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        slots: dict[str, Tensor],
        sums: dict[str, Tensor],
        own: dict[str, Tensor],
        factors_KP: Tensor,
        keys_AL: Tensor,
        batch: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """One step of all members as a function of tensors alone: changes the first four; the gradients."""
        mine = self.params, self.buffers, self.slots, self.sums, self.h, self.clipping_P
        self.params, self.buffers, self.slots, self.sums = params, buffers, slots, sums
        self.h = {name: tensor for name, tensor in own.items() if name != "clipping"}
        self.clipping_P = own["clipping"]
        try:
            losses_P, grads = self._gradients(batch, keys_AL)
            with torch.no_grad():
                self._penalise(grads)
                if any(self.clips_P):
                    self._clip(grads, factors_KP[3] > 0)
                self._update(grads, factors_KP)
                self._average()
                sums["loss"] += losses_P
        finally:
            self.params, self.buffers, self.slots, self.sums, self.h, self.clipping_P = mine
        return grads

    def _map(self, batch: Mapping[str, Tensor], keys_L: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return self.mapped(self.params, self.buffers, self.h, keys_L, dict(batch))

    def _update(self, grads: Mapping[str, Tensor], factors_KP: Tensor) -> None:
        """The optimizer's step, written out over the stack."""
        for group in self.treatments:
            for name in (self.names[i] for i in group.indices):
                param = self.params[name]
                h: dict[str, Any] = {n: column(self.h[n], param) for n in sorted(optim.READ) if n in self.h}
                lr_P, *corrections = (column(factor_P, param) for factor_P in factors_KP.unbind(0)[:3])
                h["lr"] = lr_P * h["head_lr_factor"] if group.head else lr_P
                h["nesterov"] = self.static["nesterov"]
                h["weight_decay"] = h["weight_decay"] if group.decays else 0.0
                slots = {slot: self.slots[f"{slot}/{name}"] for slot in optim.SLOTS[self.optimizer]}
                pair = corrections[0], corrections[1]
                new, states = optim.update(self.optimizer, param, grads[name], slots, pair, h)
                param.copy_(new)
                for slot, state in states.items():
                    slots[slot].copy_(state)

    def _norms(self, grads: Mapping[str, Tensor]) -> Tensor:
        """(P,), over the stack as it lies: how sums round is the compiler's here."""
        norms = [torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in grads.values()]
        norms_P: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return norms_P


class CompiledTrainer(FusedTrainer):
    """Trains the members of a population together, in steps that torch.compile's back end has compiled."""

    stack: type[Stack] = CompiledStack

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.compiled: dict[Hashable, Any] = {}  # programs, by all that they depend on

        if self.device.type == "cuda" and isinstance(self.data.train, Rows):
            from hpt_torch.trainers.graphs import GraphedStack

            self.stack = GraphedStack

    def hold(self, key: Hashable, program: Any) -> None:
        self.compiled[key] = program
        if len(self.compiled) > _MOST_PROGRAMS:
            self.compiled.pop(next(iter(self.compiled)))

    def why_not(self, population: Population) -> str | None:
        """Why these members cannot be trained by compiled steps, or None. Nothing is compiled for it."""
        lacking = inductor.missing(self.device.type)
        if lacking is not None:
            return lacking
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < (7, 0):
            return "torch.compile needs a CUDA device of compute capability 7.0 or higher"
        if self.device.type == "cuda" and "convolution" in self.traits(
            population.hparams[0], population.trials[0]
        ):
            return "compiled convolutions were not equal to the loop's on CUDA"
        reason = super().why_not(population)
        if reason is not None:
            return reason
        rows = self.data.train.slice(0, min(2, len(self.data.train)))
        stack = CompiledStack(self, population.copy(), list(range(len(population))))
        stack.begin_epoch(0, 1)
        before = state_of(stack.watched)
        if stack.recorded(stack.whole, stack.arguments(rows, 0)) is None:
            return "its step reads the values of tensors, which a compiled one cannot"
        stack.evaluate(Rows(rows))
        if state_of(stack.watched) != before:
            return (
                "it changes what the model, the task or their code keep, which a compiled step would not see"
            )
        return None
