"""Bodies of events as text, and back: JSON, which has no NaN and no infinity: they are {"float": "nan"}."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from hpt_torch.space import thaw

_write = functools.partial(json.dumps, separators=(",", ":"), allow_nan=False)


def encoded(body: Mapping[str, Any]) -> str:
    try:
        return _write(body)
    except (TypeError, ValueError):  # a mapping that is no dict, a number that is not finite
        return _write(_plain(body))


def decoded(text: str) -> Any:
    return json.loads(text, object_hook=_revived)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in thaw(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _revived(found: dict[str, Any]) -> Any:
    text = found.get("float") if len(found) == 1 else None
    return float(text) if isinstance(text, str) else found
