"""Replay: the best trial of a run, trained again from scratch with other seeds.

The score of the best of many is flattered by the choice, and that of a Population Based Training also by the
copies that were made on the way. One model trained alone on the same schedule has neither advantage.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from hpt_torch import recipe as recipes
from hpt_torch import session
from hpt_torch.observers import Observer
from hpt_torch.record import Record
from hpt_torch.report.schedule import schedule_recipe
from hpt_torch.report.summary import Summary, summarise
from hpt_torch.seeding import derive_seed
from hpt_torch.task import Task
from hpt_torch.types import Objective, RunError

FOLDER = "replays"  # inside the run's directory


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What the best trial of a run reached, and what its replays did; scores are valid scores."""

    objective: Objective
    score: float  # of the run's best trial
    holdout: float | None
    scores: Sequence[float]  # of the replays that did not fail
    holdouts: Sequence[float]
    failed: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean score of replays (Student's t); None below two of them."""
        if len(self.scores) < 2:
            return None
        mean = statistics.mean(self.scores)
        error = statistics.stdev(self.scores) / math.sqrt(len(self.scores))
        half = float(stats.t.ppf(0.975, len(self.scores) - 1)) * error
        return mean - half, mean + half

    @property
    def reaching(self) -> int:
        """How many replays are at least as good as the run's best trial."""
        return sum(not self.objective.better(self.score, score) for score in self.scores)

    @property
    def verdict(self) -> str:
        """One sentence."""
        metric, count = self.objective.metric, len(self.scores)
        if not count:
            return f"Every replay failed; the run's best trial has {metric} {self.score:.4f}."
        mean = statistics.mean(self.scores)
        head = f"{self.reaching} of {count} replays reach the run's {metric} of {self.score:.4f}"
        if self.interval is None:
            return f"{head}; it has {mean:.4f}."
        low, high = self.interval
        edge = high if self.objective.direction == "maximize" else low
        falls_short = self.objective.better(self.score, edge)
        says = (
            "the run's figure is flattered by selection"
            if falls_short
            else "the schedule, not the selection, made the run's figure"
        )
        return f"{head}; their mean is {mean:.4f} (95 % interval {low:.4f} to {high:.4f}): {says}."


def replay(
    path: Path,
    task: Task,
    *,
    seeds: int = 5,
    observers: Sequence[Observer] = (),
) -> Replay:
    """Trains the best trial of the run at `path` again, from scratch, `seeds` times.

    Data and its split are the run's; initial weights, the order of the data and noise come from other seeds.
    Each replay is a run in `path`/replays, so that this too goes on where it was. Raises RunError where the
    run has no complete trial.
    """
    with Record(path / "run.db", readonly=True) as record:
        summary = summarise(record)
        if summary.best is None:
            raise RunError(f"{path} has no complete trial to replay; let it finish first")
        raw = schedule_recipe(record.of_kind("run")[0].body["recipe"], summary)
    seed = int(raw["seed"])
    replays = []
    for i in range(1, seeds + 1):
        trainer = {**raw["trainer"], "seed": derive_seed(seed, "replay", i)}
        recipe = recipes.build({**raw, "trainer": trainer}, source=f"{path}, replay {i}")
        folder = path / FOLDER / f"trial-{summary.best.number}-seed-{i}"
        session.run(session.check(recipe, task, source=f"{path}, replay {i}"), folder, observers=observers)
        with Record(folder / "run.db", readonly=True) as record:
            replays.append(summarise(record))
    objective, score = summary.objective, summary.objective.score(summary.best)
    assert score is not None
    scores = [objective.score(r.best) for r in replays if r.best is not None]
    holdouts = [_holdout(r) for r in replays]
    return Replay(
        objective=objective,
        score=score,
        holdout=_holdout(summary),
        scores=[s for s in scores if s is not None],
        holdouts=[h for h in holdouts if h is not None],
        failed=sum(r.best is None for r in replays),
    )


def _holdout(summary: Summary) -> float | None:
    return summary.holdout.get(f"holdout/{summary.objective.metric.removeprefix('valid/')}")
