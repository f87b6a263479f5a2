"""The attacks, made with what a real attacker would have: stolen keys, and a broker in its hands.

Nothing here goes through the package's own way of calling, which would check, ask a policy and refuse.
Frames are made or changed by hand and put on the wire with the plain NATS client.
"""

from __future__ import annotations

import asyncio
import secrets
import string
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

from nats.aio.client import Client
from nats.aio.msg import Msg

from agentweave_bus import SpiffeID
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.embedded.stack import EmbeddedStack
from agentweave_bus.envelope import (
    JSON_CONTENT_TYPE,
    Draft,
    EnvelopeVerifier,
    Kind,
    OpenedEnvelope,
    Sealed,
    Sealer,
    decode_frame,
    encode_payload,
    new_id,
)
from agentweave_bus.identity import (
    ChainVerifier,
    IdentitySource,
    SPIFFEIdentityProvider,
    X509Svid,
    client_context,
)
from workers.ecommerce.demo.screen import DidNotHappenError

__all__ = ["Wire", "altered", "forged", "impersonating", "on_the_wire", "reply_to", "stolen_identity"]

_SECONDS: Final = 5.0
_LIFETIME_MS: Final = 20_000
_ALPHANUMERIC: Final = string.ascii_letters + string.digits


@asynccontextmanager
async def stolen_identity(stack: EmbeddedStack, victim: SpiffeID) -> AsyncIterator[IdentitySource]:
    """Hold the SVID and private key of ``victim``."""
    source = IdentitySource(
        SPIFFEIdentityProvider(stack.api.endpoint(victim), victim),
        allowed_trust_domains=[victim.trust_domain],
        expected_id=victim,
    )
    await source.start(_SECONDS)
    try:
        yield source
    finally:
        await source.aclose()


class Wire:
    """A plain connection to the broker: it sends any bytes and keeps all that it may hear."""

    def __init__(self, source: IdentitySource) -> None:
        self._client = Client()
        self._heard: dict[str, Msg] = {}
        self._news = asyncio.Condition()
        self._errors: asyncio.Queue[str] = asyncio.Queue()
        self._verifier = EnvelopeVerifier(ChainVerifier(source))

    async def send(self, subject: str, frame: bytes, reply: str) -> None:
        """Publish bytes as they are."""
        await self._client.publish(subject, frame, reply)
        await self._client.flush(timeout=int(_SECONDS))

    async def listen(self) -> None:
        """Hear every message on the broker."""
        await self._client.subscribe(">", cb=self._hear)
        await self._client.flush(timeout=int(_SECONDS))

    async def heard(self, subject: str) -> Msg:
        """Return the last message that was heard on ``subject``."""
        async with asyncio.timeout(_SECONDS), self._news:
            await self._news.wait_for(lambda: subject in self._heard)
            return self._heard[subject]

    async def refused_by_broker(self) -> str:
        """Return the broker's next complaint about this connection."""
        try:
            return await asyncio.wait_for(self._errors.get(), _SECONDS)
        except TimeoutError:
            raise DidNotHappenError("the broker did not refuse it") from None

    def opened(self, message: Msg) -> OpenedEnvelope:
        """Verify an answer that was heard."""
        return self._verifier.open(message.data, now_ms=_now_ms())

    async def _hear(self, message: Msg) -> None:
        async with self._news:
            self._heard[message.subject] = message
            self._news.notify_all()

    async def _complain(self, error: Exception) -> None:
        self._errors.put_nowait(str(error))

    async def connect(self, stack: EmbeddedStack, source: IdentitySource) -> None:
        """Connect with the identity that ``source`` holds."""
        await self._client.connect(
            stack.bus_url,
            tls=client_context(source, stack.broker_id),
            tls_hostname="127.0.0.1",
            tls_handshake_first=True,
            allow_reconnect=False,
            error_cb=self._complain,
        )

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()


@asynccontextmanager
async def on_the_wire(stack: EmbeddedStack, source: IdentitySource) -> AsyncIterator[Wire]:
    """Connect to the broker without any of the package's checks."""
    wire = Wire(source)
    await wire.connect(stack, source)
    try:
        yield wire
    finally:
        await wire.close()


def altered(frame: bytes, old: str, new: str) -> bytes:
    """Return ``frame`` with ``old`` in its payload written ``new``, which differs in one byte."""
    payload = decode_frame(frame).payload
    start = frame.rindex(payload) + payload.index(old.encode())
    changed = frame[:start] + new.encode() + frame[start + len(old) :]
    if sum(a != b for a, b in zip(frame, changed, strict=True)) != 1:
        raise DidNotHappenError("exactly one byte was to be changed")
    return changed


def forged(source: IdentitySource, callee: SpiffeID, capability: str, payload: Any) -> Sealed:
    """Seal a call by hand, with the key that ``source`` holds; no policy is asked."""
    return _sealed(lambda: source.svid, callee, capability, payload)


def impersonating(
    source: IdentitySource, name: SpiffeID, callee: SpiffeID, capability: str, payload: Any
) -> Sealed:
    """Seal a call in the name of ``name``, with the key and the certificates that ``source`` holds."""
    impostor = cast("X509Svid", _Impostor(name, source.svid))
    return _sealed(lambda: impostor, callee, capability, payload)


@dataclass(frozen=True, slots=True)
class _Impostor:
    """Somebody's SVID under another name: what ``X509Svid`` itself refuses to be."""

    spiffe_id: SpiffeID
    real: X509Svid

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def _sealed(svid: Callable[[], X509Svid], callee: SpiffeID, capability: str, payload: Any) -> Sealed:
    now_ms = _now_ms()
    draft = Draft(
        kind=Kind.CALL,
        id=new_id(now_ms),
        aud=callee,
        cap=capability,
        sub=call_subject(callee, capability),
        iat=now_ms,
        exp=now_ms + _LIFETIME_MS,
        ct=JSON_CONTENT_TYPE,
        reply="".join(secrets.choice(_ALPHANUMERIC) for _ in range(22)),
    )
    return Sealer(svid).seal_now(draft, encode_payload(payload))


def reply_to(sealed: Sealed) -> str:
    """Return the reply subject that a sealed call names."""
    head = sealed.head
    assert head.reply is not None  # set above
    return reply_subject(head.iss, head.reply, head.id)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
