"""Links of what lies in a stream, whose authority has left its bundle meanwhile (rule 5 of delegation)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Kind,
    Link,
    Sealed,
    VerifiedLink,
    requester,
    verify_delegation,
)
from agentweave_bus.exceptions import DelegationRefusedError
from agentweave_bus.identity import RetiredAuthorities, RevocationList, RevokedSet, X509Svid
from agentweave_bus.identity.chain import ChainVerifier
from tests.unit.envelope.world import (
    CLIENT,
    CONTROL,
    GATEWAY,
    HOUR,
    NOW,
    ORDER,
    PAYMENT,
    Bundles,
    World,
)

MINUTE = 60_000
LEFT = NOW + HOUR
LATER = LEFT + HOUR
GRACE = 4 * HOUR
NOBODY = "no authority of that bundle signed it"


@dataclass
class Past:
    """A world whose authority was replaced at ``LEFT``; ``client`` and ``order`` were certified by the one before."""

    world: World
    client: X509Svid
    order: X509Svid
    history: RetiredAuthorities | None
    revocations: RevocationList
    via: tuple[Link, ...] = ()
    """What follows from the last task has this."""

    def verifier(self) -> EnvelopeVerifier:
        trust = Bundles(self.world.authority.bundle)
        return EnvelopeVerifier(ChainVerifier(trust, revocations=self.revocations, retired=self.history))

    def task(self, *, asked_ms: int = NOW, **changes: Any) -> Sealed:
        """The client calls ``ORDER``, which hands a task on while it handles that."""
        call = self.world.call(CLIENT, ORDER, iat=asked_ms, svid=self.client)
        then_ms = changes.pop("iat", asked_ms + 1_000)
        task = self.world.call(
            ORDER, PAYMENT, kind=Kind.TASK, iat=then_ms, exp=NOW + 20 * HOUR, via=(call.link,), **changes
        )
        self.via = (call.link, task.link)
        return task

    def links(
        self, sealed: Sealed, stored_at_ms: int | None, *, now_ms: int = LATER
    ) -> tuple[VerifiedLink, ...]:
        verifier = self.verifier()
        opened = verifier.open(sealed.frame, now_ms=now_ms)
        return verify_delegation(opened, verifier, now_ms=now_ms, stored_at_ms=stored_at_ms)

    def refused(self, sealed: Sealed, stored_at_ms: int | None, match: str = NOBODY, **more: int) -> None:
        with pytest.raises(DelegationRefusedError, match=match) as caught:
            self.links(sealed, stored_at_ms, **more)
        assert caught.value.rule == 5


@pytest.fixture
def past(tmp_path: Path) -> Past:
    world, revocations = World(), RevocationList()
    history = RetiredAuthorities(tmp_path, PAYMENT, revocations=revocations)
    client, order, domain = world.issue(CLIENT), world.issue(ORDER), world.authority.trust_domain
    for moment in range(NOW - 5 * MINUTE, LEFT, 5 * MINUTE):
        history.note({domain: world.authority.bundle}, now_ms=moment)
    world.authority.rotate()
    world.authority.retire()
    history.note({domain: world.authority.bundle}, now_ms=LEFT)
    return Past(world, client, order, history, revocations)


def test_a_link_outlives_its_authority_as_long_as_the_task_waits(past: Past) -> None:
    task = past.task()
    for _ in range(2):
        (link,) = past.links(task, NOW + 2_000)
        assert (link.iss, link.aud, link.sender_expired) == (CLIENT, ORDER, True)


def test_what_comes_live_is_checked_by_the_bundle_of_now_alone(past: Past) -> None:
    task = past.task()
    past.refused(task, None)
    verifier = past.verifier()
    opened = verifier.open(task.frame, now_ms=LATER)
    verify_delegation(opened, verifier, now_ms=LATER, stored_at_ms=NOW + 2_000)
    with pytest.raises(DelegationRefusedError, match=NOBODY):  # also when it is known from a stream
        verify_delegation(opened, verifier, now_ms=LATER)


def test_what_was_stored_when_its_authority_had_left_is_refused(past: Past) -> None:
    """A link says by itself how old it is; only the stream's time says that it was there before."""
    task = past.task()
    past.links(task, LEFT - 1)
    for stored_at in (LEFT, LEFT + 1, LATER):
        past.refused(task, stored_at)


def test_a_link_that_was_signed_when_its_authority_had_left_is_refused(past: Past) -> None:
    """Whatever the stream says."""
    late = past.task(asked_ms=LEFT)
    for stored_at in (NOW, LEFT - 1, LEFT + 2_000):
        past.refused(late, stored_at)


def test_a_link_from_before_its_certificate_began_is_refused(past: Past) -> None:
    """The moment that counts for certificates is the link's own, not the stream's."""
    sealed = past.task(asked_ms=NOW - 2 * HOUR, iat=NOW - 2 * HOUR + 1_000)
    past.refused(sealed, NOW + 2_000, "does not verify")


def test_its_grace_is_counted_from_when_its_authority_left(past: Past) -> None:
    task = past.task()
    assert past.links(task, NOW + 2_000, now_ms=LEFT - 1 + GRACE)
    past.refused(task, NOW + 2_000, "expired", now_ms=LEFT + GRACE)


def test_who_remembers_nothing_believes_nothing(past: Past) -> None:
    task = past.task()
    past.history = None
    past.refused(task, NOW + 2_000)


def test_a_revoked_authority_vouches_for_no_link(past: Past) -> None:
    task = past.task()
    past.links(task, NOW + 2_000)
    old = next(iter(past.history.bundle_at(CLIENT.trust_domain, NOW, now_ms=LATER).authority_fingerprints))  # type: ignore[union-attr]
    past.revocations.replace(RevokedSet(authorities=frozenset({old})))
    past.refused(task, NOW + 2_000)


def reissued(past: Past, task: Sealed) -> Sealed:
    return past.world.call(CONTROL, PAYMENT, kind=Kind.REISSUE, id=task.head.id, iat=LATER, via=past.via)


@pytest.mark.parametrize("stored_at", [None, LATER])
def test_before_a_reissue_counts_when_the_control_role_had_the_task(
    past: Past, stored_at: int | None
) -> None:
    """The authority that left certified both who asked first and who submitted the task."""
    again = reissued(past, past.task(svid=past.order))
    verifier = past.verifier()
    opened = verifier.open(again.frame, now_ms=LATER)
    found = verify_delegation(opened, verifier, now_ms=LATER, stored_at_ms=stored_at)
    assert [one.iss for one in found] == [CLIENT, ORDER]
    assert requester(opened, found).iss == ORDER


def test_a_reissue_does_not_bring_back_a_link_that_had_no_authority_by_then(past: Past) -> None:
    """The task was signed by the new authority, when that of its link had left."""
    task = past.task(asked_ms=LEFT - 500, iat=LEFT + 500)
    past.refused(task, LEFT + 1_000)
    past.refused(reissued(past, task), LATER)
    past.links(reissued(past, past.task(asked_ms=LEFT - 1_500, iat=LEFT - 500)), LATER)


def test_of_several_links_each_has_the_authority_of_its_time(past: Past) -> None:
    first = past.world.call(CLIENT, GATEWAY, svid=past.client)
    second = past.world.call(GATEWAY, ORDER, iat=NOW + 1_000, exp=NOW + 20_000, via=(first.link,))
    via = (first.link, second.link)
    task = past.world.call(ORDER, PAYMENT, kind=Kind.TASK, iat=NOW + 2_000, exp=NOW + 20 * HOUR, via=via)
    assert [one.sender_expired for one in past.links(task, NOW + 3_000)] == [True, False]
