"""What is trained: the `Task` base class, and what a model factory's signature says.

A task is written for one member. It gives a model, data, a loss and metrics; trainers do the rest, one
member after another or a whole population at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hpt_torch.data import Data
from hpt_torch.hparams import MODEL, TRAINING, HParamSpec, by_name
from hpt_torch.types import HParams, Objective, TaskError

GIVEN = ("input_shape", "out_features", "vocabulary")  # constructor arguments that come from the data

Batch = Mapping[str, Tensor]


class Task:
    """Subclass this to bring your own training. Every method sees one member and one batch.

    A batch is a mapping of tensors with B rows, as `Data.train` names them (`inputs`, `targets`).

    >>> import torch, hpt_torch as hpt
    >>> class Slope(hpt.Task):
    ...     objective = hpt.Objective(metric="valid/error", direction="minimize")
    ...     def data(self):
    ...         rows = hpt.Rows({"inputs": torch.linspace(0, 1, 8).unsqueeze(1)})
    ...         return hpt.Data(train=rows, valid=rows)
    ...     def build_model(self, hparams):
    ...         return torch.nn.Linear(1, 1)
    ...     def loss(self, model, batch, hparams):
    ...         return (model(batch["inputs"]) - 2 * batch["inputs"]).square().mean()
    ...     def metrics(self, model, batch):
    ...         return {"sum": (model(batch["inputs"]) - 2 * batch["inputs"]).abs().sum()}
    ...     def finalize(self, sums):
    ...         return {"error": float(sums["sum"]) / 8}
    >>> result = hpt.tune(Slope(), {"lr": hpt.Float(0.01, 1.0)}, trials=3, epochs=2, progress=False)
    >>> len(result.trials)
    3
    """

    name: str = "task"
    objective: Objective
    metric_names: Sequence[str] | None = None  # what `finalize` gives; None: not known beforehand
    rate_hparams: frozenset[str] = frozenset()  # arguments of the model that only are rates of dropout

    def data(self) -> Data:
        """The data set. Called once; must be the same at every call."""
        raise TypeError(f"{type(self).__name__} must define data()")

    def build_model(self, hparams: HParams) -> nn.Module:
        """A new model. Raise InfeasibleError where these hyperparameters allow none."""
        raise TypeError(f"{type(self).__name__} must define build_model(hparams)")

    def loss(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any]) -> Tensor:
        """What is minimised, shape (): a mean over the batch. Dynamic hparams are tensors of shape ().

        ``hparams["noise_key"]``, an int32 tensor of shape (), is another one for every batch of every epoch:
        for noise that is to be the same when the step is repeated.
        """
        raise TypeError(f"{type(self).__name__} must define loss(model, batch, hparams)")

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the batch, of any fixed shape; `finalize` gets them added up over all batches.

        A name that begins with ``each_`` is not added up: its rows are put one after another.
        """
        raise TypeError(f"{type(self).__name__} must define metrics(model, batch)")

    def finalize(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        """The metrics (such as ``{"accuracy": 0.97}``) of a whole split from its sums."""
        raise TypeError(f"{type(self).__name__} must define finalize(sums)")

    def hparam_specs(self) -> dict[str, HParamSpec]:
        """Every hyperparameter that the task knows; others are refused by name."""
        return by_name(TRAINING)

    @property
    def dynamic_hparams(self) -> frozenset[str]:
        return frozenset(name for name, spec in self.hparam_specs().items() if spec.dynamic)

    @property
    def buffer_hparams(self) -> frozenset[str]:
        """The dynamic ones that a model keeps as buffers of the same name."""
        return self.dynamic_hparams - self.rate_hparams

    def build_marked(self, hparams: HParams) -> nn.Module:
        """As `build_model`, with a `models.rates.Rate` for each of `rate_hparams`."""
        return self.build_model(hparams)

    def why_not_together(self, hparams: HParams) -> str | None:
        """Why models with these static hyperparameters cannot train as one program; None: not known."""
        return None

    def sources(self) -> Sequence[Any]:
        """Classes and functions whose code decides the result; a changed one is noticed on resume."""
        return (type(self),)


def model_specs(factory: Callable[..., Any]) -> dict[str, HParamSpec]:
    """The hyperparameters that a model factory's signature names."""
    known, dynamic = by_name(MODEL), frozenset(getattr(factory, "dynamic_hparams", ()))
    specs = {}
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.name in GIVEN or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TaskError(f"{factory!r}: argument {parameter.name!r} must be allowed as a keyword")
        base = known.get(parameter.name, HParamSpec(name=parameter.name, type="any"))
        required = parameter.default is parameter.empty
        specs[parameter.name] = dataclasses.replace(
            base,
            default=None if required else parameter.default,
            required=required,
            dynamic=parameter.name in dynamic,
        )
    clash = sorted(set(specs) & {spec.name for spec in TRAINING})
    if clash:
        raise TaskError(
            f"{factory!r}: argument {clash[0]!r} is the name of a training hyperparameter; rename it"
        )
    missing = sorted(dynamic - set(specs))
    if missing:
        raise TaskError(f"{factory!r}: dynamic_hparams names {missing[0]!r}, which is no argument of it")
    return specs


def resolve(name: str, allow_import: Sequence[str]) -> Any:
    """The object at "module:attribute". Raises TaskError unless the module was allowed by name."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise TaskError(f"must look like module:factory, got {name!r}")
    if not any(module_name == allowed or module_name.startswith(f"{allowed}.") for allowed in allow_import):
        raise TaskError(
            f"would import {module_name!r}, and a recipe may run only code that you name; "
            f"if you trust it, add --allow-import {module_name}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise TaskError(f"cannot import {module_name!r}: {error}") from error
    if not hasattr(module, attribute):
        raise TaskError(f"module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)
