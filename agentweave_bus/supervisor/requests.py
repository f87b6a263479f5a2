"""What a running supervisor can be asked over its socket, and what it answers."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from types import NoneType
from typing import Any

from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.supervisor.supervisor import Supervisor

__all__ = ["answering"]


def answering(
    supervisor: Supervisor, reload: Callable[[], Awaitable[None]]
) -> Callable[[Mapping[str, Any]], Awaitable[Any]]:
    """Return what answers requests; ``reload`` reads the configuration again and replaces every worker.

    A request names in ``do`` what it wants: ``status``, ``restart``, ``drain``, ``scale`` or ``reload``; in
    ``agent`` of whom, by default of all; ``scale`` in ``replicas`` how many, ``null`` for as many as the load
    calls for.
    """

    async def answer(request: Mapping[str, Any]) -> Any:
        do, agent = request.get("do"), request.get("agent")
        if agent is not None and type(agent) is not str:
            raise AgentWeaveError("'agent' is a name")
        if do == "status":
            return {"pid": os.getpid(), **_how_things_stand(supervisor)}
        if do == "reload":
            await reload()
        elif do == "restart":
            await (supervisor.roll() if agent is None else supervisor.restart(agent))
        elif do == "drain":
            supervisor.drain(agent)
        elif do == "scale":
            if agent is None or type(replicas := request.get("replicas", "")) not in {int, NoneType}:
                raise AgentWeaveError("scaling needs an agent and a number")
            supervisor.scale(agent, replicas)
        else:
            raise AgentWeaveError(f"a supervisor can't {do!r}")
        return _how_things_stand(supervisor)

    return answer


def _how_things_stand(supervisor: Supervisor) -> dict[str, Any]:
    return {"workers": supervisor.status(), "agents": supervisor.agents()}
