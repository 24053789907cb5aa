"""`grad_and_value` of one member's loss by its parameters, to be mapped over members.

torch.func.grad_and_value would do, but for two things that we do not need and that are dear: it keeps a graph
for second derivatives, and at its first call it imports all of torch.compile (two seconds, in every worker).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:  # private, so they may go; then the public function does the same
    from torch._functorch import eager_transforms as _functorch

    _functorch.grad_increment_nesting, _functorch._wrap_all_tensors  # noqa: B018
except (ImportError, AttributeError):
    _functorch = None  # type: ignore[assignment]


def grad_and_value(loss: Callable[..., Tensor]) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """``loss(params, *rest) -> ()`` as a function that returns (gradients by name, the loss)."""
    return torch.func.grad_and_value(loss) if _functorch is None else _cheap(loss, _functorch)


def _cheap(loss: Callable[..., Tensor], functorch: Any) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def function(*arguments: Any) -> tuple[dict[str, Tensor], Tensor]:
        with functorch.grad_increment_nesting() as level, torch.enable_grad():
            params, *rest = functorch._wrap_all_tensors(arguments, level)
            learned: dict[str, Tensor] = functorch._create_differentiable(params, level)
            value = loss(learned, *rest)
            found: Any = [None] * len(learned)
            if value.requires_grad:
                found = torch.autograd.grad(value, list(learned.values()), allow_unused=True)
            grads = {
                name: torch.zeros_like(tensor) if grad is None else grad
                for (name, tensor), grad in zip(learned.items(), found, strict=True)
            }
            undone: tuple[dict[str, Tensor], Tensor] = functorch._undo_create_differentiable(
                (grads, value), level
            )
            return undone

    return function
