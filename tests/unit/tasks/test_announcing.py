"""What a worker announces, and how often it does."""

from __future__ import annotations

from decimal import Decimal

import pytest

from agentweave_bus.bus.streams import MAX_CONSUMERS
from agentweave_bus.bus.subjects import announce_subject
from agentweave_bus.envelope import EnvelopeVerifier, Kind, Sealer, control_role, decode_payload
from agentweave_bus.exceptions import BusError, ConfigurationError, PayloadError
from agentweave_bus.identity import ChainVerifier, IdentitySource
from agentweave_bus.tasks import announcing
from agentweave_bus.tasks.announcing import Announcer, TaskAnnouncement
from agentweave_bus.testing import MockIdentityProvider

pytestmark = pytest.mark.anyio

NOW_MS = 1_800_000_000_000
CONTROL = control_role("test.local")


def test_what_is_announced_is_read_again():
    data = TaskAnnouncement(("ship", "pay", "pay")).encoded()
    assert TaskAnnouncement.read(decode_payload(data)) == (("pay", "ship"), None)


@pytest.mark.parametrize(("seconds", "said"), [(1.0, 1), (30.0, 30), (2.5, 2.5), (3600, 3600)])
def test_how_long_the_broker_is_to_wait_is_announced_in_one_form_only(seconds, said):
    payload = decode_payload(TaskAnnouncement(("pay",), seconds).encoded())
    assert (payload["ack_wait"], type(payload["ack_wait"])) == (said, type(said))
    assert TaskAnnouncement.read(payload).ack_wait_s == seconds


@pytest.mark.parametrize("seconds", [0.5, 0, -1, 3601, float("nan"), float("inf")])
def test_a_time_out_of_bounds_is_not_announced(seconds):
    with pytest.raises(ConfigurationError, match="1 to 3600 seconds"):
        TaskAnnouncement(("pay",), seconds).encoded()


@pytest.mark.parametrize("names", [[], ["a.b"], ["*"], [f"c{n}" for n in range(MAX_CONSUMERS + 1)]])
def test_what_can_not_be_announced(names):
    with pytest.raises(ConfigurationError):
        TaskAnnouncement(tuple(names)).encoded()


@pytest.mark.parametrize(
    "payload",
    [
        None, [], "pay", {}, {"capabilities": "pay"}, {"capabilities": []}, {"capabilities": [1]},
        {"capabilities": ["pay"], "more": 1}, {"capabilities": ["*"]}, {"capabilities": [">"]},
        {"capabilities": ["pay", "pay"]}, {"capabilities": ["ship", "pay"]},
        {"capabilities": [f"c{n:03}" for n in range(MAX_CONSUMERS + 1)]}, {"ack_wait": 5},
        *({"ack_wait": value, "capabilities": ["pay"]} for value in (
            None, True, "5", 0, -5, 3601, 10**30, 30.0, 0.5, 3600.5, float("nan"), float("inf"), [5], Decimal("2.5")
        )),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_is_no_announcement(payload):
    with pytest.raises(PayloadError):
        TaskAnnouncement.read(payload)


class Session:
    """A connection that keeps what is published on it."""

    def __init__(self, instance="one"):
        self.instance = instance
        self.published = []
        self.lost = False

    async def publish(self, subject, data, reply="", headers=None):
        if self.lost:
            raise BusError("the connection to the broker is lost")
        self.published.append((subject, data))
        assert (reply, headers) == ("", None)


class Clock:
    """A clock in seconds that sleeping moves."""

    def __init__(self, monkeypatch):
        self.now = 1_000.0
        self.slept = []
        monkeypatch.setattr(announcing.anyio, "sleep", self.sleep)

    async def sleep(self, seconds):
        self.slept.append(round(seconds, 6))
        self.now += seconds


@pytest.fixture
async def source():
    source = IdentitySource(MockIdentityProvider("spiffe://test.local/agent/a"), allowed_trust_domains=())
    await source.start(5)
    yield source
    await source.aclose()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def announcer(source, clock):
    return Announcer(
        source.spiffe_id,
        CONTROL,
        ["ship", "pay"],
        sealer=Sealer(lambda: source.svid),
        clock_ms=lambda: int(source.svid.expiry.timestamp() * 1000) - 60_000,
        monotonic=lambda: clock.now,
    )


async def test_an_announcement_is_a_signed_control_for_the_control_role(announcer, source):
    session = Session()
    await announcer.announce(session)
    [(subject, frame)] = session.published
    assert subject == announce_subject(source.spiffe_id)
    at_ms = int(source.svid.expiry.timestamp() * 1000) - 60_000
    opened = EnvelopeVerifier(ChainVerifier(source)).open(frame, now_ms=at_ms)
    head = opened.head
    assert (head.kind, head.cap, head.aud, head.sub) == (Kind.CONTROL, "announce", CONTROL, subject)
    assert (head.iss, head.iat, head.exp) == (source.spiffe_id, at_ms, at_ms + 30_000)
    assert decode_payload(opened.payload) == {"capabilities": ["pay", "ship"]}


async def test_it_is_said_at_once_and_then_ever_more_seldom(announcer, clock):
    session, began, at = Session(), clock.now, []
    for _ in range(14):
        before = len(session.published)
        await announcer.announce(session)
        if len(session.published) > before:
            at.append(round(clock.now - began, 6))
    assert at == [0.0, 0.1, 0.3, 0.7, 1.5, 3.1, 5.1]
    assert max(clock.slept) == 2.0


async def test_who_asks_together_announces_once(announcer, clock):
    session = Session()
    await announcer.announce(session)
    began = clock.now
    clock.now += 0.04
    await announcer.announce(session)
    assert len(session.published) == 1
    assert clock.now == pytest.approx(began + 0.1)


@pytest.mark.parametrize("later", ["on another connection", "long after"])
async def test_it_begins_anew(announcer, clock, later):
    session = Session()
    for _ in range(6):
        await announcer.announce(session)
    if later == "long after":
        clock.now += 20
    else:
        session = Session("two")
    clock.slept.clear()
    before = len(session.published)
    await announcer.announce(session)
    assert (len(session.published), clock.slept) == (before + 1, [])
    await announcer.announce(session)
    assert clock.slept == [0.1]


async def test_a_lost_connection_is_told_and_counts_as_tried(announcer, clock):
    session = Session()
    session.lost = True
    with pytest.raises(BusError):
        await announcer.announce(session)
    session.lost = False
    await announcer.announce(session)
    assert session.published == []
    assert clock.slept == [0.1]
