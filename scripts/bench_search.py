"""`scripts/bench grid` and `fashion`: whole searches against peers.

Ours is the real command in a process of its own, so are the peers (scripts/peers.py), start-up included;
they alternate in one run, and a ratio is to the run of ours just before. "Training phase" is ours from the
committed plan to the last trial's end, as the record has it; a peer's is its search without imports.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import hpt_torch as hpt
from hpt_torch.record import Record

_HERE = Path(__file__).resolve().parent
_GRID: dict[str, list[Any]] = {
    "lr": [1e-3, 3e-3, 1e-2],
    "batch_size": [32, 64, 128],
    "dropout": [0.0, 0.2, 0.4],
    "width": [32, 64, 128],
    "weight_decay": [0.0, 1e-5, 1e-3],
}
_LABELS = {
    "loop": "ordinary loop, no tuner",
    "optuna": "Optuna + ordinary loop",
    "optuna2": "Optuna, two processes, one SQLite storage",
    "optuna2j": "Optuna, two processes, one journal file",
    "ray": "Ray Tune, one actor a core, reused",
    "skorch": "skorch + GridSearchCV, one job a core",
    "images": "Optuna, its PyTorch example's loop (torchvision, DataLoader)",
    "tensors": "Optuna, the same with a TensorDataset",
}
_NEEDS = {"ray": "ray", "skorch": "skorch"}
_JSON = Annotated[Path | None, typer.Option(help="also write the figures there")]
_SET = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE of our recipe, such as run.workers=1")
]
# Two threads of a small model wait for each other at every operation: on a machine with other work a trial
# then took 0.3 to 36 s where one thread took 0.3 s each time. One is fair to peers; ours has one a worker.
_THREADS = Annotated[int, typer.Option(help="of peers of one process; 0: torch's default")]


# -- one run -------------------------------------------------------------------------------------------


def _run(command: Sequence[str]) -> tuple[float, str]:
    """Seconds and standard output of a command."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=_HERE.parent)
    seconds = time.perf_counter() - started
    if done.returncode:
        typer.echo(done.stdout[-2000:] + done.stderr[-4000:], err=True)
        raise typer.Exit(1)
    return seconds, done.stdout


def _script(name: str, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Seconds of one of our scripts and the JSON in its last line."""
    seconds, text = _run([sys.executable, str(_HERE / name), *arguments])
    return seconds, json.loads(text.strip().splitlines()[-1])


def _ours(recipe: Path, run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """`hpt run` of the recipe in a new run directory."""
    command = [sys.executable, "-m", "hpt_torch", "run", str(recipe), *overrides, "--run-dir", str(run_dir)]
    seconds, _ = _run(command)
    with Record(run_dir / "run.db", readonly=True) as record:
        plan, last = record.of_kind("plan")[0], record.last("finish")
        assert last is not None
        scores = [t.reports[-1].metrics["valid/accuracy"] for t in record.in_order() if t.reports]
        engines = {(c["engine"], len(c["trials"])) for e in record.of_kind("plan") for c in e.body["chunks"]}
    return {
        "whole": seconds,
        "phase": last.elapsed - plan.elapsed,
        "best": max(scores),
        "trials": len(scores),
        "engines": sorted(engines),
    }


def _peer(name: str, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    seconds, told = _script("peers.py", name, json.dumps({**settings, "folder": str(folder)}))
    return {"whole": seconds, "phase": told.pop("seconds"), **told}


def _installed(peers: str) -> list[str]:
    """The peers that can run; says what the others need."""
    chosen = [name.strip() for name in peers.split(",") if name.strip()]
    for name in chosen:
        if name not in _LABELS:
            raise typer.BadParameter(f"peers must be among {', '.join(_LABELS)}, got {name!r}")
    absent = [n for n in chosen if n in _NEEDS and importlib.util.find_spec(_NEEDS[n]) is None]
    for name in absent:
        typer.echo(f"{name} is left out: not installed; .venv/bin/python -m pip install -e '.[bench]'\n")
    return [name for name in chosen if name not in absent]


def _table(what: str, runs: Mapping[str, list[dict[str, Any]]], ratios: Mapping[str, list[dict[str, float]]],
           gflops: Mapping[str, float] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Prints medians, ours first. Returns the rows."""
    more = " | training GFLOP/s" if gflops else ""
    print(f"| {what} | whole command, s | ratio | training phase, s | ratio | best valid accuracy{more} |")
    print("|---|---|---|---|---|---" + ("|---|" if gflops else "|"))
    rows = []
    for name, each in runs.items():
        row: dict[str, Any] = {key: statistics.median(r[key] for r in each) for key in ("whole", "phase")}
        row |= {"name": name, "best": max(r["best"] for r in each), "trials": each[-1]["trials"]}
        row |= {"runs": each, "ratio": 1.0, "phase_ratio": 1.0}
        if name != "ours":
            row["ratio"] = statistics.median(r["whole"] for r in ratios[name])
            row["phase_ratio"] = statistics.median(r["phase"] for r in ratios[name])
        label = f"{_LABELS.get(name, 'hpt run')} ({row['trials']} trials)"
        cells = [label, f"{row['whole']:.1f}", f"{row['ratio']:.1f} x", f"{row['phase']:.1f}"]
        cells += [f"{row['phase_ratio']:.1f} x", f"{row['best']:.4f}"]
        if gflops:
            row["gflops"] = gflops[name]
            cells.append(f"{gflops[name]:.1f}")
        print(f"| {' | '.join(cells)} |")
        rows.append(row)
    return rows


def _write(path: Path | None, what: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(what, indent=1))


# -- the digits grid -----------------------------------------------------------------------------------


def _smaller(points: int) -> dict[str, list[Any]]:
    """The grid with its longest lists shortened until it has at most so many points."""
    grid = {name: list(values) for name, values in _GRID.items()}
    while math.prod(map(len, grid.values())) > points:
        max(reversed(grid.values()), key=len).pop()
    return grid


def _digits(path: Path) -> None:
    """The rows that our recipe trains and scores on, for the peers."""
    data = hpt.data.digits(seed=0)
    parts = {"train": data.train, "valid": data.valid}
    np.savez(path, **{f"{n}_{p}": t.numpy() for p, rows in parts.items() for n, t in rows.tensors.items()})


def grid(
    peers: str = "optuna,optuna2,ray,skorch",
    repeats: int = 1,
    epochs: int = 10,
    points: Annotated[int, typer.Option(help="at most so many points of the grid, for a quick look")] = 243,
    folds: Annotated[int, typer.Option(help="of cross-validation; then the peer is skorch alone")] = 0,
    peer_threads: _THREADS = 1,
    settings: _SET = None,
    json_path: _JSON = None,
) -> None:
    """The 243-point grid of an MLP on digits: ours against Optuna, Ray Tune, skorch (and loop, optuna2j)."""
    before = load()
    chosen, values = _installed("skorch" if folds else peers), _smaller(points)
    overrides = [f"trainer.epochs={epochs}", *(settings or [])]
    overrides += [f"evaluation.folds={folds}"] if folds else []
    if values != _GRID:
        overrides += [f"space.{name}={{choice={json.dumps(options)}}}" for name, options in values.items()]
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], **{name: [] for name in chosen}}
    ratios: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        _digits(root / "digits.npz")
        told = {"grid": values, "epochs": epochs, "data": str(root / "digits.npz"), "cores": _cores()}
        told["folds"] = folds
        for repeat in range(repeats):
            for name in chosen or [""]:
                mine = _ours(
                    _HERE.parent / "recipes/digits_mlp_grid.toml", root / f"ours{repeat}{name}", overrides
                )
                runs["ours"].append(mine)
                if name:
                    threads = peer_threads if name in ("loop", "optuna") else 1
                    other = _peer(name, {**told, "threads": threads}, root / f"{name}{repeat}")
                    runs[name].append(other)
                    ratios[name].append({key: other[key] / mine[key] for key in ("whole", "phase")})
    count = math.prod(map(len, values.values()))
    cut = f", {folds} folds" if folds else ""
    rows = _table(f"grid of {count} points{cut}, {epochs} epochs, {_cores()} cores", runs, ratios)
    say_load(before)
    _write(json_path, {"points": count, "epochs": epochs, "cores": _cores(), "load": before, "rows": rows})


def load() -> float | None:
    """Processes that wanted a core in the last minute; None where that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def say_load(before: float | None) -> None:
    """Tells how busy the machine was before we began: beside other work no figure is worth quoting."""
    if before is not None:
        busy = "; not idle: do not quote these figures" if before > 0.3 * _cores() else ""
        print(f"\nLoad before the first run: {before:.1f} on {_cores()} cores{busy}.")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- Fashion-MNIST -------------------------------------------------------------------------------------

_FASHION = """name = "fashion"
[task]
data = "image_npz"
data_options = {{ path = "{path}" }}
[hparams]
hidden_sizes = [128, 128]
batch_norm = true
batch_size = {batch}
[space]
lr = {{ float = {lr} }}
dropout = {{ float = {dropout} }}
weight_decay = {{ float = {weight_decay} }}
[search]
sampler = "random"
trials = {trials}
start_with_defaults = false
[trainer]
epochs = {epochs}
"""
_FASHION_SPACE = {"lr": [1e-4, 3e-2], "dropout": [0.0, 0.5], "weight_decay": [1e-6, 1e-2]}
# Forward and weight gradients of all layers, input gradients of all but the first; a multiply-add is two.
_FLOPS = 2 * 784 * 128 * 2 + 6 * (128 * 128 + 128 * 10)
_VALID = 5000  # of the official test rows; the others are the hold-out


def _fashion_files(root: Path, rows: int) -> dict[str, Any]:
    """The same rows for everybody: an .npz, and idx files as torchvision lays them out."""
    from hpt_torch.data.image_sources import find

    found = {name: tensor.numpy() for name, tensor in find("fashion_mnist").items()}
    train, valid, holdout = slice(0, rows), slice(0, _VALID), slice(_VALID, None)
    parts = {"train": ("train", train), "valid": ("test", valid), "test": ("test", holdout)}
    arrays = {f"inputs_{p}": found[f"x_{source}"][chosen, 0] for p, (source, chosen) in parts.items()}
    labels = {f"targets_{p}": found[f"y_{s}"][chosen].astype(np.int64) for p, (s, chosen) in parts.items()}
    np.savez(root / "fashion.npz", **arrays, **labels)
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, stem in (("train", "train"), ("test", "t10k")):
        images, targets = found[f"x_{part}"][:, 0], found[f"y_{part}"].astype(np.uint8)
        for array, kind in ((images, "images-idx3"), (targets, "labels-idx1")):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{stem}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return {
        "root": str(root),
        "data": str(root / "fashion.npz"),
        "train_rows": len(arrays["inputs_train"]),
        "valid_rows": _VALID,
    }


def _peak() -> float:
    """Two-core fp32 torch.mm, GFLOP/s."""
    return float(_script("peers.py", "peak", json.dumps({"size": 2048, "repeats": 30}))[1]["gflops"])


def fashion(
    trials: int = 32,
    epochs: int = 5,
    rows: int = 60000,
    batch_size: int = 64,
    repeats: int = 1,
    peers: str = "images,tensors",
    peer_trials: Annotated[
        int, typer.Option(help="train so many (2 or more) and count the rest alike; 0: all")
    ] = 0,
    peer_threads: _THREADS = 1,
    settings: _SET = None,
    json_path: _JSON = None,
) -> None:
    """Random search of an MLP 784-128-128-10 on Fashion-MNIST: ours against Optuna with its own loop."""
    before = load()
    count = min(peer_trials or trials, trials)
    chosen = _installed(peers)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], **{name: [] for name in chosen}}
    ratios: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        told = _fashion_files(root, rows)
        told |= {"space": _FASHION_SPACE, "epochs": epochs, "trials": count, "batch_size": batch_size}
        recipe = root / "fashion.toml"
        recipe.write_text(
            _FASHION.format(
                path=(root / "fashion.npz").as_posix(), batch=batch_size, trials=trials, epochs=epochs,
                **_FASHION_SPACE,
            )
        )  # fmt: skip
        peaks = []
        for repeat in range(repeats):
            for name in chosen or [""]:
                peaks.append(_peak())
                mine = _ours(recipe, root / f"ours{repeat}{name}", settings or [])
                runs["ours"].append(mine)
                if name:
                    peer = _peer(name, {**told, "threads": peer_threads}, root / f"{name}{repeat}")
                    rest = (trials - count) * peer["later"]
                    peer |= {key: peer[key] + rest for key in ("whole", "phase")}
                    runs[name].append(peer)
                    ratios[name].append({key: peer[key] / mine[key] for key in ("whole", "phase")})
        peaks.append(_peak())
    samples = told["train_rows"] // batch_size * batch_size * epochs * trials
    phases = {name: statistics.median(r["phase"] for r in each) for name, each in runs.items()}
    gflops = {name: _FLOPS * samples / phase / 1e9 for name, phase in phases.items()}
    title = f"{trials} trials x {epochs} epochs, {told['train_rows']:,} rows, batch {batch_size}"
    table = _table(title, runs, ratios, gflops)
    if count < trials:
        print(f"\nPeers trained {count} trials; each of the others counts as one after the first.")
    share = gflops["ours"] / max(peaks)
    print(f"\nfp32 torch.mm of 2048 x 2048, {_cores()} cores, in the same run: {max(peaks):.0f} GFLOP/s")
    print(f"our training phase: {gflops['ours']:.1f} GFLOP/s, {share:.0%} of it")
    print(f"engines: {runs['ours'][-1]['engines']}")
    say_load(before)
    _write(json_path, {"title": title, "peaks": peaks, "share": share, "load": before, "rows": table})
