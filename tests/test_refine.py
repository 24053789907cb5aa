"""Coarse to fine: from trials with a known truth to the space that ought to come next."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpt_torch import recipe as recipes
from hpt_torch import space as spaces
from hpt_torch.cli import app
from hpt_torch.evidence import judge
from hpt_torch.record import Event, Record, finish_event, report_event, trial_event
from hpt_torch.refine import Refinement, refine
from hpt_torch.report import summarise
from hpt_torch.samplers import suggest
from hpt_torch.seeding import generator
from hpt_torch.space import Choice, Float, Int, Space
from hpt_torch.types import Objective, Phase, Report, Trial, TrialState, UserInputError

ACCURACY = Objective(metric="valid/accuracy", direction="maximize")
LOSS = Objective(metric="valid/loss", direction="minimize")
Score = Callable[[dict[str, Any]], float]


def trial(number: int, score: float, objective: Objective = ACCURACY, **hparams: Any) -> Trial:
    report = Report(trial=number, epoch=5, metrics={objective.metric: score}, seconds=0.1)
    return Trial(
        number=number, round=0, hparams=hparams, signature="", state=TrialState.COMPLETE, reports=(report,),
        kept_epoch=5,
    )  # fmt: skip


def search(
    space: Space, score: Score, *, trials: int = 60, noise: float = 0.02, seed: int = 0,
    objective: Objective = ACCURACY,
) -> list[Trial]:  # fmt: skip
    """Random search; the score is the truth with a little noise."""
    rng = generator(seed, "test refine")
    found = []
    for number in range(trials):
        point: dict[str, Any] = {}
        for name in spaces.ordered(space):
            dimension = space[name]
            if not spaces.is_active(dimension, point):
                continue
            if isinstance(dimension, Choice):
                point[name] = dimension.options[rng.integers(len(dimension.options))]
            elif dimension.step is not None:
                point[name] = dimension.values()[rng.integers(dimension.count() or 1)]
            elif spaces.is_log(name, dimension):
                low, high = math.log(dimension.low), math.log(dimension.high)
                point[name] = math.exp(rng.uniform(low, high))
            else:
                point[name] = float(rng.uniform(dimension.low, dimension.high))
        found.append(trial(number, score(point) + noise * rng.standard_normal(), objective, **point))
    return found


def hill(peak: float) -> Score:
    """Highest at a learning rate."""
    return lambda point: 0.9 - 0.1 * (math.log10(point["lr"]) - math.log10(peak)) ** 2


LR: Space = {"lr": Float(1e-5, 1.0), "dropout": Float(0.0, 0.5)}


def bounds(found: Refinement, name: str) -> tuple[float, float]:
    dimension = found.space[name]
    assert not isinstance(dimension, Choice)
    return dimension.low, dimension.high


# -- ranges --------------------------------------------------------------------------------------------


def test_a_range_is_narrowed_to_where_the_best_trials_lie_and_says_why() -> None:
    found = refine(LR, search(LR, hill(1e-2)), ACCURACY)
    low, high = bounds(found, "lr")
    assert 1e-5 < low < 1e-2 < high < 1.0
    assert low > 1e-4
    assert found.reasons["lr"].startswith("none of the best 12 of 60 trials is below 0.00")
    assert " or above 0." in found.reasons["lr"]
    assert found.space["dropout"].default is not None  # the best trial's
    assert bounds(found, "dropout") == (0.0, 0.5)
    assert "does not visibly depend on it" in found.reasons["dropout"]
    assert found.changed == {"lr"}


def test_lower_is_better_where_the_objective_says_so() -> None:
    def loss(point: dict[str, Any]) -> float:
        return -hill(1e-2)(point)

    found = refine(LR, search(LR, loss, objective=LOSS), LOSS)
    low, high = bounds(found, "lr")
    assert 1e-4 < low < 1e-2 < high < 1.0


def test_the_best_region_stays_inside_and_what_does_not_matter_is_left() -> None:
    """Over many searches: the truth is never cut off, and noise rarely passes for evidence."""
    cut, narrowed, searches = 0, 0, 60
    for seed in range(searches):
        found = refine(LR, search(LR, hill(1e-2), trials=50, noise=0.03, seed=seed), ACCURACY)
        low, high = bounds(found, "lr")
        cut += not low <= 1e-2 <= high
        narrowed += "dropout" in found.changed
        assert (low, high) != (1e-5, 1.0)
    assert cut == 0
    assert narrowed <= 3


@pytest.mark.slow
def test_what_a_sampler_that_learns_crowds_in_without_need_is_left() -> None:
    """TPE's later trials are the better ones, and they crowd in every hyperparameter."""
    space: Space = {**LR, "label_smoothing": Float(0.0, 0.2), "activation": Choice(["relu", "tanh", "gelu"])}
    changed: list[str] = []
    for seed in range(6):
        rng, trials = generator(seed, "test tpe"), list[Trial]()
        for first in range(0, 70, 10):
            numbers = list(range(first, first + 10))
            points = suggest(
                space, trials, numbers, round=first // 10, kind="tpe", objective=ACCURACY, seed=seed
            )
            for number, point in zip(numbers, points, strict=True):
                score = hill(1e-2)(dict(point)) + 0.01 * rng.standard_normal()
                trials.append(dataclasses.replace(trial(number, score, **point), round=first // 10))
        found = refine(space, trials, ACCURACY)
        low, high = bounds(found, "lr")
        assert 1e-5 < low < 1e-2 < high < 1.0
        changed += found.changed - {"lr"}
    assert len(changed) <= 1


def test_where_the_best_trials_crowd_the_bound_is_widened() -> None:
    space = {"lr": Float(1e-4, 1e-1)}
    found = refine(space, search(space, hill(1.0)), ACCURACY)
    low, high = bounds(found, "lr")
    assert high == pytest.approx(0.57)  # a quarter of three decades, to two digits
    assert low > 1e-4
    assert "lie at least 0.0501, so the upper bound is widened; none of" in found.reasons["lr"]
    low, high = bounds(refine(space, search(space, hill(1e-5)), ACCURACY), "lr")
    assert low == pytest.approx(1.7e-5)
    assert high < 1e-1


def test_a_bound_beyond_which_trials_diverge_is_not_widened() -> None:
    space = {"lr": Float(1e-4, 1e-1)}
    lost = [
        Trial(number=100 + n, round=0, hparams={"lr": 0.09}, signature="", state=TrialState.FAILED,
              reason="diverged: the training loss is nan in epoch 1")
        for n in range(3)
    ]  # fmt: skip
    found = refine(space, [*search(space, hill(1.0)), *lost], ACCURACY)
    assert bounds(found, "lr")[1] == 0.1
    assert "but 3 diverged there: steady the training before going on; none of" in found.reasons["lr"]


@pytest.mark.parametrize(
    ("name", "dimension", "up", "bound"),
    [
        ("dropout", Float(0.0, 0.5), False, 0.0),  # nothing is below 0
        ("momentum", Float(0.0, 0.9), True, 0.95),  # 1 itself is not allowed: half way to it
        ("step_gamma", Float(0.1, 0.9), True, 1.0),  # 1 itself is allowed
        ("own", Float(0.0, 1.0), True, 1.3),  # a module's own argument may go anywhere above 0
        ("own", Float(0.0, 1.0), False, 0.0),
        ("own", Float(-1.0, 1.0), False, -1.5),
        ("momentum", Float(0.0, 0.9, step=0.1), True, 0.9),
        ("kernel_size", Int(2, 20), False, 1),
        ("kernel_size", Int(1, 20, step=2), False, 1),
        ("kernel_size", Int(3, 31, step=2), True, 39),
    ],
)
def test_no_bound_goes_beyond_what_the_hyperparameter_allows(
    name: str, dimension: Float | Int, up: bool, bound: float
) -> None:
    space = {name: dimension}

    def score(point: dict[str, Any]) -> float:
        share = (point[name] - dimension.low) / (dimension.high - dimension.low)
        return float(share if up else 1 - share)

    found = refine(space, search(space, score, noise=0.001), ACCURACY)
    assert bounds(found, name)[up] == pytest.approx(bound)
    stuck = bound == (dimension.high if up else dimension.low)
    assert ("but it can go no further" in found.reasons[name]) == stuck
    assert type(found.space[name]) is type(dimension)


def test_steps_stay_on_their_grid() -> None:
    space: Space = {"batch_size": Int(16, 256, step=16), "dropout": Float(0.0, 0.9, step=0.05)}

    def score(point: dict[str, Any]) -> float:
        return -abs(point["batch_size"] - 112) / 256 - abs(point["dropout"] - 0.4)

    found = refine(space, search(space, score, trials=120, noise=0.005), ACCURACY)
    for name, inside in (("batch_size", 112), ("dropout", 0.4)):
        old, new = space[name], found.space[name]
        assert isinstance(old, (Int, Float))
        assert isinstance(new, (Int, Float))
        assert old.low < new.low < inside < new.high < old.high
        assert old.contains(new.low)
        assert old.contains(new.high)
        assert new.step == old.step
        assert new.contains(inside)


def test_a_range_with_one_value_or_hardly_any_is_left_or_kept_whole() -> None:
    space: Space = {"layers": Int(1, 3), "only": Float(0.1, 0.1)}
    found = refine(space, search(space, lambda p: float(p["layers"] == 2)), ACCURACY)
    assert bounds(found, "layers") == (1, 3)
    assert found.reasons["only"] == "left: it has one value"


# -- choices -------------------------------------------------------------------------------------------

OPTIONS: Space = {"optimizer": Choice(["sgd", "adam", "adamw"]), "lr": Float(1e-4, 1e-1)}


def without_sgd(point: dict[str, Any]) -> float:
    return hill(1e-2)(point) - 0.5 * (point["optimizer"] == "sgd")


def test_an_option_that_no_good_trial_used_is_dropped_where_there_is_evidence() -> None:
    found = refine(OPTIONS, search(OPTIONS, without_sgd), ACCURACY)
    assert found.space["optimizer"].options == ("adam", "adamw")  # type: ignore[union-attr]
    assert found.reasons["optimizer"].startswith('none of the best 12 trials uses "sgd" (')
    assert found.reasons["optimizer"].endswith("and those trials are worse than the others")
    even = refine(OPTIONS, search(OPTIONS, hill(1e-2)), ACCURACY)
    assert even.space["optimizer"].options == ("sgd", "adam", "adamw")  # type: ignore[union-attr]


def test_an_option_that_was_hardly_tried_is_kept() -> None:
    many = [trial(n, 0.9 - 0.001 * n, optimizer="adam", lr=1e-2) for n in range(30)]
    found = refine(OPTIONS, [*many, trial(30, 0.1, optimizer="sgd", lr=1e-2)], ACCURACY)
    assert found.space["optimizer"].options == ("sgd", "adam", "adamw")  # type: ignore[union-attr]
    assert found.reasons["optimizer"] == (
        'left: no good trial uses "sgd" (1 trial), "adamw" (0 trials), but those are not clearly worse than '
        "the others"
    )


def test_an_option_that_is_never_the_best_but_good_on_the_whole_is_kept() -> None:
    space: Space = {"optimizer": Choice(["wild", "steady"])}
    wild = [trial(2 * n, 0.9 if n % 3 == 0 else 0.2 + 0.001 * n, optimizer="wild") for n in range(150)]
    steady = [trial(2 * n + 1, 0.7, optimizer="steady") for n in range(90)]
    assert refine(space, [*wild, *steady], ACCURACY).changed == frozenset()


def test_options_that_diverge_or_allow_no_model_count_as_bad() -> None:
    space: Space = {"kernel_size": Choice([3, 5, 9])}
    good = [trial(n, 0.8 + 0.001 * (n % 7), kernel_size=(3, 5)[n % 2]) for n in range(24)]
    bad = [
        Trial(number=100 + n, round=0, hparams={"kernel_size": 9}, signature="",
              state=TrialState.INFEASIBLE, reason="no pixels left")
        for n in range(8)
    ]  # fmt: skip
    assert refine(space, [*good, *bad], ACCURACY).space["kernel_size"].options == (3, 5)  # type: ignore[union-attr]


def test_a_list_of_numbers_is_continued_where_the_best_trials_crowd_at_its_end() -> None:
    space: Space = {"lr": Choice([1e-4, 1e-3, 1e-2]), "batch_size": Choice([32, 64, 128]), "depth": Int(1, 3)}

    def score(point: dict[str, Any]) -> float:
        return 0.2 * math.log10(point["lr"]) - 0.2 * math.log2(point["batch_size"])

    found = refine(space, search(space, score, trials=80, noise=0.001), ACCURACY)
    assert found.space["lr"].options == (1e-3, 1e-2, 1e-1)  # type: ignore[union-attr]
    assert found.reasons["lr"].endswith("use 0.01, the upper end, so 0.1 is new")
    assert found.space["batch_size"].options[:2] == (16, 32)  # type: ignore[union-attr]
    assert all(type(option) is int for option in found.space["batch_size"].options)  # type: ignore[union-attr]


# -- conditions and defaults ---------------------------------------------------------------------------


def test_conditions_follow_what_is_dropped() -> None:
    space: Space = {
        "momentum": Float(0.0, 0.9, when={"optimizer": ["sgd"]}),
        "nesterov": Choice([True, False], when={"momentum": [0.9]}),
        "beta1": Float(0.8, 0.99, when={"optimizer": ["sgd", "adam"]}),
        **OPTIONS,
    }
    trials = search(space, without_sgd, trials=80)
    found = refine(space, trials, ACCURACY)
    assert set(found.space) == {"beta1", "optimizer", "lr"}
    assert found.space["beta1"].when == {"optimizer": ("adam",)}
    assert found.reasons["momentum"] == 'left out: it needs optimizer = "sgd", which is searched no more'
    assert found.reasons["nesterov"] == "left out: it needs momentum = 0.9, which is searched no more"
    assert list(found.reasons) == list(space)
    assert spaces.check_space(found.space) == []


def test_what_only_a_dropped_option_reads_is_left_out_without_a_condition_too() -> None:
    space: Space = {"momentum": Float(0.0, 0.9), "beta1": Float(0.8, 0.99), **OPTIONS}
    found = refine(space, search(space, without_sgd, trials=80), ACCURACY)
    assert set(found.space) == {"beta1", "optimizer", "lr"}
    assert found.reasons["momentum"] == 'left out: it needs optimizer = "sgd", which is searched no more'
    assert "momentum" in found.changed


def test_the_next_search_begins_at_the_best_trial() -> None:
    trials = search(OPTIONS, without_sgd)
    found = refine(OPTIONS, trials, ACCURACY)
    best = ACCURACY.ranked(trials)[0]
    assert spaces.defaults(found.space) == best.hparams


def test_a_default_that_no_longer_fits_is_dropped() -> None:
    space: Space = {"lr": Float(1e-5, 1.0, default=1e-5), "x": Float(0.0, 1.0, when={"lr": [1e-2]})}
    found = refine(space, search(space, hill(1e-2)), ACCURACY)
    assert found.space["lr"].default != 1e-5
    assert spaces.check_space(found.space) == []


# -- too little to go by -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 19])
def test_few_trials_change_nothing_and_it_says_so(count: int) -> None:
    found = refine(OPTIONS, search(OPTIONS, without_sgd, trials=count, noise=0), ACCURACY)
    assert found.changed == frozenset()
    said = {
        0: "no trial says anything",
        1: "only 1 trial says something",
        19: "only 19 trials say something",
    }[count]
    assert set(found.reasons.values()) == {f"left: {said} about it, and 20 are needed"}


def test_trials_that_changed_on_the_way_are_refused() -> None:
    phase = Phase(generation=1, epoch=2, source=0, hparams={"lr": 0.1})
    copied = Trial(number=1, round=0, hparams={"lr": 0.1}, signature="", phases=(phase,))
    with pytest.raises(UserInputError, match="its good trials are copies of each other"):
        refine(LR, [copied], ACCURACY)


def test_a_crash_says_nothing_but_divergence_does() -> None:
    def failed(number: int, reason: str) -> Trial:
        return Trial(number=number, round=0, hparams={"lr": 1.0}, signature="", state=TrialState.FAILED,
                     reason=reason)  # fmt: skip

    def numbers(trials: Sequence[Trial]) -> list[int]:
        return [t.number for t in trials]

    judged = judge(
        [failed(0, "diverged: the training loss is nan in epoch 1"), failed(1, "KeyError: 'x'"),
         trial(2, 0.5, lr=0.1), trial(3, 0.7, lr=0.1)],
        ACCURACY,
    )  # fmt: skip
    assert numbers(judged.trials) == [3, 2, 0]
    assert numbers(judged.good) == [3, 2]
    assert list(judged.scores) == sorted(judged.scores, reverse=True)


def test_trials_that_tie_with_the_last_good_one_are_good_too() -> None:
    judged = judge([trial(n, 1.0 if n < 30 else 0.5, lr=0.1) for n in range(40)], ACCURACY)
    assert len(judged.good) == 30


# -- the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a recipe on digits whose lr range is far too low: its best trials crowd at the upper bound."""
    folder = tmp_path_factory.mktemp("refine")
    (folder / "low.toml").write_text(LOW)
    done = CliRunner().invoke(
        app, ["run", str(folder / "low.toml"), "--quiet", "--run-dir", str(folder / "low")]
    )
    assert done.exit_code == 0, done.output
    assert "Edge of the space" in done.stdout  # the diagnosis says it too
    return folder


LOW = """name = "low"
[hparams]
hidden_sizes = [32]
batch_size = 64
[space]
lr = { float = [1e-5, 1e-3] }
dropout = { float = [0.0, 0.2] }
[search]
sampler = "random"
trials = 80
[trainer]
epochs = 5
threads = 1
device = "cpu"
[run]
tensorboard = false
"""


@pytest.mark.slow
def test_the_command_proposes_and_writes_a_recipe_where_asked(searched: Path) -> None:
    before = sorted(p.name for p in (searched / "low").iterdir())
    done = CliRunner().invoke(app, ["refine", str(searched / "low")])
    assert done.exit_code == 0
    assert "The space after low" in done.stdout
    assert "so the upper bound" in " ".join(re.sub("[│┃]", " ", done.stdout).split())
    assert "The hold-out rows were read by this run already" in done.stdout
    assert sorted(p.name for p in (searched / "low").iterdir()) == before
    target = searched / "low-refined.toml"
    done = CliRunner().invoke(app, ["refine", str(searched / "low"), "--out", str(target)])
    assert done.stdout.endswith(f"Recipe: {target}\n")
    recipe = recipes.load(target)
    old = recipes.load(searched / "low.toml")
    assert recipe.name == "low-refined"
    assert recipe.space["lr"].high > 1e-3
    assert recipe.space["lr"].low > 1e-5
    assert {**recipe.model_dump(), "name": 0, "space": 0, "hparams": 0} == {
        **old.model_dump(), "name": 0, "space": 0, "hparams": 0
    }  # fmt: skip
    assert CliRunner().invoke(app, ["validate", str(target)]).exit_code == 0


@pytest.mark.slow
def test_with_run_it_is_searched_and_the_same_command_goes_on(searched: Path) -> None:
    command = ["refine", str(searched / "low"), "--run", "--run-dir", str(searched / "next")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (searched / "low" / "refined.toml").is_file()
    with Record(searched / "next" / "run.db", readonly=True) as record:
        summary = summarise(record)
    with Record(searched / "low" / "run.db", readonly=True) as record:
        first = summarise(record)
    assert first.best is not None
    assert summary.best is not None
    assert summary.trials[0].hparams == first.best.hparams  # it begins where the last one ended
    assert summary.objective.score(summary.best) > first.objective.score(first.best)  # type: ignore[operator]
    count = len(record.events)
    assert CliRunner().invoke(app, command).exit_code == 0
    with Record(searched / "next" / "run.db", readonly=True) as record:
        assert len(summarise(record).trials) == len(summary.trials)
        assert len(record.events) >= count


def recorded(path: Path, points: Sequence[tuple[dict[str, Any], float]], **sections: Any) -> Path:
    """A run whose record has complete trials at these points, with these scores."""
    path.mkdir()
    with Record(path / "run.db") as record:
        raw = {"name": "made", "seed": 0, "hparams": {}, "search": {"sampler": "random", "trials": 40},
               "task": {"kind": "classification", "model": "mlp", "data": "digits"}, **sections}  # fmt: skip
        objective = {"metric": "valid/accuracy", "direction": "maximize"}
        record.append(Event(kind="run", body={"format": 1, "recipe": raw, "objective": objective}))
        for number, (point, score) in enumerate(points):
            report = Report(trial=number, epoch=1, metrics={"valid/accuracy": score}, seconds=0.1)
            record.append(
                trial_event(number, 0, point, ""),
                report_event(report),
                finish_event(number, TrialState.COMPLETE, "", kept_epoch=1),
            )
    return path


def by_hand(path: Path, sampler: str = "random", kind: str = "classification", trials: int = 0) -> Path:
    points = [({"width": (8, 16, 32)[n % 3]}, 0.9 - 0.5 * (n % 3 == 0) + 0.001 * n) for n in range(trials)]
    return recorded(
        path, points,
        search={"sampler": sampler},
        task={"kind": kind, "model": "mlp", "data": "digits"},
        space={"width": {"choice": [8, 16, 32]}},
    )  # fmt: skip


def test_what_the_command_cannot_do_is_said(tmp_path: Path) -> None:
    target = tmp_path / "out.toml"
    done = CliRunner().invoke(app, ["refine", str(by_hand(tmp_path / "none")), "--out", str(target)])
    assert done.stdout.endswith("Nothing is changed, so no recipe is written and nothing is run.\n")
    assert not target.exists()
    python = by_hand(tmp_path / "python", kind="python", trials=30)
    done = CliRunner().invoke(app, ["refine", str(python), "--run"])
    assert done.stdout.endswith("The run was made from Python: give `tune` the space above.\n")
    grid = by_hand(tmp_path / "grid", sampler="grid", trials=30)
    done = CliRunner().invoke(app, ["refine", str(grid), "--out", str(target)])
    assert "Every point of the refined grid was tried already" in done.stdout
    assert "width = { choice = [16, 32], default = 32 }" in target.read_text()
    done = CliRunner().invoke(app, ["refine", str(tmp_path / "nothing")])
    assert "is not a run directory" in str(done.exception)


def test_its_recipe_is_one_that_hpt_takes_where_an_option_is_dropped(tmp_path: Path) -> None:
    """sgd's momentum, recorded of the run, is left out where sgd is."""
    run, target = tmp_path / "run", tmp_path / "refined.toml"
    points = [({"optimizer": ("sgd", "adam")[n % 2]}, 0.5 + 0.4 * (n % 2) + 0.001 * n) for n in range(40)]
    fixed = {"hidden_sizes": [8], "momentum": 0.8, "nesterov": False, "beta1": 0.8}
    recorded(run, points, hparams=fixed, space={"optimizer": {"choice": ["sgd", "adam"]}})
    done = CliRunner().invoke(app, ["refine", str(run), "--out", str(target)])
    assert recipes.load(target).space["optimizer"].options == ("adam",), done.stdout  # type: ignore[union-attr]
    checked = CliRunner().invoke(app, ["validate", str(target)])
    assert checked.exit_code == 0, checked.output
    assert recipes.load(target).hparams == {"hidden_sizes": [8], "beta1": 0.8}


def test_points_outside_of_the_next_space_are_not_in_its_recipe(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "refined.toml"
    points = [({"optimizer": ("sgd", "adam")[n % 2]}, 0.5 + 0.4 * (n % 2) + 0.001 * n) for n in range(40)]
    brought = [{"optimizer": "sgd"}, {"optimizer": "adam"}, {"optimizer": "sgd"}]
    recorded(
        run, points,
        hparams={"hidden_sizes": [8]},
        search={"sampler": "random", "trials": 40, "points": brought},
        space={"optimizer": {"choice": ["sgd", "adam"]}},
    )  # fmt: skip
    done = CliRunner().invoke(app, ["refine", str(run), "--out", str(target)])
    assert (
        "Of the 3 search.points 2 lie outside of the refined space: its recipe leaves them out."
        in " ".join(done.stdout.split())
    )
    assert CliRunner().invoke(app, ["validate", str(target)]).exit_code == 0
    assert recipes.load(target).search.points == [{"optimizer": "adam"}]
    assert spaces.defaults(recipes.load(target).space) == {"optimizer": "adam"}  # the best: trial 0
