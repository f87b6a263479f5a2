"""The floor: the least Python that signs, verifies, decides and records a call, for comparison alone.

What it has: an envelope signed on both sides, one signature for all that leaves in one turn; a head that
binds sender, recipient, capability, subject, times and payload; both verified; a look at a table of who may
call whom; a replay filter; a chained audit record before anything runs, in one write a turn.

What it has not, and no bus can be without: certificates that are checked further than their expiry,
revocation, a strict decoder, any bound on any size or number, a policy, delegation, payloads that are checked
against what the capability takes, redaction, refusals that say why, deadlines, retries, metrics, traces,
rotation of anything, or a broker that goes away. Nothing but the benchmark may use it; the floor of durable
tasks (:mod:`benchmarks.durable.peers.floor`) does, too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import orjson
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from nats.aio.msg import Msg

from benchmarks.peers import Call, WrongAnswerError
from benchmarks.peers.raw import connected
from benchmarks.places import PAYLOAD, Place

__all__ = ["Audit", "Opener", "Sealer", "client", "now_milliseconds", "opened_audit", "serve"]

_SUBJECT: Final = "floor.echo"
_CALLER: Final = "client"
_CALLEE: Final = "worker"
_MAY: Final = {(_CALLER, _CALLEE, "echo"): "revision-1"}
_LIFETIME_MS: Final = 30_000
_ALGORITHM: Final = ec.ECDSA(SHA256())
_REMEMBERED: Final = 100_000

_pack: Final[Callable[[object], bytes]] = msgpack.packb


class Sealer:
    """Signs what one ``part`` sends, once for all that is queued in one turn of the loop."""

    def __init__(self, place: Place, part: str) -> None:
        key = load_pem_private_key(Path(place.options[f"{part}_key"]).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        chain = x509.load_pem_x509_certificates(Path(place.options[f"{part}_certificate"]).read_bytes())
        self._chain = [one.public_bytes(Encoding.DER) for one in chain]
        self._part = part
        self._x5t = sha256(self._chain[0]).digest()
        self._queue: list[tuple[bytes, bytes, asyncio.Future[tuple[bytes, bytes]]]] = []

    async def seal(self, head: dict[str, Any], payload: bytes) -> tuple[bytes, bytes]:
        """Return the frame, and the digest of its head."""
        whole = {"iss": self._part, "x5t": self._x5t, "pd": sha256(payload).digest(), **head}
        loop = asyncio.get_running_loop()
        if not self._queue:
            loop.call_soon(self._flush)
        sealed: asyncio.Future[tuple[bytes, bytes]] = loop.create_future()
        self._queue.append((_pack(whole), payload, sealed))
        return await sealed

    def _flush(self) -> None:
        queue, self._queue = self._queue, []
        levels = [[sha256(b"\0" + head).digest() for head, _, _ in queue]]
        while len(levels[-1]) > 1:
            levels.append(_parents(levels[-1]))
        signature = self._key.sign(levels[-1][0], _ALGORITHM)
        for index, (head, payload, sealed) in enumerate(queue):
            path = [
                level[at] if (at := (index >> depth) ^ 1) < len(level) else b""
                for depth, level in enumerate(levels[:-1])
            ]
            if not sealed.done():
                frame = _pack((head, signature, index, path, self._chain, payload))
                sealed.set_result((frame, levels[0][index]))


def _parents(level: list[bytes]) -> list[bytes]:
    pairs = zip(level[::2], level[1::2], strict=False)
    parents = [sha256(b"\1" + left + right).digest() for left, right in pairs]
    return parents + level[-1:] if len(level) % 2 else parents


class Opener:
    """Verifies; chains and roots are looked at once."""

    def __init__(self) -> None:
        self._leaves: dict[bytes, tuple[ec.EllipticCurvePublicKey, bytes, float]] = {}
        self._roots: dict[tuple[bytes, bytes, bytes], None] = {}

    def open(self, frame: bytes, now_ms: int) -> tuple[dict[str, Any], bytes, bytes]:
        """Return the head, the payload, and the digest of the head."""
        head_bytes, signature, index, path, chain, payload = msgpack.unpackb(frame)
        leaf = self._leaves.get(chain[0]) or self._read(chain[0])
        key, x5t, until_ms = leaf
        digest = node = sha256(b"\0" + head_bytes).digest()
        for sibling in path:
            if sibling:
                node = sha256(b"\1" + (sibling + node if index & 1 else node + sibling)).digest()
            index >>= 1
        root = (x5t, signature, node)
        if root not in self._roots:
            key.verify(signature, node, _ALGORITHM)
            self._roots = self._roots if len(self._roots) < _REMEMBERED else {}
            self._roots[root] = None
        head = msgpack.unpackb(head_bytes)
        if now_ms > until_ms or head["x5t"] != x5t or head["pd"] != sha256(payload).digest():
            raise WrongAnswerError("floor: an envelope that does not verify")
        return head, payload, digest

    def _read(self, der: bytes) -> tuple[ec.EllipticCurvePublicKey, bytes, float]:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        until_ms = certificate.not_valid_after_utc.timestamp() * 1000
        self._leaves[der] = key, sha256(der).digest(), until_ms
        return self._leaves[der]


class Audit:
    """A chain of records, written once for all of one turn of the loop."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._previous = bytes(32)
        self._lines: list[bytes] = []
        self._waiting: list[asyncio.Future[None]] = []

    async def record(self, record: dict[str, Any]) -> None:
        """Append it, and return when it is written."""
        self.record_soon(record)
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(written)
        await written

    def record_soon(self, record: dict[str, Any]) -> None:
        """Append it without waiting."""
        if not self._lines:
            asyncio.get_running_loop().call_soon(self._write)
        line = orjson.dumps({"prev": self._previous.hex(), **record})
        self._previous = sha256(line).digest()
        self._lines.append(line + b"\n")

    def _write(self) -> None:
        os.write(self._descriptor, b"".join(self._lines))
        waiting, self._lines, self._waiting = self._waiting, [], []
        for one in waiting:
            if not one.done():
                one.set_result(None)


@contextmanager
def opened_audit() -> Iterator[Audit]:
    """Record into a file for the length of the block."""
    with tempfile.TemporaryFile() as file:
        yield Audit(file.fileno())


def now_milliseconds() -> int:
    """Return the time since the epoch."""
    return time.time_ns() // 1_000_000


async def serve(place: Place, ready: Callable[[], None]) -> None:
    """Answer every call that verifies with its own payload."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    sealer, opener = Sealer(place, _CALLEE), Opener()
    seen: dict[bytes, None] = {}
    tasks: set[asyncio.Task[None]] = set()
    with opened_audit() as audit:
        async with connected(place, _CALLEE) as connection:

            async def answer(message: Msg) -> None:
                now_ms = now_milliseconds()
                head, payload, digest = opener.open(message.data, now_ms)
                bound = (head["kind"], head["aud"], head["cap"], head["sub"])
                if bound != ("call", _CALLEE, "echo", message.subject) or digest in seen:
                    raise WrongAnswerError("floor: bound to something else, or a replay")
                if not head["iat"] - _LIFETIME_MS <= now_ms < head["exp"]:
                    raise WrongAnswerError("floor: not of this time")
                if len(seen) >= _REMEMBERED:
                    seen.clear()
                seen[digest] = None
                facts = {"caller": head["iss"], "action": head["cap"], "digest": digest.hex()}
                facts["revision"] = _MAY[head["iss"], _CALLEE, head["cap"]]
                asked = orjson.loads(payload)
                await audit.record({"event": "admission", "ts": now_ms, **facts})
                reply = {
                    "kind": "reply",
                    "aud": head["iss"],
                    "sub": message.reply,
                    "iat": now_ms,
                    "re": digest,
                }
                frame, _ = await sealer.seal(reply, orjson.dumps(asked))
                audit.record_soon({"event": "outcome", "status": "completed", **facts})
                await connection.publish(message.reply, frame)

            async def take(message: Msg) -> None:
                task = asyncio.create_task(answer(message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

            await connection.subscribe(_SUBJECT, cb=take)
            await connection.flush()
            ready()
            await stop.wait()


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[Call]:
    """Connect; each call is decided, recorded, sealed, sent, and its answer verified."""
    sealer, opener = Sealer(place, _CALLER), Opener()
    waiting: dict[str, asyncio.Future[Msg]] = {}
    inbox = f"_INBOX.{os.urandom(16).hex()}"
    with opened_audit() as audit:
        async with connected(place, _CALLER) as connection:

            async def arrived(message: Msg) -> None:
                if (one := waiting.get(message.subject)) is not None and not one.done():
                    one.set_result(message)

            await connection.subscribe(f"{inbox}.*", cb=arrived)

            async def call() -> None:
                now_ms = now_milliseconds()
                number = os.urandom(16).hex()
                facts = {"callee": _CALLEE, "action": "echo", "id": number}
                facts["revision"] = _MAY[_CALLER, _CALLEE, "echo"]
                await audit.record({"event": "call", "ts": now_ms, **facts})
                frame, _ = await sealer.seal(_call_head(number, now_ms), orjson.dumps({"text": PAYLOAD}))
                answered: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
                reply = f"{inbox}.{number}"
                waiting[reply] = answered
                try:
                    async with asyncio.timeout(_LIFETIME_MS / 1000):
                        await connection.publish(_SUBJECT, frame, reply)
                        message = await answered
                finally:
                    del waiting[reply]
                head, payload, _ = opener.open(message.data, now_milliseconds())
                bound = (head["kind"], head["iss"], head["sub"])
                if bound != ("reply", _CALLEE, reply) or orjson.loads(payload) != {"text": PAYLOAD}:
                    raise WrongAnswerError("floor: another answer than was sent")

            yield call


def _call_head(number: str, now_ms: int) -> dict[str, Any]:
    times = {"iat": now_ms, "exp": now_ms + _LIFETIME_MS}
    return {"kind": "call", "id": number, "aud": _CALLEE, "cap": "echo", "sub": _SUBJECT, **times}
