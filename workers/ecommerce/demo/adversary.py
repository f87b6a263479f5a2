"""The attacks, made with what a real attacker would have: stolen keys, and a broker in its hands.

Nothing here goes through the package's own way of calling, which would check, ask a policy and refuse.
Frames are made or changed by hand and put on the wire with the plain NATS client.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
import string
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from nats.aio.msg import Msg

from agentweave_bus import SpiffeID
from agentweave_bus.bus.connection import BrokerClient
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.embedded.stack import EmbeddedStack
from agentweave_bus.envelope import (
    Draft,
    EnvelopeVerifier,
    Kind,
    OpenedEnvelope,
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

__all__ = ["Message", "Wire", "on_the_wire", "refused_without_svid", "sealed_by", "stolen_identity"]

_SECONDS: Final = 20.0
_HEARD: Final = ("aw.call.>", "aw.task.>", "aw.state.>", "aw.inbox.*.*.*.rpc.>", "demo.>")
_LIFETIME_MS: Final = 20_000
_INSTANCE_LENGTH: Final = 22
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


@dataclass(frozen=True, slots=True)
class Message:
    """What travels: a frame, where to, and where the answer is to go. ``digest`` is that of its head."""

    subject: str
    frame: bytes
    reply: str
    digest: bytes = b""

    @property
    def payload(self) -> bytes:
        """What the frame says to its recipient."""
        return decode_frame(self.frame).payload

    def altered(self, old: str, new: str) -> Message:
        """Return the same message with ``old`` in its payload written ``new``, which differs in one byte."""
        start = self.frame.rindex(self.payload) + self.payload.index(old.encode())
        frame = self.frame[:start] + new.encode() + self.frame[start + len(old) :]
        if sum(a != b for a, b in zip(self.frame, frame, strict=True)) != 1:
            raise DidNotHappenError("exactly one byte was to be changed")
        return replace(self, frame=frame)


class Wire:
    """A plain connection to the broker: it sends any bytes and keeps all that it may hear."""

    def __init__(self, source: IdentitySource) -> None:
        self._client = BrokerClient()
        self._heard: dict[str, Message] = {}
        self._news = asyncio.Condition()
        self._errors: asyncio.Queue[str] = asyncio.Queue()
        self._verifier = EnvelopeVerifier(ChainVerifier(source))

    async def send(self, subject: str, frame: bytes, reply: str) -> None:
        """Publish bytes as they are."""
        await self._client.publish(subject, frame, reply)
        await self._client.flush(timeout=int(_SECONDS))

    async def listen(self) -> None:
        """Hear every message between participants, and what the broker answers to this connection.

        Where workers are given tasks nobody listens: the broker takes a listener there for the worker, and
        would go on giving tasks to one that has died.
        """
        for subject in _HEARD:
            await self._client.subscribe(subject, cb=self._hear)
        await self._client.flush(timeout=int(_SECONDS))

    async def heard(self, subject: str) -> Message:
        """Return the last message that was heard on ``subject``."""
        async with asyncio.timeout(_SECONDS), self._news:
            await self._news.wait_for(lambda: subject in self._heard)
            return self._heard[subject]

    async def has_heard(self, subject: str) -> bool:
        """Say whether anything was heard on ``subject`` until now."""
        await self._client.flush(timeout=int(_SECONDS))
        return subject in self._heard

    async def refused_by_broker(self) -> str:
        """Return the broker's next complaint about this connection."""
        try:
            return await asyncio.wait_for(self._errors.get(), _SECONDS)
        except TimeoutError:
            raise DidNotHappenError("the broker did not refuse it") from None

    def opened(self, message: Message) -> OpenedEnvelope:
        """Verify an answer that was heard."""
        return self._verifier.open(message.frame, now_ms=_now_ms())

    async def _hear(self, message: Msg) -> None:
        async with self._news:
            self._heard[message.subject] = Message(message.subject, message.data, message.reply)
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


async def refused_without_svid(port: int) -> str:
    """Connect to the broker without a certificate and return with what it refuses.

    Raises:
        DidNotHappenError: it says something to us instead.

    """
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    writer = None
    try:
        async with asyncio.timeout(_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=nobody)
            said = await reader.read(1)
    except OSError as error:  # an ssl.SSLError is one
        return (error.strerror or str(error)).partition(" (_ssl")[0]
    finally:
        if writer is not None:
            writer.transport.abort()
    if said:
        raise DidNotHappenError("the broker talks to somebody without an SVID")
    return "closed without a word"


def sealed_by(
    source: IdentitySource,
    callee: SpiffeID,
    capability: str,
    payload: Any,
    *,
    in_the_name_of: SpiffeID | None = None,
) -> Message:
    """Seal a call by hand with the key that ``source`` holds, in its own or another's name; ask no policy."""
    svid = source.svid
    if in_the_name_of is not None:
        svid = cast("X509Svid", _Impostor(in_the_name_of, svid))
    now_ms = _now_ms()
    draft = Draft(
        kind=Kind.CALL,
        id=new_id(now_ms),
        aud=callee,
        cap=capability,
        sub=call_subject(callee, capability),
        iat=now_ms,
        exp=now_ms + _LIFETIME_MS,
        reply="".join(secrets.choice(_ALPHANUMERIC) for _ in range(_INSTANCE_LENGTH)),
    )
    sealed = Sealer(lambda: svid).seal_now(draft, encode_payload(payload))
    reply = reply_subject(sealed.head.iss, str(draft["reply"]), draft["id"])
    return Message(draft["sub"], sealed.frame, reply, sealed.digest)


@dataclass(frozen=True, slots=True)
class _Impostor:
    """Somebody's SVID under another name: what ``X509Svid`` itself refuses to be."""

    spiffe_id: SpiffeID
    real: X509Svid

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
