"""Asking workers what their listeners say: plain HTTP, in bounded time and size; no redirect is followed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPException
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
            connection.request("GET", parts.path or "/")
            answer = connection.getresponse()
            page = bytearray()
            while part := answer.read1(_PART_BYTES):
                page += part
                if len(page) > _MAX_BYTES or time.monotonic() > until:
                    raise ValueError("it is too long, or takes too long")  # noqa: TRY301
            return Page(answer.status, page.decode())
    except (OSError, ValueError, HTTPException) as error:
        _log.info("what is at %s can't be had: %s", url, error)
        return None
