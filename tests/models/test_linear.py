"""`Linear` against closed forms, and what every model must do under torch.func (used by its siblings)."""

# P members, B batch, F features

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from hpt_torch.models import Linear
from hpt_torch.models.layers import make_stateless


def assert_mapped_equals_alone(
    build: Callable[[], nn.Module], inputs: Sequence[Tensor], *, steps: int = 2
) -> None:
    """A few SGD steps of three members: vmapped over stacked parameters and buffers, and each alone.

    Every member has its own weights, dropout, batch_norm_momentum and noise_key, all in float64.
    """
    members = []
    for i in range(3):
        torch.manual_seed(i)
        member = make_stateless(build()).double().train()
        for name, buffer in member.named_buffers():
            values = {"dropout": 0.2 + 0.2 * i, "batch_norm_momentum": 0.1 + 0.3 * i, "noise_key": 7 + i}
            if name.split(".")[-1] in values:
                buffer.fill_(values[name.split(".")[-1]])
        members.append(member)
    template = members[0]

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(template, (params, buffers), tuple(inputs)).square().mean()

    def clone(named: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in named}

    alone = [
        (clone(list(m.named_parameters())), clone(list(m.named_buffers()))) for m in members
    ]  # cloned before training, which would change the template's own tensors
    params = {name: torch.stack([p[name] for p, _ in alone]) for name in alone[0][0]}
    buffers = {name: torch.stack([b[name] for _, b in alone]) for name in alone[0][1]}
    start = {name: buffer.clone() for name, buffer in buffers.items()}
    for _ in range(steps):
        grads, losses = vmap(grad_and_value(loss))(params, buffers)
        params = {name: params[name] - 0.1 * grads[name] for name in params}
        for i, (p, b) in enumerate(alone):
            p = {name: tensor.requires_grad_() for name, tensor in p.items()}
            value = loss(p, b)
            gradients = dict(zip(p, torch.autograd.grad(value, list(p.values())), strict=True))
            torch.testing.assert_close(losses[i], value.detach(), rtol=1e-9, atol=1e-9)
            for name, gradient in gradients.items():
                torch.testing.assert_close(grads[name][i], gradient, rtol=1e-9, atol=1e-9, msg=name)
            alone[i] = ({name: (p[name] - 0.1 * gradients[name]).detach() for name in p}, b)
    for i, (p, b) in enumerate(alone):
        for name, tensor in p.items():
            torch.testing.assert_close(params[name][i], tensor, rtol=1e-9, atol=1e-9, msg=name)
        for name, tensor in b.items():
            torch.testing.assert_close(buffers[name][i], tensor, rtol=1e-9, atol=1e-9, msg=name)
            if "running" in name:
                assert not torch.equal(tensor, start[name][i]), f"{name} did not move"
    assert len({float(value) for value in losses}) == 3


def test_it_is_an_affine_map_of_the_flattened_input() -> None:
    model = Linear((3, 4), 2)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(model(x), x.reshape(5, 12) @ model.linear.weight.T + model.linear.bias)
    assert Linear((3, 4), 2, bias=False).linear.bias is None


def test_zeros_start_at_zero_and_other_schemes_are_those_of_every_model() -> None:
    assert all(not p.any() for p in Linear((4,), 3, init="zeros").parameters())
    orthogonal = Linear((4,), 3, init="orthogonal").linear
    assert not orthogonal.bias.any()
    torch.testing.assert_close(orthogonal.weight @ orthogonal.weight.T, 2 * torch.eye(3))


def test_nothing_is_dynamic() -> None:
    assert Linear.dynamic_hparams == frozenset()


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"out_features must be at least 1, got 0"):
        Linear((4,), 0)
    with pytest.raises(ValueError, match=r"input_shape must be at least 1, got \(0, 3\)"):
        Linear((0, 3), 1)


def test_training_reaches_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BF = torch.randn(200, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2, 3, 0.5, 1])
    y_B1 = x_BF @ torch.randn(5, 1, generator=generator, dtype=torch.float64) + 3
    y_B1 = y_B1 + 0.5 * torch.randn(200, 1, generator=generator, dtype=torch.float64)
    model = Linear((5,), 1).double()
    minimise(model, lambda: F.mse_loss(model(x_BF), y_B1))
    ones_B1 = torch.ones(200, 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat((x_BF, ones_B1), 1), y_B1).solution[:, 0]
    torch.testing.assert_close(
        torch.cat((model.linear.weight[0], model.linear.bias)).detach(), solution, rtol=1e-6, atol=1e-6
    )


def test_logistic_regression_is_scikit_learns() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, y)
    x_BF, y_B = torch.tensor(x), torch.tensor(y, dtype=torch.float64)
    model = Linear((30,), 1, init="zeros").double()
    # scikit-learn's objective: C * summed loss + |w|^2 / 2, without the bias
    minimise(
        model,
        lambda: (
            F.binary_cross_entropy_with_logits(model(x_BF)[:, 0], y_B)
            + model.linear.weight.square().sum() / 2 / len(x)
        ),
    )
    np.testing.assert_allclose(model.linear.weight.detach().numpy(), reference.coef_, atol=1e-4)
    np.testing.assert_allclose(model.linear.bias.detach().numpy(), reference.intercept_, atol=1e-4)


def minimise(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value  # type: ignore[return-value]

    optimizer.step(closure)


@pytest.mark.parametrize("bias", [True, False])
def test_mapped_members_train_as_each_alone(bias: bool) -> None:
    assert_mapped_equals_alone(
        lambda: Linear((2, 3), 4, bias=bias), [torch.randn(8, 2, 3, dtype=torch.float64)]
    )
