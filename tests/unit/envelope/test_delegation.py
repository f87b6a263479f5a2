"""The six rules of delegation, each broken, and the honest flows that they must let through."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Kind,
    OpenedEnvelope,
    Proof,
    Sealed,
    VerifiedLink,
    covers,
    occurrence_id,
    permits,
    requester,
    verify_delegation,
)
from agentweave_bus.exceptions import ChainRefusedError, DelegationRefusedError, FederationError
from agentweave_bus.identity.authority import Authority
from agentweave_bus.identity.chain import ChainVerifier
from agentweave_bus.identity.revocation import RevocationList, RevokedSet
from tests.unit.envelope.world import (
    CLIENT,
    CONTROL,
    DOMAIN,
    GATEWAY,
    HOUR,
    NOW,
    ORDER,
    PAYMENT,
    START,
    Bundles,
    World,
    agent,
    extend_via,
)

HASH = b"h" * 32
TRUST_DOMAIN = type(CLIENT)(f"spiffe://{DOMAIN}")
EVENT_SUBJECT = "aw.event.acme=example.agent/order.order.created"
PRINCIPAL = {"iss": "https://login.example", "sub": "alice"}


def links(
    world: World, sealed: Sealed, *, now_ms: int = NOW, opened_ms: int | None = None, **options: Any
) -> tuple[VerifiedLink, ...]:
    verifier = world.verifier()
    opened = verifier.open(sealed.frame, now_ms=opened_ms or now_ms)
    return verify_delegation(opened, verifier, now_ms=now_ms, **options)


def refused(world: World, sealed: Sealed, rule: int, match: str, **options: Any) -> DelegationRefusedError:
    with pytest.raises(DelegationRefusedError, match=match) as caught:
        links(world, sealed, **options)
    assert caught.value.rule == rule
    return caught.value


def chain_to_order(world: World, **changes: Any) -> OpenedEnvelope:
    return world.open(world.call(CLIENT, ORDER, **changes))


# --- honest flows ---------------------------------------------------------------------------------------


def test_a_call_by_itself_has_no_links(world: World) -> None:
    assert links(world, world.call(CLIENT, GATEWAY)) == ()


def test_a_nested_call_shows_who_really_asked(world: World) -> None:
    scope = (f"{GATEWAY}#*", f"{ORDER}#*", f"{PAYMENT}#pay")
    first = world.open(world.call(CLIENT, GATEWAY, scope=scope, prn=PRINCIPAL))
    second = world.open(world.call(GATEWAY, ORDER, via=extend_via(first)))
    third = world.open(world.call(ORDER, PAYMENT, "pay", via=extend_via(second), scope=(f"{PAYMENT}#pay",)))
    verifier = world.verifier()
    found = verify_delegation(third, verifier, now_ms=NOW)
    assert [(one.iss, one.aud, one.cap, one.kind) for one in found] == [
        (CLIENT, GATEWAY, "do", Kind.CALL),
        (GATEWAY, ORDER, "do", Kind.CALL),
    ]
    assert found[0].principal == PRINCIPAL
    assert [one.digest for one in found] == [first.digest, second.digest]
    assert not any(one.sender_expired for one in found)
    who = requester(third, found)
    assert (who.iss, who.digest, who.via, who.reissued_by) == (ORDER, third.digest, found, None)
    assert who.principal == PRINCIPAL


def test_a_policy_sees_a_link_as_json(world: World) -> None:
    sealed = world.call(ORDER, PAYMENT, via=extend_via(chain_to_order(world)))
    (seen,) = [one.to_context() for one in links(world, sealed)]
    assert seen["iss"] == CLIENT
    assert type(seen["iss"]) is str
    assert seen["kind"] == "call"
    assert seen["digest"] == sealed.head.par.hex()  # type: ignore[union-attr]
    assert (seen["scope"], seen["reissued_by"], seen["sender_expired"]) == (None, None, False)


def test_a_durable_child_outlives_the_call_that_made_it(world: World) -> None:
    parent = chain_to_order(world)
    child = world.call(ORDER, PAYMENT, kind=Kind.TASK, exp=NOW + 20 * HOUR, via=extend_via(parent))
    later = NOW + 10 * HOUR  # the call is long over; the certificates (24 h) are not
    assert [one.iss for one in links(world, child, now_ms=later)] == [CLIENT]


def test_a_call_from_an_event_handler_says_that_it_was_an_event(world: World) -> None:
    event = world.open(order_created(world))
    sealed = world.call(PAYMENT, GATEWAY, via=extend_via(event))
    (link,) = links(world, sealed)
    assert (link.kind, link.iss, link.aud, link.cap) == (Kind.EVENT, ORDER, TRUST_DOMAIN, "order.created")


def order_created(world: World, **changes: Any) -> Sealed:
    return world.call(
        ORDER, TRUST_DOMAIN, "order.created", kind=Kind.EVENT, **({"sub": EVENT_SUBJECT} | changes)
    )


def test_a_task_may_run_longer_than_its_senders_certificate_lives(world: World) -> None:
    """The sender's SVID lives one hour; the task calls on three hours later."""
    short = world.issue(CLIENT, lifetime_ms=HOUR + 60_000)
    task = world.open(world.call(CLIENT, ORDER, kind=Kind.TASK, exp=NOW + 20 * HOUR, svid=short))
    later = NOW + 3 * HOUR
    nested = world.call(ORDER, PAYMENT, iat=later, via=extend_via(task))
    (link,) = links(world, nested, now_ms=later)
    assert link.sender_expired
    assert not links(world, nested, now_ms=NOW + 30_000, opened_ms=later)[0].sender_expired


def test_a_longer_grace_can_be_chosen_and_has_a_limit(world: World) -> None:
    short = world.issue(CLIENT, lifetime_ms=HOUR + 60_000)
    task = world.open(world.call(CLIENT, ORDER, kind=Kind.TASK, exp=NOW + 20 * HOUR, svid=short))
    later = NOW + 6 * HOUR
    nested = world.call(ORDER, PAYMENT, iat=later, via=extend_via(task))
    refused(world, nested, 5, "expired .* ago", now_ms=later)
    assert links(world, nested, now_ms=later, link_grace_ms=6 * HOUR)[0].sender_expired
    with pytest.raises(ValueError, match="link_grace_ms"):
        links(world, nested, now_ms=later, link_grace_ms=25 * HOUR)


# --- honest reissues ----------------------------------------------------------------------------------


def task_of(world: World, **changes: Any) -> OpenedEnvelope:
    return world.open(world.call(CLIENT, ORDER, kind=Kind.TASK, **changes))


def reissue(world: World, task: OpenedEnvelope, *, honest: bool = True, **changes: Any) -> Sealed:
    seal = world.call if honest else world.forge
    values = {"id": task.head.id, "iat": NOW + 8 * HOUR, "cap": task.head.cap} | changes
    payload: dict[str, Any] = {"payload": {"n": 1}} if honest else {}
    return seal(
        values.pop("iss", CONTROL),
        values.pop("aud", ORDER),
        kind=Kind.REISSUE,
        via=extend_via(task),
        **payload,
        **values,
    )


def test_a_reissue_stands_in_its_tasks_place(world: World) -> None:
    """Eight hours later, when task and sender have expired, the worker is asked in the sender's name."""
    short = world.issue(CLIENT, lifetime_ms=HOUR + 60_000)
    task = task_of(world, svid=short)
    later = NOW + 8 * HOUR
    verifier = world.verifier()
    opened = verifier.open(reissue(world, task).frame, now_ms=later)
    who = requester(opened, verify_delegation(opened, verifier, now_ms=later))
    assert (who.iss, who.digest, who.via) == (CLIENT, task.digest, ())
    assert who.reissued_by == CONTROL
    assert who.sender_expired


def test_a_call_from_a_reissued_task_has_one_link_for_the_two(world: World) -> None:
    origin = world.open(world.call(CLIENT, GATEWAY, prn=PRINCIPAL, scope=(f"{GATEWAY}#*", f"{ORDER}#*")))
    task = world.open(world.call(GATEWAY, ORDER, kind=Kind.TASK, via=extend_via(origin)))
    later = NOW + 8 * HOUR
    verifier = world.verifier()
    again = verifier.open(reissue(world, task, honest=True).frame, now_ms=later)
    nested = world.call(ORDER, ORDER, iat=later, via=extend_via(again))
    found = links(world, nested, now_ms=later)
    assert [(one.iss, one.aud, one.reissued_by) for one in found] == [
        (CLIENT, GATEWAY, None),
        (GATEWAY, ORDER, CONTROL),
    ]
    assert found[1].digest == task.digest
    assert found[1].kind is Kind.TASK


def test_links_before_a_reissue_are_judged_when_the_task_was_sealed(world: World) -> None:
    """The origin expired six hours ago; a plain link would be refused, one before a reissue is not."""
    short = world.issue(CLIENT, lifetime_ms=HOUR + 60_000)
    origin = world.open(world.call(CLIENT, GATEWAY, svid=short))
    task = world.open(world.call(GATEWAY, ORDER, kind=Kind.TASK, exp=NOW + 20 * HOUR, via=extend_via(origin)))
    later = NOW + 8 * HOUR
    nested = world.call(ORDER, PAYMENT, iat=later, via=extend_via(task))
    refused(world, nested, 5, "expired", now_ms=later)
    again = world.verifier().open(reissue(world, task).frame, now_ms=later)
    nested = world.call(ORDER, PAYMENT, iat=later, via=extend_via(again))
    assert [one.sender_expired for one in links(world, nested, now_ms=later)] == [True, False]


def test_an_occurrence_of_a_recurring_task_has_an_id_of_its_own(world: World) -> None:
    task, at = task_of(world, every="PT1H"), NOW + 8 * HOUR
    occurrence = reissue(world, task, id=occurrence_id(task.head.id, at), nbf=at)
    assert links(world, occurrence, now_ms=at)[0].id == task.head.id
    wrong = reissue(world, task, honest=False, id=occurrence_id(task.head.id, at + 1), nbf=at)
    refused(world, wrong, 3, "has an id", now_ms=at)
    once = task_of(world)
    wrong = reissue(world, once, honest=False, id=occurrence_id(once.head.id, at), nbf=at)
    refused(world, wrong, 3, "has an id", now_ms=at)


# --- rule 1 -------------------------------------------------------------------------------------------


def answer(world: World, **changes: Any) -> Sealed:
    return world.call(CLIENT, ORDER, kind=Kind.REPLY, re=HASH, **changes)


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.REFUSAL, Kind.PROGRESS, Kind.CONTROL, Kind.RECORD])
@pytest.mark.parametrize("key", ["via", "scope", "prn"])
def test_rule_1_only_requests_have_delegation(world: World, kind: Kind, key: str) -> None:
    given: dict[str, Any] = {
        "via": {"via": extend_via(chain_to_order(world))},
        "scope": {"scope": (f"{PAYMENT}#*",)},
        "prn": {"prn": PRINCIPAL},
    }[key]
    if kind is Kind.RECORD:
        given["aud"] = TRUST_DOMAIN
    aud = given.pop("aud", PAYMENT)
    more = {"seq": 0} if kind is Kind.PROGRESS else {}
    refused(world, world.forge(ORDER, aud, kind=kind, re=HASH, **more, **given), 1, "has no via")


def test_rule_1_a_reply_to_me_is_no_request_of_mine(world: World) -> None:
    reply = world.open(answer(world))
    refused(world, world.forge(ORDER, PAYMENT, via=(reply.link,)), 1, "is no request")
    with pytest.raises(DelegationRefusedError) as caught:
        extend_via(reply)
    assert caught.value.rule == 1


def test_rule_1_a_link_that_does_not_parse_is_no_request(world: World) -> None:
    broken = replace(chain_to_order(world).link, head_bytes=b"\x80", _head=None, _digest=None)
    refused(world, world.forge(ORDER, PAYMENT, via=(broken,)), 1, "malformed")


def test_rule_1_at_most_eight_links(world: World) -> None:
    opened = world.open(world.call(ORDER, ORDER))
    for _ in range(8):
        opened = world.open(world.call(ORDER, ORDER, via=extend_via(opened)))
    assert len(links(world, world.call(ORDER, ORDER, via=opened.via))) == 8
    with pytest.raises(DelegationRefusedError, match="at most 8"):
        world.call(ORDER, ORDER, via=extend_via(opened))


# --- rule 2 -------------------------------------------------------------------------------------------


def two_links(world: World) -> OpenedEnvelope:
    first = world.open(world.call(CLIENT, GATEWAY))
    return world.open(world.call(GATEWAY, ORDER, via=extend_via(first)))


def test_rule_2_the_origin_can_not_be_cut_off(world: World) -> None:
    via = extend_via(two_links(world))
    refused(world, world.forge(ORDER, PAYMENT, via=via[1:]), 2, "cut off")


def test_rule_2_the_middle_can_not_be_cut_out(world: World) -> None:
    second = two_links(world)
    third = world.open(world.call(ORDER, PAYMENT, via=extend_via(second)))
    via = extend_via(third)
    refused(world, world.forge(PAYMENT, CLIENT, via=(via[0], via[2])), 2, "does not follow")


def test_rule_2_via_needs_par_and_par_needs_via(world: World) -> None:
    via = extend_via(chain_to_order(world))
    refused(world, world.forge(ORDER, PAYMENT, via=via, par=None), 2, "does not follow")
    refused(world, world.forge(ORDER, PAYMENT, par=via[0].digest), 2, "cut off")


def test_rule_2_another_request_can_not_be_grafted_in(world: World) -> None:
    one, other = chain_to_order(world), chain_to_order(world)
    refused(world, world.forge(ORDER, PAYMENT, via=extend_via(one), par=other.digest), 2, "does not follow")


def test_rule_2_only_the_origin_names_a_principal(world: World) -> None:
    scope = (f"{ORDER}#*", f"{PAYMENT}#*")
    via = extend_via(chain_to_order(world, scope=scope))
    refused(world, world.forge(ORDER, PAYMENT, via=via, scope=scope, prn=PRINCIPAL), 2, "principal")


# --- rule 3 -------------------------------------------------------------------------------------------


def test_rule_3_a_request_to_another_is_not_mine_to_act_on(world: World) -> None:
    seen = world.open(world.call(CLIENT, GATEWAY))
    refused(world, world.forge(ORDER, PAYMENT, via=extend_via(seen)), 3, "acts on a request to")


def test_rule_3_also_further_up_the_chain(world: World) -> None:
    seen = world.open(world.call(CLIENT, GATEWAY))
    stolen = world.forge(ORDER, PAYMENT, via=extend_via(seen))
    nested = world.forge(PAYMENT, CLIENT, via=(*extend_via(seen), stolen.link))
    refused(world, nested, 3, "acts on a request to")


@pytest.mark.parametrize(
    "changes",
    [
        {"sub": "aw.event.other=example.agent/order.order.created"},
        {"sub": "aw.event.acme=example.agent/payment.order.created"},
        {"sub": "aw.event.acme=example.agent/order.order.paid"},
        {"aud": type(CLIENT)("spiffe://other.example")},
    ],
    ids=["another domain", "another agent", "another event", "another audience"],
)
def test_rule_3_an_event_link_was_published_on_its_own_subject(world: World, changes: dict[str, Any]) -> None:
    values = {"sub": EVENT_SUBJECT, "aud": TRUST_DOMAIN} | changes
    event = world.forge(ORDER, values.pop("aud"), "order.created", kind=Kind.EVENT, **values)
    refused(world, world.forge(PAYMENT, GATEWAY, via=(event.link,)), 3, "subject that is not its own")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"iss": GATEWAY}, "not the control role"),
        ({"iss": type(CLIENT)("spiffe://acme.example/agentweave/control2")}, "not the control role"),
        ({"aud": PAYMENT}, "changes 'aud'"),
        ({"cap": "undo"}, "changes 'cap'"),
        ({"ct": "text/plain"}, "changes 'ct'"),
        ({"payload_bytes": b"\xc0"}, "changes 'pd'"),
        ({"scope": (f"{ORDER}#do",)}, "changes 'scope'"),
        ({"id": occurrence_id("019b0000-0000-7000-8000-000000000000", 1)}, "has an id"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rule_3_a_reissue_is_the_control_roles_and_changes_nothing(
    world: World, changes: dict[str, Any], match: str
) -> None:
    forged = reissue(world, task_of(world), honest=False, **changes)
    refused(world, forged, 3, match, now_ms=NOW + 8 * HOUR)


def test_rule_3_only_a_task_is_reissued(world: World) -> None:
    call = chain_to_order(world)
    refused(world, reissue(world, call, honest=False), 3, "a call can't be reissued", now_ms=NOW + 8 * HOUR)
    again = world.verifier().open(reissue(world, task_of(world)).frame, now_ms=NOW + 8 * HOUR)
    twice = reissue(world, again, honest=False)
    refused(world, twice, 3, "a reissue can't be reissued", now_ms=NOW + 8 * HOUR)


def test_rule_3_a_reissue_without_its_task_is_nothing(world: World) -> None:
    alone = world.forge(CONTROL, ORDER, kind=Kind.REISSUE)
    refused(world, alone, 3, "without the task")
    nested = world.forge(ORDER, PAYMENT, via=(alone.link,))
    refused(world, nested, 3, "without the task")


# --- rule 4 -------------------------------------------------------------------------------------------


def test_rule_4_nobody_acts_on_an_expired_request(world: World) -> None:
    parent = chain_to_order(world)
    late = parent.head.exp
    sealed = world.forge(ORDER, PAYMENT, kind=Kind.TASK, iat=late, via=extend_via(parent))
    refused(world, sealed, 4, "had expired", now_ms=late)
    in_time = world.call(ORDER, PAYMENT, kind=Kind.TASK, iat=late - 1, via=extend_via(parent))
    assert len(links(world, in_time, now_ms=late)) == 1


def test_rule_4_time_does_not_go_back(world: World) -> None:
    parent = chain_to_order(world)
    earlier = world.forge(ORDER, PAYMENT, iat=NOW - 2_001, via=extend_via(parent))
    refused(world, earlier, 4, "before the one")
    slack = world.call(ORDER, PAYMENT, iat=NOW - 2_000, via=extend_via(parent))
    assert len(links(world, slack)) == 1


def test_rule_4_a_call_ends_no_later_than_what_it_serves(world: World) -> None:
    parent = chain_to_order(world)
    longer = world.forge(ORDER, PAYMENT, exp=parent.head.exp + 1, via=extend_via(parent))
    refused(world, longer, 4, "later end")
    with pytest.raises(DelegationRefusedError, match="later end"):  # the sealer says so first
        world.call(ORDER, PAYMENT, exp=parent.head.exp + 1, via=extend_via(parent))


# --- rule 5 -------------------------------------------------------------------------------------------


def test_rule_5_a_link_needs_its_senders_signature(world: World) -> None:
    parent = chain_to_order(world)
    other = chain_to_order(world).link.proof.signature
    forged = replace(parent.link, proof=Proof(other, 1, 0, ()))
    cause = refused(world, world.forge(ORDER, PAYMENT, via=(forged,)), 5, "signature").__cause__
    assert type(cause).__name__ == "SignatureRefusedError"


def test_rule_5_a_link_is_signed_by_its_iss(world: World) -> None:
    forged = world.forge(PAYMENT, ORDER, raw={"iss": str(CLIENT)})
    refused(world, world.forge(ORDER, PAYMENT, via=(forged.link,)), 5, "in the name of")
    other = world.issue(CLIENT)
    forged = world.forge(CLIENT, ORDER, raw={"x5t": other.x5t})
    refused(world, world.forge(ORDER, PAYMENT, via=(forged.link,)), 5, "another certificate")


def test_rule_5_a_certificate_must_have_been_valid_when_the_link_was_issued(world: World) -> None:
    later = world.issue(CLIENT, not_before=START + timedelta(hours=2))
    forged = world.forge(CLIENT, ORDER, svid=later)
    cause = refused(world, world.forge(ORDER, PAYMENT, via=(forged.link,)), 5, "does not verify").__cause__
    assert isinstance(cause, ChainRefusedError)


def test_rule_5_an_authority_of_another_domain_proves_nothing(world: World) -> None:
    stranger = Authority("other.example", not_before=START).issue(
        CLIENT, not_before=START, allow_foreign=True
    )
    forged = world.forge(CLIENT, ORDER, svid=stranger)
    refused(world, world.forge(ORDER, PAYMENT, via=(forged.link,)), 5, "does not verify")


def test_rule_5_a_domain_that_is_not_allowed_is_the_cause(world: World) -> None:
    other = agent("x", "other.example")
    stranger = Authority("other.example", not_before=START).issue(other, not_before=START)
    link = world.forge(other, ORDER, svid=stranger).link
    cause = refused(world, world.forge(ORDER, PAYMENT, via=(link,)), 5, "not allowed").__cause__
    assert isinstance(cause, FederationError)


def test_rule_5_a_revoked_sender_is_refused_in_links_too(world: World) -> None:
    parent = chain_to_order(world)
    sealed = world.call(ORDER, PAYMENT, via=extend_via(parent))
    revocations = RevocationList()
    verifier = EnvelopeVerifier(ChainVerifier(Bundles(world.authority.bundle), revocations=revocations))
    opened = verifier.open(sealed.frame, now_ms=NOW)
    assert len(verify_delegation(opened, verifier, now_ms=NOW)) == 1
    revocations.replace(RevokedSet(spiffe_ids=frozenset({str(CLIENT)})))
    with pytest.raises(DelegationRefusedError, match="revoked") as caught:
        verify_delegation(opened, verifier, now_ms=NOW)
    assert caught.value.rule == 5


# --- rule 6 -------------------------------------------------------------------------------------------


def scoped(world: World, *entries: str) -> OpenedEnvelope:
    return chain_to_order(world, scope=(f"{ORDER}#*", *entries))


def test_rule_6_a_scope_is_kept(world: World) -> None:
    via = extend_via(scoped(world, f"{PAYMENT}#*"))
    refused(world, world.forge(ORDER, PAYMENT, via=via), 6, "dropped the scope")


@pytest.mark.parametrize("wider", [f"{GATEWAY}#do", f"{PAYMENT}#*", f"{PAYMENT}#refund", f"{PAYMENT}x#pay"])
def test_rule_6_a_scope_never_widens(world: World, wider: str) -> None:
    via = extend_via(scoped(world, f"{PAYMENT}#pay"))
    scope = (f"{PAYMENT}#pay", wider)
    refused(world, world.forge(ORDER, PAYMENT, "pay", via=via, scope=scope), 6, "widened")


def test_rule_6_nobody_asks_outside_the_scope(world: World) -> None:
    via = extend_via(scoped(world, f"{PAYMENT}#pay"))
    scope = (f"{PAYMENT}#pay",)
    refused(world, world.forge(ORDER, PAYMENT, "refund", via=via, scope=scope), 6, "outside the scope")
    refused(world, world.forge(CLIENT, ORDER, scope=scope), 6, "outside the scope")


def test_rule_6_a_principal_needs_a_scope(world: World) -> None:
    refused(world, world.forge(CLIENT, ORDER, prn=PRINCIPAL), 6, "limits its scope")


def test_a_scope_that_is_not_named_is_inherited(world: World) -> None:
    parent = scoped(world, f"{PAYMENT}#pay")
    sealed = world.call(ORDER, PAYMENT, "pay", via=extend_via(parent))
    assert sealed.head.scope == parent.head.scope
    assert len(links(world, sealed)) == 1


def test_scope_entries() -> None:
    assert covers(f"{ORDER}#*", f"{ORDER}#do")
    assert covers(f"{ORDER}#*", f"{ORDER}#*")
    assert covers(f"{ORDER}#do", f"{ORDER}#do")
    assert not covers(f"{ORDER}#do", f"{ORDER}#*")
    assert not covers(f"{ORDER}#do", f"{ORDER}#dont")
    assert not covers(f"{ORDER}#*", f"{ORDER}2#do")
    assert permits((f"{ORDER}#do",), ORDER, "do")
    assert permits((f"{ORDER}#*",), ORDER, "do")
    assert not permits((f"{ORDER}#do",), ORDER, "undo")
    assert not permits((f"{ORDER}#*",), PAYMENT, "do")
