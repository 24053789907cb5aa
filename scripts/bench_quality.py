"""Quality at equal compute: Population Based Training against its baselines, over seeds."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hpt_torch import baselines, session, tasks
from hpt_torch import recipe as recipes
from hpt_torch.record import Record
from hpt_torch.report import summarise
from hpt_torch.report.population import BASELINES

_RECIPES = Path(__file__).parent.parent / "recipes"
_RUNS = {"pbt": "", "pbt without explore": f"{BASELINES}/exploit_only", "random": f"{BASELINES}/random"}


def quality(
    names: Annotated[list[str] | None, typer.Argument(help="recipes of pbt")] = None,
    seeds: int = 5,
    json_path: Path | None = None,
) -> None:
    """Best valid and hold-out score of pbt, of pbt without explore and of random search: as many members,
    as many epochs, the same split, the same members at the start; mean and standard deviation over seeds."""
    rows = []
    for name in names or ["digits_mlp_pbt", "fashion_mnist_cnn_pbt", "rows_rnn_pbt"]:
        scores: dict[str, list[tuple[float, float]]] = {run: [] for run in _RUNS}
        for seed in range(seeds):
            typer.echo(f"{name}, seed {seed}", err=True)
            for run, score in _scores(name, seed).items():
                scores[run].append(score)
        rows += [{"recipe": name, "run": run, "scores": pairs} for run, pairs in scores.items()]
    print(f"| {seeds} seeds | | valid | hold-out | best on hold-out |\n|---|---|---|---|---|")
    for row in rows:
        others = [other["scores"] for other in rows if other["recipe"] == row["recipe"]]
        wins = sum(row["scores"][i][1] >= max(o[i][1] for o in others) for i in range(seeds))
        valid, held = (_mean([pair[part] for pair in row["scores"]]) for part in (0, 1))
        print(f"| {row['recipe']} | {row['run']} | {valid} | {held} | {wins} |")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))


def _mean(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


def _scores(name: str, seed: int) -> dict[str, tuple[float, float]]:
    """(valid, hold-out) of the best member of each run. The seed is that of the search and the training."""
    overrides = ["scheduler.baseline=true", "run.tensorboard=false", f"trainer.seed={seed}"]
    recipe = recipes.load(_RECIPES / f"{name}.toml", overrides)
    task = tasks.from_names(**recipe.task.model_dump(), seed=recipe.seed)
    checked = session.check(recipe.model_copy(update={"seed": seed}), task, source=name)
    with tempfile.TemporaryDirectory() as folder:
        baselines.run(checked, Path(folder) / "run")
        return {run: _best(Path(folder) / "run" / where) for run, where in _RUNS.items()}


def _best(path: Path) -> tuple[float, float]:
    with Record(path / "run.db", readonly=True) as record:
        summary = summarise(record)
    assert summary.best is not None
    metric: Any = summary.objective.metric
    held = summary.holdout[f"holdout/{metric.removeprefix('valid/')}"]
    return summary.best.metrics[metric], held
