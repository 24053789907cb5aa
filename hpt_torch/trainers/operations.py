"""Recorded operations, and what is left of them once none is run in vain: the same bits by fewer calls.

A call of a kernel costs microseconds whatever it computes, which is most of the step of a small model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

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
class Call:
    """One operation that reached the kernels."""

    op: Any
    arguments: Any  # (args, kwargs)
    outputs: list[Any]  # what it returned; tensors, mostly
    single: bool  # it returned a tensor, not a tuple of them


def branches(calls: Sequence[Call], constants: set[int]) -> bool:
    """Whether what comes next may depend on the values of tensors, other than of `constants`."""
    telling = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return any(
        telling.intersection(call.op.tags)
        and not all(id(tensor) in constants for tensor in tensors_in(call.arguments))
        and not (call.op is _aten.index.Tensor and _takes_rows(call))
        for call in calls
    )


def _takes_rows(call: Call) -> bool:
    """Whether it is ``x[index]`` with whole numbers, so that the shape is the same whatever they are."""
    _, indices = call.arguments[0]
    return all(tensor.dtype not in (torch.bool, torch.uint8) for tensor in tensors_in(indices))


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def without_idle_views(calls: Sequence[Call], results: list[Any]) -> tuple[list[Call], list[Any]]:
    """Leaves out views of what has the same layout already; what read the view reads that."""
    same: dict[int, Tensor] = {}  # by a view's id: what it shows
    seen_through: dict[int, Tensor] = {}  # by a view's id: what it is a view of

    def shown(value: Any) -> Any:
        return tree_map(lambda leaf: same.get(id(leaf), leaf), value)

    kept = []
    for call in calls:
        call.arguments = shown(call.arguments)
        if is_view(call.op) and isinstance(call.outputs[0], Tensor) and call.single:
            view, source = call.outputs[0], call.arguments[0][0]
            if view is source:
                continue  # what is to be seen was returned itself
            seen_through[id(view)] = source
            while source is not None and layout(source) != layout(view):
                source = seen_through.get(id(source))
            if source is not None:
                same[id(view)] = source
                continue
        kept.append(call)
    return kept, shown(results)


def each_once(calls: Sequence[Call], results: list[Any]) -> tuple[list[Call], list[Any]]:
    """What is computed or viewed more than once is so once; the rows of a tensor are taken in one call."""
    first: dict[Hashable, Tensor] = {}  # by operation and operands
    same: dict[int, Tensor] = {}  # by a tensor's id: the first that was computed alike
    rows: dict[Hashable, dict[int, Tensor]] = {}  # by source and dimension: the rows that are selected
    memory = Memory(calls)
    returned = {id(result) for result in results}

    def shown(value: Any) -> Any:
        return tree_map(lambda leaf: same.get(id(leaf), leaf), value)

    once = []
    for call in calls:
        call.arguments = args, kwargs = shown(call.arguments)
        output = call.outputs[0] if call.single else None
        if isinstance(output, Tensor):
            if call.op is _aten.select.int:
                source, dim, index = args
                args = source, dim % source.dim(), index % source.shape[dim]
                call.arguments = args, {}
            if call.op.is_view or (memory.is_fixed(call) and id(output) not in returned):
                known = first.setdefault((call.op, _spelled(args), _spelled(kwargs)), output)
                if known is not output:
                    same[id(output)] = known
                    continue
            if call.op is _aten.select.int:
                rows.setdefault((id(args[0]), args[1]), {})[args[2]] = output
        once.append(call)
    kept = []
    for call in once:
        if call.op is _aten.select.int:
            source, dim, _ = call.arguments[0]
            selected = rows.get((id(source), dim), {})
            if len(selected) >= _MANY_ROWS:
                every = [selected.get(i, row) for i, row in enumerate(source.unbind(dim))]
                kept.append(Call(_aten.unbind.int, ((source, dim), {}), every, single=False))
                selected.clear()
                continue
            if not selected:
                continue
        kept.append(call)
    return kept, shown(results)


def _spelled(value: Any) -> Hashable:
    """Operands as a key: 1, 1.0 and True are not the same."""
    if isinstance(value, Tensor):
        return "tensor", id(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_spelled, value))
    if isinstance(value, dict):
        return tuple((key, _spelled(value[key])) for key in sorted(value))
    return type(value), repr(value)


def is_view(op: Any) -> bool:
    return bool(op.is_view) or op is _aten._unsafe_view.default


def layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _written(call: Call) -> list[Tensor]:
    """The tensors that the operation changes."""
    args, kwargs = call.arguments
    schema = call.op._schema.arguments
    given = {**dict(zip((a.name for a in schema), args, strict=False)), **kwargs}
    changed = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    changed += STATISTICS.get(call.op, ())
    return [tensor for name in changed for tensor in tensors_in(given.get(name))]


class Memory:
    """Who owns the memory of what, and into whose memory something writes."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self._owner: dict[int, int] = {}  # by a view's id: the id of the tensor that owns its memory
        calls = list(calls)
        for call in calls:
            if is_view(call.op):
                source = id(call.arguments[0][0])
                self._owner.update({id(view): self._owner.get(source, source) for view in call.outputs})
        self._written = {self._owner.get(id(t), id(t)) for call in calls for t in _written(call)}

    def changes(self, tensor: Tensor) -> bool:
        """Whether anything writes into the tensor's memory."""
        return self._owner.get(id(tensor), id(tensor)) in self._written

    def is_fixed(self, call: Call) -> bool:
        """Whether what the call returns depends on its operands alone, and stays as it is."""
        if torch.Tag.nondeterministic_seeded in call.op.tags or _written(call):
            return False
        return not any(map(self.changes, (*tensors_in(call.arguments), *tensors_in(call.outputs))))


def constants_of(calls: Sequence[Call]) -> set[int]:
    """The ids of tensors that are the same in every run, and that nothing writes into."""
    memory = Memory(calls)
    constants: set[int] = set()
    for call in calls:
        sources = [] if call.op in _BLANKS or call.op in _LITERALS else tensors_in(call.arguments)
        if torch.Tag.nondeterministic_seeded in call.op.tags or _written(call):
            continue
        if all(id(source) in constants for source in sources):
            constants |= {id(t) for t in call.outputs if not memory.changes(t)}
    return constants


def set_apart(
    calls: Sequence[Call], inputs: Iterable[Tensor], results: Iterable[Any], steady: Iterable[Tensor]
) -> tuple[list[Call], list[Call], list[Tensor]]:
    """(calls whose outcome depends on the inputs in `steady` alone, the others, what these need of the
    former)."""
    memory, returned = Memory(calls), {id(result) for result in results}
    known = {id(tensor) for tensor in steady}
    made = {id(tensor) for tensor in inputs} - known  # what is in neither is a constant
    before, others = list[Call](), list[Call]()
    for call in calls:
        sources, outputs = tensors_in(call.arguments), tensors_in(call.outputs)
        told = any(id(t) in known for t in sources) and not any(id(t) in made for t in sources)
        if told and memory.is_fixed(call) and not any(id(t) in returned for t in outputs):
            known |= {id(t) for t in outputs}
            before.append(call)
        else:
            made |= {id(t) for t in outputs}
            others.append(call)
    read = {id(t): t for call in others for t in tensors_in(call.arguments)}
    return before, others, [t for call in before for t in tensors_in(call.outputs) if id(t) in read]


def needed(calls: Sequence[Call], results: Sequence[Any], constants: set[int]) -> list[Call]:
    """The calls that write, or whose outputs something reads."""
    read = {id(result) for result in results}
    kept: list[Call] = []
    for call in reversed(calls):
        computed = [t for t in call.outputs if id(t) not in constants]
        if _written(call) or any(id(t) in read for t in computed):
            kept.append(call)
            read |= {id(tensor) for tensor in tensors_in(call.arguments)}
    return kept[::-1]
