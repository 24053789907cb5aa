"""A ReLU behind its max pooling in a recorded step: the bits of the step as written, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpt_torch.trainers import traced
from hpt_torch.trainers.traced import trace

Net = Callable[[Tensor, Tensor], Tensor]  # (images, weight) -> anything


def _operations(net: Net, monkeypatch: pytest.MonkeyPatch, dims: int = 2) -> list[str]:
    """The operations that the recorded step of the net runs: loss and gradient by the weight, which must be
    those of the step itself, for images with negative windows, ties, NaN and either memory format."""
    written: list[str] = []
    kept = traced._written_out

    def listen(calls: Any, *rest: Any) -> Any:
        written.extend(call.op.__name__ for call in calls)
        return kept(calls, *rest)

    def step(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            weight = weight.detach().requires_grad_()
            outputs = net(x, weight)
            loss = (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum()
            (gradient,) = torch.autograd.grad(loss, [weight])
        return loss.detach(), gradient

    monkeypatch.setattr(traced, "_written_out", listen)
    generator = torch.Generator().manual_seed(0)
    layouts = [torch.contiguous_format, torch.channels_last if dims == 2 else torch.channels_last_3d]
    for layout in layouts:
        weight = torch.randn(4, generator=generator).abs()
        x = torch.randn(3, 4, *[9] * dims, generator=generator)
        x[0, :, :6] = x[0, :, :6].clamp(max=-0.5)  # windows without a positive number
        x[1] = (2 * x[1]).round()  # ties, among zeros too
        x = x.contiguous(memory_format=layout)
        run, _ = trace(step, weight, x)
        for other in (x, -x, x.roll(1, -1), x.masked_fill(x > 2, torch.nan)):
            expected, found = step(weight, other), run(weight, other)
            assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(expected, found, strict=True))
            assert all(
                torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(expected, found, strict=True)
            )
    return written


def _scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight.view(-1, *[1] * (x.dim() - 2))


def _order(names: list[str]) -> list[str]:
    """The first letters of the first pass's ReLU and pooling, as they come."""
    kinds = {"relu": "relu", "relu_": "relu", "max_pool2d_with_indices": "pool"}
    kinds |= {"max_pool3d_with_indices": "pool", "threshold_backward": "mask"}
    kinds |= {"max_pool2d_with_indices_backward": "unpool", "max_pool3d_with_indices_backward": "unpool"}
    found = [kinds[name.split(".")[0]] for name in names if name.split(".")[0] in kinds]
    return found[: len(found) // 2]


BEHIND = ["pool", "relu", "mask", "unpool"]
AS_WRITTEN = ["relu", "pool", "unpool", "mask"]


@pytest.mark.parametrize(
    ("net", "dims"),
    [
        (lambda x, w: F.max_pool2d(F.relu(_scaled(x, w)), 2), 2),
        (lambda x, w: F.max_pool2d(F.relu(_scaled(x, w), inplace=True), 2), 2),
        (lambda x, w: F.max_pool2d(F.relu(_scaled(x, w)), 3, stride=2, padding=1), 2),  # windows overlap
        (lambda x, w: F.max_pool2d(F.relu(_scaled(x, w)), 2, ceil_mode=True), 2),
        (lambda x, w: F.max_pool2d(F.relu(_scaled(x, w)), 2, dilation=2), 2),
        (lambda x, w: F.max_pool2d(F.relu(_scaled(x, w)), 2).sin().flatten(1), 2),
        (lambda x, w: F.max_pool3d(F.relu(_scaled(x, w)), 2), 3),
    ],
)
def test_the_relu_comes_behind(net: Net, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _order(_operations(net, monkeypatch, dims)) == BEHIND


def _read_before(x: Tensor, w: Tensor) -> Tensor:
    y = _scaled(x, w)
    return F.max_pool2d(F.relu(y), 2) + y.mean()


def _written_later(x: Tensor, w: Tensor) -> Tensor:
    """What the ReLU has read is something else when the pooling reads it."""
    y = _scaled(x, w).detach()
    positive = F.relu(y)
    y.mul_(-1)
    return F.max_pool2d(positive, 2) * w.sum()


def _changed_after(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        largest = F.max_pool2d(F.relu(_scaled(x, w)), 2)
        largest.mul_(2)
    return largest * w.sum()


def _seen_twice(x: Tensor, w: Tensor) -> Tensor:
    y = F.relu(_scaled(x, w))
    return F.max_pool2d(y, 2) + y.mean()


def _pooled_twice(x: Tensor, w: Tensor) -> Tensor:
    y = F.relu(_scaled(x, w))
    return torch.cat([F.max_pool2d(y, 2).flatten(1), F.max_pool2d(y, 3).flatten(1)], 1)


def _places_are_used(x: Tensor, w: Tensor) -> Tensor:
    """In a window without a positive number they depend on the order."""
    y, places = F.max_pool2d(F.relu(_scaled(x, w)), 2, return_indices=True)
    return y + places


def _seen_later(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(_scaled(x, w))
        seen = F.max_pool2d(y, 2) + y.mean()
    return seen * w.sum()


def test_a_relu_reads_what_something_else_reads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _order(_operations(_read_before, monkeypatch)) == BEHIND


@pytest.mark.parametrize(
    "net", [_seen_twice, _seen_later, _pooled_twice, _places_are_used, _written_later, _changed_after]
)
def test_a_relu_that_anything_else_sees_stays(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _order(_operations(net, monkeypatch))
    assert names[0] == "relu"


@pytest.mark.parametrize("what", [0, 1])
def test_what_is_returned_is_not_changed(what: int) -> None:
    def both(x: Tensor) -> Tensor:
        positive = F.relu(x)
        return (positive, *F.max_pool2d(positive, 2, return_indices=True)[1:])[what]

    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
    run, _ = trace(both, x)
    assert torch.equal(run(x), both(x))
