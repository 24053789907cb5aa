"""What is trained: the `Task` base class, the built-in tasks, and how recipes name them.

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

from hpt_torch import metrics as m
from hpt_torch.data import DATASETS, Data
from hpt_torch.hparams import CLASSIFICATION, MODEL, TRAINING, HParamSpec, by_name
from hpt_torch.models import MLP
from hpt_torch.types import HParams, InfeasibleError, Objective, TaskError

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP}
_GIVEN = ("input_shape", "out_features")  # constructor arguments that come from the data

Batch = Mapping[str, Tensor]


class Task:
    """Subclass this to bring your own training. Every method sees one member and one batch.

    A batch is a mapping of tensors with B rows, as `Data.train` names them (`inputs`, `targets`).
    """

    name: str = "task"
    objective: Objective

    def data(self) -> Data:
        """The data set. Called once; must be the same at every call."""
        raise TypeError(f"{type(self).__name__} must define data()")

    def build_model(self, hparams: HParams) -> nn.Module:
        """A new model. Raise InfeasibleError where these hyperparameters allow none."""
        raise TypeError(f"{type(self).__name__} must define build_model(hparams)")

    def loss(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any]) -> Tensor:
        """What is minimised, shape (): a mean over the batch. Dynamic hparams are tensors of shape ()."""
        raise TypeError(f"{type(self).__name__} must define loss(model, batch, hparams)")

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the batch, each of shape (); `finalize` gets them added up over all batches."""
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

    def sources(self) -> Sequence[Any]:
        """Classes and functions whose code decides the result; a changed one is noticed on resume."""
        return (type(self),)


class Classification(Task):
    """One of `data.out_features` classes; cross-entropy; scored by accuracy on the valid rows.

    model: a factory, called with the hyperparameters that its signature names (and with `input_shape` and
    `out_features` where it names those). Its keyword defaults are the hyperparameters' defaults. The
    attribute `dynamic_hparams`, if it has one, names those that it keeps as buffers of the same name.
    """

    objective = Objective(metric="valid/accuracy", direction="maximize")

    def __init__(self, model: Callable[..., nn.Module], data: Data) -> None:
        if not callable(model) or isinstance(model, nn.Module):
            raise TaskError(
                f"model must be a factory (a class or function that returns a new nn.Module), got {model!r}; "
                "pass the class, or a lambda that builds it"
            )
        if not isinstance(data, Data):
            raise TaskError(
                f"data must be a hpt_torch.Data, got {type(data).__name__}; make one with hpt_torch.split"
            )
        self._factory, self._data = model, data
        self._model_specs = model_specs(model)
        self.name = f"{getattr(model, '__name__', type(model).__name__)}-{data.name}"

    def data(self) -> Data:
        return self._data

    def hparam_specs(self) -> dict[str, HParamSpec]:
        return by_name((*TRAINING, *CLASSIFICATION, *self._model_specs.values()))

    def build_model(self, hparams: HParams) -> nn.Module:
        arguments: dict[str, Any] = {name: hparams[name] for name in self._model_specs if name in hparams}
        parameters = inspect.signature(self._factory).parameters
        given = {"input_shape": self._data.input_shape, "out_features": self._data.out_features}
        arguments.update({name: given[name] for name in _GIVEN if name in parameters})
        try:
            return self._factory(**arguments)
        except ValueError as error:
            raise InfeasibleError(str(error)) from error

    def loss(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any]) -> Tensor:
        return m.cross_entropy(model(batch["inputs"]), batch["targets"], hparams["label_smoothing"])

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return m.classification_sums(model(batch["inputs"]), batch["targets"])

    def finalize(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return m.classification_metrics(sums)

    def sources(self) -> Sequence[Any]:
        return (type(self), self._factory)


def model_specs(factory: Callable[..., Any]) -> dict[str, HParamSpec]:
    """The hyperparameters that a model factory's signature names."""
    known, dynamic = by_name(MODEL), frozenset(getattr(factory, "dynamic_hparams", ()))
    specs = {}
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.name in _GIVEN or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
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
    clash = sorted(set(specs) & {spec.name for spec in (*TRAINING, *CLASSIFICATION)})
    if clash:
        raise TaskError(
            f"{factory!r}: argument {clash[0]!r} is the name of a training hyperparameter; rename it"
        )
    missing = sorted(dynamic - set(specs))
    if missing:
        raise TaskError(f"{factory!r}: dynamic_hparams names {missing[0]!r}, which is no argument of it")
    return specs


# -- recipes -------------------------------------------------------------------------------------------


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


def from_names(
    *,
    kind: str,
    model: str,
    data: str,
    valid_fraction: float,
    holdout_fraction: float,
    seed: int,
    allow_import: Sequence[str] = (),
) -> Task:
    """The task a recipe names. Raises TaskError whose text begins with the field."""
    if ":" in kind:
        task = _resolved("kind", kind, allow_import)()
        if not isinstance(task, Task):
            raise TaskError(f"task.kind: {kind} must give a hpt_torch.Task, gave {type(task).__name__}")
        return task
    if kind != "classification":
        raise TaskError(f"task.kind: must be classification or module:factory, got {kind!r}")
    if ":" in data:
        made = _resolved("data", data, allow_import)()
    elif data in DATASETS:
        made = DATASETS[data](valid_fraction=valid_fraction, holdout_fraction=holdout_fraction, seed=seed)
    else:
        raise TaskError(f"task.data: must be {', '.join(DATASETS)} or module:factory, got {data!r}")
    if not isinstance(made, Data):
        raise TaskError(f"task.data: {data} must give a hpt_torch.Data, gave {type(made).__name__}")
    if ":" not in model and model not in MODELS:
        raise TaskError(f"task.model: must be {', '.join(MODELS)} or module:factory, got {model!r}")
    factory = _resolved("model", model, allow_import) if ":" in model else MODELS[model]
    return Classification(factory, made)


def _resolved(field: str, name: str, allow_import: Sequence[str]) -> Any:
    try:
        return resolve(name, allow_import)
    except TaskError as error:
        raise TaskError(f"task.{field}: {error}") from error
