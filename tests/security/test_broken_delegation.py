"""Attack: a chain of delegation that is cut, spliced, reordered or carries links that prove nothing.

The chain is the client's request to front, front's to middle, and middle's to echo. Front and middle are
the adversaries, each with its own key, or whoever carries the frame.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import Kind, Link, Proof, decode_frame, encode_payload
from agentweave_bus.envelope.codec import pack
from agentweave_bus.identity import Authority
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.callee import reply_to
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, DOMAIN, ECHO, FRONT, MIDDLE
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, forged_head, link_of, reply_of, sealed_by, with_part

pytestmark = pytest.mark.anyio

SAY = {"cap": "say", "sub": call_subject(ECHO, "say"), "payload": encode_payload({"text": "x"})}


class Chain:
    """Three identities, their keys, and the two honest links before the call to echo."""

    def __init__(self, world):
        self.cli, self.front, self.middle = (world.issue(one) for one in (CLI, FRONT, MIDDLE))
        self.exp = clock_ms() + 20_000
        self.first = link_of(self.cli, CLI, FRONT, exp=self.exp)
        self.second = link_of(self.front, FRONT, MIDDLE, via=(self.first,), exp=self.exp)

    def call(self, via, **changes):
        """Middle's call to echo, with whatever ``via``."""
        return forged_call(self.middle, iss=MIDDLE, via=via, **{"exp": self.exp, **SAY, **changes})


@pytest.fixture
def chain(attack):
    return Chain(attack.world)


async def send(attack, forged, iss=MIDDLE):
    await attack.send(forged.frame, subject=SAY["sub"], reply=reply_of(forged, iss))


async def test_the_whole_chain_is_admitted(attack, chain):
    """Honest; what the attacks below change is what makes them fail."""
    whole = chain.call((chain.first, chain.second))
    inbox = await attack.mallory.listen(reply_of(whole, MIDDLE))
    await send(attack, whole)
    await heard_within(inbox)
    record = await attack.admitted(ran="say")
    assert [link["iss"] for link in record["input"]["context"]["via"]] == [str(CLI), str(FRONT)]


def cut(what, reason, change):
    mark = refused_by(Step.DELEGATION, f"a delegation with {what}", by=Adversary.BROKER)
    return pytest.param(reason, change, id=what, marks=mark)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        cut("all of its links cut off", "rule 2", lambda _: []),
        cut("its origin cut off", "rule 2", lambda via: via[1:]),
        cut("its last link cut off", "rule 2", lambda via: via[:1]),
        cut("its links in another order", "rule 2", lambda via: via[::-1]),
        cut("a link twice", "rule 2", lambda via: [*via, via[1]]),
        cut("its origin twice", "rule 2", lambda via: [via[0], *via]),
        cut("another link's signature", "rule 5", lambda via: [[via[0][0], via[1][1], via[0][2]], via[1]]),
        cut("another link's certificates", "rule 5", lambda via: [[*via[0][:2], via[1][2]], via[1]]),
        cut("garbage behind a link's leaf", "rule 5", lambda via: [[*via[0][:2], [*via[0][2], b"x"]], via[1]]),
        cut("no signature of its origin", "rule 5", lambda via: [[via[0][0], [b"\0", 1, 0, []], via[0][2]], via[1]]),
    ],
)  # fmt: skip
async def test_changed_by_whoever_carries_it(attack, chain, reason, change):
    """The frame's own head and proof stay right: only what follows them is changed."""
    whole = chain.call((chain.first, chain.second))
    frame = with_part(whole.frame, "via", change)
    await attack.send(frame, subject=SAY["sub"], reply=reply_of(whole, MIDDLE))
    await attack.refused(reason=reason)


def spliced(what, reason, make):
    mark = refused_by(Step.DELEGATION, f"a delegation spliced from {what}", by=Adversary.AGENT)
    return pytest.param(reason, make, id=what, marks=mark)


def answer(chain, message):
    """An answer by echo to the client, whose digest is named like a request's."""
    return reply_to(message, chain.cli, iat=clock_ms(), exp=chain.exp).link


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        spliced(
            "a request to another agent",
            f"{MIDDLE} acts on a request to {FRONT}",
            lambda chain, _: (chain.first,),
        ),
        spliced(
            "the answer to a request",
            "a reply is no request",
            lambda chain, message: (answer(chain, message),),
        ),
        spliced(
            "an old request that has expired",
            "acted on a request that had expired",
            lambda chain, _: (
                link_of(chain.front, FRONT, MIDDLE, iat=chain.exp - 60_000, exp=chain.exp - 25_000),
            ),
        ),
        spliced(
            "a request of later",
            "issued before the one on which it follows",
            lambda chain, _: (link_of(chain.front, FRONT, MIDDLE, iat=chain.exp - 10_000, exp=chain.exp),),
        ),
        spliced(
            "a control message",
            "a control is no request",
            lambda chain, _: (link_of(chain.front, FRONT, MIDDLE, kind=Kind.CONTROL, exp=chain.exp),),
        ),
        spliced(
            "a reissue without its task",
            "a reissue without the task",
            lambda chain, _: (link_of(chain.front, FRONT, MIDDLE, kind=Kind.REISSUE, exp=chain.exp),),
        ),
        spliced(
            "a task that its own sender reissued",
            "is not the control role",
            lambda chain, _: reissued(chain, Kind.TASK),
        ),
        spliced(
            "a call that was reissued",
            "a call can't be reissued",
            lambda chain, _: reissued(chain, Kind.CALL),
        ),
        spliced(
            "an event on another agent's subject",
            "on a subject that is not its own",
            lambda chain, _: (event(chain),),
        ),
    ],
)
async def test_spliced_by_an_agent_on_the_way(attack, chain, reason, make):
    """Each link is honestly signed, and the call names its digest: it only is none that leads here."""
    await send(attack, chain.call(make(chain, attack.message)))
    await attack.refused(reason=reason)


def reissued(chain, kind):
    task = link_of(chain.front, FRONT, MIDDLE, kind=kind, exp=chain.exp)
    again = link_of(
        chain.front, FRONT, MIDDLE, kind=Kind.REISSUE, id=task.head.id, via=(task,), exp=chain.exp
    )
    return (task, again)


def event(chain):
    """Said to be of front, on the subject of middle's events: to whoever listens there."""
    raw = {"aud": f"spiffe://{DOMAIN}", "reply": None, "sub": "aw.event.demo=test.agent/middle.relay"}
    return link_of(chain.front, FRONT, MIDDLE, kind=Kind.EVENT, exp=chain.exp, raw=raw)


@refused_by(Step.DELEGATION, "a call that outlives the request it serves", by=Adversary.AGENT)
async def test_a_call_that_outlives_its_request(attack, chain):
    await send(attack, chain.call((chain.first, chain.second), exp=chain.exp + 1))
    await attack.refused(reason="a call has a later end than the request it serves")


@refused_by(Step.DELEGATION, "a link that is signed by an authority of one's own", by=Adversary.AGENT)
async def test_a_link_by_an_authority_of_ones_own(attack, chain):
    forged = link_of(Authority(DOMAIN).issue(FRONT), FRONT, MIDDLE, exp=chain.exp)
    await send(attack, chain.call((forged,)))
    await attack.refused(reason="rule 5")


@refused_by(Step.DELEGATION, "a link in another's name, signed with one's own key", by=Adversary.AGENT)
async def test_a_link_in_anothers_name(attack, chain):
    """Also under the victim's certificates, which everybody has."""
    own = link_of(chain.middle, CLI, MIDDLE, exp=chain.exp)
    dressed = link_of(chain.middle, CLI, MIDDLE, exp=chain.exp, raw={"x5t": chain.cli.x5t})
    dressed = replace(dressed, chain=chain.cli.cert_chain)
    for link in (own, dressed):
        await send(attack, chain.call((link,)))
    await attack.refused_all(2, reason="rule 5")


@refused_by(Step.DELEGATION, "a link that is no head, or none in its one form", by=Adversary.AGENT)
async def test_a_link_that_is_no_head(attack, chain):
    payload = pack({})
    head = pack(forged_head(chain.front, payload, iss=FRONT, aud=MIDDLE, cap="relay", exp=chain.exp))
    longer = b"\xde\x00" + bytes([head[0] & 0x0F]) + head[1:]
    for data in (longer, b"x", b"\x80", head + b"\xc0"):
        sealed = sealed_by(chain.front, data, payload)
        link = Link(data, sealed.link.proof, sealed.link.chain)
        await send(attack, chain.call((link,)))
    await attack.refused_all(4, reason="rule 1: a link is malformed")


@refused_by(Step.DELEGATION, "a parent that is named and not there", by=Adversary.AGENT)
async def test_a_parent_that_is_not_there(attack, chain):
    await send(attack, chain.call((), raw={"par": bytes(32)}))
    await send(attack, chain.call((chain.first, chain.second), raw={"par": None}))
    await attack.refused_all(2, reason="rule 2")


@refused_by(Step.DELEGATION, "a link under a proof of a tree in which it is not", by=Adversary.AGENT)
async def test_a_link_outside_of_its_tree(attack, chain):
    """The signature is remembered since the whole chain was seen, for that tree alone."""
    whole = chain.call((chain.first, chain.second))
    inbox = await attack.mallory.listen(reply_of(whole, MIDDLE))
    await send(attack, whole)
    await heard_within(inbox)
    await attack.admitted(ran="say")
    attack.echo.ran.remove("say")
    while not attack.reflected.empty():
        attack.reflected.get_nowait()
    other = link_of(chain.front, FRONT, MIDDLE, cap="other", via=(chain.first,), exp=chain.exp)
    borrowed = decode_frame(whole.frame).via[1].proof
    for proof in (borrowed, Proof(borrowed.signature, 2, 0, (bytes(32),))):
        await send(attack, chain.call((chain.first, replace(other, proof=proof))))
    await attack.refused_all(2, reason="rule 5")
