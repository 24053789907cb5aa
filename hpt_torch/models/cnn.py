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
        # The convolution pads evenly without a copy of its input; only an odd row or column costs one.
        if (bottom, right) != (top, left):
            input = F.pad(input, (0, right - left, 0, bottom - top))
        return F.conv2d(input, self.weight, self.bias, self.stride, (top, left))


class PixelDropout(Dropout):
    """`Dropout` for (B, C, H, W), whose mask lies in memory as channels_last images do."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CNN(nn.Module):
    """(B, C, H, W) -> (B, out_features); either memory format does, channels_last is the faster one.

    One block for each of `channels`: convolution, batch norm (optional), activation, pooling, dropout. Then
    the mean over the pixels (`global_pooling`) or all of them, `head_sizes` hidden layers as in the MLP, and
    a linear layer. `padding` is a number of pixels, "valid" (0) or "same" (see `Conv2d`); pooling does not
    pad. A convolution before a batch norm has no bias: its gradient would be rounding noise.

    Raises ValueError for a combination that leaves a block without pixels.
    """

    dynamic_hparams = frozenset({"dropout", "batch_norm_momentum"})

    def __init__(
        self,
        input_shape: Sequence[int],
        out_features: int,
        *,
        channels: Sequence[int] = (16, 32),
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | str = "same",
        pooling: str = "max",
        pool_kernel: int = 2,
        pool_stride: int | None = None,
        activation: str = "relu",
        batch_norm: bool = True,
        batch_norm_momentum: float = 0.1,
        dropout: float = 0.0,
        global_pooling: bool = True,
        head_sizes: Sequence[int] = (),
        init: str = "default",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"input_shape must be (channels, height, width), got {tuple(input_shape)};"
                " give images a channel dimension, as (1, height, width)"
            )
        pool_stride = pool_kernel if pool_stride is None else pool_stride
        check_positive(
            input_shape=tuple(input_shape),
            out_features=out_features,
            channels=tuple(channels),
            kernel_size=kernel_size,
            stride=stride,
            pool_kernel=pool_kernel,
            pool_stride=pool_stride,
            head_sizes=tuple(head_sizes),
        )
        check_choice("pooling", pooling, POOLINGS)
        check_choice("activation", activation, ACTIVATIONS)
        if isinstance(padding, str):
            check_choice("padding", padding, ("same", "valid"))
        elif padding < 0:
            raise ValueError(f"padding must be at least 0, 'same' or 'valid', got {padding}")

        blocks = []
        features, height, width = input_shape
        for block, size in enumerate(channels):
            height, width = _convolved(block, (height, width), kernel_size, stride, padding)
            layers: list[nn.Module] = [
                Conv2d(features, size, kernel_size, stride, padding, bias=not batch_norm)
            ]
            if batch_norm:
                layers.append(BatchNorm(size, batch_norm_momentum))
            layers.append(ACTIVATIONS[activation]())
            pool = POOLINGS[pooling]
            if pool is not None:
                height, width = _pooled(block, (height, width), pool_kernel, pool_stride)
                layers.append(pool(pool_kernel, pool_stride))
            blocks.append(nn.Sequential(*layers, PixelDropout(dropout)))
            features = size
        self.blocks = nn.Sequential(*blocks)

        self.global_pooling = global_pooling
        head: list[nn.Module] = []
        features = features if global_pooling else features * height * width
        for size in head_sizes:
            head += dense(
                features,
                size,
                activation=activation,
                batch_norm=batch_norm,
                batch_norm_momentum=batch_norm_momentum,
                dropout=dropout,
            )
            features = size
        self.head = nn.Sequential(*head, nn.Linear(features, out_features))
        init_weights(self, init)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.blocks(x_BCHW)
        # AdaptiveAvgPool2d's backward is not deterministic on CUDA, a mean's is. Over these dimensions its
        # gradient is channels_last, as is what it is the gradient of.
        features_BF = y_BCHW.permute(0, 2, 3, 1).mean((1, 2)) if self.global_pooling else y_BCHW.flatten(1)
        logits_BC: Tensor = self.head(features_BF)
        return logits_BC


def _convolved(
    block: int, size: tuple[int, int], kernel: int, stride: int, padding: int | str
) -> tuple[int, int]:
    """(height, width) after the block's convolution. Raises ValueError where no pixel is left."""
    height, width = size
    if padding == "same":
        return -(-height // stride), -(-width // stride)
    pad = padding if isinstance(padding, int) else 0
    if min(size) + 2 * pad < kernel:
        raise ValueError(
            f"block {block}: its input is {height} x {width} pixels, kernel_size {kernel} with padding"
            f" {padding!r} needs at least {kernel - 2 * pad} x {kernel - 2 * pad};"
            f" use {_FEWER if block else ''}padding='same' or kernel_size <= {min(size) + 2 * pad}"
        )
    return (height + 2 * pad - kernel) // stride + 1, (width + 2 * pad - kernel) // stride + 1


def _pooled(block: int, size: tuple[int, int], kernel: int, stride: int) -> tuple[int, int]:
    """(height, width) after the block's pooling. Raises ValueError where no pixel is left."""
    height, width = size
    if min(size) < kernel:
        raise ValueError(
            f"block {block}: its convolution gives {height} x {width} pixels, pool_kernel {kernel} needs at"
            f" least {kernel} x {kernel};"
            f" use {_FEWER if block else ''}pooling='none' or pool_kernel <= {min(size)}"
        )
    return (height - kernel) // stride + 1, (width - kernel) // stride + 1


_FEWER = "fewer blocks, "
