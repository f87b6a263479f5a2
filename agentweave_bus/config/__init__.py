"""Configuration: the only reader of settings, from their files and environment variables.

``load_config`` gives an agent's or client's :class:`AgentConfig`, ``load_stack`` the file of a whole
stack, ``load_control`` that of the control role at brokers of one's own. All refuse what is unknown,
malformed or unsafe, and say where it was written and the way out. Every key is described in
``docs/configuration.md``.

This part decides what a setting may be, not what is done with it: it opens no socket and loads no
policy.
"""

from agentweave_bus.config.agent import AgentConfig, AgentSection, CapabilityConfig
from agentweave_bus.config.control import ControlBus, ControlConfig, StreamsConfig, load_control
from agentweave_bus.config.fields import Environment
from agentweave_bus.config.loading import load_config
from agentweave_bus.config.operation import (
    BusConfig,
    LoggingConfig,
    MetricsConfig,
    ObservabilityConfig,
    RetryConfig,
    ServerConfig,
    TracingConfig,
)
from agentweave_bus.config.security import (
    AuditConfig,
    AuthorizationConfig,
    CircuitBreakerConfig,
    IdentityConfig,
    StaticIdentityConfig,
    TransportConfig,
)
from agentweave_bus.config.stack import (
    RestartConfig,
    StackAgent,
    StackBus,
    StackConfig,
    load_stack,
)

__all__ = [
    "AgentConfig",
    "AgentSection",
    "AuditConfig",
    "AuthorizationConfig",
    "BusConfig",
    "CapabilityConfig",
    "CircuitBreakerConfig",
    "ControlBus",
    "ControlConfig",
    "Environment",
    "IdentityConfig",
    "LoggingConfig",
    "MetricsConfig",
    "ObservabilityConfig",
    "RestartConfig",
    "RetryConfig",
    "ServerConfig",
    "StackAgent",
    "StackBus",
    "StackConfig",
    "StaticIdentityConfig",
    "StreamsConfig",
    "TracingConfig",
    "TransportConfig",
    "load_config",
    "load_control",
    "load_stack",
]
