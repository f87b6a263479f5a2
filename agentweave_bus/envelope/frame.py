"""Frames as bytes: ``[version, head, proof, chain, payload, via]``, and the links that ``via`` holds.

Decoding checks size, shape, exact types and the canonical encoding. It verifies nothing: a decoded
frame is still a stranger's claim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentweave_bus.envelope.codec import pack, unpack_exact
from agentweave_bus.envelope.envelope import DEFAULT_LIMITS, FRAME_VERSION, Head, Limits, head_digest
from agentweave_bus.envelope.head import parse_head
from agentweave_bus.exceptions import MalformedEnvelopeError

__all__ = ["Frame", "Link", "Proof", "check_size", "decode_frame", "encode_frame"]

_HASH_BYTES = 32


@dataclass(frozen=True, init=False)
class Proof:
    """A signature over a tree of ``size`` heads, and the way from head number ``index`` to its root.

    ``signature`` is ASN.1 DER ECDSA; each entry of ``path`` is 32 bytes (RFC 9162 section 2.1.3).
    """

    signature: bytes
    size: int
    index: int
    path: tuple[bytes, ...]

    def __init__(self, signature: bytes, size: int, index: int, path: tuple[bytes, ...]) -> None:
        # Four of these and four links are made for each call. What dataclasses would write here, a call of
        # object.__setattr__ for each field, takes twice as long.
        self.__dict__.update(signature=signature, size=size, index=index, path=path)


@dataclass(frozen=True, init=False)
class Link:
    """An envelope without its payload: enough to show later who asked whom for what.

    ``head`` and ``digest`` are computed when first asked for and kept. A link proves nothing until it
    is verified.
    """

    head_bytes: bytes
    proof: Proof
    chain: tuple[bytes, ...]
    _head: Head | None = field(repr=False, compare=False)
    _digest: bytes | None = field(repr=False, compare=False)

    def __init__(
        self,
        head_bytes: bytes,
        proof: Proof,
        chain: tuple[bytes, ...],
        _head: Head | None = None,
        _digest: bytes | None = None,
    ) -> None:
        self.__dict__.update(head_bytes=head_bytes, proof=proof, chain=chain, _head=_head, _digest=_digest)

    @property
    def head(self) -> Head:
        """The parsed head.

        Raises:
            MalformedEnvelopeError: the bytes are no head.

        """
        if self._head is None:
            self.__dict__["_head"] = parse_head(self.head_bytes)
        assert self._head is not None
        return self._head

    @property
    def digest(self) -> bytes:
        """The digest of the head, 32 bytes."""
        if self._digest is None:
            self.__dict__["_digest"] = head_digest(self.head_bytes)
        assert self._digest is not None
        return self._digest

    def to_wire(self) -> list[Any]:
        """Return the link as it stands in ``via``."""
        proof = self.proof
        wire = [proof.signature, proof.size, proof.index, list(proof.path)]
        return [self.head_bytes, wire, list(self.chain)]


class Frame(NamedTuple):
    """A decoded frame, and the bytes it was decoded from. Nothing of it is verified."""

    data: bytes
    head: bytes
    proof: Proof
    chain: tuple[bytes, ...]
    payload: bytes
    via: tuple[Link, ...]


def check_size(frame: bytes, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuse a frame that is too large to look at.

    Raises:
        MalformedEnvelopeError: it is.

    """
    if len(frame) > limits.max_frame_bytes:
        raise MalformedEnvelopeError(
            f"the frame has {len(frame)} bytes; at most {limits.max_frame_bytes} are carried"
        )


def encode_frame(
    link: Link, payload: bytes, via: tuple[Link, ...] = (), limits: Limits = DEFAULT_LIMITS
) -> bytes:
    """Encode the frame of an envelope whose head, proof and chain are ``link``.

    Raises:
        MalformedEnvelopeError: it is too large, or a part of it is.

    """
    if len(payload) > limits.max_payload_bytes:
        raise MalformedEnvelopeError(
            f"the payload has {len(payload)} bytes; at most {limits.max_payload_bytes} are carried"
        )
    if len(via) > limits.max_via_links:
        raise MalformedEnvelopeError(f"a request is delegated at most {limits.max_via_links} times")
    data = pack([FRAME_VERSION, *link.to_wire(), payload, [one.to_wire() for one in via] if via else []])
    check_size(data, limits)
    return data


def decode_frame(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Decode a frame strictly.

    Raises:
        MalformedEnvelopeError: size, shape, a type or the canonical form is wrong.

    """
    check_size(data, limits)
    widest = max(8, limits.max_chain_certificates, limits.max_via_links)
    value = unpack_exact(data, "the frame", max_items=widest, max_bytes=limits.max_frame_bytes)
    if type(value) is not list or len(value) != 6:  # noqa: PLR2004 - the six parts above
        raise MalformedEnvelopeError("the frame is no list of six parts")
    version, head, proof, chain, payload, via = value
    if type(version) is not int or version != FRAME_VERSION:
        raise MalformedEnvelopeError(f"the frame's version is not {FRAME_VERSION}")
    if type(payload) is not bytes or len(payload) > limits.max_payload_bytes:
        raise MalformedEnvelopeError(f"the payload is not at most {limits.max_payload_bytes} bytes")
    if type(via) is not list or len(via) > limits.max_via_links:
        raise MalformedEnvelopeError(f"'via' is no list of at most {limits.max_via_links} links")
    links = tuple([_link(one, limits) for one in via]) if via else ()
    return Frame(data, _head(head, limits), _proof(proof, limits), _chain(chain, limits), payload, links)


def encode_link(link: Link) -> bytes:
    """Write a link by itself, as a record keeps it: the bytes that it has in ``via``."""
    return pack(link.to_wire())


def decode_link(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Link:
    """Read what :func:`encode_link` wrote.

    Raises:
        MalformedEnvelopeError: size, shape, a type or the canonical form is wrong.

    """
    check_size(data, limits)
    widest = max(8, limits.max_chain_certificates)
    return _link(unpack_exact(data, "the link", max_items=widest, max_bytes=limits.max_frame_bytes), limits)


def _link(value: Any, limits: Limits) -> Link:
    if type(value) is not list or len(value) != 3:  # noqa: PLR2004 - head, proof, chain
        raise MalformedEnvelopeError("a link is no list of head, proof and chain")
    head, proof, chain = value
    return Link(_head(head, limits), _proof(proof, limits), _chain(chain, limits))


def _head(value: Any, limits: Limits) -> bytes:
    if type(value) is not bytes or not 1 <= len(value) <= limits.max_head_bytes:
        raise MalformedEnvelopeError(f"the head is not 1 to {limits.max_head_bytes} bytes")
    return value


def _proof(value: Any, limits: Limits) -> Proof:
    if type(value) is not list or len(value) != 4:  # noqa: PLR2004 - signature, size, index, path
        raise MalformedEnvelopeError("the proof is no list of signature, size, index and path")
    signature, size, index, path = value
    if type(signature) is not bytes or not 1 <= len(signature) <= limits.max_signature_bytes:
        raise MalformedEnvelopeError(f"the signature is not 1 to {limits.max_signature_bytes} bytes")
    if type(size) is not int or not 1 <= size <= limits.max_batch_heads:
        raise MalformedEnvelopeError(f"the proof's size is not 1 to {limits.max_batch_heads}")
    if type(index) is not int or not 0 <= index < size:
        raise MalformedEnvelopeError("the proof's index lies outside its tree")
    if type(path) is not list:
        raise MalformedEnvelopeError("the proof's path is no list")
    for one in path:
        if type(one) is not bytes or len(one) != _HASH_BYTES:
            raise MalformedEnvelopeError("the proof's path is no list of 32 bytes each")
    return Proof(signature, size, index, tuple(path))


def _chain(value: Any, limits: Limits) -> tuple[bytes, ...]:
    if type(value) is not list or not 1 <= len(value) <= limits.max_chain_certificates:
        raise MalformedEnvelopeError(f"the chain has not 1 to {limits.max_chain_certificates} certificates")
    for one in value:
        if type(one) is not bytes:
            raise MalformedEnvelopeError("a certificate of the chain is not bytes")
    if sum(map(len, value)) > limits.max_chain_bytes:
        raise MalformedEnvelopeError(f"the chain has more than {limits.max_chain_bytes} bytes")
    return tuple(value)
