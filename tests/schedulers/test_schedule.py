"""Schedules that are known beforehand: when they change what."""

from __future__ import annotations

from hpt_torch.schedulers import Member, Schedule, parse_changes
from hpt_torch.types import Exploit, Objective

SCHEDULE = Schedule(
    changes=parse_changes([{"after": 2, "lr": 0.5}, {"after": 5, "lr": 0.1, "batch_size": 64}])
)
OBJECTIVE = Objective(metric="valid/loss", direction="minimize")


def _decide(members: list[Member]) -> list[Exploit]:
    return SCHEDULE.decide(members, objective=OBJECTIVE, space={}, seed=0, generation=1)


def test_boundaries_are_where_something_changes_and_the_end() -> None:
    assert [SCHEDULE.next_boundary(epoch, 8) for epoch in range(8)] == [2, 2, 5, 5, 5, 8, 8, 8]
    assert SCHEDULE.next_boundary(2, 4) == 4


def test_every_living_member_goes_on_as_itself_with_what_changes() -> None:
    members = [
        Member(number=number, epoch=epoch, hparams={"lr": 1.0, "dropout": 0.2}, alive=number != 7)
        for number, epoch in ((9, 2), (3, 5), (7, 2), (4, 3))
    ]
    assert _decide(members) == [
        Exploit(target=3, source=3, hparams={"lr": 0.1, "dropout": 0.2, "batch_size": 64}),
        Exploit(target=9, source=9, hparams={"lr": 0.5, "dropout": 0.2}),
    ]
