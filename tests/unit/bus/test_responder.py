"""Taking calls in: none is lost before serving begins, and a session is held from the first moment."""

from __future__ import annotations

import anyio
import pytest

from agentweave_bus.bus.admission import AdmissionRefusedError, Step
from agentweave_bus.bus.responder import Responder
from agentweave_bus.envelope import Sealer
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio


class Gate:
    """Notes what it is asked, and refuses it without an answer."""

    def __init__(self):
        self.seen = []
        self.holds = []
        self.asked = anyio.Event()
        self.session = None

    async def admit(self, frame, _arrival):
        self.seen.append(frame)
        self.holds.append(self.session.holds)
        self.asked.set()
        raise AdmissionRefusedError(Step.FRAME, "a test")


class Session:
    """What a responder needs of one; a broker would not hand out messages at a chosen moment."""

    def __init__(self):
        self.handlers = {}
        self.holds = 0

    async def serve(self, subject, _queue, handler, _pending_bytes):
        self.handlers[subject] = handler

    def take_hold(self):
        self.holds += 1

    def release_hold(self):
        self.holds -= 1


class Message:
    subject, reply, data = "aw.call.a=test.agent/x.do", "r", b"frame"


@pytest.fixture
def parts():
    return made(taken_in=1)


def made(*, taken_in):
    gate, session = Gate(), Session()
    gate.session = session
    responder = Responder(
        me=SpiffeID("spiffe://a.test/agent/x"),
        capabilities=["do"],
        admission=gate,
        dispatch=None,
        sealer=Sealer(lambda: None),
        audit=None,
        metrics=Metrics.create(),
        clock_ms=lambda: 0,
        taken_in=taken_in,
    )
    return responder, gate, session


async def test_what_is_delivered_before_serving_waits_for_it(parts):
    responder, gate, session = parts
    await responder.on_session(session)
    async with anyio.create_task_group() as group:
        group.start_soon(session.handlers[Message.subject], Message)
        await anyio.wait_all_tasks_blocked()
        assert gate.seen == []
        async with responder.running():
            with anyio.fail_after(30):
                await gate.asked.wait()
    assert gate.seen == [b"frame"]


async def test_a_message_holds_its_session_before_its_task_begins(parts):
    responder, gate, session = parts
    await responder.on_session(session)
    async with responder.running():
        await session.handlers[Message.subject](Message)
        assert session.holds == 1
        assert gate.seen == []
        with anyio.fail_after(30):
            await gate.asked.wait()
        await anyio.wait_all_tasks_blocked()
        assert session.holds == 0
    assert gate.holds == [1]


async def test_after_the_end_nothing_is_begun(parts):
    responder, gate, session = parts
    await responder.on_session(session)
    async with responder.running():
        pass
    with anyio.fail_after(30):
        await session.handlers[Message.subject](Message)
    assert (gate.seen, session.holds) == ([], 0)


async def test_what_came_together_is_begun_by_sixteens():
    """So that the first are answered, and their callers at work again, before the last are looked at."""
    responder, gate, session = made(taken_in=100)
    await responder.on_session(session)
    begun = []
    async with responder.running():
        for number in range(40):
            await session.handlers[Message.subject](Message)
            begun.append(len(gate.seen))
            assert len(gate.seen) <= number + 1
    assert begun == [0] * 15 + [16] * 16 + [32] * 9
