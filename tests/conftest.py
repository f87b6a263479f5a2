"""Fixtures that every suite shares."""

from __future__ import annotations

import gc
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


gc.set_threshold(50_000, 20, 100)  # thousands of tests are collected, none of which is garbage


def pytest_collection_finish() -> None:
    """Have what was collected looked through never again: it took a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
