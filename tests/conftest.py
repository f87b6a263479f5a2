"""Fixtures that every suite shares."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

# How long an example takes is the machine's business, and others work on it, too.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script, as CI may: children would ignore SIGINT, too, and not end by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The bus client is asyncio's, so every asynchronous test runs there."""
    return "asyncio"
