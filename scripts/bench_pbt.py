"""`scripts/bench pbt`, `decisions`: Population Based Training against Ray's, and what a decision costs."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import bench_search as search
import typer

import hpt_torch as hpt
from hpt_torch.evolution import Evolution
from hpt_torch.record import Record

_SPACE = {
    "lr": ("log", 1e-4, 1e-1), "weight_decay": ("log", 1e-6, 1e-2), "dropout": ("linear", 0.0, 0.6)
}  # fmt: skip
_RECIPE = """
name = "pbt"
[task]
model = "mlp"
data = "digits"
[hparams]
optimizer = "adam"
hidden_sizes = [128, 128]
batch_norm = true
batch_size = 64
[space]
lr = {{ float = [1e-4, 1e-1] }}
weight_decay = {{ float = [1e-6, 1e-2] }}
dropout = {{ float = [0.0, 0.6] }}
[search]
sampler = "random"
trials = {members}
[scheduler]
kind = "pbt"
interval_epochs = {interval}
quantile = 0.25
resample_probability = 0.25
[trainer]
epochs = {epochs}
"""


def pbt(
    repeats: int = 3,
    members: int = 16,
    epochs: int = 20,
    interval: int = 2,
    ray: Annotated[bool, typer.Option(help="Ray Tune's too, which the extra `bench` installs")] = True,
    json_path: search._JSON = None,
) -> None:
    """Population Based Training of an MLP on digits: ours against Ray Tune's with reused actors."""
    before = search.load()
    chosen = search._installed("ray") if ray else []
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], **{name: [] for name in chosen}}
    ratios: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        search._digits(root / "digits.npz")
        recipe = root / "pbt.toml"
        recipe.write_text(_RECIPE.format(members=members, interval=interval, epochs=epochs))
        told = {
            "space": _SPACE, "sizes": [128, 128], "batch_size": 64, "members": members, "epochs": epochs,
            "interval": interval, "data": str(root / "digits.npz"), "cores": search._cores(),
        }  # fmt: skip
        for repeat in range(repeats):
            mine = search._ours(recipe, root / f"ours{repeat}", [])
            runs["ours"].append(mine)
            for name in chosen:
                settings = json.dumps({**told, "folder": str(root / f"r{repeat}")})
                seconds, other = search._script("peers_pbt.py", settings)
                other |= {"whole": seconds, "phase": other.pop("seconds")}
                runs[name].append(other)
                ratios[name].append({key: other[key] / mine[key] for key in ("whole", "phase")})
    what = f"{members} members, {epochs} epochs, a decision every {interval}, {search._cores()} cores"
    rows = search._table(what, runs, ratios)
    search.say_load(before)
    search._write(json_path, {"load": before, "rows": rows})


def decisions(members: int = 64, epochs: int = 20, json_path: search._JSON = None) -> None:
    """Milliseconds of a generation's decision: exploit, explore, commit (with its fsync), copy members."""
    times: list[float] = []
    decide = Evolution._decide

    def timed(evolution: Evolution, epoch: int) -> None:
        started = time.perf_counter()
        decide(evolution, epoch)
        times.append(1e3 * (time.perf_counter() - started))

    Evolution._decide = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        space = {name: {"float": [low, high]} for name, (_, low, high) in _SPACE.items()}
        hpt.tune(
            hpt.Classification(hpt.models.MLP, hpt.data.digits(seed=0)), space,
            hparams={"hidden_sizes": [128, 128], "batch_norm": True, "batch_size": 64},
            trials=members, epochs=epochs, sampler="random", run_dir=Path(folder) / "run", progress=False,
            scheduler={"kind": "pbt", "interval_epochs": 1, "quantile": 0.25}, tensorboard=False,
        )  # fmt: skip
        with Record(Path(folder) / "run/run.db", readonly=True) as record:
            exploits = [len(event.body["exploits"]) for event in record.of_kind("generation")]
    Evolution._decide = decide  # type: ignore[method-assign]
    copies, median, most = statistics.median(exploits), statistics.median(times), max(times)
    print("| members | generations | copies a generation | median, ms | most, ms |\n|---|---|---|---|---|")
    print(f"| {members} | {len(times)} | {copies:g} | {median:.1f} | {most:.1f} |")
    search._write(json_path, {"members": members, "copies": copies, "median_ms": median, "most_ms": most})
