"""A broker that lies: a real server without streams, whose answers about streams an adversary gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus.authz import Grants
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix
from agentweave_bus.control.broker import broker_users
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.callee import replaced
from tests.integration.connections import Raw
from tests.integration.probes import CLI, ECHO, IDENTITIES, MALLORY, Probe
from tests.integration.world import Caller, World

LONG_AGO = "2024-01-01T00:00:00.123456789Z"


@dataclass
class Liar:
    """Says of ``echo``'s claims whatever a test sets; at first what an honest broker would say."""

    world: World
    raw: Raw
    created: Callable[[], dict[str, Any] | bytes | None] = field(init=False)
    """The answer about the stream; ``None`` is no answer."""
    acknowledge: Callable[[Msg], dict[str, Any] | bytes | None] = field(init=False)
    """The answer to a claim."""
    claims: list[Msg] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.be_honest()

    def be_honest(self) -> None:
        """Take each claim once, in a stream that is old enough."""
        self.claims.clear()
        self.created = lambda: {"created": LONG_AGO}
        self.acknowledge = self._stored_once

    def _stored_once(self, message: Msg) -> dict[str, Any]:
        if any(one.subject == message.subject for one in self.claims[:-1]):
            said = "maximum messages per subject exceeded"
            return {"error": {"code": 503, "err_code": 10077, "description": said}}
        return {"stream": claim_stream_name(ECHO), "seq": clock_ms()}

    async def listen(self) -> None:
        client = self.raw.client
        await client.subscribe(f"$JS.API.STREAM.INFO.{claim_stream_name(ECHO)}", cb=self._asked)
        await client.subscribe(f"{agent_prefix(Family.CLAIM, ECHO)}.*", cb=self._claimed)
        await self.raw.flush()

    async def _asked(self, message: Msg) -> None:
        await self._say(message.reply, self.created())

    async def _claimed(self, message: Msg) -> None:
        self.claims.append(message)
        await self._say(message.reply, self.acknowledge(message))

    async def _say(self, reply: str, answer: dict[str, Any] | bytes | None) -> None:
        if answer is not None:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            await self.raw.client.publish(reply, data)


@pytest.fixture(scope="module")
async def liar(session_world: World, tmp_path_factory: Any) -> AsyncIterator[Liar]:
    """Everybody who connects while this is up connects to the lying broker."""
    world = session_world
    folder = tmp_path_factory.mktemp("liar")
    async with NatsServer(without_streams(world), folder) as server:
        with replaced(world.stack, "nats", server):
            liar = Liar(world, await world.raw())
            await liar.listen()
            yield liar
            await world.clear()


def without_streams(world: World) -> str:
    """The world's own server, its identity and users; but streams are somebody else's business."""
    config = json.loads(Path(world.stack.nats.config_path).read_text())
    del config["jetstream"]
    grants = Grants.load(world.folder / "grants.yaml")
    config["authorization"]["users"] = broker_users(grants, IDENTITIES, control=[], unrestricted=[MALLORY])
    return json.dumps(config)


@dataclass
class Deceived:
    """Caller and callee on the lying broker, after an honest call."""

    liar: Liar
    echo: Probe
    cli: Caller
    refused_before: int

    def refusals(self) -> list[dict[str, Any]]:
        """What the callee has refused since the honest call."""
        return self.liar.world.refusals("echo")[self.refused_before :]


@pytest.fixture(scope="module")
async def pair(liar: Liar) -> tuple[Probe, Caller]:
    return await liar.world.agent(ECHO), await liar.world.client(CLI)


@pytest.fixture
async def deceived(liar: Liar, pair: tuple[Probe, Caller]) -> AsyncIterator[Deceived]:
    """First an honest call on a broker that behaves. Its lies begin in the test."""
    echo, cli = pair
    echo.ran.clear()
    assert await cli.ask(ECHO, "work", {"text": "honest"}) == {"worked": "honest"}
    assert echo.ran == ["work"]
    assert len(liar.claims) >= 1
    echo.ran.clear()
    yield Deceived(liar, echo, cli, len(liar.world.refusals("echo")))
    liar.be_honest()
    await asyncio.sleep(0)
