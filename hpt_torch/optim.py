"""Optimizers as update rules over plain tensors, equal to torch's own.

The state of a parameter is a mapping of slots (``exp_avg``, …) shaped like it. `step_` updates one member's
parameters in place with torch's fused kernels where they exist; `update` is the same rule written out, for
one tensor, with every hyperparameter a tensor or float: the reference, and the form that can be mapped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Scalar = Tensor | float

SLOTS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}


def update(
    name: str, param: Tensor, grad: Tensor, slots: Mapping[str, Tensor], step: Scalar, h: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimizer step for one tensor: (new parameter, new slots).

    step: the number of this step, from 1. h: lr, weight_decay and the optimizer's own (momentum, nesterov;
    beta1, beta2, eps), as in ``torch.optim.SGD`` / ``Adam`` / ``AdamW``; `nesterov` is a Python bool.
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
    beta1, beta2 = h["beta1"], h["beta2"]
    exp_avg = beta1 * slots["exp_avg"] + (1 - beta1) * grad
    exp_avg_sq = beta2 * slots["exp_avg_sq"] + (1 - beta2) * grad * grad
    root = (exp_avg_sq / (1 - beta2**step)).sqrt() + h["eps"]
    new = param - (lr / (1 - beta1**step)) * exp_avg / root
    return new, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@torch.no_grad()
def step_(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    slots: Mapping[str, Sequence[Tensor]],
    step: int,
    h: Mapping[str, Any],
) -> None:
    """One optimizer step for all tensors of one member, in place. h: Python floats (and `nesterov`)."""
    if not params:
        return
    kernel = _fused_kernel(name, params[0].device)
    if name == "sgd" and h["momentum"] == 0:
        kernel = None  # the kernel would leave momentum_buffer behind, which a later momentum reads
    if kernel is None:
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            new, new_slots = update(name, param, grad, {key: slots[key][i] for key in slots}, float(step), h)
            param.copy_(new)
            for key, value in new_slots.items():
                slots[key][i].copy_(value)
    elif name == "sgd":
        kernel(
            list(params), list(grads), list(slots["momentum_buffer"]),
            weight_decay=h["weight_decay"], momentum=h["momentum"], lr=h["lr"], dampening=0.0,
            nesterov=h["nesterov"], maximize=False, is_first_step=False,
        )  # fmt: skip
    else:
        count = torch.full((), float(step), device=params[0].device)
        kernel(
            list(params), list(grads), list(slots["exp_avg"]), list(slots["exp_avg_sq"]), [],
            [count] * len(params), lr=h["lr"], beta1=h["beta1"], beta2=h["beta2"],
            weight_decay=h["weight_decay"], eps=h["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip


def _fused_kernel(name: str, device: torch.device) -> Any:
    """torch's in-place kernel over lists of tensors; private, so it may be missing."""
    if device.type not in ("cpu", "cuda"):
        return None
    return getattr(torch, f"_fused_{name}_", None)


def clip_norm_(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients in place so that their common 2-norm is at most `max_norm`; returns the norm
    before, shape (). As ``torch.nn.utils.clip_grad_norm_``."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))
    if math.isfinite(max_norm):
        torch._foreach_mul_(list(grads), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
