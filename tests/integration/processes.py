"""Worker processes, started as anybody starts them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import yaml

from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.probes import PATIENCE
from tests.integration.world import World

AGENT_FILE = """
import asyncio, gc, logging, os, sys, time
from agentweave_bus import SecureAgent, capability, on_event

class Worker(SecureAgent):
    @capability("say", safe=True)
    async def say(self, text: str) -> dict:
        return {"said": text, "pid": os.getpid(), "caller": self.context.caller_spiffe_id}

    @capability("work")
    async def work(self, text: str = "") -> dict:
        return {"worked": text, "pid": os.getpid()}

    @capability("wait")
    async def wait(self, mark: str, until: str) -> dict:
        open(mark, "w").close()
        while not os.path.exists(until):
            await asyncio.sleep(0.01)
        return {"waited": True, "pid": os.getpid()}

class Telling(Worker):
    @capability("tell")
    def tell(self, secret: str) -> dict:
        logging.getLogger("shop.order").debug("told")
        self.logger.info("not told")
        return {"told": True}

    @on_event("order.*")
    def hear(self, secret: str) -> None:
        logging.getLogger("shop.order").debug("heard")

class Broken(SecureAgent):
    async def on_start(self) -> None:
        raise RuntimeError("no database")

class Frozen(Worker):
    async def on_start(self) -> None:
        freeze = gc.freeze
        def tell() -> None:
            freeze()
            print("frozen", file=sys.stderr, flush=True)
        gc.freeze = tell
"""


class Worker:
    """A worker process that has said ready."""

    def __init__(self, process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
        self.process = process
        self.ready = ready
        self.log = log

    async def wait(self) -> int:
        async with asyncio.timeout(PATIENCE + 30):
            return await anyio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)


@asynccontextmanager
async def worker_process(
    world: World, identity: SpiffeID, *, klass: str = "live_agents:Worker", **overrides: Any
) -> AsyncIterator[Worker]:
    """Start ``python -m agentweave_bus.worker`` and wait for its word, or its end."""
    folder = world.folder / f"process-{time.monotonic_ns()}"
    folder.mkdir()
    (folder / "live_agents.py").write_text(AGENT_FILE)
    tree = world.settings(identity, **overrides)
    tree["agent"]["class"] = klass
    (folder / "agent.yaml").write_text(yaml.safe_dump(tree))
    reading, writing = os.pipe()
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(  # noqa: ASYNC220 - takes a millisecond
            [sys.executable, "-m", "agentweave_bus.worker", "agent.yaml"],
            cwd=folder,
            env={**os.environ, "AGENTWEAVE_READY_FD": str(writing)},
            pass_fds=[writing],
            stderr=errors,
        )
    os.close(writing)
    try:
        async with asyncio.timeout(PATIENCE + 15):
            said = await anyio.to_thread.run_sync(os.read, reading, 200, abandon_on_cancel=True)
        yield Worker(process, said.decode(), log)
    finally:
        os.close(reading)
        if process.poll() is None:
            process.kill()
        await anyio.to_thread.run_sync(process.wait)
