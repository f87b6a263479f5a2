"""AgentWeave Bus: signed, authorized agents on a NATS bus.

What people need most is importable from here: :class:`SecureAgent` with :func:`capability` (or
:class:`Agent` for plain functions) to write an agent, :class:`AgentWeaveClient` to call one.

A name is loaded when it is first used, so that a program that needs little (the command line's help) does
not load everything. The runtime, which lets ``agent.run()`` find its runner, comes with any of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from agentweave_bus.agent import (
        Agent,
        BaseAgent,
        SecureAgent,
        capability,
        current_context,
        on_event,
        requires_federated_peer,
        requires_peer,
    )
    from agentweave_bus.exceptions import AgentCallError, AgentWeaveError, RetryableError, TaskFailedError
    from agentweave_bus.runtime import AgentWeaveClient, SyncAgentWeaveClient
    from agentweave_bus.spiffe_id import SpiffeID
    from agentweave_bus.tasks.events import TaskEvent
    from agentweave_bus.tasks.handle import TaskHandle
    from agentweave_bus.tasks.retry import Retry
    from agentweave_bus.tasks.status import TaskStatus
    from agentweave_bus.types import DataPart, Message, TaskResult, TextPart

__all__ = [
    "Agent",
    "AgentCallError",
    "AgentWeaveClient",
    "AgentWeaveError",
    "BaseAgent",
    "DataPart",
    "Message",
    "Retry",
    "RetryableError",
    "SecureAgent",
    "SpiffeID",
    "SyncAgentWeaveClient",
    "TaskEvent",
    "TaskFailedError",
    "TaskHandle",
    "TaskResult",
    "TaskStatus",
    "TextPart",
    "capability",
    "current_context",
    "on_event",
    "requires_federated_peer",
    "requires_peer",
]

__version__ = "0.1.0"

_RUNTIME: Final = "agentweave_bus.runtime"
_HOMES: Final = {
    "AgentCallError": "agentweave_bus.exceptions",
    "AgentWeaveClient": _RUNTIME,
    "AgentWeaveError": "agentweave_bus.exceptions",
    "DataPart": "agentweave_bus.types",
    "Message": "agentweave_bus.types",
    "Retry": "agentweave_bus.tasks.retry",
    "RetryableError": "agentweave_bus.exceptions",
    "SpiffeID": "agentweave_bus.spiffe_id",
    "SyncAgentWeaveClient": _RUNTIME,
    "TaskEvent": "agentweave_bus.tasks.events",
    "TaskFailedError": "agentweave_bus.exceptions",
    "TaskHandle": "agentweave_bus.tasks.handle",
    "TaskResult": "agentweave_bus.types",
    "TaskStatus": "agentweave_bus.tasks.status",
    "TextPart": "agentweave_bus.types",
}


def __getattr__(name: str) -> Any:
    """Load a public name. All others (submodules among them) are as in any package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(_RUNTIME)
    value = getattr(importlib.import_module(_HOMES.get(name, "agentweave_bus.agent")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
