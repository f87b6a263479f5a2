"""Of several control roles each looks after parked tasks whose streams another one made."""

from __future__ import annotations

import json
from types import SimpleNamespace

import anyio
import pytest

from agentweave_bus.bus.streams import parked_consumer, parked_stream
from agentweave_bus.control import scheduler as module
from agentweave_bus.control.scheduler import Scheduler
from agentweave_bus.envelope import control_role
from agentweave_bus.exceptions import UnreachableError
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

ME = control_role("demo.test")
AGENT = SpiffeID("spiffe://demo.test/agent/echo")


class Elsewhere:
    """A broker at which another control role makes a stream, after it could not be reached for once."""

    usable = True
    instance = "A" * 22

    def __init__(self) -> None:
        self.looks = 0
        self.asked: list[tuple[str, str]] = []
        self.pulled = anyio.Event()

    def on_session(self, _listener):
        pass

    async def session(self, _timeout_s):
        self.looks += 1
        if self.looks == 2:  # the first is the feeds' own
            raise UnreachableError("not now")
        return self

    async def ask(self, subject, _body, *, timeout_s):
        assert (subject, timeout_s > 0) == ("$JS.API.STREAM.NAMES", True)
        return SimpleNamespace(data=json.dumps({"streams": [parked_stream(AGENT).name], "total": 1}).encode())

    async def receive_pulled(self, _subject, _take):
        async def unsubscribe():
            pass

        return unsubscribe

    async def until_over(self):
        await anyio.sleep_forever()


async def test_a_stream_that_another_made_is_pulled_from(monkeypatch):
    broker = Elsewhere()

    async def request_next(_session, place, _inbox, _batch):
        broker.asked.append(place)
        broker.pulled.set()

    monkeypatch.setattr("agentweave_bus.control.feeds.request_next", request_next)
    one = Scheduler(ME, keeper=broker, verifier=None, sealer_of=lambda _agent: None, look_s=0.01)
    async with anyio.create_task_group() as group:
        group.start_soon(one.run)
        with anyio.fail_after(30):
            await broker.pulled.wait()
        group.cancel_scope.cancel()
    assert set(broker.asked) == {(parked_stream(AGENT).name, parked_consumer(AGENT).name)}
    assert parked_consumer(AGENT).name == module.PARKED_CONSUMER
