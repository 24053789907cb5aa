"""Ray Tune's Population Based Training, as its documentation shows it: the peer of `scripts/bench pbt`.

    python scripts/peers_pbt.py JSON

A class Trainable with save_checkpoint and load_checkpoint (weights and optimizer state), actors reused
through reset_config, one CPU each. hpt_torch is not imported. Prints one line of JSON, as peers.py does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from peers import MLP, SEED, loaders, read, result
from torch import nn
from torch.utils.data import TensorDataset


def pbt_ray(c: Mapping[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    data, spaces = read(c["data"]), c["space"]

    class Member(tune.Trainable):
        """One member: a step is an epoch."""

        def setup(self, config: dict[str, Any]) -> None:
            torch.set_num_threads(1)
            sets = [
                TensorDataset(torch.from_numpy(data[f"inputs_{p}"]), torch.from_numpy(data[f"targets_{p}"]))
                for p in ("train", "valid")
            ]
            self.train_rows, self.valid_rows = loaders(sets[0], sets[1], c["batch_size"])
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            torch.manual_seed(SEED)
            self.model = MLP(data["inputs_train"].shape[1], c["sizes"], new_config["dropout"])
            self.optimizer = torch.optim.Adam(self.model.parameters())
            self._set(new_config)
            return True

        def _set(self, config: Mapping[str, Any]) -> None:
            for group in self.optimizer.param_groups:
                group["lr"], group["weight_decay"] = config["lr"], config["weight_decay"]

        def step(self) -> dict[str, float]:
            self.model.train()
            for inputs, targets in self.train_rows:
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(inputs), targets).backward()
                self.optimizer.step()
            self.model.eval()
            with torch.no_grad():
                right = [(self.model(x).argmax(1) == y).float().sum() for x, y in self.valid_rows]
            return {"accuracy": float(sum(right)) / len(data["targets_valid"])}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, os.path.join(checkpoint_dir, "state.pt"))

        def load_checkpoint(self, checkpoint_dir: str) -> None:
            state = torch.load(os.path.join(checkpoint_dir, "state.pt"))
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._set(self.config)

    scales = {"log": tune.loguniform, "linear": tune.uniform}
    draws = {name: scales[scale](low, high) for name, (scale, low, high) in spaces.items()}
    # Its sockets lie in its temporary folder, and their paths may have about a hundred characters.
    short: dict[str, Any] = {"_temp_dir": f"{c['folder']}/ray"} if len(c["folder"]) < 30 else {}
    ray.init(num_cpus=c["cores"], include_dashboard=False, log_to_driver=False, **short)
    started = time.perf_counter()
    tuner = tune.Tuner(
        tune.with_resources(Member, {"cpu": 1}),
        param_space=draws,
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=c["members"],
            reuse_actors=True,
            scheduler=PopulationBasedTraining(
                time_attr="training_iteration",
                perturbation_interval=c["interval"],
                hyperparam_mutations=draws,
                quantile_fraction=0.25,
                resample_probability=0.25,
            ),
        ),
        run_config=tune.RunConfig(
            storage_path=f"{c['folder']}/results", verbose=0, stop={"training_iteration": c["epochs"]}
        ),
    )
    results = tuner.fit()
    seconds = time.perf_counter() - started
    best = (results.get_best_result().metrics or {})["accuracy"]
    ray.shutdown()
    return result(seconds, best, len(results))


if __name__ == "__main__":
    print("\n" + json.dumps(pbt_ray(json.loads(sys.argv[1]))))
