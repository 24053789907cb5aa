"""The GRU's and the tanh RNN's recurrence with a backward pass of its own, for the CPU.

torch's CPU kernels are a dozen autograd nodes a step, each adding to the weights' gradient. Here the
backward is one loop over the steps for the hidden state, and one matmul over all steps for the weights. Same
formulas, same results up to rounding; torch's LSTM (oneDNN) and cuDNN are as good or better and stay.
"""

# T steps, B batch, H hidden units, G gates * H

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class GRULayer(torch.autograd.Function):
    """(x_TBG, weight_hh (3H, H), bias_hh (3H,)) -> (T, B, H) from a zero state.

    x_TBG: the projected inputs ``x @ weight_ih.T + bias_ih`` of the gates reset, update, new (torch's order).
    """

    @staticmethod
    def forward(ctx: Any, x_TBG: Tensor, weight_hh: Tensor, bias_hh: Tensor) -> Tensor:
        steps, batch, _ = x_TBG.shape
        size = weight_hh.shape[1]
        h_TBH = x_TBG.new_zeros(steps + 1, batch, size)  # state 0, then the state after each step
        gates_TBG = x_TBG.new_empty(steps, batch, 2 * size)
        new_TBH = x_TBG.new_empty(steps, batch, size)
        hidden_TBG = torch.empty_like(x_TBG)  # the projected state of the step before
        weight_t = weight_hh.t()
        for t in range(steps):
            hidden = torch.addmm(bias_hh, h_TBH[t], weight_t, out=hidden_TBG[t])
            torch.add(x_TBG[t, :, : 2 * size], hidden[:, : 2 * size], out=gates_TBG[t])
            reset, update = gates_TBG[t].sigmoid_().chunk(2, 1)
            torch.addcmul(x_TBG[t, :, 2 * size :], reset, hidden[:, 2 * size :], out=new_TBH[t])
            torch.lerp(new_TBH[t].tanh_(), h_TBH[t], update, out=h_TBH[t + 1])
        ctx.save_for_backward(weight_hh, h_TBH, gates_TBG, new_TBH, hidden_TBG)
        return h_TBH[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight_hh, h_TBH, gates_TBG, new_TBH, hidden_TBG = ctx.saved_tensors
        steps, batch, size = new_TBH.shape
        reset_TBH, update_TBH = gates_TBG.chunk(2, 2)
        # Every gate's gradient is that of the state times something which is known for all steps at once: of
        # the new state by x, of reset, of update, of the new state by h. The first three are what x gets, the
        # last three, in torch's order, what h gets.
        factor_TB4H = new_TBH.new_empty(steps, batch, 4, size)
        by_new, by_reset, by_update, by_hidden_new = factor_TB4H.unbind(2)
        torch.mul(1 - update_TBH, 1 - new_TBH.square(), out=by_new)
        torch.mul(by_new, reset_TBH, out=by_hidden_new)
        torch.mul(by_hidden_new, hidden_TBG[..., 2 * size :] * (1 - reset_TBH), out=by_reset)
        torch.mul(h_TBH[:-1] - new_TBH, update_TBH * (1 - update_TBH), out=by_update)
        grads_TB4H = torch.empty_like(factor_TB4H)
        grads_TBG = grads_TB4H.flatten(2)
        state = torch.zeros_like(new_TBH[0])
        for t in range(steps - 1, -1, -1):
            state += grad_TBH[t]
            torch.mul(state.unsqueeze(1), factor_TB4H[t], out=grads_TB4H[t])
            state = (state * update_TBH[t]).addmm_(grads_TBG[t, :, size:], weight_hh)
        by_x_TBG = torch.cat((grads_TBG[..., size : 3 * size], grads_TBG[..., :size]), 2)
        flat = grads_TBG.flatten(0, 1)[:, size:]
        return by_x_TBG, flat.t() @ h_TBH[:-1].reshape(steps * batch, size), flat.sum(0)


class TanhLayer(torch.autograd.Function):
    """(x_TBH, weight_hh (H, H)) -> (T, B, H) from a zero state: ``h = tanh(x + h @ weight_hh.T)``."""

    @staticmethod
    def forward(ctx: Any, x_TBH: Tensor, weight_hh: Tensor) -> Tensor:
        steps, batch, size = x_TBH.shape
        h_TBH = x_TBH.new_zeros(steps + 1, batch, size)
        weight_t = weight_hh.t()
        for t in range(steps):
            torch.addmm(x_TBH[t], h_TBH[t], weight_t, out=h_TBH[t + 1])
            h_TBH[t + 1].tanh_()
        ctx.save_for_backward(weight_hh, h_TBH)
        return h_TBH[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TBH: Tensor) -> tuple[Tensor, Tensor]:
        weight_hh, h_TBH = ctx.saved_tensors
        steps, batch, size = grad_TBH.shape
        slope_TBH = 1 - h_TBH[1:].square()
        by_x_TBH = torch.empty_like(slope_TBH)
        state = torch.zeros_like(slope_TBH[0])
        for t in range(steps - 1, -1, -1):
            torch.mul(grad_TBH[t] + state, slope_TBH[t], out=by_x_TBH[t])
            state = by_x_TBH[t] @ weight_hh
        flat = by_x_TBH.view(steps * batch, size)
        return by_x_TBH, flat.t() @ h_TBH[:-1].reshape(steps * batch, size)
