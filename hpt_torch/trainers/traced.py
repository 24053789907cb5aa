"""A mapped function as one flat program of tensor operations, without what vmap and autograd cost a call.

`trace` runs the function once and keeps what reached the kernels: the same operations on the same operands,
so the results are the same bits. Python code in the function ran once, at trace time: whatever it depends on
besides the tensors belongs into the key under which the program is kept.

(torch's own `make_fx` does this too, at twenty times the price: it imports torch.compile's modules and
carries symbolic shapes.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_aten = torch.ops.aten
# What these return is the same in every run: it depends on the shape of their argument, or was written as a
# number in the code.
_BLANKS = frozenset({_aten.zeros_like.default, _aten.ones_like.default, _aten.new_zeros.default})
_LITERALS = frozenset({_aten.lift_fresh.default, _aten.lift_fresh_copy.default})


class Program:
    """Runs a mapped function ``(params, buffers, *rest)``, which writes into `buffers`: traced at the first
    call, compared with the function itself at the second.

    Code that changes what it does between calls (a counter in a user's loss) shows there, and is never traced
    again; code that branches on the values of tensors cannot be mapped in the first place.
    """

    def __init__(self) -> None:
        self._run: Callable[..., Any] | None = None
        self._calls = 0

    @property
    def traced(self) -> bool:
        return self._run is not None

    def __call__(
        self, function: Callable[..., Any], params: Any, buffers: dict[str, Tensor], *rest: Any
    ) -> Any:
        self._calls += 1
        if self._calls == 1:
            self._run, outputs = trace(function, params, buffers, *rest)
            return outputs
        if self._calls > 2 or self._run is None:
            return (self._run or function)(params, buffers, *rest)
        scratch = {name: tensor.clone() for name, tensor in buffers.items()}
        found = self._run(params, scratch, *rest)
        expected = function(params, buffers, *rest)
        if not _same((found, scratch), (expected, buffers)):
            self._run = None
        return expected


def untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)


@dataclass
class _Call:
    """One operation that reached the kernels."""

    op: Any
    arguments: Any  # (args, kwargs)
    outputs: list[Any]  # what it returned; tensors, mostly
    single: bool  # it returned a tensor, not a tuple of them


def _record(mode: _Recorder, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    result = func(*args, **(kwargs or {}))
    single = not isinstance(result, (tuple, list))
    mode.calls.append(_Call(func, (args, kwargs or {}), [result] if single else list(result), single))
    return result


# torch guards the method against being compiled, for which it would import torch.compile's modules at the
# first call: two seconds. It takes what stands here for the guarded function.
_record.__dynamo_disable = _record  # type: ignore[attr-defined]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operation, and with it its tensors, so that their ids stay theirs."""

    __torch_dispatch__ = _record

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []


def trace(function: Callable[..., Any], *arguments: Tensor | dict[str, Tensor]) -> tuple[Any, Any]:
    """(the function's program for arguments of these shapes, what it returned for these arguments)."""
    with _Recorder() as recorder:
        returned = function(*arguments)
    results, spec = tree_flatten(returned)
    calls, results = _without_idle_views(recorder.calls, results)
    inputs = _flat(arguments)
    constants = _constants(calls, inputs)
    calls = _needed(calls, results, constants)
    run = _written_out(calls, inputs, results)

    def program(*arguments: Tensor | dict[str, Tensor]) -> Any:
        return tree_unflatten(run(*_flat(arguments)), spec)

    return program, returned


def _flat(arguments: Sequence[Tensor | dict[str, Tensor]]) -> list[Tensor]:
    flat: list[Tensor] = []
    for argument in arguments:
        flat.extend(argument.values() if isinstance(argument, dict) else (argument,))
    return flat


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _without_idle_views(calls: Sequence[_Call], results: list[Any]) -> tuple[list[_Call], list[Any]]:
    """Leaves out views of what has the same layout already; what read the view reads that."""
    same: dict[int, Tensor] = {}  # by a view's id: what it shows
    seen_through: dict[int, Tensor] = {}  # by a view's id: what it is a view of

    def shown(value: Any) -> Any:
        return tree_map(lambda leaf: same.get(id(leaf), leaf), value)

    kept = []
    for call in calls:
        call.arguments = shown(call.arguments)
        if _is_view(call.op) and isinstance(call.outputs[0], Tensor) and call.single:
            view, source = call.outputs[0], call.arguments[0][0]
            if view is source:
                continue  # what is to be seen was returned itself
            seen_through[id(view)] = source
            while source is not None and _layout(source) != _layout(view):
                source = seen_through.get(id(source))
            if source is not None:
                same[id(view)] = source
                continue
        kept.append(call)
    return kept, shown(results)


def _is_view(op: Any) -> bool:
    return bool(op.is_view) or op is _aten._unsafe_view.default


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _written(call: _Call) -> list[Tensor]:
    """The tensors that the operation changes."""
    args, kwargs = call.arguments
    schema = call.op._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    changed = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for name in changed for tensor in _tensors(given.get(name))]


def _constants(calls: Sequence[_Call], inputs: Sequence[Tensor]) -> set[int]:
    """The ids of tensors that are the same in every run, and that nothing writes into."""
    whole: dict[int, int] = {}  # by a view's id: the id of the tensor that owns its memory
    for call in calls:
        if _is_view(call.op):
            source = id(call.arguments[0][0])
            whole.update({id(view): whole.get(source, source) for view in call.outputs})
    changed = {whole.get(id(t), id(t)) for call in calls for t in _written(call)}
    constants: set[int] = set()
    for call in calls:
        sources = [] if call.op in _BLANKS or call.op in _LITERALS else _tensors(call.arguments)
        if torch.Tag.nondeterministic_seeded in call.op.tags or _written(call):
            continue
        if all(id(source) in constants for source in sources):
            constants |= {id(t) for t in call.outputs if whole.get(id(t), id(t)) not in changed}
    return constants


def _needed(calls: Sequence[_Call], results: Sequence[Any], constants: set[int]) -> list[_Call]:
    """The calls that write, or whose outputs something reads."""
    read = {id(result) for result in results}
    kept: list[_Call] = []
    for call in reversed(calls):
        computed = [t for t in call.outputs if id(t) not in constants]
        if _written(call) or any(id(t) in read for t in computed):
            kept.append(call)
            read |= {id(tensor) for tensor in _tensors(call.arguments)}
    return kept[::-1]


def _written_out(
    calls: Sequence[_Call], inputs: Sequence[Tensor], results: Sequence[Any]
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
                names[id(value)] = constant(value)
            return names[id(value)]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return repr(value) if isinstance(value, (bool, int, str, type(None))) else constant(value)

    last = {id(t): i for i, call in enumerate(calls) for t in (*_tensors(call.arguments), *call.outputs)}
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
        touched = {id(t) for t in (*_tensors(call.arguments), *call.outputs) if last[id(t)] == i} - kept
        over = sorted(names[key] for key in touched if names[key].startswith("v"))
        lines += [f"del {', '.join(over)}"] if over else []
    lines.append(f"return [{', '.join(map(text, results))}]")
    # Written out as code: a loop over the calls would cost as much as the small ones among them.
    body = "\n    ".join(lines)
    exec(f"def run({', '.join(f'a{i}' for i in range(len(inputs)))}):\n    {body}", fixed)
    run: Callable[..., list[Any]] = fixed["run"]
    return run
