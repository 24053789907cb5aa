"""What a user's own code draws at random: the distributions of torch's functions, their shapes and types."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpt_torch.trainers.draws import Draws

MANY = 40_000


def _key(value: int = 7) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def _drawn(draw: Callable[[], Any], key: int = 7) -> Any:
    with Draws(_key(key), key):
        return draw()


X = torch.linspace(-2, 2, 12).view(2, 3, 2)
P = torch.full((MANY,), 0.3)
_WEIGHTS = torch.tensor([[2.0, 0.0, 7.0, 1.0]])
# The second without replacement: after 0 (0.2) it is 2 or 3 (7/8, 1/8), and so on
_P = (0.7 * 2 / 3 + 0.1 * 2 / 9, 0.2 * 7 / 8 + 0.1 * 7 / 9, 0.2 / 8 + 0.7 / 3)
_SECOND = (2 * _P[1] + 3 * _P[2], (4 * _P[1] + 9 * _P[2] - (2 * _P[1] + 3 * _P[2]) ** 2) ** 0.5)
MOMENTS = {  # (draw, mean, standard deviation)
    "rand": (lambda: torch.rand(MANY), 0.5, 12**-0.5),
    "rand in float64": (lambda: torch.rand(MANY, dtype=torch.float64), 0.5, 12**-0.5),
    "rand in bfloat16": (lambda: torch.rand(MANY, dtype=torch.bfloat16).float(), 0.5, 12**-0.5),
    "rand_like": (lambda: torch.rand_like(P), 0.5, 12**-0.5),
    "randn": (lambda: torch.randn(200, MANY // 200), 0.0, 1.0),
    "randn in float64": (lambda: torch.randn((MANY,), dtype=torch.float64), 0.0, 1.0),
    "randn_like": (lambda: torch.randn_like(P), 0.0, 1.0),
    "normal of numbers": (lambda: torch.normal(2.0, 3.0, (MANY,)), 2.0, 3.0),
    "normal of tensors": (lambda: torch.normal(P, 2 * torch.ones(MANY)), 0.3, 2.0),
    "normal of a mean": (lambda: torch.normal(P, 2.0), 0.3, 2.0),
    "normal of a deviation": (lambda: torch.normal(1.0, P), 1.0, 0.3),
    "normal_": (lambda: torch.empty(MANY).normal_(1.0, std=0.5), 1.0, 0.5),
    "uniform_": (lambda: torch.empty(MANY).uniform_(-1.0, 3.0), 1.0, 4 * 12**-0.5),
    "uniform_ by name": (lambda: torch.empty(MANY).uniform_(to=2.0), 1.0, 2 * 12**-0.5),
    "exponential_": (lambda: torch.empty(MANY).exponential_(2.0), 0.5, 0.5),
    "bernoulli": (lambda: torch.bernoulli(P), 0.3, 0.21**0.5),
    "bernoulli with p": (lambda: torch.bernoulli(P, 0.2), 0.2, 0.4),
    "Tensor.bernoulli": (lambda: P.bernoulli(), 0.3, 0.21**0.5),
    "bernoulli_": (lambda: torch.empty(MANY).bernoulli_(0.2), 0.2, 0.4),
    "bernoulli_ of whole numbers": (lambda: torch.empty(MANY, dtype=torch.int64).bernoulli_(), 0.5, 0.5),
    "randint": (lambda: torch.randint(3, 9, (MANY,)), 5.5, (35 / 12) ** 0.5),
    "randint from 0": (lambda: torch.randint(6, (MANY,)), 2.5, (35 / 12) ** 0.5),
    "randint by name": (lambda: torch.randint(high=6, size=(MANY,)), 2.5, (35 / 12) ** 0.5),
    "randint_like": (lambda: torch.randint_like(P, 6), 2.5, (35 / 12) ** 0.5),
    "randperm": (lambda: torch.randperm(MANY), (MANY - 1) / 2, MANY * 12**-0.5),
    "dropout": (lambda: F.dropout(torch.ones(MANY), 0.2), 1.0, 0.5),
    "dropout in place": (lambda: F.dropout(torch.ones(MANY), 0.2, inplace=True), 1.0, 0.5),
    "dropout2d": (lambda: F.dropout2d(torch.ones(MANY, 1, 2, 2), 0.2), 1.0, 0.5),
    "alpha dropout": (lambda: F.alpha_dropout(torch.randn(MANY), 0.2, True), 0.0, 1.0),
    "multinomial": (lambda: torch.multinomial(_WEIGHTS, MANY, True)[0], 1.7, 0.81**0.5),
    "the second of multinomial": (lambda: _WEIGHTS.expand(MANY, 4).multinomial(2)[:, 1], *_SECOND),
    "bernoulli in bfloat16": (lambda: torch.bernoulli(P.bfloat16() / 300).float(), 0.001, 0.0316),
    "multinomial in bfloat16": (
        lambda: torch.multinomial(torch.ones(1000, dtype=torch.bfloat16), MANY, True),
        499.5,
        288.7,
    ),
    "Normal": (lambda: torch.distributions.Normal(P, 2.0).rsample(), 0.3, 2.0),
    "Gumbel": (lambda: torch.distributions.Gumbel(P, 1.0).sample(), 0.3 + 0.577216, math.pi / 6**0.5),
    "gumbel_softmax": (lambda: F.gumbel_softmax(torch.zeros(MANY, 4), hard=True)[:, 1], 0.25, 0.1875**0.5),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_those_of_the_distribution(name: str) -> None:
    draw, mean, deviation = MOMENTS[name]
    found = _drawn(draw)
    native = draw()
    assert (found.shape, found.dtype) == (native.shape, native.dtype)
    assert float(found.double().mean()) == pytest.approx(mean, abs=5 * deviation / MANY**0.5)
    assert float(found.double().std()) == pytest.approx(deviation, rel=0.03)
    torch.testing.assert_close(_drawn(draw), found, rtol=0, atol=0)
    assert not torch.equal(_drawn(draw, key=8), found)


def test_quantiles_are_those_of_the_distribution() -> None:
    at = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(at)
    found = _drawn(lambda: torch.randn(10 * MANY, dtype=torch.float64)).quantile(at)
    torch.testing.assert_close(found, normal, rtol=0, atol=0.02)
    uniform = _drawn(lambda: torch.rand(10 * MANY, dtype=torch.float64))
    torch.testing.assert_close(uniform.quantile(at), at, rtol=0, atol=0.004)
    assert uniform.max() < 1
    assert uniform.unique().numel() > 9.9 * MANY
    assert sorted(_drawn(lambda: torch.randperm(1000)).tolist()) == list(range(1000))
    assert set(_drawn(lambda: torch.randint(-2, 2, (1000,))).tolist()) == {-2, -1, 0, 1}


def test_draws_are_independent_of_each_other() -> None:
    a, b = _drawn(lambda: (torch.randn(MANY), torch.randn(MANY)))
    c = _drawn(lambda: torch.randn(MANY), key=8)
    table = torch.corrcoef(torch.stack((a, b, c, a.roll(1), a.flip(0))))
    assert (table - torch.eye(5)).abs().max() < 5 / MANY**0.5


FORMS = {
    "rand of numbers": lambda: torch.rand(2, 3),
    "rand of a size": lambda: torch.rand((2, 3)),
    "rand of nothing": lambda: torch.rand(()),
    "rand from no generator": lambda: torch.rand(2, 3, generator=None, out=None),
    "rand by name": lambda: torch.rand(size=(2, 3)),
    "rand with a gradient": lambda: torch.rand(2, requires_grad=True),
    "rand on a device": lambda: torch.rand(2, device="cpu", dtype=torch.float64),
    "rand of complex numbers": lambda: torch.rand(2, dtype=torch.complex64),
    "randn_like in another type": lambda: torch.randn_like(X, dtype=torch.float64),
    "randint in another type": lambda: torch.randint(0, 5, (3,), dtype=torch.int32),
    "randn_like by name": lambda: torch.randn_like(input=X),
    "bernoulli by name": lambda: torch.bernoulli(input=X.sigmoid(), p=0.5),
    "attention by name": lambda: F.scaled_dot_product_attention(query=X, key=X, value=X, dropout_p=0.5),
    "randint between": lambda: torch.randint(2, high=4, size=(3,)),
    "randint_like between": lambda: torch.randint_like(X, 2, 5),
    "randperm in another type": lambda: torch.randperm(5, dtype=torch.int32),
    "multinomial": lambda: torch.multinomial(torch.ones(3, 4), 2),
    "multinomial of one": lambda: torch.multinomial(torch.ones(4), 6, replacement=True),
    "one's own generator": lambda: torch.rand(2, generator=torch.Generator().manual_seed(0)),
    "into a tensor": lambda: torch.rand(2, out=torch.empty(2)),
    "dropout1d": lambda: F.dropout1d(X, 0.5),
    "dropout3d": lambda: F.dropout3d(X[None, None], 0.5),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(X, 0.5, True),
    "dropout of all": lambda: F.dropout(X, 1.0),
    "dropout of none": lambda: F.dropout(X, 0.0),
    "dropout at rest": lambda: F.dropout(X, 0.5, training=False),
    "rrelu": lambda: F.rrelu(X, training=True),
    "dropout by name": lambda: torch.dropout(input=X, p=0.5, train=True),
    "randn_like of another layout": lambda: torch.randn_like(X.transpose(0, 2)),
    "attention in half precision": lambda: F.scaled_dot_product_attention(
        *[X.bfloat16()] * 3, attn_mask=torch.zeros(3, 3), dropout_p=0.5
    ),
    "normal_ by name": lambda: torch.empty(3).normal_(mean=1.0, std=2.0, generator=None),
    "after a seed": lambda: (torch.manual_seed(3), torch.rand(4))[1],
    "poisson": lambda: torch.poisson(X.abs()),
    "Categorical": lambda: torch.distributions.Categorical(logits=X).sample(),
}


SAME = ("one's own generator", "after a seed", "dropout of all", "dropout of none", "dropout at rest")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_call_gives_what_torch_gives(name: str) -> None:
    torch.manual_seed(0)
    found, native = _drawn(FORMS[name]), FORMS[name]()
    assert (found.shape, found.dtype, found.requires_grad) == (
        native.shape, native.dtype, native.requires_grad
    )  # fmt: skip
    assert found.stride() == native.stride()
    if name in SAME:
        torch.testing.assert_close(found, native)


BAD: list[Callable[[], Any]] = [
    lambda: F.dropout(X, 1.5),
    lambda: torch.rand(-1),
    lambda: torch.randint(3, 3, (2,)),
    lambda: torch.normal(0.0, -1.0, (2,)),
    lambda: torch.normal(X, -1.0),
    lambda: X.clone().normal_(0.0, -1.0),
    lambda: X.clone().uniform_(2.0, 1.0),
    lambda: X.clone().exponential_(-1.0),
    lambda: torch.bernoulli(X, 1.5),
    lambda: X.clone().bernoulli_(-0.5),
    lambda: torch.multinomial(torch.ones(3), 4),
    lambda: torch.multinomial(torch.ones(3), 0),
    lambda: torch.multinomial(torch.ones(1, 3, 3), 1),
    lambda: torch.feature_dropout(torch.ones(3), 0.5, True),
    lambda: F.scaled_dot_product_attention(X, X, X, torch.zeros(3, 3), 0.5, is_causal=True),
]


@pytest.mark.parametrize("wrong", BAD)
def test_bad_arguments_are_torchs_errors(wrong: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, RuntimeError)) as native:
        wrong()
    with pytest.raises((ValueError, RuntimeError)) as found:
        _drawn(wrong)
    assert str(found.value).splitlines()[0] == str(native.value).splitlines()[0]


def test_whole_channels_are_dropped_together() -> None:
    found = _drawn(lambda: F.dropout2d(torch.ones(50, 4, 3, 3), 0.5))
    assert bool((found == found[..., :1, :1]).all())
    assert set(found.unique().tolist()) == {0.0, 2.0}


SHAPES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "a mask": {"attn_mask": torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) > 0.3},
    "a mask of nothing": {"attn_mask": torch.arange(5).unsqueeze(1).expand(5, 5) > 1},
    "numbers": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_torchs(name: str) -> None:
    """With dropout of nearly nothing; and the mean over many keys with dropout of a third."""
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = 2 if name == "grouped" else 4
    inputs = [draw(2, n, 5, 8).requires_grad_() for n in (4, heads, heads)]
    expected = F.scaled_dot_product_attention(*inputs, **SHAPES[name])
    found = _drawn(lambda: F.scaled_dot_product_attention(*inputs, dropout_p=1e-9, **SHAPES[name]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    weight = draw(2, 4, 5, 8)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        dropped = [
            _drawn(lambda: F.scaled_dot_product_attention(*inputs, dropout_p=0.3, **SHAPES[name]), key)
            for key in range(2000)
        ]
    torch.testing.assert_close(torch.stack(dropped).mean(0), expected, rtol=0, atol=0.15)
    assert not torch.equal(dropped[0], dropped[1])
