"""Samplers: which points to try next, as a pure function of the finished rounds and a derived seed.

Optuna's samplers restart their random sequence in every process, so each decision gets a fresh sampler
with a seed of its own and an in-memory study rebuilt from the record: the same history and seed give the
same points in any process, however often the run was interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from hpt_torch import grids
from hpt_torch import space as spaces
from hpt_torch.seeding import derive_seed, generator
from hpt_torch.space import Space
from hpt_torch.types import HParams, HParamValue, Objective, Trial, TrialState

SamplerName = Literal["tpe", "random", "grid", "gp", "qmc", "nsga2"]
ROUND_SIZES: Mapping[str, int] = {"tpe": 10, "gp": 5, "random": 128, "grid": 256, "qmc": 128, "nsga2": 20}


def suggest(
    space: Space,
    history: Sequence[Trial],
    numbers: Sequence[int],
    *,
    round: int,
    kind: SamplerName,
    objective: Objective,
    second: Objective | None = None,
    size: int | None = None,
    seed: int,
    queue: Sequence[HParams] = (),
) -> list[HParams]:
    """Hyperparameters for the trials `numbers`, which belong to `round`.

    second: tpe, gp and nsga2 search for points that are good in it or in `objective`. size: of a round, which
    is a generation of nsga2; default: `ROUND_SIZES`. queue: what the first trials have fixed
    (`points.queue`); no matter to a grid.

    Of `history` a trial sees the earlier rounds, and the trials of its own round as running whatever has
    become of them (TPE's constant liar keeps a round apart): asking for a round in two parts gives the
    same points as asking once.
    """
    if not space:
        return [{} for _ in numbers]
    if kind == "grid":
        points = list(grids.points(space))
        order = generator(seed, "grid").permutation(len(points))
        return [dict(points[order[number]]) for number in numbers]
    if kind == "qmc":
        return [_quasi_random(space, n, seed, queue[n] if n < len(queue) else {}) for n in numbers]
    seen: list[Trial] = []
    if kind != "random":
        seen = [trial for trial in history if trial.round < round]
        seen += [
            dataclasses.replace(trial, state=TrialState.RUNNING, reports=())
            for trial in history
            if trial.round == round
        ]
    study = make_study(space, seen, objective, second, impute=kind == "gp")
    make = _maker(kind, study, max(size or ROUND_SIZES[kind], 2))
    asked: list[HParams] = []
    for number in numbers:
        study.sampler = make(derive_seed(seed, "sampler", number, bits=32))
        fixed = queue[number] if number < len(queue) else {}
        asked.append(_ask(study, space, fixed))
    return asked


def _quasi_random(space: Space, number: int, seed: int, fixed: HParams) -> HParams:
    """The point `number` of a scrambled Sobol sequence, which fills the space more evenly than chance."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(space), scramble=True, rng=derive_seed(seed, "sampler", bits=32))
    if number:
        sequence.fast_forward(number)
    shares = dict(zip(space, sequence.random(1)[0].tolist(), strict=True))
    point: dict[str, HParamValue] = {}
    for name in spaces.ordered(space):
        if spaces.is_active(space[name], point):
            point[name] = fixed[name] if name in fixed else _at(space[name], name, shares[name])
    return point


def _at(dimension: spaces.Dimension, name: str, share: float) -> HParamValue:
    """The value that this share, in [0, 1), of the dimension lies below; on a log scale where it has one."""
    if isinstance(dimension, spaces.Choice):
        option: HParamValue = dimension.options[int(share * len(dimension.options))]
        return option
    if isinstance(dimension, spaces.Float) and dimension.step:
        return dimension.values()[int(share * len(dimension.values()))]
    whole = isinstance(dimension, spaces.Int)
    low, high = float(dimension.low), float(dimension.high)
    if spaces.is_log(name, dimension):
        shift = 0.5 if whole else 0.0  # each integer has the room around it
        value = math.exp(math.log(low - shift) * (1 - share) + math.log(high + shift) * share)
        return min(max(round(value), int(low)), int(high)) if whole else min(max(value, low), high)
    if isinstance(dimension, spaces.Int):
        return dimension.values()[int(share * dimension.count())]
    return min(low + (high - low) * share, high)


def _maker(kind: SamplerName, study: Any, size: int) -> Callable[[int], Any]:
    """What gives a fresh sampler for a seed."""
    import optuna

    makers: dict[str, Callable[..., Any]] = {
        "tpe": optuna.samplers.TPESampler,
        "random": optuna.samplers.RandomSampler,
        "gp": optuna.samplers.GPSampler,
    }
    make = _genetic(study, size) if kind == "nsga2" else makers[kind]

    def fresh(seed: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return make(seed=seed)

    return fresh


def _genetic(study: Any, size: int) -> Callable[..., Any]:
    """NSGA-II (Deb et al. 2002) whose generations are the rounds: the parents of a round are the `size` best,
    by Pareto rank and then by distance from each other, of the parents and the children of the round before.

    Optuna's own keeps generation and parents with the trials of a study that lives on; here both are worked
    out anew from the complete trials. A round without one leaves its parents to the next. As in Optuna's, one
    value of a child is drawn anew on average, and what has a condition always.
    """
    import optuna

    children: dict[int, list[Any]] = {}
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        children.setdefault(trial.user_attrs["hpt_torch/round"], []).append(trial)
    parents: list[list[Any]] = [[]]  # by generation: the first has none

    class Sampler(optuna.samplers.NSGAIISampler):
        def get_population(self, study: Any, generation: int) -> list[Any]:
            return children.get(generation, [])

        def get_parent_population(self, study: Any, generation: int) -> list[Any]:
            return parents[generation]

        def get_trial_generation(self, study: Any, trial: Any) -> int:
            return len(parents) - 1

    sampler = Sampler(population_size=size)
    for generation in range(1, max(children, default=-1) + 2):
        parents.append(sampler.select_parent(study, generation))
    if len(parents[-1]) == 1:
        parents[-1] = []  # a child has two: until there are, points are drawn at random
    return functools.partial(Sampler, population_size=size)


def _ask(study: Any, space: Space, fixed: Mapping[str, HParamValue]) -> dict[str, HParamValue]:
    """One point: asked all at once, or name by name where dimensions have conditions."""
    import optuna

    if fixed:
        values = {name: spaces.to_optuna(space[name], value) for name, value in fixed.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.PartialFixedSampler(values, study.sampler)
    if all(dimension.when is None for dimension in space.values()):
        trial = study.ask({name: d.distribution(name) for name, d in space.items()})
        return {name: spaces.decode(d, trial.params[name]) for name, d in space.items()}
    trial = study.ask()
    point: dict[str, HParamValue] = {}
    for name in spaces.ordered(space):
        dimension = space[name]
        if spaces.is_active(dimension, point):
            point[name] = spaces.decode(dimension, _suggest_one(trial, name, dimension))
    return point


def _suggest_one(trial: Any, name: str, dimension: spaces.Dimension) -> Any:
    if isinstance(dimension, spaces.Choice):
        return trial.suggest_categorical(name, [spaces.encode(option) for option in dimension.options])
    suggest_number = trial.suggest_float if isinstance(dimension, spaces.Float) else trial.suggest_int
    limits = dimension.distribution(name)
    return suggest_number(name, limits.low, limits.high, log=limits.log, step=limits.step)


_OPTUNA_STATES = {
    TrialState.WAITING: "WAITING",
    TrialState.RUNNING: "RUNNING",
    TrialState.PAUSED: "RUNNING",
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    # Optuna's FAIL teaches a sampler nothing, so it would propose the same bad region again; a pruned trial
    # without a value is the worst of all for TPE.
    TrialState.FAILED: "PRUNED",
    TrialState.INFEASIBLE: "PRUNED",
}


def make_study(
    space: Space,
    trials: Sequence[Trial],
    objective: Objective,
    second: Objective | None = None,
    *,
    impute: bool = False,
) -> Any:
    """The trials as an in-memory Optuna study, of two directions with a second objective. A failed trial is a
    PRUNED one without a value.

    With `impute` (for the GP, which reads COMPLETE trials only) it is a COMPLETE one with the worst score
    seen, so that the model learns where training diverges.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    both = [objective] if second is None else [objective, second]
    study = optuna.create_study(directions=[one.direction for one in both], study_name="hpt_torch")
    ranked = [one.ranked([t for t in trials if t.state is TrialState.COMPLETE]) for one in both]
    worst = [one.score(order[-1]) or 0.0 for one, order in zip(both, ranked, strict=True) if order]
    frozen = []
    for trial in trials:
        scores = [score for one in both if (score := one.score(trial)) is not None]
        state = optuna.trial.TrialState[_OPTUNA_STATES[trial.state]]
        if state == optuna.trial.TrialState.COMPLETE and len(scores) < len(both):
            state = optuna.trial.TrialState.PRUNED  # it finished without a finite value of an objective
        if state == optuna.trial.TrialState.PRUNED and impute and len(worst) == len(both):
            state, scores = optuna.trial.TrialState.COMPLETE, worst
        active = {name: d for name, d in space.items() if name in trial.hparams}
        dead = trial.state in (TrialState.FAILED, TrialState.INFEASIBLE)
        frozen.append(
            optuna.trial.create_trial(
                state=state,
                values=scores if state == optuna.trial.TrialState.COMPLETE else None,
                params={name: spaces.to_optuna(d, trial.hparams[name]) for name, d in active.items()},
                distributions={name: d.distribution(name) for name, d in active.items()},
                intermediate_values={}
                if dead or second is not None  # Optuna compares them by one direction
                else {
                    report.epoch: report.metrics[objective.metric]
                    for report in trial.reports
                    if objective.metric in report.metrics
                },
                user_attrs={
                    "hpt_torch/number": trial.number,
                    "hpt_torch/round": trial.round,
                    **({"reason": trial.reason} if trial.reason else {}),
                },
            )
        )
    study.add_trials(frozen)
    return study
