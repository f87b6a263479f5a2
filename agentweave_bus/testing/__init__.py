"""Tools for testing agents: identities, a bus in memory, a clock, policies as tables, and faults.

Most tests need none of these names: the fixtures ``bus`` and ``durable_bus`` come with the installation
(:mod:`agentweave_bus.testing.plugin`). What is here:

- :class:`MockSecureAgent` runs an agent's handlers without any bus; :class:`MockIdentityProvider` gives an
  identity that nobody has to issue, :class:`TrustDomain` issues them;
- :class:`Bus` is what the fixtures give, :class:`MemoryBus` the one without a server;
- :func:`assert_policy_matrix` holds a policy to a table of who may do what.

All of it is for tests: keys are thrown away, and nothing here can be configured into a running agent.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from agentweave_bus.testing.bus import Bus
    from agentweave_bus.testing.clock import Clock, RealClock, VirtualClock
    from agentweave_bus.testing.memory_bus import MemoryBus
    from agentweave_bus.testing.mock_agent import MockSecureAgent
    from agentweave_bus.testing.policy_matrix import PolicyCase, assert_policy_matrix
    from agentweave_bus.testing.trust import MockIdentityProvider, TrustDomain

__all__ = [
    "Bus",
    "Clock",
    "MemoryBus",
    "MockIdentityProvider",
    "MockSecureAgent",
    "PolicyCase",
    "RealClock",
    "TrustDomain",
    "VirtualClock",
    "assert_policy_matrix",
]

_HOMES: Final = {
    "Bus": "bus",
    "Clock": "clock",
    "MemoryBus": "memory_bus",
    "MockIdentityProvider": "trust",
    "MockSecureAgent": "mock_agent",
    "PolicyCase": "policy_matrix",
    "RealClock": "clock",
    "TrustDomain": "trust",
    "VirtualClock": "clock",
    "assert_policy_matrix": "policy_matrix",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: pytest loads this package in every run."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
