"""Agents: what their authors write, and what stands between a verified request and their code.

:class:`SecureAgent` (methods) and :class:`Agent` (plain functions) are the two doors of one machinery;
``@capability`` names what can be asked for, ``@requires_peer`` and ``@requires_federated_peer`` by whom.
This part knows nothing of certificates, brokers or policies: the runtime connects it to them.
"""

from agentweave_bus.agent.agent import (
    DEFAULT_CALL_TIMEOUT,
    AgentRunner,
    AgentRuntime,
    BaseAgent,
    SecureAgent,
    install_runner,
)
from agentweave_bus.agent.attempts import Attempt
from agentweave_bus.agent.capability import capability, requires_federated_peer, requires_peer
from agentweave_bus.agent.context import RequestContext, bind_context, current_context, find_context
from agentweave_bus.agent.dispatch import BoundCapability, CapabilityTable, ValidatedCall, to_result
from agentweave_bus.agent.events import EventHandler, EventHandlers, on_event
from agentweave_bus.agent.functions import Agent
from agentweave_bus.agent.records import StepRecord, StepStore
from agentweave_bus.agent.work import ProgressSink

__all__ = [
    "DEFAULT_CALL_TIMEOUT",
    "Agent",
    "AgentRunner",
    "AgentRuntime",
    "Attempt",
    "BaseAgent",
    "BoundCapability",
    "CapabilityTable",
    "EventHandler",
    "EventHandlers",
    "ProgressSink",
    "RequestContext",
    "SecureAgent",
    "StepRecord",
    "StepStore",
    "ValidatedCall",
    "bind_context",
    "capability",
    "current_context",
    "find_context",
    "install_runner",
    "on_event",
    "requires_federated_peer",
    "requires_peer",
    "to_result",
]
