"""What goes to browsers: all of it once, then what has changed, and to who is slow the newest."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agentweave_bus.console.streaming import EventStream, LiveState
from agentweave_bus.console.watched import Watched

pytestmark = pytest.mark.anyio


class Console:
    """A state whose sections a test sets."""

    def __init__(self) -> None:
        self.sections: dict[str, Any] = {"tasks": [1], "letters": []}
        self.watched = Watched()
        self.state = LiveState(lambda: self.sections, {"as": "me"}, self.watched, lambda: 7)

    def set(self, **sections: Any) -> None:
        self.sections |= sections
        self.state.whole()


async def test_first_all_of_it_then_what_has_changed() -> None:
    console = Console()
    whole, version = console.state.whole()
    assert json.loads(whole) == {"now": 7, "as": "me", "tasks": [1], "letters": []}
    waiting = asyncio.ensure_future(console.state.changes(version))
    console.set(letters=[])
    await asyncio.sleep(0)
    assert not waiting.done()
    console.set(tasks=[2])
    data, version = await waiting
    assert json.loads(data) == {"now": 7, "tasks": [2]}
    console.set(tasks=[3])
    console.set(letters=["x"])
    console.set(tasks=[4])
    data, version = await console.state.changes(version)
    assert json.loads(data) == {"now": 7, "tasks": [4], "letters": ["x"]}


async def test_a_reader_that_takes_nothing_gets_the_newest_and_nothing_is_kept_for_it() -> None:
    console = Console()
    sent: list[bytes] = []
    room = asyncio.Semaphore(1)

    async def send(message: Any) -> None:
        if message.get("body"):
            await room.acquire()
            sent.append(message["body"])

    gone = asyncio.Event()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    stream = asyncio.ensure_future(EventStream(console.state, console.watched)({}, receive, send))
    while not sent:  # noqa: ASYNC110 - what is sent is a list
        await asyncio.sleep(0)
    console.set(tasks=[2])
    for _ in range(9):
        await asyncio.sleep(0)
    for number in range(3, 50):
        console.set(tasks=[number])
    for _ in range(2):  # what it was about to be sent, and what there is now
        room.release()
        for _ in range(9):
            await asyncio.sleep(0)
    events = [json.loads(body.partition(b"data: ")[2]) for body in sent]
    assert [event["tasks"] for event in events] == [[1], [2], [49]]
    assert console.watched.looking == 1
    gone.set()
    await stream
    assert console.watched.looking == 0


async def test_a_stream_ends_with_the_console() -> None:
    console = Console()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    stream = asyncio.ensure_future(EventStream(console.state, console.watched)({}, receive, send))
    while len(sent) < 2:  # noqa: ASYNC110 - likewise
        await asyncio.sleep(0)
    console.state.close()
    await asyncio.wait_for(stream, 30)
    assert sent[-1] == {"type": "http.response.body", "body": b""}


async def test_who_looks_ends_a_pause() -> None:
    watched = Watched()
    pause = asyncio.ensure_future(watched.pause(60, unwatched_s=60))
    await asyncio.sleep(0)
    with watched.look():
        await asyncio.wait_for(pause, 30)
