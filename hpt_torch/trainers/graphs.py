"""Compiled steps as CUDA graphs: an epoch is one replay a step, without a word between host and device.

A graph works on tensors at fixed addresses: a population's state is copied there when an epoch begins, and
back when it ends. Which rows, noise keys and learning rates a step takes, it looks up itself in tables of the
epoch, by a counter on the device.
"""

# P members, S steps of an epoch, B rows of a batch, K factors, A parts of a batch, L stateless layers

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpt_torch.data import Rows
from hpt_torch.trainers import traced
from hpt_torch.trainers.compiled import CompiledStack


@dataclass(frozen=True)
class Graph:
    """A captured step. arguments: of `GraphedStack.advance`, whose tensors it reads and writes."""

    replay: Callable[[], None]
    arguments: tuple[Any, ...]
    grads: dict[str, Tensor]  # of the step that was replayed last


class GraphedStack(CompiledStack):
    """Members whose steps are replayed."""

    def read(self, order: Tensor, size: int, start: int) -> Iterable[tuple[int, dict[str, Tensor]]]:
        """Only the numbers of the batches: their rows are looked up on the device."""
        train = self.trainer.data.train
        assert isinstance(train, Rows)
        state = self.params, self.buffers, self.slots, self.sums
        own = {**self.h, "clipping": self.clipping_P}
        place = torch.full((1,), start, dtype=torch.int64, device=self.trainer.device)
        tables = self.factors_SKP, self.keys_SAL, order.view(-1, size), place
        arguments = *state, own, *tables, dict(train.tensors)
        key = "graph", self.key(train.slice(0, size)), self.batches
        if key not in self.trainer.compiled:
            self.trainer.hold(key, self._captured(arguments))
        self.graph = self.trainer.compiled[key]
        fixed = self.graph.arguments
        for there, here in zip(traced.flat(fixed[:-1]), traced.flat(arguments[:-1]), strict=True):
            there.copy_(here)
        self.params, self.buffers, self.slots, self.sums = fixed[:4]
        self.groups |= dict(zip(("params", "buffers", "slots", "sums"), fixed, strict=False))
        self._whole = False  # the population has to be told
        return ((index, {}) for index in range(start, self.batches))

    def step(self, batch: Mapping[str, Tensor], index: int) -> None:
        self.graph.replay()
        self._count(self.graph.grads, index)

    def advance(
        self,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        slots: dict[str, Tensor],
        sums: dict[str, Tensor],
        own: dict[str, Tensor],
        factors_SKP: Tensor,
        keys_SAL: Tensor,
        order_SB: Tensor,
        place: Tensor,
        rows: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """`whole` of the step at `place`, shape (1,), which then is the next."""
        factors_KP, keys_AL, order_B = (
            table.index_select(0, place).squeeze(0) for table in (factors_SKP, keys_SAL, order_SB)
        )
        grads = self.whole(params, buffers, slots, sums, own, factors_KP, keys_AL, Rows(rows).select(order_B))
        place += 1
        return grads

    def _captured(self, arguments: tuple[Any, ...]) -> Graph:
        """The graph, on copies of the arguments."""
        *changing, rows = arguments
        fixed = tuple(_copy(argument) for argument in changing)
        program = self.program(self.advance, (*fixed, rows))
        return capture(lambda: program(*fixed, rows), (*fixed, rows))


def capture(step: Callable[[], dict[str, Tensor]], arguments: tuple[Any, ...]) -> Graph:
    """The step as a CUDA graph. It runs a few times for it."""
    place = arguments[-2]
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # what kernels ask for at their first call, they cannot within a graph
        for _ in range(2):
            place.zero_()
            step()
        place.zero_()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = step()
    return Graph(graph.replay, arguments, grads)


def _copy(argument: Any) -> Any:
    if isinstance(argument, dict):
        return {name: tensor.clone() for name, tensor in argument.items()}
    return argument.clone()
