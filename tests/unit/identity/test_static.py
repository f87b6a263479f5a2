"""Identity from files."""

from __future__ import annotations

import anyio
import pytest

from agentweave_bus.exceptions import BundleUnavailableError, IdentityError, SvidUnavailableError
from agentweave_bus.identity import Authority, IdentityProvider, IdentitySource, SpiffeID, StaticMTLSProvider

pytestmark = pytest.mark.anyio
X = SpiffeID("spiffe://example.test/agent/x")


def write(folder, svid, bundle):
    (folder / "key.pem").touch(mode=0o600)
    (folder / "key.pem").write_bytes(svid.key_pem())
    (folder / "chain.pem").write_bytes(svid.chain_pem())
    (folder / "bundle.pem").write_bytes(bundle.to_pem())
    return StaticMTLSProvider(
        folder / "chain.pem", str(folder / "key.pem"), {"example.test": folder / "bundle.pem"}
    )


async def test_it_gives_what_the_files_hold(tmp_path):
    authority = Authority("example.test")
    svid = authority.issue(X)
    provider = write(tmp_path, svid, authority.bundle)
    with pytest.raises(SvidUnavailableError):
        provider.get_spiffe_id()
    assert await provider.get_svid() == svid
    assert await provider.get_trust_bundle("example.test") == authority.bundle
    assert provider.get_spiffe_id() == X


async def test_changed_files_are_taken_up(tmp_path):
    authority = Authority("example.test")
    source = IdentitySource(write(tmp_path, authority.issue(X), authority.bundle), expected_id=X)
    await source.start(5)
    renewed = authority.issue(X)
    seen = anyio.Event()
    source.subscribe(lambda snapshot: seen.set() if snapshot.svid == renewed else None)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(source.run)
            write(tmp_path, renewed, authority.bundle)
            await seen.wait()
            group.cancel_scope.cancel()
    assert source.svid == renewed


async def test_a_key_that_others_may_read_is_refused(tmp_path):
    authority = Authority("example.test")
    provider = write(tmp_path, authority.issue(X), authority.bundle)
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        await provider.get_svid()


async def test_missing_files_are_named(tmp_path):
    authority = Authority("example.test")
    provider = write(tmp_path, authority.issue(X), authority.bundle)
    with pytest.raises(BundleUnavailableError, match=r"other\.test"):
        await provider.get_trust_bundle("other.test")
    (tmp_path / "bundle.pem").unlink()
    with pytest.raises(BundleUnavailableError, match=r"bundle\.pem"):
        await provider.get_trust_bundle("example.test")
    (tmp_path / "chain.pem").unlink()
    with pytest.raises(SvidUnavailableError, match=r"chain\.pem"):
        await provider.get_svid()
    (tmp_path / "key.pem").unlink()
    with pytest.raises(SvidUnavailableError, match=r"key\.pem"):
        await provider.get_svid()


async def test_a_provider_must_write_the_three_methods():
    class Half(IdentityProvider):
        async def get_svid(self):
            raise NotImplementedError

        def get_spiffe_id(self):
            return ""

    with pytest.raises(TypeError, match="get_trust_bundle"):
        Half()
