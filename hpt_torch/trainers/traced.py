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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_aten = torch.ops.aten
# What these return is the same in every run: it depends on the shape of their argument, or was written as a
# number in the code.
_BLANKS = frozenset({_aten.zeros_like.default, _aten.ones_like.default, _aten.new_zeros.default})
_LITERALS = frozenset({_aten.lift_fresh.default, _aten.lift_fresh_copy.default})
# These write into the running statistics that they are given, of which their schemas say nothing.
STATISTICS = {
    _aten.native_batch_norm.default: ("running_mean", "running_var"),
    _aten.cudnn_batch_norm.default: ("running_mean", "running_var"),
    _aten.miopen_batch_norm.default: ("running_mean", "running_var"),
}
_MANY_ROWS = 3  # from as many on, `unbind` is cheaper than `select` for each


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
    call = _Call(func, mode.known((args, kwargs or {})), [result] if single else list(result), single)
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
        self.calls: list[_Call] = []
        self._seen: dict[int, Tensor] = {}
        self._by_memory: dict[Hashable, Tensor] = {}
        for tensor in inputs:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        self._seen[id(tensor)] = tensor
        self._by_memory.setdefault(_memory(tensor), tensor)

    def add(self, call: _Call) -> None:
        self.calls.append(call)
        for tensor in _tensors(call.outputs):
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
    return tensor.untyped_storage().data_ptr(), *_layout(tensor)


@dataclass
class Flat:
    """A function as the operations that it came down to, in order, for arguments of the same shapes."""

    calls: list[_Call]
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
    with _Recorder(inputs) as recorder:
        returned = function(*arguments)
    if _branches(recorder.calls, {id(tensor) for tensor in constants}):
        return None, returned
    results, spec = tree_flatten(recorder.known(returned))
    calls, results = _without_idle_views(recorder.calls, results)
    calls, results = _with_shared_views(calls, results)
    calls = _needed(calls, results, _constants(calls, inputs))
    return Flat(calls, inputs, results, spec), returned


def computed_bytes(function: Callable[[], Any]) -> int:
    """The memory of all that the function computes, as if nothing of it were freed before the end (which is
    so where it is traced)."""
    with _Recorder(()) as recorder:
        function()
    given: set[int] = set()
    computed: dict[int, int] = {}
    for call in recorder.calls:
        given |= {_storage(tensor) for tensor in _tensors(call.arguments)} - computed.keys()
        for tensor in _tensors(call.outputs):
            if _storage(tensor) not in given:
                computed[_storage(tensor)] = tensor.untyped_storage().nbytes()
    return sum(computed.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def trace(
    function: Callable[..., Any],
    *arguments: Tensor | dict[str, Tensor],
    constants: Iterable[Tensor] = (),
) -> tuple[Any, Any]:
    """(the function's program for arguments of these shapes, what it returned for these arguments).

    The program is None where the function reads the values of other tensors than `constants`.
    """
    recorded, returned = record(function, *arguments, constants=constants)
    if recorded is None:
        return None, returned
    run, spec = _written_out(recorded.calls, recorded.inputs, recorded.results), recorded.spec

    def program(*arguments: Tensor | dict[str, Tensor]) -> Any:
        return tree_unflatten(run(*flat(arguments)), spec)

    return program, returned


def _branches(calls: Sequence[_Call], constants: set[int]) -> bool:
    """Whether what comes next may depend on the values of tensors, other than of `constants`."""
    telling = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return any(
        telling.intersection(call.op.tags)
        and not all(id(tensor) in constants for tensor in _tensors(call.arguments))
        for call in calls
    )


def flat(arguments: Sequence[Tensor | dict[str, Tensor]]) -> list[Tensor]:
    """The arguments' tensors, those of a dict in its order."""
    tensors: list[Tensor] = []
    for argument in arguments:
        tensors.extend(argument.values() if isinstance(argument, dict) else (argument,))
    return tensors


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


def _with_shared_views(calls: Sequence[_Call], results: Any) -> tuple[list[_Call], list[Any]]:
    """Views that are taken more than once are taken once, and the rows of a tensor all in one call."""
    first: dict[Hashable, Tensor] = {}  # by operation and operands
    same: dict[int, Tensor] = {}  # by a view's id: the first of its kind
    rows: dict[Hashable, dict[int, Tensor]] = {}  # by source and dimension: the rows that are selected

    def shown(value: Any) -> Any:
        return tree_map(lambda leaf: same.get(id(leaf), leaf), value)

    once = []
    for call in calls:
        call.arguments = args, kwargs = shown(call.arguments)
        if call.single and call.op.is_view:
            if call.op is _aten.select.int:
                source, dim, index = args
                args = source, dim % source.dim(), index % source.shape[dim]
                call.arguments = args, {}
            parts = (id(leaf) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs)))
            known = first.setdefault((call.op, len(args), *parts), call.outputs[0])
            if known is not call.outputs[0]:
                same[id(call.outputs[0])] = known
                continue
            if call.op is _aten.select.int:
                rows.setdefault((id(args[0]), args[1]), {})[args[2]] = known
        once.append(call)
    kept = []
    for call in once:
        if call.op is _aten.select.int:
            source, dim, _ = call.arguments[0]
            selected = rows.get((id(source), dim), {})
            if len(selected) >= _MANY_ROWS:
                every = [selected.get(i, row) for i, row in enumerate(source.unbind(dim))]
                kept.append(_Call(_aten.unbind.int, ((source, dim), {}), every, single=False))
                selected.clear()
                continue
            if not selected:
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
    changed += STATISTICS.get(call.op, ())
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
                names[id(value)] = constant(value.detach())  # the gradients are among the operations
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
