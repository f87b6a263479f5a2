"""When an envelope counts, and that it counts once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentweave_bus.envelope import (
    Head,
    Kind,
    OpenedEnvelope,
    ReplayFilter,
    check_time_now,
    check_time_reply,
    check_time_stored,
    claim_key,
)
from agentweave_bus.exceptions import TimeRefusedError
from tests.unit.envelope.world import CLIENT, HOUR, NOW, ORDER, PAYMENT, World

HASH = b"h" * 32


def head(world: World, **changes: Any) -> Head:
    return world.call(CLIENT, ORDER, **changes).head


@pytest.mark.parametrize("age", [-2_000, 0, 29_999])
def test_a_call_counts_now(world: World, age: int) -> None:
    check_time_now(head(world), NOW + age)


@pytest.mark.parametrize(
    ("age", "lifetime", "match"),
    [
        (-2_001, 30_000, "in the future"),
        (30_001, 60_000, "issued 30001 ms ago"),
        (30_000, 30_000, "expired"),
        (500, 400, "expired 100 ms ago"),
    ],
)
def test_a_call_of_another_time_is_refused(world: World, age: int, lifetime: int, match: str) -> None:
    with pytest.raises(TimeRefusedError, match=match):
        check_time_now(head(world, exp=NOW + lifetime), NOW + age)


def test_an_answer_counts_within_30_seconds_either_way(world: World) -> None:
    answer = head(world, kind=Kind.REPLY, re=HASH)
    for age in (-30_000, 0, 30_000):
        check_time_reply(answer, NOW + age)
    for age in (-30_001, 30_001):
        with pytest.raises(TimeRefusedError):
            check_time_reply(answer, NOW + age)


def task(world: World, *, certificate_ms: int = 24 * HOUR, **changes: Any) -> OpenedEnvelope:
    values = {"kind": Kind.TASK, "exp": NOW + 20 * HOUR} | changes
    svid = world.issue(CLIENT, lifetime_ms=certificate_ms)
    return world.open(world.call(CLIENT, ORDER, svid=svid, **values))


def test_a_stored_task_counts_until_it_expires(world: World) -> None:
    opened = task(world)
    assert check_time_stored(opened, now_ms=NOW + 10 * HOUR, stored_at_ms=NOW) is False
    with pytest.raises(TimeRefusedError, match="expired"):
        check_time_stored(opened, now_ms=NOW + 20 * HOUR, stored_at_ms=NOW)
    with pytest.raises(TimeRefusedError, match="future"):
        check_time_stored(opened, now_ms=NOW - 2_001, stored_at_ms=NOW)


def test_a_task_of_an_expired_sender_counts_when_it_was_stored_in_time(world: World) -> None:
    opened, later = task(world, certificate_ms=HOUR + 60_000), NOW + 5 * HOUR
    for stored in (NOW - 30_000, NOW, NOW + 30_000):
        assert check_time_stored(opened, now_ms=later, stored_at_ms=stored) is True
    for stored in (NOW - 30_001, NOW + 30_001):
        with pytest.raises(TimeRefusedError, match="stored"):
            check_time_stored(opened, now_ms=later, stored_at_ms=stored)


def test_a_task_stored_after_its_senders_certificate_ended_is_refused(world: World) -> None:
    opened = task(world, certificate_ms=HOUR + 10_000)
    with pytest.raises(TimeRefusedError, match="outside the validity"):
        check_time_stored(opened, now_ms=NOW + HOUR, stored_at_ms=NOW + 20_000)


def test_a_delayed_task_waits(world: World) -> None:
    opened = task(world, nbf=NOW + HOUR)
    with pytest.raises(TimeRefusedError, match="another 3600000 ms"):
        check_time_stored(opened, now_ms=NOW, stored_at_ms=NOW)
    check_time_stored(opened, now_ms=NOW, stored_at_ms=NOW, parked=True)
    check_time_stored(opened, now_ms=NOW + HOUR, stored_at_ms=NOW)


def test_a_record_is_evidence_for_as_long_as_it_is_kept(world: World) -> None:
    domain = type(CLIENT)(f"spiffe://{CLIENT.trust_domain}")
    record = world.open(world.call(ORDER, domain, "task.state", kind=Kind.RECORD, re=HASH))
    assert check_time_stored(record, now_ms=NOW + 10 * HOUR, stored_at_ms=NOW) is False


# --- replay -------------------------------------------------------------------------------------------


def test_a_digest_is_admitted_once() -> None:
    replays = ReplayFilter()
    assert replays.admit(HASH, NOW, CLIENT)
    assert not replays.admit(HASH, NOW, CLIENT)
    assert replays.admit(b"i" * 32, NOW, CLIENT)
    assert not replays.admit(HASH, NOW + 32_000, CLIENT)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 3)), max_size=40))
def test_nothing_is_admitted_twice_while_it_could_pass_the_check_of_time(
    steps: list[tuple[int, int]],
) -> None:
    replays, now_ms, admitted = ReplayFilter(), NOW, {}
    for wait, number in steps:
        now_ms += wait
        digest = number.to_bytes(32, "big")
        if replays.admit(digest, now_ms, CLIENT):
            assert now_ms - admitted.get(digest, -NOW) > 32_000
            admitted[digest] = now_ms


def test_a_digest_is_remembered_across_a_turn_of_generations() -> None:
    replays = ReplayFilter()
    assert replays.admit(b"i" * 32, NOW, CLIENT)
    assert replays.admit(HASH, NOW + 31_999, CLIENT)
    assert replays.admit(b"j" * 32, NOW + 32_001, CLIENT)  # a new generation begins
    assert not replays.admit(HASH, NOW + 32_002, CLIENT)
    assert not replays.admit(HASH, NOW + 31_999 + 32_000, CLIENT)


def test_a_digest_that_is_renewed_is_remembered_from_then_on() -> None:
    replays = ReplayFilter(max_entries=6)
    assert replays.admit(HASH, NOW, CLIENT, renew=True)
    for seconds in range(20, 300, 20):
        assert not replays.admit(HASH, NOW + seconds * 1_000, CLIENT, renew=True)
    assert len(replays) == 1
    assert sum(replays._young_of.values()) + sum(replays._old_of.values()) == 1
    assert not replays.admit(HASH, NOW + 311_000, CLIENT)  # what is not renewed is forgotten in time
    for seconds in (33, 66):
        replays.admit(b"i" * 32, NOW + (311 + seconds) * 1_000, CLIENT)
    assert replays.admit(HASH, NOW + 378_000, CLIENT)


def test_memory_is_bounded_and_given_back() -> None:
    replays = ReplayFilter(max_entries=6)
    digests = [bytes([n]) * 32 for n in range(5)]
    assert [replays.admit(one, NOW, CLIENT) for one in digests] == [True, True, True, False, False]
    assert len(replays) == 3
    assert digests[4] not in replays
    assert not replays.admit(digests[4], NOW + 32_001, CLIENT)  # one generation old: still remembered
    assert replays.admit(digests[4], NOW + 2 * 32_001, CLIENT)
    assert len(replays) == 1
    assert sum(replays._young_of.values()) + sum(replays._old_of.values()) == 1


def test_senders_that_take_all_they_can_leave_as_much_to_others() -> None:
    replays = ReplayFilter(max_entries=120)
    digests = (n.to_bytes(32, "big") for n in range(10_000))

    def taken(sender: str) -> int:
        count = 0
        while replays.admit(next(digests), NOW, sender):
            count += 1
        return count

    assert taken("greedy") == 60
    assert taken("another") == 30
    assert taken("greedy") == 0
    assert taken("a third") == 15
    for sender in ("a fourth", "a fifth"):
        assert replays.admit(next(digests), NOW, sender)


def test_a_clock_that_goes_back_forgets_nothing() -> None:
    replays = ReplayFilter()
    assert replays.admit(HASH, NOW, CLIENT)
    assert replays.admit(b"i" * 32, NOW - HOUR, CLIENT)
    assert not replays.admit(HASH, NOW, CLIENT)


def test_a_claims_key_can_not_be_reached_by_shifting_bytes() -> None:
    key = claim_key(CLIENT, ORDER, "do", "1")
    assert key == claim_key(str(CLIENT), str(ORDER), "do", "1")
    assert len(key) == 64
    others = [
        claim_key(CLIENT, ORDER, "do1", ""),
        claim_key(CLIENT, ORDER, "d", "o1"),
        claim_key(PAYMENT, ORDER, "do", "1"),
        claim_key(CLIENT, PAYMENT, "do", "1"),
        claim_key(CLIENT, ORDER, "do", "2"),
        claim_key(f"{CLIENT}s", str(ORDER)[1:], "do", "1"),
    ]
    assert key not in others
    assert len(set(others)) == len(others)
