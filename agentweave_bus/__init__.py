"""AgentWeave Bus: signed, authorized agents on a NATS bus.

What people need most is importable from here: :class:`SecureAgent` with :func:`capability` (or
:class:`Agent` for plain functions) to write an agent, :class:`AgentWeaveClient` to call one.
"""

from agentweave_bus.agent import (
    Agent,
    BaseAgent,
    SecureAgent,
    capability,
    current_context,
    requires_federated_peer,
    requires_peer,
)
from agentweave_bus.exceptions import AgentCallError, AgentWeaveError, TaskFailedError
from agentweave_bus.runtime import AgentWeaveClient, SyncAgentWeaveClient
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.types import DataPart, Message, TaskResult, TextPart

__all__ = [
    "Agent",
    "AgentCallError",
    "AgentWeaveClient",
    "AgentWeaveError",
    "BaseAgent",
    "DataPart",
    "Message",
    "SecureAgent",
    "SpiffeID",
    "SyncAgentWeaveClient",
    "TaskFailedError",
    "TaskResult",
    "TextPart",
    "capability",
    "current_context",
    "requires_federated_peer",
    "requires_peer",
]

__version__ = "0.1.0"
