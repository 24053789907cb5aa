"""The loop trainer: one member after another, with plain autograd and torch's fused optimizer kernels.

The fallback for what cannot be mapped over members, and the oracle that the others are tested against.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpt_torch import optim
from hpt_torch.data import Data, Part
from hpt_torch.hparams import signature
from hpt_torch.machine import denormals_are_zero
from hpt_torch.models.rates import kept_rates
from hpt_torch.population import Population, stack
from hpt_torch.task import Task
from hpt_torch.trainers import base
from hpt_torch.trainers.base import SegmentResult, ShouldPause
from hpt_torch.trainers.member import Member
from hpt_torch.trainers.programs import Programs
from hpt_torch.types import HParams, InfeasibleError, Objective, Report


class LoopTrainer:
    """Trains the members of a population one by one.

    data: on `device`, in `dtype`. epochs: of a whole trial, which the schedules read. keep: the objective by
    which a member's best epoch is kept; None keeps the last. scored: the metric that each epoch must give; of
    the others one may have no value. autocast: dtype of matrix products.
    programs: those of another such trainer of the same task and settings, whose rows alone are others.
    `seed` is the run's: initial weights derive from (seed, trial), data order and noise from (seed, epoch).
    """

    def __init__(
        self,
        task: Task,
        data: Data,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        epochs: int,
        keep: Objective | None = None,
        scored: str | None = None,
        autocast: torch.dtype | None = None,
        probe: Part | None = None,
        programs: Programs | None = None,
    ) -> None:
        self.task, self.data, self.device, self.dtype, self.seed = task, data, device, dtype, seed
        self.epochs, self.keep, self.scored, self.autocast = epochs, keep, scored, autocast
        self.dynamic, self.named = task.dynamic_hparams, task.buffer_hparams
        self.order = base.DataOrder(len(data.train), seed, device)
        self.probe = base.probe(data.train, data.valid, seed) if probe is None else probe
        self.programs = Programs() if programs is None else programs
        # By signature: the names in a model's state_dict, and under which of them the population has each.
        self._names: dict[str, dict[str, str]] = {}
        self._module: tuple[int, HParams, nn.Module] | None = None

    def close(self) -> None:
        """Ends the processes that read the data, if there are any."""
        self.data.close()
        self.probe.close()

    # -- members ---------------------------------------------------------------------------------------

    def build(self, hparams: HParams, trial: int) -> nn.Module:
        """The trial's untrained model on the device. Raises InfeasibleError where there is none."""
        model = base.build(self.task, hparams, trial, self.seed, self.data.valid)
        for name, parameter in model.named_parameters():
            if parameter.is_complex():
                rule = "parameters must be real; hold its real and imaginary parts (torch.view_as_complex)"
                raise InfeasibleError(f"{name} is complex: {rule}")
        model = model.to(self.device, self.dtype)
        if self.data.train.has_images:
            # Not model.to(memory_format=...), which takes no weights of five dimensions.
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return model

    def traits(self, hparams: HParams, trial: int) -> frozenset[str]:
        """What of the trial's model decides how it trains fastest: some of `costs.TRAITS`."""
        found = set()
        for module in self.module(hparams, trial).modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                found.add("convolution")
            for cell, kind in (("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN)):
                if isinstance(module, kind) or getattr(module, "cell", None) == cell:
                    found.add(cell)
        return frozenset(found or {"dense"})

    def module(self, hparams: HParams, trial: int) -> nn.Module:
        """The trial's module to train in; its tensors hold whatever they held last."""
        if self._module is None or self._module[:2] != (trial, hparams):
            self._module = trial, dict(hparams), self.build(hparams, trial)
            self.module_programs = Programs()
            self.module_rates = kept_rates(self._module[2]) if self.task.rate_hparams else []
        return self._module[2].train()

    def init(self, trials: Sequence[int], hparams: Sequence[HParams]) -> Population:
        """A new population, each member with its own initial weights."""
        params, buffers, slots, kept = [], [], [], []
        for trial, values in zip(trials, hparams, strict=True):
            learned, fixed = self.split(self.build(values, trial), values)
            params.append(learned)
            buffers.append(fixed)
            zero = {
                f"{slot}/{n}": torch.zeros_like(t)
                for slot in optim.SLOTS[str(values["optimizer"])]
                for n, t in learned.items()
            }
            average = {f"ema/{n}": t.clone() for n, t in learned.items()} if values["ema"] else {}
            slots.append({**zero, **average})
            kept.append({**learned, **fixed} if self.keep is not None else {})
        zeros = torch.zeros(len(trials), dtype=torch.float64, device=self.device)
        return Population(
            trials=list(trials),
            hparams=list(hparams),
            params=stack(params, self.device),
            buffers=stack(buffers, self.device),
            slots=stack(slots, self.device),
            kept=stack(kept, self.device),
            sums={name: zeros.clone() for name in ("loss", "grad_norm", "clipped")},
        )

    def weights(self, population: Population, i: int) -> dict[str, Tensor]:
        """The weights that member i keeps, as its model's state_dict names them."""
        member = population.member(i)
        tensors = {**member["params"], **member["buffers"]}
        if self.keep is not None:
            tensors = member["kept"]
        elif population.hparams[i]["ema"]:
            tensors.update({name: member["slots"][f"ema/{name}"] for name in member["params"]})
        hparams = population.hparams[i]
        alike = signature(hparams, self.dynamic)
        if alike not in self._names:
            module = self.module(hparams, population.trials[i])
            own = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
            state = module.state_dict(keep_vars=True)  # has a shared tensor under each of its names
            self._names[alike] = {name: own.get(id(t), name) for name, t in state.items()}
        names = self._names[alike].items()
        return {name: tensors[own].detach().clone() for name, own in names if own in tensors}

    def load(self, hparams: HParams, trial: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """A model in evaluation mode with these weights."""
        return base.load_weights(self.build(hparams, trial), weights, hparams, self.named)

    def split(self, model: nn.Module, hparams: HParams) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(what is learned, everything else that training may change or weights must hold), by name.

        Parameters that `freeze` names, or that the model itself froze, are not learned.
        """
        patterns = hparams["freeze"]
        for name, parameter in model.named_parameters():
            if optim.matches(name, patterns):  # type: ignore[arg-type]
                parameter.requires_grad_(False)
        learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not learned:
            raise InfeasibleError("every parameter is frozen, so nothing is left to train; freeze fewer")
        fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        own = base.hparam_buffers(model, self.named)
        fixed |= {n: b for n, b in model.named_buffers() if n not in own and not base.is_noise_key(n)}
        return learned, fixed

    # -- training --------------------------------------------------------------------------------------

    @denormals_are_zero()
    def train(self, population: Population, until_epoch: int, *, should_pause: ShouldPause) -> SegmentResult:
        """Trains every active member until it has `until_epoch` epochs, or until `should_pause()`.

        An exception in the task's code ends that member alone: it is in `failed` with its traceback.
        """
        result = SegmentResult()
        for i in range(len(population)):
            while population.active[i] and population.epoch[i] < until_epoch and not result.paused:
                try:
                    self._train_epoch(population, i, until_epoch, result, should_pause)
                except (Exception, SystemExit):  # user code; the traceback is the trial's reason
                    self._fail(population, i, result, traceback.format_exc(limit=-8))
        return result

    def _fail(self, population: Population, i: int, result: SegmentResult, reason: str) -> None:
        population.active[i] = False
        result.failed[population.trials[i]] = reason

    def _train_epoch(
        self,
        population: Population,
        i: int,
        until_epoch: int,
        result: SegmentResult,
        should_pause: ShouldPause,
    ) -> None:
        started = time.perf_counter()
        member = Member(self, population, i)
        order = self.order.epoch(population.epoch[i])
        size = min(int(member.h["batch_size"]), len(order))
        batches = self.order.batches(size)
        member.batches = batches
        member.steps_left = (until_epoch - population.epoch[i]) * batches
        factors = member.lr_factors(batches)
        rows = self.data.train.batches(order[: batches * size], size, population.batch[i])
        for index, batch in rows:
            member.step(batch, factors[index], index)
            if should_pause() and index + 1 < batches:
                member.store(batch=index + 1)
                result.paused = True
                return
        metrics = member.measure()
        train_loss = float(member.sums["loss"]) / batches
        metrics |= base.gradient_metrics(
            float(member.sums["grad_norm"]), float(member.sums["clipped"]), batches, member.clips
        )
        member.store(batch=0)
        population.epoch[i] += 1
        if reason := base.unfit(metrics, population.epoch[i], train_loss, self.scored):
            self._fail(population, i, result, reason)
            return
        if self.keep is not None:
            self._keep_if_best(population, i, member, metrics[self.keep.metric])
        seconds = time.perf_counter() - started
        report = Report(
            trial=population.trials[i], epoch=population.epoch[i], metrics=base.told(metrics), seconds=seconds
        )
        result.reports.append(report)

    def _keep_if_best(self, population: Population, i: int, member: Member, score: float) -> None:
        before = population.best[i]
        if before is None or (self.keep is not None and self.keep.better(score, before)):
            population.best[i], population.best_epoch[i] = score, population.epoch[i]
            member.keep()
