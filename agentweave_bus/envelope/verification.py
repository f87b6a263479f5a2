"""Opening an envelope: from bytes of a stranger to a head whose sender is proved.

The numbers are those of admission, and the code carries them:

1. :meth:`EnvelopeVerifier.check_size`: the frame is within bounds
2. :meth:`EnvelopeVerifier.decode_frame`: it decodes, in canonical form
3. :meth:`EnvelopeVerifier.check_chain`: the sender's certificates verify against the bundle of their
   own trust domain, each of them is on the path, and none is revoked
4. :meth:`EnvelopeVerifier.check_proof`: the signature covers the tree, the tree covers the head
5. :meth:`EnvelopeVerifier.parse_head`: those same bytes parse strictly; ``iss`` and ``x5t`` are those of
   the chain, and ``pd`` is the hash of the payload (it completes step 4, and needs the parsed head)

Left to the caller, in this order: 6. binding to where it arrived; 7. :func:`.delegation.verify_delegation`;
8. one of the three checks of time below; 9. replay; and then the policy.

Opened means: this ``iss`` signed this head for this payload. It does not mean that it is new, that it is
for this agent, or that it is allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from agentweave_bus.envelope.envelope import (
    DEFAULT_LIMITS,
    ROOT_TYPE,
    Head,
    Kind,
    Limits,
    head_digest,
    pae,
    protected_head,
    sha256,
)
from agentweave_bus.envelope.frame import Frame, Link, Proof, check_size, decode_frame
from agentweave_bus.envelope.head import parse_head
from agentweave_bus.envelope.merkle import leaf_hash, root_from_path
from agentweave_bus.exceptions import ChainRefusedError, SignatureRefusedError, TimeRefusedError

if TYPE_CHECKING:
    from agentweave_bus.identity.chain import ChainVerifier, VerifiedChain

__all__ = [
    "EnvelopeVerifier",
    "OpenedEnvelope",
    "check_time_now",
    "check_time_reply",
    "check_time_stored",
    "protected_root",
    "signature_algorithm",
]

_ALGORITHMS: Final = {"secp256r1": ec.ECDSA(SHA256()), "secp384r1": ec.ECDSA(SHA384())}


def protected_root(size: int, root: bytes) -> bytes:
    """Return what a signature covers: the PAE of the tree's size (8 bytes, big-endian) and root."""
    return pae(ROOT_TYPE, size.to_bytes(8, "big") + root)


def signature_algorithm(curve: ec.EllipticCurve) -> ec.ECDSA:
    """Return the algorithm of a key's curve; nothing in an envelope can choose another.

    Raises:
        SignatureRefusedError: the curve is neither P-256 nor P-384.

    """
    algorithm = _ALGORITHMS.get(curve.name)
    if algorithm is None:
        raise SignatureRefusedError(f"keys on {curve.name} do not sign envelopes; use P-256 or P-384")
    return algorithm


class OpenedEnvelope(NamedTuple):
    """An envelope whose sender is proved (steps 1 to 5).

    ``digest`` is the head's; ``link`` is the envelope without its payload, as a nested call carries it;
    ``frame`` is the bytes it came in. ``via`` is unverified until :func:`.delegation.verify_delegation`.
    """

    frame: bytes
    head: Head
    digest: bytes
    payload: bytes
    sender: VerifiedChain
    link: Link
    via: tuple[Link, ...]


class EnvelopeVerifier:
    """Opens envelopes. One instance belongs to one event loop or thread.

    It remembers signatures over tree roots that verified, at most ``max_roots`` of them, so that the
    rest of a batch costs hashes only. It is asked only after the chain has verified again.
    """

    def __init__(
        self, chains: ChainVerifier, limits: Limits = DEFAULT_LIMITS, *, max_roots: int = 4096
    ) -> None:
        self._chains = chains
        self._limits = limits
        self._max_roots = max_roots
        self._roots: dict[tuple[bytes, bytes, int, bytes], None] = {}

    @property
    def limits(self) -> Limits:
        """The bounds in force."""
        return self._limits

    def open(self, frame: bytes, *, now_ms: int) -> OpenedEnvelope:
        """Take ``frame`` through steps 1 to 5, the chain as of ``now_ms``.

        Raises:
            MalformedEnvelopeError: a bound, the framing or the head is wrong.
            FederationError: the sender's trust domain is not allowed, or its bundle is missing.
            ChainRefusedError: the sender's chain does not verify, or is revoked.
            SignatureRefusedError: signature, root, path, payload hash, ``iss`` or ``x5t`` is wrong.

        """
        self.check_size(frame)
        parts = self.decode_frame(frame)
        sender = self.check_chain(parts, at_ms=now_ms)
        self.check_proof(parts, sender)
        return self.parse_head(parts, sender)

    def open_stored(self, frame: bytes, *, now_ms: int, stored_at_ms: int) -> OpenedEnvelope:
        """Take a frame that lay in a stream through steps 1 to 5; then call :func:`check_time_stored`.

        The chain is checked as of ``now_ms``; where it does not verify so, because it has expired or its
        authority has left the bundle since, as of ``stored_at_ms``, the stream's own time of it. Errors as
        :meth:`open`.
        """
        self.check_size(frame)
        parts = self.decode_frame(frame)
        sender = self.check_chain_stored(parts, now_ms=now_ms, stored_at_ms=stored_at_ms)
        self.check_proof(parts, sender)
        return self.parse_head(parts, sender)

    # --- 1. size

    def check_size(self, frame: bytes) -> None:
        """Step 1. Raises MalformedEnvelopeError."""
        check_size(frame, self._limits)

    # --- 2. frame

    def decode_frame(self, frame: bytes) -> Frame:
        """Step 2. Raises MalformedEnvelopeError."""
        return decode_frame(frame, self._limits)

    # --- 3. chain

    def check_chain(self, parts: Frame | Link, *, at_ms: int) -> VerifiedChain:
        """Step 3, as of ``at_ms``. Raises ChainRefusedError and FederationError."""
        sender = self._chains.verify(parts.chain, at_ms=at_ms)
        # Certificates beside the path would be bytes that nothing vouches for.
        sent = tuple(map(sha256, parts.chain[1:]))
        if sent != sender.issuers[: len(sent)]:
            raise ChainRefusedError(f"{sender.spiffe_id} sent certificates beside its path")
        return sender

    def check_chain_stored(self, parts: Frame | Link, *, now_ms: int, stored_at_ms: int) -> VerifiedChain:
        """Step 3 for what lay in a stream: as of now, or as of when it was stored. Errors as the above.

        What an authority signed that has left its bundle since is valid until then, and never as of now.
        """
        try:
            return self.check_chain(parts, at_ms=now_ms)
        except ChainRefusedError:
            if stored_at_ms >= now_ms:
                raise
        try:
            return self.check_chain(parts, at_ms=stored_at_ms)
        except ChainRefusedError as error:
            return self._check_chain_retired(parts, error, now_ms=now_ms, stored_at_ms=stored_at_ms)

    def _check_chain_retired(
        self,
        parts: Frame | Link,
        refused: ChainRefusedError,
        *,
        now_ms: int,
        stored_at_ms: int,
        signed_at_ms: int | None = None,
    ) -> VerifiedChain:
        try:
            sender = self._chains.verify_retired(
                parts.chain, now_ms=now_ms, stored_at_ms=stored_at_ms, signed_at_ms=signed_at_ms
            )
        except ChainRefusedError:
            raise refused from None  # it says more of who asks than what was tried last
        return _with_nothing_beside(parts, sender)

    # --- 4. proof

    def check_proof(self, parts: Frame | Link, sender: VerifiedChain) -> None:
        """Step 4: ``sender`` signed the tree, and the head is in it. Raises SignatureRefusedError."""
        head_bytes = parts.head if isinstance(parts, Frame) else parts.head_bytes
        proof = parts.proof
        leaf = leaf_hash(protected_head(head_bytes))
        root = root_from_path(leaf, size=proof.size, index=proof.index, path=proof.path)
        key = (sender.x5t, proof.signature, proof.size, root)
        if key not in self._roots:
            _verify_signature(proof, root, sender)
            self._remember(key)

    def _remember(self, key: tuple[bytes, bytes, int, bytes]) -> None:
        while len(self._roots) >= self._max_roots:
            del self._roots[next(iter(self._roots))]
        self._roots[key] = None

    # --- 5. head

    def parse_head(self, parts: Frame, sender: VerifiedChain) -> OpenedEnvelope:
        """Step 5. Raises MalformedEnvelopeError, and SignatureRefusedError for what the head binds."""
        head = parse_head(parts.head, self._limits)
        self.check_sender(head, sender)
        if sha256(parts.payload) != head.pd:
            raise SignatureRefusedError("the payload is not the one whose hash the head holds")
        digest = head_digest(parts.head)
        link = Link(parts.head, parts.proof, parts.chain, head, digest)
        return OpenedEnvelope(parts.data, head, digest, parts.payload, sender, link, parts.via)

    def check_sender(self, head: Head, sender: VerifiedChain) -> None:
        """Compare who a head says it is from with whose certificate verified."""
        if head.iss != sender.spiffe_id:
            raise SignatureRefusedError(f"{sender.spiffe_id} signed a head in the name of {head.iss}")
        if head.x5t != sender.x5t:
            raise SignatureRefusedError(f"the head of {head.iss} names another certificate than the one sent")

    # --- links (rule 5 of delegation)

    def verify_link(
        self, link: Link, *, now_ms: int | None = None, stored_at_ms: int | None = None
    ) -> VerifiedChain:
        """Take a link of ``via`` through steps 3 to 5, as of its own ``iat``. Errors as :meth:`open`.

        ``stored_at_ms``, with ``now_ms``, is when it is known to have been there, other than by its own word:
        its authority may have left the bundle after that. Without the two it must be in the bundle.
        """
        signed_ms = link.head.iat
        try:
            sender = self.check_chain(link, at_ms=signed_ms)
        except ChainRefusedError as error:
            if now_ms is None or stored_at_ms is None:
                raise
            sender = self._check_chain_retired(
                link, error, now_ms=now_ms, stored_at_ms=stored_at_ms, signed_at_ms=signed_ms
            )
        self.check_proof(link, sender)
        self.check_sender(link.head, sender)
        return sender


def _with_nothing_beside(parts: Frame | Link, sender: VerifiedChain) -> VerifiedChain:
    # Certificates beside the path would be bytes that nothing vouches for.
    sent = tuple(map(sha256, parts.chain[1:]))
    if sent != sender.issuers[: len(sent)]:
        raise ChainRefusedError(f"{sender.spiffe_id} sent certificates beside its path")
    return sender


def _verify_signature(proof: Proof, root: bytes, sender: VerifiedChain) -> None:
    algorithm = signature_algorithm(sender.public_key.curve)
    try:
        sender.public_key.verify(proof.signature, protected_root(proof.size, root), algorithm)
    except InvalidSignature:
        raise SignatureRefusedError(f"the signature is not {sender.spiffe_id}'s over this envelope") from None


# --- 8. time --------------------------------------------------------------------------------------

_WITH_EXPIRY: Final = frozenset({Kind.TASK, Kind.EVENT, Kind.REISSUE})

_WRITTEN_WHEN_POSSIBLE: Final = frozenset({Kind.RECORD, Kind.PROGRESS})
"""An agent that stood still, or had no broker, writes them late. What counts is that they were stored while
its certificate was valid: nobody else could sign them then, and nobody chooses the broker's time."""


def check_time_now(head: Head, now_ms: int, limits: Limits = DEFAULT_LIMITS) -> None:
    """Step 8 for ``call`` and ``control``, whose chain was checked as of ``now_ms``.

    Raises:
        TimeRefusedError: expired, issued more than 2 s in the future, or more than 30 s ago.

    """
    _check_not_future(head, now_ms, limits)
    if head.iat < now_ms - limits.max_age_ms:
        raise TimeRefusedError(f"issued {now_ms - head.iat} ms ago, more than {limits.max_age_ms}")
    _check_not_expired(head, now_ms)


def check_time_reply(head: Head, now_ms: int, limits: Limits = DEFAULT_LIMITS) -> None:
    """Step 8 for ``reply`` and ``refusal``: within ± 30 s. What makes them fresh is ``re``.

    Raises:
        TimeRefusedError: further away.

    """
    if abs(now_ms - head.iat) > limits.max_age_ms:
        raise TimeRefusedError(f"an answer whose time is {now_ms - head.iat} ms off")


def check_time_stored(
    opened: OpenedEnvelope,
    *,
    now_ms: int,
    stored_at_ms: int,
    parked: bool = False,
    late: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> bool:
    """Step 8 for what was read from a stream; ``stored_at_ms`` is the stream's timestamp of it.

    Returns whether the sender's certificates have expired meanwhile (``context.sender_expired``). Then
    the chain must have been checked as of ``stored_at_ms``, with authorities that were in the bundle
    at that time; else as of ``now_ms``. ``parked`` leaves out ``nbf``, for who keeps delayed tasks;
    ``late`` leaves out ``exp``, for who undoes what a task did before its end came.

    Raises:
        TimeRefusedError: from the future, expired, before ``nbf``, or, for a sender that has expired,
            stored outside the chain's validity or, but for records and progress, more than 30 s away
            from ``iat``.

    """
    head = opened.head
    _check_not_future(head, now_ms, limits)
    if head.kind in _WITH_EXPIRY and not late:
        _check_not_expired(head, now_ms)
    if head.nbf is not None and not parked and head.nbf > now_ms + limits.clock_slack_ms:
        raise TimeRefusedError(f"not to be run for another {head.nbf - now_ms} ms")
    if opened.sender.valid_at(now_ms):
        return False
    _check_stored_in_time(opened, stored_at_ms, limits)
    return True


def _check_stored_in_time(opened: OpenedEnvelope, stored_at_ms: int, limits: Limits) -> None:
    head = opened.head
    if head.kind not in _WRITTEN_WHEN_POSSIBLE and abs(stored_at_ms - head.iat) > limits.max_age_ms:
        raise TimeRefusedError(f"stored {stored_at_ms - head.iat} ms after its iat, and expired since")
    if not (opened.sender.valid_at(head.iat) and opened.sender.valid_at(stored_at_ms)):
        raise TimeRefusedError("issued or stored outside the validity of its sender's certificates")


def _check_not_future(head: Head, now_ms: int, limits: Limits) -> None:
    if head.iat > now_ms + limits.clock_slack_ms:
        raise TimeRefusedError(f"issued {head.iat - now_ms} ms in the future; compare the clocks")


def _check_not_expired(head: Head, now_ms: int) -> None:
    if now_ms >= head.exp:
        raise TimeRefusedError(f"expired {now_ms - head.exp} ms ago")
