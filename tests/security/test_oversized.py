"""Attack: bodies that are large, deep or made of many parts, and small ones that announce such.

What a stranger sends is refused by its size and shape; what a caller sends by the bounds of payloads.
Neither may cost much: the slowest of them is refused within a second or so of the processor, and memory
grows by a small multiple of the largest frame.
"""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import msgpack
import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import DEFAULT_LIMITS
from agentweave_bus.envelope.codec import pack
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE
from tests.security.catalogue import Adversary, refused_by
from tests.security.certificates import Papers, issuer, leaf, named, p256
from tests.security.forging import HONEST, forged_call, forged_head, link_of, reply_of, sealed_by, with_part

pytestmark = pytest.mark.anyio

BOUNDS = DEFAULT_LIMITS
SECONDS = 4.0
"""Of the processor, for one attack from its making to its refusal; all of them take a fraction of it."""
MEMORY = 128 * 1_048_576
"""Bytes in all that may be held at once while one frame of at most 1 MiB is refused."""
ROOM = BOUNDS.max_payload_bytes
FOUR_BILLION = b"\xff\xff\xff\xff"


@pytest.fixture(autouse=True)
def bounded_time(request):
    """Whatever a test here sends costs little time; where memory is traced, that takes most of it."""
    began = time.process_time()
    yield
    traced = "bounded_memory" in request.fixturenames
    assert time.process_time() - began < (3 * SECONDS if traced else SECONDS)


@pytest.fixture
def bounded_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def frame_of(what, make, *, by=Adversary.BROKER, step=Step.FRAME):
    return pytest.param(make, id=what, marks=refused_by(step, what, by=by))


def part(name, change):
    return lambda frame: with_part(frame, name, change)


@pytest.mark.parametrize(
    "make",
    [
        frame_of("a payload beyond its bound", part("payload", lambda _: bytes(ROOM + 1))),
        frame_of("a head beyond its bound", part("head", lambda _: bytes(BOUNDS.max_head_bytes + 1))),
        frame_of("nine certificates", part("chain", lambda chain: chain * 9)),
        frame_of("certificates beyond their bound", part("chain", lambda _: [bytes(20_000), bytes(20_000)])),
        frame_of("no certificate", part("chain", lambda _: [])),
        frame_of("nine links", part("via", lambda _: [[b"head", [b"s", 1, 0, []], [b"c"]]] * 9)),
        frame_of("a proof of many hashes", part("proof", lambda one: [*one[:3], [bytes(32)] * 9])),
        frame_of("a frame of many parts", lambda _: msgpack.packb([0] * 700_000)),
        frame_of("a frame nested a hundred thousand deep", lambda _: b"\x91" * 100_000 + b"\xc0"),
        frame_of("a frame nested a thousand deep", lambda _: b"\x91" * 1_000 + b"\xc0"),
        frame_of("maps nested in a frame", lambda _: b"\x81\xa1a" * 300_000 + b"\xc0"),
        frame_of("a list that announces four billion parts", lambda _: b"\xdd" + FOUR_BILLION),
        frame_of("a map that announces four billion parts", lambda _: b"\xdf" + FOUR_BILLION),
        frame_of("a text that announces four gigabytes", lambda _: b"\xdb" + FOUR_BILLION + b"x"),
        frame_of("bytes that announce four gigabytes", lambda _: b"\x96\x01\xc6" + FOUR_BILLION + b"x"),
        frame_of("an extension that announces four gigabytes", lambda _: b"\xc9" + FOUR_BILLION + b"\x01x"),
        frame_of("eight certificates of garbage", part("chain", lambda _: [bytes(4_000)] * 8), step=Step.CHAIN),
        frame_of("a frame of the largest size and one byte", lambda _: bytes(BOUNDS.max_frame_bytes + 1), step=Step.SIZE),
        frame_of("as much as the broker carries", lambda _: bytes(1_048_576), step=Step.SIZE),
    ],
)  # fmt: skip
async def test_a_frame(attack, make):
    await attack.send(make(attack.message.data))
    await attack.refused()


@refused_by(Step.CHAIN, "a certificate beyond its bound", by=Adversary.BROKER)
async def test_a_certificate(attack):
    """It is not even parsed, whatever stands in it."""
    await attack.send(with_part(attack.message.data, "chain", lambda chain: [chain[0] + bytes(16_000)]))
    await attack.refused(reason="at most 16384 are read")


def head_of(what, raw):
    return pytest.param(raw, id=what, marks=refused_by(Step.HEAD, what, by=Adversary.CALLER))


@pytest.mark.parametrize(
    "raw",
    [
        head_of("a head with an unknown key of thirty kilobytes", {"x" * 30_000: 1}),
        head_of("a head with a value of thirty kilobytes", {"ctx": "x" * 30_000}),
        head_of("a head with many keys", {f"k{number}": 1 for number in range(2_000)}),
        head_of("a head with a scope of many entries", {"scope": [f"{ECHO}#c{number}" for number in range(400)]}),
        head_of("a head with a principal of many words", {"prn": {"iss": "i", "sub": "s"} | {f"k{n}": "v" for n in range(60)}}),
        head_of("a head with a capability's name of kilobytes", {"cap": "a" * 20_000}),
        head_of("a head with an identity of kilobytes", {"aud": "spiffe://demo.test/" + "a/" * 10_000 + "a"}),
        head_of("a head with a number beyond all clocks", {"iat": 2**63, "exp": 2**63 + 1}),
        head_of("a head that lives for a year", {"exp": 2**53 - 1}),
    ],
)  # fmt: skip
async def test_a_head(attack, raw):
    svid, payload = attack.world.issue(CLI), pack(HONEST)
    head = pack(forged_head(svid, payload, raw=raw))
    assert len(head) <= BOUNDS.max_head_bytes
    await attack.send(sealed_by(svid, head, payload).frame)
    await attack.refused()


@refused_by(Step.HEAD, "a head nested hundreds deep", by=Adversary.CALLER)
async def test_a_nested_head(attack):
    svid, payload = attack.world.issue(CLI), pack(HONEST)
    whole = pack(forged_head(svid, payload, raw={"trace": ""}))
    for nest in (b"\x91" * 400 + b"\xc0", b"\x91" * 10_000 + b"\xc0", b"\x81\xa1a" * 9_000 + b"\xc0"):
        await attack.send(sealed_by(svid, whole[:-1] + nest, payload).frame)
    await attack.refused_all(3)


def longest_delegation(attack, *, last=None):
    """Eight links, between front and middle to and fro; ``last`` replaces the certificates of the last."""
    path = [CLI, *[FRONT, MIDDLE] * 4]
    svids = {one: attack.world.issue(one) for one in (CLI, FRONT, MIDDLE)}
    exp, links = clock_ms() + 20_000, ()
    for number, (iss, aud) in enumerate(pairwise(path)):
        svid = last if last is not None and number == len(path) - 2 else svids[iss]
        links = (*links, link_of(svid, iss, aud, via=links, exp=exp))
    say = {"cap": "say", "sub": call_subject(ECHO, "say"), "payload": pack({"text": "x"})}
    return forged_call(svids[MIDDLE], iss=MIDDLE, via=links, exp=exp, **say)


async def test_the_longest_delegation_is_admitted(attack):
    """Honest, and as long as it may be."""
    call = longest_delegation(attack)
    inbox = await attack.mallory.listen(reply_of(call, MIDDLE))
    await attack.send(call.frame, subject=call.head.sub, reply=reply_of(call, MIDDLE))
    await heard_within(inbox)
    await attack.admitted(ran="say")


@refused_by(
    Step.DELEGATION, "a link whose certificates could be joined in countless ways", by=Adversary.AGENT
)
async def test_a_link_with_certificates_that_sign_one_another(attack):
    key, name = p256(), named("loop")
    loop = [issuer(name, key=key) for _ in range(4)]
    made = leaf(loop[0], [FRONT])
    papers = Papers((made.cert_chain[0], *(one for signer in loop for one in signer.sent)), made.private_key)
    call = longest_delegation(attack, last=papers)
    await attack.send(call.frame, subject=call.head.sub, reply=reply_of(call, MIDDLE))
    await attack.refused(reason="rule 5")


def payload_of(what, make, name="relay"):
    mark = refused_by(Step.PAYLOAD, what, by=Adversary.CALLER)
    return pytest.param(name, make, id=what, marks=mark)


def anything(inside):
    """``inside``, bytes of msgpack, where the handler takes any JSON there is: two levels down."""
    given = b"".join(map(pack, ["path", ["x"], "name", "say", "payload"]))
    return b"\x83" + given + b"\x81\xa1x" + inside


MANY = BOUNDS.max_items + 1
FITS = ROOM - 60


@pytest.mark.parametrize(
    ("name", "make"),
    [
        payload_of("a payload nested 33 deep", lambda: anything(b"\x91" * 31 + b"\xc0")),
        payload_of("a payload nested five hundred deep", lambda: anything(b"\x91" * 500 + b"\xc0")),
        payload_of("a payload nested half a million deep", lambda: anything(b"\x91" * 500_000 + b"\xc0")),
        payload_of("maps nested a hundred thousand deep", lambda: anything(b"\x81\xa0" * 100_000 + b"\xc0")),
        payload_of("a payload of too many numbers", lambda: anything(pack([0] * MANY))),
        payload_of("a payload of as many nulls as fit", lambda: anything(pack([None] * FITS))),
        payload_of("a payload of as many lists as fit", lambda: anything(pack([[]] * FITS))),
        payload_of("lists of seven lists of a hundred thousand", lambda: anything(pack([[0] * 100_000] * 7))),
        payload_of("a payload that announces four billion parts", lambda: anything(b"\xdd" + FOUR_BILLION)),
        payload_of("a payload that announces four gigabytes", lambda: anything(b"\xdb" + FOUR_BILLION)),
        payload_of("as many unknown arguments as fit", lambda: pack({f"{n:x}": 0 for n in range(99_000)})),
        payload_of("an unknown argument as long as fits", lambda: pack({"t" * FITS: 0})),
        payload_of("a long list in a text's place", lambda: pack({"text": [0] * 99_000}), "work"),
        payload_of("no arguments but a number", lambda: pack(1)),
        payload_of("nothing", lambda: b""),
    ],
)
async def test_a_payload(attack, name, make):
    await send_payload(attack, name, make())
    await attack.refused()


@refused_by(Step.PAYLOAD, "a payload of as many maps as fit", by=Adversary.CALLER)
async def test_what_takes_the_most_memory(attack, bounded_memory):
    """A byte each, and sixty-four when they are read."""
    await send_payload(attack, "relay", anything(pack([{}] * FITS)))
    await attack.refused(reason="more than 100000 items")


async def send_payload(attack, name, payload):
    sub = call_subject(ECHO, name)
    forged = forged_call(attack.world.issue(CLI), cap=name, sub=sub, payload=payload)
    await attack.send(forged.frame, subject=sub, reply=reply_of(forged))
