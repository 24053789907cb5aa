"""What a hyperparameter needs beside it to be read at all: momentum needs sgd, step_gamma the step schedule.

A run that searches the optimizer records the defaults of all of them. A recipe made from it that has fewer
optimizers, or one, must leave out what none of those reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hpt_torch.hparams import AUGMENTATION, REGRESSION, TRAINING, by_name

_SPECS = by_name((*TRAINING, *REGRESSION, *AUGMENTATION))


def lost_need(
    name: str, searched: Collection[str], possible: Callable[[str, Any], bool]
) -> tuple[str, Sequence[Any]] | None:
    """What this hyperparameter needs, and the values of it that would do, where that was searched before and
    none of them is possible now; else None."""
    needs = _SPECS[name].needs if name in _SPECS else None
    for parent, values in (needs or {}).items():
        if parent in searched and not any(possible(parent, value) for value in values):
            return parent, values
    return None


def still_read(
    hparams: Mapping[str, Any], searched: Collection[str], possible: Callable[[str, Any], bool] | None = None
) -> dict[str, Any]:
    """Those hyperparameters without the ones that have lost what they need; possible: by default, what they
    are themselves."""

    def holds(parent: str, value: Any) -> bool:
        return bool(hparams.get(parent, _SPECS[parent].default) == value)

    return {n: value for n, value in hparams.items() if lost_need(n, searched, possible or holds) is None}
