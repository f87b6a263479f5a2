"""The values of an envelope: kinds, bounds, heads and what is protected.

A *head* is the part that is signed. It names who asks whom for what and when, and holds the payload's
SHA-256, so that it can travel on without its payload. A :class:`Draft` is what a sender fills in; the
sealer adds who it is (``iss``, ``x5t``), what is sent (``pd``) and on what it follows (``par``).

Nothing here parses or checks: :mod:`.head` does. All times are milliseconds since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256 as _sha256
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "DEFAULT_LIMITS",
    "FRAME_VERSION",
    "HEAD_TYPE",
    "JSON_CONTENT_TYPE",
    "ROOT_TYPE",
    "Draft",
    "Head",
    "Kind",
    "Limits",
    "LogWitness",
    "head_digest",
    "pae",
    "protected_head",
    "sha256",
]

FRAME_VERSION: Final = 1

HEAD_TYPE: Final = b"application/vnd.agentweave.envelope.v1+msgpack"
"""DSSE payload type of a head."""

ROOT_TYPE: Final = b"application/vnd.agentweave.root.v1"
"""DSSE payload type of a tree's size and root, the bytes that a signature covers."""

JSON_CONTENT_TYPE: Final = "application/vnd.agentweave.json+msgpack"
"""Content type of a payload that is one JSON value, encoded as msgpack (see :mod:`.codec`)."""

LogWitness: TypeAlias = tuple[str, int, bytes]
"""The sender's audit chain: its id, the sequence number and the hash of its last record on disk."""


class Kind(StrEnum):
    """What an envelope is. Subject families admit only some kinds; each kind has its own time rule."""

    CALL = "call"
    TASK = "task"
    REPLY = "reply"
    REFUSAL = "refusal"
    EVENT = "event"
    PROGRESS = "progress"
    CONTROL = "control"
    REISSUE = "reissue"
    RECORD = "record"

    __hash__ = str.__hash__  # equal to its text, so its hash is, too; and each call asks for it often


@dataclass(frozen=True, slots=True)
class Limits:
    """Every bound of this package, with its unit. Times are durations in milliseconds.

    A frame stays 4 KiB below the broker's default message size of 1 MiB, so that headers fit in.
    """

    max_frame_bytes: int = 1_048_576 - 4_096
    max_payload_bytes: int = 786_432
    max_head_bytes: int = 32_768
    max_signature_bytes: int = 144
    max_chain_certificates: int = 8
    max_chain_bytes: int = 32_768
    max_via_links: int = 8
    max_batch_heads: int = 256

    max_nesting: int = 32
    max_items: int = 100_000
    max_number_digits: int = 38
    max_number_exponent: int = 38

    max_scope_entries: int = 64
    max_map_entries: int = 16
    max_value_bytes: int = 1_024

    max_call_lifetime_ms: int = 600_000
    max_lifetime_ms: int = 31 * 86_400_000
    max_age_ms: int = 30_000
    clock_slack_ms: int = 2_000

    default_link_grace_ms: int = 4 * 3_600_000
    max_link_grace_ms: int = 24 * 3_600_000


DEFAULT_LIMITS: Final = Limits()


# Named tuples and not dataclasses: each call makes four heads, and a frozen dataclass of 27 fields takes
# five times as long to make.
class Head(NamedTuple):
    """A parsed head. Optional keys that are not there are ``None``. Always made with keywords.

    The meaning of each field stands in ``docs/wire-format.md``. ``scope`` is a tuple of
    ``<SPIFFE ID>#<capability>`` entries; ``prn`` and ``retry`` are read-only flat maps.
    """

    kind: Kind
    id: str
    iss: SpiffeID
    x5t: bytes
    aud: SpiffeID
    cap: str
    sub: str
    iat: int
    exp: int
    pd: bytes
    ct: str
    nbf: int | None = None
    re: bytes | None = None
    par: bytes | None = None
    scope: tuple[str, ...] | None = None
    prn: Mapping[str, str] | None = None
    reply: str | None = None
    att: int | None = None
    seq: int | None = None
    prev: bytes | None = None
    ctx: str | None = None
    idk: str | None = None
    prio: int | None = None
    retry: Mapping[str, int] | None = None
    every: str | None = None
    log: LogWitness | None = None
    trace: str | None = None


class _Stated(TypedDict):
    """What each draft states."""

    kind: Kind
    id: str
    aud: SpiffeID
    cap: str
    sub: str
    iat: int
    exp: int


class Draft(_Stated, total=False):
    """What a sender says. The sealer adds ``iss``, ``x5t``, ``pd`` and ``par``.

    A key that is left out or ``None`` is not sent, but ``ct`` is JSON then; ``scope`` is inherited from the
    last link of ``via``, where that has one. A dictionary, because what is sent is one, too.
    """

    ct: str
    nbf: int | None
    re: bytes | None
    scope: tuple[str, ...] | None
    prn: Mapping[str, str] | None
    reply: str | None
    att: int | None
    seq: int | None
    prev: bytes | None
    ctx: str | None
    idk: str | None
    prio: int | None
    retry: Mapping[str, int] | None
    every: str | None
    log: LogWitness | None
    trace: str | None


def sha256(data: bytes | memoryview) -> bytes:
    """SHA-256 of ``data``, 32 bytes."""
    return _sha256(data).digest()


def pae(payload_type: bytes, body: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding (protocol section "Signature Definition", version 1)."""
    return b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(body), body)


_HEAD_PREFIX: Final = b"DSSEv1 %d %b " % (len(HEAD_TYPE), HEAD_TYPE)


def protected_head(head_bytes: bytes) -> bytes:
    """Return the PAE of a head: the leaf of the signer's tree."""
    return b"%b%d %b" % (_HEAD_PREFIX, len(head_bytes), head_bytes)


def head_digest(head_bytes: bytes) -> bytes:
    """Return the digest of a head: SHA-256 of its PAE. ``par``, ``re`` and ``prev`` are such digests."""
    return _sha256(protected_head(head_bytes)).digest()
