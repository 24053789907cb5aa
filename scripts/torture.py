"""Kills runs with SIGKILL, at every durable step and at random instants, and continues them to their ends.

Each case is a short recipe. A run of it that is left in peace gives the reference; then runs of it lose their
process group, their coordinator or a worker, and the same command is given until it ends. What it leaves must
equal the reference byte for byte (`hpt report --canonical`), with no trial lost, double or not ended, no
process and no temporary file left. A table is printed; the exit status is 1 where anything failed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from torture_run import Life, instant_life, judge, live, reports_of, step_lives

from hpt_torch.record import Record

MLP: dict[str, Any] = tomllib.loads("""
[task]
model = "mlp"
data = "digits"
[hparams]
hidden_sizes = [16]
batch_size = 256
[space]
lr = { float = [1e-4, 1e-1], default = 1e-3 }
dropout = { float = [0.0, 0.5] }
[search]
trials = 6
round_size = 3
[trainer]
epochs = 4
threads = 1
[run]
workers = 2
checkpoint_every_seconds = 0.02
""")
CNN = {
    **MLP,
    "task": {"model": "cnn", "data": "digits_images", "data_options": {"limit": 400}},
    "hparams": {"channels": [4, 8], "batch_norm": True, "batch_size": 128},
}
RNN = {
    **MLP,
    "task": {
        "kind": "regression",
        "model": "rnn",
        "data": "adding",
        "data_options": {"rows": 400, "length": 8},
    },
    "hparams": {"cell": "gru", "hidden_size": 16, "batch_size": 128},
    "space": {"lr": MLP["space"]["lr"], "weight_decay": {"float": [1e-6, 1e-2], "default": 1e-6}},
}
GRID = {"lr": {"choice": [1e-3, 1e-2, 1e-1]}, "dropout": {"choice": [0.0, 0.3]}}
PBT = {"kind": "pbt", "interval_epochs": 1, "quantile": 0.34}
ALWAYS = {"checkpoint_every_seconds": 0.0}  # at every training step


def case(base: dict[str, Any], sampler: str, engine: str, executor: str, **sections: Any) -> dict[str, Any]:
    """A recipe: the base, and where a section is given too, its keys over those of the base."""
    raw = {**base, "executor": executor}
    changes = {"search": {"sampler": sampler}, "trainer": {"engine": engine}}
    for name, values in sections.items():
        changes[name] = {**changes.get(name, {}), **values}
    for name, values in changes.items():
        raw[name] = values if name == "space" else {**raw.get(name, {}), **values}
    return raw


CASES = {
    "tpe-fifo-loop-inline-mlp": case(MLP, "tpe", "loop", "inline"),
    "tpe-median-fused-processes-mlp": case(
        MLP, "tpe", "fused", "processes", scheduler={"kind": "median", "startup_trials": 2}
    ),
    "gp-fifo-loop-processes-mlp": case(MLP, "gp", "loop", "processes"),
    "gp-asha-fused-inline-mlp": case(MLP, "gp", "fused", "inline", scheduler={"kind": "asha"}),
    "grid-fifo-fused-processes-mlp": case(MLP, "grid", "fused", "processes", space=GRID),
    "grid-asha-loop-inline-mlp": case(MLP, "grid", "loop", "inline", space=GRID, scheduler={"kind": "asha"}),
    "random-fifo-compiled-processes-mlp": case(MLP, "random", "compiled", "processes"),
    "random-pbt-compiled-inline-mlp": case(MLP, "random", "compiled", "inline", scheduler=PBT),
    "random-pbt-fused-processes-mlp": case(MLP, "random", "fused", "processes", scheduler=PBT, run=ALWAYS),
    "random-pbt-loop-inline-mlp-baselines": case(
        MLP, "random", "loop", "inline", scheduler={**PBT, "baseline": True}, search={"trials": 3}
    ),
    "tpe-folds-refit-loop-processes-mlp": case(
        MLP, "tpe", "loop", "processes", evaluation={"folds": 2}, search={"trials": 4, "round_size": 2}
    ),
    "random-fifo-fused-processes-mlp-confirm": case(
        MLP, "random", "fused", "processes", final={"confirm": 2, "seeds": 2}, search={"trials": 4}
    ),
    "tpe-fifo-loop-processes-cnn": case(CNN, "tpe", "loop", "processes"),
    "random-asha-fused-inline-cnn": case(CNN, "random", "fused", "inline", scheduler={"kind": "asha"}),
    "random-pbt-loop-processes-cnn": case(CNN, "random", "loop", "processes", scheduler=PBT),
    "gp-fifo-fused-processes-rnn": case(RNN, "gp", "fused", "processes"),
    "random-median-loop-inline-rnn": case(
        RNN, "random", "loop", "inline", scheduler={"kind": "median", "startup_trials": 2}, run=ALWAYS
    ),
    "random-pbt-fused-inline-rnn": case(RNN, "random", "fused", "inline", scheduler=PBT),
}


@dataclass
class Result:
    """What became of one case."""

    name: str
    seed: str
    steps: int = 0  # durable steps of a session that is left in peace
    lives: int = 0
    step_kills: int = 0
    instant_kills: int = 0
    targets: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def torture(name: str, kills: int, seed: int, folder: Path, *, fast: bool) -> Result:
    """One case, killed at least so often, half of the kills at durable steps."""
    result = Result(name, f"{name}/{seed}")
    draw = random.Random(result.seed)
    recipe = folder / f"{name}.toml"
    recipe.write_text(tomli_w.dumps(CASES[name]))
    peace = live(recipe, folder / name / "peace", [], fast=fast)
    run = folder / name / "peace" / "run"
    result.failures = peace.failures or [*judge(run, reports_of(run)), *_misnamed(name, run)]
    if result.failures:
        return result
    expected, result.steps = reports_of(run), len(peace.steps)
    forks = CASES[name]["executor"] == "processes"
    targets = ("group", "coordinator", "worker") if forks else ("group",)
    planned = step_lives(peace.steps, kills // 3, targets, draw)
    while _too_few(result, kills, targets) and result.lives < 3 * kills + 10:
        drawn = planned.pop(0) if planned else instant_life(peace.seconds, targets, draw)
        where = folder / name / f"life-{result.lives}"
        life = live(recipe, where, drawn, fast=fast)
        failures = life.failures or judge(where / "run", expected)
        _count(result, life, failures, where)
        if not failures:
            shutil.rmtree(where)
    return result


def _too_few(result: Result, kills: int, targets: Sequence[str]) -> bool:
    """Some come too late to kill anything; where there are kills enough for it, each target gets one."""
    missed = kills >= len(targets) and any(not result.targets[target] for target in targets)
    return missed or sum(result.targets.values()) < kills


def _misnamed(name: str, run: Path) -> list[str]:
    """A case whose trials train in another way than its name says tests something else."""
    with Record(run / "run.db", readonly=True) as record:
        engines = {chunk["engine"] for plan in record.of_kind("plan") for chunk in plan.body["chunks"]}
    return [f"trains by {sorted(engines)}"] if CASES[name]["trainer"]["engine"] not in engines else []


def _count(result: Result, life: Life, failures: list[str], where: Path) -> None:
    result.lives += 1
    result.targets.update(kill.target for kill in life.delivered)
    result.step_kills += sum(bool(kill.step) for kill in life.delivered)
    result.instant_kills += sum(not kill.step for kill in life.delivered)
    killed = ", then ".join(map(str, life.delivered)) or "not killed"
    result.failures += [f"{where.name} ({killed}): {failure}" for failure in failures]


def table(results: list[Result]) -> str:
    """The results in markdown."""
    lines = ["| case | durable steps | runs | kills at steps | at random instants | group | coordinator "]
    lines[0] += "| worker | failures |"
    lines.append("|---|" + "---|" * 8)
    rows = [
        (r.steps, r.lives, r.step_kills, r.instant_kills, *(r.targets[t] for t in _TARGETS), len(r.failures))
        for r in results
    ]
    lines += [f"| {r.name} | {' | '.join(map(str, row))} |" for r, row in zip(results, rows, strict=True)]
    total = [sum(column) for column in zip(*rows, strict=True)]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, total))} |"])


_TARGETS = ("group", "coordinator", "worker")


def main(
    kills: Annotated[int, typer.Option(min=1, help="so many, over all cases")] = 300,
    recipes: Annotated[str, typer.Option(help="only the cases that have one of these words, a,b")] = "",
    seed: Annotated[int, typer.Option(help="the same seed draws the same kills")] = 0,
    fast: Annotated[
        bool, typer.Option("--fast", help="fork each session from one process that has loaded everything")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="the results, to this file")] = None,
    keep: Annotated[Path | None, typer.Option(help="where runs that failed are left")] = None,
) -> None:
    words = recipes.split(",")
    names = [name for name in CASES if any(word in name for word in words)]
    if not names:
        raise typer.BadParameter(f"no case has one of {words}; there are {', '.join(CASES)}")
    if fast:  # what a session would load is loaded once, before anything is forked
        import optuna._gp.gp  # noqa: F401

        import hpt_torch.cli
        import hpt_torch.observers.tensorboard
        import hpt_torch.report.page
        import hpt_torch.result  # noqa: F401
    start, results = time.monotonic(), []
    folder = keep or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        share = kills * (i + 1) // len(names) - kills * i // len(names)
        result = torture(name, max(1, share), seed, folder, fast=fast)
        results.append(result)
        print(f"{name}: {result.lives} runs, {len(result.failures)} failures", file=sys.stderr, flush=True)
        for failure in result.failures:
            print(f"  {failure}", file=sys.stderr, flush=True)
    print(table(results))
    print(f"\nseed {seed}, {time.monotonic() - start:.0f} s, {'forked' if fast else 'new'} processes")
    failed = any(result.failures for result in results)
    if json_path is not None:
        json_path.write_text(json.dumps([vars(result) for result in results], indent=1) + "\n")
    if keep is None and not failed:
        shutil.rmtree(folder)
    elif failed:
        print(f"what failed is in {folder}")
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
