"""Plain modules that can be vmapped; they import torch only and are usable without the rest."""

from hpt_torch.models.mlp import MLP

__all__ = ["MLP"]
