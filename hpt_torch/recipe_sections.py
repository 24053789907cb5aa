"""The sections of a recipe: fields, their rules, a sentence about each."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, PlainSerializer, WithJsonSchema

from hpt_torch import space as spaces
from hpt_torch.samplers import SamplerName
from hpt_torch.schedulers.halving import HalvingName
from hpt_torch.schedulers.pbt import ExploitName
from hpt_torch.schedulers.pruning import PruningName
from hpt_torch.types import SplitterName, is_number

SchedulerName = Literal["fifo", "pbt", "schedule", HalvingName, PruningName]
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|m|h|d)")
SIZE = re.compile(r"[0-9]+(?:\.[0-9]+)?\s*(?:[kKmMgGtT]i?)?[bB]")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_NUMBERS = {"type": "array", "minItems": 2, "maxItems": 2}
_WHEN = {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}}
DIMENSION_SCHEMA: dict[str, Any] = {
    "oneOf": [
        {"type": "object", "additionalProperties": False, "required": [kind], "properties": properties}
        for kind, properties in {
            "float": {
                "float": _NUMBERS | {"items": {"type": "number"}},
                "log": {"type": "boolean"},
                "step": {"type": "number"},
                "default": {"type": "number"},
                "when": _WHEN,
            },
            "int": {
                "int": _NUMBERS | {"items": {"type": "integer"}},
                "log": {"type": "boolean"},
                "step": {"type": "integer"},
                "default": {"type": "integer"},
                "when": _WHEN,
            },
            "choice": {"choice": {"type": "array", "minItems": 1}, "default": {}, "when": _WHEN},
        }.items()
    ]
}


def parse_duration(raw: Any) -> float:
    """Seconds from "90s", "30m", "2h", "1d" or a number of seconds."""
    if is_number(raw):
        seconds = float(raw)
    else:
        match = DURATION.fullmatch(raw) if isinstance(raw, str) else None
        if match is None:
            raise ValueError(f'must be a duration such as "90s", "30m" or "2h", got {raw!r:.80}')
        seconds = float(match[1]) * _UNITS[match[2]]
    if not 0 < seconds < 1e9:
        raise ValueError(f"must be above 0 and at most 11,000 days, got {raw!r}")
    return seconds


DimensionField = Annotated[
    Any,
    BeforeValidator(spaces.parse_dimension),
    PlainSerializer(spaces.dump_dimension),
    WithJsonSchema(DIMENSION_SCHEMA),
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": ["string", "number"], "pattern": f"^{DURATION.pattern}$"}),
]


def _is_size(raw: Any) -> Any:
    """Pydantic's own rule also reads the start of a text, bits, and true as a byte."""
    if not (SIZE.fullmatch(raw) if isinstance(raw, str) else type(raw) is int and raw >= 0):
        raise ValueError(f'must be a size such as "500MB" or "4GiB", got {raw!r:.80}')
    return raw


Size = Annotated[
    ByteSize,
    Field(ge=1),
    BeforeValidator(_is_size),
    WithJsonSchema({"type": ["string", "integer"], "pattern": f"^{SIZE.pattern}$", "minimum": 1}),
]
Epochs = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
Fraction = Annotated[float, Field(gt=0, lt=1, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Device = Annotated[int, Field(ge=0, le=1023, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TaskSection(Section):
    """What is trained."""

    kind: str = Field(
        default="classification",
        max_length=200,
        description="classification, regression, reconstruction, or module:factory",
    )
    model: str = Field(
        default="mlp", max_length=200, description="mlp, cnn, rnn, autoencoder, linear, or module:factory"
    )
    data: str = Field(
        default="digits", max_length=200, description="a data set that hpt_torch knows, or module:factory"
    )
    data_options: dict[str, Any] = Field(
        default_factory=dict, description='arguments of the data set, such as path = "x.csv"'
    )
    valid_fraction: Fraction = Field(default=0.2, description="share of all rows that scores trials")
    holdout_fraction: Fraction = Field(
        default=0.2, description="share of all rows that is read once, at the end"
    )
    metrics: list[str] | None = Field(
        default=None, min_length=1, description="measured at every epoch; the first one is optimised"
    )


class SecondSection(Section):
    """A second objective beside the first, which alone says what is best: the report has the trials that no
    other one beats in both."""

    metric: str = Field(
        max_length=100,
        description="parameters (trainable ones), flops (of one row's forward pass), or a metric of its own "
        'such as "valid/loss"',
    )
    direction: Literal["maximize", "minimize"] | None = Field(
        default=None, description="unless given: minimize, of parameters and flops"
    )


class ObjectiveSection(Section):
    """What is optimised; metric and direction are the task's own unless given."""

    metric: str | None = Field(default=None, max_length=100, description='such as "valid/accuracy"')
    direction: Literal["maximize", "minimize"] | None = None
    second: SecondSection | None = None


class SearchSection(Section):
    """How points are chosen, and how many."""

    sampler: SamplerName = "tpe"
    trials: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        strict=True,
        description="over all resumes; grid: every point unless given",
    )
    timeout: Duration | None = Field(
        default=None, description='wall-clock over all resumes: "90s", "30m", "2h"'
    )
    round_size: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        strict=True,
        description="trials proposed together; unless given: tpe 10, gp 5, nsga2 20 (its generation), "
        "random and qmc 128, grid 256",
    )
    max_parameters: int | None = Field(
        default=None,
        ge=1,
        le=2**53,
        strict=True,
        description="a trial whose model has more trainable parameters is infeasible, and is not trained",
    )
    start_with_defaults: Flag = Field(
        default=True, description="trial 0 is the declared defaults (not for grid)"
    )
    points: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=10_000,
        description="tried first, such as {lr = 0.01}; what a point leaves open is the sampler's",
    )
    warm_start: str | None = Field(
        default=None, max_length=1000, description="a run's directory, whose best trials become `points`"
    )
    warm_start_trials: int = Field(
        default=5, ge=1, le=1000, strict=True, description="so many of them, before other `points`"
    )


class EvaluationSection(Section):
    """Cross-validation: train and valid rows, cut into folds; a trial's score is its mean over them."""

    folds: int | None = Field(
        default=None, ge=2, le=100, strict=True, description="train every trial on so many folds"
    )
    splitter: SplitterName = Field(
        default="auto",
        description="kfold, stratified, grouped or time; auto: what the data calls for",
    )
    repeats: int = Field(
        default=1, ge=1, le=100, strict=True, description="so often, each time into other folds"
    )


class FinalSection(Section):
    """How the trial is chosen at the end, and what is done with it."""

    confirm: int | None = Field(
        default=None,
        ge=2,
        le=1000,
        strict=True,
        description="train the best so many trials again with new seeds; the best mean is chosen",
    )
    seeds: int = Field(default=5, ge=2, le=100, strict=True, description="confirm: so many new seeds")
    refit: bool | None = Field(
        default=None,
        strict=True,
        description="train it again on train and valid rows together, for the epochs that it kept; "
        "unless given: with folds and with confirm, which leave no other model",
    )


class TrainerSection(Section):
    """How trials are trained."""

    epochs: Epochs = 10
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
        description="auto, cpu, cuda, cuda:1, mps",
    )
    devices: list[Device] | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="CUDA: [0, 2] trains in a process on each of these, [0, 0] in two on one; what they are "
        "changes no result, unless they are of different kinds",
    )
    engine: Literal["auto", "loop", "fused", "compiled"] = Field(
        default="auto",
        description="auto, loop (one by one), fused (trials of one signature at once) or compiled (fused, by "
        "torch.compile)",
    )
    keep: Literal["last", "best"] | None = Field(
        default=None,
        description="the epoch whose weights and score a trial keeps; unless given: last, with patience best",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="stop a trial after so many epochs without a better score",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=2**63 - 1,
        strict=True,
        description="of initial weights, data order and noise; unless given: the recipe's seed",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        strict=True,
        description="CPU threads; recorded, kept on resume; more than 1 train in one process",
    )
    memory: Size | None = Field(
        default=None,
        description='"4GB": trials that train together may take so much; unless given: 80 % of what is free '
        "when the run begins, on the CPU shared among its cores; recorded, kept on resume",
    )
    dtype: Literal["float32", "float64"] = "float32"
    autocast: Literal["none", "bfloat16"] = Field(
        default="none", description="bfloat16: matrix products of forward and backward in 16 bits"
    )
    tf32: Flag = Field(default=False, description="CUDA: matrix products in TensorFloat-32")
    deterministic: Flag = Field(
        default=True, description="refuse kernels that do not repeat bit for bit (CUDA)"
    )


class SchedulerSection(Section):
    """Who decides between epochs. `PBT`, `Halving`, `Pruning` (hpt_torch.schedulers) explain the settings."""

    kind: SchedulerName = Field(
        default="fifo",
        description="fifo: nobody; pbt: Population Based Training; schedule: `changes`, known beforehand; "
        "the others stop trials early",
    )
    reduction_factor: int = Field(
        default=3, ge=2, le=100, strict=True, description="halving: one in so many trials passes a rung"
    )
    min_epochs: Epochs = Field(default=1, description="halving: the first rung")
    startup_trials: int = Field(
        default=5, ge=0, le=10_000, strict=True, description="median, percentile: complete trials needed"
    )
    percentile: float = Field(
        default=25.0, ge=0, le=100, strict=True, description="percentile: the best so many percent go on"
    )
    lower: float | None = Field(default=None, description="threshold: a score below it stops a trial")
    upper: float | None = Field(default=None, description="threshold: a score above it stops a trial")
    patience_epochs: int | None = Field(
        default=None, ge=0, strict=True, description="stop only those without a better score for so long"
    )
    changes: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=100_000,
        description="schedule: {after = 2, lr = 0.01} sets lr for the epochs after the second",
    )
    baseline: Flag = Field(
        default=False,
        description="pbt: random search, and pbt without explore, at equal compute, to compare with",
    )
    interval_epochs: Epochs | None = Field(
        default=None, description="epochs between two decisions; unless given: a tenth of trainer.epochs"
    )
    burn_in_epochs: int = Field(default=0, ge=0, strict=True, description="epochs before the first decision")
    exploit: ExploitName = Field(default="truncation", description="who copies whom")
    quantile: float = Field(default=0.2, gt=0, le=0.5, strict=True, description="share that copies")
    explore: Flag = Field(default=True, description="false: copies keep their source's hyperparameters")
    resample_probability: float = Field(default=0.25, ge=0, le=1, strict=True)
    perturbation_factors: list[float] = Field(default=[0.8, 1.2], min_length=2, max_length=2)
    crossover_probability: float = Field(default=0.0, ge=0, le=1, strict=True)
    window: int = Field(default=10, ge=2, le=1000, strict=True, description="scores that t_test compares")
    significance: float = Field(default=0.05, gt=0, lt=1, strict=True, description="t_test's p")


class RunSection(Section):
    """Where and how the run is kept; none of it changes a result."""

    checkpoint_every_seconds: float = Field(
        default=30.0, ge=0, le=1e6, strict=True, description="at most so much training is repeated"
    )
    max_failures: int | None = Field(
        default=None, ge=1, strict=True, description="stop with an error once so many trials have failed"
    )
    epoch_timeout: Duration | None = Field(
        default=None,
        description="a worker process that needs longer for an epoch (of all that it trains together, and to "
        'compile their step) is stopped, and the trial that did it fails: "90s", "30m"; a trial near it may '
        "not repeat",
    )
    max_disk: Size | None = Field(
        default=None,
        description='"2GB": beyond it TensorBoard is no longer written, and of states of training only the '
        "newest is kept",
    )
    tensorboard: Flag = True
    workers: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        strict=True,
        description="worker processes, where the executor has them; unless given: one a CPU core",
    )
