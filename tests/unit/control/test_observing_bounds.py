"""An answer to who watches has a bounded size, whatever agents have recorded, and begins where it can."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from agentweave_bus.control.observing import _BACK, _MOST_BYTES, _Page, _shortened, _size, _start
from agentweave_bus.control.operators import _Records
from agentweave_bus.control.stream_reader import StreamFigures, _Answers
from agentweave_bus.exceptions import BusError


def row(number: int, length: int) -> dict[str, object]:
    return {"number": number, "message": "\N{SNOWMAN}" * (length // 3)}


def test_a_page_ends_before_it_is_too_large() -> None:
    page = _Page()
    taken = [page.take(row(number, 50_000)) for number in range(20)]
    assert taken == [True] * taken.count(True) + [False] * taken.count(False)
    assert 0.8 * _MOST_BYTES < sum(map(_size, page.rows)) <= _MOST_BYTES
    assert page.take(None)  # what is not told needs no room


def test_a_row_of_its_own_fits_whatever_its_size() -> None:
    page = _Page()
    assert page.take(row(0, 2 * _MOST_BYTES))
    assert not page.take(row(1, 10))


def test_of_a_long_story_the_beginning_and_the_end_are_told() -> None:
    rows = [row(number, 10_000) for number in range(100)]
    told, left_out = _shortened(rows)
    assert left_out == 100 - len(told) > 0
    assert 0.9 * _MOST_BYTES < sum(map(_size, told)) <= _MOST_BYTES
    numbers = [one["number"] for one in told]
    assert (numbers[0], numbers[-1]) == (0, 99)
    gaps = [after for before, after in itertools.pairwise(numbers) if after != before + 1]
    assert len(gaps) == 1
    assert abs(numbers.index(gaps[0]) - len(told) / 2) <= 1


def test_a_short_story_is_told_whole() -> None:
    rows = [row(number, 100) for number in range(5)]
    assert _shortened(rows) == (rows, 0)
    assert _shortened([]) == ([], 0)


@pytest.mark.parametrize(
    ("first", "last", "seen", "start"),
    [
        (1, 10, None, 0),
        (1, 10_000, None, 10_000 - _BACK),
        (9_000, 10_000, None, 8_999),
        (1, 10_000, 0, 0),  # who was there goes on where it was
        (1, 10, 10, 10),
        (51, 50, 20, 50),  # what was there has expired
        (1, 10, 11, 0),  # another stream under the same name
        (1, 0, None, 0),
    ],
)
def test_where_an_answer_begins(first: int, last: int, seen: int | None, start: int) -> None:
    assert _start(StreamFigures("states", max(0, last - first + 1), first, last), seen) == start


@pytest.mark.anyio
@pytest.mark.parametrize(("most", "size"), [(3, 1_000), (100, 30)])
async def test_a_broker_that_gives_more_than_it_was_asked_for(most: int, size: int) -> None:
    """Else who owns it could fill the control role's memory for as long as an answer may take."""
    over: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    answers = _Answers("s", most, size, over)
    for number in range(1, 10):
        headers = {"Nats-Stream": "s", "Nats-Subject": "x", "Nats-Sequence": str(number)}
        headers["Nats-Time-Stamp"] = "2026-01-01T00:00:00Z"
        await answers.take(Msg(Client(), data=bytes(10), headers=headers))
    assert len(answers.messages) == 3
    with pytest.raises(BusError, match="more than it was asked for"):
        over.result()


def test_a_place_that_a_broker_made_up_is_asked_with_again() -> None:
    """A console that was told it asks with it until it is told another; the look begins anew near the end."""
    agent = "spiffe://shop.test/agent/order"
    asked = _Records.model_validate({"after": {agent: 2**64 - 1}})
    (seen,) = asked.after.values()
    assert _start(StreamFigures("s", 10, 1, 10), seen) == 0
