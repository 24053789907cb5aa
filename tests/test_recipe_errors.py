"""Wrong recipes: each mistake is named by its field, with the rule or the remedy, and nothing is written."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpt_torch import recipe as recipes
from hpt_torch import session
from hpt_torch.catalog import find_recipe
from hpt_torch.recipe import load
from hpt_torch.task import Task
from hpt_torch.tasks import from_names
from hpt_torch.types import RecipeError, TaskError

TRIALS = "[search]\ntrials = 3\n"
SPACE = f"{TRIALS}[space]\n"
SGD = 'optimizer = {choice = ["adam", "sgd"]}\n'
HUGE = "1" + "0" * 400  # no float holds it

# (recipe, field, a piece of the rule or of the remedy)
UNKNOWN_KEYS = [
    ('nam = "x"', "nam", "did you mean name?"),
    ("sede = 1", "sede", "did you mean seed?"),
    ("[searh]\ntrials = 3", "searh", "did you mean search?"),
    ("[search]\ntrails = 3", "search.trails", "did you mean trials?"),
    ('[task]\nmodell = "mlp"', "task.modell", "did you mean model?"),
    ("[trainer]\nepoch = 3", "trainer.epoch", "did you mean epochs?"),
    ("[run]\ntensor_board = true", "run.tensor_board", "did you mean tensorboard?"),
    ('[objective]\nmetrics = "valid/accuracy"', "objective.metrics", "did you mean task.metrics?"),
    ("[search]\nxyz = 3", "search.xyz", "known: "),
    # keys that belong to another section
    ("[search]\nepochs = 3", "search.epochs", "did you mean trainer.epochs?"),
    ("[trainer]\nround_size = 3", "trainer.round_size", "did you mean search.round_size?"),
    ('[search]\ndevice = "cpu"', "search.device", "did you mean trainer.device?"),
    ("[task]\nseed = 1", "task.seed", "did you mean seed?"),
    ("epochs = 3", "epochs", "did you mean trainer.epochs?"),
]
WRONG_VALUES = [
    ('seed = "0"', "seed", "integer, got '0'"),
    ("seed = 1.5", "seed", "integer, got 1.5"),
    ("seed = true", "seed", "integer, got True"),
    ("seed = -1", "seed", "greater than or equal to 0, got -1"),
    (f"seed = {2**63}", "seed", "less than or equal to"),
    ("name = 3", "name", "string, got 3"),
    ('name = ""', "name", "letter or digit"),
    ('name = "a/b"', "name", "letter or digit"),
    ('name = "../x"', "name", "letter or digit"),
    ('name = ".hidden"', "name", "letter or digit"),
    ('name = "a\\nb"', "name", "letter or digit"),
    (f'name = "{"a" * 65}"', "name", "up to 63"),
    ('task = "mlp"', "task", "got 'mlp'"),
    ("search = []", "search", "got []"),
    ("hparams = 3", "hparams", "must be a table, got 3"),
    ('space = "lr"', "space", "must be a table, got 'lr'"),
    ("[task]\nmodel = 3", "task.model", "string, got 3"),
    ("[task]\nvalid_fraction = 0.0", "task.valid_fraction", "greater than 0"),
    ("[task]\nholdout_fraction = 1.5", "task.holdout_fraction", "less than 1"),
    ("[task]\nvalid_fraction = nan", "task.valid_fraction", "got nan"),
    ("[task]\nvalid_fraction = 0.5\nholdout_fraction = 0.5", "task.valid_fraction", "stay below 0.95"),
    ('[search]\nsampler = "bayes"', "search.sampler", "must be one of tpe, random, grid, gp"),
    ("[search]\ntrials = 0", "search.trials", "greater than or equal to 1"),
    ("[search]\ntrials = 2.5", "search.trials", "integer, got 2.5"),
    ("[search]\nround_size = 0", "search.round_size", "greater than or equal to 1"),
    ('executor = "inline"\n[run]\nepoch_timeout = "9s"', "run.epoch_timeout", "set executor to processes"),
    ("[run]\nmax_failures = 0", "run.max_failures", "greater than or equal to 1"),
    ("[search]\npoints = [{}]\ntrials = 3", "search.points.0", "at least one hyperparameter"),
    ("[search]\npoints = [{lr = 0.1}]\ntrials = 3", "search.points.0.lr", "is not searched"),
    (
        "[search]\npoints = [{lr = 2.0}]\ntrials = 3\n[space]\nlr = {float = [0.1, 1]}",
        "search.points.0.lr",
        "must lie in {'float': [0.1, 1.0]}, got 2.0",
    ),
    (
        '[search]\nsampler = "grid"\npoints = [{dropout = 0.5}]\n[space]\ndropout = {choice = [0.0, 0.5]}',
        "search.points",
        "do not go with grid",
    ),
    (
        f'[search]\nwarm_start = "nowhere"\n{SPACE[9:]}dropout = {{float = [0, 1]}}',
        "search.warm_start",
        "no run.db",
    ),
    ("[trainer]\nepochs = 0", "trainer.epochs", "greater than or equal to 1"),
    ("[trainer]\nepochs = 1.0", "trainer.epochs", "integer, got 1.0"),
    ('[trainer]\nengine = "turbo"', "trainer.engine", "must be one of auto, "),
    ('[trainer]\ndtype = "bfloat16"', "trainer.dtype", "must be one of float32, float64"),
    ("[trainer]\nthreads = 0", "trainer.threads", "greater than or equal to 1"),
    ("[run]\ncheckpoint_every_seconds = -1", "run.checkpoint_every_seconds", "greater than or equal to 0"),
    ("[run]\ncheckpoint_every_seconds = nan", "run.checkpoint_every_seconds", "got nan"),
    ('executor = "slurm"', "executor", "must be one of "),
    ('[objective]\nmetric = "valid/accuracy"', "objective.direction", "together"),
    ('[objective]\ndirection = "maximize"', "objective.metric", "together"),
    (
        '[objective]\nmetric = "valid/accuracy"\ndirection = "max"',
        "objective.direction",
        "must be one of maximize, minimize",
    ),
    (
        '[objective]\nmetric = "holdout/accuracy"\ndirection = "maximize"',
        "objective.metric",
        "must begin with valid/",
    ),
]
# A recipe's types are TOML's: "no" is a text, 1 is not true. The JSON schema refuses these, so must we.
LAX_TYPES = [
    ('[task]\nvalid_fraction = "0.2"', "task.valid_fraction", "number"),
    ("[search]\nstart_with_defaults = 1", "search.start_with_defaults", "boolean"),
    ('[trainer]\ndeterministic = "no"', "trainer.deterministic", "boolean"),
    ('[run]\ntensorboard = "yes"', "run.tensorboard", "boolean"),
    ("[run]\ncheckpoint_every_seconds = true", "run.checkpoint_every_seconds", "number"),
    ('[run]\ncheckpoint_every_seconds = "30"', "run.checkpoint_every_seconds", "number"),
]
DURATIONS = [
    ('[search]\ntimeout = "soon"', "search.timeout", '"90s", "30m" or "2h"'),
    ('[search]\ntimeout = "10 weeks"', "search.timeout", '"90s", "30m" or "2h"'),
    ('[search]\ntimeout = "-3s"', "search.timeout", '"90s", "30m" or "2h"'),
    ("[search]\ntimeout = true", "search.timeout", '"90s", "30m" or "2h"'),
    ("[search]\ntimeout = 0", "search.timeout", "above 0"),
    ('[search]\ntimeout = "0s"', "search.timeout", "above 0"),
    ("[search]\ntimeout = nan", "search.timeout", '"90s", "30m" or "2h", got nan'),
    ("[search]\ntimeout = inf", "search.timeout", '"90s", "30m" or "2h", got inf'),
    ('[search]\ntimeout = "100000d"', "search.timeout", "11,000 days"),
    (f"[search]\ntimeout = {HUGE}", "search.timeout", '"90s", "30m" or "2h", got 1000'),
]
SIZES = [
    (f"[trainer]\nmemory = {value}", "trainer.memory", rule)
    for value, rule in [
        ("true", "must be a size such as"),
        ("1.5", "must be a size such as"),
        ('"4GB."', "must be a size such as"),
        ('"4e9"', "must be a size such as"),
        ('"8Gbit"', "must be a size such as"),
        ("0", "greater than or equal to 1"),
        ('"0.1B"', "greater than or equal to 1"),
        ("-3", "must be a size such as"),
    ]
]
DEVICES = [
    ('[trainer]\ndevice = "gpu"', "trainer.device", "auto, cpu, cuda, cuda:N or mps"),
    ('[trainer]\ndevice = "cuda:x"', "trainer.device", "auto, cpu, cuda, cuda:N or mps"),
    ('[trainer]\ndevice = "CPU"', "trainer.device", "auto, cpu, cuda, cuda:N or mps"),
    ("[trainer]\ndevice = 0", "trainer.device", "string, got 0"),
    ('[trainer]\ndevice = "cuda"', "trainer.device", "has no CUDA device; use auto or cpu"),
    ('[trainer]\ndevice = "cuda:1"', "trainer.device", "has no CUDA device; use auto or cpu"),
    ('[trainer]\ndevice = "mps"', "trainer.device", "has no Apple GPU; use auto or cpu"),
    ('[trainer]\ndevice = "mps"\ndtype = "float64"', "trainer.dtype", "use float32"),
]
DIMENSIONS = [
    ("lr = 0.1", "must be a table such as {float = [0.1, 1.0]}, got 0.1; a fixed value belongs in [hparams]"),
    ("lr = [0.1, 0.2]", "must be a table"),
    ("lr = {}", "exactly one of float, int, choice; got nothing"),
    ("lr = {flaot = [0.1, 0.2]}", "got flaot"),
    ("lr = {float = [0.1, 0.2], int = [1, 2]}", "got float, int"),
    ("lr = {float = [0.1, 0.2], defualt = 0.1}", "'defualt'; float takes log, step, default, when"),
    ("lr = {choice = [0.1, 0.2], log = true}", "'log'; choice takes default, when"),
    ("lr = {float = 0.1}", "must be [low, high], got 0.1"),
    ("lr = {float = [0.1]}", "must be [low, high], got [0.1]"),
    ("lr = {float = [0.1, 0.2, 0.3]}", "must be [low, high]"),
    ('lr = {float = ["a", 0.2]}', "low must be a finite number, got 'a'"),
    ("lr = {float = [0.1, inf]}", "high must be a finite number, got inf"),
    ("lr = {float = [nan, 0.1]}", "low must be a finite number, got nan"),
    (f"lr = {{float = [0.1, {HUGE}]}}", "high must be a finite number"),
    ("lr = {float = [0.1, 0.01]}", "low must be at most high, got [0.1, 0.01]"),
    ("batch_size = {int = [10, 1]}", "low must be at most high, got [10, 1]"),
    ("batch_size = {int = [1.0, 10]}", "low must be an integer of at most 2**53, got 1.0"),
    ("batch_size = {int = [true, 10]}", "low must be an integer of at most 2**53, got True"),
    # log scales
    ("lr = {float = [0.0, 0.1]}", "log scale, which needs low > 0, got 0; raise low or set log = false"),
    ("weight_decay = {float = [0.0, 0.1]}", "needs low > 0"),
    ("eps = {float = [0, 1e-8]}", "needs low > 0"),
    ("dropout = {float = [0.0, 0.5], log = true}", "needs low > 0, got 0; raise low or set log = false"),
    ("batch_size = {int = [0, 10], log = true}", "needs low > 0"),
    ('lr = {float = [0.1, 0.2], log = "yes"}', "log must be true or false, got 'yes'"),
    ("lr = {float = [0.1, 0.2], log = 1}", "log must be true or false, got 1"),
    ("lr = {float = [0.1, 0.5], log = true, step = 0.1}", "step and log cannot be combined"),
    ("batch_size = {int = [1, 10], log = true, step = 2}", "step and log cannot be combined"),
    # steps
    ("lr = {float = [0.1, 0.2], step = 0.0}", "step must be above 0, got 0"),
    ("batch_size = {int = [1, 10], step = -1}", "step must be above 0, got -1"),
    ("lr = {float = [0.1, 0.2], step = 1}", "step must be at most high - low = 0.1, got 1"),
    (f"batch_size = {{int = [1, 10], step = {HUGE}}}", "step must be an integer of at most 2**53"),
    ("lr = {float = [0.1, 1.0], step = 1e-320}", "step"),
    # defaults
    ("lr = {float = [0.1, 0.2], default = 0.3}", "default must lie in the dimension, got 0.3"),
    ("lr = {float = [0.1, 0.3], step = 0.1, default = 0.15}", "default must lie in the dimension"),
    ('lr = {float = [0.1, 0.2], default = "a"}', "default must be a finite number, got 'a'"),
    ("batch_size = {int = [1, 9], step = 2, default = 2}", "default must lie in the dimension, got 2"),
    ("batch_size = {choice = [32, 64], default = 16}", "default must lie in the dimension, got 16"),
    ("hidden_sizes = {choice = [[64]], default = 64}", "default must lie in the dimension, got 64"),
    ("lr = {choice = [0.1, 0.2], default = 1979-05-27}", "default must be a finite number"),
    # choices
    ("lr = {choice = []}", "at least one option, got []"),
    ('lr = {choice = "abc"}', "a list of at least one option"),
    ("lr = {choice = [0.1, 0.2, 0.1]}", "option 0.1 twice"),
    ("hidden_sizes = {choice = [[64], [64]]}", "option [64] twice"),
    ("lr = {choice = [0.1, nan]}", "an option must be a finite number"),
    ("lr = {choice = [0.1, {a = 1}]}", "an option must be a finite number"),
    ("lr = {choice = [0.1, 1979-05-27]}", "an option must be a finite number"),
    (
        f"batch_size = {{choice = [1, {HUGE}]}}",
        "an option must be a finite number (an integer: at most 2**53)",
    ),
    # what the standard hyperparameters allow, in every form of dimension
    ("lr = {float = [0.0, 0.1], log = false}", "low must be in (0, 1e+06], got 0.0"),
    ("lr = {float = [-1.0, 0.1], log = false}", "low must be in (0, 1e+06], got -1.0"),
    ("lr = {choice = [0.1, -0.1]}", "option -0.1: must be in (0, 1e+06]"),
    ('lr = {choice = [0.1, "a"]}', "option 'a': must be a number"),
    ("dropout = {float = [0.0, 1.0]}", "high must be in [0, 1), got 1.0"),
    ("dropout = {float = [-0.1, 0.5]}", "low must be in [0, 1), got -0.1"),
    ("dropout = {int = [0, 1]}", "high must be in [0, 1), got 1"),
    ("dropout = {choice = [0.1, 1.0]}", "option 1.0: must be in [0, 1)"),
    ("beta1 = {float = [0.5, 1.0]}", "high must be in [0, 1)"),
    ("label_smoothing = {float = [0.0, 1.0]}", "high must be in [0, 1)"),
    ("grad_clip_norm = {float = [0.0, 1.0]}", "low must be in (0, inf)"),
    ("batch_norm_momentum = {float = [0.0, 1.0]}", "low must be in (0, 1]"),
    ("batch_size = {int = [0, 10]}", "low must be in [1, 1e+09], got 0"),
    ("batch_size = {float = [1.0, 10.0]}", "is an integer; use {int = [...]} or {choice = [...]}"),
    ("batch_size = {choice = [32.5]}", "option 32.5: must be an integer"),
    ("batch_size = {choice = [32, 0]}", "option 0: must be in [1, 1e+09]"),
    ("activation = {float = [0.0, 1.0]}", "is not a number; use {choice = [...]}"),
    ('activation = {choice = ["relu", "rellu"]}', "option 'rellu': must be one of relu, "),
    ("batch_norm = {int = [0, 1]}", "is not a number; use {choice = [...]}"),
    ("batch_norm = {choice = [0, 1]}", "option 0: must be true or false"),
    ("hidden_sizes = {int = [1, 2]}", "is not a number; use {choice = [...]}"),
    ("hidden_sizes = {choice = [[64], [0]]}", "every entry must be in [1, 1e+06], got 0"),
    ("hidden_sizes = {choice = [64, [64]]}", "must be a list of integers, got 64"),
    ('optimizer = {choice = ["adam", "lion"]}', "option 'lion': must be one of"),
    ("xyz = {float = [0.1, 0.2]}", "is not a hyperparameter of this task; it has: "),
    ("droput = {float = [0.1, 0.2]}", "did you mean dropout?"),
    ("momentum = {float = [0.0, 0.9]}", "is read only where optimizer is sgd, but optimizer is adam"),
]
CONDITIONS = [
    (
        'momentum = {float = [0.0, 0.9], when = {optimizer = ["sgd"]}}',
        "space.momentum.when.optimizer",
        "none",
    ),
    (
        SGD + 'momentum = {float = [0.0, 0.9], when = {optimiser = ["sgd"]}}',
        "space.momentum.when.optimiser",
        "must name another dimension of the space (there are: optimizer)",
    ),
    (
        'momentum = {float = [0.0, 0.9], when = {optimizer = ["sgd"]}}\n[hparams]\noptimizer = "sgd"',
        "space.momentum.when.optimizer",
        "optimizer is fixed in [hparams]; leave the when out, or move optimizer to [space]",
    ),
    (
        SGD + 'momentum = {float = [0.0, 0.9], when = {optimizer = ["sdg"]}}',
        "space.momentum.when.optimizer",
        "optimizer can never be 'sdg'",
    ),
    (
        SGD + "momentum = {float = [0.0, 0.9], when = {optimizer = [1979-05-27]}}",
        "space.momentum",
        "a value of when.optimizer must be a finite number",
    ),
    (
        "lr = {float = [0.1, 0.2], when = {dropout = [0.9]}}\ndropout = {float = [0.1, 0.2]}",
        "space.lr.when.dropout",
        "dropout can never be 0.9",
    ),
    (SGD + 'momentum = {float = [0.0, 0.9], when = {optimizer = "sgd"}}', "space.momentum", "list of values"),
    (SGD + "momentum = {float = [0.0, 0.9], when = {optimizer = []}}", "space.momentum", "list of values"),
    (SGD + "momentum = {float = [0.0, 0.9], when = {}}", "space.momentum", "when must be a table such as"),
    (SGD + 'momentum = {float = [0.0, 0.9], when = "sgd"}', "space.momentum", "when must be a table such as"),
    ("lr = {float = [0.1, 0.2], when = {lr = [0.1]}}", "space.lr.when.lr", "cannot depend on itself"),
    (
        "lr = {float = [0.1, 0.2], when = {dropout = [0.1]}}\n"
        "dropout = {float = [0.1, 0.2], when = {lr = [0.1]}}",
        "space",
        "conditions of lr, dropout depend on each other in a circle",
    ),
    (
        'optimizer = {choice = ["adam", "adamw"]}\nmomentum = {float = [0.0, 0.9]}',
        "space.momentum",
        "is read only where optimizer is sgd, but optimizer is adam, adamw; leave it out",
    ),
]
HPARAMS = [
    ("lr = 0", "lr", "must be in (0, 1e+06], got 0"),
    ("lr = nan", "lr", "must be a number, got nan"),
    ('lr = "0.1"', "lr", "must be a number, got '0.1'"),
    ("lr = true", "lr", "must be a number, got True"),
    ("lr = [0.1]", "lr", "must be a number"),
    (f"lr = {HUGE}", "lr", "number"),
    ("batch_size = 0", "batch_size", "must be in [1, 1e+09], got 0"),
    ("batch_size = 64.0", "batch_size", "must be an integer, got 64.0"),
    (f"batch_size = {HUGE}", "batch_size", "must be"),
    ("weight_decay = -1", "weight_decay", "must be in [0, inf), got -1"),
    ("dropout = 1.0", "dropout", "must be in [0, 1), got 1.0"),
    ("beta2 = 1.0", "beta2", "must be in [0, 1), got 1.0"),
    ("eps = 0", "eps", "must be in (0, inf)"),
    ("grad_clip_norm = 0", "grad_clip_norm", "must be in (0, inf)"),
    ("label_smoothing = 1", "label_smoothing", "must be in [0, 1)"),
    ("batch_norm_momentum = 0", "batch_norm_momentum", "must be in (0, 1]"),
    ("batch_norm = 1", "batch_norm", "must be true or false, got 1"),
    ('optimizer = "lion"', "optimizer", "must be one of sgd, adam, adamw"),
    ('optimizer = ["adam"]\nbeta1 = 0.5', "optimizer", "must be one of sgd, adam, adamw"),
    ('activation = "rellu"', "activation", "must be one of relu"),
    ('init = "he"', "init", "must be one of default, kaiming, xavier, orthogonal"),
    ("hidden_sizes = 64", "hidden_sizes", "must be a list of integers, got 64"),
    ("hidden_sizes = [64, 0]", "hidden_sizes", "every entry must be in [1, 1e+06], got 0"),
    ("width = 0", "width", "must be in [1, 1e+06]"),
    ("depth = -1", "depth", "must be in [0, 1000]"),
    ("droput = 0.1", "droput", "did you mean dropout?"),
    ("xyz = 0.1", "xyz", "is not a hyperparameter of this task; it has: "),
    ("input_shape = [64]", "input_shape", "is not a hyperparameter of this task"),
    (
        "momentum = 0.9",
        "momentum",
        "is read only where optimizer is sgd, but optimizer is adam; leave it out",
    ),
    (
        "head_lr_factor = 0.1",
        "head_lr_factor",
        "is the learning rate of the parameters in head, which is empty",
    ),
    ('freeze = ["layers"]\nhead = ["hed"]', "head", "no parameter is called 'hed'; the model has layers.1"),
    ("nesterov = true", "nesterov", "is read only where optimizer is sgd"),
    ('optimizer = "sgd"\nbeta1 = 0.9', "beta1", "is read only where optimizer is adam or adamw"),
]
BETWEEN_FIELDS = [
    (f"[hparams]\nlr = 0.1\n{SPACE}lr = {{float = [0.1, 0.2]}}", "hparams.lr", "keep one of the two"),
    ("[space]\nlr = {float = [0.1, 0.2]}", "search.trials", "must be given (or search.timeout)"),
    (
        '[search]\nsampler = "grid"\n[space]\nlr = {float = [0.1, 0.2]}',
        "search.sampler",
        "space.lr: a grid needs values that can be counted; give step or a choice",
    ),
    (
        '[search]\nsampler = "grid"\ntrials = 10\n[space]\nlr = {choice = [0.1, 0.2]}',
        "search.trials",
        "the grid has 2 points, got 10; leave it out",
    ),
    (
        f'[search]\nsampler = "grid"\ntrials = 4\n[space]\n{SGD}'
        'momentum = {choice = [0.1, 0.2], when = {optimizer = ["sgd"]}}',
        "search.trials",
        "the grid has 3 points, got 4",
    ),
    (
        '[search]\nsampler = "grid"\n[space]\nwidth = {int = [1, 2000]}\nbatch_size = {int = [1, 2000]}',
        "search.sampler",
        "more than 100,000 points; use another sampler or fewer values",
    ),
    # too long for any machine's memory: must be refused before its values are listed
    (
        f'[search]\nsampler = "grid"\n[space]\nbatch_size = {{int = [1, {10**15}]}}',
        "search.sampler",
        "more than 100,000 points; use another sampler or fewer values",
    ),
    ("[hparams]\nhidden_sizes = [64]\ndepth = 2", "hparams", "give hidden_sizes, or depth and width"),
]

TABLE = [
    *UNKNOWN_KEYS,
    *WRONG_VALUES,
    *LAX_TYPES,
    *DURATIONS,
    *SIZES,
    *DEVICES,
    *((SPACE + text, f"space.{text.split(' ')[0]}", piece) for text, piece in DIMENSIONS),
    *((SPACE + text, field, piece) for text, field, piece in CONDITIONS),
    *((f"[hparams]\n{text}", f"hparams.{name}", piece) for text, name, piece in HPARAMS),
    *BETWEEN_FIELDS,
]

# (overrides of `seed = 1`, field, piece)
OVERRIDES = [
    (["seed"], "'seed'", "must look like search.trials=20 or lr=0.01"),
    (["=3"], "'=3'", "must look like"),
    (["a..b=3"], "'a..b=3'", "must look like"),
    (["--seed=1"], "'--seed=1'", "must look like"),
    (["search.trials.x=3"], "search.trials.x", "names a field or section.field"),
    (["seed.x=3"], "seed.x", "seed is not a table"),
    (["task=3", "task.model=mlp"], "task.model", "task is not a table"),
    (["seed="], "seed", "integer, got ''"),
    (["seed=x"], "seed", "integer, got 'x'"),
    (["search.trails=3"], "search.trails", "did you mean trials?"),
    (["serach.trials=3"], "serach", "did you mean search?"),
    (["trainer.round_size=3"], "trainer.round_size", "did you mean search.round_size?"),
    (["lr=abc"], "hparams.lr", "must be a number, got 'abc'"),
    (["lr=0"], "hparams.lr", "must be in (0, 1e+06], got 0"),
    (["epochs=3"], "hparams.epochs", "is not a hyperparameter of this task; did you mean trainer.epochs?"),
    (["trials=3"], "hparams.trials", "did you mean search.trials?"),
    (["hparams.seed=3"], "hparams.seed", "did you mean seed?"),
    (["space.epochs={int = [1, 3]}", "search.trials=3"], "space.epochs", "did you mean trainer.epochs?"),
    (["droput=0.1"], "hparams.droput", "did you mean dropout?"),
    (["space.lr=0.1"], "space.lr", "a fixed value belongs in [hparams]"),
    (["search.timeout=30 minutes"], "search.timeout", '"90s", "30m" or "2h"'),
    ([f"seed={'1' * 5000}"], "seed", "integer"),
]


def _label(case: object) -> str | None:
    """The recipe on one line, as the test's name."""
    return case.replace("\n", " ")[:70] if isinstance(case, str) else None


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages about devices are those of a machine with none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def refused(path: Path, text: str, task: Task, overrides: list[str] | None = None) -> RecipeError:
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        session.check(load(path, overrides or []), task, source=str(path))
    return caught.value


def assert_says(error: RecipeError, field: str, piece: str) -> None:
    assert any(p.where == field and piece in p.what for p in error.problems), str(error)
    assert f"  {field}: " in str(error)


@pytest.mark.parametrize(("text", "field", "piece"), TABLE, ids=_label)
def test_names_the_field_and_the_remedy(
    text: str, field: str, piece: str, tmp_path: Path, digits_task: Task
) -> None:
    error = refused(tmp_path / "recipe.toml", text, digits_task)
    assert_says(error, field, piece)
    assert str(error).startswith(f"{tmp_path / 'recipe.toml'}: ")
    assert len(str(error)) < 2000
    assert "pydantic" not in str(error)


@pytest.mark.parametrize(
    ("overrides", "field", "piece"), OVERRIDES, ids=lambda c: c[0][:40] if isinstance(c, list) else ""
)
def test_override_mistakes(
    overrides: list[str], field: str, piece: str, tmp_path: Path, digits_task: Task
) -> None:
    assert_says(refused(tmp_path / "recipe.toml", "seed = 1", digits_task, overrides), field, piece)


# -- more than the machine has -------------------------------------------------------------------------


def test_a_long_range_is_not_listed(tmp_path: Path, digits_task: Task) -> None:
    """Written out, the values of either range are petabytes."""
    with contextlib.suppress(RecipeError):
        path = tmp_path / "recipe.toml"
        path.write_text(f"{SPACE}batch_size = {{int = [1, {10**15}]}}")
        session.check(load(path), digits_task, source="test")
    text = f"{SPACE}optimizer = {{int = [0, {10**15}]}}\nmomentum = {{float = [0.0, 0.9]}}"
    error = refused(tmp_path / "recipe.toml", text, digits_task)
    assert_says(error, "space.optimizer", "is not a number; use {choice = [...]}")


def test_a_model_larger_than_memory(tmp_path: Path, digits_task: Task) -> None:
    error = refused(tmp_path / "recipe.toml", f"[hparams]\nwidth = {10**12}", digits_task)
    assert [p.where.split(".")[0] for p in error.problems] == ["hparams"]


# -- files that are no recipe --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "piece"),
    [
        (b"x = ", "is not valid TOML: Invalid value"),
        (b"[a", "is not valid TOML"),
        (b"seed = 1\nseed = 2", "is not valid TOML"),
        (b"\xff\xfe", "must be UTF-8 text"),
        (b"#" * 1_000_001, "recipe.toml: 1 problem\n  must be at most 1,000,000 bytes"),
        (b"x = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"seed = " + b"1" * 5000, "is not valid TOML"),
    ],
    ids=["value", "header", "twice", "not utf-8", "too large", "too deep", "too many digits"],
)
def test_not_a_recipe(content: bytes, piece: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert piece in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_such_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load(tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nosuch", "", ".", "x" * 300])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(RecipeError, match=r"neither a file nor a known recipe; known: .*digits_mlp_tpe"):
        find_recipe(name)


# -- tasks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "piece"),
    [
        ({"kind": "regresion"}, "task.kind: must be .* or module:factory"),
        ({"model": "resnet9000"}, "task.model: must be .* or module:factory"),
        ({"data": "mnits"}, "task.data: must be .* or module:factory"),
        ({"model": "os:getcwd"}, "task.model: would import 'os', .* add --allow-import os"),
        ({"data": "os:getcwd"}, "task.data: would import 'os'"),
        ({"kind": "os:getcwd"}, "task.kind: would import 'os'"),
        ({"kind": "os.path:join", "allow_import": ["o"]}, "task.kind: would import 'os.path'"),
        ({"kind": "a b:c", "allow_import": ["a b"]}, "task.kind: must look like module:factory"),
        ({"kind": "os:", "allow_import": ["os"]}, "task.kind: must look like module:factory"),
        ({"kind": "os:nope", "allow_import": ["os"]}, "task.kind: module 'os' has no 'nope'"),
        ({"kind": "no_such_mod:x", "allow_import": ["no_such_mod"]}, "task.kind: cannot import"),
        ({"kind": "os:getcwd", "allow_import": ["os"]}, "task.kind: os:getcwd must give a hpt_torch.Task"),
        ({"data": "os:getcwd", "allow_import": ["os"]}, "task.data: os:getcwd must give a hpt_torch.Data"),
        ({"kind": "os:environ", "allow_import": ["os"]}, "task.kind: "),
        ({"model": "os:environ", "allow_import": ["os"]}, "task.model: "),
        ({"kind": "textwrap:dedent", "allow_import": ["textwrap"]}, "task.kind: "),
        ({"valid_fraction": 1e-9}, r"task\.data: valid_fraction must leave at least one row"),
    ],
    ids=str,
)
def test_task_names(names: dict[str, object], piece: str) -> None:
    usual = {"kind": "classification", "model": "mlp", "data": "digits", "valid_fraction": 0.2}
    with pytest.raises(TaskError, match=piece):
        from_names(**{**usual, "holdout_fraction": 0.2, "seed": 0, **names})  # type: ignore[arg-type]


# -- all at once ---------------------------------------------------------------------------------------

FIVE_FIELDS = """
name = "a/b"
seed = -1
[search]
trails = 3
timeout = "soon"
[space]
lr = {float = [0.1, 0.01]}
"""
FIVE_BETWEEN = """
[task]
valid_fraction = 0.5
holdout_fraction = 0.5
[hparams]
lr = 0.1
[space]
lr = {float = [0.1, 0.2]}
dropout = {float = [0.0, 0.5], log = false, when = {nope = [1]}}
[objective]
metric = "valid/accuracy"
"""
FIVE_OF_THE_TASK = f"""
[hparams]
optimizer = "lion"
xyz = 1
batch_size = 0
{SPACE}
droput = {{float = [0.1, 0.2]}}
activation = {{choice = ["rellu"]}}
"""


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (FIVE_FIELDS, ["name", "seed", "search.trails", "search.timeout", "space.lr"]),
        (
            FIVE_BETWEEN,
            [
                "task.valid_fraction",
                "hparams.lr",
                "space.dropout.when.nope",
                "search.trials",
                "objective.direction",
            ],
        ),
        (
            FIVE_OF_THE_TASK,
            ["hparams.optimizer", "hparams.xyz", "hparams.batch_size", "space.droput", "space.activation"],
        ),
        # a wrong field must not hide that other, right ones do not go together
        ('seed = "x"\n[hparams]\nlr = 0.1\n[space]\nlr = {float = [0.1, 0.2]}', ["seed", "hparams.lr"]),
    ],
    ids=["fields", "between fields", "of the task", "fields and between"],
)
def test_all_mistakes_are_shown_together(
    text: str, fields: list[str], tmp_path: Path, digits_task: Task
) -> None:
    error = refused(tmp_path / "recipe.toml", text, digits_task)
    assert {p.where for p in error.problems} >= set(fields), str(error)
    assert f"{len(error.problems)} problems" in str(error)
    assert all(f"\n  {field}: " in str(error) for field in fields)


def test_overrides_are_checked_with_the_rest(tmp_path: Path, digits_task: Task) -> None:
    error = refused(tmp_path / "recipe.toml", "seed = -1", digits_task, ["nonsense", "search.trials=0"])
    assert [p.where for p in error.problems] == ["'nonsense'", "seed", "search.trials"]


def test_the_checker_of_these_tests_can_fail(tmp_path: Path, digits_task: Task) -> None:
    error = refused(tmp_path / "recipe.toml", "seed = -1", digits_task)
    for field, piece in (("sed", "greater"), ("seed", "no such words")):
        with pytest.raises(AssertionError):
            assert_says(error, field, piece)
    with pytest.raises(pytest.fail.Exception):
        refused(tmp_path / "recipe.toml", "seed = 1", digits_task)


# -- the command line ----------------------------------------------------------------------------------


def hpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hpt_torch.cli import main; main()", *arguments]
    script = Path(sys.executable).with_name("hpt")
    if script.exists():
        command = [str(script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def assert_refused(done: subprocess.CompletedProcess[str], field: str, folder: Path) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("hpt: ")
    assert f"\n  {field}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in folder.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize("command", ["run", "validate"])
def test_the_command_line_refuses_and_writes_nothing(command: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('seed = "a"\n[search]\ntrails = 3\n')
    done = hpt(command, "recipe.toml", cwd=tmp_path)
    assert_refused(done, "seed", tmp_path)
    assert_refused(done, "search.trails", tmp_path)


def test_the_command_line_refuses_what_is_no_file(tmp_path: Path) -> None:
    done = hpt("run", "nosuch.toml", cwd=tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "nosuch.toml" in done.stderr
    assert "cannot be read" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "arguments", "field"),
    [
        ("[hparams]\nlr = -1", [], "hparams.lr"),
        ("", ["lr=-1"], "hparams.lr"),
        ("", ["--run-dir", "kept", "droput=0.1"], "hparams.droput"),
        ('[task]\nmodel = "os:getcwd"', [], "task.model"),
        ('[task]\ndata = "mnits"', [], "task.data"),
        ("[task]\nvalid_fraction = 1e-9", [], "task.data"),
        (SPACE + "momentum = {float = [0.0, 0.9]}", [], "space.momentum"),
    ],
    ids=str,
)
def test_the_command_line_checks_the_task_before_it_writes(
    text: str, arguments: list[str], field: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    assert_refused(hpt("run", "recipe.toml", *arguments, cwd=tmp_path), field, tmp_path)


def test_a_recipe_from_python_is_named_so() -> None:
    with pytest.raises(RecipeError, match=r"^tune\(\): 1 problem\n  seed: "):
        recipes.build({"seed": "x"}, source="tune()")
