"""Attack: somebody else answers at the broker's address. Nothing is said to him, not even who is calling."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from agentweave_bus.bus import connection
from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.exceptions import BusError
from agentweave_bus.identity import Authority, ChainVerifier, IdentitySource
from tests.integration.callee import replaced
from tests.integration.connections import Fixed
from tests.integration.probes import CLI, ECHO, MALLORY
from tests.listening import listening
from tests.security.broker.presenting import present
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.certificates import Signer, leaf

pytestmark = pytest.mark.anyio

INFO = 'INFO {"server_id":"X","server_name":"x","version":"2.14.4","proto":1,"headers":true,"max_payload":1048576}'


class Impostor:
    """Speaks first, as a broker does, and keeps every byte that it is then sent."""

    def __init__(self):
        self.connections = 0
        self.received = b""
        self.url = ""

    async def handle(self, reader, writer):
        self.connections += 1
        try:
            writer.write(f"{INFO}\r\n".encode())
            while data := await reader.read(1000):
                self.received += data
                writer.write(b"PONG\r\n" * data.count(b"PING"))
        except OSError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def impostor(papers, *, highest=ssl.TLSVersion.TLSv1_3):
    """Listen with a certificate chain and its key, and ask nobody for his."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.maximum_version = highest
    present(tls, papers)
    made = Impostor()
    async with listening(made.handle, tls=tls) as port:
        made.url = f"tls://127.0.0.1:{port}"
        yield made


@pytest.fixture
async def caller(session_world):
    """An honest identity, and its way to connect: ``connect(url)`` returns why it failed, or nothing."""
    authority = session_world.stack.api.authority
    source = IdentitySource(Fixed(authority.issue(CLI), authority.bundle))
    await source.start(5)

    async def connect(url, timeout_s=5.0):
        address = BusAddress([url], session_world.stack.broker_id, connect_timeout=timeout_s)
        try:
            with replaced(connection, "_CLOSE_SECONDS", 0.05):
                async with Keeper(source, ChainVerifier(source), address).open(deadline_s=0):
                    return ""
        except BusError as error:
            return str(error)

    yield connect
    await source.aclose()


async def turned_away(caller, papers, **options):
    """The impostor is found out; return why. Not a byte was said to him."""
    async with impostor(papers, **options) as other:
        why = await caller(other.url)
        assert why
        assert other.received == b""
    return why


async def test_the_true_broker_is_spoken_to(session_world, caller):
    """Honest; what the attacks below change makes them fail: the same impostor, with the broker's own SVID."""
    assert await caller(session_world.stack.bus_url) == ""
    async with impostor(session_world.issue(session_world.stack.broker_id)) as other:
        assert await caller(other.url) == ""
        assert other.received.startswith(b"CONNECT")


@refused_by(Layer.HANDSHAKE, "posing as the broker with an agent's valid SVID", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [ECHO, MALLORY, CLI], ids=["echo", "mallory", "the caller itself"])
async def test_an_agent_as_the_broker(session_world, caller, who):
    why = await turned_away(caller, session_world.issue(who))
    assert f"the TLS peer is {who}, not {session_world.stack.broker_id}" in why


@refused_by(
    Layer.HANDSHAKE, "posing as the broker with a certificate of another authority", by=Adversary.DOMAIN
)
@pytest.mark.parametrize("domain", ["demo.test", "partner.test"])
async def test_another_authoritys_broker(session_world, caller, domain):
    broker = session_world.stack.broker_id
    stranger = Authority(domain).issue(broker, lifetime=timedelta(hours=1), allow_foreign=True)
    assert "certificate" in (await turned_away(caller, stranger)).lower()


@refused_by(Layer.HANDSHAKE, "posing as the broker with its expired certificate", by=Adversary.THIEF)
async def test_an_expired_broker(session_world, caller):
    start = datetime.now(UTC) - timedelta(hours=2)
    expired = session_world.issue(
        session_world.stack.broker_id, not_before=start, lifetime=timedelta(hours=1)
    )
    assert "expired" in await turned_away(caller, expired)


@refused_by(Layer.HANDSHAKE, "posing as the broker with a certificate of several names", by=Adversary.DOMAIN)
async def test_several_names(session_world, caller):
    broker = session_world.stack.broker_id
    signer = Signer.of(session_world.stack.api.authority)
    for uris in ([broker, ECHO], [ECHO, broker]):
        assert "the TLS peer is refused" in await turned_away(caller, leaf(signer, uris))


@refused_by(
    Layer.HANDSHAKE, "posing as the broker with a certificate that is an authority's", by=Adversary.DOMAIN
)
async def test_an_authority_as_the_broker(session_world, caller):
    signer = Signer.of(session_world.stack.api.authority)
    papers = leaf(signer, [session_world.stack.broker_id], ca=True)
    assert await turned_away(caller, papers)


@refused_by(Layer.HANDSHAKE, "posing as the broker over an old TLS", by=Adversary.STRANGER)
async def test_an_old_tls(session_world, caller):
    mine = session_world.issue(session_world.stack.broker_id)
    assert await turned_away(caller, mine, highest=ssl.TLSVersion.TLSv1_2)


@refused_by(Layer.HANDSHAKE, "a broker that speaks without TLS", by=Adversary.STRANGER)
async def test_without_tls(caller):
    """An `INFO` in plain text, as a broker without TLS would send it, talks nobody out of TLS."""
    made = Impostor()
    async with listening(made.handle) as port:
        assert await caller(f"tls://127.0.0.1:{port}", 0.3)
        assert made.connections == 1
        assert b"CONNECT" not in made.received
