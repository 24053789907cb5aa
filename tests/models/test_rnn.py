"""`RNN`: both implementations against torch's modules, padding that never leaks, mapped members."""

# B batch, T steps, F features of a step

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_linear import assert_mapped_equals_alone
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hpt_torch.models import RNN
from hpt_torch.models.rnn import inside_transform, reverse, run_native, run_steps

MODULES: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
LENGTHS = [3, 7, 1, 5]

cells = pytest.mark.parametrize("cell", list(MODULES))
layers = pytest.mark.parametrize("num_layers", [1, 2, 3])
directions = pytest.mark.parametrize("bidirectional", [False, True])
readouts = pytest.mark.parametrize("readout", ["last", "mean", "all"])
natives = pytest.mark.parametrize("native", [True, False])


def sequences(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 7, 3, generator=generator, dtype=dtype), torch.tensor(LENGTHS)


def build(seed: int = 0, **hparams: Any) -> RNN:
    torch.manual_seed(seed)
    return RNN((7, 3), 2, **({"hidden_size": 5} | hparams)).double()


def reference(model: RNN) -> nn.RNNBase:
    """torch's module with the model's weights."""
    recurrent = model.recurrent
    module = MODULES[recurrent.cell](
        3, 5, recurrent.num_layers, batch_first=True, bidirectional=recurrent.bidirectional
    ).double()
    module.load_state_dict(recurrent.state_dict())
    return module


@cells
@layers
@directions
def test_both_implementations_are_torchs(cell: str, num_layers: int, bidirectional: bool) -> None:
    x, _ = sequences()
    model = build(cell=cell, num_layers=num_layers, bidirectional=bidirectional)
    expected, state = reference(model)(x)
    for native in (True, False):
        y = model.recurrent(x.transpose(0, 1), None, native).transpose(0, 1)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    # "last" is torch's h_n of the last layer, direction after direction
    h_n = state[0] if cell == "lstm" else state
    last = torch.cat(tuple(h_n[-2:] if bidirectional else h_n[-1:]), -1)
    torch.testing.assert_close(model(x), model.head(last), rtol=1e-10, atol=1e-10)


@cells
@directions
@natives
def test_lengths_are_torchs_packed_sequences(cell: str, bidirectional: bool, native: bool) -> None:
    x, lengths = sequences()
    model = build(cell=cell, num_layers=2, bidirectional=bidirectional, readout="all")
    model.native = native
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, state = reference(model)(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=7)
    torch.testing.assert_close(model(x, lengths), model.head(expected), rtol=1e-10, atol=1e-10)
    model.readout = "last"
    h_n = state[0] if cell == "lstm" else state
    last = torch.cat(tuple(h_n[-2:] if bidirectional else h_n[-1:]), -1)
    torch.testing.assert_close(model(x, lengths), model.head(last), rtol=1e-10, atol=1e-10)
    model.readout = "mean"
    mean = torch.stack([row[:length].mean(0) for row, length in zip(expected, LENGTHS, strict=True)])
    torch.testing.assert_close(model(x, lengths), model.head(mean), rtol=1e-10, atol=1e-10)


@cells
@directions
def test_state_dicts_load_both_ways(cell: str, bidirectional: bool) -> None:
    model = build(cell=cell, num_layers=2, bidirectional=bidirectional, dropout=0.3)
    module = MODULES[cell](3, 5, 2, bidirectional=bidirectional).double()
    assert list(model.recurrent.state_dict()) == list(module.state_dict())
    module.load_state_dict(model.recurrent.state_dict())
    other = build(1, cell=cell, num_layers=2, bidirectional=bidirectional, dropout=0.3)
    other.recurrent.load_state_dict(module.state_dict())
    for name, value in model.recurrent.state_dict().items():
        assert torch.equal(other.recurrent.state_dict()[name], value)


@cells
@directions
def test_one_seed_initialises_as_torch(cell: str, bidirectional: bool) -> None:
    model = build(9, cell=cell, num_layers=2, bidirectional=bidirectional)
    torch.manual_seed(9)
    for name, value in MODULES[cell](3, 5, 2, bidirectional=bidirectional).state_dict().items():
        assert torch.equal(model.recurrent.state_dict()[name], value.double())


@cells
@directions
@readouts
def test_gradients_of_both_implementations_agree(cell: str, bidirectional: bool, readout: str) -> None:
    x, lengths = sequences()
    model = build(cell=cell, num_layers=2, bidirectional=bidirectional, readout=readout)
    gradients = []
    for native in (True, False):
        model.native = native
        inputs = x.clone().requires_grad_()
        model(inputs, lengths).square().sum().backward()
        gradients.append([inputs.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for kernel, loop in zip(*gradients, strict=True):
        torch.testing.assert_close(kernel, loop, rtol=1e-9, atol=1e-9)
        assert kernel.any()


@cells
@directions
@readouts
@natives
@pytest.mark.parametrize("value", [0.0, 1e6, float("inf"), float("nan")])
def test_padding_does_not_leak(
    cell: str, bidirectional: bool, readout: str, native: bool, value: float
) -> None:
    x, lengths = sequences()
    model = build(cell=cell, num_layers=2, bidirectional=bidirectional, readout=readout)
    model.native = native
    padded = x.clone()
    for row, length in zip(padded, LENGTHS, strict=True):
        row[length:] = value

    def run(inputs: Tensor) -> Iterator[Tensor]:
        out = model(inputs, lengths)
        yield out.detach()
        yield from torch.autograd.grad(out.square().sum(), list(model.parameters()))

    for clean, dirty in zip(run(x), run(padded), strict=True):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()


@cells
@directions
@readouts
@natives
def test_a_padded_row_equals_the_row_alone(
    cell: str, bidirectional: bool, readout: str, native: bool
) -> None:
    x, lengths = sequences()
    model = build(cell=cell, num_layers=2, bidirectional=bidirectional, readout=readout)
    model.native = native
    together = model(x, lengths)
    for i, length in enumerate(LENGTHS):
        alone = model(x[i : i + 1, :length])[0]
        row = together[i, :length] if readout == "all" else together[i]
        torch.testing.assert_close(row, alone, rtol=1e-10, atol=1e-10)


@readouts
@natives
def test_full_lengths_change_nothing(readout: str, native: bool) -> None:
    x, _ = sequences()
    model = build(bidirectional=True, readout=readout)
    model.native = native
    torch.testing.assert_close(model(x, torch.full((4,), 7)), model(x), rtol=1e-12, atol=1e-12)


@readouts
def test_an_empty_row_reads_zeros(readout: str) -> None:
    x, _ = sequences()
    out = build(bidirectional=True, readout=readout)(x, torch.tensor([0, 7, 0, 2]))
    bias = build(bidirectional=True, readout=readout).head.bias
    for i in (0, 2):
        torch.testing.assert_close(out[i], bias.expand_as(out[i]))


def test_reverse_turns_each_row_within_its_length() -> None:
    x_TB1 = torch.arange(8).reshape(4, 2, 1)
    assert reverse(x_TB1, torch.tensor([3, 2]))[..., 0].T.tolist() == [[4, 2, 0, 6], [3, 1, 5, 7]]
    assert torch.equal(reverse(x_TB1, None), x_TB1.flip(0))


@natives
@pytest.mark.parametrize("embedding_size", [None, 4])
def test_tokens_are_embedded(embedding_size: int | None, native: bool) -> None:
    torch.manual_seed(0)
    model = RNN((6,), 3, vocabulary=11, embedding_size=embedding_size, hidden_size=5)
    model.native = native
    assert model.embedding is not None
    assert model.embedding.weight.shape == (11, embedding_size or 5)
    tokens, lengths = torch.randint(0, 11, (4, 6)), torch.tensor([6, 2, 3, 1])
    out = model(tokens, lengths)
    assert out.shape == (4, 3)
    padded = tokens.clone()
    for row, length in zip(padded, lengths.tolist(), strict=True):
        row[length:] = -1  # no token at all
    assert torch.equal(model(padded, lengths), out)
    torch.testing.assert_close(model(tokens[1:2, :2])[0], out[1])


@readouts
@directions
def test_shapes(readout: str, bidirectional: bool) -> None:
    for batch, steps in ((1, 1), (5, 9)):
        model = RNN((steps, 2), 4, readout=readout, bidirectional=bidirectional, num_layers=2)
        out = model(torch.randn(batch, steps, 2), torch.full((batch,), steps))
        assert out.shape == ((batch, steps, 4) if readout == "all" else (batch, 4))
        assert out.is_contiguous()


def test_dropout_sits_between_the_layers() -> None:
    x, _ = sequences()
    model = build(num_layers=2, dropout=0.5, readout="all").train()
    outputs = []
    for native in (True, False):
        model.native = native
        torch.manual_seed(0)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)  # one mask for both
    torch.manual_seed(0)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    first, second = ([getattr(model.recurrent, f"{name}_l{i}") for name in names] for i in (0, 1))
    between = model.recurrent.dropouts[0](run_native("gru", x.transpose(0, 1), first))
    by_hand = model.head(run_native("gru", between, second).transpose(0, 1))
    torch.testing.assert_close(outputs[0], by_hand, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(outputs[0], model.eval()(x))
    single = build(num_layers=1, dropout=0.5)
    torch.testing.assert_close(single.train()(x), single.eval()(x))


@pytest.mark.parametrize(
    ("shape", "hparams", "message"),
    [
        ((7, 3), {"cell": "qrnn"}, "cell must be rnn, gru or lstm, got 'qrnn'"),
        ((7, 3), {"readout": "first"}, "readout must be last, mean or all, got 'first'"),
        ((7, 3), {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ((7, 3), {"num_layers": 0}, "num_layers must be at least 1, got 0"),
        (
            (7, 3),
            {"embedding_size": 4},
            "embedding_size embeds tokens, got 4 without a vocabulary; set vocabulary",
        ),
        (
            (7,),
            {},
            "input_shape must be (steps, features), got (7,); use (steps, 1) for one number a step, or set"
            " vocabulary for tokens",
        ),
        (
            (7, 3),
            {"vocabulary": 9},
            "with a vocabulary, input_shape must be (steps,), got (7, 3); leave vocabulary out for real"
            " numbers",
        ),
        ((7,), {"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ((7,), {"vocabulary": 9, "embedding_size": 0}, "embedding_size must be at least 1, got 0"),
        ((7, 3), {"dropout": 1.5, "num_layers": 2}, "dropout must be in [0, 1), got 1.5"),
    ],
)
def test_impossible_hyperparameters_are_refused(
    shape: tuple[int, ...], hparams: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RNN(shape, 2, **hparams)


@cells
@directions
@readouts
def test_mapped_members_train_as_each_alone(cell: str, bidirectional: bool, readout: str) -> None:
    """The members alone run torch's kernel, mapped the loop."""
    x, lengths = sequences()
    assert_mapped_equals_alone(
        lambda: RNN(
            (7, 3),
            2,
            cell=cell,
            hidden_size=5,
            num_layers=2,
            bidirectional=bidirectional,
            readout=readout,
            dropout=0.1,
        ),
        [x, lengths],
    )


def test_mapped_members_train_as_each_alone_on_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (4, 6))
    assert_mapped_equals_alone(
        lambda: RNN((6,), 2, vocabulary=11, embedding_size=3, hidden_size=4),
        [tokens, torch.tensor([6, 2, 3, 1])],
    )


def test_the_kernel_is_left_inside_transforms_only(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name, run in (("native", run_native), ("steps", run_steps)):
        monkeypatch.setattr(
            f"hpt_torch.models.rnn.run_{name}",
            lambda *args, name=name, run=run: (taken.append(name), run(*args))[1],
        )
    x, _ = sequences()
    model = build()
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (x,)).sum()

    model(x)
    loss(params)
    assert taken == ["native", "native"]
    taken.clear()
    grad(loss)(params)
    vmap(loss)({name: p.detach()[None] for name, p in params.items()})
    assert taken == ["steps", "steps"]
    taken.clear()
    for model.native in (True, False):
        model(x)
    assert taken == ["native", "steps"]


def test_a_torch_that_cannot_be_asked_gets_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not inside_transform()
    monkeypatch.delattr("torch._C._functorch.get_dynamic_layer_stack_depth")
    assert inside_transform()


@pytest.mark.slow
def test_a_mapped_model_compiles_in_one_graph() -> None:
    model = build(num_layers=2, bidirectional=True, dropout=0.3)
    x, lengths = sequences()
    params = {name: torch.stack([p.detach(), p.detach() * 2]) for name, p in model.named_parameters()}

    def step(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return vmap(grad(lambda p: functional_call(model.eval(), p, (x, lengths)).square().sum()))(params)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for name, gradient in compiled(params).items():
        torch.testing.assert_close(gradient, step(params)[name], rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@cells
@directions
def test_cudnn_takes_the_weights_in_one_piece(cell: str, bidirectional: bool) -> None:
    """Else it would warn, which is an error here, and copy them."""
    x, lengths = (t.cuda() for t in sequences(torch.float32))
    model = build(cell=cell, num_layers=2, bidirectional=bidirectional).float().cuda()
    outputs = []
    for model.native in (True, False):
        out = model(x, lengths)
        outputs.append((out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for kernel, loop in zip(*outputs, strict=True):
        torch.testing.assert_close(kernel, loop, rtol=1e-3, atol=1e-3)
