"""Asking workers what their listeners say: plain HTTP, in bounded time and size; no redirect is followed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from socket import SHUT_RDWR, socket
from threading import Timer
from typing import Final, NamedTuple
from urllib.parse import urlsplit

__all__ = ["Page", "fetch_all"]

_log = logging.getLogger(__name__)

_FETCH_S: Final = 2.0
_MAX_BYTES: Final = 1024 * 1024
"""Reading a page of metrics takes seconds for each megabyte of it."""
_PART_BYTES: Final = 65_536
_AT_ONCE: Final = 8


class Page(NamedTuple):
    """What a listener answered."""

    status: int
    text: str


def fetch_all(urls: Iterable[str]) -> list[Page | None]:
    """Return what is at each of ``urls``, in their order; ``None`` for what can't be had."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return list(pool.map(_fetched, urls))


def _fetched(url: str) -> Page | None:
    until = time.monotonic() + _FETCH_S
    parts = urlsplit(url)
    try:
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError("it is no http:// address")  # noqa: TRY301
        with closing(HTTPConnection(parts.hostname, parts.port, timeout=_FETCH_S)) as connection:
            connection.connect()
            with _cut_at(until, connection.sock):
                connection.request("GET", parts.path or "/")
                answer = connection.getresponse()
                page = bytearray()
                while (part := answer.read1(_PART_BYTES)) and len(page) <= _MAX_BYTES:
                    page += part
            if len(page) > _MAX_BYTES or time.monotonic() > until:
                raise ValueError("it is too long, or takes too long")  # noqa: TRY301
            return Page(answer.status, page.decode())
    except (OSError, ValueError, HTTPException) as error:
        _log.info("what is at %s can't be had: %s", url, error)
        return None


@contextmanager
def _cut_at(until: float, connected: socket) -> Iterator[None]:
    """End a conversation at a monotonic time; a socket's own timeout begins anew with each byte."""
    timer = Timer(max(0.0, until - time.monotonic()), _cut, (connected,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _cut(connected: socket) -> None:
    with suppress(OSError):  # it has ended meanwhile
        connected.shutdown(SHUT_RDWR)
