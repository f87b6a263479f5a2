"""A task that is given up on a real broker, and who may bring it back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from agentweave_bus import Retry, RetryableError, TaskHandle, capability
from agentweave_bus.bus.streams import tasks_stream_name
from agentweave_bus.exceptions import UnreachableError
from agentweave_bus.runtime.operators import DeadLetterCalls, Operator
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.types import TaskState
from tests.integration.connections import Raw, until
from tests.integration.probes import CLI, ECHO, OPERATOR, PATIENCE, Held, Probe
from tests.integration.world import Caller, World

__all__ = ["DeadLetterCast", "SickProbe", "dead_letter_cast", "sickbed"]


class SickProbe(Probe):
    """Its tasks are given up until it is ``well``."""

    well = False

    @capability("heal", retry=Retry(attempts=1))
    async def heal(self, name: str) -> dict[str, Any]:
        """Note that it ran, and fail as what may pass does."""
        self.ran.append(name)
        if not self.well:
            raise RetryableError(f"{name} is still sick")
        return {"healed": name}


@dataclass
class DeadLetterCast:
    """The agent, who submits, an operator, and who owns the broker."""

    world: World
    probe: SickProbe
    cli: Caller
    operator: DeadLetterCalls
    mallory: Raw
    others: int = 0
    """How many tasks other tests have left in the agent's queue."""

    async def given_up(self, name: str) -> tuple[TaskHandle, dict[str, Any]]:
        """A task that was given up, and its dead letter as it is listed."""
        handle = await self.cli.client.submit(str(ECHO), "heal", {"name": name})
        assert (await handle.result(PATIENCE)).status == "failed"
        (row,) = [one for one in await self.letters() if one.get("task", {}).get("id") == handle.id]
        return handle, row

    async def letters(self, **options: Any) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = (await self.operator.list(limit=200, **options))["letters"]
        return listed

    async def state(self, handle: TaskHandle, wanted: TaskState) -> None:
        """Wait until a task has come to a state."""
        with anyio.fail_after(PATIENCE):
            while (await handle.status()).state is not wanted:  # noqa: ASYNC110 - no event
                await anyio.sleep(0.02)

    async def refusal(self, **wanted: Any) -> dict[str, Any]:
        """Wait for a refusal in the log of the control role."""
        await until(lambda: bool(self.control_audit(event="refusal", **wanted)), f"a refusal of {wanted}")
        return self.control_audit(event="refusal", **wanted)[-1]

    async def idle(self) -> None:
        """Wait until nothing is left in the agent's queue but what other tests left there."""
        with anyio.fail_after(PATIENCE):
            while await self.world.stored(self.mallory, tasks_stream_name(ECHO)) > self.others:  # noqa: ASYNC110
                await anyio.sleep(0.01)

    def control_audit(self, **wanted: Any) -> list[dict[str, Any]]:
        """What the control role has on record."""
        folder = self.world.folder / "state" / "audit"
        texts = [file.read_text() for file in sorted(folder.glob("control*.jsonl"))]
        records = [json.loads(line) for text in texts for line in text.splitlines()]
        return [one for one in records if all(one.get(key) == value for key, value in wanted.items())]

    async def operator_as(self, identity: SpiffeID) -> DeadLetterCalls:
        """Somebody who asks what operators ask."""
        held = await Held.open(Operator(self.world.config(identity)))
        self.world._held.append(held)
        return held.value


@pytest.fixture(scope="module")
async def dead_letter_cast(session_world: World) -> AsyncIterator[DeadLetterCast]:
    """Everybody, for all tests of a module."""
    world = session_world
    probe = await world.agent(ECHO, SickProbe)
    assert isinstance(probe, SickProbe)
    cast = DeadLetterCast(world, probe, await world.client(CLI), None, await world.raw())  # type: ignore[arg-type]
    cast.operator = await cast.operator_as(OPERATOR)
    with suppress(KeyError):  # its queue may be new
        cast.others = await world.stored(cast.mallory, tasks_stream_name(ECHO))
    yield cast
    await world.clear()


@pytest.fixture
async def sickbed(dead_letter_cast: DeadLetterCast) -> DeadLetterCast:
    """Nothing has run when a test begins, and nothing is healed."""
    with anyio.fail_after(PATIENCE):
        while True:  # the agent's streams may be new
            try:
                await dead_letter_cast.idle()
                break
            except (KeyError, UnreachableError):
                await anyio.sleep(0.05)
    dead_letter_cast.probe.ran.clear()
    dead_letter_cast.probe.well = False
    return dead_letter_cast
