"""The built-in tasks (classification, regression, reconstruction), and how recipes name a task."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hpt_torch import hparams as h
from hpt_torch import metrics as m
from hpt_torch.data import DATASETS, Data, Rows
from hpt_torch.hparams import HParamSpec, by_name
from hpt_torch.models import CNN, MLP, RNN, Autoencoder, Linear
from hpt_torch.models.augment import augment
from hpt_torch.models.rates import Rate, is_rate, kept_in
from hpt_torch.seeding import bookmark, torch_seeded
from hpt_torch.task import GIVEN, Batch, Task, model_specs, resolve
from hpt_torch.trainers.draws import watching
from hpt_torch.types import HParams, InfeasibleError, Objective, TaskError

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "rnn": RNN,
    "autoencoder": Autoencoder,
    "linear": Linear,
}


class Supervised(Task):
    """What the built-in tasks share: a model factory, data, and the metrics that are wanted.

    model: called with the hyperparameters that its signature names (and with `input_shape`, `out_features`
    and `vocabulary` where it names those). Its keyword defaults are the hyperparameters' defaults. One that
    only is a rate of dropout is dynamic. The attribute `dynamic_hparams`, if the model has
    one, names those that are instead: it keeps them as buffers of the same name. Where the data has
    `lengths`, they are the model's second argument.
    """

    own_hparams: tuple[HParamSpec, ...] = ()
    known_metrics: tuple[str, ...] = ()

    def __init__(
        self, model: Callable[..., nn.Module], data: Data, *, metrics: Sequence[str] | None = None
    ) -> None:
        if not callable(model) or isinstance(model, nn.Module):
            raise TaskError(
                f"model must be a factory (a class or function that returns a new nn.Module), got {model!r}; "
                "pass the class, or a lambda that builds it"
            )
        if not isinstance(data, Data):
            raise TaskError(
                f"data must be a hpt_torch.Data, got {type(data).__name__}; hpt_torch.split makes one"
            )
        default = (self.objective.metric.removeprefix("valid/"),)
        self.wanted = tuple(dict.fromkeys(metrics)) if metrics else default
        unknown = [name for name in self.wanted if name not in self.known_metrics]
        if unknown:
            raise TaskError(f"metrics: must be among {', '.join(self.known_metrics)}, got {unknown[0]!r}")
        if metrics:
            first = self.wanted[0]
            direction = "maximize" if first in m.MAXIMIZED else "minimize"
            self.objective = Objective(metric=f"valid/{first}", direction=direction)  # type: ignore[arg-type]
        self.metric_names = (
            "loss",
            *(self.wanted if isinstance(self, Classification) else self.known_metrics),
        )
        self._factory, self._data = model, data
        self._model_specs = model_specs(model)
        self._images = data.train.first()["inputs"].dim() == 4
        self._check_names()
        self.name = f"{getattr(model, '__name__', type(model).__name__)}-{data.name}"

    def _check_names(self) -> None:
        clash = sorted(set(self._model_specs) & {spec.name for spec in self._training_specs()})
        if clash:
            raise TaskError(
                f"{self._factory!r}: argument {clash[0]!r} is the name of a training hyperparameter; "
                "rename it"
            )

    def _training_specs(self) -> tuple[HParamSpec, ...]:
        return (*h.TRAINING, *self.own_hparams, *(h.AUGMENTATION if self._images else ()))

    def data(self) -> Data:
        return self._data

    def hparam_specs(self) -> dict[str, HParamSpec]:
        specs = by_name((*self._training_specs(), *self._model_specs.values()))
        rate = functools.partial(replace, dynamic=True, low=0.0, high=1.0, open_high=True)
        return specs | {name: rate(specs[name]) for name in self.rate_hparams}

    @functools.cached_property
    def rate_hparams(self) -> frozenset[str]:  # type: ignore[override]
        """The arguments that only are rates of dropout, where the model does not say which are dynamic: found
        by building it with its defaults, and computing its output of a few rows."""
        if hasattr(self._factory, "dynamic_hparams") or type(self).build_model.__module__ != __name__:
            return frozenset()
        defaults = {name: spec.default for name, spec in self._model_specs.items() if not spec.required}

        def build(name: str, value: float) -> nn.Module:
            with torch_seeded(0, "rates"):
                return self._built({**defaults, name: value})

        def run(model: nn.Module) -> None:
            few = self._data.train.select(torch.arange(min(4, len(self._data.train))))
            batch = {n: t.float() if t.is_floating_point() else t for n, t in few.items()}
            with torch.no_grad(), watching(torch.zeros((), dtype=torch.int32)):
                self.forward(model.train(), batch)

        go_back = bookmark()  # a step seeds the caller's generators
        try:
            return frozenset(
                name
                for name, value in defaults.items()
                if type(value) is float and 0 <= value < 1 and is_rate(functools.partial(build, name), run)
            )
        finally:
            go_back()

    def _marked(self, hparams: HParams) -> dict[str, Rate]:
        values = {name: hparams[name] for name in self.rate_hparams if name in hparams}
        return {n: Rate(v, n) for n, v in values.items() if isinstance(v, (int, float)) and 0 <= v < 1}

    def build_marked(self, hparams: HParams) -> nn.Module:
        try:
            return self.build_model({**hparams, **self._marked(hparams)})
        except Exception:  # it may mind the marks: then it is not trained together with others
            return self.build_model(hparams)

    def why_not_together(self, hparams: HParams) -> str | None:
        marked = self._marked(hparams)
        if not marked:
            return None
        try:
            model = self.build_model({**hparams, **marked})
        except Exception as error:
            return f"it cannot be built with numbers that remember their use: {type(error).__name__}: {error}"
        used = [name for name, rate in sorted(marked.items()) if rate.used]
        if used:
            return f"{used[0]} decides what the model is, besides being a rate of dropout"
        return None if kept_in(model) is not None else "the model is too large to tell where its rates are"

    def build_model(self, hparams: HParams) -> nn.Module:
        return self._built({name: hparams[name] for name in self._model_specs if name in hparams})

    def _built(self, arguments: dict[str, Any]) -> nn.Module:
        """The model with these arguments and what the data decides of it."""
        arguments = dict(arguments)
        parameters = inspect.signature(self._factory).parameters
        arguments.update({name: value for name, value in self._given().items() if name in parameters})
        try:
            return self._factory(**arguments)
        except ValueError as error:
            raise InfeasibleError(str(error)) from error

    def _given(self) -> dict[str, Any]:
        """What the data decides of a model, by the names in `GIVEN`."""
        vocabulary = None
        parts = [
            part for part in (self._data.train, self._data.valid, self._data.holdout) if part is not None
        ]
        seen = [(part.tensors if isinstance(part, Rows) else part.first())["inputs"] for part in parts]
        if seen[0].dtype == torch.int64:
            vocabulary = max(self._data.out_features, *(int(inputs.max()) + 1 for inputs in seen))
        return dict(zip(GIVEN, (self._data.input_shape, self._data.out_features, vocabulary), strict=True))

    def forward(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any] | None = None) -> Tensor:
        """The model's output; with hparams (in training) of augmented images where `augment` is on."""
        inputs = batch["inputs"]
        if hparams is not None and self._images and hparams["augment"]:
            strengths = (hparams[name] for name in ("crop_padding", "flip_probability", "cutout_size"))
            inputs = augment(inputs, hparams["noise_key"], *strengths)
        output: Tensor = model(inputs, batch["lengths"]) if "lengths" in batch else model(inputs)
        return output

    def sources(self) -> Sequence[Any]:
        return (type(self), self._factory)


class Classification(Supervised):
    """One of `data.out_features` classes for each row (or for each step of it). The model returns a number a
    class; of two classes it may return one, the log-odds of class 1, as ``BCEWithLogitsLoss`` has it.

    metrics: of accuracy, top5, f1, precision, recall (macro means) and roc_auc; the first one is optimised.

    >>> import hpt_torch as hpt
    >>> from hpt_torch.models import MLP
    >>> task = hpt.Classification(MLP, hpt.data.digits(), metrics=["f1", "accuracy"])
    >>> task.objective.metric
    'valid/f1'
    """

    objective = Objective(metric="valid/accuracy", direction="maximize")
    own_hparams = h.CLASSIFICATION
    known_metrics = m.CLASSIFICATION

    def __init__(
        self, model: Callable[..., nn.Module], data: Data, *, metrics: Sequence[str] | None = None
    ) -> None:
        super().__init__(model, data, metrics=metrics)
        if data.train.first()["targets"].is_floating_point():
            raise TaskError(
                "classification needs integer targets (class numbers), got real ones: use Regression"
            )
        if "roc_auc" in self.wanted:
            for part in (data.valid, data.holdout):
                if (
                    isinstance(part, Rows)
                    and len(torch.bincount(part.tensors["targets"].reshape(-1)).nonzero()) < data.out_features
                ):
                    raise TaskError("metrics: roc_auc needs rows of every class in valid and hold-out")
        self._weights_C: Tensor | None = None
        if isinstance(data.train, Rows):
            targets = data.train.tensors["targets"]
            counts = torch.bincount(targets.reshape(-1), minlength=data.out_features)
            self._weights_C = targets.numel() / (data.out_features * counts.clamp(min=1).double())

    def build_model(self, hparams: HParams) -> nn.Module:
        if hparams.get("class_weights") == "balanced" and self._weights_C is None:
            raise TaskError(
                "class_weights: balanced counts the targets of all train rows, which a Stream has not at "
                "hand; use none, or weigh the classes in the loss of a subclass of Classification"
            )
        return super().build_model(hparams)

    def forward(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any] | None = None) -> Tensor:
        """The model's output; of two classes 0 beside the log-odds of class 1, where it is that."""
        logits, targets = super().forward(model, batch, hparams), batch["targets"]
        if self._data.out_features != 2 or logits.numel() != targets.numel():
            return logits
        odds = logits.reshape(targets.shape)
        return torch.stack((torch.zeros_like(odds), odds), dim=-1)

    def loss(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any]) -> Tensor:
        logits = self.forward(model, batch, hparams)
        function = m.cross_entropy if hparams["loss"] == "cross_entropy" else m.binary_cross_entropy
        if hparams["class_weights"] != "balanced":
            return function(logits, batch["targets"], hparams["label_smoothing"])
        assert self._weights_C is not None  # build_model refuses it otherwise
        weights_C = self._weights_C.to(logits.device, logits.dtype)
        mean = function(logits, batch["targets"], hparams["label_smoothing"], weights_C)
        # Not the mean over the batch's weights: parts of a batch, and batches, must add up to the whole.
        return mean * weights_C[batch["targets"]].mean()

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return m.classification_sums(self.forward(model, batch), batch["targets"], self.wanted)

    def finalize(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return m.classification_metrics(sums, self.wanted)


class Regression(Supervised):
    """Real values for each row. Metrics: loss, mse, mae and r2, all of them; `metrics` names the one to
    optimise first (default: mse).

    >>> import hpt_torch as hpt
    >>> from hpt_torch.models import Linear
    >>> hpt.Regression(Linear, hpt.data.diabetes()).objective.direction
    'minimize'
    """

    objective = Objective(metric="valid/mse", direction="minimize")
    own_hparams = h.REGRESSION
    known_metrics = m.REGRESSION

    def _expected(self, batch: Batch, output: Tensor) -> Tensor:
        return m.aligned(batch["targets"], output)

    def loss(self, model: nn.Module, batch: Batch, hparams: Mapping[str, Any]) -> Tensor:
        output = self.forward(model, batch, hparams)
        return m.regression_loss(
            hparams["loss"], output, self._expected(batch, output), hparams["huber_delta"]
        )

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        output = self.forward(model, batch)
        expected, rows = self._expected(batch, output), len(next(iter(batch.values())))
        loss = m.regression_loss("mse", output, expected)
        return m.regression_sums(output.reshape(rows, -1), expected.reshape(rows, -1), loss)

    def finalize(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return m.regression_metrics(sums)


class Reconstruction(Regression):
    """The inputs themselves: an autoencoder. Targets, if the data has any, are not read.

    >>> import hpt_torch as hpt
    >>> from hpt_torch.models import Autoencoder
    >>> hpt.Reconstruction(Autoencoder, hpt.data.digits()).objective.metric
    'valid/mse'
    """

    own_hparams = h.RECONSTRUCTION

    def _expected(self, batch: Batch, output: Tensor) -> Tensor:
        return m.aligned(batch["inputs"], output)


# -- recipes -------------------------------------------------------------------------------------------

KINDS: dict[str, type[Supervised]] = {
    "classification": Classification,
    "regression": Regression,
    "reconstruction": Reconstruction,
}


def from_names(
    *,
    kind: str = "classification",
    model: str = "mlp",
    data: str = "digits",
    valid_fraction: float = 0.2,
    holdout_fraction: float = 0.2,
    data_options: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    allow_import: Sequence[str] = (),
) -> Task:
    """The task a recipe names. Raises TaskError whose text begins with the field."""
    if ":" in kind:
        task = _called("kind", kind, _resolved("kind", kind, allow_import), {})
        if not isinstance(task, Task):
            raise TaskError(f"task.kind: {kind} must give a hpt_torch.Task, gave {type(task).__name__}")
        return task
    if kind not in KINDS:
        python = "; this run was started from Python: run its script again, or Result(path, task)"
        hint = python if kind == "python" else ""
        raise TaskError(f"task.kind: must be {', '.join(KINDS)} or module:factory, got {kind!r}{hint}")
    if ":" not in model and model not in MODELS:
        raise TaskError(f"task.model: must be {', '.join(MODELS)} or module:factory, got {model!r}")
    factory = _resolved("model", model, allow_import) if ":" in model else MODELS[model]
    fractions = {"valid_fraction": valid_fraction, "holdout_fraction": holdout_fraction, "seed": seed}
    made = _make_data(data, {**fractions, **(data_options or {})}, fractions, allow_import)
    try:
        return KINDS[kind](factory, made, metrics=metrics)
    except TaskError as error:
        text = str(error)
        field = "model" if text.startswith(repr(factory)) else "kind"
        raise TaskError(
            f"task.{text}" if text.startswith("metrics: ") else f"task.{field}: {text}"
        ) from error


def _make_data(
    name: str, options: Mapping[str, Any], fractions: Mapping[str, Any], allow_import: Sequence[str]
) -> Data:
    if ":" in name:
        function = _resolved("data", name, allow_import)
    elif name in DATASETS:
        function = DATASETS[name]
    else:
        raise TaskError(f"task.data: must be {', '.join(DATASETS)} or module:factory, got {name!r}")
    if not callable(function):
        raise TaskError(f"task.data: {name} must be a function, it is a {type(function).__name__}")
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not takes_any and option not in fractions:
            known = ", ".join(p for p in parameters if p not in fractions) or "none"
            raise TaskError(f"task.data_options.{option}: is not an option of {name}; it has: {known}")
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options
               and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]  # fmt: skip
    if missing:
        raise TaskError(f"task.data_options.{missing[0]}: must be given for {name}")
    chosen = {k: v for k, v in options.items() if k in parameters or takes_any}
    made = _called("data", name, function, chosen)
    if not isinstance(made, Data):
        raise TaskError(f"task.data: {name} must give a hpt_torch.Data, gave {type(made).__name__}")
    return made


def _called(field: str, name: str, function: Any, arguments: Mapping[str, Any]) -> Any:
    """What the function gives; its refusals, and arguments that it does not take, name the field."""
    try:
        return function(**arguments)
    except TaskError as error:
        raise TaskError(f"task.{field}: {error}") from error
    except TypeError as error:
        raise TaskError(
            f"task.{field}: {name} cannot be called with {arguments or 'no arguments'}: {error}"
        ) from error


def _resolved(field: str, name: str, allow_import: Sequence[str]) -> Any:
    try:
        return resolve(name, allow_import)
    except TaskError as error:
        raise TaskError(f"task.{field}: {error}") from error
