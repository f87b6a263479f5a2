"""Large payloads on a real broker: how fast, through a crash of the worker, and through one of the broker."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

import pytest

from agentweave_bus import capability
from agentweave_bus.bus.streams import blob_stream_name
from agentweave_bus.bus.subjects import blobs_of
from agentweave_bus.exceptions import BusError
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, OTHER, PATIENCE, Probe
from tests.integration.world import Caller, World

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
TEXT = "0123456789abcdef" * (5 * MIB // 16)


class Keeper(Probe):
    """Takes a step that returns much, and waits behind it."""

    made = 0

    @capability("keep", timeout=60)
    async def keep(self, text: str) -> dict[str, Any]:
        """Return as much as came, after the test's gate."""
        kept = await self.context.step("make", self.make, text)
        self.entered.set()
        await self.gate.wait()
        return {"kept": kept}

    async def make(self, text: str) -> str:
        Keeper.made += 1
        return text


async def submit(cli: Caller, name: str, text: str = TEXT) -> Any:
    return await cli.client.submit(str(ECHO), name, {"text": text})


async def test_five_megabytes_there_and_back(world: World, echo: Probe, cli: Caller) -> None:
    began = time.monotonic()
    handle = await submit(cli, "work")
    result = await handle.result(PATIENCE)
    seconds = time.monotonic() - began
    assert result.data == {"worked": TEXT}
    assert seconds < 20
    assert echo.ran == ["work"]


@pytest.mark.slow
async def test_twenty_at_once_take_turns(world: World, echo: Probe, cli: Caller) -> None:
    """More than may be held at once: nobody is refused, and memory stays bounded."""
    blobs = echo.parts.desk.blobs
    assert blobs is not None
    handles = await asyncio.gather(*(submit(cli, "work", f"{number}{TEXT}") for number in range(20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = await asyncio.gather(*(handle.result(2 * PATIENCE) for handle in handles))
    assert [one.data["worked"][:2] for one in results] == [f"{n}{TEXT}"[:2] for n in range(20)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024


async def test_a_worker_that_dies_has_its_step_and_payload_read_by_the_next(
    world: World, cli: Caller
) -> None:
    Keeper.made = 0
    first = await world.agent(ECHO, Keeper, bus__task_ack_wait=1.0)
    handle = await submit(cli, "keep")
    async with asyncio.timeout(PATIENCE):
        await first.entered.wait()
    await world.running(first).crash()
    second = await world.agent(ECHO, Keeper, bus__task_ack_wait=1.0)
    second.gate.set()
    assert (await handle.result(3 * PATIENCE)).data == {"kept": TEXT}
    assert Keeper.made == 1


async def test_the_broker_goes_while_it_is_stored_and_fetched(world: World, echo: Probe, cli: Caller) -> None:
    await (await submit(cli, "work", "warm")).result(PATIENCE)
    blobs, asked = cli.parts.desk.blobs, 0
    assert blobs is not None
    write = blobs._slots.write

    async def slowly(*args: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            await world.stack.nats.kill()
            await world.stack.nats.start()
        return await write(*args, **options)

    blobs._slots.write = slowly  # type: ignore[method-assign]
    handle = await submit(cli, "work")
    await world.stack.nats.kill()
    await world.stack.nats.start()
    assert (await handle.result(3 * PATIENCE)).data == {"worked": TEXT}
    assert asked >= 3
    await until(lambda: cli.parts.keeper.connected, "the client is connected")


async def test_only_reader_and_writer_are_let_read(world: World, echo: Probe, cli: Caller) -> None:
    handle = await submit(cli, "work")
    await handle.result(PATIENCE)
    other = await world.client(OTHER)
    stream = blob_stream_name(CLI)
    for who, may in ((cli, True), (echo, True), (other, False)):
        read = who.parts.desk.slots.read(stream, f"{blobs_of(CLI, ECHO)}.{'0' * 64}.0", timeout_s=5)
        if may:
            assert await read is None  # it may ask; there is none of that key
        else:
            with pytest.raises(BusError, match="does not let this identity read"):
                await read
