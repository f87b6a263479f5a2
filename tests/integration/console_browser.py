"""A browser without a screen: asks a console over real HTTP, says what browsers say, and reads its events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import h11

__all__ = ["Answer", "Browser", "Events"]

_PATIENCE_S = 30.0


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)


class Events:
    """What a stream says; ``seen`` is all of it, byte by byte, ``state`` what a page would hold."""

    def __init__(self, wire: _Wire, headers: dict[str, str]) -> None:
        self.headers = headers
        self.state: dict[str, Any] = {}
        self.seen = b""
        self._wire = wire
        self._rest = b""

    async def next(self) -> str:
        """Read one event into ``state`` and return its name; empty at the end of the stream."""
        while b"\n\n" not in self._rest:
            data = await self._wire.data()
            if not data:
                return ""
            self._rest += data
            self.seen += data
        event, _, self._rest = self._rest.partition(b"\n\n")
        if event.startswith(b":"):
            return await self.next()
        name, data = event.split(b"\n")
        self.state |= json.loads(data.removeprefix(b"data: "))
        return name.removeprefix(b"event: ").decode()

    async def until(self, holds: Any, seconds: float = _PATIENCE_S) -> None:
        """Read until something holds of the state."""
        async with asyncio.timeout(seconds):
            while not (self.state and holds(self.state)):
                assert await self.next(), "the stream ended"


class _Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT)

    async def ask(
        self, method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> h11.Response:
        request = h11.Request(method=method, target=target, headers=headers)
        for event in (request, h11.Data(data=body), h11.EndOfMessage()):
            self._writer.write(self._http.send(event) or b"")
        response = await self._next()
        assert isinstance(response, h11.Response)
        return response

    async def data(self) -> bytes:
        event = await self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def _next(self) -> Any:
        async with asyncio.timeout(_PATIENCE_S):
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(65_536))
        return event


class Browser:
    """Has no session until it opens an address."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        assert place.hostname
        self.port = place.port
        self.host = place.netloc
        self.cookie: str | None = None
        self._address = place.hostname

    @classmethod
    async def at(cls, url: str) -> Self:
        """Open an address with its token, as somebody does who was given it."""
        browser = cls(url)
        place = urlsplit(url)
        answer = await browser.ask(f"{place.path}?{place.query}", sec_fetch_site="none")
        assert answer.status == 303, answer
        browser.cookie = answer.headers["set-cookie"].partition(";")[0]
        return browser

    async def ask(
        self, target: str, *, method: str = "GET", body: bytes = b"", **headers: str | None
    ) -> Answer:
        """Ask for something; headers of ``None`` are not sent."""
        async with self._asked(target, method, body, headers) as (wire, response):
            data = b""
            while more := await wire.data():
                data += more
            return Answer(response.status_code, _headers(response), data)

    async def act(self, act: str, ref: str, reason: str = "", **headers: str | None) -> Answer:
        """Do something as the page does it."""
        value = (await self.ask("/api/state")).json.get("csrf")
        return await self.ask(
            f"/api/act/{act}",
            method="POST",
            body=json.dumps({"ref": ref, "reason": reason}).encode(),
            **{
                "content_type": "application/json",
                "x_agentweave_session": value,
                "origin": f"http://{self.host}",
            }
            | headers,
        )

    @asynccontextmanager
    async def events(self) -> AsyncIterator[Events]:
        """Read the stream."""
        async with self._asked("/api/events", "GET", b"", {}) as (wire, response):
            assert response.status_code == 200
            yield Events(wire, _headers(response))

    @asynccontextmanager
    async def _asked(self, target: str, method: str, body: bytes, headers: Any) -> AsyncIterator[Any]:
        said = {
            "host": self.host,
            "cookie": self.cookie,
            "sec_fetch_site": "same-origin",
            "connection": "close",
        }
        said |= {"content_length": str(len(body))} if body else {}
        listed = [
            (name.replace("_", "-"), value) for name, value in (said | headers).items() if value is not None
        ]
        reader, writer = await asyncio.open_connection(self._address, self.port)
        try:
            wire = _Wire(reader, writer)
            yield wire, await wire.ask(method, target, listed, body)
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def _headers(response: h11.Response) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in response.headers}
