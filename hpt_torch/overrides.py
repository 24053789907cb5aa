"""``key=value`` overrides of a recipe, as the command line takes them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from hpt_torch.types import Problem


def apply_overrides(
    raw: Mapping[str, Any], overrides: Sequence[str], *, sections: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """``search.trials=20``, ``seed=1``, ``space.lr={float=[…]}``; a bare name that is no field of the recipe
    is a hyperparameter: ``lr=0.01`` fixes it and takes it out of the space."""
    data: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        parts = key.split(".")
        if not equals or not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", part) for part in parts):
            problems.append(
                Problem(repr(override)[:200], "an override must look like search.trials=20 or lr=0.01")
            )
            continue
        if len(parts) == 1 and parts[0] not in sections:
            parts = ["hparams", *parts]
        if len(parts) > 2:
            problems.append(Problem(key[:200], "an override names a field or section.field"))
            continue
        if len(parts) == 2 and parts[0] in ("name", "seed", "executor"):
            problems.append(Problem(key, f"{parts[0]} is not a table"))
            continue
        table = data
        if len(parts) == 2:
            table = data.setdefault(parts[0], {})
            if not isinstance(table, dict):
                problems.append(Problem(key, f"{parts[0]} is not a table"))
                continue
        table[parts[-1]] = toml_value(text.strip())
        other = {"hparams": "space", "space": "hparams"}.get(parts[0])
        if other and len(parts) == 2 and isinstance(data.get(other), dict):
            data[other].pop(parts[1], None)
    return data, problems


def toml_value(text: str) -> Any:
    """A value as TOML reads it; a bare word is a text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if set(parsed) == {"value"} else text
