"""What a run ends with: what training the best trials again with other seeds has shown, who is chosen, and
where its weights are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpt_torch.record import Record, StateFile
from hpt_torch.types import Objective, Trial, TrialState

SIGNIFICANCE = 0.05
REFIT = "refit"  # the key of the file with the weights of the chosen trial's last training


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """The best trials of a search, each trained again with the same few new seeds."""

    objective: Objective
    scores: Mapping[int, Sequence[float]]  # by trial, in the order of the search: one a seed; empty: failed
    winner: int  # the best mean

    def mean(self, trial: int) -> float:
        return statistics.mean(self.scores[trial])

    def deviation(self, trial: int) -> float:
        """Standard deviation over seeds: the noise of one training."""
        return statistics.stdev(self.scores[trial])

    def p_value(self, trial: int) -> float:
        """Of a paired t-test over seeds that the winner is no better; 1 where they never differ."""
        ours, theirs = self.scores[self.winner], self.scores[trial]
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        if len(set(differences)) == 1:
            return 1.0 if differences[0] == 0 else 0.0
        from scipy import stats  # here: importing it takes a second, at every start

        value = float(stats.ttest_rel(ours, theirs).pvalue)
        return 1.0 if math.isnan(value) else value

    @property
    def rivals(self) -> list[int]:
        """The trials that the winner cannot be told from."""
        others = [trial for trial, scores in self.scores.items() if trial != self.winner and scores]
        return [trial for trial in others if self.p_value(trial) > SIGNIFICANCE]

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        seeds = len(self.scores[self.winner])
        first = next(iter(self.scores))
        kept = "stays the best" if first == self.winner else f"takes the place of trial {first}"
        text = (
            f"Trial {self.winner} {kept}: mean {self.mean(self.winner):.4f} over {seeds} new seeds, "
            f"standard deviation {self.deviation(self.winner):.4f}."
        )
        if self.rivals:
            names = ", ".join(map(str, self.rivals))
            text += f" It cannot be told from trial{'s' if len(self.rivals) > 1 else ''} {names}."
        return text


def confirmation_of(record: Record, objective: Objective) -> Confirmation | None:
    """The newest one, where it is of the trials that are the best now."""
    event = record.last("confirmed")
    if event is None:
        return None
    scores = {int(trial): scores for trial, scores in event.body["scores"].items()}
    ranked = objective.ranked([t for t in record.in_order() if t.state is TrialState.COMPLETE])
    if [trial.number for trial in ranked[: len(scores)]] != list(scores):
        return None
    return Confirmation(objective=objective, scores=scores, winner=event.body["winner"])


def chosen(record: Record, objective: Objective) -> Trial | None:
    """The trial that the run ends with: the winner of the confirmation, else the one with the best score."""
    found = confirmation_of(record, objective)
    if found is not None:
        return record.trials[found.winner]
    return best_of(record, objective)


def best_of(record: Record, objective: Objective) -> Trial | None:
    """The completed trial with the best score; the lower number where scores are equal."""
    ranked = objective.ranked([t for t in record.in_order() if t.state is TrialState.COMPLETE])
    return ranked[0] if ranked else None


def weights_of(record: Record, trial: Trial) -> StateFile | None:
    """The file with the weights of the chosen trial: where the search has not kept them (with folds, after a
    confirmation) those of its last training, once that is done."""
    kept = record.state_files.get("best", [])
    if kept and kept[-1].meta["trial"] == trial.number and record.last("confirmed") is None:
        return kept[-1]
    return refitted(record, trial)


def refitted(record: Record, trial: Trial) -> StateFile | None:
    """The file with the weights that the trial's last training gave."""
    files = record.state_files.get(REFIT, [])
    return next((file for file in reversed(files) if file.meta["trial"] == trial.number), None)
