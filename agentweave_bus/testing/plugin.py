"""The pytest plugin: the fixtures ``bus`` and ``bus_trust_domain``.

It is loaded in every pytest run of an environment that has this package, so it imports nothing until a
fixture is used. The fixtures are plain functions and the bus opens at its first use, inside of your test;
when the test's coroutine ends, the bus is closed by that same coroutine. So it does not matter which plugin
runs your coroutines (anyio's, pytest-asyncio in either mode), and none is needed at all for a test that says
``asyncio.run(main(bus))`` around an ``async with bus:``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from agentweave_bus.testing.bus import Bus

__all__ = ["bus", "bus_policy", "bus_trust_domain", "pytest_runtest_call"]


@pytest.fixture(scope="session")
def bus_trust_domain() -> str:
    """Override this to have the trust domain of your agents' configurations."""
    return "test.local"


@pytest.fixture(scope="session")
def bus_policy() -> str | None:
    """Override this with the path of a policy directory or a grants file to begin each test with."""
    return None


@pytest.fixture
def bus(bus_trust_domain: str, bus_policy: str | None) -> Iterator[Bus]:
    """Give a bus in memory, on which nothing is allowed yet."""
    from agentweave_bus.testing.memory_bus import MemoryBus  # noqa: PLC0415 - see the module's docstring

    made = MemoryBus(bus_trust_domain, policy=bus_policy)
    yield made
    made.discard()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Have a coroutine test close its bus at its end, on the event loop that it ran on."""
    function = getattr(item, "obj", None)
    buses = _buses(getattr(item, "funcargs", {}))
    if not buses or not inspect.iscoroutinefunction(function):
        return (yield)

    @functools.wraps(function)
    async def closing(*args: Any, **kwargs: Any) -> None:
        try:
            await function(*args, **kwargs)
        finally:
            for one in buses:
                await one.aclose()

    item.obj = closing  # type: ignore[attr-defined]
    try:
        return (yield)
    finally:
        item.obj = function  # type: ignore[attr-defined]


def _buses(fixtures: dict[str, Any]) -> list[Bus]:
    """Return the buses among a test's fixtures; also those that another fixture asked for."""
    names = ("bus", "durable_bus")
    return [found for name in names if (found := fixtures.get(name)) is not None and hasattr(found, "aclose")]
