"""The peers of `scripts/bench reach`: searches that stop trials early, for so many seconds.

    python scripts/peers_reach.py PEER JSON

trains until its time is up and writes a line of JSON for every epoch: Unix time, valid accuracy.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peers import MLP, _tensor_sets, fit, loaders


class _TimeIsUp(Exception):
    """Ends the training of a trial whose search has no time left."""


def _train(
    c: Mapping[str, Any],
    params: Mapping[str, Any],
    seed: int,
    sets: Any,
    report: Callable[[float, int], None],
) -> float:
    torch.manual_seed(seed)
    model = MLP(28 * 28, [params["width"]] * 2, params["dropout"])
    return fit(model, params, *loaders(*sets, params["batch_size"]), c["epochs"], report)


def _note(c: Mapping[str, Any], accuracy: float) -> None:
    with open(c["curve"], "a") as file:
        file.write(json.dumps([time.time(), accuracy]) + "\n")
    if time.time() > c["until"]:
        raise _TimeIsUp


def optuna(c: Mapping[str, Any]) -> None:
    """TPESampler and HyperbandPruner with an ordinary loop over a TensorDataset: one process, in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sets, space = _tensor_sets(c), c["space"]

    def objective(trial: Any) -> float:
        params = {
            "lr": trial.suggest_float("lr", *space["lr"], log=True),
            "dropout": trial.suggest_float("dropout", *space["dropout"]),
            "weight_decay": trial.suggest_float("weight_decay", *space["weight_decay"], log=True),
            **{name: trial.suggest_categorical(name, space[name]) for name in ("batch_size", "width")},
        }

        def report(accuracy: float, epoch: int) -> None:
            trial.report(accuracy, epoch)
            _note(c, accuracy)
            if trial.should_prune():
                raise optuna.TrialPruned

        return _train(c, params, c["seed"] + trial.number, sets, report)

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=c["seed"]),
        pruner=optuna.pruners.HyperbandPruner(min_resource=1, max_resource=c["epochs"], reduction_factor=3),
    )
    study.optimize(objective, timeout=c["until"] - time.time(), catch=())


def ray(c: Mapping[str, Any]) -> None:
    """ASHAScheduler and OptunaSearch, one actor a core, reused, the data by tune.with_parameters."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    def trainable(config: dict[str, Any], sets: Any) -> None:
        torch.set_num_threads(1)

        def report(accuracy: float, epoch: int) -> None:
            _note(c, accuracy)
            tune.report({"accuracy": accuracy})

        _train(c, config, c["seed"], sets, report)

    space = c["space"]
    ray.init(num_cpus=c["cores"], include_dashboard=False, log_to_driver=False)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, sets=_tensor_sets(c)), {"cpu": 1}),
        param_space={
            "lr": tune.loguniform(*space["lr"]),
            "dropout": tune.uniform(*space["dropout"]),
            "weight_decay": tune.loguniform(*space["weight_decay"]),
            "batch_size": tune.choice(space["batch_size"]),
            "width": tune.choice(space["width"]),
        },
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", num_samples=-1, time_budget_s=c["until"] - time.time(),
            reuse_actors=True, search_alg=OptunaSearch(seed=c["seed"]),
            scheduler=ASHAScheduler(max_t=c["epochs"], grace_period=1, reduction_factor=3),
        ),
        run_config=tune.RunConfig(storage_path=f"{c['folder']}/results", verbose=0),
    ).fit()  # fmt: skip


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    torch.set_num_threads(1)
    with contextlib.suppress(_TimeIsUp):
        {"optuna": optuna, "ray": ray}[sys.argv[1]](settings)
