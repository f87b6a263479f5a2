"""The strict parser of heads: exact types, known keys, and what each kind has."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from agentweave_bus.envelope import Kind, parse_head
from agentweave_bus.envelope.codec import pack
from agentweave_bus.exceptions import MalformedEnvelopeError
from tests.unit.envelope.world import CLIENT, DOMAIN, NOW, ORDER, PAYMENT

HASH = b"h" * 32
TRUST_DOMAIN = f"spiffe://{DOMAIN}"

CALL: dict[str, Any] = {
    "kind": "call",
    "id": "019b0000-0000-7000-8000-000000000001",
    "iss": str(CLIENT),
    "x5t": HASH,
    "aud": str(ORDER),
    "cap": "create_order",
    "sub": "aw.call.acme=example.agent/order.create_order",
    "iat": NOW,
    "exp": NOW + 30_000,
    "pd": HASH,
    "ct": "application/vnd.agentweave.json+msgpack",
}
EXTRA: dict[Kind, dict[str, Any]] = {
    Kind.CALL: {},
    Kind.TASK: {"nbf": NOW + 5, "every": "PT1H", "prio": 0, "retry": {"attempts": 3}, "idk": "k"},
    Kind.REPLY: {"re": HASH},
    Kind.REFUSAL: {"re": HASH},
    Kind.EVENT: {"aud": TRUST_DOMAIN, "cap": "order.created"},
    Kind.PROGRESS: {"re": HASH, "seq": 0},
    Kind.CONTROL: {"re": HASH, "reply": "A" * 22},
    Kind.REISSUE: {"att": 2, "nbf": NOW},
    Kind.RECORD: {"aud": TRUST_DOMAIN, "cap": "task.state", "re": HASH, "seq": 1, "prev": HASH},
}


def head(of: Kind = Kind.CALL, /, **changes: Any) -> bytes:
    value = CALL | {"kind": of.value} | EXTRA[of] | changes
    return pack({key: item for key, item in value.items() if item is not ...})


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_has_a_head(kind: Kind) -> None:
    assert parse_head(head(kind)).kind is kind


@pytest.mark.parametrize("key", CALL)
def test_no_required_key_may_be_missing(key: str) -> None:
    with pytest.raises(MalformedEnvelopeError, match=f"lacks: {key}"):
        parse_head(head(**{key: ...}))


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (Kind.CALL, {"alg": "none"}, "unknown key: 'alg'"),
        (Kind.CALL, {"kind": "request"}, "no kind"),
        (Kind.CALL, {"kind": 1}, "no kind"),
        (Kind.CALL, {"id": "019B0000-0000-7000-8000-000000000001"}, "'id'"),
        (Kind.CALL, {"id": "019b0000-0000-4000-8000-000000000001"}, "'id'"),
        (Kind.CALL, {"id": "019b0000-0000-7000-8000-000000000001\n"}, "'id'"),
        (Kind.CALL, {"iss": str(CLIENT) + "\n"}, "'iss'"),
        (Kind.CALL, {"iss": TRUST_DOMAIN}, "'iss' is a trust domain"),
        (Kind.CALL, {"iss": b"spiffe://a/b"}, "'iss'"),
        (Kind.CALL, {"aud": TRUST_DOMAIN}, "must be a workload"),
        (Kind.EVENT, {"aud": str(ORDER)}, "must be a trust domain"),
        (Kind.RECORD, {"aud": str(ORDER)}, "must be a trust domain"),
        (Kind.CALL, {"x5t": HASH[:31]}, "32 bytes"),
        (Kind.CALL, {"x5t": "h" * 32}, "32 bytes"),
        (Kind.CALL, {"pd": HASH + b"h"}, "32 bytes"),
        (Kind.CALL, {"cap": "create.order"}, "'cap'"),
        (Kind.CALL, {"cap": "Create"}, "'cap'"),
        (Kind.CALL, {"cap": "x" * 65}, "'cap'"),
        (Kind.EVENT, {"cap": "a..b"}, "'cap'"),
        (Kind.CALL, {"sub": "aw.call.>"}, "'sub'"),
        (Kind.CALL, {"sub": "aw.*.x"}, "'sub'"),
        (Kind.CALL, {"sub": "aw call"}, "'sub'"),
        (Kind.CALL, {"sub": "a" * 1025}, "'sub'"),
        (Kind.CALL, {"ct": "JSON"}, "'ct'"),
        (Kind.CALL, {"iat": True}, "'iat'"),
        (Kind.CALL, {"iat": float(NOW)}, "'iat'"),
        (Kind.CALL, {"iat": -1}, "'iat' is no integer from 0"),
        (Kind.CALL, {"exp": 2**53}, "'exp' is no integer from 0"),
        (Kind.REISSUE, {"att": -1}, "'att' is no integer from 0"),
        (Kind.REISSUE, {"att": 2**53}, "'att' is no integer from 0"),
        (Kind.PROGRESS, {"seq": -1}, "'seq' is no integer from 0"),
        (Kind.PROGRESS, {"seq": 2**53, "prev": HASH}, "'seq' is no integer from 0"),
        (Kind.CALL, {"exp": NOW}, "'exp' must lie after"),
        (Kind.CALL, {"exp": NOW + 3_600_001}, "'exp' must lie after"),
        (Kind.TASK, {"exp": NOW + 31 * 86_400_000 + 1}, "'exp' must lie after"),
        (Kind.TASK, {"nbf": NOW + 30_000}, "'nbf' must lie before"),
        (Kind.CALL, {"nbf": NOW + 1}, "a call has no key nbf"),
        (Kind.CALL, {"re": HASH}, "a call has no key re"),
        (Kind.CALL, {"att": 1}, "a call has no key att"),
        (Kind.TASK, {"att": 1}, "a task has no key att"),
        (Kind.REPLY, {"reply": "A" * 22}, "a reply has no key reply"),
        (Kind.REPLY, {"re": ...}, "says in 're'"),
        (Kind.REFUSAL, {"re": ...}, "says in 're'"),
        (Kind.PROGRESS, {"re": ...}, "says in 're'"),
        (Kind.PROGRESS, {"seq": ...}, "has a 'seq'"),
        (Kind.PROGRESS, {"seq": 1}, "'prev' stands"),
        (Kind.PROGRESS, {"prev": HASH}, "'prev' stands"),
        (Kind.RECORD, {"seq": ...}, "'prev' stands"),
        (Kind.CALL, {"scope": []}, "'scope'"),
        (Kind.CALL, {"scope": [f"{PAYMENT}"]}, "'scope'"),
        (Kind.CALL, {"scope": [f"{PAYMENT}#a b"]}, "'scope'"),
        (Kind.CALL, {"scope": [f"{PAYMENT}/#*"]}, "'scope'"),
        (Kind.CALL, {"scope": [1]}, "'scope'"),
        (Kind.CALL, {"scope": f"{PAYMENT}#*"}, "'scope'"),
        (Kind.CALL, {"scope": [f"{PAYMENT}#*"] * 65}, "not readable"),
        (Kind.CALL, {"prn": {"iss": "x"}}, "'prn'"),
        (Kind.CALL, {"prn": {"iss": "x", "sub": 7}}, "'prn.sub'"),
        (Kind.CALL, {"prn": {"iss": "x", "sub": {"a": "b"}}}, "'prn.sub'"),
        (Kind.CALL, {"prn": {"iss": "x", "sub": "y", "A": "z"}}, "'prn'"),
        (Kind.CALL, {"prn": {"iss": "x", "sub": "y"} | {f"k{n}": "v" for n in range(15)}}, "'prn'"),
        (Kind.CALL, {"prn": ["iss", "sub"]}, "'prn'"),
        (Kind.CALL, {"reply": "A" * 21}, "'reply'"),
        (Kind.CALL, {"reply": "A" * 21 + "."}, "'reply'"),
        (Kind.CALL, {"prio": 10}, "'prio'"),
        (Kind.CALL, {"prio": False}, "'prio'"),
        (Kind.CALL, {"retry": {}}, "'retry'"),
        (Kind.CALL, {"retry": {"attempts": "3"}}, "'retry.attempts'"),
        (Kind.CALL, {"log": ["id", 1]}, "'log'"),
        (Kind.CALL, {"log": ["id", True, HASH]}, "'log'"),
        (Kind.CALL, {"log": ["id", 1, HASH[1:]]}, "'log'"),
        (Kind.CALL, {"ctx": ""}, "'ctx'"),
        (Kind.CALL, {"ctx": "x" * 1025}, "'ctx'"),
        (Kind.CALL, {"trace": "a\nb"}, "'trace'"),
        (Kind.CALL, {"ctx": None}, "'ctx'"),
        (Kind.CALL, {"par": "x"}, "'par'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:24],
)
def test_what_a_head_may_not_hold(kind: Kind, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(MalformedEnvelopeError, match=match):
        parse_head(head(kind, **changes))


@pytest.mark.parametrize(
    "data",
    {
        "no map": pack([1]),
        "empty": b"",
        "key of bytes": msgpack.packb({b"kind": "call"}),
        "key of a number": msgpack.packb({1: "call"}),
        "duplicate key": b"\x8c" + head()[1:] + b"\xa4kind\xa4call",
        "wider length": b"\xde\x00\x0b" + head()[1:],
        "trailing byte": head() + b"\xc0",
        "timestamp": head().replace(b"\xcf" + NOW.to_bytes(8, "big"), msgpack.packb(msgpack.Timestamp(1))),
        "too large": pack({"ctx": "x" * 40_000}),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_head_has_one_encoding(data: tuple[str, bytes]) -> None:
    with pytest.raises(MalformedEnvelopeError):
        parse_head(data[1])


def test_maps_of_a_head_are_read_only() -> None:
    parsed = parse_head(head(prn={"iss": "x", "sub": "y"}, retry={"attempts": 1}))
    with pytest.raises(TypeError):
        parsed.prn["sub"] = "z"  # type: ignore[index]
    with pytest.raises(TypeError):
        parsed.retry["attempts"] = 9  # type: ignore[index]
