"""The strict decoder of frames: shape, exact types, bounds, one encoding."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentweave_bus.envelope import Limits, Link, Proof, decode_frame, decode_link, encode_link
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.frame import encode_frame
from agentweave_bus.exceptions import MalformedEnvelopeError

BYTES = st.binary(min_size=1, max_size=40)
PROOFS = st.integers(1, 256).flatmap(
    lambda size: st.builds(
        Proof,
        signature=BYTES,
        size=st.just(size),
        index=st.integers(0, size - 1),
        path=st.lists(st.binary(min_size=32, max_size=32), max_size=8).map(tuple),
    )
)
LINKS = st.builds(
    Link, head_bytes=BYTES, proof=PROOFS, chain=st.lists(BYTES, min_size=1, max_size=8).map(tuple)
)


@settings(max_examples=80, deadline=None)
@given(link=LINKS, payload=st.binary(max_size=200), via=st.lists(LINKS, max_size=8).map(tuple))
def test_what_is_encoded_decodes_to_the_same(link: Link, payload: bytes, via: tuple[Link, ...]) -> None:
    data = encode_frame(link, payload, via)
    frame = decode_frame(data)
    assert (frame.head, frame.proof, frame.chain) == (link.head_bytes, link.proof, link.chain)
    assert (frame.payload, frame.via, frame.data) == (payload, via, data)
    assert encode_frame(Link(frame.head, frame.proof, frame.chain), frame.payload, frame.via) == data


LINK: list[Any] = [b"head", [b"signature", 2, 1, [b"p" * 32]], [b"certificate"]]


def parts(**changes: Any) -> list[Any]:
    value = {"version": 1, "head": LINK[0], "proof": LINK[1], "chain": LINK[2], "payload": b"p", "via": []}
    return list((value | changes).values())


@pytest.mark.parametrize(
    "value",
    {
        "no list": {"version": 1},
        "five parts": parts()[:5],
        "seven parts": [*parts(), None],
        "version 2": parts(version=2),
        "version true": parts(version=True),
        "version 1.0": parts(version=1.0),
        "head text": parts(head="head"),
        "head empty": parts(head=b""),
        "head too large": parts(head=b"h" * 32_769),
        "proof short": parts(proof=[b"s", 1, 0]),
        "signature text": parts(proof=["s", 1, 0, []]),
        "signature long": parts(proof=[b"s" * 145, 1, 0, []]),
        "size 0": parts(proof=[b"s", 0, 0, []]),
        "size 257": parts(proof=[b"s", 257, 0, []]),
        "size true": parts(proof=[b"s", True, 0, []]),
        "index = size": parts(proof=[b"s", 2, 2, []]),
        "index negative": parts(proof=[b"s", 2, -1, []]),
        "index false": parts(proof=[b"s", 2, False, []]),
        "path entry of 33": parts(proof=[b"s", 2, 0, [b"p" * 33]]),
        "path entry text": parts(proof=[b"s", 2, 0, ["p" * 32]]),
        "path of 9": parts(proof=[b"s", 2, 0, [b"p" * 32] * 9]),
        "path a map": parts(proof=[b"s", 2, 0, {}]),
        "chain empty": parts(chain=[]),
        "chain of 9": parts(chain=[b"c"] * 9),
        "chain too large": parts(chain=[b"c" * 20_000] * 2),
        "certificate text": parts(chain=["c"]),
        "payload text": parts(payload="p"),
        "payload none": parts(payload=None),
        "payload too large": parts(payload=b"p" * 786_433),
        "via none": parts(via=None),
        "via of 9": parts(via=[LINK] * 9),
        "link short": parts(via=[LINK[:2]]),
        "link with a payload": parts(via=[[*LINK, b"p"]]),
        "link a map": parts(via=[{}]),
        "link's proof": parts(via=[[LINK[0], [b"s", 1, 1, []], LINK[2]]]),
        "link's chain": parts(via=[[LINK[0], LINK[1], []]]),
    }.items(),
    ids=lambda item: item[0],
)
def test_another_shape_is_refused(value: tuple[str, Any]) -> None:
    with pytest.raises(MalformedEnvelopeError):
        decode_frame(pack(value[1]))


def test_the_shape_above_is_good_otherwise() -> None:
    assert decode_frame(pack(parts(via=[LINK] * 8))).payload == b"p"


@pytest.mark.parametrize(
    "data",
    {
        "wider list": b"\xdc\x00\x06" + pack(parts())[1:],
        "wider integer": b"\x96\xcc\x01" + pack(parts())[2:],
        "wider bytes": pack(parts()).replace(b"\xc4\x04head", b"\xc5\x00\x04head"),
        "bytes as text": pack(parts()).replace(b"\xc4\x04head", b"\xa4head"),
        "trailing": pack(parts()) + b"\xc0",
        "extension": msgpack.packb([1, msgpack.ExtType(1, b"x"), *parts()[2:]]),
        "nothing": b"",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_frame_has_one_encoding(data: tuple[str, bytes]) -> None:
    with pytest.raises(MalformedEnvelopeError):
        decode_frame(data[1])


def test_a_frame_is_bounded_before_it_is_read() -> None:
    with pytest.raises(MalformedEnvelopeError, match="at most 1044480"):
        decode_frame(b"\x96" * 1_044_481)
    with pytest.raises(MalformedEnvelopeError, match="at most 60 "):
        encode_frame(Link(b"h" * 60, Proof(b"s", 1, 0, ()), (b"c",)), b"", (), Limits(max_frame_bytes=60))


@settings(max_examples=30, deadline=None)
@given(link=LINKS)
def test_a_link_kept_by_itself_reads_back(link: Link) -> None:
    assert decode_link(encode_link(link)) == link


@pytest.mark.parametrize("damage", ["longer", "shorter", "two parts"])
def test_a_damaged_link_is_refused(damage: str) -> None:
    whole = pack(LINK)
    damaged = {"longer": whole + b"\x00", "shorter": whole[:-1], "two parts": pack(LINK[:2])}[damage]
    assert decode_link(whole).head_bytes == b"head"
    with pytest.raises(MalformedEnvelopeError):
        decode_link(damaged)
