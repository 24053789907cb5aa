"""Confirmation: the best trials of a search, each trained again with new seeds, before one is chosen.

The best score of many is flattered by the choice. Trained again, under the same new seeds for all, the trials
are compared anew, and the noise between seeds shows. One run a seed, in which they train together.
"""

from __future__ import annotations

import hashlib
import statistics
from typing import TYPE_CHECKING, Any

from hpt_torch import recipe as recipes
from hpt_torch import session
from hpt_torch.record import Event, Record
from hpt_torch.report.confirmation import confirmation_of
from hpt_torch.seeding import derive_seed
from hpt_torch.space import thaw
from hpt_torch.types import Interrupted, Trial, TrialState

if TYPE_CHECKING:
    from hpt_torch.tuner import Tuner

FOLDER = "confirmations"  # inside the run's directory


def confirm(tuner: Tuner) -> None:
    """Trains the best `final.confirm` trials again under `final.seeds` seeds and records who wins, unless
    that is recorded. Raises Interrupted where a stop is asked for."""
    settings, objective = tuner.recipe.final, tuner.objective
    assert settings.confirm is not None
    complete = [t for t in tuner.record.in_order() if t.state is TrialState.COMPLETE]
    top = objective.ranked(complete)[: settings.confirm]
    done = confirmation_of(tuner.record, objective)
    if len(top) < 2 or (done is not None and list(done.scores) == [t.number for t in top]):
        return
    tuner.say(f"training the best {len(top)} trials again with {settings.seeds} new seeds")
    scores: dict[int, list[float]] = {trial.number: [] for trial in top}
    failed = set()
    for i in range(1, settings.seeds + 1):
        for trial, score in zip(top, _train(tuner, top, i), strict=True):
            if score is None:
                failed.add(trial.number)
            else:
                scores[trial.number].append(score)
    for number in failed:
        scores[number] = []
    means = {number: statistics.mean(found) for number, found in scores.items() if found}
    if not means:
        tuner.say("each of them failed under a new seed: the choice stays the search's")
        return
    sign = -1.0 if objective.direction == "maximize" else 1.0
    winner = min(means, key=lambda number: (sign * means[number], list(scores).index(number)))
    tuner.commit(Event(kind="confirmed", body={"scores": scores, "winner": winner}))
    found = confirmation_of(tuner.record, objective)
    assert found is not None
    tuner.say(found.verdict)


def _train(tuner: Tuner, top: list[Trial], i: int) -> list[float | None]:
    """The scores of these trials under the i-th new seed, from a run of its own that goes on where it was."""
    recipe = tuner.recipe
    raw: dict[str, Any] = recipe.model_dump(exclude_none=True)
    names = hashlib.sha256(repr([trial.number for trial in top]).encode()).hexdigest()[:8]
    raw |= {
        "name": f"{recipe.name[:50]}-seed-{i}",
        "space": dict(recipe.space),
        "search": {
            "sampler": "random",
            "trials": len(top),
            "round_size": len(top),
            "start_with_defaults": False,
            "points": [{name: thaw(value) for name, value in t.hparams.items()} for t in top],
        },
        "trainer": {**raw["trainer"], "seed": derive_seed(recipe.seed, "confirm", i)},
        "scheduler": {},
        "final": {},
        "run": {**raw["run"], "tensorboard": False},
    }
    source = f"{tuner.dir.path}, confirmation {i}"
    folder = tuner.dir.path / FOLDER / f"{names}-seed-{i}"
    checked = session.check(recipes.build(raw, source=source), tuner.task, source=source)
    try:
        session.run(checked, folder, only_search=True, costs=tuner.planning.costs)
    except Interrupted as stop:
        raise Interrupted(stop.signal, f"stopped; everything is saved in {tuner.dir.path}") from None
    with Record(folder / "run.db", readonly=True) as record:
        return [
            tuner.objective.score(trial) if trial.state is TrialState.COMPLETE else None
            for trial in record.in_order()
        ]
