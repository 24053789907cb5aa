"""The peers of `scripts/bench grid` and `fashion`, each as its own documentation shows it.

    python scripts/peers.py PEER JSON

runs one of them in a process of its own and prints one line of JSON: the seconds of its training phase, its
best valid accuracy, how many trials it trained. hpt_torch is not imported: it would add to their start-up.
All train the same model on the same rows, with the same epochs, batch sizes, optimizer and seeds.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

SEED = 0
Report = Callable[[float, int], None]


class MLP(nn.Module):
    """features-*sizes-10 with batch norm and dropout; no bias before a batch norm, as in hpt_torch."""

    def __init__(self, features: int, sizes: Sequence[int], dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for size in sizes:
            layers += [nn.Linear(features, size, bias=False), nn.BatchNorm1d(size), nn.ReLU()]
            layers += [nn.Dropout(dropout)]
            features = size
        self.layers = nn.Sequential(*layers, nn.Linear(features, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)  # type: ignore[no-any-return]


def fit(
    model: nn.Module,
    params: Mapping[str, Any],
    train: DataLoader[Any],
    valid: DataLoader[Any],
    epochs: int,
    report: Report,
) -> float:
    """The ordinary loop of the PyTorch and Optuna tutorials. Tells each epoch's valid accuracy to `report`,
    and returns the last."""
    optimizer = torch.optim.Adam(model.parameters(), lr=params["lr"], weight_decay=params["weight_decay"])
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        for inputs, targets in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        model.eval()
        correct = rows = 0
        with torch.no_grad():
            for inputs, targets in valid:
                correct += int((model(inputs).argmax(dim=1) == targets).sum())
                rows += len(targets)
        accuracy = correct / rows
        report(accuracy, epoch)
    return accuracy


def loaders(
    train: Dataset[Any], valid: Dataset[Any], batch_size: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Shuffled train batches without the last partial one, as hpt_torch's; valid rows in large ones."""
    return (
        DataLoader(train, batch_size=batch_size, shuffle=True, drop_last=True),
        DataLoader(valid, batch_size=1024),
    )


def result(seconds: float, best: float, trials: int) -> dict[str, Any]:
    return {"seconds": seconds, "best": best, "trials": trials}


# -- the digits grid -----------------------------------------------------------------------------------

GRID_SIZES = 2  # hidden layers


def read(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def grid_trial(
    data: Mapping[str, np.ndarray], params: Mapping[str, Any], epochs: int, seed: int, report: Report
) -> float:
    torch.manual_seed(seed)
    sets = [
        TensorDataset(torch.from_numpy(data[f"inputs_{part}"]), torch.from_numpy(data[f"targets_{part}"]))
        for part in ("train", "valid")
    ]
    model = MLP(data["inputs_train"].shape[1], [params["width"]] * GRID_SIZES, params["dropout"])
    return fit(model, params, *loaders(sets[0], sets[1], params["batch_size"]), epochs, report)


def grid_loop(c: Mapping[str, Any]) -> dict[str, Any]:
    """No tuner: two nested loops."""
    import itertools

    data, best, started = read(c["data"]), 0.0, time.perf_counter()
    points = list(itertools.product(*c["grid"].values()))
    for number, point in enumerate(points):
        params = dict(zip(c["grid"], point, strict=True))
        best = max(best, grid_trial(data, params, c["epochs"], SEED + number, lambda *_: None))
    return result(time.perf_counter() - started, best, len(points))


def _optuna_objective(data: Mapping[str, np.ndarray], c: Mapping[str, Any], trial: Any) -> float:
    params = {name: trial.suggest_categorical(name, values) for name, values in c["grid"].items()}
    return grid_trial(data, params, c["epochs"], SEED + trial.number, trial.report)


def grid_optuna(c: Mapping[str, Any]) -> dict[str, Any]:
    """optuna.samplers.GridSampler, one process, in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data, started = read(c["data"]), time.perf_counter()
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.GridSampler(c["grid"], seed=SEED)
    )
    study.optimize(functools.partial(_optuna_objective, data, c))
    return result(time.perf_counter() - started, study.best_value, len(study.trials))


def _optuna_worker(c: Mapping[str, Any], _: int) -> None:
    import optuna

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GridSampler(c["grid"], seed=SEED)  # one seed: as its documentation asks
    study = optuna.load_study(study_name="grid", storage=_storage(c), sampler=sampler)
    study.optimize(functools.partial(_optuna_objective, read(c["data"]), c))


def _storage(c: Mapping[str, Any]) -> Any:
    if not c.get("journal"):
        return f"sqlite:///{c['folder']}/optuna.db"
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(f"{c['folder']}/optuna.log"))


def grid_optuna2(c: Mapping[str, Any]) -> dict[str, Any]:
    """Two processes share one SQLite storage ("Multi-processing optimization": multiprocessing.Pool)."""
    import multiprocessing

    import optuna

    started = time.perf_counter()
    optuna.create_study(study_name="grid", storage=_storage(c), direction="maximize")
    with multiprocessing.get_context("fork").Pool(processes=2) as pool:
        pool.map(functools.partial(_optuna_worker, c), range(2), chunksize=1)
    seconds = time.perf_counter() - started
    study = optuna.load_study(study_name="grid", storage=_storage(c))
    return result(seconds, study.best_value, len(study.trials))


def grid_optuna2j(c: Mapping[str, Any]) -> dict[str, Any]:
    """The same on Optuna's journal file, which its documentation prefers to SQLite for processes."""
    return grid_optuna2({**c, "journal": True})


def grid_ray(c: Mapping[str, Any]) -> dict[str, Any]:
    """tune.Tuner over tune.grid_search, a function trainable that reports each epoch, one CPU a trial, actors
    reused, the data by tune.with_parameters."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import tune

    epochs = c["epochs"]

    def trainable(config: dict[str, Any], data: Mapping[str, np.ndarray]) -> None:
        torch.set_num_threads(1)
        grid_trial(data, config, epochs, SEED, lambda accuracy, _: tune.report({"accuracy": accuracy}))

    # Its sockets lie in its temporary folder, and their paths may have about a hundred characters.
    short: dict[str, Any] = {"_temp_dir": f"{c['folder']}/ray"} if len(c["folder"]) < 30 else {}
    ray.init(num_cpus=c["cores"], include_dashboard=False, log_to_driver=False, **short)
    started = time.perf_counter()
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trainable, data=read(c["data"])), {"cpu": 1}),
        param_space={name: tune.grid_search(values) for name, values in c["grid"].items()},
        tune_config=tune.TuneConfig(metric="accuracy", mode="max", reuse_actors=True),
        run_config=tune.RunConfig(storage_path=f"{c['folder']}/results", verbose=0),
    )
    results = tuner.fit()
    seconds = time.perf_counter() - started
    best = (results.get_best_result().metrics or {})["accuracy"]
    ray.shutdown()
    return result(seconds, best, len(results))


class SkorchMLP(MLP):
    """The grid's model with arguments that GridSearchCV can set one by one."""

    def __init__(self, features: int = 64, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__(features, [width] * GRID_SIZES, dropout)


def grid_skorch(c: Mapping[str, Any]) -> dict[str, Any]:
    """skorch.NeuralNetClassifier in sklearn's GridSearchCV on the one split, or on folds of train and valid
    and with the refit that follows, as many jobs as cores. It scores once, after the last epoch."""
    from sklearn.model_selection import GridSearchCV, PredefinedSplit, StratifiedKFold
    from skorch import NeuralNetClassifier

    data = read(c["data"])
    started = time.perf_counter()
    torch.manual_seed(SEED)
    net = NeuralNetClassifier(
        SkorchMLP,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        max_epochs=c["epochs"],
        train_split=False,
        iterator_train__shuffle=True,
        iterator_train__drop_last=True,
        iterator_valid__batch_size=1024,
        verbose=0,
    )
    names = {
        "lr": "lr",
        "batch_size": "iterator_train__batch_size",
        "dropout": "module__dropout",
        "width": "module__width",
        "weight_decay": "optimizer__weight_decay",
    }
    fold = [np.full(len(data["targets_train"]), -1), np.zeros(len(data["targets_valid"]), dtype=int)]
    search = GridSearchCV(
        net,
        {names[name]: values for name, values in c["grid"].items()},
        cv=StratifiedKFold(c["folds"], shuffle=True, random_state=SEED)
        if c["folds"]
        else PredefinedSplit(np.concatenate(fold)),
        scoring="accuracy",
        refit=bool(c["folds"]),
        n_jobs=c["cores"],
    )
    both = [
        np.concatenate([data[f"{kind}_{p}"] for p in ("train", "valid")]) for kind in ("inputs", "targets")
    ]
    search.fit(*both)
    scores = search.cv_results_["mean_test_score"]
    return result(time.perf_counter() - started, float(scores.max()), len(scores))


# -- Fashion-MNIST -------------------------------------------------------------------------------------


def _torchvision_sets(c: Mapping[str, Any]) -> list[Dataset[Any]]:
    from torch.utils.data import Subset
    from torchvision import datasets, transforms

    to_tensor = transforms.ToTensor()
    return [
        Subset(datasets.FashionMNIST(c["root"], train=train, transform=to_tensor), range(c[f"{part}_rows"]))
        for part, train in (("train", True), ("valid", False))
    ]


def _tensor_sets(c: Mapping[str, Any]) -> list[Dataset[Any]]:
    data = read(c["data"])
    return [
        TensorDataset(
            torch.from_numpy(data[f"inputs_{part}"]).unsqueeze(1).float() / 255,
            torch.from_numpy(data[f"targets_{part}"]),
        )
        for part in ("train", "valid")
    ]


def _random_search(c: Mapping[str, Any], sets: Callable[[], list[Dataset[Any]]]) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: Any) -> float:
        torch.manual_seed(SEED + trial.number)
        params = {
            "lr": trial.suggest_float("lr", *c["space"]["lr"], log=True),
            "dropout": trial.suggest_float("dropout", *c["space"]["dropout"]),
            "weight_decay": trial.suggest_float("weight_decay", *c["space"]["weight_decay"], log=True),
        }
        model = MLP(28 * 28, (128, 128), params["dropout"])
        train, valid = sets()
        return fit(model, params, *loaders(train, valid, c["batch_size"]), c["epochs"], trial.report)

    started = time.perf_counter()
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=SEED))
    study.optimize(objective, n_trials=c["trials"])
    seconds = time.perf_counter() - started
    each = [trial.duration.total_seconds() for trial in study.trials if trial.duration is not None]
    later = each[1:] or each  # the first trial pays for what torch loads when it first trains
    return {**result(seconds, study.best_value, len(each)), "later": sum(later) / len(later)}


def fashion_images(c: Mapping[str, Any]) -> dict[str, Any]:
    """The loop of Optuna's documented PyTorch example: torchvision's FashionMNIST with ToTensor, made anew in
    each trial, in a DataLoader."""
    return _random_search(c, lambda: _torchvision_sets(c))


def fashion_tensors(c: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a TensorDataset that is made once."""
    sets = _tensor_sets(c)
    return _random_search(c, lambda: sets)


def peak(c: Mapping[str, Any]) -> dict[str, Any]:
    """GFLOP/s of fp32 torch.mm of two square matrices: the best of several."""
    size, fastest = c["size"], float("inf")
    a, b = torch.rand(size, size), torch.rand(size, size)
    out = torch.empty(size, size)
    for _ in range(c["repeats"]):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - started)
    return {"gflops": 2 * size**3 / fastest / 1e9, "threads": torch.get_num_threads()}


PEERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "loop": grid_loop,
    "optuna": grid_optuna,
    "optuna2": grid_optuna2,
    "optuna2j": grid_optuna2j,
    "ray": grid_ray,
    "skorch": grid_skorch,
    "images": fashion_images,
    "tensors": fashion_tensors,
    "peak": peak,
}


def main() -> None:
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    if settings.get("threads"):
        torch.set_num_threads(settings["threads"])
    Path(settings.get("folder", ".")).mkdir(parents=True, exist_ok=True)
    print("\n" + json.dumps(PEERS[name](settings)))


if __name__ == "__main__":
    main()
