"""Dropout, batch norm and initial weights against torch's own, and the convention of buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpt_torch.models import MLP
from hpt_torch.models.layers import (
    BatchNorm,
    Dropout,
    hash_bits,
    init_weights,
    make_stateless,
    stream_key,
)


@pytest.mark.parametrize("shape", [(32, 5), (16, 5, 4, 3)])
def test_batch_norm_equals_torch(shape: tuple[int, ...]) -> None:
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, momentum=0.3).double()
    mine = BatchNorm(5, batch_norm_momentum=0.3).double()
    torch.manual_seed(0)
    for _ in range(5):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = mine(a), theirs(b)
        (y**3).sum().backward()
        (z**3).sum().backward()
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(a.grad, b.grad)
    assert set(mine.state_dict()) == set(theirs.state_dict()) - {"num_batches_tracked"}
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("mapped", [False, True])
def test_batch_norm_of_one_value_is_refused_in_training(mapped: bool) -> None:
    layer, x = BatchNorm(5), torch.randn(1, 5)
    with pytest.raises(
        ValueError, match=r"more than one value a channel in training, got \(1, 5\); use a larger"
    ):
        torch.func.vmap(layer)(x.unsqueeze(0)) if mapped else layer(x)
    layer.eval()(x)


def test_stateless_dropout_is_a_function_of_key_layer_and_position() -> None:
    layer = make_stateless(nn.Sequential(Dropout(0.3)))[0].train()
    x = torch.ones(1000, 100)
    layer.noise_key.fill_(7)
    first = layer(x)
    torch.manual_seed(99)
    assert torch.equal(layer(x), first)  # the global generator has no part in it
    layer.noise_key.fill_(8)
    assert not torch.equal(layer(x), first)
    assert float((first == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    torch.testing.assert_close(first[first != 0], torch.full_like(first[first != 0], 1 / 0.7))
    assert torch.equal(layer.eval()(x), x)


def test_dropout_zero_changes_nothing_bit_for_bit() -> None:
    layer = make_stateless(nn.Sequential(Dropout(0.0)))[0].train()
    x = torch.randn(50, 50)
    assert torch.equal(layer(x), x)


def test_hash_bits_are_uniform_and_unrelated_between_layers_and_keys() -> None:
    """Chi-square over 256 buckets, and correlations between streams, of a million draws each."""
    count = 1_000_000
    streams = [
        hash_bits(torch.tensor(stream_key(key, layer), dtype=torch.int32), count, torch.device("cpu"))
        for key, layer in ((0, 0), (1, 0), (0, 1), (-5, 3))
    ]
    for bits in streams:
        assert int(bits.min()) >= 0
        assert int(bits.max()) < 2**16
        for shift in (0, 8):
            counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
            chi2 = float(((counts - count / 256) ** 2 / (count / 256)).sum())
            assert 170 < chi2 < 350  # 255 degrees of freedom: mean 255, standard deviation 22.6
    units = torch.stack(streams).double() / 2**16 - 0.5
    correlation = (units @ units.T) / count * 12
    off_diagonal = correlation - torch.diag(torch.diag(correlation))
    assert float(off_diagonal.abs().max()) < 0.005
    lagged = (units[:, 1:] * units[:, :-1]).mean(dim=1) * 12
    assert float(lagged.abs().max()) < 0.005


def test_make_stateless_swaps_torch_dropout_and_numbers_every_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25), nn.Sequential(Dropout(0.5), nn.Dropout(0.75)))
    make_stateless(model)
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert [float(layer.dropout) for layer in layers] == [0.25, 0.5, 0.75]
    assert set(model.state_dict()) == {"0.weight", "0.bias"}  # hyperparameters are no weights


@pytest.mark.parametrize("scheme", ["default", "kaiming", "xavier", "orthogonal"])
def test_init_weights(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), BatchNorm(300))
    before = model[0].weight.clone()
    init_weights(model, scheme)
    weight = model[0].weight.detach()
    assert torch.equal(model[1].weight.detach(), torch.ones(300))
    expected_std = {
        "default": float(before.detach().std()),
        "kaiming": (2 / 400) ** 0.5,
        "xavier": (2 / 700) ** 0.5,
        "orthogonal": (2 / 400) ** 0.5,
    }[scheme]
    assert float(weight.std()) == pytest.approx(expected_std, rel=0.03)
    assert (scheme == "default") == bool(model[0].bias.abs().sum() > 0)
    if scheme == "orthogonal":
        torch.testing.assert_close(weight @ weight.T / 2, torch.eye(300), atol=1e-4, rtol=0)


def test_init_weights_refuses_an_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="init must be default, kaiming, xavier, orthogonal, got 'he'"):
        init_weights(nn.Linear(2, 2), "he")


def test_mlp_shapes_and_names() -> None:
    model = MLP((2, 3), 4, hidden_sizes=(5, 6), batch_norm=True, dropout=0.1)
    assert model(torch.randn(7, 2, 3)).shape == (7, 4)
    assert "layers.1.bias" not in model.state_dict()  # no bias before a batch norm
    assert MLP((6,), 4, depth=3, width=8)(torch.randn(7, 6)).shape == (7, 4)
    assert [m.out_features for m in MLP((6,), 4, depth=3, width=8).modules() if isinstance(m, nn.Linear)] == [
        8,
        8,
        8,
        4,
    ]
    assert sum(isinstance(m, nn.Linear) for m in MLP((6,), 4, hidden_sizes=()).modules()) == 1
    with pytest.raises(ValueError, match="hidden_sizes, or depth and width, not both"):
        MLP((6,), 4, hidden_sizes=(3,), depth=2)


def test_mlp_maps_over_members() -> None:
    """Stacked parameters and buffers under vmap of a gradient = each member alone, running statistics too."""
    torch.manual_seed(0)
    models = [
        make_stateless(MLP((6,), 3, hidden_sizes=(8,), batch_norm=True)).double().train() for _ in range(3)
    ]
    for i, model in enumerate(models):
        for name, buffer in model.named_buffers():
            if name.endswith("noise_key"):
                buffer.fill_(10 + i)
            if name.endswith(".dropout"):
                buffer.fill_(0.2 * i)
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,))
    params = {
        n: torch.stack([dict(m.named_parameters())[n].detach() for m in models])
        for n, _ in models[0].named_parameters()
    }
    buffers = {
        n: torch.stack([dict(m.named_buffers())[n] for m in models]) for n, _ in models[0].named_buffers()
    }

    def loss(p: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> torch.Tensor:
        out = torch.func.functional_call(models[0], (p, b), x)
        return -out.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()

    grads, losses = torch.func.vmap(torch.func.grad_and_value(loss))(params, buffers)
    for i, model in enumerate(models):
        value = -model(x).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
        value.backward()
        torch.testing.assert_close(losses[i], value.detach(), rtol=0, atol=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name][i], parameter.grad, rtol=0, atol=1e-12)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer, rtol=0, atol=1e-12)
