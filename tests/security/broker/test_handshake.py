"""Attack: connecting to the broker without an identity, or with one that is not good enough."""

from __future__ import annotations

import asyncio
import json
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from agentweave_bus.bus.subjects import call_subject, reply_inbox
from agentweave_bus.identity import Authority
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.probes import CLI, ECHO, MALLORY, OTHER, PATIENCE
from tests.security.broker.presenting import present
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.certificates import Signer, leaf

pytestmark = pytest.mark.anyio

NOBODY = SpiffeID("spiffe://demo.test/agent/nobody")


def context(papers=None, *, highest=ssl.TLSVersion.TLSv1_3):
    """A client that checks nobody and shows what it was given."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.maximum_version = highest
    if papers is not None:
        present(made, papers)
    return made


async def greeted(world, tls, options=None, *after):
    """Connect, introduce oneself and say ``after``; return all lines that the broker says. ``tls`` may be None."""
    port = world.stack.nats.port
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        try:
            connect = json.dumps(
                {"verbose": False, "pedantic": False, "lang": "x", "version": "1"} | (options or {})
            )
            said = "".join(f"{one}\r\n" for one in (f"CONNECT {connect}", "PING", *after, "PING"))
            writer.write(said.encode())
            lines = []
            while len([one for one in lines if one == "PONG"]) < 2:
                line = (await reader.readline()).decode().strip()
                if not line:
                    break
                lines.append(line)
            return lines
        finally:
            writer.transport.abort()


async def refused(world, tls, options=None):
    """The broker lets nobody in so: neither pong nor, without an identity, its greeting."""
    try:
        lines = await greeted(world, tls, options)
    except (ssl.SSLError, ConnectionError) as error:
        return str(error)
    assert "PONG" not in lines, lines
    return " ".join(lines)


@pytest.fixture
def admitted(world):
    """The same client with an honest identity is let in; what an attack changes is what makes it fail."""

    async def check():
        lines = await greeted(world, context(world.issue(CLI)))
        assert lines[0].startswith("INFO")
        assert lines.count("PONG") == 2
        assert not [one for one in lines if one.startswith("-ERR")]

    return check


@refused_by(Layer.HANDSHAKE, "connecting without a certificate", by=Adversary.STRANGER)
async def test_without_a_certificate(world, admitted):
    await admitted()
    assert "INFO" not in await refused(world, context())


@refused_by(Layer.HANDSHAKE, "connecting without TLS", by=Adversary.STRANGER)
async def test_without_tls(world, admitted):
    """Not even the greeting, which names the server and its version, goes over plain TCP."""
    await admitted()
    assert "INFO" not in await refused(world, None)


@refused_by(Layer.HANDSHAKE, "connecting with TLS 1.2", by=Adversary.STRANGER)
async def test_an_old_tls(world, admitted):
    await admitted()
    said = await refused(world, context(world.issue(CLI), highest=ssl.TLSVersion.TLSv1_2))
    assert "protocol" in said.lower()


@refused_by(Layer.HANDSHAKE, "connecting with our ID from another authority", by=Adversary.DOMAIN)
@pytest.mark.parametrize("domain", ["demo.test", "partner.test"])
async def test_another_authority(world, admitted, domain):
    await admitted()
    stranger = Authority(domain).issue(CLI, lifetime=timedelta(hours=1), allow_foreign=True)
    assert "INFO" not in await refused(world, context(stranger))


@refused_by(Layer.HANDSHAKE, "connecting with a certificate that one signed oneself", by=Adversary.STRANGER)
async def test_signed_by_itself(world, admitted):
    await admitted()
    mine = world.issue(OTHER)
    chain = leaf(Signer(Signer.of(world.stack.api.authority).name, mine.private_key), [CLI])
    assert "INFO" not in await refused(world, context(chain))


@refused_by(Layer.HANDSHAKE, "connecting with an expired certificate", by=Adversary.THIEF)
async def test_an_expired_certificate(world, admitted):
    await admitted()
    start = datetime.now(UTC) - timedelta(hours=2)
    expired = world.issue(CLI, not_before=start, lifetime=timedelta(hours=1))
    assert "expired" in await refused(world, context(expired))


@refused_by(Layer.HANDSHAKE, "connecting with a certificate that is not valid yet", by=Adversary.THIEF)
async def test_a_certificate_of_tomorrow(world, admitted):
    await admitted()
    start = datetime.now(UTC) + timedelta(hours=1)
    assert "INFO" not in await refused(world, context(world.issue(CLI, not_before=start)))


@refused_by(
    Layer.PERMISSIONS, "connecting with a valid identity that the broker was not told of", by=Adversary.AGENT
)
async def test_an_identity_without_a_user(world, admitted):
    """There is no ``no_auth_user``: who is unknown is nobody's guest."""
    await admitted()
    assert "no_auth_user" not in world.stack.nats.config_path.read_text()
    assert "Authorization Violation" in await refused(world, context(world.issue(NOBODY)))


@refused_by(Layer.PERMISSIONS, "naming another user than one's certificate does", by=Adversary.AGENT)
@pytest.mark.parametrize(
    "options",
    [
        {"user": str(MALLORY), "pass": ""},
        {"user": str(MALLORY)},
        {"auth_token": str(MALLORY)},
        {"name": str(MALLORY)},
        {"user": "", "pass": "", "nkey": "UA", "sig": "x"},
    ],
    ids=["user and password", "user", "token", "name", "nkey"],
)
async def test_another_name_than_the_certificates(world, admitted, options):
    """The certificate alone says who it is: the rights are still those of its owner."""
    await admitted()
    tls = context(world.issue(OTHER))
    subject = call_subject(ECHO, "work")
    lines = await greeted(world, tls, options, f"SUB {subject} 1", f"PUB {subject} 0\r\n")
    assert any("Permissions Violation for Subscription" in one for one in lines), lines
    assert any("Permissions Violation for Publish" in one for one in lines), lines
    assert "Authorization Violation" in await refused(world, context(world.issue(NOBODY)), options)


@refused_by(Layer.PERMISSIONS, "asking for the broker's system account", by=Adversary.AGENT)
async def test_another_account(world, admitted):
    await admitted()
    said = await refused(world, context(world.issue(CLI)), {"account": "$SYS"})
    assert "Authorization Violation" in said


@refused_by(Layer.HANDSHAKE, "connecting with a certificate that is for servers only", by=Adversary.THIEF)
async def test_a_certificate_for_servers(world, admitted):
    await admitted()
    server = leaf(Signer.of(world.stack.api.authority), [CLI], extended=[ExtendedKeyUsageOID.SERVER_AUTH])
    assert "INFO" not in await refused(world, context(server))


@refused_by(Layer.PERMISSIONS, "connecting with a certificate that names nobody", by=Adversary.THIEF)
@pytest.mark.parametrize("uris", [[], ["https://demo.test/client/cli"], ["spiffe://demo.test"]], ids=str)
async def test_a_certificate_without_a_known_name(world, admitted, uris):
    await admitted()
    nameless = leaf(Signer.of(world.stack.api.authority), uris)
    assert "Authorization Violation" in await refused(world, context(nameless))


@pytest.mark.parametrize("uris", [[CLI, MALLORY], [NOBODY, CLI, MALLORY]], ids=["two", "three"])
async def test_a_certificate_with_several_names(world, uris):
    """Not protected: the broker takes such a certificate and goes by the first name that it knows.

    No honest authority signs one, and who owns the authority can have any name anyway. It never gets the
    rights of both, and what is sealed with it every receiver refuses (step 3).
    """
    several = leaf(Signer.of(world.stack.api.authority), uris)
    lines = await greeted(world, context(several), None, f"SUB {reply_inbox(CLI, '*')}.* 1", "SUB > 2")
    assert [one for one in lines if one.startswith("-ERR")] == [
        "-ERR 'Permissions Violation for Subscription to \">\"'"
    ]
