"""What a user's classes and functions can reach: the code that they name, and the values that it reads.

Found without running anything: a function's names are looked up where it would look them up, in its module,
its closure, its classes and the user's other modules. The standard library, installed packages and hpt_torch
itself are not looked into.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 2000  # functions
_MOST_ITEMS = 1000  # of a container
_MOST_BYTES = 1 << 18  # of a tensor or an array
_CODE = (types.FunctionType, types.MethodType, type, functools.partial)
_OF_MODULES = frozenset(vars(nn.Module()))
_INSTALLED = tuple(
    Path(folder).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (folder := sysconfig.get_path(name))
)


@functools.cache
def is_users(module: str | None) -> bool:
    """Whether a module of this name is the user's own."""
    top = (module or "builtins").partition(".")[0]
    if top == "hpt_torch" or (top in sys.stdlib_module_names and top != "__main__"):
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if not file:
        return True
    path = Path(file).resolve()
    installed = {"site-packages", "dist-packages"}.intersection(path.parts)
    return not installed and not any(path.is_relative_to(folder) for folder in _INSTALLED)


class Reach:
    """What these roots, classes, functions or instances of either, reach.

    functions, values: in the order in which they are met, under names such as ``train.Net.forward``.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.functions: list[tuple[str, types.FunctionType]] = []
        self.values: list[tuple[str, Any]] = []
        self._stored, self._read = set[str](), set[str]()  # names of attributes and globals
        self._seen: dict[int, Any] = {}  # keeps them, so that their ids stay theirs
        self._waiting: deque[tuple[str, Any]] = deque()
        roots = list(roots)
        for root in roots:
            self._waiting.append((getattr(root, "__qualname__", type(root).__qualname__), root))
            if isinstance(root, nn.Module):
                own = [v for n, v in vars(root).items() if n not in _OF_MODULES or n.endswith("_hooks")]
                self._waiting += [(type(root).__qualname__, one) for one in _code_in(own)]
        self._walk()
        for root in roots:
            if is_users(type(root).__module__) and not isinstance(root, (*_CODE, nn.Module)):
                kept = {n: v for n, v in getattr(root, "__dict__", {}).items() if n in self._read}
                self._waiting += [(f"{type(root).__qualname__}.{name}", v) for name, v in kept.items()]
        self._walk()

    def is_settled(self, name: str) -> bool:
        """Whether no function that is reached gives a new value to what is called so."""
        return name.rpartition(".")[2] not in self._stored

    def _walk(self) -> None:
        while self._waiting:
            label, value = self._waiting.popleft()
            with contextlib.suppress(
                Exception
            ):  # of an object that minds being looked at, such as a dead proxy
                self._visit(label, value)

    def _visit(self, label: str, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(label, value)
        elif isinstance(value, type):
            self._class(label, value)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            self._waiting.append((label, value.__func__))
        elif isinstance(value, property):
            self._waiting += [(label, accessor) for accessor in (value.fget, value.fset) if accessor]
        elif isinstance(value, functools.cached_property):
            self._waiting.append((label, value.func))
        elif isinstance(value, functools.partial):
            self._waiting.append((label, value.func))
            given = (*enumerate(value.args), *value.keywords.items())
            self._waiting += [(f"{label}({name})", one) for name, one in given]
        elif (wrapped := _wrapped(value)) is not None:
            self._waiting.append((label, wrapped))
        elif not isinstance(value, types.ModuleType):
            self.values.append((label, value))
            self._waiting.append((type(value).__qualname__, type(value)))
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._waiting += [(label, one) for one in _code_in([value])]

    def _class(self, label: str, cls: type) -> None:
        if not is_users(cls.__module__):
            if label != cls.__qualname__:
                self.values.append((label, cls))
            return
        if id(cls) in self._seen:
            return
        self._seen[id(cls)] = cls
        for base in cls.__mro__[:-1]:
            for name, value in vars(base).items() if is_users(base.__module__) else ():
                special = name.startswith(("__", "_abc_")) and not callable(value)
                if not special and not isinstance(
                    value, (types.MemberDescriptorType, types.GetSetDescriptorType)
                ):
                    self._waiting.append((f"{base.__qualname__}.{name}", value))

    def _function(self, label: str, function: types.FunctionType) -> None:
        if not is_users(function.__module__):
            self.values.append((label, function))
            return
        if id(function) in self._seen or len(self.functions) >= _MOST:
            return
        self._seen[id(function)] = function
        own, names = f"{function.__module__}.{function.__qualname__}", _names(function.__code__)
        self.functions.append((own, function))
        if function.__name__ != "__init__":
            self._read |= names.attributes
            self._stored |= names.stored_attributes
        self._stored |= names.stored
        for name in sorted(names.of_module & function.__globals__.keys()):
            self._named(f"{function.__module__}.{name}", function.__globals__[name], names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if cell != types.CellType():
                self._named(f"{own}.{name}", cell.cell_contents, names)
        for place, value in (
            *enumerate(function.__defaults__ or ()),
            *(function.__kwdefaults__ or {}).items(),
        ):
            self._waiting.append((f"{own}({place})", value))

    def _named(self, label: str, value: Any, names: _Names) -> None:
        """A value that a function names, and of a module, an object or a dictionary what it names of that."""
        self._waiting.append((label, value))
        if isinstance(value, types.ModuleType):
            inner: Mapping[Any, Any] = vars(value) if is_users(value.__name__) else {}
            wanted = names.attributes
        elif type(value) is dict:
            inner, wanted = value, set() if names.writes_items else names.texts
        elif isinstance(value, (*_CODE, nn.Module)):
            return
        else:
            inner, wanted = getattr(value, "__dict__", {}), names.attributes
        for name in sorted(wanted & inner.keys()):
            self._waiting.append((f"{label}.{name}", inner[name]))


def _wrapped(value: Any) -> types.FunctionType | None:
    """The function in what `functools.wraps` was used on, such as a cache."""
    if isinstance(value, nn.Module) or not callable(value):
        return None
    found = inspect.getattr_static(value, "__wrapped__", None)  # a proxy would make one up
    return found if isinstance(found, types.FunctionType) else None


def _code_in(values: Iterable[Any]) -> list[Any]:
    """The functions and classes among these, and in containers among them."""
    found = []
    for value in values:
        if isinstance(value, _CODE):
            found.append(value)
        elif isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) <= _MOST_ITEMS:
            found += [one for one in _items(value) if isinstance(one, _CODE)]
    return found


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


@dataclass(frozen=True)
class _Names:
    """What a function's code, and what is defined inside of it, names."""

    of_module: set[str]
    attributes: set[str]
    texts: set[str]  # constants
    stored: set[str]  # globals, and what an enclosing function has
    stored_attributes: set[str]
    writes_items: bool


@functools.lru_cache(maxsize=_MOST)
def _names(code: types.CodeType) -> _Names:
    by_kind: dict[str, set[str]] = defaultdict(set)
    texts = set[str]()
    for inner in _codes(code):
        texts |= {constant for constant in inner.co_consts if isinstance(constant, str)}
        for line in dis.get_instructions(inner):
            if line.opname != "STORE_DEREF" or line.argval in inner.co_freevars:
                by_kind[line.opname].add(str(line.argval))
    return _Names(
        of_module=by_kind["LOAD_GLOBAL"] | by_kind["LOAD_NAME"] | by_kind["STORE_GLOBAL"],
        attributes=by_kind["LOAD_ATTR"] | by_kind["LOAD_METHOD"] | by_kind["STORE_ATTR"],
        texts=texts,
        stored=by_kind["STORE_GLOBAL"] | by_kind["DELETE_GLOBAL"] | by_kind["STORE_DEREF"],
        stored_attributes=by_kind["STORE_ATTR"],
        writes_items="STORE_SUBSCR" in by_kind or "DELETE_SUBSCR" in by_kind,
    )


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


def _sha256(what: str | bytes) -> str:
    return hashlib.sha256(what.encode() if isinstance(what, str) else what).hexdigest()


def digests(roots: Iterable[Any]) -> dict[str, str]:
    """SHA-256 of each function that the roots reach, as compiled, and of each plain value that none of them
    changes, by name. Lists and other objects, which anything may change, are left out."""
    reached = Reach(roots)
    texts: dict[str, list[str]] = {}
    for name, function in reached.functions:
        texts.setdefault(name, []).append(_code_text(function.__code__))
    for name, value in reached.values:
        text = _spelled(value) if reached.is_settled(name) else None
        if text is not None:
            texts.setdefault(name, []).append(text)
    return {name: _sha256("\n".join(found)) for name, found in texts.items()}


def _code_text(code: types.CodeType) -> str:
    constants = [_code_text(c) if isinstance(c, types.CodeType) else _spelled(c) for c in code.co_consts]
    parts = code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags
    return repr(parts)


def _spelled(value: Any) -> str | None:
    """The value as text that is the same in each process; None for what is none of the plain kinds."""
    if isinstance(value, (tuple, frozenset)):
        parts = [_spelled(one) for one in value] if len(value) <= _MOST_ITEMS else [None]
        if None in parts:
            return None
        found = [part for part in parts if part is not None]
        return f"{type(value).__name__}{sorted(found) if isinstance(value, frozenset) else found}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Tensor):
        try:
            return _spelled(value.detach().resolve_conj().resolve_neg().cpu().numpy())
        except Exception:  # of a kind that NumPy has not
            return None
    if isinstance(value, np.ndarray):
        few = value.nbytes <= _MOST_BYTES and not value.dtype.hasobject
        return f"{value.dtype}{value.shape}{_sha256(value.tobytes())}" if few else None
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
