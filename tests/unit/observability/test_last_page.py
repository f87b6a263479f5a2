"""The last page of a worker's metrics, in lines over its pipe."""

from __future__ import annotations

import base64
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.observability.heartbeat import BEAT_SECONDS, READY_FD, SupervisorPipe
from agentweave_bus.observability.last_page import LastPage, lines_of


def read(lines: list[bytes]) -> str | None:
    page, whole = LastPage(), None
    for line in lines:
        word, _, told = line.decode().partition(" ")
        if word == "metrics":
            page.add(told)
        else:
            whole = page.whole(told)
    return whole


@given(st.text(max_size=200), st.integers(0, 40_000))
def test_what_is_told_is_read_and_each_line_goes_through_a_pipe_as_a_whole(text: str, noise: int) -> None:
    page = text + os.urandom(noise // 2).hex()
    lines = list(lines_of(page.encode()))
    assert max(map(len, lines)) <= 4096
    assert read(lines) == page
    for missing in range(len(lines) - 1):
        assert read(lines[:missing] + lines[missing + 1 :]) is None


def test_what_is_too_long_is_not_told() -> None:
    assert list(lines_of(os.urandom(100_000))) == []


@pytest.mark.parametrize(
    "told",
    ["", "0", "0 ü", "1 AAAA", "x AAAA", f"0 {base64.b64encode(zlib.compress(b'a')[:-1]).decode()}",
     f"0 {base64.b64encode(zlib.compress(bytes(9 * 2**20))).decode()}", f"0 {base64.b64encode(b'junk').decode()}"],
)  # fmt: skip
def test_what_is_no_page(told: str) -> None:
    page = LastPage()
    page.add(told)
    assert page.whole("1") is None


def test_only_a_supervisor_that_wants_beats_is_told() -> None:
    for variables, said in (({}, b""), ({BEAT_SECONDS: "1"}, b"metrics 0 ")):
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        SupervisorPipe({READY_FD: str(writing), **variables}).counted(b"page")
        os.close(writing)
        assert os.read(reading, 10) == said
        os.close(reading)


def test_a_worker_has_one_page() -> None:
    """Else a few bytes, repeated, would have the supervisor unpack it for as long as they come."""
    page = LastPage()
    for line in lines_of(b"page"):
        word, _, told = line.decode().partition(" ")
        if word == "metrics":
            page.add(told)
    assert [page.whole("1"), page.whole("1")] == ["page", None]
