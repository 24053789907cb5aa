"""Population Based Training: at every boundary the worst members become changed copies of better ones.

Jaderberg et al. 2017, "Population Based Training of Neural Networks" (arXiv 1711.09846), algorithm 1: a
member that is *ready* is compared with the population (*exploit*); where it copies another one, it takes
weights and hyperparameters together, and then changes the hyperparameters (*explore*). The paper's members
do this whenever each of them is ready; ours meet at boundaries, so that a seed says all that happens.

Another method (PB2, MF-PBT) is another `ExploitRule` or `ExploreRule`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from hpt_torch import space as spaces
from hpt_torch.schedulers import exploit as exploits
from hpt_torch.schedulers.exploit import ExploitRule, Member, Standing
from hpt_torch.schedulers.explore import explore
from hpt_torch.seeding import derive_seed, generator
from hpt_torch.space import Space
from hpt_torch.types import Exploit, HParamValue, Objective, Problem, UserInputError, is_int, is_number

ExploitName = Literal["truncation", "binary_tournament", "t_test"]
# Static hyperparameters that trained weights and optimizer state fit all the same
PORTABLE = frozenset({"batch_size"})


class ExploreRule(Protocol):
    """The hyperparameters with which a copy of `source` goes on."""

    def __call__(
        self, source: Member, standing: Standing, space: Space, rng: np.random.Generator
    ) -> dict[str, HParamValue]: ...


@dataclass(frozen=True, kw_only=True)
class PBT:
    """The settings of Population Based Training, and what they decide. Sections are of arXiv 1711.09846.

    Raises UserInputError, which names every setting that is wrong.
    """

    interval_epochs: int
    """Epochs between two decisions: the *ready* of section 3. Short intervals choose greedily, and can fall
    behind random search on long trainings (arXiv 2506.03225)."""

    burn_in_epochs: int = 0
    """Epochs before which no healthy member is replaced, and none is copied: early scores say little."""

    exploit: ExploitName = "truncation"
    """Who copies whom (sections 4.1.1 and 4.3.1).
    truncation: a member of the worst quantile copies a uniform pick of the best quantile.
    binary_tournament: every member meets one other, picked uniformly, and copies it if that scores better.
    t_test: the same, but the other's last scores must be better by Welch's t-test."""

    quantile: float = 0.2
    """Share of the population that is worst, and that is best, in (0, 0.5]: the paper's 20 % (section
    4.1.1). Rounded up, so that two members are enough, but at most half of them. For the two other rules it
    only says whom a diverged member copies."""

    explore: bool = True
    """False: a copy keeps its source's hyperparameters, to measure what exploit does alone."""

    resample_probability: float = 0.25
    """Of a draw from the prior instead of a perturbation, for each hyperparameter of a copy. The paper
    either perturbs or resamples (section 4.1.1); mixing them so is Ray Tune's default."""

    perturbation_factors: tuple[float, float] = (0.8, 1.2)
    """What a number is multiplied by, one or the other at even odds (section 4.1.1)."""

    crossover_probability: float = 0.0
    """That a hyperparameter of a copy starts from another member of the best quantile, the same for all its
    hyperparameters, instead of from the source of its weights. Not in the paper, and off: what suits one
    member's weights need not suit another's."""

    window: int = 10
    """How many of a member's last scores t_test compares (section 4.1.1)."""

    significance: float = 0.05
    """The p below which t_test sees a difference, in (0, 1). The paper names none."""

    def __post_init__(self) -> None:
        factors: Any = self.perturbation_factors  # a list where it was read from a file
        object.__setattr__(self, "perturbation_factors", spaces.freeze(factors))
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        wrong = [
            f"`{name}` must be {rule}, got {values[name]!r}; set scheduler.{name}"
            for name, (rule, is_right) in _RULES.items()
            if not is_right(values[name])
        ]
        if wrong:
            raise UserInputError("\n".join(wrong))

    def next_boundary(self, epoch: int, epochs: int) -> int:
        """The epoch to which a member trains before the next decision: after `epoch`, a multiple of
        `interval_epochs`, not before `burn_in_epochs`, and at most its budget `epochs`."""
        assert 0 <= epoch < epochs, f"a member at epoch {epoch} of {epochs} has no next boundary"
        earliest = max(epoch + 1, self.burn_in_epochs)
        return min(-(-earliest // self.interval_epochs) * self.interval_epochs, epochs)

    def is_ready(self, member: Member) -> bool:
        """Whether a healthy member may be replaced now: at a boundary, after the burn-in, before its end."""
        is_boundary = member.epoch > 0 and member.epoch % self.interval_epochs == 0
        return is_boundary and member.epoch >= self.burn_in_epochs and not member.is_finished

    def decide(
        self, members: Sequence[Member], *, objective: Objective, space: Space, seed: int, generation: int
    ) -> list[Exploit]:
        """Who becomes a copy of whom, and with which hyperparameters; sorted by target.

        A function of its arguments, whatever the order of `members`. `generation` counts the decisions of a
        run. All copies are taken of the members as they are now. What holds of every answer:

        - A source is alive, has a finite last score and is past the burn-in. It need not be ready: one that
          is at the end of its budget may be copied.
        - A healthy target is ready. A diverged member (not alive, or its last score is not finite) is
          replaced at any epoch, in whatever quantile, by a uniform pick of the best quantile; at the end of
          its budget it is left alone.
        - No member is both source and target. Where the rule would have it so (the third copies the second,
          which copies the first), the worse one copies, and the better one trains on.
        - Where nobody is healthy, or there is nobody else, nothing is decided.
        """
        assert len({member.number for member in members}) == len(members), "a member is there twice"

        def draw(what: str, number: int) -> np.random.Generator:
            return generator(seed, "pbt", generation, what, number)

        standing = exploits.standing(
            [member for member in members if member.is_diverged or member.epoch >= self.burn_in_epochs],
            objective=objective,
            quantile=self.quantile,
            tie_break=lambda member: derive_seed(seed, "pbt", generation, "tie", member.number),
        )
        sources: dict[int, Member] = {}  # by the target's number
        for member in standing.diverged:
            if source := exploits.pick(standing.top, draw("exploit", member.number)):
                sources[member.number] = source
        copied = {source.number for source in sources.values()}
        rule = self._exploit_rule()
        for member in reversed(standing.ranked):
            if member.number in copied or not self.is_ready(member):
                continue
            source = rule(member, standing, draw("exploit", member.number))
            if source is not None and source.number not in sources:
                sources[member.number] = source
                copied.add(source.number)
        change = self._explore_rule()
        return [
            Exploit(
                target=number,
                source=source.number,
                hparams=change(source, standing, space, draw("explore", number)),
            )
            for number, source in sorted(sources.items())
        ]

    def _exploit_rule(self) -> ExploitRule:
        rules: Mapping[ExploitName, ExploitRule] = {
            "truncation": exploits.truncation,
            "binary_tournament": exploits.binary_tournament,
            "t_test": functools.partial(exploits.t_test, window=self.window, significance=self.significance),
        }
        return rules[self.exploit]

    def _explore_rule(self) -> ExploreRule:
        if not self.explore:
            return _keep
        return functools.partial(
            _change,
            resample_probability=self.resample_probability,
            perturbation_factors=self.perturbation_factors,
            crossover_probability=self.crossover_probability,
        )


def _keep(
    source: Member, standing: Standing, space: Space, rng: np.random.Generator
) -> dict[str, HParamValue]:
    return dict(source.hparams)


def _change(
    source: Member, standing: Standing, space: Space, rng: np.random.Generator, **settings: Any
) -> dict[str, HParamValue]:
    mates = [other.hparams for other in standing.top if other.number != source.number]
    return explore(source.hparams, space, rng=rng, mates=mates, **settings)


# -- checks --------------------------------------------------------------------------------------------


def _is_probability(value: Any) -> bool:
    return is_number(value) and bool(0 <= value <= 1)


def _are_factors(value: Any) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value))
    return is_pair and bool(0 < value[0] < 1 < value[1])


_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "interval_epochs": ("an integer of at least 1", lambda v: is_int(v) and v >= 1),
    "burn_in_epochs": ("an integer of at least 0", lambda v: is_int(v) and v >= 0),
    "exploit": (f"one of {', '.join(get_args(ExploitName))}", lambda v: v in get_args(ExploitName)),
    "quantile": ("in (0, 0.5]", lambda v: is_number(v) and 0 < v <= 0.5),
    "explore": ("true or false", lambda v: isinstance(v, bool)),
    "resample_probability": ("in [0, 1]", _is_probability),
    "perturbation_factors": ("two numbers, the first in (0, 1), the second above 1", _are_factors),
    "crossover_probability": ("in [0, 1]", _is_probability),
    "window": ("an integer of at least 2", lambda v: is_int(v) and v >= 2),
    "significance": ("in (0, 1)", lambda v: is_number(v) and 0 < v < 1),
}


def check_space(space: Space, dynamic_names: Collection[str]) -> list[Problem]:
    """Why PBT cannot search this space: what it changes must fit a model that is half trained.

    `dynamic_names`: the hyperparameters that the task's training step reads as tensors. `batch_size` is
    static, but weights and optimizer state fit any, so it may be searched.
    """
    free = {*dynamic_names, *PORTABLE}
    if not space:
        rule = "pbt needs at least one hyperparameter to change, got none"
        return [Problem("space", f"{rule}; search one of {', '.join(sorted(free))}")]
    return [
        Problem(
            f"space.{name}",
            f"pbt changes only what a half-trained model can go on with, and {name} is structural: it shapes "
            f"the model or its training program; got {spaces.dump_dimension(dimension)}; fix {name} in "
            "[hparams], or search it without pbt",
        )
        for name, dimension in space.items()
        if name not in free
    ]
