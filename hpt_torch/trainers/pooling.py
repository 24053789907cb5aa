"""ReLU and max pooling, which change places where a model has the ReLU first: the same bits, by less work.

The largest of some numbers, or 0, is 0 or the largest of them; so the ReLU need see only what the pooling
leaves, a quarter with the usual windows, and its gradient alike. (Of a window without a positive number the
pooling may keep another one then, but the ReLU lets no gradient through to any of them.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hpt_torch.trainers.operations import Call, Memory, layout, tensors_in

_aten = torch.ops.aten
_RELU = frozenset({_aten.relu.default, _aten.relu_.default})
_MASK = _aten.threshold_backward.default
_POOL = {  # forward and backward
    _aten.max_pool2d_with_indices.default: _aten.max_pool2d_with_indices_backward.default,
    _aten.max_pool3d_with_indices.default: _aten.max_pool3d_with_indices_backward.default,
}


def pool_first(calls: Sequence[Call], results: Iterable[Any]) -> list[Call]:
    """The calls, in which every ReLU whose result only max pooling sees comes behind that pooling."""
    changed, returned = list(calls), {id(result) for result in results}
    for relu in [call for call in calls if call.op in _RELU]:
        changed = _swapped(changed, next(i for i, call in enumerate(changed) if call is relu), returned)
    return changed


def _swapped(calls: list[Call], at: int, returned: set[int]) -> list[Call]:
    """The calls with the ReLU at this place behind the pooling; as they are where anything would show it."""
    (x,), (positive,) = calls[at].arguments[0], calls[at].outputs
    readers = defaultdict[int, list[int]](list)  # by a tensor's id: the places of the calls that read it
    for i in range(at + 1, len(calls)):
        for key in {id(tensor) for tensor in tensors_in(calls[i].arguments)}:
            readers[key].append(i)
    reading = readers[id(positive)]
    if not reading or calls[reading[0]].op not in _POOL:
        return calls
    pool = calls[reading[0]]
    largest, indices = pool.outputs
    unseen, read_by = [positive, indices], [reading[0]]
    if backward := readers[id(indices)]:
        gradient = calls[backward[0]]
        masks = readers[id(gradient.outputs[0])]
        if len(backward) > 1 or gradient.op is not _POOL[pool.op] or len(masks) != 1:
            return calls
        mask = calls[masks[0]]
        if mask.op is not _MASK or mask.arguments[0][1] is not positive or mask.arguments[0][2] != 0:
            return calls
        unseen += gradient.outputs
        read_by += [backward[0], masks[0]]
        if layout(mask.outputs[0]) != layout(gradient.outputs[0]):
            return calls
    memory = Memory(calls[:at] + calls[at + 1 :])
    if (
        reading != read_by
        or layout(x) != layout(positive)
        or any(map(memory.changes, (x, positive, largest)))
        or returned & {id(tensor) for tensor in unseen}
    ):
        return calls
    before, after = torch.empty_like(largest), {}
    (_, *window), named = pool.arguments
    after[reading[0]] = [
        Call(pool.op, ((x, *window), named), [before, indices], single=False),
        Call(_aten.relu.default, ((before,), {}), [largest], single=True),
    ]
    if backward:
        (given, _, *window), named = gradient.arguments
        masked = torch.empty_like(given)
        after[backward[0]] = [
            Call(_MASK, ((given, largest, 0), {}), [masked], single=True),
            Call(gradient.op, ((masked, x, *window), named), mask.outputs, single=True),
        ]
        after[masks[0]] = []
    after[at] = []
    return [new for i, call in enumerate(calls) for new in after.get(i, [call])]
