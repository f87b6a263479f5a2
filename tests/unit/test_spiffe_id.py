"""The grammar of SPIFFE IDs, by example and by property."""

from __future__ import annotations

import copy
import json
import pickle
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentweave_bus.exceptions import AgentWeaveError, InvalidSpiffeIdError
from agentweave_bus.spiffe_id import (
    MAX_SPIFFE_ID_BYTES,
    MAX_TRUST_DOMAIN_BYTES,
    SpiffeID,
    check_trust_domain,
)

_DOMAIN = st.text("abcdefghijklmnopqrstuvwxyz0123456789._-", min_size=1, max_size=60)
_SEGMENT = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=30).filter(
    lambda text: text not in {".", ".."}
)


@given(_DOMAIN, st.lists(_SEGMENT, max_size=5))
def test_every_id_of_the_grammar_is_taken_apart_as_it_was_put_together(domain, segments):
    spiffe_id = SpiffeID.of(domain, *segments)
    assert spiffe_id == "spiffe://" + "/".join([domain, *segments])
    assert spiffe_id.trust_domain == domain
    assert spiffe_id.path == "".join("/" + one for one in segments)
    assert SpiffeID(str(spiffe_id)) == spiffe_id


@given(_DOMAIN, st.lists(_SEGMENT, min_size=1, max_size=3), st.characters(), st.data())
@example("a.io", ["x"], "\n", None)
def test_a_character_outside_the_grammar_is_refused_wherever_it_stands(domain, segments, character, data):
    text = SpiffeID.of(domain, *segments)
    allowed = set(string.ascii_letters + string.digits + "._-/:")
    if character in allowed:
        return
    at = len(text) if data is None else data.draw(st.integers(0, len(text)))
    with pytest.raises(InvalidSpiffeIdError):
        SpiffeID(text[:at] + character + text[at:])


@given(st.text(max_size=80))
def test_whatever_is_accepted_rebuilds_to_itself(text):
    try:
        spiffe_id = SpiffeID(text)
    except InvalidSpiffeIdError:
        return
    assert SpiffeID.of(spiffe_id.trust_domain, *spiffe_id.path.split("/")[1:]) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://",
        "spiffe:///x",
        "https://a.io/x",
        "SPIFFE://a.io/x",
        "spiffe://A.io/x",
        "spiffe://a.io/",
        "spiffe://a.io/x/",
        "spiffe://a.io//x",
        "spiffe://a.io/./x",
        "spiffe://a.io/../x",
        "spiffe://a.io/x\n",
        "\nspiffe://a.io/x",
        "spiffe://a.io/x%2e",
        "spiffe://a.io/ä",
        "spiffe://a.io:8080/x",
        "spiffe://user@a.io/x",
        "spiffe://a.io/x?y=1",
        "spiffe://a.io/x#y",
        "spiffe://a.io/*",
        "spiffe://a.io/x y",
        "spiffe://" + "a" * (MAX_TRUST_DOMAIN_BYTES + 1) + "/x",
        "spiffe://a.io/" + "x" * MAX_SPIFFE_ID_BYTES,
    ],
)
def test_what_lenient_parsers_let_through_is_refused(text):
    with pytest.raises(InvalidSpiffeIdError) as refusal:
        SpiffeID(text)
    assert isinstance(refusal.value, ValueError)
    assert isinstance(refusal.value, AgentWeaveError)
    assert len(str(refusal.value)) < 3000


def test_the_longest_id_and_domain_are_taken():
    assert SpiffeID("spiffe://" + "a" * MAX_TRUST_DOMAIN_BYTES + "/x").path == "/x"
    prefix = "spiffe://a.io/"
    assert len(SpiffeID(prefix + "x" * (MAX_SPIFFE_ID_BYTES - len(prefix)))) == MAX_SPIFFE_ID_BYTES


def test_an_id_is_text_everywhere():
    spiffe_id = SpiffeID("spiffe://a.io/agent/x")
    assert json.dumps({"id": spiffe_id}) == '{"id": "spiffe://a.io/agent/x"}'
    assert {spiffe_id: 1}["spiffe://a.io/agent/x"] == 1
    assert SpiffeID(spiffe_id) is spiffe_id
    assert repr(spiffe_id) == "SpiffeID('spiffe://a.io/agent/x')"
    for same in (pickle.loads(pickle.dumps(spiffe_id)), copy.deepcopy(spiffe_id)):
        assert same == spiffe_id
        assert (same.trust_domain, same.path) == ("a.io", "/agent/x")


def test_a_trust_domain_has_its_own_id_without_a_path():
    assert SpiffeID("spiffe://a.io").path == ""
    assert check_trust_domain("a.io") == "a.io"
    with pytest.raises(InvalidSpiffeIdError, match="lower-case"):
        check_trust_domain("A.io")
