"""A function of tensors as one flat program of operations, without what vmap and autograd cost a call.

`trace` runs the function once and keeps what reached the kernels: the same operations on the same operands,
so the results are the same bits. Python code in the function ran once, at trace time: whatever it depends on
besides the tensors belongs into the key under which the program is kept. What branches on the values of
tensors is not traced.

(torch's own `make_fx` does this too, at twenty times the price: it imports torch.compile's modules and
carries symbolic shapes.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hpt_torch.trainers.draws import Draws
from hpt_torch.trainers.operations import (
    Call,
    branches,
    constants_of,
    each_once,
    layout,
    needed,
    set_apart,
    tensors_in,
    without_idle_views,
)
from hpt_torch.trainers.pooling import pool_first


def _record(mode: _Recorder, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    result = func(*args, **(kwargs or {}))
    single = not isinstance(result, (tuple, list))
    call = Call(func, mode.known((args, kwargs or {})), [result] if single else list(result), single)
    mode.add(call)
    return result


# torch guards the method against being compiled, for which it would import torch.compile's modules at the
# first call: two seconds. It takes what stands here for the guarded function.
_record.__dynamo_disable = _record  # type: ignore[attr-defined]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operation, and with it its tensors, so that their ids stay theirs."""

    __torch_dispatch__ = _record

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._seen: dict[int, Tensor] = {}
        self._by_memory: dict[Hashable, Tensor] = {}
        for tensor in inputs:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        self._seen[id(tensor)] = tensor
        self._by_memory.setdefault(_memory(tensor), tensor)

    def add(self, call: Call) -> None:
        self.calls.append(call)
        for tensor in tensors_in(call.outputs):
            self._see(tensor)

    def known(self, value: Any) -> Any:
        """The value with tensors as they were seen first. (What autograd saved of an operation's output comes
        back as another object over the same memory, which is still in use, since we hold it.)"""
        return tree_map(lambda leaf: self._known(leaf) if isinstance(leaf, Tensor) else leaf, value)

    def _known(self, tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in self._seen else self._by_memory.get(_memory(tensor), tensor)


def _memory(tensor: Tensor) -> Hashable:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), *layout(tensor)


@dataclass
class Flat:
    """A function as the operations that it came down to, in order, for arguments of the same shapes."""

    calls: list[Call]
    inputs: list[Tensor]  # what it was recorded with: the leaves of its arguments
    results: list[Any]  # what of the operations' outputs it returned
    spec: Any  # how they were nested


def record(
    function: Callable[..., Any],
    *arguments: Tensor | dict[str, Tensor],
    constants: Iterable[Tensor] = (),
) -> tuple[Flat | None, Any]:
    """(the function's operations for arguments of these shapes, what it returned for these arguments).

    The former is None where the function reads the values of other tensors than `constants`.
    """
    inputs = flat(arguments)
    drew = Draws.drew_elsewhere
    with _Recorder(inputs) as recorder, _Reads() as reads:
        returned = function(*arguments)
    if (
        reads.found
        or Draws.drew_elsewhere != drew
        or branches(recorder.calls, {id(tensor) for tensor in constants})
        or _writes_elsewhere(recorder, inputs)
    ):
        return None, returned
    results, spec = tree_flatten(recorder.known(returned))
    calls, results = without_idle_views(recorder.calls, results)
    calls, results = each_once(calls, results)
    calls = pool_first(needed(calls, results, constants_of(calls)), results)
    return Flat(calls, inputs, results, spec), returned


class _Reads(TorchFunctionMode):
    """Notes where values of tensors are read that no recorded operation shows."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func in (Tensor.tolist, Tensor.numpy, Tensor.__array__)
        return func(*args, **(kwargs or {}))


def _writes_elsewhere(recorder: _Recorder, inputs: Sequence[Tensor]) -> bool:
    """Whether an operation writes into a tensor that was there before and is not among the inputs, such as a
    teacher's weights: a second run of it would change what only the first one should."""
    ours, others = {_storage(tensor) for tensor in inputs}, set[int]()
    for call in recorder.calls:
        others |= {_storage(tensor) for tensor in tensors_in(call.arguments)} - ours
        for argument, given in zip(call.op._schema.arguments, call.arguments[0], strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if any(_storage(tensor) in others for tensor in tensors_in(given)):
                return True
        ours |= {_storage(tensor) for tensor in tensors_in(call.outputs)} - others
    return False


def computed_bytes(function: Callable[[], Any]) -> int:
    """The memory of all that the function computes, as if nothing of it were freed before the end (which is
    so where it is traced)."""
    with _Recorder(()) as recorder:
        function()
    given: set[int] = set()
    computed: dict[int, int] = {}
    for call in recorder.calls:
        given |= {_storage(tensor) for tensor in tensors_in(call.arguments)} - computed.keys()
        for tensor in tensors_in(call.outputs):
            if _storage(tensor) not in given:
                computed[_storage(tensor)] = tensor.untyped_storage().nbytes()
    return sum(computed.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def trace(
    function: Callable[..., Any],
    *arguments: Tensor | dict[str, Tensor],
    constants: Iterable[Tensor] = (),
    steady: Iterable[Tensor] = (),
) -> tuple[Any, Any]:
    """(the function's program for arguments of these shapes, what it returned for these arguments).

    The program is None where the function reads the values of other tensors than `constants`. steady: of the
    arguments, those that are mostly the same objects from call to call: what depends on them alone is
    computed anew only where another one is given, or one was written into.
    """
    recorded, returned = record(function, *arguments, constants=constants)
    if recorded is None:
        return None, returned
    inputs, results, spec = recorded.inputs, recorded.results, recorded.spec
    before, calls, carried = set_apart(recorded.calls, inputs, results, steady)
    prepare, run = _written_out(before, inputs, carried), _written_out(calls, [*inputs, *carried], results)
    ids = {id(tensor) for tensor in steady}
    places = [i for i, tensor in enumerate(inputs) if id(tensor) in ids]
    seen, prepared = list[tuple[Tensor, int]](), list[Tensor]()

    def program(*arguments: Tensor | dict[str, Tensor]) -> Any:
        nonlocal seen, prepared
        given = flat(arguments)
        now = [(given[i], given[i]._version) for i in places]
        if not seen or any(a is not b or x != y for (a, x), (b, y) in zip(now, seen, strict=True)):
            seen, prepared = now, prepare(*given)
        return tree_unflatten(run(*given, *prepared), spec)

    return program, returned


def flat(arguments: Sequence[Tensor | dict[str, Tensor]]) -> list[Tensor]:
    """The arguments' tensors, those of a dict in its order."""
    tensors: list[Tensor] = []
    for argument in arguments:
        tensors.extend(argument.values() if isinstance(argument, dict) else (argument,))
    return tensors


def _written_out(
    calls: Sequence[Call], inputs: Sequence[Tensor], results: Sequence[Any]
) -> Callable[..., list[Any]]:
    """The calls as one Python function of the inputs; every other tensor that is read is a constant of it."""
    names = {id(tensor): f"a{i}" for i, tensor in enumerate(inputs)}
    fixed: dict[str, Any] = {}

    def constant(value: Any) -> str:
        name = f"c{len(fixed)}"
        fixed[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = constant(value.detach())  # the gradients are among the operations
            return names[id(value)]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return repr(value) if isinstance(value, (bool, int, str, type(None))) else constant(value)

    last = {id(t): i for i, call in enumerate(calls) for t in (*tensors_in(call.arguments), *call.outputs)}
    kept = {id(result) for result in results}
    lines = []
    for i, call in enumerate(calls):
        args, kwargs = call.arguments
        given = [*map(text, args), *(f"{key}={text(value)}" for key, value in kwargs.items())]
        for t in call.outputs:
            names.setdefault(id(t), f"v{len(names)}")
        targets = ", ".join(names[id(t)] for t in call.outputs)
        equals = f"{targets} = " if call.single else f"[{targets}] = "
        lines.append(f"{equals}{constant(call.op._op)}({', '.join(given)})")
        touched = {id(t) for t in (*tensors_in(call.arguments), *call.outputs) if last[id(t)] == i} - kept
        over = sorted(names[key] for key in touched if names[key].startswith("v"))
        lines += [f"del {', '.join(over)}"] if over else []
    lines.append(f"return [{', '.join(map(text, results))}]")
    # Written out as code: a loop over the calls would cost as much as the small ones among them.
    body = "\n    ".join(lines)
    exec(f"def run({', '.join(f'a{i}' for i in range(len(inputs)))}):\n    {body}", fixed)
    run: Callable[..., list[Any]] = fixed["run"]
    return run
