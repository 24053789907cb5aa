"""How large a trial's model is, before it is trained: its trainable parameters, the FLOPs of a row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpt_torch import optim
from hpt_torch.seeding import torch_seeded
from hpt_torch.task import Task


def parameters(model: nn.Module, freeze: Iterable[str] = ()) -> int:
    """How many numbers training can change: of shared parameters once, without those that are frozen by the
    model itself or by these patterns."""
    patterns = tuple(freeze)
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not optim.matches(name, patterns)
    )


def flops(task: Task, model: nn.Module, row: Mapping[str, Tensor]) -> int:
    """Of a row's forward pass (`task.metrics` on a batch of one) in evaluation mode, as PyTorch counts them:
    two for each multiplication and addition of a matrix product, convolution or attention, none for
    elementwise operations. Model and row are on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton

    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent})
    with torch.no_grad(), torch_seeded(0, "flops"), counter:
        task.metrics(model, row)
    return int(counter.get_total_flops())


def _recurrent(
    inputs: Sequence[int], weight: Sequence[int], recurrent: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of the CPU's LSTM, which is one operation that the counter does not know, from its shapes: inputs
    (steps, B, features), weight (gates, features), recurrent (gates, hidden)."""
    return 2 * inputs[0] * inputs[1] * (math.prod(weight) + math.prod(recurrent))
