"""Every optimizer equals torch's own, in both of its forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpt_torch import optim

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
CASES = [
    ("sgd", {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
    ("sgd", {"momentum": 0.9, "nesterov": False, "weight_decay": 1e-2}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    ("adam", {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
    ("adam", {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 1e-2}),
    ("adamw", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 1e-1}),
]
SHAPES = ((5, 3), (7,), ())


def _torch_arguments(h: dict[str, Any]) -> dict[str, Any]:
    arguments = {k: v for k, v in h.items() if k not in ("beta1", "beta2")}
    if "beta1" in h:
        arguments["betas"] = (h["beta1"], h["beta2"])
    return arguments


@pytest.mark.parametrize("form", ["update", "step_", "step_ without kernels"])
@pytest.mark.parametrize(("name", "rest"), CASES)
def test_equals_torch_over_50_steps(
    name: str, rest: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "step_ without kernels":
        monkeypatch.setattr(optim, "_fused_kernel", lambda name, device: None)
    h = {"lr": 3e-2, **rest}
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    theirs = [p.clone().requires_grad_() for p in start]
    reference = TORCH[name](theirs, **_torch_arguments(h))
    mine = [p.clone() for p in start]
    slots = {slot: [torch.zeros_like(p) for p in mine] for slot in optim.SLOTS[name]}
    for step in range(1, 51):
        grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        reference.step()
        if form == "update":
            for i, grad in enumerate(grads):
                new, state = optim.update(
                    name, mine[i], grad, {k: v[i] for k, v in slots.items()}, float(step), h
                )
                mine[i] = new
                for key, value in state.items():
                    slots[key][i] = value
        else:
            optim.step_(name, mine, grads, slots, step, h)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-10)


def test_update_maps_over_members_with_their_own_hyperparameters() -> None:
    """Three members with different lr, betas and step counts in one call = one after another."""
    generator = torch.Generator().manual_seed(1)
    param, grad = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    slots = {slot: torch.rand(3, 4, generator=generator, dtype=torch.float64) for slot in optim.SLOTS["adam"]}
    h = {
        "lr": torch.tensor([0.1, 0.2, 0.3]).double(),
        "weight_decay": torch.tensor([0.0, 0.1, 0.0]).double(),
        "beta1": torch.tensor([0.9, 0.5, 0.0]).double(),
        "beta2": torch.tensor([0.9, 0.99, 0.999]).double(),
        "eps": torch.tensor([1e-8, 1e-4, 1e-2]).double(),
    }
    step = torch.tensor([1.0, 5.0, 9.0]).double()
    mapped, _ = torch.func.vmap(lambda p, g, s, t, hp: optim.update("adam", p, g, s, t, hp))(
        param, grad, slots, step, h
    )
    for i in range(3):
        alone, _ = optim.update(
            "adam",
            param[i],
            grad[i],
            {k: v[i] for k, v in slots.items()},
            step[i],
            {k: v[i] for k, v in h.items()},
        )
        torch.testing.assert_close(mapped[i], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("limit", [0.5, 1e3, math.inf])
def test_clip_norm_equals_torch(limit: float) -> None:
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    assert float(optim.clip_norm_(grads, limit)) == pytest.approx(float(norm), rel=1e-6)
    for grad, parameter in zip(grads, parameters, strict=True):
        torch.testing.assert_close(grad, parameter.grad)
