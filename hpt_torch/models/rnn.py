"""Recurrent networks over sequences of any length."""

# B batch, T steps, F features of a step, H hidden units, G gates, D directions, C outputs

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpt_torch.models.layers import Dropout, check_choice, check_positive, init_weights
from hpt_torch.models.noise import inside_transform
from hpt_torch.models.recurrent_kernels import GRULayer, TanhLayer

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


class RNN(nn.Module):
    """(B, T, F), or (B, T) of tokens below `vocabulary`, -> (B, out_features), or (B, T, out_features).

    `lengths`, shape (B,), says how many steps of each row are valid; what stands behind them changes nothing,
    also where it is NaN. `readout` is what the linear head sees of the last layer: its "last" state (of the
    reverse direction: the one after the first step, as ``nn.GRU``'s h_n), the "mean" of the valid steps, or
    "all" steps (zeros behind a row's length). `dropout` acts between layers. Tokens are embedded in
    `embedding_size` numbers, by default `hidden_size`.

    `native` chooses between two equal implementations of the recurrence: kernels (True: torch's own, or
    those of `recurrent_kernels`) and a loop of matmuls that torch.func can map over stacked parameters
    (False). None takes the kernels, and the loop inside a transform of torch.func.
    """

    dynamic_hparams = frozenset({"dropout"})

    def __init__(
        self,
        input_shape: Sequence[int],
        out_features: int,
        *,
        cell: str = "gru",
        hidden_size: int = 64,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        readout: str = "last",
        embedding_size: int | None = None,
        vocabulary: int | None = None,
        init: str = "default",
    ) -> None:
        super().__init__()
        input_shape = tuple(input_shape)
        check_choice("cell", cell, GATES)
        check_choice("readout", readout, ("last", "mean", "all"))
        check_positive(
            input_shape=input_shape,
            out_features=out_features,
            hidden_size=hidden_size,
            num_layers=num_layers,
        )
        self.embedding: nn.Embedding | None = None
        if vocabulary is None:
            if embedding_size is not None:
                raise ValueError(
                    f"embedding_size embeds tokens, got {embedding_size} without a vocabulary; set vocabulary"
                )
            if len(input_shape) != 2:
                raise ValueError(
                    f"input_shape must be (steps, features), got {input_shape};"
                    " use (steps, 1) for one number a step, or set vocabulary for tokens"
                )
            features = input_shape[1]
        else:
            if len(input_shape) != 1:
                raise ValueError(
                    f"with a vocabulary, input_shape must be (steps,), got {input_shape};"
                    " leave vocabulary out for real numbers"
                )
            features = hidden_size if embedding_size is None else embedding_size
            check_positive(vocabulary=vocabulary, embedding_size=features)
            self.embedding = nn.Embedding(vocabulary, features)
        self.recurrent = Recurrent(cell, features, hidden_size, num_layers, bidirectional, dropout)
        self.head = nn.Linear(hidden_size * (2 if bidirectional else 1), out_features)
        self.readout = readout
        self.native: bool | None = None
        init_weights(self, init)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        x_TB = inputs.transpose(0, 1)
        valid_TB1 = None
        if lengths is not None:
            valid_TB1 = (_steps(x_TB) < lengths).unsqueeze(-1)
            # Zeroed here and not only after the recurrence: a NaN in the padding would reach the gradients.
            x_TB = torch.where(valid_TB1 if inputs.dim() == 3 else valid_TB1.squeeze(-1), x_TB, 0)
        x_TBF = x_TB if self.embedding is None else self.embedding(x_TB)
        native = not inside_transform() if self.native is None else self.native
        y_TBH: Tensor = self.recurrent(x_TBF, lengths, native)
        if valid_TB1 is not None:
            y_TBH = torch.where(valid_TB1, y_TBH, 0)
        out: Tensor = self.head(self._read(y_TBH, lengths))
        return out

    def _read(self, y_TBH: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, H), or (B, T, H) for "all". A row of length 0 reads zeros."""
        if self.readout == "all":
            return y_TBH.transpose(0, 1)
        if self.readout == "mean":
            if lengths is None:
                return y_TBH.mean(0)
            return y_TBH.sum(0) / lengths.clamp(min=1).to(y_TBH.dtype).unsqueeze(-1)
        if lengths is None:
            last_BH = y_TBH[-1]
        else:
            index_1BH = (lengths - 1).clamp(min=0)[None, :, None].expand(1, -1, y_TBH.shape[2])
            last_BH = y_TBH.gather(0, index_1BH).squeeze(0)
        if not self.recurrent.bidirectional:
            return last_BH
        size = self.recurrent.hidden_size
        return torch.cat((last_BH[:, :size], y_TBH[0, :, size:]), -1)


class Recurrent(nn.Module):
    """(T, B, F) -> (T, B, D * H), with the parameters of ``nn.RNN`` / ``GRU`` / ``LSTM``.

    They are named, shaped, ordered and initialised alike, so that state dicts load both ways.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell, self.hidden_size, self.num_layers = cell, hidden_size, num_layers
        self.bidirectional = bidirectional
        rows = GATES[cell] * hidden_size
        bound = 1 / math.sqrt(hidden_size)
        for layer in range(num_layers):
            for end in self._ends(layer):
                for name, shape in {
                    "weight_ih": (rows, input_size),
                    "weight_hh": (rows, hidden_size),
                    "bias_ih": (rows,),
                    "bias_hh": (rows,),
                }.items():
                    parameter = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                    self.register_parameter(f"{name}_{end}", parameter)
            input_size = hidden_size * (2 if bidirectional else 1)
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in range(num_layers - 1))

    def _ends(self, layer: int) -> list[str]:
        """How the names of the layer's parameters end, by direction."""
        return [f"l{layer}", f"l{layer}_reverse"] if self.bidirectional else [f"l{layer}"]

    def forward(self, x_TBF: Tensor, lengths: Tensor | None, native: bool) -> Tensor:
        run = run_native if native else run_steps
        for layer in range(self.num_layers):
            if layer:
                x_TBF = self.dropouts[layer - 1](x_TBF)
            directions = []
            for end in self._ends(layer):
                weights = [
                    getattr(self, f"{name}_{end}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                if end.endswith("reverse"):
                    directions.append(reverse(run(self.cell, reverse(x_TBF, lengths), weights), lengths))
                else:
                    directions.append(run(self.cell, x_TBF, weights))
            x_TBF = torch.cat(directions, -1) if self.bidirectional else directions[0]
        return x_TBF

    def extra_repr(self) -> str:
        return (
            f"{self.cell}, hidden_size={self.hidden_size}, num_layers={self.num_layers},"
            f" bidirectional={self.bidirectional}"
        )


def run_native(cell: str, x_TBF: Tensor, weights: list[Tensor]) -> Tensor:
    """(T, B, F) -> (T, B, H), one layer in one direction from a zero state, in the fastest kernel."""
    if x_TBF.device.type == "cpu" and cell != "lstm" and not torch.is_autocast_enabled("cpu"):
        return _run_cpu(cell, x_TBF, weights)
    if cell == "lstm" and _lacks_lstm(x_TBF):
        return run_steps(cell, x_TBF, weights)
    if x_TBF.is_cuda:
        # cuDNN wants the weights in one piece, in this order; from anywhere else it copies them and warns.
        flat = torch.cat([weight.reshape(-1) for weight in weights])
        pieces = torch.split(flat, [weight.numel() for weight in weights])
        weights = [piece.view(weight.shape) for piece, weight in zip(pieces, weights, strict=True)]
    h_1BH = x_TBF.new_zeros(1, x_TBF.shape[1], weights[1].shape[1])
    # bias, one layer, no dropout, gradients wanted, one direction, time first
    options = (True, 1, 0.0, torch.is_grad_enabled(), False, False)
    y_TBH: Tensor
    if cell == "lstm":
        y_TBH, _, _ = torch._VF.lstm(x_TBF, [h_1BH, h_1BH], weights, *options)
    else:
        kernel = torch._VF.gru if cell == "gru" else torch._VF.rnn_tanh
        y_TBH, _ = kernel(x_TBF, h_1BH, weights, *options)
    return y_TBH


def _lacks_lstm(x: Tensor) -> bool:
    """Whether torch has no LSTM for x here: in bfloat16, oneDNN's needs AVX-512 and raises without it."""
    bfloat16 = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return bfloat16 and torch.backends.mkldnn.is_available() and not _has_bfloat16()  # type: ignore[no-untyped-call]


@functools.cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _run_cpu(cell: str, x_TBF: Tensor, weights: list[Tensor]) -> Tensor:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    steps, batch, _ = x_TBF.shape
    bias = bias_ih if cell == "gru" else bias_ih + bias_hh
    x_TBG = F.linear(x_TBF.reshape(steps * batch, -1), weight_ih, bias).view(steps, batch, -1)
    if cell == "gru":
        y_TBH: Tensor = GRULayer.apply(x_TBG, weight_hh, bias_hh)
    else:
        y_TBH = TanhLayer.apply(x_TBG, weight_hh)
    return y_TBH


def run_steps(cell: str, x_TBF: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """As `run_native`, as a loop of matmuls, which torch.func can map."""
    return _unrolled(cell, x_TBF, weights)[0]


def _unrolled(
    cell: str, x_TBF: Tensor, weights: Sequence[Tensor], start: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """(states (T, B, H), the last state (B, H), of the LSTM also its last cell state). cell: of `GATES`, or
    rnn_relu. start: the first state, and cell state, instead of zeros.

    The inputs of all steps are projected in one matmul, with those biases that are merely added.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    steps, batch, _ = x_TBF.shape
    size = weight_hh.shape[1]
    if cell == "gru":  # the reset gate scales its new-gate's hidden bias, so that one stays out
        bias_n = bias_hh[2 * size :]
        bias_hh = F.pad(bias_hh[: 2 * size], (0, size))
    # Folded to two dimensions, which spares vmap a copy of the weights for each step.
    x_TBG = F.linear(x_TBF.reshape(steps * batch, -1), weight_ih, bias_ih + bias_hh).view(steps, batch, -1)
    h, c = start if len(start) == 2 else [*start, *start] or [x_TBG.new_zeros(batch, size)] * 2
    states = []
    # unbind, not indices: the gradient of each index would be a tensor of all steps.
    if cell in ("rnn", "rnn_relu"):
        activation = torch.tanh if cell == "rnn" else torch.relu
        for x in x_TBG.unbind(0):
            h = activation(x + F.linear(h, weight_hh))
            states.append(h)
    elif cell == "gru":
        x_gates, x_new = torch.split(x_TBG, [2 * size, size], -1)
        for xg, xn in zip(x_gates.unbind(0), x_new.unbind(0), strict=True):
            hg, hn = torch.split(F.linear(h, weight_hh), [2 * size, size], -1)
            reset, update = torch.sigmoid(xg + hg).chunk(2, -1)
            new = torch.tanh(xn + reset * (hn + bias_n))
            h = new + update * (h - new)
            states.append(h)
    else:
        for x in x_TBG.unbind(0):
            gates = x + F.linear(h, weight_hh)
            i, f, g, o = gates.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
    return (torch.stack(states), h, c) if cell == "lstm" else (torch.stack(states), h)


def run_layer(
    cell: str,
    x: Tensor,
    start: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """One layer of ``torch.gru``, ``torch.lstm`` and the like, with their arguments, as `run_steps` does it:
    (states (T, B, D * H), last states (D, B, H), ...). NotImplemented for an LSTM with projections."""
    each, starts = len(weights) // (2 if bidirectional else 1), start if cell == "lstm" else (start,)
    if each not in (2, 4) or layers != 1:
        return NotImplemented
    x_TBF = x.transpose(0, 1) if batch_first else x
    found = []
    for direction in range(2 if bidirectional else 1):
        mine = list(weights[direction * each : (direction + 1) * each])
        if not has_biases:
            mine += [mine[0].new_zeros(len(mine[0]))] * 2
        ahead = x_TBF.flip(0) if direction else x_TBF
        y, *last = _unrolled(cell, ahead, mine, [s[direction] for s in starts])
        found.append((y.flip(0) if direction else y, *last))
    y_TBH, *ends = zip(*found, strict=True)
    y = torch.cat(y_TBH, -1)
    return (y.transpose(0, 1) if batch_first else y, *(torch.stack(each) for each in ends))


def reverse(x_TBF: Tensor, lengths: Tensor | None) -> Tensor:
    """Each row backwards within its length; what stands behind it stays where it is. Its own inverse."""
    if lengths is None:
        return x_TBF.flip(0)
    t_T1 = _steps(x_TBF)
    index_TB = torch.where(t_T1 < lengths, lengths - 1 - t_T1, t_T1)
    return x_TBF.gather(0, index_TB.unsqueeze(-1).expand(-1, -1, x_TBF.shape[2]))


def _steps(x_TB: Tensor) -> Tensor:
    return torch.arange(x_TB.shape[0], device=x_TB.device).unsqueeze(-1)
