"""Attack: tasks brought back by who may not, too early, twice, or altered.

On the bus in memory, because it is about minutes: everything but the broker is what it is in service, and what
is published here is published as who owns the broker.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.bus.streams import dead_stream_name, parked_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import park_subject, task_subject, wakeup_subject
from agentweave_bus.control.shares import MOST_RECURRING
from agentweave_bus.envelope import Draft, Kind, control_role, decode_frame, decode_payload
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.frame import Link
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.tasks.dead_letters import _UNVERIFIED_BURST
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.testing import MemoryBus
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import sealed_by

pytestmark = pytest.mark.anyio

DELAY = 120
OTHER_ID = "01890a5d-0000-7000-8000-000000000001"
RAN: list[str] = []


class Parked(SecureAgent):
    """Counts what it does."""

    @capability("work")
    async def work(self, name: str) -> str:
        RAN.append(name)
        return name


@dataclass
class Scene:
    bus: MemoryBus
    cli: AgentWeaveClient
    handle: TaskHandle

    @property
    def agent(self) -> Any:
        return self.bus.id("agent/parked")

    def stream(self, name: str) -> Any:
        return self.bus.broker.jetstream.streams[name]

    @property
    def frame(self) -> bytes:
        """What is parked."""
        return bytes(next(iter(self.stream(parked_stream_name(self.agent)).messages.values())).data)

    def queued(self) -> list[bytes]:
        return [bytes(one.data) for one in self.stream(tasks_stream_name(self.agent)).messages.values()]

    def put(self, subject: str, frame: bytes) -> None:
        """Publish as who owns the broker."""
        self.bus.broker.jetstream.received(subject, frame, "", None)

    async def letters(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many dead letters, and return what their records say."""
        stream = self.stream(dead_stream_name(self.agent))

        def records() -> list[Any]:  # what nobody signed has no frame beside it
            return [one for one in stream.messages.values() if one.subject.endswith(".record")]

        async with asyncio.timeout(20):
            while len(records()) < count:  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.01)
        assert len(records()) == count
        return [decoded(bytes(one.data)) for one in records()]

    async def parked(self, count: int) -> None:
        """Wait until so many are parked, and no more are to come."""
        stream = self.stream(parked_stream_name(self.agent))
        async with asyncio.timeout(20):
            while len(stream.messages) != count:  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.01)

    async def runs_once_when_it_is_due(self) -> None:
        await self.bus.clock.advance(DELAY / 2)
        assert RAN == []
        await self.bus.clock.advance(DELAY)
        assert (await self.handle.result(10)).data == "a"
        await self.bus.clock.advance(60)
        assert RAN == ["a"]


def decoded(frame: bytes) -> dict[str, Any]:
    return dict(decode_payload(decode_frame(frame).payload))


@pytest.fixture
async def scene(bus: MemoryBus) -> Scene:
    RAN.clear()
    await bus.grant("client/cli", "agent/parked", "work")
    await bus.grant("client/mallory", "agent/parked", "work")
    await bus.start(Parked)
    cli = await bus.client("client/cli")
    handle = await cli.submit(str(bus.id("agent/parked")), "work", {"name": "a"}, delay=DELAY)
    return Scene(bus, cli, handle)


def reissued(scene: Scene, by: str, *, name: str | None = None, **changed: Any) -> bytes:
    """A reissue of what is parked, as somebody would sign it now, in somebody's ``name``."""
    parts = decode_frame(scene.frame)
    link = Link(parts.head, parts.proof, parts.chain)
    head, now_ms = link.head, scene.bus.clock.time_ns() // 1_000_000
    draft = Draft(
        kind=Kind.REISSUE,
        id=head.id,
        aud=head.aud,
        cap=head.cap,
        sub=task_subject(head.aud, head.cap),
        iat=now_ms,
        exp=head.exp,
    )
    svid = scene.bus.domain().issue(by)
    iss = scene.bus.id(name or by)
    value = map_from_draft(
        {**draft, **changed}, iss=iss, x5t=svid.x5t, pd=sha256(parts.payload), par=link.digest
    )
    return sealed_by(svid, pack(value), parts.payload, (link,)).frame


@refused_by(
    Layer.CONTROL, "a parked task that was altered, or parked in another's place", by=Adversary.BROKER
)
async def test_an_altered_task(scene: Scene) -> None:
    place = park_subject(scene.agent, "work")
    flipped = bytearray(scene.frame)
    flipped[-2] ^= 1
    scene.put(place, bytes(flipped))
    scene.put(park_subject(scene.agent, "other"), scene.frame)
    scene.put(place, b"nothing")
    assert all(one["attempts"] == 0 for one in await scene.letters(3))
    await scene.runs_once_when_it_is_due()


@refused_by(Layer.CONTROL, "a parked task's copy, at once and later", by=Adversary.CALLER)
async def test_a_copy(scene: Scene) -> None:
    """At once it is the same task; later nothing is recorded of it, and so nothing of its original."""
    frame = scene.frame
    scene.put(park_subject(scene.agent, "work"), frame)
    await scene.bus.clock.advance(40)
    scene.put(park_subject(scene.agent, "work"), frame)
    (letter,) = await scene.letters(1)
    assert "after it was signed" in letter["reason"]
    await scene.runs_once_when_it_is_due()


@refused_by(Layer.CONTROL, "a task that was queued at once, parked as well", by=Adversary.CALLER)
async def test_a_task_that_is_not_for_parking(scene: Scene) -> None:
    heard: list[bytes] = []
    route = scene.bus.broker.route
    scene.bus.broker.route = lambda subject, data, *a, **k: (
        heard.append(data),
        route(subject, data, *a, **k),
    )[1]
    at_once = await scene.cli.submit(str(scene.agent), "work", {"name": "now"})
    await at_once.result(10)
    assert RAN == ["now"]
    RAN.clear()
    frame = next(one for one in heard if b"now" in one and b"aw.task" in one)
    scene.put(park_subject(scene.agent, "work"), frame)
    await scene.letters(1)
    await scene.runs_once_when_it_is_due()


@refused_by(
    Layer.WORKER, "a reissue by another than the control role of the agent's domain", by=Adversary.BROKER
)
@pytest.mark.parametrize("who", ["client/mallory", "client/cli", "agent/parked", "agentweave/broker"])
@pytest.mark.parametrize("name", [None, "agentweave/control"])
async def test_a_reissue_by_another(scene: Scene, who: str, name: str | None) -> None:
    scene.put(task_subject(scene.agent, "work"), reissued(scene, who, name=name))
    await scene.letters(1)
    await scene.runs_once_when_it_is_due()


@refused_by(
    Layer.WORKER, "another task than the parked one, by who has the control role's key", by=Adversary.THIEF
)
@pytest.mark.parametrize("changed", [{"id": OTHER_ID}, {"ct": "text/plain"}, {"scope": ("spiffe://x/y#z",)}])
async def test_what_the_control_role_can_not_change(scene: Scene, changed: dict[str, Any]) -> None:
    scene.put(task_subject(scene.agent, "work"), reissued(scene, "agentweave/control", **changed))
    async with asyncio.timeout(20):
        while scene.queued():  # noqa: ASYNC110 - the broker tells nobody
            await asyncio.sleep(0.01)
    assert RAN == []


@refused_by(Layer.WORKER, "a reissue, or a task, that is queued before it is due", by=Adversary.BROKER)
async def test_the_parked_task_itself_in_the_queue(scene: Scene) -> None:
    scene.put(task_subject(scene.agent, "work"), scene.frame)
    await scene.letters(1)
    await scene.runs_once_when_it_is_due()


@refused_by(Layer.WORKER, "a genuine reissue, queued again and again", by=Adversary.BROKER)
async def test_a_replayed_reissue(scene: Scene) -> None:
    control = control_role(scene.bus.trust_domain)
    frames = [reissued(scene, str(control)) for _ in range(3)]
    for frame in frames:
        scene.put(task_subject(scene.agent, "work"), frame)
        scene.put(task_subject(scene.agent, "work"), frame)
    assert (await scene.handle.result(10)).data == "a"
    await scene.bus.clock.advance(2 * DELAY)
    assert RAN == ["a"]
    assert scene.queued() == []


@refused_by(Layer.CONTROL, "a wake-up that the broker's owner forges", by=Adversary.BROKER)
async def test_a_forged_wakeup(scene: Scene) -> None:
    place = parked_stream_name(scene.agent).removeprefix("parked-")
    for number in (1, 2, 99):
        for body in (b"", json.dumps({"seq": 1}).encode()):
            scene.put(wakeup_subject(scene.bus.trust_domain, "due", place, number), body)
    await scene.runs_once_when_it_is_due()


@refused_by(
    Layer.CONTROL, "filling the broker's disk with dead letters of what is parked", by=Adversary.CALLER
)
async def test_parked_bytes_at_random(scene: Scene) -> None:
    """Some are written down, by the same limit as of what is queued; the others are let go."""
    for number in range(_UNVERIFIED_BURST + 20):
        scene.put(park_subject(scene.agent, "work"), b"no frame %d" % number)
    await scene.parked(1)
    assert len(await scene.letters(_UNVERIFIED_BURST)) == _UNVERIFIED_BURST
    await scene.runs_once_when_it_is_due()


@refused_by(Layer.CONTROL, "a flood of recurring tasks, to make those of others late", by=Adversary.CALLER)
async def test_a_flood_of_recurring_tasks(scene: Scene) -> None:
    """The next one is rejected with the reason; a task parked again harms nothing; others go on."""
    mallory, agent = await scene.bus.client("client/mallory"), str(scene.agent)
    keyed = {"every": "5m", "deadline": 86_400, "idempotency_key": "same"}
    first = await mallory.submit(agent, "work", {"name": "m"}, **keyed)
    for _ in range(MOST_RECURRING - 1):
        await mallory.submit(agent, "work", {"name": "m"}, every="1h")
    excess = await mallory.submit(agent, "work", {"name": "m"}, every="1h")
    with pytest.raises(AgentWeaveError, match="too many of yours are parked"):
        await excess.result(10)
    await scene.bus.clock.advance(40)  # the same task is due later now, and lives longer
    await mallory.submit(agent, "work", {"name": "m"}, **keyed)
    await scene.parked(MOST_RECURRING + 1)
    assert (await first.status()).state.value == "submitted"
    honest = await scene.cli.submit(agent, "work", {"name": "b"}, every="1h")
    await scene.parked(MOST_RECURRING + 2)
    await scene.runs_once_when_it_is_due()
    assert (await honest.status()).state.value == "submitted"
    await first.cancel()
    await scene.bus.clock.advance(120)
    await scene.parked(MOST_RECURRING)
    room = await mallory.submit(agent, "work", {"name": "m"}, every="1h")
    assert (await room.status()).state.value == "submitted"
    await scene.bus.clock.advance(1)
    await scene.parked(MOST_RECURRING + 1)
