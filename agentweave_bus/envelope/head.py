"""Heads as bytes: one strict parser, used for what is received and for what is sent.

A head is a msgpack map of text keys. Each key has one type and one check; each kind has its own set
of keys; a few checks join keys. The sealer builds the same map and puts it through the same checks, so
nothing leaves that a receiver would refuse here.

The keys of delegation (``par``, ``scope``, ``prn``) are checked for form only; on which kinds they may
stand is the first rule in :mod:`.delegation`.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from agentweave_bus.envelope.codec import pack, unpack_exact
from agentweave_bus.envelope.envelope import DEFAULT_LIMITS, JSON_CONTENT_TYPE, Draft, Head, Kind, Limits
from agentweave_bus.exceptions import InvalidSpiffeIdError, MalformedEnvelopeError
from agentweave_bus.names import CAPABILITY_NAME, EVENT_NAME
from agentweave_bus.spiffe_id import SpiffeID

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["head_from_map", "map_from_draft", "pack_head", "parse_head"]

_LARGEST_INT: Final = 2**53 - 1  # what every JSON reader holds exactly
_HASH_BYTES: Final = 32  # SHA-256
_MOST_REMEMBERED: Final = 1024

_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[57][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_LONGEST_SUBJECT: Final = 1_024
_CONTENT_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,62}/[a-z0-9][a-z0-9!#$&^_.+;=-]{0,126}")
_INSTANCE: Final = re.compile(r"[A-Za-z0-9]{22}")
_KEY: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")


def parse_head(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Head:
    """Parse the bytes of a head. Verify them first; these same bytes are what is parsed.

    Raises:
        MalformedEnvelopeError: a bound, the canonical form, a key, a type or a value is wrong.

    """
    _check_size(data, limits)
    value = unpack_exact(
        data, "the head", max_items=limits.max_scope_entries, max_bytes=limits.max_head_bytes
    )
    return head_from_map(value, limits)


def pack_head(value: dict[str, Any], limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Encode a map that :func:`head_from_map` has accepted."""
    data = pack(value)
    _check_size(data, limits)
    return data


def _check_size(data: bytes, limits: Limits) -> None:
    if len(data) > limits.max_head_bytes:
        raise MalformedEnvelopeError(f"the head has {len(data)} bytes; {limits.max_head_bytes} at most")


def head_from_map(value: Any, limits: Limits = DEFAULT_LIMITS) -> Head:
    """Check a head that was decoded, or made by :func:`map_from_draft`: keys, types, and what joins them.

    Raises:
        MalformedEnvelopeError: the message names the key and what is wrong with it.

    """
    if type(value) is not dict:
        raise MalformedEnvelopeError("the head is no map")
    more, kinds = _shape(value)
    kind, iss, aud, cap, ct = _parties(value, limits)
    if kind not in kinds:
        extra = ", ".join(sorted(set(more) - _KEYS[kind]))
        raise MalformedEnvelopeError(f"a {kind} has no key {extra}")
    head = Head(
        kind,
        _uuid("id", value["id"], limits),
        iss,
        _hash("x5t", value["x5t"], limits),
        aud,
        cap,
        _subject("sub", value["sub"], limits),
        _count("iat", value["iat"], limits),
        _count("exp", value["exp"], limits),
        _hash("pd", value["pd"], limits),
        ct,
        **{key: _OPTIONAL[key](key, value[key], limits) for key in more},
    )
    _check_order(head)
    _check_lifetime(head, limits)
    return head


def _shape(value: dict[Any, Any]) -> tuple[tuple[str, ...], frozenset[Kind]]:
    """Return the keys of a head beside the required, and which kinds may have them; few shapes occur."""
    keys = tuple(value)
    known = _SHAPES.get(keys)
    if known is None:
        if not value.keys() >= _REQUIRED:
            missing = ", ".join(sorted(_REQUIRED - value.keys()))
            raise MalformedEnvelopeError(f"the head lacks: {missing}")
        more = tuple(key for key in keys if key not in _REQUIRED)
        for key in more:
            if key not in _OPTIONAL:
                raise MalformedEnvelopeError(f"the head has an unknown key: {str(key)[:40]!r}")
        known = more, frozenset(kind for kind in Kind if _KEYS[kind] >= set(more))
        if len(_SHAPES) >= _MOST_REMEMBERED:
            _SHAPES.clear()
        _SHAPES[keys] = known
    return known


def _parties(value: dict[Any, Any], limits: Limits) -> tuple[Kind, SpiffeID, SpiffeID, str, str]:
    """Check who asks whom for what, and how it is written down: what comes again with each of their heads.

    What passed is remembered. It is text, and among decoded values nothing but the same text equals that.
    """
    told = value["kind"], value["iss"], value["aud"], value["cap"], value["ct"]
    try:
        passed = _PASSED.get(told)
    except TypeError:  # a list or a map is among them
        passed = None
    if passed is None:
        kind, cap = _kind("kind", told[0], limits), _name("cap", told[3], limits)
        iss, aud = _spiffe_id("iss", told[1], limits), _spiffe_id("aud", told[2], limits)
        _check_ends(kind, iss, aud, cap)
        passed = kind, iss, aud, cap, _content_type("ct", told[4], limits)
        if len(_PASSED) >= _MOST_REMEMBERED:
            _PASSED.clear()
        _PASSED[told] = passed
    return passed


_PLAIN: Final = frozenset({str, int, bytes})


def map_from_draft(
    draft: Draft, *, iss: SpiffeID, x5t: bytes, pd: bytes, par: bytes | None
) -> dict[str, Any]:
    """Build the map of a head, in the order of the draft, without those keys that are not set."""
    value: dict[str, Any] = {"kind": str(draft["kind"]), "id": draft["id"], "iss": iss.text, "x5t": x5t}
    for name, item in draft.items():
        if item is not None and name not in value:
            value[name] = item if type(item) in _PLAIN else _plain(item)
    value.setdefault("ct", JSON_CONTENT_TYPE)
    value["pd"] = pd
    if par is not None:
        value["par"] = par
    return value


def _plain(item: Any) -> Any:
    if type(item) is SpiffeID:
        return item.text
    if isinstance(item, str):
        return str.__str__(item)
    if isinstance(item, tuple):
        return [one if type(one) in _PLAIN else _plain(one) for one in item]
    if isinstance(item, (dict, MappingProxyType)):
        return {_plain(key): _plain(one) for key, one in item.items()}
    return item


# --- checks of single keys: (key, decoded value, limits) -> the value that Head holds -------------


def _wrong(key: str, why: str) -> MalformedEnvelopeError:
    return MalformedEnvelopeError(f"the head's {key!r} {why}")


def _text(key: str, value: Any, limits: Limits) -> str:
    if type(value) is not str:
        raise _wrong(key, f"is a {type(value).__name__}, not text")
    if not value or len(value) > limits.max_value_bytes or not value.isprintable():
        raise _wrong(key, f"must be 1 to {limits.max_value_bytes} printable characters")
    return value


def _matching(pattern: re.Pattern[str], wanted: str) -> Callable[[str, Any, Limits], str]:
    matches = pattern.fullmatch

    def check(key: str, value: Any, _limits: Limits) -> str:
        if type(value) is not str or not matches(value):
            raise _wrong(key, f"is not {wanted}")
        return value

    return check


def _kind(key: str, value: Any, _limits: Limits) -> Kind:
    kind = _KINDS.get(value) if type(value) is str else None
    if kind is None:
        raise _wrong(key, "is no kind of envelope")
    return kind


def _spiffe_id(key: str, value: Any, _limits: Limits) -> SpiffeID:
    if type(value) is not str:
        raise _wrong(key, "is no SPIFFE ID")
    try:
        return SpiffeID(value)
    except InvalidSpiffeIdError as error:
        raise _wrong(key, f"is no SPIFFE ID: {error}") from error


def _hash(key: str, value: Any, _limits: Limits) -> bytes:
    if type(value) is not bytes or len(value) != _HASH_BYTES:
        raise _wrong(key, "is not 32 bytes")
    return value


def _subject(key: str, value: Any, _limits: Limits) -> str:
    if not (
        type(value) is str
        and 1 <= len(value) <= _LONGEST_SUBJECT
        and value.isascii()
        and value.isprintable()
        and " " not in value
        and "*" not in value
        and ">" not in value
    ):
        raise _wrong(key, "is not a subject of 1 to 1024 printable characters without wildcards")
    return value


def _count(key: str, value: Any, _limits: Limits) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST_INT:
        raise _wrong(key, "is no integer from 0 to 2^53 - 1")
    return value


def _priority(key: str, value: Any, _limits: Limits) -> int:
    if type(value) is not int or not 0 <= value <= 9:  # noqa: PLR2004 - ten levels
        raise _wrong(key, "is no integer from 0 to 9")
    return value


def _scope(key: str, value: Any, limits: Limits) -> tuple[str, ...]:
    if type(value) is not list or not 1 <= len(value) <= limits.max_scope_entries:
        raise _wrong(key, f"is no list of 1 to {limits.max_scope_entries} entries")
    for entry in value:
        _check_scope_entry(key, entry)
    return tuple(value)


def _check_scope_entry(key: str, entry: Any) -> None:
    if type(entry) is not str:
        raise _wrong(key, "has an entry that is not text")
    agent, _, name = entry.partition("#")
    _spiffe_id(key, agent, DEFAULT_LIMITS)
    if name != "*" and not EVENT_NAME.fullmatch(name):
        raise _wrong(key, "has an entry that is not '<SPIFFE ID>#<capability>' or '<SPIFFE ID>#*'")


def _principal(key: str, value: Any, limits: Limits) -> MappingProxyType[str, str]:
    if type(value) is not dict or len(value) > limits.max_map_entries or not value.keys() >= {"iss", "sub"}:
        raise _wrong(key, f"is no map of at most {limits.max_map_entries} texts with 'iss' and 'sub'")
    for name, item in value.items():
        _map_key(key, name)
        _text(f"{key}.{name}", item, limits)
    return MappingProxyType(value)


def _retry(key: str, value: Any, limits: Limits) -> MappingProxyType[str, int]:
    if type(value) is not dict or not 1 <= len(value) <= limits.max_map_entries:
        raise _wrong(key, f"is no map of 1 to {limits.max_map_entries} integers")
    for name, item in value.items():
        _map_key(key, name)
        _count(f"{key}.{name}", item, limits)
    return MappingProxyType(value)


def _map_key(key: str, name: Any) -> None:
    if type(name) is not str or not _KEY.fullmatch(name):
        raise _wrong(key, "has a key that is not 1 to 32 of a-z, 0-9 and '_', a letter first")


def _log(key: str, value: Any, limits: Limits) -> tuple[str, int, bytes]:
    if type(value) is not list or len(value) != 3:  # noqa: PLR2004 - id, sequence, hash
        raise _wrong(key, "is no list of id, sequence and hash")
    chain, sequence, last = value
    return _text(key, chain, limits), _count(key, sequence, limits), _hash(key, last, limits)


_KINDS: Final = {kind.value: kind for kind in Kind}

_uuid: Final = _matching(_UUID, "a UUID of version 7 or 5 in lower case")
_name: Final = _matching(EVENT_NAME, "a capability or event name")
_content_type: Final = _matching(_CONTENT_TYPE, "a content type in lower case")

_REQUIRED: Final = frozenset({"kind", "id", "iss", "x5t", "aud", "cap", "sub", "iat", "exp", "pd", "ct"})

_OPTIONAL: Final[dict[str, Callable[[str, Any, Limits], Any]]] = {
    "nbf": _count,
    "re": _hash,
    "par": _hash,
    "scope": _scope,
    "prn": _principal,
    "reply": _matching(_INSTANCE, "an instance token of 22 letters and digits"),
    "att": _count,
    "seq": _count,
    "prev": _hash,
    "ctx": _text,
    "idk": _text,
    "prio": _priority,
    "retry": _retry,
    "every": _text,
    "log": _log,
    "trace": _text,
}

# What is the same in most heads that come, once it has passed its checks; each is emptied when it is full.
_SHAPES: Final[dict[tuple[Any, ...], tuple[tuple[str, ...], frozenset[Kind]]]] = {}
_PASSED: Final[dict[tuple[Any, ...], tuple[Kind, SpiffeID, SpiffeID, str, str]]] = {}


# --- checks that join keys ------------------------------------------------------------------------

# Beside those that all have.
_ANY_KIND: Final = frozenset({"par", "scope", "prn", "ctx", "log", "trace"})
_WORK: Final = frozenset({"reply", "idk", "prio", "retry"})
_ANSWER: Final = frozenset({"re"})

_KEYS: Final = {
    Kind.CALL: _ANY_KIND | _WORK,
    Kind.TASK: _ANY_KIND | _WORK | {"nbf", "every"},
    Kind.REISSUE: _ANY_KIND | _WORK | {"nbf", "every", "att"},
    Kind.EVENT: _ANY_KIND | {"idk"},
    Kind.REPLY: _ANY_KIND | _ANSWER,
    Kind.REFUSAL: _ANY_KIND | _ANSWER,
    Kind.CONTROL: _ANY_KIND | _ANSWER | {"reply"},
    Kind.PROGRESS: _ANY_KIND | _ANSWER | {"seq", "prev"},
    Kind.RECORD: _ANY_KIND | _ANSWER | {"seq", "prev", "att"},
}
_MUST_ANSWER: Final = frozenset({Kind.REPLY, Kind.REFUSAL, Kind.PROGRESS})
_TO_A_DOMAIN: Final = frozenset({Kind.EVENT, Kind.RECORD})


def _check_order(head: Head) -> None:
    if head.re is None and head.kind in _MUST_ANSWER:
        raise MalformedEnvelopeError(f"a {head.kind} says in 're' what it answers")
    if head.seq is None and head.kind is Kind.PROGRESS:
        raise MalformedEnvelopeError("progress has a 'seq'")
    if (head.prev is not None) != bool(head.seq):
        raise MalformedEnvelopeError("'prev' stands exactly where 'seq' is above 0")


def _check_ends(kind: Kind, iss: SpiffeID, aud: SpiffeID, cap: str) -> None:
    if not iss.path:
        raise _wrong("iss", "is a trust domain, not a workload")
    if (kind in _TO_A_DOMAIN) == bool(aud.path):
        wanted = "a trust domain" if kind in _TO_A_DOMAIN else "a workload"
        raise _wrong("aud", f"of kind {kind} must be {wanted}")
    if kind not in _TO_A_DOMAIN and not CAPABILITY_NAME.fullmatch(cap):
        raise _wrong("cap", "is no capability name")


def _check_lifetime(head: Head, limits: Limits) -> None:
    longest = limits.max_call_lifetime_ms if head.kind is Kind.CALL else limits.max_lifetime_ms
    if not 0 < head.exp - head.iat <= longest:
        raise _wrong("exp", f"must lie after 'iat', by {longest} ms at most")
    if head.nbf is not None and not head.nbf < head.exp:
        raise _wrong("nbf", "must lie before 'exp'")
