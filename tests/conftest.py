"""Fixtures that every suite shares."""

from __future__ import annotations

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script, as CI may: children would ignore SIGINT, too, and not end by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The bus client is asyncio's, so every asynchronous test runs there."""
    return "asyncio"
