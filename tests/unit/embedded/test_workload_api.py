"""The embedded Workload API, asked by the real client over real sockets."""

from __future__ import annotations

import asyncio
import gc
import stat
import sys
import time
from datetime import timedelta

import anyio
import grpc
import grpc.aio
import pytest
from spiffe._proto import workload_pb2, workload_pb2_grpc

from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.exceptions import (
    BundleUnavailableError,
    ChainRefusedError,
    ConfigurationError,
    FederationError,
    IdentityError,
    SvidUnavailableError,
)
from agentweave_bus.identity import (
    Authority,
    IdentitySource,
    RotationHooks,
    SpiffeID,
    SPIFFEIdentityProvider,
    verify_chain,
)
from agentweave_bus.identity.workload_api import socket_path_of

pytestmark = pytest.mark.anyio
ORDER = SpiffeID("spiffe://example.test/agent/order")
PAYMENT = SpiffeID("spiffe://example.test/agent/payment")
HEADER = (("workload.spiffe.io", "true"),)


@pytest.fixture
def authority():
    return Authority("example.test", intermediate=True)


@pytest.fixture
async def api(authority, tmp_path):
    async with WorkloadApiServer(authority, tmp_path / "sockets") as server:
        yield server
    assert list((tmp_path / "sockets").glob("*")) == []


@pytest.fixture
async def provided():
    """Make providers and close them at the end."""
    made = []

    def make(endpoint, *args, **options):
        made.append(SPIFFEIdentityProvider(endpoint, *args, **options))
        return made[-1]

    yield make
    for provider in made:
        await provider.aclose()


class Following:
    """A started source whose snapshots a test can wait for."""

    def __init__(self, provider, **options):
        self.failed = []
        self.restarted = 0
        hooks = RotationHooks(failed=self.failed.append, restarted=self._restarted)
        self.source = IdentitySource(provider, hooks=hooks, **options)
        self._event = anyio.Event()
        self.source.subscribe(lambda _snapshot: self._wake())

    def _restarted(self):
        self.restarted += 1

    def _wake(self):
        self._event.set()
        self._event = anyio.Event()

    async def until(self, condition):
        with anyio.fail_after(30):
            while not condition():
                await self._event.wait()

    async def __aenter__(self):
        await self.source.start(10)
        self._task = asyncio.create_task(self.source.run())
        return self

    async def __aexit__(self, *_exc):
        self._task.cancel()
        await asyncio.wait([self._task], timeout=5)
        await self.source.aclose()


async def test_each_socket_gives_its_own_identity(api, authority, provided):
    for spiffe_id in (ORDER, PAYMENT):
        provider = provided(await api.serve(spiffe_id), spiffe_id)
        await provider.start()
        svid = await provider.get_svid()
        bundle = await provider.get_trust_bundle("example.test")
        assert svid == api.current_svid(spiffe_id)
        assert provider.get_spiffe_id() == spiffe_id
        assert bundle == authority.bundle
        at_ms = int(time.time() * 1000)
        assert verify_chain(svid.cert_chain, bundle, at_ms=at_ms).spiffe_id == spiffe_id
    assert api.identities == (ORDER, PAYMENT)


async def test_sockets_are_for_this_user_only(api, tmp_path):
    endpoint = await api.serve(ORDER)
    socket = tmp_path / "sockets" / "agent+order.sock"
    assert endpoint == f"unix://{socket}"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert await api.serve(ORDER) == endpoint
    await api.withdraw(ORDER)
    assert not socket.exists()
    await api.withdraw(ORDER)


async def test_a_folder_that_others_can_enter_is_refused_and_left_alone(authority, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    server = WorkloadApiServer(authority, tmp_path / "shared")
    with pytest.raises(ConfigurationError, match="chmod 700"):
        await server.serve(ORDER)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755


async def test_rotation_is_streamed_to_who_listens(api, provided):
    async with Following(provided(await api.serve(ORDER), ORDER)) as following:
        first = following.source.svid
        api.rotate(ORDER)
        await following.until(lambda: following.source.svid != first)
        assert following.source.svid == api.current_svid(ORDER)
        assert following.failed == []


@pytest.mark.slow  # it waits for time to pass
async def test_short_lived_svids_rotate_at_half_of_their_life(api, provided):
    endpoint = await api.serve(ORDER, lifetime=timedelta(seconds=4))
    await api.serve(PAYMENT)
    other = api.current_svid(PAYMENT)
    began = time.monotonic()
    async with Following(provided(endpoint, ORDER)) as following:
        seen = {following.source.svid.x5t}
        for _ in range(2):
            await following.until(lambda: following.source.svid.x5t not in seen)
            seen.add(following.source.svid.x5t)
    assert 2.5 < time.monotonic() - began < 8
    assert following.restarted == 0
    assert api.current_svid(PAYMENT) == other


async def test_a_new_authority_reaches_the_workloads(api, authority, provided):
    async with Following(provided(await api.serve(ORDER), ORDER)) as following:
        old = following.source.current.bundles["example.test"]
        authority.rotate()
        api.rotate()
        await following.until(lambda: following.source.bundle_for("example.test") == authority.bundle)
        await following.until(lambda: following.source.svid == api.current_svid(ORDER))
        assert old.authority_fingerprints < authority.bundle.authority_fingerprints
        authority.retire()
        api.announce()
        await following.until(lambda: following.source.bundle_for("example.test") == authority.bundle)
        assert len(authority.bundle.authorities) == 1


async def test_federated_bundles_are_given_and_kept_apart(api, provided):
    other = Authority("other.test")
    provider = provided(await api.serve(ORDER), ORDER)
    async with Following(provider, allowed_trust_domains=["other.test"]) as following:
        with pytest.raises(FederationError, match="bundle is not known"):
            following.source.bundle_for("other.test")
        api.federate([other.bundle])
        await following.until(lambda: "other.test" in following.source.current.bundles)
        assert following.source.bundle_for("other.test") == other.bundle
        assert following.source.bundle_for("example.test") == api.authority.bundle
        with pytest.raises(BundleUnavailableError, match=r"third\.test"):
            await provider.get_trust_bundle("third.test")


async def test_another_identity_than_expected_names_both(api, provided):
    provider = provided(await api.serve(PAYMENT), ORDER)
    with pytest.raises(IdentityError, match=r"gives spiffe://example\.test/agent/payment.*agent/order"):
        await IdentitySource(provider, expected_id=ORDER).start(10)


async def test_without_an_expected_id_the_default_is_taken(api, provided):
    provider = provided(await api.serve(PAYMENT))
    with pytest.raises(SvidUnavailableError):
        provider.get_spiffe_id()
    assert (await provider.get_svid()).spiffe_id == PAYMENT


async def test_waiting_without_a_stream_returns_so_that_one_is_opened(tmp_path):
    with anyio.fail_after(30):
        await SPIFFEIdentityProvider(f"unix://{tmp_path}/none.sock").wait_for_update()


async def test_a_missing_socket_says_what_to_start(tmp_path):
    for there_is_a_file in (False, True):
        if there_is_a_file:
            (tmp_path / "none.sock").touch()
        source = IdentitySource(SPIFFEIdentityProvider(f"unix://{tmp_path}/none.sock"))
        with anyio.fail_after(30), pytest.raises(IdentityError, match="SPIRE's agent") as refusal:
            await source.start(60)
        assert f"unix://{tmp_path}/none.sock" in str(refusal.value)


async def test_a_dead_socket_is_bounded_and_named(tmp_path):
    import socket

    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        source = IdentitySource(SPIFFEIdentityProvider(f"unix://{path}"))
        with anyio.fail_after(30), pytest.raises(SvidUnavailableError, match=r"within 2 s.*does not answer"):
            await source.start(2)


async def test_an_endpoint_that_is_no_unix_socket_is_a_configuration_error():
    for endpoint in ("", "tcp://127.0.0.1:80", "relative.sock", "http://x"):
        with pytest.raises(ConfigurationError, match="unix:///"):
            SPIFFEIdentityProvider(endpoint)
    assert socket_path_of("unix:///run/x.sock") == socket_path_of("unix:/run/x.sock") == "/run/x.sock"
    assert socket_path_of("/run/x.sock") == "/run/x.sock"


async def test_a_workload_survives_a_restart_of_the_api(api, provided):
    async with Following(provided(await api.serve(ORDER), ORDER)) as following:
        first = following.source.svid
        await api.withdraw(ORDER)
        assert following.source.svid == first
        await api.serve(ORDER)
        await following.until(lambda: following.source.svid == api.current_svid(ORDER))


async def test_a_stream_that_ended_for_good_is_opened_anew(api, provided):
    provider = provided(await api.serve(ORDER), ORDER)
    async with Following(provider) as following:
        dead = provider._stream
        dead._cancel()  # the package's watcher ends without a word; what follows is its error report
        dead._failed(RuntimeError("unexpected"))
        await anyio.wait_all_tasks_blocked()
        api.rotate(ORDER)
        await following.until(lambda: following.source.svid == api.current_svid(ORDER))
        assert provider._stream is not dead


@pytest.mark.slow  # it waits for time to pass
async def test_a_stream_that_fell_silent_is_rebuilt_by_the_watchdog(api, provided):
    provider = provided(await api.serve(ORDER, lifetime=timedelta(seconds=6)), ORDER)
    async with Following(provider) as following:
        first = following.source.svid
        provider._stream._cancel()
        await following.until(lambda: following.source.svid != first)
        assert following.restarted >= 1


async def test_requests_without_the_header_are_refused(api):
    async with grpc.aio.insecure_channel((await api.serve(ORDER)).replace("unix://", "unix:")) as channel:
        stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)
        calls = (
            (stub.FetchX509SVID, workload_pb2.X509SVIDRequest()),
            (stub.FetchX509Bundles, workload_pb2.X509BundlesRequest()),
        )
        for method, request in calls:
            for metadata in ((), (("workload.spiffe.io", "false"),)):
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    async for _ in method(request, metadata=metadata, timeout=5):
                        pass
                assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            async for response in method(request, metadata=HEADER, timeout=5):
                assert response.ByteSize() > 100
                break


async def test_bundles_are_streamed_by_trust_domain(api, authority):
    other = Authority("other.test")
    async with grpc.aio.insecure_channel((await api.serve(ORDER)).replace("unix://", "unix:")) as channel:
        stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)
        stream = stub.FetchX509Bundles(workload_pb2.X509BundlesRequest(), metadata=HEADER, timeout=10)
        first = await stream.read()
        assert dict(first.bundles) == {"spiffe://example.test": b"".join(authority.bundle.to_der())}
        api.federate([other.bundle])
        second = await stream.read()
        assert second.bundles["spiffe://other.test"] == b"".join(other.bundle.to_der())
        stream.cancel()


async def test_foreign_ids_and_deep_folders_are_refused(authority, tmp_path):
    async with WorkloadApiServer(authority, tmp_path) as server:
        with pytest.raises(IdentityError, match="does not issue"):
            await server.serve(SpiffeID("spiffe://other.test/x"))
        with pytest.raises(IdentityError, match="not served"):
            server.rotate(ORDER)
        long = SpiffeID.of("example.test", "agent", "x" * 150)
        assert await server.serve(long) != await server.serve(SpiffeID(long + "y"))
    deep = WorkloadApiServer(authority, tmp_path / ("d" * 100))
    with pytest.raises(ConfigurationError, match="too deep"):
        await deep.serve(ORDER)
    assert not (tmp_path / ("d" * 100)).exists()


async def test_a_leaf_that_the_package_lets_through_is_still_refused(api, provided, authority):
    class Lenient:
        """An SVID for clients only, as a careless authority would give it."""

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import ExtendedKeyUsageOID

    endpoint = await api.serve(ORDER)
    served = api._find(ORDER)
    good, signer = served.svid, authority._signer
    builder = x509.CertificateBuilder(
        good.leaf.issuer, good.leaf.subject, good.leaf.public_key(), 7, good.not_before, good.expiry
    )
    for extension in good.leaf.extensions:
        value = extension.value
        if isinstance(value, x509.ExtendedKeyUsage):
            value = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(value, critical=extension.critical)
    leaf = builder.sign(signer.key, hashes.SHA256()).public_bytes(Encoding.DER)
    lenient = Lenient()
    lenient.spiffe_id, lenient.cert_chain = ORDER, (leaf, *good.cert_chain[1:])
    lenient.key_der = good.key_der
    served.svid = lenient
    with pytest.raises(ChainRefusedError, match="serverAuth"):
        await provided(endpoint, ORDER).get_svid()


async def test_no_thread_of_a_closed_provider_lives_on(api):
    import threading

    provider = SPIFFEIdentityProvider(await api.serve(ORDER), ORDER)
    before = set(threading.enumerate())
    await provider.get_svid()
    watchers = [one for one in set(threading.enumerate()) - before if "watch_target" in one.name]
    assert watchers
    await provider.aclose()
    await provider.aclose()
    for watcher in watchers:
        await anyio.to_thread.run_sync(watcher.join, 5)
        assert not watcher.is_alive()
    gc.collect()


_BESIDE_A_PROCESS = """
import sys
import uvloop
from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.identity import Authority, IdentitySource, SPIFFEIdentityProvider, SpiffeID

async def main(folder):
    me = SpiffeID("spiffe://a.test/agent/x")
    async with WorkloadApiServer(Authority("a.test"), folder) as api:
        source = IdentitySource(SPIFFEIdentityProvider(await api.serve(me), me), expected_id=me)
        await source.start(10)
        async with NatsServer("", folder):
            print(source.spiffe_id)
        await source.aclose()

uvloop.run(main(sys.argv[1]))
"""


async def test_starting_processes_beside_it_is_quiet_and_it_runs_on_uvloop(tmp_path):
    command = [sys.executable, "-W", "error", "-c", _BESIDE_A_PROCESS, str(tmp_path)]
    with anyio.fail_after(30):
        done = await anyio.run_process(command, check=False)
    assert done.stderr.decode() == ""
    assert done.stdout.decode().strip() == "spiffe://a.test/agent/x"
    assert done.returncode == 0
