"""Payloads by reference: what a signed payload says of one that is too large to stand there itself.

A reference names size, SHA-256 and a key, and the SHA-256 of each chunk. It is the payload of an envelope
whose content type says so, or part of a record; so whoever signed that has signed every byte, and the chunks
need no signature of their own. Each is compared as it comes, and the whole when all have come.

A reference does not say whose blob it is nor for whom: that is who signed it and who it is for. So nobody can
have somebody else fetched what he may not read himself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self

from agentweave_bus.envelope.codec import decode_payload, encode_payload
from agentweave_bus.envelope.envelope import DEFAULT_LIMITS, Limits, sha256
from agentweave_bus.exceptions import BlobError, PayloadError

__all__ = [
    "BLOB_CONTENT_TYPE",
    "CHUNK_BYTES",
    "DEFAULT_MAX_BLOB_BYTES",
    "LARGEST_BLOB_BYTES",
    "WIDE_LIMITS",
    "BlobReference",
    "blob_key",
    "blob_limits",
    "blob_summary",
]

BLOB_CONTENT_TYPE: Final = "application/vnd.agentweave.blob+msgpack"
"""The content type of a payload that is a reference to another one, which is a JSON value."""

CHUNK_BYTES: Final = 512 * 1024
"""How large chunks are made: two of them and what goes with them fit into nats-server's largest message."""

DEFAULT_MAX_BLOB_BYTES: Final = 64 * 1024 * 1024
LARGEST_BLOB_BYTES: Final = 1024**3
"""What can be configured at most, in bytes."""

_LEAST_CHUNK: Final = 4_096
_MAX_CHUNKS: Final = 4_096
_MAX_ITEMS: Final = 1_000_000
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_KEYS: Final = frozenset({"v", "size", "sha256", "chunk", "key", "chunks"})


def blob_limits(max_bytes: int) -> Limits:
    """Return the bounds of a payload that travels by reference: ``max_bytes``, and a million items.

    Ten times the items of others, not as many more as bytes: each takes far more memory than it has bytes.
    """
    return dataclasses.replace(DEFAULT_LIMITS, max_payload_bytes=max_bytes, max_items=_MAX_ITEMS)


WIDE_LIMITS: Final = blob_limits(LARGEST_BLOB_BYTES)
"""What a value may hold of which it is not known yet how it will travel."""


def blob_key(purpose: str, digest: bytes, variant: int = 0) -> str:
    """Return the key of a blob: the same for the same contents and ``purpose`` (a task's key, say).

    So who stores it again stores nothing new, and its reference has the same bytes. ``variant`` is for a key
    under which something else stands.
    """
    return hashlib.sha256(b"%b\0%b\0%d" % (purpose.encode(), digest, variant)).hexdigest()


def blob_summary(size: int, digest: bytes) -> dict[str, Any]:
    """Return what is written down in place of a value that is too large for that."""
    return {"blob": {"size": size, "sha256": digest.hex()}}


class BlobReference(NamedTuple):
    """Size in bytes, SHA-256 of the whole, size of a chunk, key, and the SHA-256 of each chunk.

    The last chunk may be smaller.
    """

    size: int
    digest: bytes
    chunk: int
    key: str
    chunks: tuple[bytes, ...]

    @classmethod
    def of(cls, data: bytes, purpose: str, *, variant: int = 0, chunk: int = CHUNK_BYTES) -> Self:
        """Return the reference to ``data``."""
        view, digest = memoryview(data), sha256(data)
        chunks = tuple(sha256(view[start : start + chunk]) for start in range(0, len(data), chunk))
        return cls(len(data), digest, chunk, blob_key(purpose, digest, variant), chunks)

    def to_json(self) -> dict[str, Any]:
        """Return it as the JSON object that :meth:`read` reads."""
        return {
            "v": 1,
            "size": self.size,
            "sha256": self.digest.hex(),
            "chunk": self.chunk,
            "key": self.key,
            "chunks": [one.hex() for one in self.chunks],
        }

    def encoded(self) -> bytes:
        """Return it as a payload."""
        return encode_payload(self.to_json())

    def summary(self) -> dict[str, Any]:
        """Return what is written down in place of the value itself."""
        return blob_summary(self.size, self.digest)

    @classmethod
    def decode(cls, payload: bytes, *, max_bytes: int) -> Self:
        """Read an envelope's payload. Errors as of :meth:`read`."""
        try:
            value = decode_payload(payload)
        except BlobError:
            raise
        except PayloadError as error:
            raise BlobError(f"a reference that is none: {error}") from error
        return cls.read(value, max_bytes=max_bytes)

    @classmethod
    def read(cls, value: Any, *, max_bytes: int) -> Self:
        """Read what a reference says.

        Raises:
            BlobError: it is none, contradicts itself, or is to more than ``max_bytes``.

        """
        if type(value) is not dict or value.keys() != _KEYS or type(value["v"]) is not int or value["v"] != 1:
            raise BlobError("a reference that is none")
        size, chunk, listed = value["size"], value["chunk"], value["chunks"]
        if type(size) is not int or size < 1 or type(listed) is not list:
            raise BlobError("a reference that is none")
        if size > max_bytes:
            raise BlobError(f"a payload of {size} bytes; bus.max_blob_bytes lets {max_bytes} pass")
        if type(chunk) is not int or not _LEAST_CHUNK <= chunk <= CHUNK_BYTES:
            raise BlobError(f"a reference to chunks that are not {_LEAST_CHUNK} to {CHUNK_BYTES} bytes large")
        if len(listed) > _MAX_CHUNKS or len(listed) != -(-size // chunk):
            raise BlobError("a reference whose chunks do not make up its size")
        texts = (value["sha256"], value["key"], *listed)
        if not all(type(one) is str and _HEX.fullmatch(one) for one in texts):
            raise BlobError("a reference whose digests are none")
        digests = tuple(bytes.fromhex(one) for one in listed)
        return cls(size, bytes.fromhex(value["sha256"]), chunk, value["key"], digests)

    def sizes(self) -> Iterator[int]:
        """Yield how many bytes each chunk has."""
        for number in range(len(self.chunks)):
            yield min(self.chunk, self.size - number * self.chunk)
