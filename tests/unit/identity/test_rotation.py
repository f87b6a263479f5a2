"""The identity that a process holds, while providers change, fail and fall silent."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest

from agentweave_bus.exceptions import FederationError, IdentityError, SvidUnavailableError
from agentweave_bus.identity import Authority, IdentitySource, RotationHooks, SpiffeID

pytestmark = pytest.mark.anyio
X = SpiffeID("spiffe://a.test/agent/x")
A = Authority("a.test")


class Told:
    """Counts what the hooks tell and lets a test wait for it."""

    def __init__(self):
        self.rotated, self.failed, self.restarted = [], [], 0
        self.something = anyio.Event()
        self.hooks = RotationHooks(self._rotated, self._failed, self._restarted)

    def _rotated(self, snapshot):
        self.rotated.append(snapshot)
        self._wake()

    def _failed(self, error):
        self.failed.append(error)
        self._wake()

    def _restarted(self):
        self.restarted += 1
        self._wake()

    def _wake(self):
        self.something.set()
        self.something = anyio.Event()

    async def until(self, condition):
        with anyio.fail_after(30):
            while not condition():
                await self.something.wait()


async def running(group, source):
    group.start_soon(source.run)


async def test_start_gives_the_first_snapshot(steered):
    svid = A.issue(X)
    source = IdentitySource(steered(svid, A.bundle), expected_id=X)
    with pytest.raises(SvidUnavailableError, match="not started"):
        _ = source.current
    await source.start(5)
    assert source.svid == svid
    assert source.spiffe_id == X
    assert source.current.generation == 1
    assert source.current.bundles == {"a.test": A.bundle}


async def test_another_identity_than_the_expected_is_refused_at_once_with_both_names(steered):
    provider = steered(A.issue(SpiffeID.of("a.test", "agent", "y")), A.bundle)
    source = IdentitySource(provider, expected_id=X)
    with anyio.fail_after(30), pytest.raises(IdentityError, match=r"spiffe://a\.test/agent/y.*agent/x"):
        await source.start(60)
    assert provider.closed == 1


async def test_start_waits_for_an_identity_and_gives_up_with_the_reason(steered):
    provider = steered(None, A.bundle)
    provider.error = SvidUnavailableError("nobody registered me")
    source = IdentitySource(provider)
    with pytest.raises(SvidUnavailableError, match=r"within 0\.3 s: nobody registered me"):
        await source.start(0.3)
    assert provider.closed == 1
    late = steered(A.issue(X), A.bundle)
    late.error = SvidUnavailableError("not yet")
    source = IdentitySource(late)
    async with anyio.create_task_group() as group:
        group.start_soon(source.start, 10)
        await anyio.wait_all_tasks_blocked()
        late.error = None
    assert source.spiffe_id == X


async def test_a_provider_that_hangs_is_bounded(steered):
    provider = steered(A.issue(X), A.bundle)
    provider.get_svid = anyio.sleep_forever
    with anyio.fail_after(30), pytest.raises(SvidUnavailableError, match=r"within 0\.1 s"):
        await IdentitySource(provider).start(0.1)


async def test_an_expired_or_future_svid_is_no_identity(steered):
    svid = A.issue(X)
    for now, why in (
        (svid.expiry.timestamp() + 1, "expired"),
        (svid.not_before.timestamp() - 1, "valid from"),
    ):
        source = IdentitySource(steered(svid, A.bundle), clock=lambda now=now: now)
        with pytest.raises(SvidUnavailableError, match=why):
            await source.start(0.05)


async def test_only_allowed_domains_have_a_bundle(steered):
    b, c = Authority("b.test"), Authority("c.test")
    provider = steered(A.issue(X), A.bundle, b.bundle, c.bundle)
    source = IdentitySource(provider, allowed_trust_domains=["b.test", "d.test"])
    await source.start(5)
    assert source.bundle_for("a.test") == A.bundle
    assert source.bundle_for("b.test") == b.bundle
    with pytest.raises(FederationError, match="not allowed") as refusal:
        source.bundle_for("c.test")
    assert refusal.value.trust_domain == "c.test"
    with pytest.raises(FederationError, match="bundle is not known"):
        source.bundle_for("d.test")
    assert source.allowed_trust_domains == {"a.test", "b.test", "d.test"}


async def test_a_rotation_reaches_everyone_and_unsubscribing_ends_it(steered):
    provider, told, seen, gone = steered(A.issue(X), A.bundle), Told(), [], []
    source = IdentitySource(provider, expected_id=X, hooks=told.hooks)
    await source.start(5)
    source.subscribe(seen.append)
    source.subscribe(gone.append)()
    async with anyio.create_task_group() as group:
        await running(group, source)
        provider.svid = A.issue(X)
        provider.changed.set()
        await told.until(lambda: told.rotated)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert [snapshot.generation for snapshot in seen] == [2]
    assert source.svid == provider.svid == seen[0].svid
    assert gone == []


async def test_a_new_bundle_is_announced_without_counting_as_rotation(steered):
    b = Authority("b.test")
    provider, told, seen = steered(A.issue(X), A.bundle), Told(), []
    source = IdentitySource(provider, allowed_trust_domains=["b.test"], hooks=told.hooks)
    await source.start(5)
    source.subscribe(seen.append)
    provider.bundles["b.test"] = b.bundle
    assert await source.refresh()
    assert not await source.refresh()
    assert source.bundle_for("b.test") == b.bundle
    assert len(seen) == 1
    assert told.rotated == []


async def test_a_listener_that_fails_does_not_deafen_the_others(steered, caplog):
    provider, told, seen = steered(A.issue(X), A.bundle), Told(), []
    source = IdentitySource(provider, hooks=told.hooks)
    await source.start(5)

    def broken(_snapshot):
        raise ZeroDivisionError("oops")

    source.subscribe(broken)
    source.subscribe(seen.append)
    provider.svid = A.issue(X)
    await source.refresh()
    assert len(seen) == 1
    assert isinstance(told.failed[0], ZeroDivisionError)
    assert "oops" in caplog.text


async def test_trouble_is_told_and_the_last_good_identity_stays(steered):
    provider, told = steered(A.issue(X), A.bundle), Told()
    source = IdentitySource(provider, expected_id=X, hooks=told.hooks)
    await source.start(5)
    good = source.svid
    async with anyio.create_task_group() as group:
        await running(group, source)
        provider.svid = A.issue(SpiffeID.of("a.test", "agent", "y"))
        provider.changed.set()
        await told.until(lambda: len(told.failed) == 1)
        provider.error = RuntimeError("foreign code")
        provider.changed.set()
        await told.until(lambda: len(told.failed) == 2)
        assert source.svid is good
        provider.error, provider.svid = None, A.issue(X)
        provider.changed.set()
        await told.until(lambda: told.rotated)
        group.cancel_scope.cancel()
    assert isinstance(told.failed[0], IdentityError)
    assert isinstance(told.failed[1], RuntimeError)
    assert source.svid == provider.svid


@pytest.mark.slow  # it waits for time to pass
async def test_a_silent_provider_is_restarted_when_its_svid_is_overdue(steered):
    provider, told = steered(A.issue(X, lifetime=timedelta(seconds=5)), A.bundle), Told()
    source = IdentitySource(provider, hooks=told.hooks)
    await source.start(5)

    def come_back():
        if provider.restarts == 3:
            provider.svid = A.issue(X)

    provider.on_restart = come_back
    async with anyio.create_task_group() as group:
        await running(group, source)
        await told.until(lambda: told.rotated)
        group.cancel_scope.cancel()
    assert told.restarted == provider.restarts == 3
    assert [type(error) for error in told.failed] == [SvidUnavailableError] * 2
    assert "overdue" in str(told.failed[0])


async def test_an_expired_svid_is_never_handed_out(steered):
    svid = A.issue(X)
    now = [svid.not_before.timestamp() + 1]
    source = IdentitySource(steered(svid, A.bundle), clock=lambda: now[0])
    await source.start(5)
    now[0] = svid.expiry.timestamp()
    assert source.svid == svid
    now[0] += 1
    with pytest.raises(SvidUnavailableError, match="no newer one"):
        _ = source.svid
    assert source.spiffe_id == X


async def test_an_expired_svid_says_why_no_newer_one_came(steered):
    svid = A.issue(X)
    now = [svid.not_before.timestamp() + 1]
    provider, told = steered(svid, A.bundle), Told()
    source = IdentitySource(provider, hooks=told.hooks, clock=lambda: now[0])
    await source.start(5)
    provider.error = IdentityError("the registration was taken away")
    now[0] = svid.expiry.timestamp() + 1
    async with anyio.create_task_group() as group:
        await running(group, source)
        await told.until(lambda: told.failed)
        with pytest.raises(
            SvidUnavailableError, match="no newer one has come: the registration was taken away"
        ):
            _ = source.current
        group.cancel_scope.cancel()


async def test_the_inherited_wait_ends_by_half_of_what_is_left(steered):
    class Plain(steered):
        wait_for_update = None

    del Plain.wait_for_update
    from agentweave_bus.identity import IdentityProvider

    provider = Plain(A.issue(X, lifetime=timedelta(seconds=2)), A.bundle)
    with anyio.fail_after(30):
        await IdentityProvider.wait_for_update(provider)
