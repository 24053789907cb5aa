"""Population Based Training's decisions: a conformance suite for every rule, and what each rule does."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from drawn import check_point, rng_of, seeds, spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from hpt_torch.schedulers import PBT, Member, check_space
from hpt_torch.schedulers.exploit import welch_p
from hpt_torch.schedulers.explore import explore
from hpt_torch.space import Choice, Float, Int, Space
from hpt_torch.types import Exploit, Objective, UserInputError

HIGH = Objective(metric="valid/accuracy", direction="maximize")
LOW = Objective(metric="valid/loss", direction="minimize")
RULES = ["truncation", "binary_tournament", "t_test"]
SPACE: Space = {"lr": Float(1e-4, 1.0)}
each_rule = pytest.mark.parametrize("rule", RULES)


def pbt(**settings: Any) -> PBT:
    return PBT(**{"interval_epochs": 2, **settings})


def member(number: int, *scores: float, **rest: Any) -> Member:
    """At epoch 10, with one score an epoch until then. Its lr says who it is."""
    epoch = rest.pop("epoch", 10)
    history = tuple((epoch - len(scores) + 1 + i, score) for i, score in enumerate(scores))
    hparams = rest.pop("hparams", {"lr": 0.001 * (number + 1)})
    return Member(number=number, epoch=epoch, scores=history, hparams=hparams, **rest)


def decide(members: Sequence[Member], scheduler: PBT | None = None, **rest: Any) -> list[Exploit]:
    options: dict[str, Any] = {"objective": HIGH, "space": SPACE, "seed": 0, "generation": 1, **rest}
    return (scheduler or pbt()).decide(members, **options)


def copies(members: Sequence[Member], scheduler: PBT | None = None, **rest: Any) -> dict[int, int]:
    return {exploit.target: exploit.source for exploit in decide(members, scheduler, **rest)}


def over_seeds(members: Sequence[Member], scheduler: PBT | None = None, n: int = 60) -> list[dict[int, int]]:
    return [copies(members, scheduler, seed=seed) for seed in range(n)]


def sources_of(target: int, answers: list[dict[int, int]]) -> set[int | None]:
    return {answer.get(target) for answer in answers}


# -- what holds of every rule --------------------------------------------------------------------------

scores = st.lists(
    st.floats() | st.sampled_from([0.0, 0.1, 0.5, 1.0, 1e308, math.nan, math.inf, -math.inf]), max_size=12
)


@st.composite
def populations(draw: Any, space: Space) -> list[Member]:
    numbers = draw(st.lists(st.integers(0, 99), max_size=12, unique=True))
    seed = draw(seeds)
    return [
        member(
            number,
            *draw(scores),
            epoch=draw(st.sampled_from([0, 2, 4, 5, 10])),
            epochs=draw(st.sampled_from([None, 10, 20])),
            alive=draw(st.sampled_from([True, True, False])),
            hparams=explore({}, space, rng=rng_of(seed, number)),
        )
        for number in numbers
    ]


schedulers = st.builds(
    PBT,
    interval_epochs=st.sampled_from([1, 2, 5]),
    burn_in_epochs=st.sampled_from([0, 3, 10]),
    exploit=st.sampled_from(RULES),
    quantile=st.sampled_from([0.01, 0.2, 0.25, 1 / 3, 0.5]),
    explore=st.booleans(),
    crossover_probability=st.sampled_from([0.0, 0.5]),
    window=st.sampled_from([2, 10]),
    significance=st.sampled_from([0.05, 0.99]),
)


def check_answer(
    answer: list[Exploit], members: Sequence[Member], scheduler: PBT, space: Space, objective: Objective
) -> None:
    by_number = {m.number: m for m in members}
    targets, sources = {e.target for e in answer}, {e.source for e in answer}
    assert [e.target for e in answer] == sorted(targets), "each target once, in order"
    assert not targets & sources
    usable = [
        m for m in members
        if m.alive and m.scores and math.isfinite(m.scores[-1][1]) and m.epoch >= scheduler.burn_in_epochs
    ]  # fmt: skip
    assert sources <= {m.number for m in usable}
    for exploit in answer:
        target, source = by_number[exploit.target], by_number[exploit.source]
        check_point(space, exploit.hparams)
        if not scheduler.explore:
            assert exploit.hparams == source.hparams
        assert target.epochs is None or target.epoch < target.epochs
        if not target.is_diverged:
            assert target in usable
            assert target.epoch % scheduler.interval_epochs == 0
            assert target.epoch > 0
            if scheduler.exploit != "t_test":
                assert not objective.better(target.score, source.score)  # type: ignore[arg-type]
    if usable:
        assert {m.number for m in members if m.is_diverged and not m.is_finished} <= targets
    else:
        assert answer == []


@pytest.mark.slow
@settings(deadline=None, max_examples=300, derandomize=True)
@given(data=st.data(), scheduler=schedulers, objective=st.sampled_from([HIGH, LOW]), seed=seeds)
def test_every_answer_conforms(data: Any, scheduler: PBT, objective: Objective, seed: int) -> None:
    space = data.draw(spaces())
    members = data.draw(populations(space))
    options: dict[str, Any] = {"objective": objective, "space": space, "seed": seed, "generation": 3}
    answer = scheduler.decide(members, **options)
    check_answer(answer, members, scheduler, space, objective)
    shuffled = data.draw(st.permutations(members))
    assert scheduler.decide(shuffled, **options) == answer


@pytest.mark.slow
@each_rule
def test_500_random_populations_copy_only_states_that_exist(rule: str) -> None:
    """Five generations each, in which members are lost and replaced: every lineage leads to a beginning."""
    copied = 0
    for population in range(500):
        rng = rng_of("population", population)
        n = int(rng.integers(1, 12))
        scheduler = pbt(exploit=rule, quantile=float(rng.uniform(0.05, 0.5)), interval_epochs=1)
        hparams: dict[int, Any] = {i: explore({}, SPACE, rng=rng) for i in range(n)}
        lineages: dict[int, list[int] | None] = {i: [i] for i in range(n)}  # None: its state is lost
        history: dict[int, list[float]] = {i: [] for i in range(n)}
        for generation in range(1, 6):
            for i in range(n):
                lineages[i] = None if rng.random() < 0.15 else lineages[i]
                history[i].append(math.nan if lineages[i] is None else i + float(rng.normal()))
            members = [member(i, *history[i], epoch=generation, hparams=hparams[i]) for i in range(n)]
            answer = scheduler.decide(
                members, objective=HIGH, space=SPACE, seed=population, generation=generation
            )
            check_answer(answer, members, scheduler, SPACE, HIGH)
            some = any(lineage is not None for lineage in lineages.values())
            for exploit in answer:
                source = lineages[exploit.source]
                assert source is not None
                lineages[exploit.target] = [*source, exploit.target]
                history[exploit.target] = list(history[exploit.source])
                hparams[exploit.target] = exploit.hparams
            assert not some or None not in lineages.values()
            copied += len(answer)
    assert copied > 1000


@each_rule
def test_the_seed_and_the_generation_decide(rule: str) -> None:
    members = [member(i, *(i + 0.01 * j for j in range(5))) for i in range(10)]
    first = decide(members, pbt(exploit=rule))
    assert first == decide(members, pbt(exploit=rule)) != []
    assert any(decide(members, pbt(exploit=rule), seed=seed) != first for seed in range(1, 5))
    assert any(decide(members, pbt(exploit=rule), generation=g) != first for g in range(2, 6))


@each_rule
def test_one_member_has_nobody_to_copy(rule: str) -> None:
    scheduler = pbt(exploit=rule, quantile=0.5)
    for alone in (member(0, 0.5, 0.6), member(0, math.nan), member(0, 0.5, alive=False), member(0)):
        assert decide([alone], scheduler) == []
    assert decide([], scheduler) == []


@each_rule
@pytest.mark.parametrize("quantile", [1e-6, 0.2, 0.5])
def test_of_two_the_worse_copies_the_better(rule: str, quantile: float) -> None:
    scheduler = pbt(exploit=rule, quantile=quantile)
    good, bad = member(1, 0.8, 0.9, 0.91), member(0, 0.1, 0.2, 0.19)
    assert copies([bad, good], scheduler) == {0: 1}
    assert copies([bad, good], scheduler, objective=LOW) == {1: 0}
    assert copies([member(0, math.nan), good], scheduler) == {0: 1}


@each_rule
@pytest.mark.parametrize("quantile", [1e-6, 0.2, 0.5])
def test_of_three(rule: str, quantile: float) -> None:
    members = [member(i, *(i + 0.01 * j for j in range(4))) for i in range(3)]
    answers = over_seeds(members, pbt(exploit=rule, quantile=quantile))
    if rule == "truncation":
        assert all(answer == {0: 2} for answer in answers)
    else:
        # 0 copies 1 or 2; 1 copies 2 when it meets it, unless 0 copies 1
        assert {tuple(sorted(a.items())) for a in answers} == {((0, 1),), ((0, 2),), ((0, 2), (1, 2))}


@each_rule
def test_a_diverged_member_is_always_replaced_by_one_of_the_best(rule: str) -> None:
    """Four of ten are lost, two more than the quantile holds. In Ray a NaN sits in no quantile and stays."""
    lost: list[Any] = [(math.nan,), (0.99, math.inf), (-math.inf,)]
    members = [member(i, *x) for i, x in enumerate(lost)] + [member(3, 0.99, alive=False)]
    members += [member(i, 0.01 * i) for i in range(4, 10)]
    answers = over_seeds(members, pbt(exploit=rule, quantile=0.2))
    for target in range(4):
        assert sources_of(target, answers) == {8, 9}
    if rule == "truncation":  # the quantile is full of them
        assert all(set(answer) == {0, 1, 2, 3} for answer in answers)


@each_rule
def test_a_diverged_member_waits_for_no_boundary(rule: str) -> None:
    good = [member(1, 0.5), member(2, 0.5)]
    scheduler = pbt(exploit=rule, burn_in_epochs=6)
    assert 0 in copies([member(0, math.nan, epoch=3, epochs=20), *good], scheduler)
    assert 0 in copies([member(0, epoch=0, alive=False), *good], scheduler)
    assert 0 not in copies([member(0, math.nan, epoch=20, epochs=20), *good], scheduler)


@each_rule
def test_nobody_healthy_nothing_done(rule: str) -> None:
    members = [member(0, math.nan), member(1, 0.5, alive=False), member(2, math.inf), member(3)]
    assert decide(members, pbt(exploit=rule)) == []


@each_rule
def test_members_that_are_not_ready_are_not_replaced(rule: str) -> None:
    good, bad = member(1, 0.8, 0.9), (0.1, 0.2)
    scheduler = pbt(exploit=rule, burn_in_epochs=4)
    assert copies([member(0, *bad), good], scheduler) == {0: 1}
    assert copies([member(0, *bad, epoch=4), good], scheduler) == {0: 1}
    for late in ({"epoch": 2}, {"epoch": 5}, {"epoch": 10, "epochs": 10}):
        assert copies([member(0, *bad, **late), good], scheduler) == {}
    assert copies([member(0), good], scheduler) == {}  # not measured


@each_rule
def test_a_finished_member_can_be_copied_and_one_before_the_burn_in_cannot(rule: str) -> None:
    bad, scheduler = member(0, 0.1, 0.2), pbt(exploit=rule, burn_in_epochs=4)
    assert copies([bad, member(1, 0.8, 0.9, epoch=7, epochs=7)], scheduler) == {0: 1}
    assert copies([bad, member(1, 0.8, 0.9, epoch=2)], scheduler) == {}
    assert copies([member(0, math.nan), member(1, 0.8, 0.9, epoch=2)], scheduler) == {}


@each_rule
def test_a_copy_goes_on_with_its_sources_hyperparameters_changed(rule: str) -> None:
    """Never with B's weights and A's hyperparameters (ray PR #28509)."""
    members = [member(i, *(i + 0.01 * j for j in range(4))) for i in range(8)]
    kept = decide(members, pbt(exploit=rule, explore=False))
    assert all(e.hparams == members[e.source].hparams for e in kept)
    moved = decide(members, pbt(exploit=rule, resample_probability=0.0))
    assert [(e.target, e.source) for e in moved] == [(e.target, e.source) for e in kept] != []
    for e in moved:
        ratio = e.hparams["lr"] / members[e.source].hparams["lr"]  # type: ignore[operator]
        assert ratio == pytest.approx(0.8) or ratio == pytest.approx(1.2)


def test_crossover_takes_from_the_best_only() -> None:
    space: Space = {"mode": Choice([f"m{i}" for i in range(10)])}
    members = [member(i, float(i), hparams={"mode": f"m{i}"}) for i in range(10)]
    settings: dict[str, Any] = {"quantile": 0.3, "resample_probability": 0.0}
    seen: set[tuple[int, Any]] = set()
    for seed in range(60):
        answer = decide(members, pbt(crossover_probability=1.0, **settings), space=space, seed=seed)
        seen |= {(e.source, e.hparams["mode"]) for e in answer}
    assert seen == {(a, f"m{b}") for a in (7, 8, 9) for b in (7, 8, 9) if a != b}


def test_a_member_that_is_there_twice_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="twice"):
        decide([member(0, 1.0), member(0, 2.0)])


# -- truncation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "quantile", "size"),
    [(2, 0.2, 1), (3, 0.2, 1), (3, 0.5, 1), (4, 0.25, 1), (4, 0.26, 2), (5, 0.2, 1), (6, 0.2, 2),
     (10, 0.2, 2), (5, 0.5, 2), (10, 0.5, 5), (11, 0.5, 5), (100, 0.07, 7), (10, 1e-12, 1)],
)  # fmt: skip
def test_the_size_of_the_quantile(n: int, quantile: float, size: int) -> None:
    answers = over_seeds([member(i, float(i)) for i in range(n)], pbt(quantile=quantile), n=40)
    assert all(set(answer) == set(range(size)) for answer in answers)
    assert {s for answer in answers for s in answer.values()} == set(range(n - size, n))


def test_truncation_picks_its_source_evenly() -> None:
    answers = over_seeds([member(i, float(i)) for i in range(10)], pbt(quantile=0.3), n=600)
    counts = Counter(answer[0] for answer in answers)
    assert set(counts) == {7, 8, 9}
    assert all(150 < count < 250 for count in counts.values()), counts


def test_truncation_breaks_ties_by_the_seed() -> None:
    """On a plateau each is replaced as often as any other, wherever it stands in the list."""
    members = [member(i, 0.5) for i in range(5)]
    answers = over_seeds(members, pbt(quantile=0.2), n=500)
    targets = Counter(t for answer in answers for t in answer)
    sources = Counter(s for answer in answers for s in answer.values())
    for counts in (targets, sources):
        assert set(counts) == set(range(5))
        assert all(65 < count < 135 for count in counts.values()), counts
    assert answers == over_seeds(members[::-1], pbt(quantile=0.2), n=500)


def test_the_diverged_fill_the_worst_quantile_first() -> None:
    members = [member(0, math.nan), *(member(i, float(i)) for i in range(1, 10))]
    assert set(copies(members, pbt(quantile=0.2))) == {0, 1}


# -- the rules that meet a rival -----------------------------------------------------------------------


def test_a_tournament_is_won_by_the_better_only() -> None:
    answers = over_seeds([member(i, float(i)) for i in range(5)], pbt(exploit="binary_tournament"), n=300)
    for i in range(5):
        assert sources_of(i, answers) <= {None, *range(i + 1, 5)}
    assert sources_of(0, answers) == {1, 2, 3, 4}  # the worst always loses, to anybody
    assert sources_of(4, answers) == {None}


@pytest.mark.parametrize("rule", ["binary_tournament", "t_test"])
def test_equals_are_not_copied(rule: str) -> None:
    for scores in ((0.5,), (0.4, 0.5, 0.6)):
        assert set(map(len, over_seeds([member(i, *scores) for i in range(6)], pbt(exploit=rule)))) == {0}


def test_the_t_test_copies_only_what_is_surely_better() -> None:
    noisy = [member(0, 0.1, 0.9, 0.2, 0.8, 0.3), member(1, 0.2, 0.9, 0.3, 0.8, 0.35)]
    sure = [member(0, 0.10, 0.11, 0.12), member(1, 0.20, 0.21, 0.22)]
    assert copies(noisy, pbt(exploit="t_test")) == {}
    assert copies(noisy, pbt(exploit="binary_tournament")) == {0: 1}
    assert copies(sure, pbt(exploit="t_test")) == {0: 1}
    assert copies(sure, pbt(exploit="t_test"), objective=LOW) == {1: 0}


def test_the_t_test_sees_the_window_only() -> None:
    """The second was worse for long and is better now."""
    risen = member(1, *[0.0] * 20, 0.50, 0.51, 0.52)
    steady = member(0, *[0.3, 0.31] * 10, 0.30, 0.31, 0.32)
    assert copies([steady, risen], pbt(exploit="t_test", window=3)) == {0: 1}
    assert copies([steady, risen], pbt(exploit="t_test", window=20)) == {1: 0}


def test_the_t_test_copies_nobody_who_is_replaced() -> None:
    """0 has the worst last score but a better mean than 1, and copies 2 or nobody."""
    falling, rising = member(0, *[0.80, 0.81] * 5, 0.6), member(1, *[0.30, 0.31] * 5, 0.7)
    best = member(2, *[0.95, 0.96] * 5)
    answers = over_seeds([falling, rising, best], pbt(exploit="t_test", window=11))
    assert {tuple(a.items()) for a in answers} == {((0, 2),), ((0, 2), (1, 2)), ((1, 0),), ((1, 2),)}


def test_the_t_test_says_nothing_of_one_score() -> None:
    assert copies([member(0, 0.1), member(1, 0.9)], pbt(exploit="t_test")) == {}
    assert copies([member(0, 0.1, 0.2), member(1, math.nan, 0.9)], pbt(exploit="t_test")) == {}


def test_the_t_test_overlooks_what_was_not_finite() -> None:
    risen = member(1, 0.8, math.nan, 0.82, math.inf, 0.81)
    assert copies([member(0, math.nan, 0.1, 0.12), risen], pbt(exploit="t_test")) == {0: 1}


def test_constant_scores_are_equal_however_many() -> None:
    """The means of three and of five times 0.1 differ in the last bit."""
    for value in (0.1, 0.3, 0.7, 1 / 3):
        members = [member(i, *[value] * (2 + i)) for i in range(8)]
        assert set(map(len, over_seeds(members, pbt(exploit="t_test"), n=20))) == {0}
    assert welch_p([0.1] * 3, [0.1] * 5) == 1


def test_the_t_test_is_sure_of_what_does_not_vary() -> None:
    assert copies([member(0, 0.1, 0.1), member(1, 0.2, 0.2)], pbt(exploit="t_test")) == {0: 1}


@pytest.mark.parametrize("significance", [0.01, 0.05, 0.2])
def test_the_t_test_is_scipys(significance: float) -> None:
    from scipy.stats import ttest_ind

    agreed = Counter[bool]()
    for i in range(60):
        rng = rng_of("welch", i)
        a, b = rng.normal(0, 1, 8).tolist(), rng.normal(1.2, 2, 5).tolist()
        p = ttest_ind(a, b, equal_var=False).pvalue
        assert welch_p(a, b) == pytest.approx(p)
        expected = {} if p >= significance else ({0: 1} if sum(b) / 5 > sum(a) / 8 else {1: 0})
        scheduler = pbt(exploit="t_test", significance=significance)
        assert copies([member(0, *a), member(1, *b)], scheduler) == expected
        agreed[bool(expected)] += 1
    assert len(agreed) == 2


# -- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantile": 0.7}, "`quantile` must be in (0, 0.5], got 0.7; set scheduler.quantile"),
        ({"quantile": 0}, "`quantile` must be in (0, 0.5], got 0; set scheduler.quantile"),
        ({"quantile": math.nan}, "`quantile` must be in (0, 0.5], got nan; set scheduler.quantile"),
        ({"interval_epochs": 0}, "`interval_epochs` must be an integer of at least 1, got 0"),
        ({"interval_epochs": 1.5}, "`interval_epochs` must be an integer of at least 1, got 1.5"),
        ({"interval_epochs": True}, "`interval_epochs` must be an integer of at least 1, got True"),
        ({"burn_in_epochs": -1}, "`burn_in_epochs` must be an integer of at least 0, got -1"),
        ({"exploit": "best"}, "`exploit` must be one of truncation, binary_tournament, t_test, got 'best'"),
        ({"explore": 1}, "`explore` must be true or false, got 1"),
        ({"resample_probability": 1.1}, "`resample_probability` must be in [0, 1], got 1.1"),
        ({"crossover_probability": "no"}, "`crossover_probability` must be in [0, 1], got 'no'"),
        ({"perturbation_factors": (1.2, 0.8)}, "two numbers, the first in (0, 1), the second above 1"),
        ({"perturbation_factors": [0.8]}, "got (0.8,); set scheduler.perturbation_factors"),
        ({"perturbation_factors": 1.2}, "got 1.2; set scheduler.perturbation_factors"),
        ({"window": 1}, "`window` must be an integer of at least 2, got 1; set scheduler.window"),
        ({"significance": 1}, "`significance` must be in (0, 1), got 1; set scheduler.significance"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError) as refused:
        pbt(**settings)
    assert message in str(refused.value)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(UserInputError) as refused:
        pbt(quantile=2, window=0)
    assert len(str(refused.value).splitlines()) == 2


def test_settings_are_frozen_plain_data() -> None:
    scheduler = pbt(perturbation_factors=[0.5, 2])
    assert scheduler.perturbation_factors == (0.5, 2)
    assert scheduler == pbt(perturbation_factors=(0.5, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheduler.window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("interval", "burn_in", "epochs", "expected"),
    [(2, 0, 7, [2, 4, 6, 7]), (2, 5, 10, [6, 8, 10]), (3, 3, 9, [3, 6, 9]), (1, 0, 3, [1, 2, 3]),
     (5, 0, 3, [3]), (2, 50, 7, [7]), (4, 2, 9, [4, 8, 9])],
)  # fmt: skip
def test_boundaries(interval: int, burn_in: int, epochs: int, expected: list[int]) -> None:
    scheduler = pbt(interval_epochs=interval, burn_in_epochs=burn_in)
    found, epoch = [], 0
    while epoch < epochs:
        epoch = scheduler.next_boundary(epoch, epochs)
        found.append(epoch)
        assert scheduler.is_ready(member(0, 0.5, epoch=epoch, epochs=epochs)) == (epoch != epochs)
    assert found == expected
    assert all(scheduler.next_boundary(e, epochs) == min(b for b in found if b > e) for e in range(epochs))


def test_a_member_at_its_end_has_no_next_boundary() -> None:
    with pytest.raises(AssertionError, match="no next boundary"):
        pbt().next_boundary(7, 7)


def test_a_structural_hyperparameter_is_refused_by_name() -> None:
    dynamic = {"lr", "dropout", "momentum"}
    good: Space = {"lr": Float(1e-4, 1), "dropout": Float(0, 0.5), "batch_size": Choice([32, 64])}
    assert check_space(good, dynamic) == []
    problems = check_space({**good, "width": Int(16, 64), "optimizer": Choice(["sgd", "adam"])}, dynamic)
    assert [problem.where for problem in problems] == ["space.width", "space.optimizer"]
    assert str(problems[0]) == (
        "space.width: pbt changes only what a half-trained model can go on with, and width is structural: it "
        "shapes the model or its training program; got {'int': [16, 64]}; fix width in [hparams], or search "
        "it without pbt"
    )
    (problem,) = check_space({}, dynamic)
    assert str(problem) == (
        "space: pbt needs at least one hyperparameter to change, got none; "
        "search one of batch_size, dropout, lr, momentum"
    )


# -- figure 2 of the paper -----------------------------------------------------------------------------

TOY: Space = {"h0": Float(0, 1), "h1": Float(0, 1)}


def toy(scheduler: PBT | None, seed: int, steps: int = 200, starts: Any = ((1.0, 0.0), (0.0, 1.0))) -> float:
    """The best Q = 1.2 - theta0² - theta1² that two workers find, which climb 1.2 - h0 theta0² - h1 theta1².

    One worker sees theta0 only and the other theta1, from (0.9, 0.9); a decision every four steps.
    """
    theta = [[0.9, 0.9] for _ in starts]
    hparams: list[Any] = [{"h0": h0, "h1": h1} for h0, h1 in starts]

    def q(i: int) -> float:
        return 1.2 - theta[i][0] ** 2 - theta[i][1] ** 2

    for step in range(1, steps + 1):
        for i, h in enumerate(hparams):
            theta[i] = [t - 0.02 * 2 * h[name] * t for t, name in zip(theta[i], ("h0", "h1"), strict=True)]
        if scheduler is None or step % scheduler.interval_epochs:
            continue
        members = [member(i, q(i), epoch=step, hparams=h) for i, h in enumerate(hparams)]
        answer = scheduler.decide(
            members, objective=HIGH, space=TOY, seed=seed, generation=step // scheduler.interval_epochs
        )
        before = [list(t) for t in theta]
        for exploit in answer:
            theta[exploit.target] = list(before[exploit.source])
            hparams[exploit.target] = dict(exploit.hparams)
    return max(map(q, range(len(theta))))


@pytest.mark.parametrize("resample", [0.0, 0.25])
def test_the_toy_of_the_paper_is_solved_by_pbt(resample: float) -> None:
    scheduler = pbt(interval_epochs=4, resample_probability=resample)
    assert min(toy(scheduler, seed) for seed in range(20)) > 1.1


def test_the_toy_of_the_paper_is_not_solved_without() -> None:
    """The grid's two points reach 0.4, and so does copying without exploring."""
    assert toy(None, 0) == pytest.approx(0.39, abs=0.01)
    exploit_only = pbt(interval_epochs=4, explore=False)
    assert all(toy(exploit_only, seed) < 0.4 for seed in range(20))
