"""References to large payloads: what one says, and that nothing else is read as one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.envelope.blob import CHUNK_BYTES, BlobReference, blob_key, blob_limits
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import BlobError, PayloadError

MOST = 4 * CHUNK_BYTES


@given(st.integers(1, 20_000), st.sampled_from([4_096, 5_000]))
def test_what_is_written_is_read(size: int, chunk: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    reference = BlobReference.of(data, "a task", chunk=chunk)
    assert BlobReference.decode(reference.encoded(), max_bytes=size) == reference
    sizes = list(reference.sizes())
    assert sum(sizes) == size
    assert len(sizes) == len(reference.chunks)
    assert reference.digest == sha256(data)
    with pytest.raises(BlobError):
        BlobReference.decode(reference.encoded(), max_bytes=size - 1)


def test_the_same_has_the_same_place_and_anything_else_another() -> None:
    keys = {
        blob_key(purpose, digest, variant)
        for purpose in ("a", "b")
        for digest in (b"1" * 32, b"2" * 32)
        for variant in (0, 1)
    }
    assert len(keys) == 8
    assert BlobReference.of(b"x", "a") == BlobReference.of(b"x", "a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=7), inner, max_size=7),
    max_leaves=12,
)


@given(JSON, st.sampled_from(["v", "size", "sha256", "chunk", "key", "chunks"]))
def test_anything_else_is_none(value: Any, part: str) -> None:
    with pytest.raises(BlobError):
        BlobReference.read(value, max_bytes=MOST)
    honest = BlobReference.of(b"x" * (CHUNK_BYTES + 1), "a").to_json()
    try:
        read = BlobReference.read(honest | {part: value}, max_bytes=MOST)
    except BlobError:
        return
    assert list(read.sizes())
    assert sum(read.sizes()) == read.size <= MOST


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(BlobError):
        BlobReference.decode(data, max_bytes=MOST)


def test_bounds_of_what_travels_so() -> None:
    limits = blob_limits(5)
    assert (limits.max_payload_bytes, limits.max_items, limits.max_nesting) == (5, 1_000_000, 32)
    assert issubclass(BlobError, PayloadError)
