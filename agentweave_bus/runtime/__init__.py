"""The runtime: what turns a configuration into something that runs.

:mod:`.wiring` puts the parts together, :mod:`.serving` serves an agent, :mod:`.clients` calls agents from
programs that are none. Importing this package lets ``agent.run()`` find its runner.
"""

from agentweave_bus.agent import install_runner
from agentweave_bus.observability.heartbeat import READY_FD
from agentweave_bus.runtime.clients import AgentWeaveClient, SyncAgentWeaveClient
from agentweave_bus.runtime.serving import Runner
from agentweave_bus.runtime.wiring import Connected, connected

__all__ = [
    "READY_FD",
    "AgentWeaveClient",
    "Connected",
    "Runner",
    "SyncAgentWeaveClient",
    "connected",
]

install_runner(Runner())
