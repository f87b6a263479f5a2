"""Attack: an agent has tasks redriven that it signed itself, by the old key of somebody who calls it."""

from __future__ import annotations

import asyncio
import copy
from datetime import timedelta
from typing import NamedTuple

import pytest

from agentweave_bus import RetryableError, SecureAgent, capability
from agentweave_bus.bus.streams import tasks_stream_name
from agentweave_bus.bus.subjects import task_subject
from agentweave_bus.envelope import Draft, Kind, Sealed, encode_payload, new_id
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.exceptions import AgentCallError
from agentweave_bus.identity.svid import X509Svid
from agentweave_bus.runtime.operators import DeadLetterCalls
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.queue import Delivery
from agentweave_bus.tasks.record import RecordBody, TaskRef
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import sealed_by

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000
MINUTE_MS = 60_000


class TillAgent(SecureAgent):
    """What the thief is after: it pays for the client."""

    def on_start(self) -> None:
        self.paid: list[str] = []

    @capability("pay")
    async def pay(self, name: str) -> str:
        self.paid.append(name)
        return "paid"


class EvilAgent(SecureAgent):
    """Calls the till on behalf of who asked it; its honest tasks fail once."""

    def on_start(self) -> None:
        self.ran: list[str] = []
        self.till = ""

    @capability("work", retry=Retry(attempts=1))
    async def work(self, name: str) -> str:
        self.ran.append(name)
        if self.context.attempt == 1:
            raise RetryableError("it is sick")
        answer = await self.call_agent(self.till, "pay", {"name": name})
        return str(answer.status)


class Den(NamedTuple):
    """The agent in league with the thief, the till, and an honest operator."""

    bus: MemoryBus
    evil: EvilAgent
    till: TillAgent
    parts: Connected
    operator: DeadLetterCalls

    def now_ms(self) -> int:
        return self.bus.clock.time_ns() // 1_000_000

    def forged(self, svid: X509Svid, iat: int, exp: int) -> Sealed:
        """A task in the client's name, by its key."""
        payload, agent = encode_payload({"name": "stolen"}), self.bus.id("agent/evil")
        draft = Draft(
            kind=Kind.TASK,
            id=new_id(iat),
            aud=agent,
            cap="work",
            sub=task_subject(agent, "work"),
            iat=iat,
            exp=exp,
        )
        values = map_from_draft(
            draft, iss=self.bus.id("client/cli"), x5t=svid.x5t, pd=sha256(payload), par=None
        )
        return sealed_by(svid, pack(values), payload)

    async def planted(self, sealed: Sealed) -> str:
        """The log and the dead letter of a task that never was in the queue; all of it the agent may write."""
        ref = TaskRef(sealed.head.aud, sealed.head.iss, "work", sealed.head.id)
        log, desk, pd = TaskLog(self.parts.desk, ref), self.parts.desk, sealed.head.pd.hex()
        result = {"status": "failed", "messages": [], "error": "sick"}
        for body in (
            RecordBody(state=TaskState.WORKING, pd=pd),
            RecordBody(state=TaskState.FAILED, pd=pd, result=result),
        ):
            assert await log.append(body, sealed.digest) is not None
        # It lies about when that was in the queue, too.
        delivery = Delivery(sealed.frame, sealed.head.sub, 1, sealed.head.iat, "")
        await DeadLetters(ref.agent, desk).write(delivery, "it is sick", log=log, digest=sealed.digest)
        return await self.letter()

    async def letter(self) -> str:
        (row,) = (await self.operator.list())["letters"]
        return str(row["letter"])

    async def idle(self) -> None:
        stream = self.bus.broker.jetstream.streams[tasks_stream_name(self.bus.id("agent/evil"))]
        async with asyncio.timeout(20):
            while stream.messages:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.002)

    async def refused(self, letter: str, match: str) -> None:
        with pytest.raises(AgentCallError, match=match):
            await self.operator.redrive(letter)
        assert (await self.operator.show(letter))["not_redrivable"]
        await self.idle()
        assert (self.evil.ran, self.till.paid) == ([], [])


@pytest.fixture
async def den(bus: MemoryBus) -> Den:
    client = str(bus.id("client/cli"))
    await bus.grant("client/cli", "agent/evil", "work")
    await bus.grant("agent/evil", "agent/till", "pay", on_behalf_of=client)
    operators = [{"who": str(bus.id("client/operator")), "may": ["control:redrive"]}]
    await bus.set_grants({**bus.grants.model_dump(mode="json", exclude_none=True), "operators": operators})
    evil, till = await bus.start(EvilAgent), await bus.start(TillAgent)
    evil.till = str(bus.id("agent/till"))
    parts = bus._held[0].parts
    await bus.client("client/operator")
    calls = bus._held[-1].parts
    assert parts is not None
    assert calls is not None
    return Den(bus, evil, till, parts, DeadLetterCalls(calls))


@pytest.mark.parametrize(
    ("lifetime_ms", "why"),
    [(MINUTE_MS, "at a time for which it was not signed"), (30 * DAY_MS, "had expired .* may be dated back")],
)
@refused_by(Layer.CONTROL, "redriving a task dated back to when a stolen key was valid", by=Adversary.THIEF)
async def test_a_task_dated_back_to_when_a_stolen_key_was_valid(den: Den, lifetime_ms: int, why: str) -> None:
    start = den.bus.clock.now() - timedelta(hours=20)
    stolen = den.bus.domain().authority.issue(den.bus.id("client/cli"), not_before=start)
    then = int(start.timestamp() * 1000) + 1_000
    await den.refused(await den.planted(den.forged(stolen, then, then + lifetime_ms)), why)


@refused_by(Layer.CONTROL, "redriving a task dated ahead of its own log", by=Adversary.THIEF)
async def test_a_task_dated_ahead(den: Den) -> None:
    """Begun before it was asked for: so its first record can't stand in for that of another time."""
    stolen, now = den.bus.domain().issue("client/cli"), den.now_ms()
    letter = await den.planted(den.forged(stolen, now + 5 * MINUTE_MS, now + DAY_MS))
    await den.refused(letter, "at a time for which it was not signed")


@refused_by(
    Layer.CONTROL, "redriving a task by an authority that had left when it was begun", by=Adversary.THIEF
)
async def test_a_task_by_an_authority_that_had_left_when_it_was_begun(den: Den) -> None:
    bus = den.bus
    old = copy.copy(bus.domain().authority)
    then = den.now_ms() - 10 * MINUTE_MS
    await bus.rotate_ca()
    await bus.clock.advance(300)
    svid = old.issue(
        bus.id("client/cli"), not_before=bus.clock.now() - timedelta(hours=8), lifetime=timedelta(hours=8)
    )
    await den.refused(await den.planted(den.forged(svid, then, then + DAY_MS)), "does not verify now")


async def given_up(den: Den) -> str:
    client = await den.bus.client("client/cli")
    submitted = await client.submit(str(den.bus.id("agent/evil")), "work", {"name": "honest"})
    assert (await submitted.result(10)).status == "failed"
    await den.idle()
    return await den.letter()


@pytest.mark.slow
async def test_an_honest_dead_letter_may_lie_for_longer_than_its_sender_is_valid(den: Den) -> None:
    """Honest: how long it lies is no matter, only when it was begun: also not for the calls of its handler."""
    letter = await given_up(den)
    await den.bus.clock.advance(5 * 3600 + 600)
    await den.operator.redrive(letter)
    await den.idle()
    assert (den.evil.ran, den.till.paid) == (["honest", "honest"], ["honest"])
