"""A loop of their own for tests that put time forward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from anyio import pytest_plugin


@pytest.fixture(autouse=True)
def _a_loop_of_its_own() -> Iterator[None]:
    """Leave the loop of the live stacks alone.

    As long as an asynchronous fixture of a whole session is there, anyio runs all tests on its loop. A stack
    that lives there would live through all the hours, too: its watches look, its broker is told of renewals.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, nothing in (("_current_runner", None), ("_runner_stack", None), ("_runner_leases", 0)):
            patch.setattr(pytest_plugin, name, nothing)
        yield
