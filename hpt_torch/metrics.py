"""Metrics as sums over batches, finished once: so that they add up over batches and members alike."""

# B batch, C classes

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BC: Tensor, targets_B: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """Mean cross-entropy, shape (). As ``F.cross_entropy``, whose label_smoothing takes no tensor."""
    log_probs_BC = F.log_softmax(logits_BC, dim=-1)
    nll = -log_probs_BC.gather(-1, targets_B.unsqueeze(-1)).mean()
    return (1 - label_smoothing) * nll - label_smoothing * log_probs_BC.mean()


def classification_sums(logits_BC: Tensor, targets_B: Tensor) -> dict[str, Tensor]:
    """rows, summed cross-entropy and correct answers, each of shape ()."""
    losses_B = F.cross_entropy(logits_BC, targets_B, reduction="none")
    return {
        "rows": torch.full((), len(targets_B), dtype=torch.float64, device=logits_BC.device),
        "loss": losses_B.double().sum(),
        "correct": (logits_BC.argmax(dim=-1) == targets_B).double().sum(),
    }


def classification_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    rows = float(sums["rows"])
    return {"loss": float(sums["loss"]) / rows, "accuracy": float(sums["correct"]) / rows}
