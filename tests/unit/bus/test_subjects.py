"""Subjects: building and parsing are inverse, nothing is shared, and no wildcard can be made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.bus.subjects import (
    MAX_SUBJECT_BYTES,
    Family,
    Priority,
    agent_prefix,
    announce_subject,
    api_inbox,
    call_subject,
    check_capability,
    claim_subject,
    control_subject,
    dead_subject,
    park_subject,
    parse_state_subject,
    parse_subject,
    progress_of_sender,
    progress_subject,
    pull_inbox,
    record_subject,
    records_of_sender,
    reply_inbox,
    reply_subject,
    step_subject,
    task_subject,
    wakeup_subject,
    wakeups_prefix,
)
from agentweave_bus.exceptions import ConfigurationError, MalformedEnvelopeError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.memory_subjects import matches

domains = st.from_regex(r"[a-z0-9._-]{1,40}", fullmatch=True)
segments = st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True).filter(lambda text: text not in {".", ".."})
agents = st.builds(
    lambda domain, path: SpiffeID(f"spiffe://{domain}/{'/'.join(path)}"),
    domains,
    st.lists(segments, min_size=1, max_size=5),
)
capabilities = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)
keys = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
counts = st.integers(0, 2**53 - 1)
KEY = "0a" * 32
ORDER = SpiffeID("spiffe://acme-corp.io/agent/billing")


def test_the_examples_of_the_documents():
    assert call_subject(ORDER, "process_billing") == "aw.call.acme-corp=io.agent/billing.process_billing"
    assert claim_subject(ORDER, "ab") == "aw.claim.acme-corp=io.agent/billing.ab"
    assert api_inbox(ORDER, "T") == "aw.inbox.acme-corp=io.agent/billing.T.api"
    assert reply_subject(ORDER, "T", "id") == reply_inbox(ORDER, "T") + ".id"
    assert reply_inbox(ORDER, "T") == "aw.inbox.acme-corp=io.agent/billing.T.rpc"
    assert pull_inbox(ORDER, "T") == "aw.inbox.acme-corp=io.agent/billing.T.api.pull"
    assert announce_subject(ORDER) == "aw.control.acme-corp=io.agent/billing.announce"


def test_the_examples_of_durable_tasks():
    me, shop = "acme-corp=io.agent/billing", SpiffeID("spiffe://shop.test/agent/web")
    assert task_subject(ORDER, "process_billing") == f"aw.task.{me}.process_billing"
    assert record_subject(ORDER, shop, KEY, 3) == f"aw.state.{me}.shop=test.agent/web.{KEY}.3"
    assert progress_subject(ORDER, shop, KEY, 0) == f"aw.progress.{me}.shop=test.agent/web.{KEY}.0"
    assert dead_subject(ORDER, "pay", KEY, 2, "frame") == f"aw.dead.{me}.pay.{KEY}.2.frame"
    assert control_subject(ORDER, "cancel") == f"aw.control.{me}.cancel"
    # 32 of the 64 digits of SHA-256 of the text
    assert step_subject(ORDER, KEY, "abc") == (f"aw.state.{me}.{me}.{KEY}.sba7816bf8f01cfea414140de5dae2223")


@given(agents, capabilities)
def test_what_is_built_parses_to_what_it_was_built_from(agent, capability):
    parsed = parse_subject(call_subject(agent, capability))
    assert (parsed.family, parsed.agent, parsed.rest) == (Family.CALL, agent, (capability,))


@given(agents, agents, capabilities, capabilities)
def test_each_priority_has_a_subject_of_its_own_that_a_grant_of_all_covers(one, other, cap, more):
    subjects = {task_subject(one, cap, priority) for priority in Priority}
    assert len(subjects) == len(Priority)
    assert task_subject(one, cap) in subjects
    for subject in subjects:
        parsed = parse_subject(subject)
        assert (parsed.family, parsed.agent) == (Family.TASK, one)
        assert parsed.rest[0].partition("=")[0] == cap
        assert matches(f"{agent_prefix(Family.TASK, one)}.*", subject)
    shared = subjects & {task_subject(other, more, priority) for priority in Priority}
    assert bool(shared) == ((one, cap) == (other, more))


@given(st.integers(0, 9), st.integers(0, 9))
def test_a_higher_level_never_waits_in_a_slower_queue(low, high):
    order = list(Priority)
    assert (order.index(Priority.of(high)) <= order.index(Priority.of(low))) or high < low
    assert Priority.of(None) is Priority.of(5) is Priority.NORMAL
    assert (Priority.of(0), Priority.of(9)) == (Priority.LOW, Priority.HIGH)


@given(agents, capabilities, counts)
def test_a_parked_task_stands_on_no_queue_and_its_wakeups_on_no_agents_subject(agent, cap, number):
    parsed = parse_subject(park_subject(agent, cap))
    assert (parsed.family, parsed.agent, parsed.rest) == (Family.PARK, agent, (cap,))
    plan, due = (wakeup_subject(agent.trust_domain, stage, "abc", number) for stage in ("plan", "due"))
    assert plan != due
    for subject in (plan, due):
        assert subject.startswith(f"{wakeups_prefix(agent.trust_domain)}.")
        assert subject.endswith(f".abc.{number}")


slots = st.tuples(agents, agents, keys, counts)


@given(agents, agents, keys, st.integers(0, 10**9 - 1), st.text(max_size=40))
def test_where_records_and_steps_stand_is_read_back(agent, sender, key, number, step):
    assert parse_state_subject(record_subject(agent, sender, key, number)) == (agent, sender, key, number)
    assert parse_state_subject(step_subject(agent, key, step)) == (agent, agent, key, None)


@pytest.mark.parametrize(
    "subject",
    [
        f"aw.progress.a=test.b.a=test.c.{KEY}.0",
        f"aw.state.a=test.b.a=test.c.{KEY}",
        f"aw.state.a=test.b.a=test.c.{KEY}.0.0",
        f"aw.state.a=test.b.a=test.c.{KEY}.00",
        f"aw.state.a=test.b.a=test.c.{KEY}.{10**9}",
        f"aw.state.a=test.b.a=test.c.{KEY}.s0",
        f"aw.state.a=test.b.a=test.c.{KEY}.s{'0' * 32}",
        f"aw.state.a=test.b.a=test/c.d.{KEY}.0",
        f"aw.state.a=test.b.a=test.c//d.{KEY}.0",
        f"aw.state.a=test.b.a=test.c.{KEY[1:]}.0",
    ],
)
def test_what_is_no_place_of_a_record_or_step_is_refused(subject):
    with pytest.raises(MalformedEnvelopeError):
        parse_state_subject(subject)


@given(slots, capabilities, st.text(max_size=40))
def test_what_is_built_of_a_task_parses_to_what_it_was_built_from(slot, cap, step):
    agent, sender, key, number = slot
    mine, theirs = (agent_prefix(Family.CALL, one).removeprefix("aw.call.") for one in (agent, sender))
    for subject, family, rest in [
        (task_subject(agent, cap), Family.TASK, cap),
        (record_subject(agent, sender, key, number), Family.STATE, f"{theirs}.{key}.{number}"),
        (progress_subject(agent, sender, key, number), Family.PROGRESS, f"{theirs}.{key}.{number}"),
        (dead_subject(agent, cap, key, number, "record"), Family.DEAD, f"{cap}.{key}.{number}.record"),
        (control_subject(agent, cap), Family.CONTROL, cap),
    ]:
        parsed = parse_subject(subject)
        assert (parsed.family, parsed.agent, ".".join(parsed.rest)) == (family, agent, rest)
    parsed = parse_subject(step_subject(agent, key, step))
    assert (parsed.family, parsed.agent) == (Family.STATE, agent)
    assert ".".join(parsed.rest).startswith(f"{mine}.{key}.s")


@given(slots, slots)
def test_no_two_records_share_a_slot_nor_do_records_and_steps(one, other):
    assert (record_subject(*one) == record_subject(*other)) == (one == other)
    assert (progress_subject(*one) == progress_subject(*other)) == (one == other)
    agent, _, key, number = one
    assert step_subject(agent, key, str(number)) != record_subject(agent, agent, key, number)


@given(slots, agents)
def test_a_sender_hears_of_its_own_tasks_only(slot, other):
    sender = slot[1]
    for pattern, subject in [
        (records_of_sender, record_subject(*slot)),
        (progress_of_sender, progress_subject(*slot)),
    ]:
        assert matches(pattern(sender), subject)
        assert matches(pattern(other), subject) == (other == sender)


@pytest.mark.parametrize(
    "build",
    [
        lambda: task_subject(ORDER, "*"),
        lambda: control_subject(ORDER, ">"),
        lambda: record_subject(ORDER, ORDER, "*", 0),
        lambda: record_subject(ORDER, ORDER, KEY.upper(), 0),
        lambda: record_subject(ORDER, ORDER, KEY, -1),
        lambda: progress_subject(ORDER, ORDER, KEY + ".x", 0),
        lambda: step_subject(ORDER, "", "charge"),
        lambda: dead_subject(ORDER, "pay", KEY, 1, "other"),
        lambda: dead_subject(ORDER, "a.b", KEY, 1, "frame"),
        lambda: dead_subject(ORDER, "pay", KEY, -1, "frame"),
        lambda: task_subject(ORDER, "pay=high"),
        lambda: park_subject(ORDER, "*"),
        lambda: wakeup_subject("x.test", "now", "a", 1),
        lambda: wakeup_subject("x.test", "due", "a.b", 1),
    ],
    ids=[
        "capability",
        "verb",
        "key",
        "upper case",
        "number",
        "two keys",
        "empty key",
        "part",
        "dot",
        "epoch",
        "priority",
        "parked",
        "stage",
        "place",
    ],
)
def test_what_would_be_another_subject_is_not_built(build):
    with pytest.raises(ConfigurationError):
        build()


@given(
    st.from_regex(
        r"aw\.(call|task|inbox)\.[A-Za-z0-9_=/-]{1,20}\.[A-Za-z0-9_=/-]{1,20}\.[a-z0-9]{1,5}", fullmatch=True
    )
)
def test_what_parses_is_built_again_byte_for_byte(subject):
    """So no two subjects can mean one agent."""
    try:
        parsed = parse_subject(subject)
    except MalformedEnvelopeError:
        return
    assert ".".join((agent_prefix(parsed.family, parsed.agent), *parsed.rest)) == subject


@given(st.tuples(agents, capabilities), st.tuples(agents, capabilities))
def test_no_two_share_a_subject(one, other):
    assert (call_subject(*one) == call_subject(*other)) == (one == other)


@given(agents, capabilities)
def test_no_token_is_a_wildcard_and_their_number_is_fixed(agent, capability):
    tokens = call_subject(agent, capability).split(".")
    assert len(tokens) == 5
    assert not any(mark in token for token in tokens for mark in "*> \t\r\n\0")
    assert all(tokens)


@given(st.text(max_size=70))
def test_what_is_a_capabilitys_name_is_one_plain_token(name):
    try:
        check_capability(name)
    except ConfigurationError:
        return
    assert name.isascii()
    assert not set(name) & set(".*> =/")
    assert len(name) <= 64


@pytest.mark.parametrize(
    "subject",
    [
        "", "aw", "aw.call.a.b", "xx.call.a.b.c", "aw.nothing.a.b.c", "aw.call..b.c", "aw.call.a.b.c d",
        "aw.call.*.b.c", "aw.call.a.>.c", "aw.call.a/b.c.d", "aw.call.A.b.c", "aw.call.a.b.c.", "aw.call.a./b.c",
        "aw.call.a.b//c.d", "aw.call.a.==.c", "aw.call.a.b.c\n", "aw.call.a.b.ü", "aw.call.a.b." + "c" * 1024,
    ],
    ids=lambda text: repr(text)[:30],
)  # fmt: skip
def test_what_is_no_subject_does_not_parse(subject):
    with pytest.raises(MalformedEnvelopeError):
        parse_subject(subject)


def test_a_trust_domain_has_no_subjects_and_long_ones_are_refused():
    with pytest.raises(ConfigurationError, match="is a trust domain"):
        call_subject(SpiffeID("spiffe://acme-corp.io"), "x")
    with pytest.raises(ConfigurationError, match=f"at most {MAX_SUBJECT_BYTES}"):
        call_subject(SpiffeID("spiffe://acme-corp.io/" + "a" * 1_020), "x")
