"""What a running supervisor can be asked over its socket, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.supervisor.supervisor import Supervisor

__all__ = ["answering"]


def answering(
    supervisor: Supervisor, reload: Callable[[], Awaitable[None]]
) -> Callable[[Mapping[str, Any]], Awaitable[Any]]:
    """Return what answers requests; ``reload`` reads the configuration again and replaces every worker.

    A request names in ``do`` what it wants: ``status``, ``restart``, ``drain``, ``scale`` or ``reload``; in
    ``agent`` of whom, by default of all; ``scale`` in ``replicas`` how many.
    """

    async def answer(request: Mapping[str, Any]) -> Any:
        do, agent = request.get("do"), request.get("agent")
        if agent is not None and type(agent) is not str:
            raise AgentWeaveError("'agent' is a name")
        if do == "status":
            return {"pid": os.getpid(), "workers": supervisor.status()}
        if do == "reload":
            await reload()
        elif do == "restart":
            await (supervisor.roll() if agent is None else supervisor.restart(agent))
        elif do == "drain":
            supervisor.drain(agent)
        elif do == "scale":
            replicas = request.get("replicas")
            if agent is None or type(replicas) is not int:
                raise AgentWeaveError("scaling needs an agent and a number")
            supervisor.scale(agent, replicas)
        else:
            raise AgentWeaveError(f"a supervisor can't {do!r}")
        return {"workers": supervisor.status()}

    return answer
