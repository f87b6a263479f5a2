"""Subjects: building and parsing are inverse, nothing is shared, and no wildcard can be made."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.bus.subjects import (
    MAX_SUBJECT_BYTES,
    Family,
    agent_prefix,
    api_inbox,
    call_subject,
    check_capability,
    claim_subject,
    parse_subject,
    reply_inbox,
    reply_subject,
)
from agentweave_bus.exceptions import ConfigurationError, MalformedEnvelopeError
from agentweave_bus.spiffe_id import SpiffeID

domains = st.from_regex(r"[a-z0-9._-]{1,40}", fullmatch=True)
segments = st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True).filter(lambda text: text not in {".", ".."})
agents = st.builds(
    lambda domain, path: SpiffeID(f"spiffe://{domain}/{'/'.join(path)}"),
    domains,
    st.lists(segments, min_size=1, max_size=5),
)
capabilities = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)
ORDER = SpiffeID("spiffe://acme-corp.io/agent/billing")


def test_the_examples_of_the_documents():
    assert call_subject(ORDER, "process_billing") == "aw.call.acme-corp=io.agent/billing.process_billing"
    assert claim_subject(ORDER, "ab") == "aw.claim.acme-corp=io.agent/billing.ab"
    assert api_inbox(ORDER, "T") == "aw.inbox.acme-corp=io.agent/billing.T.api"
    assert reply_subject(ORDER, "T", "id") == reply_inbox(ORDER, "T") + ".id"
    assert reply_inbox(ORDER, "T") == "aw.inbox.acme-corp=io.agent/billing.T.rpc"


@given(agents, capabilities)
def test_what_is_built_parses_to_what_it_was_built_from(agent, capability):
    parsed = parse_subject(call_subject(agent, capability))
    assert (parsed.family, parsed.agent, parsed.rest) == (Family.CALL, agent, (capability,))


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
