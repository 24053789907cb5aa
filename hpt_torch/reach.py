"""What a user's classes and functions can reach: the code that they name, and the values that it reads.

Found without running anything: a function's names are looked up where it would look them up, in its module,
its closure, its classes and the user's other modules. The standard library, installed packages and hpt_torch
itself are not looked into.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 2000  # functions
_MOST_ITEMS = 1000  # of a container
_MOST_BYTES = 1 << 20  # of a tensor or an array
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.cache
def is_users(module: str | None) -> bool:
    """Whether a module of this name is the user's own."""
    top = (module or "builtins").partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return top != "hpt_torch" and not (file and str(Path(file).resolve()).startswith(_INSTALLED))


class Reach:
    """What these roots, classes, functions or instances of either, reach.

    functions, values: in the order in which they are met, under names such as ``train.Net.forward``. stored:
    the names that some function, other than ``__init__``, gives a new value.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.functions: list[tuple[str, types.FunctionType]] = []
        self.values: list[tuple[str, Any]] = []
        self.stored: set[str] = set()
        self._seen: set[int] = set()
        for root in roots:
            label = getattr(root, "__qualname__", type(root).__qualname__)
            self._visit(label, root)
            if is_users(type(root).__module__) and not isinstance(
                root, (type, types.FunctionType, nn.Module)
            ):
                for name, value in getattr(root, "__dict__", {}).items():
                    self._visit(f"{label}.{name}", value)

    def _visit(self, label: str, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(label, value)
        elif isinstance(value, type):
            self._class(label, value)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            self._visit(label, value.__func__)
        elif isinstance(value, property):
            for accessor in filter(None, (value.fget, value.fset)):
                self._visit(label, accessor)
        elif isinstance(value, functools.cached_property):
            self._visit(label, value.func)
        elif isinstance(value, functools.partial):
            self._visit(label, value.func)
            for name, one in (*enumerate(value.args), *value.keywords.items()):
                self._visit(f"{label}({name})", one)
        elif callable(value) and hasattr(value, "__wrapped__"):
            self._visit(label, value.__wrapped__)
        elif not isinstance(value, types.ModuleType):
            self.values.append((label, value))
            self._visit(type(value).__qualname__, type(value))

    def _class(self, label: str, cls: type) -> None:
        if not is_users(cls.__module__):
            if label != cls.__qualname__:
                self.values.append((label, cls))
            return
        if id(cls) in self._seen:
            return
        self._seen.add(id(cls))
        for base in cls.__mro__[:-1]:
            for name, value in vars(base).items() if is_users(base.__module__) else ():
                special = name.startswith("__") and not callable(value)
                if not special and not isinstance(value, types.MemberDescriptorType):
                    self._visit(f"{base.__qualname__}.{name}", value)

    def _function(self, label: str, function: types.FunctionType) -> None:
        if not is_users(function.__module__):
            self.values.append((label, function))
            return
        if id(function) in self._seen or len(self.functions) >= _MOST:
            return
        self._seen.add(id(function))
        own = f"{function.__module__}.{function.__qualname__}"
        self.functions.append((own, function))
        names, stored = _names(function.__code__, function.__name__ == "__init__")
        self.stored |= stored
        for name in sorted(names & function.__globals__.keys()):
            self._named(f"{function.__module__}.{name}", function.__globals__[name], names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if cell != types.CellType():
                self._named(f"{own}.{name}", cell.cell_contents, names)
        for place, value in (
            *enumerate(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).items(),
        ):
            self._visit(f"{own}({place})", value)

    def _named(self, label: str, value: Any, names: set[str]) -> None:
        """A value that a function names, and of a module or an object what it may name of that."""
        self._visit(label, value)
        if isinstance(value, types.ModuleType):
            inner: Mapping[str, Any] = vars(value) if is_users(value.__name__) else {}
        elif isinstance(value, (type, types.FunctionType, nn.Module)) or not hasattr(value, "__dict__"):
            inner = {}
        else:
            inner = vars(value)
        for name in sorted(names & inner.keys()):
            self._visit(f"{label}.{name}", inner[name])


@functools.lru_cache(maxsize=_MOST)
def _names(code: types.CodeType, is_init: bool) -> tuple[set[str], set[str]]:
    """(the names that the code and what is defined inside of it use, those that it gives a new value)."""
    kinds = {"STORE_GLOBAL", "DELETE_GLOBAL"} | (set() if is_init else {"STORE_ATTR"})
    used, stored = set[str](), set[str]()
    for inner in _codes(code):
        used |= set(inner.co_names)
        for line in dis.get_instructions(inner):
            if line.opname in kinds or (line.opname == "STORE_DEREF" and line.argval in inner.co_freevars):
                stored.add(str(line.argval))
    return used, stored


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def code_of(task: Any, sources: Iterable[Any]) -> dict[str, dict[str, str]]:
    """What a run's first event holds of the user's code. sources: the classes and functions that the task
    says decide the result; `code` has SHA-256 of their source, `reached` of all that they and the task reach.
    """
    sources = list(sources)
    code = {}
    for source in sources:
        if getattr(source, "__module__", "").partition(".")[0] == "hpt_torch":
            continue  # it is told by its version
        try:
            text = inspect.getsource(source)
        except (OSError, TypeError):
            text = "source not available"
        code[getattr(source, "__qualname__", repr(type(source)))] = _sha256(text)
    python = ".".join(map(str, sys.version_info[:2]))  # which compiles the same source to other code
    return {"code": code, "reached": {"python": python, **digests([task, *sources])}}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of what is not the same in two such events; where one has no source or was written by another
    Python, as far as can be told."""
    pairs = [(old["code"], new["code"])]
    if old.get("reached", {}).get("python") == new["reached"]["python"]:
        pairs.append((old["reached"], new["reached"]))
    return sorted({name for a, b in pairs for name in {**a, **b} if a.get(name) != b.get(name)})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digests(roots: Iterable[Any]) -> dict[str, str]:
    """SHA-256 of each function that the roots reach, as compiled, and of each value that none of them
    changes, by name. Objects that cannot be spelled out are left out."""
    reached = Reach(roots)
    texts: dict[str, list[str]] = {}
    for name, function in reached.functions:
        texts.setdefault(name, []).append(_code_text(function.__code__))
    for name, value in reached.values:
        text = None if name.rpartition(".")[2] in reached.stored else _spelled(value)
        if text is not None:
            texts.setdefault(name, []).append(text)
    return {name: _sha256("\n".join(found)) for name, found in texts.items()}


def _code_text(code: types.CodeType) -> str:
    constants = [_code_text(c) if isinstance(c, types.CodeType) else _spelled(c) for c in code.co_consts]
    parts = code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags
    return repr(parts)


def _spelled(value: Any) -> str | None:
    """The value as text that is the same in each process; None for what is none of the plain kinds."""
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_spelled(one) for one in value] if len(value) <= _MOST_ITEMS else [None]
        if None in parts:
            return None
        found = [part for part in parts if part is not None]
        return f"{type(value).__name__}{sorted(found) if isinstance(value, (set, frozenset)) else found}"
    if isinstance(value, dict):
        return _spelled(list(value.items()))
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Tensor):
        return _spelled(value.detach().cpu().numpy()) if _is_plain(value) else None
    if isinstance(value, np.ndarray):
        few = value.nbytes <= _MOST_BYTES and not value.dtype.hasobject
        return f"{value.dtype}{value.shape}{value.tobytes().hex()}" if few else None
    plain = (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type(None),
        type(...),
        np.generic,
        torch.dtype,
        torch.device,
    )
    return repr(value) if isinstance(value, plain) else None


def _is_plain(tensor: Tensor) -> bool:
    few = tensor.numel() * tensor.element_size() <= _MOST_BYTES
    return few and tensor.layout is torch.strided and tensor.dtype is not torch.bfloat16
