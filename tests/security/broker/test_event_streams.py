"""Attack: what agents could do to the events of others, and to the stream and consumers that carry them.

CLI publishes and echo hears of orders, as the grants say. FRONT and OTHER have nothing to do with it.
"""

from __future__ import annotations

import json

import anyio
import pytest

from agentweave_bus.bus.streams import event_consumer_name, events_stream_name
from agentweave_bus.bus.subjects import announce_subject, api_inbox, event_subject
from agentweave_bus.envelope import Draft, Kind, control_role, new_id
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.tasks.event_announcing import ANNOUNCE_EVENTS, EventAnnouncement, Subscription
from tests.integration.announcing import announce, asked, served
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, DOMAIN, ECHO, FRONT, OTHER, PATIENCE
from tests.security.broker.test_stream_headers import UNWANTED
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

TOKEN = "D" * 22
STREAM = events_stream_name(CLI)
CONSUMER = event_consumer_name(ECHO, ordered=False)
CREATED = event_subject(CLI, "order.created")
ORDERS = "aw.event.demo=test.client/cli.order.>"


class Stage:
    """Connections past all of this package, and what they hear of JetStream."""

    def __init__(self, raws, answers, mallory):
        self.raws = raws
        self.answers = answers
        self.mallory = mallory

    async def announce(self, who, announcement, *, name=None, sealer=None):
        """Announce in the place of ``name``, signed by whoever ``sealer`` is."""
        subject, now = announce_subject(name or who), clock_ms()
        draft = Draft(
            kind=Kind.CONTROL,
            id=new_id(now),
            aud=control_role(DOMAIN),
            cap=ANNOUNCE_EVENTS,
            sub=subject,
            iat=now,
            exp=now + 30_000,
        )
        sealed = (sealer or self.raws[who].sealer).seal_now(draft, announcement.encoded())
        await (self.mallory if name else self.raws[who]).send(subject, sealed.frame)

    async def consumers(self):
        """The consumers of CLI's events, with what each is for."""
        listed = await asked(self.mallory, f"$JS.API.CONSUMER.LIST.{STREAM}")
        return {one["name"]: one["config"].get("filter_subjects") for one in listed.get("consumers") or []}

    async def state(self):
        state = (await asked(self.mallory, f"$JS.API.STREAM.INFO.{STREAM}"))["state"]
        return {name: state.get(name) for name in ("messages", "bytes", "first_seq", "last_seq")}


@pytest.fixture(scope="module")
async def stage(session_world):
    raws, answers = {}, {}
    for one in (ECHO, CLI, FRONT, OTHER):
        raws[one] = await session_world.raw(one)
        answers[one] = await raws[one].listen(f"{api_inbox(one, TOKEN)}.*")
    stage = Stage(raws, answers, await session_world.raw())
    await stage.announce(ECHO, EventAnnouncement(subscriptions=(Subscription(CLI, ("order.*",)),)))
    with anyio.fail_after(PATIENCE):
        while (await stage.consumers()).get(CONSUMER) != [ORDERS]:  # noqa: ASYNC110 - no event
            await anyio.sleep(0.01)
    await raws[CLI].send(CREATED, b"an event")
    yield stage
    await asked(stage.mallory, f"$JS.API.STREAM.DELETE.{STREAM}")  # what stands there is no envelope
    await session_world.clear()


@refused_by(Layer.STREAM, "a JetStream header that works on a stream of events", by=Adversary.AGENT)
@pytest.mark.parametrize("name", list(UNWANTED))
async def test_headers(stage, name):
    """By the publisher itself: what it published stays for those who have not heard of it yet."""
    raw, heard = stage.raws[CLI], await stage.mallory.listen("aw.dead.x")
    before = await stage.state()
    await raw.send(CREATED, b"x", f"{api_inbox(CLI, TOKEN)}.x", UNWANTED[name])
    answer = json.loads((await heard_within(stage.answers[CLI])).data)
    assert answer["error"]["err_code"] > 0
    assert await stage.state() == before
    assert heard.empty()


@refused_by(Layer.PERMISSIONS, "publishing events on the subjects of another publisher", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [ECHO, FRONT, OTHER], ids=["subscriber", "front", "other"])
async def test_in_anothers_place(stage, who):
    raw = stage.raws[who]
    assert CREATED in await raw.denied(raw.send(CREATED, b"forged"))


@refused_by(Layer.PERMISSIONS, "publishing an event that nobody may receive", by=Adversary.AGENT)
async def test_ungranted(stage):
    raw, subject = stage.raws[CLI], event_subject(CLI, "invoice.paid")
    assert subject in await raw.denied(raw.send(subject, b"an invoice"))


@refused_by(Layer.PERMISSIONS, "listening to events without a grant", by=Adversary.AGENT)
@pytest.mark.parametrize("subject", [CREATED, ORDERS, "aw.event.>", "aw.event.*.*.order.created"])
async def test_listening(stage, subject):
    raw = stage.raws[OTHER]
    assert "ubscription" in await raw.denied(raw.listen(subject))


@refused_by(
    Layer.PERMISSIONS, "listening to more of a publisher's events than was granted", by=Adversary.CALLER
)
@pytest.mark.parametrize("subject", ["aw.event.demo=test.client/cli.>", event_subject(CLI, "invoice.paid")])
async def test_listening_to_more(stage, subject):
    raw = stage.raws[ECHO]
    assert "ubscription" in await raw.denied(raw.listen(subject))


@refused_by(
    Layer.PERMISSIONS,
    "pulling, asking after or acknowledging another subscriber's events",
    by=Adversary.AGENT,
)
@pytest.mark.parametrize(
    "subject",
    [
        f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{CONSUMER}",
        f"$JS.API.CONSUMER.INFO.{STREAM}.{CONSUMER}",
        f"$JS.ACK.{STREAM}.{CONSUMER}.1.1.1.1.0",
        f"$JS.API.DIRECT.GET.{STREAM}.{CREATED}",
        f"$JS.API.STREAM.MSG.GET.{STREAM}",
    ],
)
@pytest.mark.parametrize("who", [FRONT, CLI], ids=["another agent", "publisher"])
async def test_anothers_consumer(stage, who, subject):
    raw = stage.raws[who]
    assert subject.lower() in await raw.denied(raw.send(subject, b""))


@refused_by(
    Layer.PERMISSIONS, "making, changing or removing streams and consumers of events", by=Adversary.AGENT
)
@pytest.mark.parametrize(
    "subject",
    [
        f"$JS.API.CONSUMER.CREATE.{STREAM}.{CONSUMER}",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.{CONSUMER}",
        f"$JS.API.CONSUMER.DELETE.{STREAM}.{CONSUMER}",
        f"$JS.API.STREAM.UPDATE.{STREAM}",
        f"$JS.API.STREAM.DELETE.{STREAM}",
        f"$JS.API.STREAM.PURGE.{STREAM}",
        f"$JS.API.STREAM.MSG.DELETE.{STREAM}",
    ],
)
@pytest.mark.parametrize("who", [ECHO, CLI], ids=["subscriber", "publisher"])
async def test_the_api(stage, who, subject):
    raw = stage.raws[who]
    assert subject.lower() in await raw.denied(raw.send(subject, b"{}"))


async def _heard_by_control(stage):
    """Wait until the control role has dealt with all that was announced before: it takes turns with tasks."""
    for turn in range(2):
        capability = f"marker-{turn}-{new_id(clock_ms())}"
        await announce(stage.raws[FRONT], FRONT, capability)
        await served(stage.mallory, FRONT, capability)


@refused_by(Layer.CONTROL, "announcing that one hears of events that were not granted", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [FRONT, OTHER, ECHO], ids=["front", "other", "granted less"])
async def test_wanting_more(stage, who):
    before = await stage.consumers()
    await stage.announce(who, EventAnnouncement(subscriptions=(Subscription(CLI, ("*",), ("invoice.*",)),)))
    await _heard_by_control(stage)
    assert await stage.consumers() == before == {CONSUMER: [ORDERS]}


@refused_by(Layer.CONTROL, "announcing in another agent's place what it hears of", by=Adversary.BROKER)
async def test_in_its_name(stage):
    wanted = EventAnnouncement(subscriptions=(Subscription(CLI, (), ("order.*",)),))
    await stage.announce(ECHO, wanted, name=ECHO, sealer=stage.mallory.sealer)
    await stage.announce(ECHO, wanted, name=ECHO, sealer=stage.raws[OTHER].sealer)
    await _heard_by_control(stage)
    assert await stage.consumers() == {CONSUMER: [ORDERS]}
