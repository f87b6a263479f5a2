"""What one sender may have parked: counted at once, given free again, and in bounded memory."""

from __future__ import annotations

import pytest

from agentweave_bus.control.shares import Holding, Place, Shares

NOW = 1_000_000
LATER = NOW + 3_600_000


def task(
    key: int, sender: str = "a", *, size: int = 10, recurring: bool = False, due: int = LATER
) -> Holding:
    return Holding(sender, str(key), size, due, LATER, recurring)


def place(number: int, stream: str = "parked-x") -> Place:
    return Place(stream, number)


@pytest.mark.parametrize(
    ("limits", "word", "recurring"),
    [
        ({"tasks": 3}, "3 tasks", False),
        ({"size": 30}, "30 bytes", False),
        ({"recurring": 3}, "3 recurring", True),
    ],
)
def test_a_sender_has_a_share_and_the_others_theirs(
    limits: dict[str, int], word: str, recurring: bool
) -> None:
    shares = Shares(**limits)
    for number in range(3):
        assert shares.refusal(place(number), task(number, recurring=recurring), NOW) is None
    assert shares.refusal(place(2), task(2, recurring=recurring), NOW) is None  # given out again
    why = shares.refusal(place(3), task(3, recurring=recurring), NOW)
    assert why is not None
    assert word in why
    assert "too many of yours are parked" in why
    assert shares.refusal(place(4), task(4, "b", recurring=recurring), NOW) is None
    elsewhere = shares.refusal(place(3, "parked-y"), task(5, recurring=recurring), NOW)
    assert (elsewhere is None) == (not recurring)  # recurring ones count at all agents together
    shares.release(place(0))
    assert shares.refusal(place(3), task(3, recurring=recurring), NOW) is None


def test_what_is_not_heard_of_any_more_leaves_the_count() -> None:
    shares = Shares(recurring=2)
    shares.hold(place(0), task(0, recurring=True, due=NOW))
    shares.hold(place(1), task(1, recurring=True, due=NOW))
    shares.hold(place(1), task(1, recurring=True))  # came again
    assert shares.refusal(place(2), task(2, recurring=True), NOW + 599_999) is not None
    assert shares.refusal(place(2), task(2, recurring=True), NOW + 600_000) is None
    assert shares.refusal(place(3), task(3, recurring=True), NOW + 600_000) is not None


def test_its_memory_is_bounded() -> None:
    shares = Shares(remembered=5)
    for number in range(50):
        shares.hold(place(number), task(number))
        shares.hold(place(number), task(number))
    assert len(shares) == 5
    assert len(shares._lapsing) <= 10
    for number in range(50):
        shares.release(place(number))
    assert len(shares) == 0
    for kept in (shares._tasks, shares._bytes, shares._recurring, shares._places):
        assert not kept


def test_the_same_task_parked_again() -> None:
    shares = Shares()
    assert shares.elsewhere(place(0), task(0)) is None
    shares.hold(place(0), task(0))
    assert shares.elsewhere(place(0), task(0)) is None
    found = shares.elsewhere(place(1), task(0))
    assert found == (place(0), task(0))
    assert found[1].covers(task(0))
    assert not found[1].covers(task(0, due=NOW))
    assert not found[1].covers(task(0)._replace(until_ms=LATER + 1))
