"""Losses, and metrics as sums over batches, finished once: sums add up over batches and members alike.

A key that begins with ``each_`` is not a sum: its rows are put one after another (ROC-AUC needs them all).
"""

# B rows (and any further positions), C classes, D values to predict

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpt_torch.models.layers import constant

CLASSIFICATION = ("accuracy", "top5", "f1", "precision", "recall", "roc_auc")
REGRESSION = ("mse", "mae", "r2")
_FROM_CONFUSION = frozenset({"f1", "precision", "recall"})
MAXIMIZED = frozenset({*CLASSIFICATION, "r2"})


class _Transposed(torch.autograd.Function):
    """(B, C) -> (C, B), both in memory of that order, the gradient too: in another order vmap would multiply
    matrices of all members as one, which rounds differently for different numbers of members."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BC: Tensor) -> Tensor:
        return x_BC.transpose(0, 1).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].transpose(0, 1).contiguous()


# -- losses --------------------------------------------------------------------------------------------


def cross_entropy(
    logits_BC: Tensor,
    targets_B: Tensor,
    label_smoothing: Tensor | float = 0.0,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy, shape (). As ``F.cross_entropy``, whose label_smoothing takes no tensor."""
    logits_BC, targets_B = _rows(logits_BC, targets_B)
    known = constant(label_smoothing)
    if known is not None:
        return F.cross_entropy(logits_BC, targets_B, class_weights_C, label_smoothing=known)
    log_probs_CB, nll_B = _log_probs(logits_BC, targets_B)
    classes = logits_BC.shape[-1]
    if class_weights_C is None:
        return (1 - label_smoothing) * nll_B.mean() - label_smoothing * log_probs_CB.mean()
    weights_B = class_weights_C[targets_B]
    smooth_B = -(log_probs_CB * class_weights_C.unsqueeze(1)).sum(0)
    total = weights_B.sum()
    nll = (nll_B * weights_B).sum() / total
    return (1 - label_smoothing) * nll + label_smoothing / classes * smooth_B.sum() / total


def aligned(targets: Tensor, output: Tensor) -> Tensor:
    """The targets in the shape of the output: they may differ in dimensions of 1, and either may have all
    but the first dimension flattened. Raises ValueError where that does not tell which belongs to which."""
    if _beyond_one(targets.shape) != _beyond_one(output.shape):
        flattened = min(targets.dim(), output.dim()) <= 2 and targets.shape[:1] == output.shape[:1]
        if not flattened or targets.numel() != output.numel():
            raise ValueError(_unlike(output.shape, targets.shape, "it must return the shape of the targets"))
    return targets.reshape(output.shape)


def _beyond_one(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _unlike(output: Sequence[int], targets: Sequence[int], rule: str) -> str:
    return f"the model returns {tuple(output)} for targets {tuple(targets)}: {rule}"


def _rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(logits (B, C), targets (B,)) of logits and targets of any leading dimensions, which must be equal."""
    if _beyond_one(logits.shape[:-1]) != _beyond_one(targets.shape):
        rule = "it must return a number for each class, classes last"
        raise ValueError(_unlike(logits.shape, targets.shape, rule))
    return logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)


def _log_probs(logits_BC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities (C, B), the targets' negative ones (B,)). Classes first: over a short last dimension
    the CPU's log_softmax runs at a tenth of its speed."""
    log_probs_CB = F.log_softmax(_Transposed.apply(logits_BC), dim=0)
    return log_probs_CB, -log_probs_CB.gather(0, targets_B.unsqueeze(0)).squeeze(0)


def binary_cross_entropy(
    logits_BC: Tensor,
    targets_B: Tensor,
    label_smoothing: Tensor | float = 0.0,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """Mean over rows of the summed binary cross-entropy of the C yes-or-no questions, shape ()."""
    logits_BC, targets_B = _rows(logits_BC, targets_B)
    yes_BC = F.one_hot(targets_B, logits_BC.shape[-1]).to(logits_BC.dtype)
    yes_BC = yes_BC * (1 - label_smoothing) + label_smoothing / 2
    losses_B = F.binary_cross_entropy_with_logits(logits_BC, yes_BC, reduction="none").sum(-1)
    if class_weights_C is None:
        return losses_B.mean()
    # A row counts as its class does: a weight a question would leave each question's optimum where it is.
    weights_B = class_weights_C[targets_B]
    return (losses_B * weights_B).sum() / weights_B.sum()


def regression_loss(
    name: str, predicted: Tensor, targets: Tensor, huber_delta: Tensor | float = 1.0
) -> Tensor:
    """Mean squared, absolute or Huber error over all values, shape (). `huber_delta` may be a tensor."""
    error = predicted - targets
    if name == "mse":
        return error.square().mean()
    size = error.abs()
    if name == "mae":
        return size.mean()
    near = 0.5 * error.square()
    return torch.where(size <= huber_delta, near, huber_delta * (size - 0.5 * huber_delta)).mean()


# -- classification ------------------------------------------------------------------------------------


def classification_sums(logits_BC: Tensor, targets_B: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """rows, summed cross-entropy, correct answers, and what the named metrics need beyond them."""
    wanted, classes = frozenset(names), logits_BC.shape[-1]
    logits_BC, targets_B = _rows(logits_BC, targets_B)
    _, losses_B = _log_probs(logits_BC, targets_B)
    guesses_B = logits_BC.argmax(dim=-1)
    sums = {
        "rows": torch.full((), len(targets_B), dtype=torch.float64, device=logits_BC.device),
        "loss": losses_B.double().sum(),
        "correct": (guesses_B == targets_B).double().sum(),
    }
    if "top5" in wanted:
        best_B5 = logits_BC.topk(min(5, classes), dim=-1).indices
        sums["top5"] = (best_B5 == targets_B.unsqueeze(-1)).any(-1).double().sum()
    if wanted & _FROM_CONFUSION:
        # As a product of one-hot rows: bincount cannot be mapped over members.
        true_BC, guess_BC = (F.one_hot(t, classes).double() for t in (targets_B, guesses_B))
        sums["confusion"] = true_BC.T @ guess_BC
    if "roc_auc" in wanted:
        sums["each_probability"] = logits_BC.double().softmax(-1)
        sums["each_target"] = targets_B
    return sums


def classification_metrics(sums: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """The named metrics, equal to scikit-learn's (macro averages; one against the rest for ROC-AUC)."""
    rows = float(sums["rows"])
    values = {"loss": float(sums["loss"]) / rows}
    for name in names:
        if name == "accuracy":
            values[name] = float(sums["correct"]) / rows
        elif name == "top5":
            values[name] = float(sums["top5"]) / rows
        elif name == "roc_auc":
            area = roc_auc(sums["each_probability"], sums["each_target"])
            if not math.isnan(area):  # of train's sample: valid and hold-out have every class
                values[name] = area
        else:
            values[name] = _macro(name, sums["confusion"])
    return values


def _macro(name: str, confusion_CC: Tensor) -> float:
    """Mean over the classes that occur as target or guess; a class never guessed has precision 0."""
    hits_C, true_C, guessed_C = confusion_CC.diagonal(), confusion_CC.sum(1), confusion_CC.sum(0)
    precision_C = hits_C / guessed_C.clamp(min=1)
    recall_C = hits_C / true_C.clamp(min=1)
    f1_C = 2 * hits_C / (true_C + guessed_C).clamp(min=1)
    seen_C = (true_C + guessed_C) > 0
    values_C = {"precision": precision_C, "recall": recall_C, "f1": f1_C}[name]
    return float(values_C[seen_C].mean())


def roc_auc(probability_BC: Tensor, targets_B: Tensor) -> float:
    """Area under the ROC curve, by ranks (Mann-Whitney, ties count half); the mean over one-against-rest
    questions for more than two classes. NaN where a class does not occur, as it has no curve."""
    classes = probability_BC.shape[-1]
    areas = []
    for positive in [1] if classes == 2 else range(classes):
        scores_B, is_B = probability_BC[:, positive], targets_B == positive
        n, m = int(is_B.sum()), int((~is_B).sum())
        if n == 0 or m == 0:
            return float("nan")
        _, inverse, counts = torch.unique(scores_B, return_inverse=True, return_counts=True)
        middle = counts.cumsum(0).double() - (counts.double() - 1) / 2
        areas.append((float(middle[inverse][is_B].sum()) - n * (n + 1) / 2) / (n * m))
    return sum(areas) / len(areas)


# -- regression ----------------------------------------------------------------------------------------


def regression_sums(predicted_BD: Tensor, targets_BD: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """rows; for each of the D values the summed errors and the targets' moments. loss: the batch's mean."""
    rows = len(targets_BD)
    predicted_BD, targets_BD = (t.double().reshape(rows, -1) for t in (predicted_BD, targets_BD))
    error_BD = predicted_BD - targets_BD
    return {
        "rows": torch.full((), rows, dtype=torch.float64, device=targets_BD.device),
        "loss": loss.double() * rows,
        "squared": error_BD.square().sum(0),
        "absolute": error_BD.abs().sum(0),
        "target": targets_BD.sum(0),
        "target_squared": targets_BD.square().sum(0),
    }


def regression_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """loss, mse, mae and R² (mean over the D values), equal to scikit-learn's."""
    rows = float(sums["rows"])
    spread_D = sums["target_squared"] - sums["target"].square() / rows
    # What rounding leaves of targets that are all the same is no spread.
    varies_D = spread_D > 8 * torch.finfo(torch.float64).eps * sums["target_squared"]
    r2_D = torch.where(
        varies_D, 1 - sums["squared"] / spread_D.clamp(min=1e-300), (sums["squared"] == 0).double()
    )
    return {
        "loss": float(sums["loss"]) / rows,
        "mse": float(sums["squared"].mean()) / rows,
        "mae": float(sums["absolute"].mean()) / rows,
        "r2": float(r2_D.mean()),
    }
