"""What workers' listeners say is fetched in bounded time and size, however they say it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agentweave_bus.supervisor import fetching
from agentweave_bus.supervisor.fetching import Page, fetch_all

HEAD = b"HTTP/1.0 200 OK\r\n\r\n"


@contextmanager
def saying(*parts: bytes, over: float = 0.0) -> Iterator[str]:
    """Answer one request with ``parts``, one byte after the other where that shall take ``over`` seconds."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                for part in parts if not over else [bytes([one]) for one in b"".join(parts)]:
                    try:
                        connection.sendall(part)
                    except OSError:
                        return
                    if ended.wait(over / sum(map(len, parts))):
                        return

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/metrics"
        finally:
            ended.set()
            thread.join()


def test_a_page() -> None:
    with saying(HEAD, b"one\n", b"two\n") as url:
        assert fetch_all([url]) == [Page(200, "one\ntwo\n")]


@pytest.mark.parametrize("parts", [(HEAD + b"x" * 100,), (HEAD[:-2] + b"A: b\r\n" * 20,)])
def test_one_that_says_it_slowly_has_no_more_time_than_others(
    parts: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time; all of them together would take a minute."""
    monkeypatch.setattr(fetching, "_FETCH_S", 1.0)
    began = time.monotonic()
    with saying(*parts, over=60.0) as url:
        assert fetch_all([url]) == [None]
    assert time.monotonic() - began < 30


def test_one_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_MAX_BYTES", 1000)
    with saying(HEAD, *[b"x" * 500] * 3) as url:
        assert fetch_all([url]) == [None]


def test_where_nobody_listens_or_no_page_is() -> None:
    assert fetch_all(["http://127.0.0.1:1/metrics", "ftp://127.0.0.1/x"]) == [None, None]
