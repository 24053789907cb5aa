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
    "rmsprop": torch.optim.RMSprop,
}
CASES = [
    ("sgd", {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
    ("sgd", {"momentum": 0.9, "nesterov": False, "weight_decay": 1e-2}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    ("adam", {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
    ("adam", {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 1e-2}),
    ("adamw", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 1e-1}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-6, "weight_decay": 1e-2}),
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
                factors = optim.corrections(step, h) if name in optim.ADAMS else None
                new, state = optim.update(
                    name, mine[i], grad, {k: v[i] for k, v in slots.items()}, factors, h
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
    mapped, _ = torch.func.vmap(
        lambda p, g, s, t, hp: optim.update("adam", p, g, s, optim.corrections(t, hp), hp)
    )(param, grad, slots, step, h)
    for i in range(3):
        alone, _ = optim.update(
            "adam",
            param[i],
            grad[i],
            {k: v[i] for k, v in slots.items()},
            optim.corrections(float(step[i]), {k: float(v[i]) for k, v in h.items()}),
            {k: v[i] for k, v in h.items()},
        )
        torch.testing.assert_close(mapped[i], alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [0.3, math.inf])
@pytest.mark.parametrize("limit", [0.5, 1e3, math.inf])
def test_clip_equals_torch(limit: float, value: float) -> None:
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    before = torch.nn.utils.get_total_norm(grads)
    if math.isfinite(value):
        torch.nn.utils.clip_grad_value_(parameters, value)
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    clipped, norm, touched = optim.clip(grads, limit, value)
    assert float(norm) == pytest.approx(float(before), rel=1e-6)
    assert bool(touched) == (limit == 0.5 or value == 0.3)
    for grad, parameter in zip(clipped, parameters, strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_penalty_is_the_gradient_of_l1_and_l2() -> None:
    """L_total = L_data + l1 * sum |W| + l2 * sum W**2, differentiated by autograd."""
    torch.manual_seed(3)
    params = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    data = sum((p * torch.arange(p.numel()).view(p.shape)).sum() for p in params)
    assert isinstance(data, torch.Tensor)
    grads = torch.autograd.grad(data, params, retain_graph=True)
    total = data + sum(0.1 * p.abs().sum() + 0.3 * p.square().sum() for p in params)
    for a, b in zip(
        optim.add_penalty(params, grads, 0.1, 0.3), torch.autograd.grad(total, params), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_groups_by_head_and_by_what_decays() -> None:
    names, dims = ["body.weight", "body.bias", "head.weight", "head.bias"], [2, 1, 2, 1]
    groups = optim.groups(names, dims, ["head.*"], decay_norm_and_bias=False)
    assert {(g.indices, g.head, g.decays) for g in groups} == {
        ((0,), False, True), ((1,), False, False), ((2,), True, True), ((3,), True, False)
    }  # fmt: skip
    assert [g.indices for g in optim.groups(names, dims, [], decay_norm_and_bias=True)] == [(0, 1, 2, 3)]
