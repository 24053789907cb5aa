"""The autoencoder of dense layers."""

# B batch, F input features (flattened), L latent features

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from hpt_torch.models.layers import check_choice, check_positive, dense, init_weights


class Autoencoder(nn.Module):
    """(B, *input_shape) -> (B, *input_shape), through `latent_dim` numbers a row.

    The encoder's hidden layers are `hidden_sizes`, the decoder's the same backwards. The latent code is
    linear, so it is not bounded by an activation. `output_activation` "sigmoid" fits inputs in [0, 1].
    """

    dynamic_hparams = frozenset({"dropout", "batch_norm_momentum"})

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        latent_dim: int = 16,
        hidden_sizes: Sequence[int] = (128,),
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        batch_norm_momentum: float = 0.1,
        output_activation: str = "none",
        init: str = "default",
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        check_positive(input_shape=self.input_shape, latent_dim=latent_dim, hidden_sizes=tuple(hidden_sizes))
        check_choice("output_activation", output_activation, ("none", "sigmoid"))

        def stack(sizes: Sequence[int]) -> nn.Sequential:
            layers: list[nn.Module] = []
            for features, size in pairwise(sizes[:-1]):
                layers += dense(
                    features,
                    size,
                    activation=activation,
                    batch_norm=batch_norm,
                    batch_norm_momentum=batch_norm_momentum,
                    dropout=dropout,
                )
            return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

        sizes = [math.prod(self.input_shape), *hidden_sizes, latent_dim]
        self.encoder = stack(sizes)
        self.decoder = stack(sizes[::-1])
        if output_activation == "sigmoid":
            self.decoder.append(nn.Sigmoid())
        init_weights(self, init)

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, latent_dim)."""
        code_BL: Tensor = self.encoder(inputs.flatten(1))
        return code_BL

    def decode(self, code_BL: Tensor) -> Tensor:
        """(B, latent_dim) -> (B, *input_shape)."""
        outputs_BF: Tensor = self.decoder(code_BL)
        return outputs_BF.view(-1, *self.input_shape)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decode(self.encode(inputs))
