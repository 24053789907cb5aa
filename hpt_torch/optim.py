"""Optimizers as update rules over plain tensors, equal to torch's own.

The state of a parameter is a mapping of slots (``exp_avg``, …) shaped like it. `step_` updates one member's
parameters in place with torch's fused kernels where they exist; `update` is the same rule written out, for
one tensor, with every hyperparameter a tensor or float: the reference, and the form that can be mapped.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Scalar = Tensor | float

SLOTS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
}
ADAMS = ("adam", "adamw")  # those with bias corrections
READ = frozenset(  # the dynamic hyperparameters that an optimizer's step reads
    {"lr", "weight_decay", "momentum", "beta1", "beta2", "eps", "alpha", "head_lr_factor"}
)


def corrections(step: Scalar, h: Mapping[str, Any]) -> tuple[Scalar, Scalar]:
    """By how much the averages of Adam are short of the whole after `step` steps: 1 - beta ** step, for both
    betas. To be had in float64: in float32 the second one has three digits at first."""
    return 1 - h["beta1"] ** step, 1 - h["beta2"] ** step


def update(
    name: str,
    param: Tensor,
    grad: Tensor,
    slots: Mapping[str, Tensor],
    corrections: tuple[Scalar, Scalar] | None,
    h: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimizer step for one tensor: (new parameter, new slots).

    corrections: those of this step, which Adam and AdamW need. h: lr, weight_decay and the optimizer's own
    (momentum, nesterov; beta1, beta2, eps; alpha, eps), as in ``torch.optim.SGD`` / ``Adam`` / ``AdamW`` /
    ``RMSprop``; `nesterov` is a Python bool.
    """
    lr, decay = h["lr"], h["weight_decay"]
    if name == "adamw":
        param = param * (1 - lr * decay)
    else:
        grad = grad + decay * param
    if name == "sgd":
        buffer = h["momentum"] * slots["momentum_buffer"] + grad
        direction = grad + h["momentum"] * buffer if h["nesterov"] else buffer
        return param - lr * direction, {"momentum_buffer": buffer}
    if name == "rmsprop":
        square_avg = h["alpha"] * slots["square_avg"] + (1 - h["alpha"]) * grad * grad
        return param - lr * grad / (square_avg.sqrt() + h["eps"]), {"square_avg": square_avg}
    assert corrections is not None
    (first, second), beta1, beta2 = corrections, h["beta1"], h["beta2"]
    exp_avg = beta1 * slots["exp_avg"] + (1 - beta1) * grad
    exp_avg_sq = beta2 * slots["exp_avg_sq"] + (1 - beta2) * grad * grad
    root = (exp_avg_sq / second).sqrt() + h["eps"]
    new = param - (lr / first) * exp_avg / root
    return new, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def step_(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    slots: Mapping[str, Sequence[Tensor]],
    step: int,
    h: Mapping[str, Any],
) -> None:
    """One optimizer step for all tensors of one member, in place; under `torch.no_grad`. h: Python floats
    (and `nesterov`). The gradients are to lie in memory as the parameters do: `laid_out_as`."""
    if not params:
        return
    kernel = _fused_kernel(name, params[0].device)
    if name == "sgd" and h["momentum"] == 0:
        kernel = None  # the kernel would leave momentum_buffer behind, which a later momentum reads
    if kernel is not None and params[0].is_cuda:
        kernel = None if _laid_out_apart(params, slots) else kernel
        grads = [laid_out_as(param, grad) for param, grad in zip(params, grads, strict=True)]
    if kernel is None:
        factors = corrections(step, h) if name in ADAMS else None
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            new, new_slots = update(name, param, grad, {key: slots[key][i] for key in slots}, factors, h)
            param.copy_(new)
            for key, value in new_slots.items():
                slots[key][i].copy_(value)
    elif name == "sgd":
        kernel(
            params, grads, slots["momentum_buffer"],
            weight_decay=h["weight_decay"], momentum=h["momentum"], lr=h["lr"], dampening=0.0,
            nesterov=h["nesterov"], maximize=False, is_first_step=False,
        )  # fmt: skip
    else:
        counts = [_count(step, params[0].device)] * len(params)
        kernel(
            params, grads, slots["exp_avg"], slots["exp_avg_sq"], [], counts,
            lr=h["lr"], beta1=h["beta1"], beta2=h["beta2"],
            weight_decay=h["weight_decay"], eps=h["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _count(step: int, device: torch.device) -> Tensor:
    """The number of this step as the kernels read it: one tensor for all members, who make it together."""
    return torch.full((), float(step), device=device)


def _laid_out_apart(params: Sequence[Tensor], slots: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether a parameter lies in memory otherwise than its moments, which CUDA's kernels refuse."""
    return any(
        slot.stride() != param.stride()
        for tensors in slots.values()
        for slot, param in zip(tensors, params, strict=True)
    )


def laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient, laid out in memory as its parameter: torch's kernels read both from the start to the end,
    and autograd may return one that is sparse, transposed, or one number seen as many."""
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)


@functools.lru_cache
def _fused_kernel(name: str, device: torch.device) -> Any:
    """torch's in-place kernel over lists of tensors; private, so it may be missing."""
    if device.type not in ("cpu", "cuda"):
        return None
    return getattr(torch, f"_fused_{name}_", None)


@dataclass(frozen=True)
class Group:
    """Parameters that share their treatment: positions in the member's list of parameters."""

    indices: tuple[int, ...]
    head: bool  # its learning rate is lr * head_lr_factor
    decays: bool  # weight_decay, l1 and l2 reach it


def groups(
    names: Sequence[str], dims: Sequence[int], head: Iterable[str], decay_norm_and_bias: bool
) -> list[Group]:
    """The parameters by treatment. head: patterns such as ``head.*``; dims: dimensions of each parameter."""
    patterns = list(head)
    found: dict[tuple[bool, bool], list[int]] = {}
    for i, (name, dim) in enumerate(zip(names, dims, strict=True)):
        key = matches(name, patterns), decay_norm_and_bias or dim > 1
        found.setdefault(key, []).append(i)
    return [Group(tuple(indices), *key) for key, indices in found.items()]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is for the parameter: for its name, or that of a module that it is in."""
    return any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        for pattern in patterns
    )


def unmatched(names: Sequence[str], hparams: Mapping[str, Any]) -> tuple[str, str] | None:
    """(hyperparameter, what is wrong): the first pattern of `freeze` or `head` that is for no parameter."""
    for hparam in ("freeze", "head"):
        for pattern in hparams.get(hparam) or ():
            if not any(matches(name, [pattern]) for name in names):
                few = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                return hparam, f"no parameter is called {pattern!r}; the model has {few}"
    return None


@torch.no_grad()
def add_penalty(params: Sequence[Tensor], grads: Sequence[Tensor], l1: float, l2: float) -> list[Tensor]:
    """The gradients with those of ``l1 * sum |W| + l2 * sum W**2`` added."""
    added = list(grads)
    if l2:
        added = list(torch._foreach_add(added, list(params), alpha=2 * l2))
    if l1:
        added = list(torch._foreach_add(added, list(torch._foreach_sign(list(params))), alpha=l1))
    return added


@torch.no_grad()
def norm_of(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of the whole gradient, of shape ()."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))
    return norm


def clip(grads: Sequence[Tensor], max_norm: float, max_value: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """(clipped gradients, their common 2-norm before, whether any was clipped), the last two of shape ().

    First every entry is clamped to ±max_value, then all are scaled so that the 2-norm is at most max_norm, as
    ``clip_grad_value_`` and ``clip_grad_norm_`` of torch.nn.utils.
    """
    clipped = list(grads)
    norm = norm_of(clipped)
    touched = norm > max_norm
    if math.isfinite(max_value):
        largest = torch.stack(torch._foreach_norm(clipped, math.inf)).max()
        touched = touched | (largest > max_value)
        clipped = [grad.clamp(-max_value, max_value) for grad in clipped]
    if math.isfinite(max_norm):
        now = norm_of(clipped) if math.isfinite(max_value) else norm
        clipped = list(torch._foreach_mul(clipped, (max_norm / (now + 1e-6)).clamp(max=1.0)))
    return clipped, norm, touched
