"""Agents whose identities come from a real SPIRE: nothing here was issued by the embedded authority."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from cryptography import x509

from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.exceptions import (
    AuthorizationError,
    ChainRefusedError,
    FederationError,
    IdentityError,
    UnreachableError,
)
from agentweave_bus.identity import (
    Authority,
    ChainVerifier,
    SPIFFEIdentityProvider,
    X509Bundle,
)
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.opa_server import OpaServer
from tests.integration.probes import CLI, DOMAIN, ECHO, OTHER
from tests.integration.processes import worker_process
from tests.integration.spire import BROKER, CONTROL, TTL_S, held_spire_world, missing_programs
from tests.integration.world import metric

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs() or "SPIRE is there"),
]

OPA = SpiffeID(f"spiffe://{DOMAIN}/opa")
UNKNOWN = SpiffeID(f"spiffe://{DOMAIN}/agent/unknown")
GRANTS = {
    "grants": [
        {"caller": [str(CLI), str(OTHER)], "callee": str(ECHO), "capabilities": ["say", "work", "huge"]}
    ]
}


@pytest.fixture(scope="module")
async def spire_held(anyio_backend):
    folder = Path(tempfile.mkdtemp(prefix="awspire-"))
    folder.chmod(0o755)  # noqa: ASYNC240 - the Workload API is for every user; who is registered is what counts
    held = await held_spire_world(folder, (ECHO, CLI, OTHER, OPA), GRANTS)
    yield held
    await held.close()
    shutil.rmtree(folder)


@pytest.fixture
async def spire(spire_held):
    world = spire_held.value
    yield world
    await world.clear()


async def eventually(check, what):
    """Wait for what comes with an SVID's age. SPIRE's clock is the only one there is here."""
    give_up = time.monotonic() + 4 * TTL_S
    while not check():
        assert time.monotonic() < give_up, what
        await asyncio.sleep(0.1)


async def spires_bundle(world):
    pem = (await world.stack.spire.ask("bundle", "show")).encode()
    return X509Bundle(DOMAIN, tuple(x509.load_pem_x509_certificates(pem)))


async def rotations_of(worker):
    """How often a worker process has rotated, by its metrics."""
    url = worker.ready.split()[1]

    def fetch():
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read().decode()

    text = await anyio.to_thread.run_sync(fetch)
    return float(re.search(r"^agentweave_svid_rotation_total (\S+)$", text, re.MULTILINE)[1])


async def test_a_signed_call_between_two_processes_whose_identities_are_spires(spire):
    async with worker_process(spire, ECHO) as worker:
        assert worker.ready.startswith("ready"), worker.log.read_text()
        cli = await spire.client(CLI)
        answer = await cli.ask(ECHO, "say", {"text": "hello"})
        assert answer == {"said": "hello", "pid": worker.process.pid, "caller": str(CLI)}
        assert (await cli.ask(ECHO, "work"))["pid"] == worker.process.pid
        snapshot = cli.parts.source.current
        assert snapshot.bundles[DOMAIN] == await spires_bundle(spire)
        assert snapshot.svid.expiry.timestamp() - snapshot.svid.not_before.timestamp() <= TTL_S + 10
    admitted = spire.audit("echo", event="admission")
    assert [one["caller"] for one in admitted] == [str(CLI)] * 2


async def test_of_the_several_identities_of_one_user_each_process_takes_the_one_it_must_be(spire):
    """SPIRE knows these processes by their uid alone, so it offers all six to each of them."""
    endpoint = spire.stack.spire.endpoint
    for wanted in (ECHO, CLI, OTHER, OPA, BROKER, CONTROL):
        provider = SPIFFEIdentityProvider(endpoint, wanted)
        await provider.start()
        try:
            assert (await provider.get_svid()).spiffe_id == wanted
        finally:
            await provider.aclose()
    provider = SPIFFEIdentityProvider(endpoint, UNKNOWN)
    await provider.start()
    try:
        with pytest.raises(IdentityError, match=f"but this process must be {UNKNOWN}") as refusal:
            await provider.get_svid()
    finally:
        await provider.aclose()
    assert all(str(one) in str(refusal.value) for one in (ECHO, CLI, OTHER, OPA, BROKER, CONTROL))


async def test_a_worker_that_spire_does_not_know_does_not_start_and_says_what_to_do(spire):
    async with worker_process(spire, UNKNOWN) as worker:
        assert await worker.wait() != 0
        said = worker.log.read_text()
    assert f"this process must be {UNKNOWN}" in said
    assert "register the workload" in said
    assert "Traceback" not in said


AS_NOBODY = """
import asyncio, os, sys
from agentweave_bus.identity import IdentitySource, SPIFFEIdentityProvider

async def ask():
    source = IdentitySource(SPIFFEIdentityProvider(sys.argv[1]))
    try:
        await source.start(3)
        print("got", source.spiffe_id)
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
    finally:
        await source.aclose()

asyncio.run(ask())  # as the registered user; after this everything is imported, which others may not read
os.setgid(65534)
os.setuid(65534)
asyncio.run(ask())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_a_user_whom_spire_does_not_know_gets_nothing_and_is_told_why(spire):
    command = [sys.executable, "-c", AS_NOBODY, spire.stack.spire.endpoint]
    said = await anyio.to_thread.run_sync(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    )
    registered, stranger = said.stdout.splitlines()
    assert registered.startswith(f"got spiffe://{DOMAIN}/"), said
    assert stranger.startswith("SvidUnavailableError: no identity within 3 s"), said
    assert "has no identity for this process (uid 65534): register the workload" in stranger


async def test_no_call_is_lost_while_spire_rotates_caller_callee_and_broker(spire):
    metrics = {"enabled": True, "port": 0}
    async with worker_process(spire, ECHO, observability__metrics=metrics) as worker:
        assert worker.ready.startswith("ready"), worker.log.read_text()
        cli = await spire.client(CLI)
        done = 0
        stop = anyio.Event()
        brokers = spire.stack.broker.current.generation

        async def load():
            nonlocal done
            while not stop.is_set():
                assert (await cli.ask(ECHO, "work", {"text": "x"}))["worked"] == "x"
                done += 1

        def turns():
            mine = metric(cli.parts, "agentweave_svid_rotation_total")
            return mine, spire.stack.broker.current.generation - brokers

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(load)
            await eventually(lambda: min(turns()) >= 3, "three rotations")
            assert await rotations_of(worker) >= 2
            stop.set()
    assert done > 0
    for reason in ("late", "duplicate", "forged"):
        assert cli.dropped(reason) == 0
    assert len(spire.audit("echo", event="admission")) == done


async def test_calls_go_on_without_spires_agent_and_rotation_with_its_successor(spire):
    echo = await spire.agent(ECHO)
    cli = await spire.client(CLI)
    await cli.ask(ECHO, "say", {"text": "before"})
    await spire.stack.spire.kill_agent()
    try:
        old = echo.parts.source.svid
        assert await cli.ask(ECHO, "work", {"text": "without"}) == {"worked": "without"}
    finally:
        await spire.stack.spire.start_agent()
    await eventually(lambda: _newer(echo, old) and _newer(cli, old), "newer SVIDs")
    assert await cli.ask(ECHO, "work", {"text": "after"}) == {"worked": "after"}


def _newer(one, old):
    return one.parts.source.current.svid.not_before > old.not_before


async def test_an_identity_that_was_taken_away_ends_with_its_last_svid(spire):
    await spire.agent(ECHO)
    other = await spire.client(OTHER)
    await other.ask(ECHO, "say", {"text": "still"})
    await spire.stack.spire.remove(OTHER)
    try:
        await eventually(lambda: not _usable(other), "the end of the last SVID")
        with pytest.raises(UnreachableError, match=f"the SVID of {OTHER} expired") as ended:
            await other.call(str(ECHO), "say", {"text": "x"}, timeout=2)
        assert f"this process must be {OTHER}; register the workload" in str(ended.value)
    finally:
        await spire.stack.spire.register([OTHER], uid=os.getuid())
    await eventually(lambda: _usable(other), "the identity given back")
    await other.ask(ECHO, "say", {"text": "again"})


def _usable(one):
    try:
        return one.parts.source.svid is not None
    except IdentityError:
        return False


async def test_no_call_is_lost_while_spire_changes_its_authority_and_the_old_one_is_not_believed(spire):
    echo = await spire.agent(ECHO)
    cli = await spire.client(CLI)
    server = spire.stack.spire
    old_svid, done, stop = cli.parts.source.svid, 0, anyio.Event()
    sources = [echo.parts.source, cli.parts.source, spire.stack.broker]

    def known():
        return [len(one.current.bundles[DOMAIN].authorities) for one in sources]

    def signer():
        return {issuer_key(one.svid) for one in sources}

    async def load():
        nonlocal done
        while not stop.is_set():
            assert await cli.ask(ECHO, "work", {"text": "x"}) == {"worked": "x"}
            done += 1

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(load)
        old = await server.active_authority()
        new = await server.authority("prepare")
        await eventually(lambda: known() == [2, 2, 2], "both authorities everywhere")
        await server.authority("activate", new)
        await server.authority("taint", old)
        await eventually(lambda: signer() == {new}, "SVIDs of the new authority")
        await server.authority("revoke", old)
        await eventually(lambda: known() == [1, 1, 1], "the end of the old authority")
        before = done
        await eventually(lambda: done > before + 20, "calls after the end of the old authority")
        stop.set()
    assert echo.ran == ["work"] * done
    assert issuer_key(old_svid) == old
    with pytest.raises(ChainRefusedError):
        ChainVerifier(echo.parts.source).verify(old_svid.cert_chain, at_ms=now_ms())


def issuer_key(svid):
    """The key identifier of the authority that signed, as SPIRE names its authorities."""
    found = svid.leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    return found.hex()


async def test_a_federated_domain_is_known_by_the_bundle_that_spire_has_of_it(spire):
    """SPIRE gives a partner's bundle to those whose entry says so."""
    partner = Authority("partner.test")
    buyer = partner.issue(SpiffeID("spiffe://partner.test/agent/buyer"))
    pretender = Authority(DOMAIN).issue(ECHO)  # the right name, by an authority that is not SPIRE's
    cli = await spire.client(CLI, identity__allowed_trust_domains=[DOMAIN, "partner.test"])
    chains = ChainVerifier(cli.parts.source)
    with pytest.raises(FederationError, match="its bundle is not known here"):
        chains.verify(buyer.cert_chain, at_ms=now_ms())
    server = spire.stack.spire
    await server.federate(partner.bundle)
    await server.remove(CLI)
    await server.register([CLI], uid=os.getuid(), federates_with=["partner.test"])
    await eventually(lambda: "partner.test" in cli.parts.source.current.bundles, "the partner's bundle")
    assert cli.parts.source.bundle_for("partner.test") == partner.bundle
    assert chains.verify(buyer.cert_chain, at_ms=now_ms()).spiffe_id == buyer.spiffe_id
    with pytest.raises(ChainRefusedError):
        chains.verify(pretender.cert_chain, at_ms=now_ms())


@pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds the server to ask")
async def test_an_agent_with_spires_identity_believes_opa_by_the_one_that_spire_gave_it(spire):
    folder = Path(tempfile.mkdtemp(prefix="awopa-"))
    provider = SPIFFEIdentityProvider(spire.stack.spire.endpoint, OPA)
    opa = OpaServer(folder, svid=await provider.get_svid(), clients=await provider.get_trust_bundle(DOMAIN))
    await provider.aclose()
    try:
        limited = {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["huge"]}
        await opa.start({"grants": [limited | {"limits": {"max_size": 3}}]})
        asks = {"provider": "opa", "opa_endpoint": opa.url, "opa_spiffe_id": str(OPA), "timeout_ms": 400}
        audit = {"audit": {"destination": str(spire.folder / "audit" / "echo.jsonl")}}
        echo = await spire.agent(ECHO, authorization=asks | audit)
        cli = await spire.client(CLI)
        assert await cli.ask(ECHO, "huge", {"size": 3}) == {"text": "xxx"}
        with pytest.raises(AuthorizationError, match="the limit max_size 3 and size is 4"):
            await cli.call(str(ECHO), "huge", {"size": 4}, timeout=5)
        assert metric(echo.parts, "agentweave_opa_errors_total") == 0
    finally:
        await opa.aclose()
        shutil.rmtree(folder)


def now_ms():
    return int(time.time() * 1000)
