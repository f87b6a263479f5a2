"""Authorities that have left their bundle: what they still vouch for, and what they never do."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from agentweave_bus.exceptions import BundleUnavailableError, ChainRefusedError, FederationError
from agentweave_bus.identity import (
    Authority,
    ChainVerifier,
    RetiredAuthorities,
    RevocationList,
    RevokedSet,
    SpiffeID,
    X509Bundle,
    retired,
)
from agentweave_bus.identity.bundle import EmptyBundleError
from agentweave_bus.identity.retired_file import MAX_AUTHORITIES

pytestmark = pytest.mark.anyio
X = SpiffeID("spiffe://a.test/agent/x")
MINUTE = 60_000
DAY = 86_400_000
START = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
T0 = int(START.timestamp() * 1000)


class Trust:
    """The bundles in force, with no provider behind them."""

    def __init__(self, *bundles):
        self.bundles = {one.trust_domain: one for one in bundles}

    def bundle_for(self, trust_domain):
        if trust_domain not in self.bundles:
            raise FederationError("not here", trust_domain=trust_domain)
        return self.bundles[trust_domain]


class World:
    """A trust domain whose authority is rotated, as a process sees it whose clock tests move."""

    def __init__(self, folder):
        self.folder = folder
        self.a = Authority("a.test", not_before=START - timedelta(days=1))
        self.chain = self.a.issue(X, not_before=START - timedelta(hours=1), lifetime=timedelta(days=30))
        self.chain = self.chain.cert_chain
        self.first = self.a.bundle
        self.fingerprint = next(iter(self.first.authority_fingerprints))
        self.trust = Trust(self.first)
        self.revocations = RevocationList()
        self.now_ms = T0
        self.alarms = []
        self.history = self.process()
        self.verifier = ChainVerifier(self.trust, revocations=self.revocations, retired=self.history)

    def process(self):
        return RetiredAuthorities(self.folder, X, revocations=self.revocations, on_alarm=self.alarms.append)

    def note(self, *, after_ms=0, history=None):
        self.now_ms += after_ms
        (history or self.history).note(self.trust.bundles, now_ms=self.now_ms)

    def replace_authority(self, *, after_ms=MINUTE):
        """The authority is another from now on; returns when the first one left."""
        self.a.rotate()
        self.a.retire()
        self.trust.bundles["a.test"] = self.a.bundle
        self.note(after_ms=after_ms)
        return self.now_ms

    def verify(self, stored_at_ms, *, after_ms=MINUTE):
        return self.verifier.verify_retired(
            self.chain, now_ms=self.now_ms + after_ms, stored_at_ms=stored_at_ms
        )

    def believed(self, stored_at_ms):
        try:
            return self.verify(stored_at_ms).spiffe_id == X
        except ChainRefusedError:
            return False


@pytest.fixture
def world(tmp_path):
    one = World(tmp_path / "authorities")
    one.note()
    return one


def test_who_has_left_vouches_for_what_was_stored_before_and_for_nothing_else(world):
    assert not world.believed(T0)  # it has not left
    left = world.replace_authority()
    for _ in range(2):  # the second time from memory
        assert world.believed(T0)
        assert world.believed(left - 1)
        assert not world.believed(left)
        assert not world.believed(left + 1)
        assert not world.believed(left + 2 * MINUTE)  # and that is still to come


def test_only_who_left_later_was_there_at_a_time(world):
    left = world.replace_authority()
    for at_ms, there in ((left - 1, True), (left, False)):
        bundle = world.history.bundle_at("a.test", at_ms, now_ms=left + MINUTE)
        assert (bundle == world.first) is there
        told = world.history.left_at("a.test", world.fingerprint, at_ms, now_ms=left + MINUTE)
        assert told == (left if there else None)


def test_what_it_vouched_for_is_valid_until_it_left_and_never_now(world):
    left = world.replace_authority()
    verified = world.verify(T0)
    assert verified.not_after_ms == left - 1
    assert not verified.valid_at(left)
    # A clock that was put back since does not make it valid again.
    behind = world.verifier.verify_retired(world.chain, now_ms=left - 1000, stored_at_ms=T0)
    assert not behind.valid_at(left - 1000)


def test_it_is_never_recalled_for_what_is_checked_as_of_now(world):
    world.replace_authority()
    for at_ms in (T0, world.now_ms):
        world.verify(T0)
        assert len(world.verifier) == 0
        with pytest.raises(ChainRefusedError, match="does not verify against the bundle"):
            world.verifier.verify(world.chain, at_ms=at_ms)


def test_without_a_history_nobody_has_left(world):
    world.replace_authority()
    bare = ChainVerifier(world.trust)
    with pytest.raises(ChainRefusedError, match="no authority that has left"):
        bare.verify_retired(world.chain, now_ms=world.now_ms + 1, stored_at_ms=T0)


def test_a_certificate_counts_in_its_own_validity_only(world):
    world.chain = world.a.issue(X, not_before=START, lifetime=timedelta(seconds=10)).cert_chain
    world.replace_authority()
    assert world.believed(T0 + 9_000)
    assert not world.believed(T0 + 11_000)
    assert not world.believed(T0 - 1_000)


def test_a_revoked_authority_is_no_authority_any_more(world):
    world.replace_authority()
    assert world.believed(T0)
    world.revocations.replace(RevokedSet(authorities=frozenset({world.fingerprint})))
    assert not world.believed(T0)
    world.history.drop_revoked()
    world.revocations.replace(RevokedSet())
    assert not world.believed(T0)


def test_one_that_is_revoked_while_in_the_bundle_is_not_remembered(world):
    world.revocations.replace(RevokedSet(authorities=frozenset({world.fingerprint})))
    world.replace_authority()
    world.revocations.replace(RevokedSet())
    assert not world.believed(T0)


def test_a_revoked_identity_or_certificate_is_refused_here_too(world):
    world.replace_authority()
    leaf = world.verify(T0).x5t
    for revoked in (
        RevokedSet(spiffe_ids=frozenset({X})),
        RevokedSet(certificates=frozenset({leaf})),
        RevokedSet(issued_before={X: T0}),
    ):
        world.revocations.replace(revoked)
        with pytest.raises(ChainRefusedError, match="revoked"):
            world.verify(T0)


def test_a_domain_that_is_not_allowed_any_more_has_no_past(world):
    world.replace_authority()
    world.verify(T0)
    del world.trust.bundles["a.test"]
    with pytest.raises(FederationError):
        world.verify(T0)


def test_one_domains_past_says_nothing_of_another(world):
    other = Authority("b.test", not_before=START)
    world.replace_authority()
    world.trust.bundles["b.test"] = other.bundle
    world.chain = other.issue(SpiffeID("spiffe://b.test/agent/x"), not_before=START).cert_chain
    assert not world.believed(T0 + 1)


def test_one_that_comes_back_has_not_left(world):
    left = world.replace_authority()
    world.trust.bundles["a.test"] = world.first
    world.note(after_ms=MINUTE)
    assert not world.believed(T0)
    assert world.verifier.verify(world.chain, at_ms=world.now_ms).spiffe_id == X
    world.trust.bundles["a.test"] = world.a.bundle
    world.note(after_ms=MINUTE)
    assert world.believed(left + 1)


def test_after_a_long_gap_it_left_when_it_was_last_seen(world):
    """The machine slept, or the provider was silent: who knows what was in the bundle meanwhile."""
    world.note(after_ms=MINUTE)
    seen = world.now_ms
    world.replace_authority(after_ms=60 * MINUTE)
    assert world.believed(seen - 1)
    assert not world.believed(seen)
    assert not world.believed(seen + 30 * MINUTE)


def test_it_is_forgotten_when_no_record_can_be_left(world):
    world.replace_authority()
    world.chain = world.a.issue(X, not_before=START, lifetime=timedelta(days=90)).cert_chain
    world.note(after_ms=32 * DAY)
    assert world.history.left_at("a.test", world.fingerprint, T0, now_ms=world.now_ms) is not None
    assert world.history.left_at("a.test", world.fingerprint, T0, now_ms=world.now_ms + 1) is None
    world.note(after_ms=1)
    assert world.fingerprint not in world.history._known["a.test"]


def test_a_leaving_that_a_wrong_clock_noted_counts_for_nothing(world):
    """It was years ahead: any time that has passed since would be before that."""
    world.note(after_ms=20 * DAY)
    left = world.replace_authority()
    assert world.believed(left - 1)
    world.now_ms = T0 + MINUTE
    assert not world.believed(T0 + 1)
    world.note()
    world.now_ms = left
    assert not world.believed(T0 + 1)  # forgotten, too


def test_only_so_many_are_remembered_and_those_that_left_last(world):
    many = [Authority("a.test") for _ in range(MAX_AUTHORITIES)]
    world.replace_authority()
    for number in range(0, MAX_AUTHORITIES, 8):
        some = X509Bundle("a.test", tuple(one.bundle.authorities[0] for one in many[number : number + 8]))
        world.trust.bundles["a.test"] = some
        world.note(after_ms=1)
    known = world.history._known["a.test"]
    assert len(known) == MAX_AUTHORITIES
    assert world.fingerprint not in known
    assert some.authority_fingerprints <= known.keys()


# --- an identity source tells it


async def test_a_source_tells_of_every_bundle_and_the_next_process_knows(world, started):
    now = [START.timestamp()]
    source = await started(
        world.a.issue(X, not_before=START), world.first, history=world.history, clock=lambda: now[0]
    )
    now[0] += 30
    world.a.rotate()
    world.a.retire()
    source._provider.bundles["a.test"] = world.a.bundle
    await source.refresh()
    world.now_ms = source.now_ms
    assert world.believed(T0 + 29_999)
    assert not world.believed(T0 + 30_000)
    now[0] += 30
    await source.aclose()
    world.history = world.process()
    world.verifier = ChainVerifier(source, retired=world.history)
    assert not world.believed(T0)
    await world.history.load(["a.test"], now_ms=source.now_ms)
    assert world.believed(T0 + 29_999)
    assert not world.believed(T0 + 30_000)


async def test_running_it_writes_it_down(world, started):
    source = await started(world.a.issue(X), world.first, history=world.history)
    folder = world.history._folder.path
    assert not folder.exists()
    async with anyio.create_task_group() as group:
        group.start_soon(source.run)
        with anyio.fail_after(30):
            while not list(folder.glob("*.seen")):  # noqa: ASYNC110 - there is no event
                await anyio.sleep(0.005)
        group.cancel_scope.cancel()
    assert len(list(folder.glob("*.json"))) == 1


async def test_a_domain_whose_bundle_is_empty_has_no_past_at_once(world, started):
    own = Authority("own.test")
    me = own.issue(SpiffeID("spiffe://own.test/agent/me"))
    source = await started(me, own.bundle, world.first, history=world.history)
    world.a.rotate()
    world.a.retire()
    source._provider.bundles["a.test"] = world.a.bundle
    await source.refresh()
    await world.history.save(now_ms=source.now_ms)
    world.now_ms = source.now_ms
    assert world.believed(T0)
    missing = BundleUnavailableError("away for a moment", trust_domain="a.test")
    empty = EmptyBundleError("nobody is trusted", trust_domain="a.test")
    get, problem = source._provider.get_trust_bundle, [missing]

    async def troubled(domain):
        if problem and domain == "a.test":
            raise problem[0]
        return await get(domain)

    source._provider.get_trust_bundle = troubled
    await source.refresh()
    assert world.believed(T0)
    problem[0] = empty
    await source.refresh()
    assert not world.believed(T0)
    problem.clear()
    await source.refresh()
    await world.history.save(now_ms=source.now_ms)
    assert not world.believed(T0)
    fresh = world.process()
    await fresh.load(["a.test"], now_ms=source.now_ms + 1)
    assert world.fingerprint not in fresh._known["a.test"]


async def test_a_disk_that_hangs_stops_nobody(world, started, monkeypatch):
    monkeypatch.setattr(retired, "_DISK_SECONDS", 0.05)
    answer, threads = threading.Event(), []

    def hang(_domain):
        threads.append(threading.current_thread())
        answer.wait(20)
        raise OSError

    monkeypatch.setattr(world.history._folder, "load", hang)
    try:
        source = await started(world.a.issue(X), world.first, history=world.history)
        await source.refresh()
        await world.history.save(now_ms=world.now_ms)
        assert len(threads) == 1  # not one more each time
        assert len(world.alarms) == 1
        assert "does not answer" in world.alarms[0]
        assert source.spiffe_id == X
    finally:
        answer.set()
    with anyio.fail_after(30):
        while world.history._at_work:  # noqa: ASYNC110 - there is no event
            await anyio.sleep(0.005)
