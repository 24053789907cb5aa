"""The convolutional network."""

# B batch, C channels, H height, W width

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hpt_torch.models.layers import (
    ACTIVATIONS,
    BatchNorm,
    Dropout,
    check_choice,
    check_positive,
    dense,
    init_weights,
)

POOLINGS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d, "none": None}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) one dimension so that a convolution gives ceil(size / stride) pixels."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with square kernels, whose "same" works with any stride.

    "same" is TensorFlow's: ``out = ceil(in / stride)``, from ``max((out - 1) * stride + kernel - in, 0)``
    zeros, half of them (rounded down) on the top/left, the rest on the bottom/right.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int, padding: int | str, bias: bool
    ) -> None:
        number = padding if isinstance(padding, int) else 0
        super().__init__(channels, out_channels, kernel, stride, number, bias=bias)
        self.same = padding == "same"

    def forward(self, input: Tensor) -> Tensor:
        if not self.same:
            return super().forward(input)
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(input.shape[-2], kernel, stride)
        left, right = same_padding(input.shape[-1], kernel, stride)
        # The convolution itself pads evenly without a copy of its input; only the odd pixel needs one.
        if (bottom, right) != (top, left):
            input = F.pad(input, (0, right - left, 0, bottom - top))
        if (bottom, right) == (top, left) or not (top or left):
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))
        return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))


class CNN(nn.Module):
    """(B, C, H, W) -> (B, out_features), for inputs in either memory format (channels_last is faster)."""
