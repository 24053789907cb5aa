"""`scripts/bench reach`: how soon a search is as good as Optuna's is in the end."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import bench_search
import typer

from hpt_torch.record import Record

_HERE = Path(__file__).resolve().parent
_SPACE: dict[str, list[Any]] = {
    "lr": [1e-4, 1e-1],
    "dropout": [0.0, 0.6],
    "weight_decay": [1e-6, 1e-2],
    "batch_size": [64, 128, 256],
    "width": [128, 256],
}
_RECIPE = """name = "reach"
seed = {seed}
[task]
data = "image_npz"
data_options = {{ path = "{path}" }}
[hparams]
batch_norm = true
[space]
lr = {{ float = [1e-4, 1e-1] }}
dropout = {{ float = [0.0, 0.6] }}
weight_decay = {{ float = [1e-6, 1e-2] }}
batch_size = {{ choice = [64, 128, 256] }}
hidden_sizes = {{ choice = [[128, 128], [256, 256]] }}
[search]
sampler = "tpe"
round_size = {round_size}
timeout = {seconds}
start_with_defaults = false
[scheduler]
kind = "{scheduler}"
reduction_factor = 3
[trainer]
epochs = {epochs}
[run]
tensorboard = false
"""
Curve = list[tuple[float, float]]  # (seconds since the command, best valid accuracy so far)


def reach(
    minutes: Annotated[float, typer.Option(help="of each search")] = 10.0,
    seeds: int = 5,
    epochs: int = 18,
    rows: int = 60000,
    peers: str = "optuna,ray",
    scheduler: str = "asha",
    round_size: int = 24,
    svg: Annotated[Path | None, typer.Option(help="draw the curves there")] = None,
    json_path: Path | None = None,
) -> None:
    """Fashion-MNIST, an MLP of two hidden layers: the best valid accuracy of any epoch over wall-clock, for
    TPE and early stopping by each tool. All commands with their start-up, one after another."""
    before, names = bench_search.load(), ["optuna", *(p for p in peers.split(",") if p not in ("", "optuna"))]
    curves: dict[str, list[Curve]] = {name: [] for name in ("ours", *names)}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        told = {**bench_search._fashion_files(root, rows), "space": _SPACE, "epochs": epochs}
        told["cores"] = bench_search._cores()
        for seed in range(seeds):
            for name in curves:
                folder = root / f"{name}{seed}"
                folder.mkdir()
                settings = {**told, "seed": seed, "folder": str(folder), "curve": str(folder / "curve")}
                if name == "ours":
                    recipe = folder / "reach.toml"
                    more = {"round_size": round_size, "scheduler": scheduler, "epochs": epochs}
                    recipe.write_text(
                        _RECIPE.format(seed=seed, path=told["data"], seconds=60 * minutes, **more)
                    )
                    curves[name].append(_ours(recipe, folder / "run"))
                else:
                    curves[name].append(_peer(name, settings, 60 * minutes))
                typer.echo(f"seed {seed}, {name}: {curves[name][-1][-1][1]:.4f}", err=True)
    bench_search._write(json_path, curves)
    _table(curves, minutes, seeds)
    bench_search.say_load(before)
    if svg is not None:
        svg.write_text(_drawn(curves, 60 * minutes))


def _ours(recipe: Path, run_dir: Path) -> Curve:
    started = time.time()
    command = [sys.executable, "-m", "hpt_torch", "run", str(recipe), "--run-dir", str(run_dir), "--quiet"]
    subprocess.run(command, check=True, capture_output=True, cwd=_HERE.parent)
    with Record(run_dir / "run.db", readonly=True) as record:
        reports = [(event.at, event.body["metrics"]["valid/accuracy"]) for event in record.of_kind("report")]
    return _best(started, reports)


def _peer(name: str, settings: dict[str, Any], seconds: float) -> Curve:
    started = time.time()
    told = json.dumps({**settings, "until": started + seconds})
    command = [sys.executable, str(_HERE / "peers_reach.py"), name, told]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_HERE.parent)
    if done.returncode:
        typer.echo(done.stderr[-4000:], err=True)
        raise typer.Exit(1)
    return _best(started, [json.loads(line) for line in Path(settings["curve"]).read_text().splitlines()])


def _best(started: float, reports: Sequence[Sequence[float]]) -> Curve:
    ordered = sorted((at - started, accuracy) for at, accuracy in reports)
    bests = itertools.accumulate((accuracy for _, accuracy in ordered), max)
    return [(at, best) for (at, _), best in zip(ordered, bests, strict=True)]


def _when(curve: Curve, accuracy: float) -> float | None:
    return next((at for at, best in curve if best >= accuracy), None)


def _table(curves: dict[str, list[Curve]], minutes: float, seeds: int) -> None:
    print(f"| {minutes:g} minutes, {seeds} seeds | epochs | best valid accuracy | s to Optuna's | share |")
    print("|---|---|---|---|---|")
    for name, each in curves.items():
        bests = [curve[-1][1] for curve in each]
        found = [_when(curve, other[-1][1]) for curve, other in zip(each, curves["optuna"], strict=True)]
        shown = ", ".join("not reached" if at is None else f"{at:.0f}" for at in found)
        shares = [float("inf") if at is None else at / (60 * minutes) for at in found]
        label = {"ours": "hpt run", "optuna": "Optuna", "ray": "Ray Tune"}[name]
        median = statistics.median(shares)
        share = "–" if median == float("inf") else f"{median:.2f}"
        epochs = statistics.mean(len(curve) for curve in each)
        print(f"| {label} | {epochs:,.0f} | {statistics.mean(bests):.4f} | {shown} | {share} |")
    print("\nMeans over seeds; seconds of each seed; share: of the whole time, median.")


def _drawn(curves: dict[str, list[Curve]], seconds: float) -> str:
    """All curves as steps, one colour a tool."""
    colours = {"ours": "#1f6feb", "optuna": "#d1242f", "ray": "#8250df"}
    low = min(next(best for at, best in curve if at >= 0) for each in curves.values() for curve in each)
    low, high = max(low, 0.8), max(curve[-1][1] for each in curves.values() for curve in each) + 0.002
    lines = []
    for name, each in curves.items():
        for curve in each:
            x = [60 + 700 * min(at, seconds) / seconds for at, _ in curve]
            y = [380 - 350 * (max(best, low) - low) / (high - low) for _, best in curve]
            points = f"{x[0]:.1f},{y[0]:.1f} " + " ".join(
                f"{x[i]:.1f},{y[i - 1]:.1f} {x[i]:.1f},{y[i]:.1f}" for i in range(1, len(x))
            )
            end = f" {760:.1f},{y[-1]:.1f}"
            lines.append(f'<polyline points="{points}{end}" fill="none" stroke="{colours[name]}"/>')
    words = [
        f'<text x="64" y="{30 + 16 * i}" fill="{colours[name]}">{name}</text>'
        for i, name in enumerate(curves)
    ]
    words += [f'<text x="4" y="384">{low:.3f}</text>', f'<text x="4" y="34">{high:.3f}</text>']
    words += [f'<text x="720" y="398">{seconds:g} s</text>']
    frame = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 410" font-family="sans-serif">'
    return frame + '<rect width="800" height="410" fill="white"/>' + "".join(lines + words) + "</svg>\n"
