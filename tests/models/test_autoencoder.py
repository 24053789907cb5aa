"""`Autoencoder`: shapes, mirrored layers, what it can and cannot reconstruct."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from test_linear import assert_mapped_equals_alone
from torch import nn

from hpt_torch.models import Autoencoder
from hpt_torch.models.layers import BatchNorm, Dropout


@pytest.mark.parametrize("input_shape", [(12,), (3, 8), (1, 6, 5)])
@pytest.mark.parametrize("hidden_sizes", [(), (10,), (16, 8)])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("output_activation", ["none", "sigmoid"])
def test_shapes(
    input_shape: Sequence[int], hidden_sizes: Sequence[int], batch_norm: bool, output_activation: str
) -> None:
    model = Autoencoder(
        input_shape,
        latent_dim=3,
        hidden_sizes=hidden_sizes,
        batch_norm=batch_norm,
        dropout=0.1,
        output_activation=output_activation,
    ).eval()
    x = torch.randn(4, *input_shape)
    code = model.encode(x)
    assert code.shape == (4, 3)
    assert model(x).shape == x.shape
    torch.testing.assert_close(model(x), model.decode(code))


def test_the_decoder_mirrors_the_encoder() -> None:
    model = Autoencoder((20,), latent_dim=2, hidden_sizes=(16, 8), batch_norm=True)
    shapes = [
        [(m.in_features, m.out_features, m.bias is not None) for m in half if isinstance(m, nn.Linear)]
        for half in (model.encoder, model.decoder)
    ]
    # no bias before a batch norm
    assert shapes[0] == [(20, 16, False), (16, 8, False), (8, 2, True)]
    assert shapes[1] == [(2, 8, False), (8, 16, False), (16, 20, True)]
    assert sum(isinstance(m, BatchNorm) for m in model.modules()) == 4
    assert sum(isinstance(m, Dropout) for m in model.modules()) == 4
    assert isinstance(model.encoder[-1], nn.Linear), "the code is not bounded by an activation"


def test_sigmoid_bounds_the_output() -> None:
    x = torch.randn(50, 6)
    bounded = Autoencoder((6,), hidden_sizes=(), latent_dim=2, output_activation="sigmoid")
    free = Autoencoder((6,), hidden_sizes=(), latent_dim=2)
    free.load_state_dict(bounded.state_dict())
    torch.testing.assert_close(bounded(x), torch.sigmoid(free(x)))


def test_a_linear_one_learns_the_principal_components() -> None:
    """Eckart and Young: no rank-k map has a smaller squared error than the first k components."""
    torch.manual_seed(0)
    x = torch.randn(300, 8, dtype=torch.float64) @ torch.diag(torch.linspace(3, 0.3, 8).double())
    x = x - x.mean(0)
    best = torch.linalg.svdvals(x)[3:].square().sum() / x.numel()
    model = Autoencoder((8,), latent_dim=3, hidden_sizes=()).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1000, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = F.mse_loss(model(x), x)
        value.backward()
        return value  # type: ignore[return-value]

    optimizer.step(closure)
    torch.testing.assert_close(F.mse_loss(model(x), x).detach(), best, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"latent_dim": 0}, r"latent_dim must be at least 1, got 0"),
        ({"hidden_sizes": (8, 0)}, r"hidden_sizes must be at least 1, got \(8, 0\)"),
        ({"output_activation": "softmax"}, r"output_activation must be none or sigmoid, got 'softmax'"),
        ({"activation": "selu"}, r"activation must be relu, .* or sigmoid, got 'selu'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_hyperparameters_are_refused(hparams: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder((6,), **hparams)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mapped_members_train_as_each_alone(batch_norm: bool) -> None:
    assert_mapped_equals_alone(
        lambda: Autoencoder(
            (2, 5), latent_dim=3, hidden_sizes=(8, 6), dropout=0.1, batch_norm=batch_norm, activation="tanh"
        ),
        [torch.randn(16, 2, 5, dtype=torch.float64)],
    )


def test_dynamic_hyperparameters_are_buffers() -> None:
    model = Autoencoder((6,), batch_norm=True)
    leaves = {name.split(".")[-1] for name, _ in model.named_buffers()}
    assert leaves >= Autoencoder.dynamic_hparams == {"dropout", "batch_norm_momentum"}
