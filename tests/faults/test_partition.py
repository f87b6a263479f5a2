"""A worker in a network namespace of its own, whose link goes down: the kernel's own partition.

Nothing is closed, nothing is refused, packets just do not arrive.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import anyio
import anyio.to_thread
import pytest

from agentweave_bus.exceptions import CallTimeoutError
from tests.faults.proxy import proxied
from tests.faults.stage import CLEAR, answered
from tests.integration import processes
from tests.integration.callee import replaced
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.processes import worker_process

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


class Namespace:
    """A network namespace with one link to this machine, which is at ``host`` from inside."""

    def __init__(self, name: str, host: str) -> None:
        self.name = name
        self.host = host

    def link(self, state: str) -> None:
        assert ip("link", "set", f"{self.name}-h", state).returncode == 0


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """Made by root only; elsewhere the test is skipped, with the reason."""
    name = f"aw{os.getpid() % 100_000}"
    made = ip("netns", "add", name)
    if made.returncode:
        pytest.skip(f"a network namespace can't be made: {made.stderr.strip()}")
    try:
        third = os.getpid() % 250
        steps = (
            ("link", "add", f"{name}-h", "type", "veth", "peer", "name", "inside", "netns", name),
            ("addr", "add", f"10.213.{third}.1/30", "dev", f"{name}-h"),
            ("link", "set", f"{name}-h", "up"),
            ("-n", name, "addr", "add", f"10.213.{third}.2/30", "dev", "inside"),
            ("-n", name, "link", "set", "inside", "up"),
            ("-n", name, "link", "set", "lo", "up"),
        )
        for step in steps:
            done = ip(*step)
            assert done.returncode == 0, (step, done.stderr)
        yield Namespace(name, f"10.213.{third}.1")
    finally:
        ip("netns", "del", name)


@asynccontextmanager
async def worker_inside(world, namespace: Namespace, folder, road):
    """Start a worker in the namespace, with its way to the broker by ``road``."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec ip netns exec {namespace.name} {sys.executable} "$@"\n')
    program.chmod(0o755)
    async with AsyncExitStack() as stack:
        with replaced(processes, "sys", SimpleNamespace(executable=str(program))):
            started = worker_process(world, ECHO, bus__servers=[road.url])
            worker = await stack.enter_async_context(started)
        yield worker


async def test_a_worker_that_is_cut_off_by_the_kernel_serves_again_when_the_link_is_back(
    world, namespace, tmp_path
):
    breaker = {"failure_threshold": 1000, "success_threshold": 1, "timeout": 1}
    cli = await world.client(CLI, bus__circuit_breaker=breaker)
    async with (
        proxied(world.stack.nats.port, host=namespace.host) as road,
        worker_inside(world, namespace, tmp_path, road) as worker,
    ):
        assert (await answered(cli))["pid"] == worker.process.pid
        namespace.link("down")
        for _ in range(3):
            with pytest.raises(CallTimeoutError, match="no answer"):
                await cli.call(str(ECHO), "work", {"text": "lost"}, timeout=0.3)
        namespace.link("up")
        with anyio.fail_after(2 * PATIENCE):  # packets are sent again after growing pauses
            while not await back(cli):
                pass
        assert world.audit("echo", event="admission", cap="work") == []
        assert await cli.ask(ECHO, "work", {"text": "again"})


async def back(cli):
    try:
        return await cli.ask(ECHO, "say", {"text": "back"}, timeout=1)
    except CLEAR:
        return None
