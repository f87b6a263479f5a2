"""Fixtures that every suite shares."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The bus client is asyncio's, so every asynchronous test runs there."""
    return "asyncio"
