"""Fixtures: a world of agents with real certificates. Made once; nothing here changes state."""

from __future__ import annotations

import pytest

from tests.unit.envelope.world import World


@pytest.fixture(scope="session")
def world() -> World:
    return World()
