"""This project: a worker as anyone would start it, and a client that calls one of its capabilities."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agentweave_bus import SecureAgent, capability
from agentweave_bus.config import load_config
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.worker import serve as serve_agent
from benchmarks.peers import Call, WrongAnswerError
from benchmarks.places import PAYLOAD, Place

__all__ = ["Echo", "client", "serve"]


class Echo(SecureAgent):
    """Gives back what it got. The grants decide which capability has a standing answer."""

    @capability("echo", safe=True)
    async def echo(self, text: str, size: int) -> dict[str, Any]:
        """Nothing is lost when it runs twice: no claim."""
        return {"text": text, "size": size}

    @capability("limited", safe=True)
    async def limited(self, text: str, size: int) -> dict[str, Any]:
        """As echo, but its grant limits ``size``: the policy reads the payload of every call."""
        return {"text": text, "size": size}

    @capability("claimed")
    async def claimed(self, text: str, size: int) -> dict[str, Any]:
        """Not safe: every call is claimed across replicas before it runs."""
        return {"text": text, "size": size}


async def serve(place: Place, ready: Callable[[], None]) -> None:
    """Serve :class:`Echo`; the worker itself says on its pipe that it is ready."""
    del ready
    await serve_agent(Path(place.options["worker_config"]), class_path="benchmarks.peers.bus:Echo")


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[Call]:
    """Connect as the benchmark's client."""
    target, name = place.options["target"], place.options["capability"]
    payload = {"text": PAYLOAD, "size": len(PAYLOAD)}
    async with AgentWeaveClient(load_config(Path(place.options["client_config"]))) as bus:

        async def call() -> None:
            result = await bus.call(target, name, payload)
            if result.status != "completed" or result.artifacts[0]["data"]["text"] != PAYLOAD:
                raise WrongAnswerError(f"{place.row}: {result}")

        yield call
