"""Asking the broker through a session: an answer, none in time, a full buffer, a lost connection."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from agentweave_bus.bus.connection import NotPermittedError, Session
from agentweave_bus.exceptions import BusError
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

ME = SpiffeID("spiffe://a.test/agent/x")
FULL = 2 * 1024 * 1024


class Client:
    """A connection on which nothing happens but what a test does; with a full buffer publishing waits."""

    max_payload = 1024

    def __init__(self) -> None:
        self.pending_data_size = 0
        self.asked: asyncio.Queue[str] = asyncio.Queue()

    async def publish(self, _subject: str, _data: bytes, reply: str, _headers: Any) -> None:
        if self.pending_data_size >= FULL:
            await asyncio.Event().wait()
        self.asked.put_nowait(reply)


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
async def session(client: Client) -> Session:
    return Session(ME, client)  # type: ignore[arg-type]


async def test_an_answer_counts_on_the_subject_that_was_asked_with(session: Session, client: Client) -> None:
    asking = asyncio.create_task(session.ask("where", b"", timeout_s=30))
    reply = await client.asked.get()
    assert session.in_flight == 1
    await session._on_api_answer(SimpleNamespace(subject=f"{reply}0"))  # type: ignore[arg-type]
    await session._on_api_answer(SimpleNamespace(subject=reply, data=b"yes"))  # type: ignore[arg-type]
    assert (await asking).data == b"yes"
    assert_nothing_is_left(session)


@pytest.mark.parametrize("buffered", [0, FULL])
async def test_the_deadline_covers_the_publishing_too(
    session: Session, client: Client, buffered: int
) -> None:
    client.pending_data_size = buffered
    async with asyncio.timeout(30):
        with pytest.raises(TimeoutError):
            await session.ask("where", b"", timeout_s=0.01)
    assert_nothing_is_left(session)


async def test_who_is_cancelled_leaves_nothing(session: Session, client: Client) -> None:
    asking = asyncio.create_task(session.ask("where", b"", timeout_s=30))
    await client.asked.get()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert_nothing_is_left(session)


async def test_a_lost_connection_and_a_refusal_are_told(session: Session, client: Client) -> None:
    asking = asyncio.create_task(session.ask("where", b"", timeout_s=30))
    await client.asked.get()
    assert not session.not_permitted("elsewhere")  # nobody asked there, so the log has to tell
    assert session.not_permitted("where")
    with pytest.raises(NotPermittedError):
        await asking
    asking = asyncio.create_task(session.ask("where", b"", timeout_s=30))
    await client.asked.get()
    session.mark_closed()
    with pytest.raises(BusError):
        await asking
    with pytest.raises(BusError):
        await session.ask("where", b"", timeout_s=30)
    assert_nothing_is_left(session)


async def test_several_are_asked_at_once_and_each_has_its_own_answer(
    session: Session, client: Client
) -> None:
    questions = [("here", b"1"), ("there", b"2"), ("here", b"3"), ("nowhere", b"4")]
    asking = asyncio.create_task(session.ask_all(questions, timeout_s=0.2))
    replies = [await client.asked.get() for _ in questions]
    await session._on_api_answer(SimpleNamespace(subject=replies[2], data=b"three"))  # type: ignore[arg-type]
    await session._on_api_answer(SimpleNamespace(subject=replies[0], data=b"one"))  # type: ignore[arg-type]
    assert session.not_permitted("there")
    first, second, third, fourth = await asking
    assert (first.data, third.data) == (b"one", b"three")  # type: ignore[union-attr]
    assert (type(second), type(fourth)) == (NotPermittedError, TimeoutError)
    assert_nothing_is_left(session)


async def test_of_several_that_find_no_room_or_no_connection_each_is_told(
    session: Session, client: Client
) -> None:
    client.pending_data_size = FULL
    async with asyncio.timeout(30):
        found = await session.ask_all([("here", b""), ("there", b"")], timeout_s=0.01)
    assert [type(one) for one in found] == [TimeoutError] * 2
    client.pending_data_size = 0
    asking = asyncio.create_task(session.ask_all([("here", b""), ("there", b"")], timeout_s=30))
    await client.asked.get()
    session.mark_closed()
    assert [type(one) for one in await asking] == [BusError] * 2
    assert [type(one) for one in await session.ask_all([("here", b"")], timeout_s=30)] == [BusError]
    assert_nothing_is_left(session)


async def test_what_comes_to_be_asked_when_the_time_is_up_does_not_wait(
    session: Session, client: Client
) -> None:
    client.pending_data_size = FULL

    async def drained(*_: Any) -> None:
        await asyncio.sleep(0.05)  # longer than the deadline
        client.pending_data_size = 0

    client.publish = drained  # type: ignore[method-assign]
    async with asyncio.timeout(30):
        found = await session.ask_all([("here", b""), ("there", b"")], timeout_s=0.02)
    assert [type(one) for one in found] == [TimeoutError] * 2
    assert_nothing_is_left(session)


async def test_several_that_are_cancelled_leave_nothing(session: Session, client: Client) -> None:
    asking = asyncio.create_task(session.ask_all([("here", b""), ("there", b"")], timeout_s=30))
    await client.asked.get()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert_nothing_is_left(session)


def assert_nothing_is_left(session: Session) -> None:
    assert session.in_flight == 0
    assert not session._answers
    assert not session._waiting
