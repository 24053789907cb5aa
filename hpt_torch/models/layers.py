"""Layers whose hyperparameters are buffers, so that a training step can read them as tensors.

The convention: a buffer named as a hyperparameter (``dropout``, ``batch_norm_momentum``) *is* that
hyperparameter; trainers set it for each member before they train. Such buffers are not persistent: they
belong to a trial's hyperparameters, not to its weights.
"""

# B batch, C channels or features

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpt_torch.models.noise import hash_bits, inside_transform, stream_key
from hpt_torch.models.rates import Rate, number

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class Dropout(nn.Module):
    """Dropout with probability `dropout`, kept units scaled by 1 / (1 - dropout), as ``nn.Dropout``.

    Used on its own it draws from torch's generator. A trainer makes it *stateless* (`make_stateless`): the
    mask is then a hash of (noise_key, element index) and the member's own rate, so that it is the same for a
    member trained alone, in a group, or resumed, and no generator state has to be kept. `set_noise` gives
    each layer its key. Members share the key, as they share the order of the data: the hash is computed once
    for all of them, and trials are compared under the same noise.
    """

    dropout: Tensor
    noise_key: Tensor
    hparam: str | None = None  # the model's argument that is its rate; empty: none; None: as it is named

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.layer: int | None = None  # None: not stateless
        self.rate: float | None = None  # the rate where it is known to be the same for all: spares tensors
        self.register_buffer("dropout", torch.tensor(float(dropout)), persistent=False)
        self.register_buffer("noise_key", torch.tensor(0, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if self.layer is None:
            keep = torch.rand_like(x) >= self.dropout
            return x * (keep * (1.0 / (1.0 - self.dropout)))
        # Compared as floats, which hold 16 bits exactly, by clamping the difference of two whole numbers: on
        # the CPU a detour through bools costs more than all the rest.
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        bits = hash_bits(self.noise_key, x.numel(), x.device).view(x.shape).to(dtype)
        if self.rate is not None:
            mask = bits.ge_(int(self.rate * 2**16)).mul_(1.0 / (1.0 - self.rate))
        else:
            below = (self.dropout * 2**16).floor().to(dtype) - 1
            mask = (bits - below).clamp(0.0, 1.0) * (1.0 / (1.0 - self.dropout)).to(dtype)
        return x * mask.to(x.dtype)

    def extra_repr(self) -> str:
        return f"dropout={float(self.dropout):g}"


def stateless_layers(model: nn.Module) -> list[Dropout]:
    return [module for module in model.modules() if isinstance(module, Dropout) and module.layer is not None]


def set_noise(layers: Iterable[Dropout], key: int) -> None:
    """Gives every stateless layer its key of a step whose own key is `key` (32 bits)."""
    for module in layers:
        if module.layer is not None and module.rate != 0:
            module.noise_key.fill_(stream_key(key, module.layer))


def constant(value: Tensor | float) -> float | None:
    """The number, where reading it is free: of a plain tensor on the CPU, outside transforms; else None."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu" or torch.compiler.is_compiling() or inside_transform():
        return None
    return float(value)


def make_stateless(model: nn.Module, *, marked: bool = False) -> nn.Module:
    """Makes a `Dropout` of every ``nn.Dropout`` and numbers them. Changes and returns the model.

    The objects stay the same: a model may know them by other names as well, and may read their `p`. marked:
    rates that are hyperparameters are a `Rate`, the others are not; else they are the one called `dropout`.
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            p, inplace, training = module.p, module.inplace, module.training
            hparam = (p.argument if isinstance(p, Rate) else "") if marked else None
            module.__class__ = Dropout  # type: ignore[assignment]
            Dropout.__init__(module, min(number(p), 1 - 2**-24))  # type: ignore[arg-type]
            module.p, module.inplace = p, inplace
            vars(module)["hparam"] = hparam
            module.train(training)
    for layer, module in enumerate(m for m in model.modules() if isinstance(m, Dropout)):
        module.layer = layer
    return model


class _BatchNorm(torch.autograd.Function):
    """(y, batch mean, unbiased batch variance, mean, 1 / std) of x (B, C, ...), weight and bias (C,).

    Members of a vmap become further channels of one call of the kernel. (torch's own batching rule applies
    weight and bias outside of the kernel, member by member, forward and backward.)
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        mean, var = torch.zeros_like(weight), torch.zeros_like(weight)
        y, center, scale = torch.native_batch_norm(x, weight, bias, mean, var, True, 1.0, eps)
        return y, mean, var, center, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, *output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_BatchNormBackward.apply(grads[0], *ctx.saved_tensors, ctx.eps), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        members = info.batch_size
        stacked = [_members_first(t, d, members) for t, d in zip((x, weight, bias), in_dims[:3], strict=True)]
        y, *rest = _BatchNorm.apply(_to_channels(stacked[0]), *(t.flatten() for t in stacked[1:]), eps)
        return (_from_channels(y, members), *(t.view(members, -1) for t in rest)), (0,) * 5


class _BatchNormBackward(torch.autograd.Function):
    """The gradients of `_BatchNorm` by x, weight and bias."""

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, center: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
            grad, x, weight, None, None, center, scale, True, eps, [True, True, True]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("batch norm has no second derivative here")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        *tensors, eps = inputs
        members = info.batch_size
        stacked = [_members_first(t, d, members) for t, d in zip(tensors, in_dims[:-1], strict=True)]
        wide = [_to_channels(t) for t in stacked[:2]] + [t.flatten() for t in stacked[2:]]
        grad, *rest = _BatchNormBackward.apply(*wide, eps)
        return (_from_channels(grad, members), *(t.view(members, -1) for t in rest)), (0, 0, 0)


def _members_first(tensor: Tensor, dim: int | None, members: int) -> Tensor:
    return tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _to_channels(x_PBC: Tensor) -> Tensor:
    """(P, B, C, ...) -> (B, P * C, ...)"""
    return x_PBC.movedim(0, 1).flatten(1, 2)


def _from_channels(x: Tensor, members: int) -> Tensor:
    """(B, P * C, ...) -> (P, B, C, ...)"""
    return x.reshape(len(x), members, -1, *x.shape[2:]).movedim(1, 0)


class BatchNorm(nn.Module):
    """Batch normalisation over dimension 1, with `batch_norm_momentum` as a buffer.

    Parameters and running statistics are named and shaped as in ``nn.BatchNorm1d`` / ``2d``, and updated
    alike: ``running = (1 - momentum) * running + momentum * batch`` with the unbiased batch variance.
    """

    running_mean: Tensor
    running_var: Tensor
    batch_norm_momentum: Tensor

    def __init__(self, features: int, batch_norm_momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer(
            "batch_norm_momentum", torch.tensor(float(batch_norm_momentum)), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shape = (-1, *[1] * (x.dim() - 2))
            return torch.addcmul((self.bias - self.running_mean * scale).view(shape), x, scale.view(shape))
        if x.numel() == x.shape[1]:
            rule = "batch norm needs more than one value a channel in training"
            raise ValueError(
                f"{rule}, got {tuple(x.shape)}; use a larger batch_size or fewer accumulation_steps"
            )
        known = constant(self.batch_norm_momentum)
        if known is not None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, known, self.eps
            )
        # F.batch_norm takes no tensor as momentum. With momentum 1 it leaves the batch's own statistics in
        # two scratch tensors. (lerp_ has no batching rule: vmap would loop over the members.)
        y: Tensor
        y, mean, var = _BatchNorm.apply(x, self.weight, self.bias, self.eps)[:3]
        with torch.no_grad():
            momentum = self.batch_norm_momentum.to(mean.dtype)
            self.running_mean.mul_(1 - momentum).add_(momentum * mean)
            self.running_var.mul_(1 - momentum).add_(momentum * var)
        return y


@torch.no_grad()
def init_weights(model: nn.Module, scheme: str) -> None:
    """`default` leaves torch's own; the others fill every weight of two or more dimensions, biases with 0."""
    if scheme == "default":
        return
    fill: dict[str, Callable[[Tensor], Tensor]] = {
        "kaiming": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
        "xavier": nn.init.xavier_uniform_,
        "orthogonal": lambda w: nn.init.orthogonal_(w, gain=math.sqrt(2)),
    }
    if scheme not in fill:
        raise ValueError(f"init must be default, {', '.join(fill)}, got {scheme!r}")
    for module in model.modules():
        if isinstance(module, BatchNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                fill[scheme](parameter)
            elif "bias" in name:
                parameter.zero_()


def dense(
    features: int,
    size: int,
    *,
    activation: str,
    batch_norm: bool,
    batch_norm_momentum: float,
    dropout: float,
) -> list[nn.Module]:
    """One hidden layer (B, features) -> (B, size): linear, batch norm (optional), activation, dropout.

    A linear layer before a batch norm has no bias: its gradient would be rounding noise, which Adam turns
    into full steps.
    """
    layers: list[nn.Module] = [nn.Linear(features, size, bias=not batch_norm)]
    if batch_norm:
        layers.append(BatchNorm(size, batch_norm_momentum))
    check_choice("activation", activation, ACTIVATIONS)
    return [*layers, ACTIVATIONS[activation](), Dropout(dropout)]


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")


def check_positive(**sizes: int | Sequence[int]) -> None:
    """Raises ValueError if a size, or one of a sequence of sizes, is below 1."""
    for name, value in sizes.items():
        if any(size < 1 for size in (value if isinstance(value, Sequence) else [value])):
            raise ValueError(f"{name} must be at least 1, got {value}")
