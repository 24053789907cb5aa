"""`Result.plot`: interactive figures for a notebook, by Optuna where it has them, else by plotly itself.

`report.html` has its own, drawn as SVG, for plotly is an extra: pip install "hpt-torch[plots]".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hpt_torch.report.summary import Summary
from hpt_torch.report.svg import robust
from hpt_torch.samplers import make_study
from hpt_torch.schedulers.lineage import lineage, phases
from hpt_torch.space import Choice, is_log
from hpt_torch.types import RunError, Trial

_BOLD = 3  # curves of the best trials
_MOST_CURVES = 200  # what a browser draws without getting slow
_COLOURS = ("#d9480f", "#1971c2", "#2f9e44")
_FAINT = "rgba(120, 130, 140, 0.25)"


class Plots:
    """Each method gives a plotly Figure, to show, to change (`update_layout`) or to save (`write_html`)."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary = summary.as_searched
        self._study = make_study(summary.space, summary.trials, summary.objective)
        self._metric = summary.objective.metric

    def progress(self) -> Any:
        """Every trial's score, and the best so far."""
        return self._optuna("plot_optimization_history", target_name=self._metric)

    def slice(self, *names: str) -> Any:
        """The score against each hyperparameter (default: all that were searched)."""
        return self._optuna("plot_slice", params=self._names(names), target_name=self._metric)

    def parallel(self, *names: str) -> Any:
        """A line a trial through its hyperparameters (default: all) to its score."""
        return self._optuna("plot_parallel_coordinate", params=self._names(names), target_name=self._metric)

    def contour(self, first: str, second: str) -> Any:
        """The score over two hyperparameters, interpolated between trials."""
        return self._optuna("plot_contour", params=self._names((first, second)), target_name=self._metric)

    def importance(self) -> Any:
        """The share of the score's variance that each hyperparameter explains."""
        return self._optuna("plot_param_importances", target_name=self._metric)

    def pareto(self) -> Any:
        """Both objectives of each trial, and the Pareto set. Raises RunError where there is one objective."""
        second = self._summary.second
        if second is None:
            raise RunError("the run has one objective; set objective.second to see two against each other")
        _plotly()
        from optuna.visualization import plot_pareto_front

        study = make_study(self._summary.space, self._summary.trials, self._summary.objective, second)
        figure = plot_pareto_front(study, target_names=[self._metric, second.metric])
        return figure.update_layout(template="plotly_white")

    def curves(self, metric: str | None = None) -> Any:
        """A metric over epochs, such as "loss" (default: the objective's). Bold: valid of the best trials,
        dashed: their train; faint: valid of the others."""
        go, name = _plotly(), (metric or self._metric).removeprefix("valid/")
        trials = [*self._summary.ranked, *(t for t in self._summary.trials if t not in self._summary.ranked)]
        if not any(_curve(trial, f"valid/{name}") for trial in trials):
            raise RunError(f"no trial reported valid/{name}; reported are {', '.join(self._reported())}")
        figure = go.Figure()
        for trial in reversed(trials[_BOLD:_MOST_CURVES]):
            self._line(figure, _curve(trial, f"valid/{name}"), f"trial {trial.number}", _FAINT, legend=False)
        for colour, trial in reversed(list(zip(_COLOURS, trials[:_BOLD], strict=False))):
            for part, dash in (("train", "dot"), ("valid", "solid")):
                label = f"trial {trial.number}, {part}"
                self._line(figure, _curve(trial, f"{part}/{name}"), label, colour, dash=dash, width=2.5)
        directions = {
            "loss": "minimize",
            self._metric.removeprefix("valid/"): self._summary.objective.direction,
        }
        if name in directions:  # a few diverged trials and first epochs would flatten all the others
            values = [y for line in figure.data for y in line.y]
            scale, _ = robust(values, directions[name])
            if not scale.log:
                figure.update_yaxes(range=[scale.low, scale.high])
        return _titled(figure, f"{name} over epochs", "epoch", name)

    def gap(self) -> Any:
        """Train against valid, a point a trial: below the diagonal (above it for a loss) is overfitting."""
        go, name = _plotly(), self._metric.removeprefix("valid/")
        points = [
            (t, t.metrics[f"train/{name}"], t.metrics[f"valid/{name}"])
            for t in self._summary.ranked
            if f"train/{name}" in t.metrics and math.isfinite(t.metrics[f"train/{name}"])
        ]
        if not points:
            raise RunError(f"no complete trial reported both train/{name} and valid/{name}")
        trials, train, valid = zip(*points, strict=True)
        ends = [min(*train, *valid), max(*train, *valid)]
        figure = go.Figure()
        diagonal = {"color": "#868e96", "dash": "dash"}
        figure.add_scatter(x=ends, y=ends, mode="lines", line=diagonal, name="train = valid")
        texts = [f"trial {trial.number}" for trial in trials]
        marker = {"color": list(range(len(trials))), "colorscale": "Viridis_r", "size": 9,
                  "colorbar": {"title": "rank"}}  # fmt: skip
        figure.add_scatter(x=train, y=valid, mode="markers", text=texts, marker=marker, name="trials")
        figure.update_layout(showlegend=False)
        return _titled(figure, f"{name}: train against valid", f"train/{name}", f"valid/{name}")

    def schedule(self, name: str) -> Any:
        """A hyperparameter over epochs: bold on the way to the best weights, faint in every trial.

        For Population Based Training; elsewhere the lines are level.
        """
        go = _plotly()
        self._names((name,))  # refuses what was not searched
        figure, trials = go.Figure(), {trial.number: trial for trial in self._summary.trials}
        for trial in self._summary.trials[:_MOST_CURVES]:
            parts = phases(trial)
            ends = [*(phase.epoch for phase in parts[1:]), trial.epoch]
            steps = [(p.epoch, end, p.hparams.get(name)) for p, end in zip(parts, ends, strict=True)]
            self._steps(figure, steps, f"trial {trial.number}", _FAINT)
        best = self._summary.best
        if best is not None:
            way = lineage(trials, best.number, best.kept_epoch or best.epoch)
            steps = [(s.after, s.until, s.hparams.get(name)) for s in way]
            self._steps(figure, steps, f"trial {best.number}, the best", _COLOURS[0], width=3)
        dimension = self._summary.space[name]
        if not isinstance(dimension, Choice) and is_log(name, dimension):
            figure.update_yaxes(type="log")
        return _titled(figure, f"{name} over epochs", "epoch", name)

    # -- what they share -------------------------------------------------------------------------------

    def _optuna(self, function: str, **arguments: Any) -> Any:
        _plotly()
        import optuna.visualization

        figure = getattr(optuna.visualization, function)(self._study, **arguments)
        return figure.update_layout(template="plotly_white")

    def _names(self, names: Sequence[str]) -> list[str] | None:
        unknown = sorted(set(names) - set(self._summary.space))
        if unknown:
            known = ", ".join(self._summary.space)
            raise RunError(f"{unknown[0]!r} was not searched; searched were {known}")
        return list(names) or None

    def _reported(self) -> list[str]:
        names = {name for trial in self._summary.trials for name in trial.metrics}
        return sorted(name.removeprefix("valid/") for name in names if name.startswith("valid/"))

    @staticmethod
    def _line(
        figure: Any, points: Sequence[tuple[float, Any]], name: str, colour: str, *,
        dash: str = "solid", width: float = 1, legend: bool = True,
    ) -> None:  # fmt: skip
        x, y = [x for x, _ in points], [y for _, y in points]
        line = {"color": colour, "width": width, "dash": dash}
        figure.add_scatter(x=x, y=y, mode="lines", name=name, line=line, showlegend=legend)

    def _steps(
        self, figure: Any, steps: Sequence[tuple[int, int, Any]], name: str, colour: str, width: float = 1
    ) -> None:
        """(after, until, value) as a line of steps."""
        shown = [(after, until, v if isinstance(v, (int, float)) else str(v)) for after, until, v in steps]
        points = [(epoch, value) for after, until, value in shown for epoch in (after, until)]
        self._line(figure, points, name, colour, width=width, legend=width > 1)


def _curve(trial: Trial, name: str) -> list[tuple[float, float]]:
    return [
        (report.epoch, report.metrics[name])
        for report in trial.reports
        if name in report.metrics and math.isfinite(report.metrics[name])
    ]


def _titled(figure: Any, title: str, x: str, y: str) -> Any:
    return figure.update_layout(template="plotly_white", title=title, xaxis_title=x, yaxis_title=y)


def _plotly() -> Any:
    """plotly.graph_objects. Raises ImportError, with what to install, where it is missing."""
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ImportError("result.plot needs plotly: pip install 'hpt-torch[plots]'") from error
    return plotly.graph_objects
