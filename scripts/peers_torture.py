"""The peers of `scripts/bench torture`: one search each, which goes on as its documentation shows.

    python scripts/peers_torture.py PEER FOLDER

runs it to its end and prints one line of JSON: every trial that its storage then knows. All train the same
model on the same rows; a trial's seed is its hyperparameters', so that a result can be compared.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import MLP, SEED, fit, loaders
from torch.utils.data import TensorDataset

TRIALS, EPOCHS = 12, 6
LR, DROPOUT = (1e-4, 1e-1), (0.0, 0.5)
Trials = list[dict[str, Any]]  # each with state, params, value


def train(lr: float, dropout: float) -> float:
    """The valid accuracy of one model on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    inputs, targets = load_digits(return_X_y=True)
    x, y = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(targets)
    torch.manual_seed(int(lr * 1e9))
    sets = [TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])]
    params = {"lr": lr, "weight_decay": 0.0}
    value = fit(MLP(64, (64, 64), dropout), params, *loaders(*sets, 32), EPOCHS, lambda *_: None)
    with open(os.environ["TRAINED"], "a") as file:  # so that what is trained again can be counted
        file.write(f"{lr!r}\n")
    return value


def _optuna(storage: Any) -> Trials:
    """TPE, in an ordinary `study.optimize` for as many trials as are not complete yet."""
    import optuna

    study = optuna.create_study(
        study_name="torture",
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=SEED),
        direction="maximize",
        load_if_exists=True,
    )
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])

    def objective(trial: optuna.Trial) -> float:
        return train(trial.suggest_float("lr", *LR, log=True), trial.suggest_float("dropout", *DROPOUT))

    study.optimize(objective, n_trials=TRIALS - len(complete))
    return [{"state": t.state.name, "params": t.params, "value": t.value} for t in study.trials]


def optuna_sqlite(folder: Path) -> Trials:
    return _optuna(f"sqlite:///{folder}/optuna.db")


def optuna_heartbeat(folder: Path) -> Trials:
    """With a heartbeat, by which a trial whose process is gone is found, failed and tried again."""
    from optuna.storages import RDBStorage, RetryFailedTrialCallback

    return _optuna(
        RDBStorage(
            f"sqlite:///{folder}/optuna.db",
            heartbeat_interval=1,
            grace_period=2,
            failed_trial_callback=RetryFailedTrialCallback(),
        )
    )


def optuna_journal(folder: Path) -> Trials:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return _optuna(JournalStorage(JournalFileBackend(f"{folder}/optuna.log")))


def ray(folder: Path) -> Trials:
    """Random search, two trials at a time; `Tuner.restore` where there is something to restore."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray as ray_core
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    def trainable(config: dict[str, Any]) -> None:
        tune.report({"accuracy": train(config["lr"], config["dropout"])})

    ray_core.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    place = str(folder / "results" / "torture")
    if tune.Tuner.can_restore(place):
        tuner = tune.Tuner.restore(place, trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"lr": tune.loguniform(*LR), "dropout": tune.uniform(*DROPOUT)},
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                num_samples=TRIALS,
                search_alg=BasicVariantGenerator(random_state=SEED, max_concurrent=2),
            ),
            run_config=tune.RunConfig(storage_path=str(folder / "results"), name="torture", verbose=0),
        )
    found: Trials = []
    for result in tuner.fit():
        value = (result.metrics or {}).get("accuracy")
        state = "COMPLETE" if value is not None and result.error is None else "ERROR"
        found.append({"state": state, "params": result.config, "value": value})
    ray_core.shutdown()
    return found


PEERS: dict[str, Callable[[Path], Trials]] = {
    f.__name__: f for f in (optuna_sqlite, optuna_heartbeat, optuna_journal, ray)
}


if __name__ == "__main__":
    os.environ["TRAINED"] = str(Path(sys.argv[2]).resolve() / "trained.txt")
    print(json.dumps(PEERS[sys.argv[1]](Path(sys.argv[2]))))
