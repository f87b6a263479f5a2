"""What every kind of agent has: a name, a logger, a capability table, hooks, and an answer to ``health``.

Nothing here sends, receives or decides anything.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from agentweave_bus.agent.capability import capability
from agentweave_bus.agent.context import RequestContext, current_context
from agentweave_bus.agent.dispatch import CapabilityTable
from agentweave_bus.agent.events import EventHandlers

if TYPE_CHECKING:
    from agentweave_bus.identity import X509Svid

__all__ = ["HEALTH", "AgentLifecycle", "call_hook"]

HEALTH = "health"


class AgentLifecycle:
    """The part of an agent that has no security in it; use one of its subclasses.

    ``logger`` is ``agentweave_bus.agents.<name>`` of the standard library.
    """

    # Private state has two underscores: a subclass is somebody else's code, and may well have a
    # `_table` or a `_running` of its own.

    def __init__(self, name: str) -> None:
        self.name = name
        self.__logger = logging.getLogger(f"agentweave_bus.agents.{name}")
        self.__health = _health(name)
        self.__table: CapabilityTable | None = None
        self.__events: EventHandlers | None = None

    @property
    def logger(self) -> logging.Logger:
        """The agent's own logger; ``extra=`` fields reach the log."""
        return self.__logger

    @property
    def context(self) -> RequestContext:
        """The request that is being handled here: one per call, never another's.

        Raises:
            AgentWeaveError: outside a request.

        """
        return current_context()

    @property
    def capability_table(self) -> CapabilityTable:
        """What the agent can be asked for, ``health`` included.

        Raises:
            ConfigurationError: two handlers have one name, or one can't be served.

        """
        if self.__table is None:
            table = CapabilityTable(self.__logger)
            self._collect_capabilities(table)
            if HEALTH not in table:
                table.add_function(self.__health)
            self.__table = table
        return self.__table

    @property
    def event_handlers(self) -> EventHandlers:
        """What the agent hears of: its methods with ``@on_event``.

        Raises:
            ConfigurationError: two would handle the same event, or one can't be served.

        """
        if self.__events is None:
            self.__events = EventHandlers(self, self.__logger)
        return self.__events

    def _collect_capabilities(self, table: CapabilityTable) -> None:
        table.add_methods(self)

    def _forget_capabilities(self) -> None:
        self.__table = None

    # --- hooks, for authors to override; each may be async or plain -------------------------------

    def on_start(self) -> Awaitable[None] | None:
        """Prepare to serve; runs before the first request. An exception keeps the agent from serving."""
        return None

    def on_stop(self) -> Awaitable[None] | None:
        """Clean up; runs after the last request."""
        return None

    def on_svid_update(self, new_svid: X509Svid) -> Awaitable[None] | None:  # noqa: ARG002 - for overriding
        """Note that the identity document was renewed; ``new_svid.expiry`` says until when it holds."""
        return None


async def call_hook(outcome: Awaitable[None] | None) -> None:
    """Await what a hook returned, where it is to be awaited."""
    if inspect.isawaitable(outcome):
        await outcome


def _health(name: str) -> Callable[[], Awaitable[dict[str, Any]]]:
    made = time.monotonic()

    @capability(HEALTH, safe=True, description="Whether the agent is up, and for how long")
    async def health() -> dict[str, Any]:
        uptime = round(time.monotonic() - made, 3)
        return {"agent": name, "status": "healthy", "uptime_seconds": uptime}

    return health
