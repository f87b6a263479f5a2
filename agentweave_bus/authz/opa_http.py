"""Just enough HTTP/1.1 to ask an OPA server quickly over kept connections.

Measured on a unix socket, a general HTTP client costs several times what OPA itself takes, so this one
does what the decision path needs and refuses everything else: requests with a length, answers with a
length or in chunks, both bounded. Addresses: ``unix:///run/opa/opa.sock``, ``https://host:port`` with a
TLS context that is passed in, and ``http://host:port`` in development.

Deadlines are the caller's; a connection on which anything went wrong is closed, never used again.
"""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from agentweave_bus.config.security import is_loopback
from agentweave_bus.exceptions import ConfigurationError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

__all__ = ["HttpAnswer", "OpaAddress", "OpaConnections", "UnusableAnswerError"]

_MAX_HEAD_BYTES: Final = 16 * 1024
_MAX_BODY_BYTES: Final = 1024 * 1024
_OTHERS_MAY_WRITE: Final = 0o022
_KEY: Final = "authorization.opa_endpoint"


class UnusableAnswerError(Exception):
    """What came back is no HTTP answer that this client takes."""


class _StaleConnectionError(Exception):
    """A kept connection had been closed by the other side before it was used again."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """Status and body."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class OpaAddress:
    """Where an OPA server listens.

    Attributes:
        text: as configured.
        scheme: ``unix``, ``https`` or ``http``.
        path: of the socket, for ``unix``.
        host: otherwise.
        port: otherwise.

    """

    text: str
    scheme: str
    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str, *, environment: str) -> OpaAddress:
        """Read an address.

        Raises:
            ConfigurationError: it is malformed, or not allowed in this environment.

        """
        parts = urlsplit(text)
        if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
            return cls(text, "unix", path=parts.path)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path not in {"", "/"}:
            raise ConfigurationError(
                f"{text!r} is no address of an OPA server.",
                key=_KEY,
                hint="Write unix:///run/opa/opa.sock or https://host:8181.",
            )
        if parts.scheme == "http" and environment != "development":
            raise ConfigurationError(
                f"{text!r} is not encrypted, and whoever sits between could decide.",
                key=_KEY,
                hint="Use a unix socket or https:// outside of development.",
            )
        return cls(text, parts.scheme, host=parts.hostname, port=parts.port or 8181)

    def check_socket(self) -> None:
        """See that nobody else could put a socket in this one's place. A folder may still be to come.

        Raises:
            ConfigurationError: somebody could.

        """
        if self.scheme == "unix":
            with suppress(OSError):
                _check_socket_folder(Path(self.path))

    @property
    def is_plain_off_loopback(self) -> bool:
        """Whether answers travel unprotected over a network."""
        return self.scheme == "http" and not is_loopback(self.host)


class OpaConnections:
    """The kept connections to one server, at most ``limit`` in use at once.

    ``tls`` makes the context of a new ``https`` connection; it must check the peer's SPIFFE ID.
    """

    def __init__(
        self, address: OpaAddress, *, tls: Callable[[], ssl.SSLContext] | None = None, limit: int = 16
    ) -> None:
        if address.scheme == "https" and tls is None:
            raise ConfigurationError(f"{address.text!r} needs this agent's identity for TLS.", key=_KEY)
        self._address = address
        self._tls = tls
        self._idle: list[_Connection] = []
        self._slots = asyncio.Semaphore(limit)
        self._generation = 0

    async def ask(self, method: str, path: str, body: bytes = b"") -> HttpAnswer:
        """Send one request and read its answer.

        Raises:
            OSError: the server can't be reached, or the connection broke.
            UnusableAnswerError: see there.
            ConfigurationError: the socket lies where others could replace it.

        """
        head = f"{method} {path} HTTP/1.1\r\nHost: opa\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        async with self._slots:
            while self._idle:
                try:
                    return await self._exchange(self._idle.pop(), request)
                except _StaleConnectionError:
                    continue
            return await self._exchange(await self._open(), request)

    def drop(self) -> None:
        """Close what is idle and let nothing in use be kept: identities or addresses have changed."""
        self._generation += 1
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, connection: _Connection, request: bytes) -> HttpAnswer:
        try:
            answer, keep = await connection.exchange(request)
        except BaseException:
            connection.close()
            raise
        if keep and connection.generation == self._generation:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    async def _open(self) -> _Connection:
        address, generation = self._address, self._generation
        if address.scheme == "unix":
            _check_socket_folder(Path(address.path))
            reader, writer = await asyncio.open_unix_connection(address.path, limit=_MAX_HEAD_BYTES)
        else:
            context = self._tls() if address.scheme == "https" and self._tls is not None else None
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=context, limit=_MAX_HEAD_BYTES
            )
        return _Connection(reader, writer, generation)


class _Connection:
    """One connection, one exchange at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int) -> None:
        self.generation = generation
        self._reader = reader
        self._writer = writer
        self._used = False

    def close(self) -> None:
        self._writer.transport.abort()

    async def exchange(self, request: bytes) -> tuple[HttpAnswer, bool]:
        """Return the answer, and whether the connection may be used again."""
        self._writer.write(request)
        status, headers = await self._read_head()
        self._used = True
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = await self._read_chunks()
        else:
            body = await self._read_exactly(_length(headers.get("content-length", ""), 10))
        return HttpAnswer(status, body), headers.get("connection", "").lower() != "close"

    async def _read_head(self) -> tuple[int, dict[str, str]]:
        try:
            await self._writer.drain()
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if self._used and not error.partial:
                raise _StaleConnectionError from error
            raise ConnectionResetError("the connection closed before the answer") from error
        except asyncio.LimitOverrunError as error:
            raise UnusableAnswerError("the answer's head is too long") from error
        except ConnectionError as error:
            if self._used:
                raise _StaleConnectionError from error
            raise
        return _parse_head(head)

    async def _read_chunks(self) -> bytes:
        body = b""
        while True:
            size = _length(await self._read_line(), 16)
            if len(body) + size > _MAX_BODY_BYTES:
                raise UnusableAnswerError("the answer is too long")
            if size == 0:
                break
            body += await self._read_exactly(size)
            if await self._read_line():
                raise UnusableAnswerError("a chunk of the answer is longer than it says")
        if await self._read_line():
            raise UnusableAnswerError("the answer has trailers")
        return body

    async def _read_line(self) -> str:
        try:
            line = await self._reader.readuntil(b"\r\n")
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the connection closed within the answer") from error
        except asyncio.LimitOverrunError as error:
            raise UnusableAnswerError("a line of the answer is too long") from error
        return line[:-2].decode("latin-1")

    async def _read_exactly(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the connection closed within the answer") from error


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if version != "HTTP/1.1" or not rest[:3].isascii() or not rest[:3].isdigit():
        raise UnusableAnswerError("the answer is no HTTP/1.1")
    headers: dict[str, str] = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        if headers.setdefault(name.strip().lower(), value.strip()) != value.strip():
            raise UnusableAnswerError(f"the answer has two values of {name.strip()}")
    return int(rest[:3]), headers


def _length(text: str, base: int) -> int:
    digits = "0123456789abcdef"[:base]
    if not text or text.lower().strip(digits) or len(text) > len(str(_MAX_BODY_BYTES)):
        raise UnusableAnswerError("the answer's length is missing or malformed")
    size = int(text, base)
    if size > _MAX_BODY_BYTES:
        raise UnusableAnswerError("the answer is too long")
    return size


def _check_socket_folder(path: Path) -> None:
    """Refuse a socket that somebody else could put in place of OPA's.

    Its folder must belong to root or to this user and be writable by nobody else; above it, a folder
    that others may write must be sticky (as /tmp is).
    """
    folder = path.parent.resolve()
    for step in (folder, *folder.parents):
        status = step.stat()
        writable = status.st_mode & _OTHERS_MAY_WRITE and not (
            step != folder and status.st_mode & stat.S_ISVTX
        )
        if writable or status.st_uid not in {0, os.geteuid()}:
            raise ConfigurationError(
                f"{path} lies in {step}, which others than root and this user can change.",
                key=_KEY,
                hint=f"Put the socket into a folder of its own, mode 0755 or stricter ('chmod go-w {step}').",
            )
