"""A server in the place of an OPA that answers as a test wants: well, wrongly, slowly or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from agentweave_bus.identity import X509Svid
from agentweave_bus.identity.memory_file import MemoryFile
from tests.listening import Accepted

REVISION = "r1"


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked: the last part of the path (``decision``, ``allow``, ``standing``), and the input."""

    rule: str
    input: Any

    @property
    def is_poll(self) -> bool:
        return self.rule == "agentweave_bundle"


Play: TypeAlias = Callable[[Question, asyncio.StreamWriter], Awaitable[None]]


def http(body: bytes, status: int = 200, *headers: str) -> bytes:
    """Write an answer with its length."""
    head = "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body


def document(result: Any, revision: str = REVISION) -> bytes:
    """Write what OPA's data API says of a document."""
    return json.dumps({"result": result, "provenance": {"bundles": {"b": {"revision": revision}}}}).encode()


def raw(answer: bytes, *, close: bool = False) -> Play:
    """Send these bytes, whatever was asked."""

    async def play(_question: Question, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        if close:
            writer.close()

    return play


def result(value: Any, revision: str = REVISION) -> Play:
    """Answer every question with this document."""
    return raw(http(document(value, revision)))


def dripping(answer: bytes, seconds: float = 0.005) -> Play:
    """Send these bytes one by one."""

    async def play(_question: Question, writer: asyncio.StreamWriter) -> None:
        for byte in answer:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(seconds)

    return play


async def silence(_question: Question, _writer: asyncio.StreamWriter) -> None:
    """Say nothing, and keep the connection."""
    await asyncio.sleep(60)


async def hanging_up(_question: Question, writer: asyncio.StreamWriter) -> None:
    """Close without an answer."""
    writer.transport.abort()


class OpaPlayer:
    """Listens on a unix socket in ``folder``, or with :meth:`start`'s ``svid`` over TLS on a port.

    ``play`` answers questions; polls for the revision are answered well, unless ``plays_polls``.
    """

    def __init__(self, folder: Path, name: str = "opa.sock") -> None:
        self.socket = folder / name
        self.url = f"unix://{self.socket}"
        self.revision = REVISION
        self.allow = True
        self.limits: dict[str, Any] = {}
        self.standing_packages: tuple[str, ...] = ()
        self.play: Play = self.well
        self.plays_polls = False
        self.asked: list[Question] = []
        self.most_connections = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepted = Accepted(self._connected)
        self._server: asyncio.Server | None = None
        self._port = 0

    async def start(self, *, svid: X509Svid | None = None) -> None:
        loop = asyncio.get_running_loop()
        if svid is None:
            self._server = await loop.create_unix_server(self._accepted, self.socket)
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with MemoryFile(svid.chain_pem()) as chain, MemoryFile(svid.key_pem()) as key:
            context.load_cert_chain(chain.path, key.path)
        self._server = await loop.create_server(
            self._accepted, "127.0.0.1", self._port, ssl=context, reuse_address=True
        )
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"https://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """End as a crash would: connections break."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._accepted.drop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.socket.unlink(missing_ok=True)

    @contextlib.contextmanager
    def playing(self, play: Play, *, polls: bool = False) -> Iterator[None]:
        """Answer questions so within the block, and well after it."""
        self.play, self.plays_polls = play, polls
        try:
            yield
        finally:
            self.play, self.plays_polls = self.well, False

    def questions(self) -> list[Question]:
        """What was asked so far, polls apart."""
        return [one for one in self.asked if not one.is_poll]

    async def well(self, question: Question, writer: asyncio.StreamWriter) -> None:
        """Answer as an OPA does whose policy says ``allow`` to everything."""
        answers: dict[str, Any] = {
            "agentweave_bundle": {"standing": list(self.standing_packages)},
            "decision": {"allow": self.allow, "reason": "the player", "limits": self.limits},
            "standing": {"allow": self.allow, "cache_seconds": 30},
        }
        writer.write(http(document(answers[question.rule], self.revision)))
        await writer.drain()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.most_connections = max(self.most_connections, len(self._writers))
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    question = await _question(reader)
                    self.asked.append(question)
                    play = self.play if self.plays_polls or not question.is_poll else self.well
                    await play(question, writer)
        except asyncio.CancelledError:  # by stop(); the server's own task must not end as a failure
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()


async def _question(reader: asyncio.StreamReader) -> Question:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    path = head.split(" ")[1].partition("?")[0]
    length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
    body = await reader.readexactly(length)
    return Question(path.rpartition("/")[2], json.loads(body)["input"] if body else None)
