"""scikit-learn's own data sets: on every machine, no download."""

from __future__ import annotations

from sklearn.datasets import load_digits

from hpt_torch.data.base import Data, split


def digits(*, valid_fraction: float = 0.2, holdout_fraction: float = 0.2, seed: int = 0) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels (UCI, via scikit-learn), standardised on the train rows."""
    inputs, targets = load_digits(return_X_y=True)
    return split(
        inputs,
        targets,
        valid_fraction=valid_fraction,
        holdout_fraction=holdout_fraction,
        standardise=True,
        seed=seed,
        name="digits",
    )
