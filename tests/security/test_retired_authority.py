"""Attack: an authority that has left its bundle, or its stolen key, is to count once more.

The host remembers such an authority, because tasks and records that lie in a stream for days were signed by
what it issued. The key may have been stolen since, and who has it issues himself any certificate, dated as he
likes. The one thing that he can't date is when the broker stored what he signs.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.envelope import EnvelopeVerifier, Kind, check_time_stored, verify_delegation
from agentweave_bus.exceptions import ChainRefusedError, DelegationRefusedError, TimeRefusedError
from agentweave_bus.identity import (
    Authority,
    ChainVerifier,
    IdentitySource,
    PeerRefusedError,
    RetiredAuthorities,
    RevocationList,
    RevokedSet,
    client_context,
    server_context,
)
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import Fixed, until
from tests.integration.probes import CLI, DOMAIN, ECHO, FRONT
from tests.listening import listening
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, link_of, reply_of

pytestmark = pytest.mark.anyio

PARTNER = "partner.test"
BUYER = SpiffeID(f"spiffe://{PARTNER}/agent/buyer")
MINUTE = 60_000
HOUR = 60 * MINUTE
NOBODY = "no authority of that bundle signed it"


@dataclass
class Past:
    """A domain whose authority has left its bundle, as the attacked agent's host remembers it."""

    old: Authority
    """Its key is stolen."""
    left_ms: int
    fingerprint: bytes
    verifier: EnvelopeVerifier
    history: RetiredAuthorities
    revocations: RevocationList

    def mint(self, iss=BUYER, *, at_ms=None):
        """Make a certificate with the stolen key that is valid from a minute before ``at_ms`` on."""
        since = self.left_ms - 10 * MINUTE if at_ms is None else at_ms - MINUTE
        return self.old.issue(
            iss,
            not_before=datetime.fromtimestamp(since / 1000, UTC),
            lifetime=timedelta(hours=20),
            allow_foreign=True,
        )

    def link(self, iat_ms, *, svid=None):
        """Make up a task for front, signed by the stolen key."""
        svid = self.mint() if svid is None else svid
        return link_of(svid, BUYER, FRONT, kind=Kind.TASK, reply=None, iat=iat_ms, exp=clock_ms() + HOUR)

    def read_delegated(self, front, link, stored_at_ms, *, verifier=None):
        """Read from a stream a task that front, an accomplice, signs now because of ``link``."""
        forged = forged_call(front, iss=FRONT, kind=Kind.TASK, reply=None, via=(link,))
        verifier, now_ms = verifier or self.verifier, clock_ms()
        opened = verifier.open_stored(forged.frame, now_ms=now_ms, stored_at_ms=stored_at_ms)
        (seen,) = verify_delegation(opened, verifier, now_ms=now_ms, stored_at_ms=stored_at_ms)
        return seen

    def read(self, iat_ms, stored_at_ms, *, svid=None, iss=BUYER, verifier=None, beside=()):
        """Read from a stream a task that is signed by the stolen key; return whether it counts as expired."""
        svid = self.mint(iss) if svid is None else svid
        forged = forged_call(
            svid,
            chain=(*svid.cert_chain, *beside),
            iss=iss,
            kind=Kind.TASK,
            reply=None,
            iat=iat_ms,
            exp=clock_ms() + 20 * MINUTE,
        )
        now_ms = clock_ms()
        opened = (verifier or self.verifier).open_stored(
            forged.frame, now_ms=now_ms, stored_at_ms=stored_at_ms
        )
        return check_time_stored(opened, now_ms=now_ms, stored_at_ms=stored_at_ms)


@pytest.fixture(scope="module")
def partner():
    return Authority(PARTNER, not_before=datetime.now(UTC) - timedelta(hours=2))


@pytest.fixture(scope="module")
async def callee(session_world, partner):
    session_world.stack.api.federate([partner.bundle])
    yield await session_world.agent(ECHO, identity__allowed_trust_domains=[DOMAIN, PARTNER])
    session_world.stack.api.federate([])


@pytest.fixture(scope="module")
async def past(session_world, partner, callee):
    """The other domain's authority is replaced, and its host is told; the old one's key is stolen."""
    source, verifier = callee.parts.source, callee.parts.verifier
    (fingerprint,) = partner.bundle.authority_fingerprints
    successor = Authority(PARTNER)
    session_world.stack.api.federate([successor.bundle])
    await until(lambda: source.bundle_for(PARTNER) == successor.bundle, "the other domain's new bundle")
    history = verifier._chains._retired
    left = history.left_at(PARTNER, fingerprint, 0, now_ms=clock_ms())
    return Past(partner, left, fingerprint, verifier, history, verifier._chains.revocations)


async def test_what_was_stored_before_it_left_is_read(past):
    """Honest: its domain's agents did nothing wrong, and their tasks still wait."""
    assert past.read(past.left_ms - MINUTE, past.left_ms - MINUTE) is True


@refused_by(Step.CHAIN, "a live call under an authority that left and is remembered", by=Adversary.THIEF)
async def test_a_live_call(attack, past):
    past.read(past.left_ms - MINUTE, past.left_ms - MINUTE)
    for iat in (clock_ms(), past.left_ms - MINUTE):
        svid = past.mint()
        past.read(past.left_ms - MINUTE, past.left_ms - MINUTE, svid=svid)  # and so this chain is remembered
        forged = forged_call(svid, iss=BUYER, iat=iat)
        await attack.send(forged.frame, reply=reply_of(forged, BUYER))
    await attack.refused_all(2, reason=NOBODY)


@refused_by(
    Step.CHAIN, "a task stored after its signer's authority left, dated now or before", by=Adversary.THIEF
)
async def test_stored_after_it_left(past):
    for stored_at in (past.left_ms, past.left_ms + 1, clock_ms() - 1, clock_ms() + MINUTE):
        for iat in (past.left_ms - 10, stored_at - 10):
            with pytest.raises(ChainRefusedError, match=NOBODY):
                past.read(min(iat, clock_ms()), stored_at)


@refused_by(Step.CHAIN, "a stored task under a certificate that began after it", by=Adversary.THIEF)
async def test_a_certificate_that_began_later(past):
    stored_at = past.left_ms - 5 * MINUTE
    with pytest.raises(ChainRefusedError, match="does not verify"):
        past.read(stored_at, stored_at, svid=past.mint(at_ms=past.left_ms - 2 * MINUTE))


@refused_by(Step.TIME, "a stored task dated half a minute away from its storing", by=Adversary.THIEF)
async def test_dated_away_from_its_storing(past):
    """Its certificate has not run out; what it signs counts as expired all the same."""
    stored_at = past.left_ms - 5 * MINUTE
    for iat in (stored_at - 31_000, stored_at + 31_000, clock_ms()):
        with pytest.raises(TimeRefusedError):
            past.read(iat, stored_at)


@refused_by(
    Step.CHAIN, "our ID on a stored task, by another domain's remembered authority", by=Adversary.DOMAIN
)
async def test_an_id_of_ours(past):
    stored_at = past.left_ms - MINUTE
    with pytest.raises(ChainRefusedError, match=f"against the bundle of {DOMAIN}"):
        past.read(stored_at, stored_at, iss=CLI)


@refused_by(
    Step.CHAIN, "a certificate beside the path to an authority that is remembered", by=Adversary.THIEF
)
async def test_a_certificate_beside_the_path(past):
    stored_at = past.left_ms - MINUTE
    with pytest.raises(ChainRefusedError, match="beside its path"):
        past.read(stored_at, stored_at, beside=Authority(PARTNER).bundle.to_der())


@refused_by(Step.CHAIN, "a stored task under a remembered authority that was revoked", by=Adversary.THIEF)
async def test_revoked(past):
    """Also one that had verified, and also when somebody takes the revocation out again."""
    stored_at, svid = past.left_ms - MINUTE, past.mint()
    own = RetiredAuthorities(past.history._folder.path.parent, ECHO, revocations=past.revocations)
    await own.load([PARTNER], now_ms=clock_ms())
    verifier = EnvelopeVerifier(
        ChainVerifier(past.verifier._chains._trust, revocations=past.revocations, retired=own)
    )
    assert past.read(stored_at, stored_at, svid=svid, verifier=verifier)
    try:
        past.revocations.replace(RevokedSet(authorities=frozenset({past.fingerprint})))
        for one in (svid, past.mint()):
            with pytest.raises(ChainRefusedError):
                past.read(stored_at, stored_at, svid=one, verifier=verifier)
        own.drop_revoked()
    finally:
        past.revocations.replace(RevokedSet())
    with pytest.raises(ChainRefusedError, match=NOBODY):
        past.read(stored_at, stored_at, svid=svid, verifier=verifier)


@pytest.mark.parametrize("mode", [0o640, 0o606, 0o620])
@refused_by(
    Step.CHAIN, "an authority of one's own, put into a history that others may edit", by=Adversary.INTRUDER
)
async def test_a_history_that_others_may_edit(past, tmp_path, mode):
    await planted(past, tmp_path, lambda folder: next(folder.glob("*.json")).chmod(mode))


@refused_by(Step.CHAIN, "an authority of one's own, in a folder that others may write", by=Adversary.INTRUDER)
async def test_a_folder_that_others_may_write(past, tmp_path):
    await planted(past, tmp_path, lambda folder: folder.chmod(0o777))


async def planted(past, tmp_path, spoil):
    """Write a history with an authority that was never trusted; only as its user's own is it believed."""
    false = Authority(PARTNER, not_before=datetime.now(UTC) - timedelta(hours=2))
    stored_at = past.left_ms - MINUTE
    svid = Past(false, past.left_ms, b"", past.verifier, past.history, past.revocations).mint()
    writer = RetiredAuthorities(tmp_path, ECHO)
    writer.note({PARTNER: false.bundle}, now_ms=past.left_ms)
    await writer.save(now_ms=past.left_ms)
    for change in (lambda _folder: None, spoil):
        change(writer._folder.path)
        history = RetiredAuthorities(tmp_path, ECHO)
        await history.load([PARTNER], now_ms=clock_ms())
        verifier = EnvelopeVerifier(ChainVerifier(past.verifier._chains._trust, retired=history))
        if change is spoil:
            with pytest.raises(ChainRefusedError, match=NOBODY):
                past.read(stored_at, stored_at, svid=svid, verifier=verifier)
        else:
            assert past.read(stored_at, stored_at, svid=svid, verifier=verifier)


@pytest.fixture(scope="module")
def front(session_world):
    return session_world.issue(FRONT)


async def test_a_link_that_was_there_before_it_left(past, front):
    """Honest: the partner's agent had front hand a task on, which waits since before."""
    seen = past.read_delegated(front, past.link(past.left_ms - 2 * MINUTE), past.left_ms - MINUTE)
    assert (seen.iss, seen.sender_expired) == (BUYER, True)


@refused_by(
    Step.DELEGATION, "a link of the past, made up once its signer's authority had left", by=Adversary.THIEF
)
async def test_a_link_made_up_later(past, front):
    """By the thief together with front, who need nobody else to store a task of theirs."""
    for stored_at in (past.left_ms, past.left_ms + 1, clock_ms()):
        link = past.link(past.left_ms - MINUTE)
        past.read_delegated(front, link, past.left_ms - 1)  # and so its chain is remembered
        with pytest.raises(DelegationRefusedError, match=NOBODY) as caught:
            past.read_delegated(front, link, stored_at)
        assert caught.value.rule == 5


@refused_by(Step.DELEGATION, "a link that is dated after its signer's authority left", by=Adversary.THIEF)
async def test_a_link_dated_later(past, front):
    """Also when the broker says that it was there before."""
    for stored_at in (past.left_ms - MINUTE, past.left_ms - 1):
        with pytest.raises(DelegationRefusedError, match=NOBODY):
            past.read_delegated(front, past.link(past.left_ms), stored_at)


@refused_by(
    Step.DELEGATION,
    "a live call on a link under an authority that left and is remembered",
    by=Adversary.THIEF,
)
async def test_a_link_of_a_live_call(attack, past, front):
    link = past.link(past.left_ms - MINUTE)
    past.read_delegated(front, link, past.left_ms - 1)
    forged = forged_call(front, iss=FRONT, via=(link,))
    await attack.send(forged.frame, reply=reply_of(forged, FRONT))
    await attack.refused(reason=NOBODY)


@refused_by(Step.DELEGATION, "a link under a remembered authority that was revoked", by=Adversary.THIEF)
async def test_a_link_under_a_revoked_one(past, front):
    link, stored_at = past.link(past.left_ms - 2 * MINUTE), past.left_ms - MINUTE
    revocations = RevocationList()
    chains = ChainVerifier(past.verifier._chains._trust, revocations=revocations, retired=past.history)
    verifier = EnvelopeVerifier(chains)
    assert past.read_delegated(front, link, stored_at, verifier=verifier)
    revocations.replace(RevokedSet(authorities=frozenset({past.fingerprint})))
    with pytest.raises(DelegationRefusedError, match=NOBODY):
        past.read_delegated(front, link, stored_at, verifier=verifier)


async def test_a_broker_that_dates_a_link_back(past, front):
    """Not protected: with the stolen key of an authority that left, an agent as accomplice, and the broker, which
    dates back, a link says that somebody asked who did not; the policy is told that he has expired.
    """
    seen = past.read_delegated(front, past.link(past.left_ms - 2 * MINUTE), past.left_ms - MINUTE)
    assert seen.sender_expired


@refused_by(
    Layer.HANDSHAKE, "a connection under an authority that left and is remembered", by=Adversary.THIEF
)
@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_connection(past, side):
    """As a server and as a client, to somebody who knows the authority from the past of its own domain."""
    stolen, mine = past.mint(), Authority(PARTNER)
    me = SpiffeID(f"spiffe://{PARTNER}/agent/me")
    honest = IdentitySource(Fixed(mine.issue(me), mine.bundle))
    # The thief takes whatever the other side shows.
    thief = IdentitySource(Fixed(stolen, mine.bundle))
    await honest.start(5)
    await thief.start(5)
    chains = ChainVerifier(honest, retired=past.history)
    chains.verify_retired(stolen.cert_chain, now_ms=clock_ms(), stored_at_ms=past.left_ms - MINUTE)
    admitted = []

    async def serve(_reader, writer):
        admitted.append(writer)
        writer.write(b"pong")
        writer.close()

    if side == "client":
        server, client = server_context(honest, BUYER, verifier=chains), client_context(thief, me)
    else:
        server, client = server_context(thief, me), client_context(honest, BUYER, verifier=chains)
    async with listening(serve, tls=server) as port:
        with pytest.raises((PeerRefusedError, ssl.SSLError, ConnectionError)):
            await ask(port, client)
    assert admitted == []


async def ask(port, context):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        if not await asyncio.wait_for(reader.read(10), 30):
            raise ConnectionResetError
    finally:
        writer.close()


async def test_a_broker_that_dates_back(past):
    """Not protected: with the stolen key of an authority that left, and the broker, which says that it stored a
    task before that, somebody counts as who he says; revoke the authority.
    """
    stored_at = past.left_ms - MINUTE
    assert past.read(stored_at, stored_at, svid=past.mint()) is True
