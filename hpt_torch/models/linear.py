"""Linear and logistic regression."""

# B batch, C outputs

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpt_torch.models.layers import check_positive, init_weights


class Linear(nn.Module):
    """(B, *input_shape) -> (B, out_features), an affine map of the flattened input.

    With a squared loss this is linear regression, with a cross-entropy logistic regression. `init` may also
    be "zeros": the problem is convex, and from zeros every trial starts alike.
    """

    dynamic_hparams = frozenset[str]()

    def __init__(
        self, input_shape: Sequence[int], out_features: int, *, bias: bool = True, init: str = "default"
    ) -> None:
        super().__init__()
        check_positive(input_shape=tuple(input_shape), out_features=out_features)
        self.linear = nn.Linear(math.prod(input_shape), out_features, bias=bias)
        if init == "zeros":
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.zero_()
        else:
            init_weights(self, init)

    def forward(self, inputs: Tensor) -> Tensor:
        logits_BC: Tensor = self.linear(inputs.flatten(1))
        return logits_BC
