"""The multilayer perceptron."""

# B batch, F features, C outputs

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from hpt_torch.models.layers import ACTIVATIONS, BatchNorm, Dropout, init_weights


class MLP(nn.Module):
    """(B, *input_shape) -> (B, out_features).

    Each hidden layer is linear, batch norm (optional), activation, dropout. The layers are `hidden_sizes`,
    or `depth` layers of `width` units. A linear layer before a batch norm has no bias: its gradient would be
    rounding noise, which Adam turns into full steps.
    """

    dynamic_hparams = frozenset({"dropout", "batch_norm_momentum"})

    def __init__(
        self,
        input_shape: Sequence[int],
        out_features: int,
        *,
        hidden_sizes: Sequence[int] | None = None,
        depth: int | None = None,
        width: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        batch_norm_momentum: float = 0.1,
        init: str = "default",
    ) -> None:
        super().__init__()
        if hidden_sizes is not None and (depth is not None or width is not None):
            raise ValueError("give hidden_sizes, or depth and width, not both")
        if hidden_sizes is None:
            hidden_sizes = (64 if width is None else width,) * (2 if depth is None else depth)
        layers: list[nn.Module] = [nn.Flatten()]
        features = math.prod(input_shape)
        for size in hidden_sizes:
            layers.append(nn.Linear(features, size, bias=not batch_norm))
            if batch_norm:
                layers.append(BatchNorm(size, batch_norm_momentum))
            layers += [ACTIVATIONS[activation](), Dropout(dropout)]
            features = size
        layers.append(nn.Linear(features, out_features))
        self.layers = nn.Sequential(*layers)
        init_weights(self, init)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y
