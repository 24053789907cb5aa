"""Plain modules that can be vmapped; they import torch only and are usable without the rest."""

from hpt_torch.models.autoencoder import Autoencoder
from hpt_torch.models.cnn import CNN
from hpt_torch.models.linear import Linear
from hpt_torch.models.mlp import MLP
from hpt_torch.models.rnn import RNN

__all__ = ["CNN", "MLP", "RNN", "Autoencoder", "Linear"]
