"""A function of tensors as one program of torch.compile's back end, for the CPU or CUDA.

What is compiled is what `traced.record` saw, not Python code: nothing can fall back to slow code in silence,
and nothing is guarded or compiled again at a call.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_unflatten

from hpt_torch.trainers.operations import STATISTICS
from hpt_torch.trainers.traced import Flat, flat, record

_aten = torch.ops.aten
# Batch norm that says that it writes into the running statistics: what does not say so (`STATISTICS`) may
# lose them on its way through the compiler.
_NORM = _aten._native_batch_norm_legit.default


@functools.cache
def missing(device: str) -> str | None:
    """What this machine lacks to compile for devices of this type, and the remedy; None: nothing."""
    if device == "cuda":
        from torch.utils._triton import has_triton_package

        # (`has_triton` asks the device, too, and after that no worker could be forked for it.)
        if not has_triton_package():
            return "torch.compile needs Triton on CUDA; pip install triton"
    elif device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            compiler = get_cpp_compiler()
        except Exception as error:  # of a kind that has changed its name between versions
            compiler, why = "", str(error).strip().partition("\n")[0]
        else:
            why = f"{compiler} is not on the PATH"
        if not shutil.which(compiler):
            return (
                f"torch.compile needs a C++ compiler on the CPU ({why}); install g++ (build-essential, Xcode "
                "command line tools)"
            )
    else:
        return f"torch.compile is not used on {device}"
    return None


@contextlib.contextmanager
def nothing_cached(device: torch.device) -> Iterator[None]:
    """Within it, what is compiled is compiled anew, but for what every program needs."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        recorded, _ = record(lambda x: x + 1, torch.ones(64, device=device))
        assert recorded is not None
        compiled(recorded)  # g++ reads torch's headers once
        yield


def compiled(recorded: Flat) -> Callable[..., Any]:
    """The recorded function, compiled for arguments of the shapes that it was recorded with."""
    # autograd counts the devices at its first use, and whoever forks after it has started threads for one
    # cannot train any more: it must not count those that torch.compile registers and that are not there.
    torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    # It warns that there is a CUDA toolkit and no CUDA device.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile as compile_graph
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    module, constants = _graph(recorded)
    # Without a shape environment, which Dynamo would have set up, nothing is looked up in the cache on disk.
    fake = FakeTensorMode(shape_env=ShapeEnv())
    inputs: list[Any] = [fake.from_tensor(t, static_shapes=True) for t in (*recorded.inputs, *constants)]
    with warnings.catch_warnings(), tracing(TracingContext(fake)):
        warnings.simplefilter("ignore")  # advice on settings that the recipe decides
        run = compile_graph(module, inputs, options=_options(inputs[0].device))
    spec = recorded.spec

    def program(*arguments: Tensor | dict[str, Tensor]) -> Any:
        return tree_unflatten(list(run(*flat(arguments), *constants)), spec)

    return program


def _options(device: torch.device) -> dict[str, Any]:
    from torch._inductor import config

    options: dict[str, Any] = {"compile_threads": 1}  # a pool of processes costs more than it saves
    if device.type == "cpu":
        options["cpp.threads"] = torch.get_num_threads()  # sums depend on it, so what is cached must
    if hasattr(config, "deterministic"):
        options["deterministic"] = True  # nothing is chosen by timing
    return options


def _graph(recorded: Flat) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The operations as a graph, and the tensors that it takes after the recorded inputs."""
    graph = torch.fx.Graph()
    nodes: dict[int, Any] = {}
    produced = {id(t) for call in recorded.calls for t in call.outputs}
    constants: list[Tensor] = []

    for i, tensor in enumerate(recorded.inputs):
        nodes[id(tensor)] = graph.placeholder(f"a{i}")

    def see(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) not in nodes and id(leaf) not in produced:
            nodes[id(leaf)] = graph.placeholder(f"c{len(constants)}")
            constants.append(leaf.detach().clone())  # what shares memory is compiled with care, and slowly
        return leaf

    def node(leaf: Any) -> Any:
        return nodes[id(leaf)] if isinstance(leaf, Tensor) else leaf

    for call in recorded.calls:
        tree_map(see, call.arguments)
    tree_map(see, recorded.results)
    for call in recorded.calls:
        args, kwargs = tree_map(node, call.arguments)
        told = call.op in STATISTICS and args[3] is not None
        made = graph.call_function(_NORM if told else call.op, tuple(args), kwargs)
        for i, output in enumerate(call.outputs):
            if told and i == 3:  # cuDNN's scratch for the way back, which the compiler takes without
                part = graph.call_function(_aten.new_zeros.default, (args[0], [0]), {"dtype": output.dtype})
            else:
                part = made if call.single else graph.call_function(operator.getitem, (made, i))
            nodes.setdefault(id(output), part)
    graph.output(tuple(node(result) for result in recorded.results))
    return torch.fx.GraphModule(torch.nn.Module(), graph), constants
