"""An agent's process is stopped (SIGSTOP): its connections stay open, and nothing answers on them."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import asynccontextmanager, contextmanager

import anyio
import pytest

from agentweave_bus.exceptions import CallTimeoutError, CircuitOpenError
from tests.faults.stage import answered
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE, data_of
from tests.integration.processes import worker_process

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@contextmanager
def stopped(worker):
    os.kill(worker.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)


async def test_callers_of_a_stopped_agent_time_out_the_breaker_opens_and_it_recovers(world):
    cli = await world.client(
        CLI, bus__circuit_breaker={"failure_threshold": 5, "success_threshold": 1, "timeout": 2}
    )
    async with worker_process(world, ECHO) as worker:
        await cli.ask(ECHO, "work", {"text": "before"})
        with stopped(worker):
            for _ in range(5):
                began = time.monotonic()
                with pytest.raises(CallTimeoutError, match="no answer from"):
                    await cli.call(str(ECHO), "work", {"text": "nobody"}, timeout=0.5)
                assert time.monotonic() - began < 20
            with pytest.raises(CircuitOpenError, match="failed lately") as opened:
                await cli.call(str(ECHO), "work", {"text": "nobody"}, timeout=0.5)
            assert 0 < opened.value.retry_after <= 2
            await anyio.sleep(opened.value.retry_after)
            with pytest.raises(CallTimeoutError):  # the probe, which opens it again
                await cli.call(str(ECHO), "work", {"text": "nobody"}, timeout=0.5)
            with pytest.raises(CircuitOpenError):
                await cli.call(str(ECHO), "work", {"text": "nobody"}, timeout=0.5)
        assert await answered(cli) | {"pid": 0} == {"said": "there?", "pid": 0, "caller": str(CLI)}
        # What it was asked meanwhile has expired, and is not done now. (Time may be up before a call leaves.)
        await until(lambda: len(world.refusals("echo", step_name="time")) >= 3, "refusals of six calls")
        assert len(world.audit("echo", event="admission", cap="work")) == 1


async def test_a_stopped_replica_is_dropped_by_the_broker_and_the_other_gets_all_calls(world):
    """The broker pings; the intervals are shortened here, not what follows from them."""
    cli = await world.client(CLI)
    async with (
        impatient_broker(world),
        worker_process(world, ECHO) as one,
        worker_process(world, ECHO) as two,
    ):
        by = {one.process.pid: 0, two.process.pid: 0}
        with anyio.fail_after(PATIENCE):
            while min(by.values()) == 0:
                by[(await cli.ask(ECHO, "say", {"text": "x"}))["pid"]] += 1
        with stopped(one):
            lost, in_a_row = 0, 0
            with anyio.fail_after(PATIENCE):
                while in_a_row < 30:
                    try:
                        result = await cli.call(str(ECHO), "say", {"text": "x"}, timeout=0.2)
                        assert data_of(result)["pid"] == two.process.pid
                        in_a_row += 1
                    except CallTimeoutError:
                        lost, in_a_row = lost + 1, 0
                        cli.parts.client.breakers._breakers.clear()
            assert lost > 0
        with anyio.fail_after(PATIENCE):  # and comes back by itself
            while (await cli.ask(ECHO, "say", {"text": "x"}))["pid"] != one.process.pid:
                pass


@asynccontextmanager
async def impatient_broker(world):
    nats = world.stack.nats
    usual = json.loads(nats._config)
    assert usual["ping_interval"] == "15s"
    await nats.reload(json.dumps(usual | {"ping_interval": "0.3s"}))
    try:
        yield
    finally:
        await nats.reload(json.dumps(usual))
