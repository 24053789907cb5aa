"""`CNN`: padding against a reference, shapes, infeasible combinations, mapped members."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_linear import assert_mapped_equals_alone
from torch import Tensor, nn

from hpt_torch.models import CNN
from hpt_torch.models.cnn import Conv2d, same_padding
from hpt_torch.models.layers import BatchNorm, Dropout


def same_convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Pixel by pixel from the definition: output i sees inputs from i * stride - before, zeros outside."""
    size, kernel = x.shape[-1], weight.shape[-1]
    out = math.ceil(size / stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    y = x.new_zeros(x.shape[0], weight.shape[0], out, out)
    for row, column, i, j in itertools.product(range(out), range(out), range(kernel), range(kernel)):
        h, w = row * stride - before + i, column * stride - before + j
        if 0 <= h < size and 0 <= w < size:
            y[:, :, row, column] += x[:, :, h, w] @ weight[:, :, i, j].T
    return y


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
def test_same_padding_is_the_definitions(kernel: int, stride: int) -> None:
    for size in (1, 2, 3, 5, 6, 8):
        torch.manual_seed(size)
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        conv = Conv2d(3, 4, kernel, stride, "same", bias=False).double()
        torch.testing.assert_close(conv(x), same_convolution(x, conv.weight, stride), msg=f"size {size}")


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_same_padding_at_stride_one_is_torchs(kernel: int) -> None:
    x = torch.randn(2, 3, 9, 6)
    conv = Conv2d(3, 4, kernel, 1, "same", bias=True)
    padding = [same_padding(size, kernel, 1) for size in (9, 6)]
    assert conv(x).shape == (2, 4, 9, 6)
    # torch too puts the odd zero on the right, and so does its string "same"
    padded = F.pad(x, (*padding[1], *padding[0]))
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias))
    if kernel % 2:  # torch warns of its copy where the kernel is even
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding="same"))


@pytest.mark.parametrize("size", [4, 5, 7, 8, 28])
@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
@pytest.mark.parametrize("pooling", ["max", "avg", "none"])
@pytest.mark.parametrize("global_pooling", [True, False])
def test_shapes_of_every_feasible_combination(
    size: int, padding: int | str, pooling: str, global_pooling: bool
) -> None:
    built = 0
    for kernel, stride, pool, pool_stride in itertools.product((1, 2, 3, 5), (1, 2), (2, 3), (None, 1)):
        hparams: dict[str, Any] = {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "pooling": pooling,
            "pool_kernel": pool,
            "pool_stride": pool_stride,
            "global_pooling": global_pooling,
        }
        x = torch.randn(2, 2, size, size + 1)
        try:
            model = CNN((2, size, size + 1), 3, channels=(3, 4), **hparams)
        except ValueError as error:
            assert str(error).startswith("block ")
            # Not refused in vain: without the rule torch itself finds no pixel.
            with pytest.raises(RuntimeError):
                plain(x, hparams)
            continue
        built += 1
        assert model.eval()(x).shape == (2, 3), hparams
    assert built


def plain(x: Tensor, hparams: dict[str, Any]) -> Tensor:
    """The pixels of two blocks, in torch's own functions."""
    padding = {"same": None, "valid": 0}.get(hparams["padding"], hparams["padding"])
    for _ in range(2):
        weight = torch.zeros(2, 2, hparams["kernel_size"], hparams["kernel_size"])
        if padding is None:
            sides = [same_padding(n, hparams["kernel_size"], hparams["stride"]) for n in x.shape[2:]]
            x = F.pad(x, (*sides[1], *sides[0]))
        x = F.conv2d(x, weight, None, hparams["stride"], padding or 0)
        if hparams["pooling"] != "none":
            x = F.max_pool2d(x, hparams["pool_kernel"], hparams["pool_stride"])
    return x


@pytest.mark.parametrize(
    ("shape", "hparams", "message"),
    [
        (
            (1, 8, 8),
            {"channels": (4, 4, 4), "kernel_size": 5, "padding": "valid", "pooling": "none", "stride": 2},
            "block 1: its input is 2 x 2 pixels, kernel_size 5 with padding 'valid' needs at least 5 x 5;"
            " use fewer blocks, padding='same' or kernel_size <= 2",
        ),
        (
            (1, 4, 6),
            {"kernel_size": 7, "padding": 1},
            "block 0: its input is 4 x 6 pixels, kernel_size 7 with padding 1 needs at least 5 x 5;"
            " use padding='same' or kernel_size <= 6",
        ),
        (
            (1, 8, 8),
            {"channels": (4, 4, 4, 4)},
            "block 3: its convolution gives 1 x 1 pixels, pool_kernel 2 needs at least 2 x 2;"
            " use fewer blocks, pooling='none' or pool_kernel <= 1",
        ),
        (
            (1, 2, 9),
            {"pool_kernel": 3},
            "block 0: its convolution gives 2 x 9 pixels, pool_kernel 3 needs at least 3 x 3;"
            " use pooling='none' or pool_kernel <= 2",
        ),
        (
            (8, 8),
            {},
            "input_shape must be (channels, height, width), got (8, 8);"
            " give images a channel dimension, as (1, height, width)",
        ),
        ((1, 8, 8), {"padding": -1}, "padding must be at least 0, 'same' or 'valid', got -1"),
        ((1, 8, 8), {"padding": "full"}, "padding must be same or valid, got 'full'"),
        ((1, 8, 8), {"pooling": "min"}, "pooling must be max, avg or none, got 'min'"),
        ((1, 8, 8), {"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ((1, 8, 8), {"channels": (4, 0)}, "channels must be at least 1, got (4, 0)"),
        (
            (1, 8, 8),
            {"activation": "selu"},
            "activation must be relu, leaky_relu, gelu, silu, tanh or sigmoid, got 'selu'",
        ),
    ],
)
def test_infeasible_combinations_say_what_would_fit(
    shape: tuple[int, ...], hparams: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CNN(shape, 2, **hparams)


def test_the_remedies_work() -> None:
    hparams: dict[str, Any] = {"channels": (4, 4, 4), "padding": "valid", "pooling": "none", "stride": 2}
    CNN((1, 8, 8), 2, **(hparams | {"channels": (4,), "kernel_size": 5}))
    CNN((1, 8, 8), 2, **(hparams | {"padding": "same", "kernel_size": 5}))
    CNN((1, 8, 8), 2, **(hparams | {"channels": (4, 4), "kernel_size": 2}))
    CNN((1, 4, 6), 2, kernel_size=6, padding=1, pooling="none", channels=(4,))
    CNN((1, 8, 8), 2, channels=(4, 4, 4, 4), pool_kernel=1)


def test_it_is_the_stack_of_torchs_own_layers() -> None:
    torch.manual_seed(0)
    model = CNN((3, 10, 11), 5, channels=(4, 6), kernel_size=3, padding=1, pooling="avg", head_sizes=(7,))
    reference = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 7, bias=False),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 5),
    )
    ours = model.state_dict()
    theirs = {k: v for k, v in reference.state_dict().items() if "num_batches" not in k}
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]
    reference.load_state_dict(dict(zip(theirs, ours.values(), strict=True)), strict=False)
    x = torch.randn(8, 3, 10, 11)
    torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(model.eval()(x), reference.eval()(x))


def test_all_pixels_reach_the_head_without_global_pooling() -> None:
    model = CNN((1, 8, 8), 3, channels=(4, 5), global_pooling=False)
    assert model.head[0].in_features == 5 * 2 * 2
    assert CNN((1, 8, 8), 3, channels=(4, 5)).head[0].in_features == 5


def test_no_bias_before_batch_norm() -> None:
    def has_bias(**hparams: Any) -> list[bool]:
        model = CNN((1, 8, 8), 3, head_sizes=(4,), **hparams)
        return [m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    assert has_bias() == [False, False, False, True]
    assert has_bias(batch_norm=False) == [True] * 4


@pytest.mark.parametrize("padding", ["same", 1, "valid"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pooling", ["max", "avg", "none"])
def test_channels_last_stays_channels_last(padding: int | str, stride: int, pooling: str) -> None:
    model = CNN(
        (3, 16, 16), 2, channels=(4, 5), kernel_size=2, padding=padding, stride=stride, pooling=pooling
    )
    layouts = []
    for module in model.blocks.modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda module, _, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    x = torch.randn(4, 3, 16, 16)
    y = model.eval()(x.contiguous(memory_format=torch.channels_last))
    assert len(layouts) >= 8
    assert all(layouts)
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize(
    "hparams",
    [
        {"kernel_size": 3},
        {"kernel_size": 2, "stride": 2, "pooling": "none", "head_sizes": (6,)},
        {"kernel_size": 3, "padding": "valid", "pooling": "avg", "global_pooling": False},
        {"kernel_size": 3, "padding": 1, "batch_norm": False, "activation": "tanh"},
    ],
)
def test_mapped_members_train_as_each_alone(hparams: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 11, 12, dtype=torch.float64)
    for format in (torch.contiguous_format, torch.channels_last):
        assert_mapped_equals_alone(
            lambda: CNN((2, 11, 12), 3, channels=(4, 5), dropout=0.1, **hparams),
            [x.contiguous(memory_format=format)],
        )


def test_dynamic_hyperparameters_are_buffers() -> None:
    model = CNN((1, 8, 8), 2, dropout=0.25, batch_norm_momentum=0.3)
    leaves = {name.split(".")[-1] for name, _ in model.named_buffers()}
    assert leaves >= CNN.dynamic_hparams == {"dropout", "batch_norm_momentum"}
    assert {round(float(m.dropout), 4) for m in model.modules() if isinstance(m, Dropout)} == {0.25}
    momenta = {round(float(m.batch_norm_momentum), 4) for m in model.modules() if isinstance(m, BatchNorm)}
    assert momenta == {0.3}
