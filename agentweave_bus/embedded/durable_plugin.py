"""The pytest plugin of the fixture ``durable_bus``.

Apart from ``agentweave_bus.testing.plugin``, which closes it at the end of a test, because what it is made of
stands above that part. Like it, it imports nothing until the fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from agentweave_bus.embedded.durable_bus import DurableBus

__all__ = ["durable_bus"]


@pytest.fixture
def durable_bus(bus_trust_domain: str, bus_policy: str | None) -> Iterator[DurableBus]:
    """Give a bus with a real broker, on which nothing is allowed yet."""
    from agentweave_bus.embedded.durable_bus import DurableBus  # noqa: PLC0415 - see the module's docstring

    made = DurableBus(bus_trust_domain, policy=bus_policy)
    yield made
    made.discard()
