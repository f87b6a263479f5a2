"""Who the TLS peer is, checked in real handshakes before a byte of the application."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading

import pytest
import uvloop

from agentweave_bus.exceptions import ChainRefusedError, FederationError, IdentityError, SvidUnavailableError
from agentweave_bus.identity import (
    Authority,
    ChainVerifier,
    IdentitySource,
    PeerRefusedError,
    RevocationList,
    RevokedSet,
    SpiffeID,
    X509Bundle,
    client_context,
    server_context,
    verified_peer,
)
from tests.listening import listening

SERVER = SpiffeID("spiffe://a.test/server")
CLIENT = SpiffeID("spiffe://a.test/client")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Run a coroutine on either loop; an exception that only a loop's handler sees fails the test."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run_it(coroutine):
        unseen = []
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.get_loop().set_exception_handler(lambda _loop, context: unseen.append(context))
            result = runner.run(asyncio.wait_for(coroutine, 30))
        assert unseen == []
        return result

    return run_it


class Exchange:
    """One echo server behind a context; keeps every byte that its application was given."""

    def __init__(self, context):
        self.context = context
        self.received = b""
        self.peers = []

    async def __aenter__(self):
        self.listener = listening(self.handle, tls=self.context)
        self.port = await self.listener.__aenter__()
        return self

    async def __aexit__(self, *exc):
        await self.listener.__aexit__(*exc)

    async def handle(self, reader, writer):
        try:
            self.peers.append(verified_peer(writer.get_extra_info("ssl_object")))
            self.received += (data := await reader.read(100))
            writer.write(b"pong" if data else b"")
            await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def ask(self, context):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context)
        try:
            writer.write(b"ping")
            answer = await reader.read(100)
            if not answer:
                raise ConnectionResetError
            return answer, verified_peer(writer.get_extra_info("ssl_object"))
        finally:
            writer.close()


def anyone(_peer):
    return True


@pytest.mark.parametrize("intermediate", [False, True])
def test_the_expected_peers_talk_and_know_each_other(run, started, intermediate):
    async def scenario():
        a = Authority("a.test", intermediate=intermediate)
        server, client = await started(a.issue(SERVER), a.bundle), await started(a.issue(CLIENT), a.bundle)
        async with Exchange(server_context(server, [CLIENT])) as exchange:
            answer, peer = await exchange.ask(client_context(client, SERVER))
        assert answer == b"pong"
        assert exchange.received == b"ping"
        assert peer.spiffe_id == SERVER
        assert exchange.peers[0].spiffe_id == CLIENT
        assert exchange.peers[0].x5t == client.svid.x5t

    run(scenario())


@pytest.mark.parametrize("expected", [SERVER, [SERVER], lambda peer: peer == SERVER])
def test_a_server_with_another_id_gets_no_byte(run, started, expected):
    async def scenario():
        a = Authority("a.test")
        impostor = await started(a.issue(SpiffeID.of("a.test", "other")), a.bundle)
        client = await started(a.issue(CLIENT), a.bundle)
        async with Exchange(server_context(impostor, anyone)) as exchange:
            with pytest.raises(PeerRefusedError, match=r"the TLS peer is spiffe://a\.test/other, not"):
                await exchange.ask(client_context(client, expected))
        assert exchange.received == b""

    run(scenario())


def test_a_server_whose_id_was_minted_by_another_domains_authority_gets_no_byte(run, started):
    async def scenario():
        a, b = Authority("a.test"), Authority("b.test")
        forger = await started(b.issue(SERVER, allow_foreign=True), a.bundle, b.bundle)
        client = await started(a.issue(CLIENT), a.bundle, b.bundle)
        async with Exchange(server_context(forger, anyone)) as exchange:
            plain = client_context(client, SERVER)
            with pytest.raises(PeerRefusedError, match=r"does not verify against the bundle of a\.test"):
                await exchange.ask(plain)
            # The pool holds both authorities, so that OpenSSL alone would have been content.
            plain.sslobject_class = ssl.SSLObject
            assert (await exchange.ask(plain))[0] == b"pong"
        assert exchange.received == b"ping"

    run(scenario())


def test_a_client_that_is_not_accepted_or_forged_never_reaches_the_application(run, started):
    async def scenario():
        a, b = Authority("a.test"), Authority("b.test")
        server = await started(a.issue(SERVER), a.bundle, b.bundle)
        for svid in (a.issue(SpiffeID.of("a.test", "x")), b.issue(CLIENT, allow_foreign=True)):
            client = await started(svid, a.bundle, b.bundle)
            async with Exchange(server_context(server, CLIENT)) as exchange:
                with pytest.raises((OSError, ConnectionResetError)):
                    await exchange.ask(client_context(client, SERVER))
            assert exchange.received == b""
            assert exchange.peers == []

    run(scenario())


def test_a_client_without_a_certificate_is_refused(run, started):
    async def scenario():
        a = Authority("a.test")
        server = await started(a.issue(SERVER), a.bundle)
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.check_hostname = False
        bare.verify_mode = ssl.CERT_NONE
        async with Exchange(server_context(server, anyone)) as exchange:
            with pytest.raises((OSError, ConnectionResetError)):
                await exchange.ask(bare)
        assert exchange.received == b""

    run(scenario())


def test_federated_peers_talk_and_unknown_domains_are_refused(run, started):
    async def scenario():
        a, b = Authority("a.test"), Authority("b.test")
        theirs = SpiffeID("spiffe://b.test/server")
        server = await started(b.issue(theirs), a.bundle, b.bundle)
        client = await started(a.issue(CLIENT), a.bundle, b.bundle)
        narrow = await started(a.issue(CLIENT), a.bundle)
        async with Exchange(server_context(server, anyone)) as exchange:
            assert (await exchange.ask(client_context(client, theirs)))[1].spiffe_id == theirs
            with pytest.raises(ssl.SSLCertVerificationError):
                await exchange.ask(client_context(narrow, theirs))

    run(scenario())


def test_a_domain_that_is_no_longer_allowed_is_named_as_cause(run, started, steered):
    async def scenario():
        a, b = Authority("a.test"), Authority("b.test")
        server = await started(b.issue(SpiffeID("spiffe://b.test/server")), a.bundle, b.bundle)
        provider = steered(a.issue(CLIENT), a.bundle, b.bundle)
        client = IdentitySource(provider, allowed_trust_domains=["b.test"])
        await client.start(5)
        context = client_context(client, anyone)
        del provider.bundles["b.test"]
        assert await client.refresh()
        async with Exchange(server_context(server, anyone)) as exchange:
            with pytest.raises(PeerRefusedError) as refusal:
                await exchange.ask(context)
        assert isinstance(refusal.value.__cause__, FederationError)
        assert isinstance(refusal.value, ChainRefusedError)
        assert isinstance(refusal.value, ssl.SSLError)

    run(scenario())


def test_a_revoked_peer_is_refused_at_its_next_handshake(run, started):
    async def scenario():
        a = Authority("a.test")
        server, client = await started(a.issue(SERVER), a.bundle), await started(a.issue(CLIENT), a.bundle)
        verifier = ChainVerifier(client, revocations=RevocationList())
        context = client_context(client, SERVER, verifier=verifier)
        async with Exchange(server_context(server, anyone)) as exchange:
            await exchange.ask(context)
            verifier.revocations.replace(RevokedSet(spiffe_ids=frozenset({SERVER})))
            with pytest.raises(PeerRefusedError, match="revoked"):
                await exchange.ask(context)

    run(scenario())


def test_a_rule_that_fails_refuses(run, started):
    def broken(_peer):
        raise ZeroDivisionError("oops")

    async def scenario():
        a = Authority("a.test")
        server, client = await started(a.issue(SERVER), a.bundle), await started(a.issue(CLIENT), a.bundle)
        async with Exchange(server_context(server, anyone)) as exchange:
            with pytest.raises(PeerRefusedError, match="oops"):
                await exchange.ask(client_context(client, broken))
        assert exchange.received == b""

    run(scenario())


def test_contexts_are_strict(run, started):
    async def scenario():
        a = Authority("a.test")
        source = await started(a.issue(SERVER), a.bundle)
        for context in (client_context(source, SERVER), server_context(source, SERVER)):
            assert context.minimum_version == ssl.TLSVersion.TLSv1_3
            assert context.verify_mode == ssl.CERT_REQUIRED
            assert context.options & ssl.OP_NO_RENEGOTIATION
        assert server_context(source, SERVER).num_tickets == 0
        with pytest.raises(ValueError, match="SPIFFE"):
            client_context(source, "localhost")

    run(scenario())


def test_an_authority_that_did_not_sign_itself_is_an_anchor_too(run, started):
    async def scenario():
        a = Authority("a.test", intermediate=True)
        anchor = X509Bundle.from_der("a.test", [a.issue(SERVER).cert_chain[1]])
        server, client = await started(a.issue(SERVER), anchor), await started(a.issue(CLIENT), anchor)
        async with Exchange(server_context(server, CLIENT)) as exchange:
            assert (await exchange.ask(client_context(client, SERVER)))[0] == b"pong"

    run(scenario())


def test_the_peer_does_not_escape_by_an_exchange_of_contexts(run, started):
    async def scenario():
        a = Authority("a.test")
        server, client = await started(a.issue(SERVER), a.bundle), await started(a.issue(CLIENT), a.bundle)
        lax = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        lax.load_cert_chain(server.svid.cert_chain_path, server.svid.private_key_path)
        context = server_context(server, CLIENT)

        def exchange_contexts(connection, _name, _context):
            connection.context = lax

        context.sni_callback = exchange_contexts
        async with Exchange(context) as exchange:
            with pytest.raises((OSError, ConnectionResetError)):
                await exchange.ask(client_context(client, SERVER))
        assert exchange.received == b""

    run(scenario())


def test_an_unstarted_or_expired_source_makes_no_context(run, steered):
    async def scenario():
        a = Authority("a.test")
        now = [0.0]
        svid = a.issue(SERVER)
        source = IdentitySource(steered(svid, a.bundle), clock=lambda: now[0])
        with pytest.raises(SvidUnavailableError):
            client_context(source, SERVER)
        now[0] = svid.not_before.timestamp() + 1
        await source.start(5)
        client_context(source, SERVER)
        now[0] = svid.expiry.timestamp() + 1
        with pytest.raises(SvidUnavailableError, match="expired"):
            client_context(source, SERVER)

    run(scenario())


def test_blocking_sockets_are_checked_too(run, started):
    async def sources():
        a = Authority("a.test")
        other = a.issue(SpiffeID.of("a.test", "other"))
        return [await started(svid, a.bundle) for svid in (a.issue(SERVER), other, a.issue(CLIENT))]

    server, impostor, client = run(sources())
    for source, good in ((server, True), (impostor, False)):
        listener = socket.create_server(("127.0.0.1", 0))
        received = []
        thread = threading.Thread(
            target=_serve_once, args=(listener, server_context(source, CLIENT), received)
        )
        thread.start()
        raw = socket.create_connection(listener.getsockname(), timeout=5)
        context = client_context(client, SERVER)
        if good:
            with context.wrap_socket(raw) as secured:
                assert verified_peer(secured).spiffe_id == SERVER
                secured.sendall(b"ping")
        else:
            with pytest.raises(PeerRefusedError):
                context.wrap_socket(raw)
            raw.close()
        thread.join(5)
        assert received == ([b"ping"] if good else [b""])
        with pytest.raises(ValueError, match="do_handshake_on_connect"), socket.socket() as unconnected:
            context.wrap_socket(unconnected, do_handshake_on_connect=False)


def _serve_once(listener, context, received):
    connection, _ = listener.accept()
    connection.settimeout(5)
    try:
        with context.wrap_socket(connection, server_side=True) as secured:
            received.append(secured.recv(10))
    except OSError:
        received.append(b"")
    finally:
        connection.close()
        listener.close()


def test_what_was_not_made_here_has_no_verified_peer():
    assert verified_peer(None) is None
    assert issubclass(PeerRefusedError, IdentityError)
