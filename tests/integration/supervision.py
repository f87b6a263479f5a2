"""A running ``agentweave supervise`` over a world's bus, and what its socket says."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import yaml

from agentweave_bus.supervisor.control_socket import ask_supervisor
from tests.integration.probes import ECHO
from tests.integration.processes import AGENT_FILE
from tests.integration.world import World

START_S = 60.0


class Supervision:
    """A running ``agentweave supervise``."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.socket = folder / "state" / "supervisor.sock"

    async def ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(START_S):
            return json.loads(await self.process.stdout.readuntil(b"\n}\n"))

    async def ask(self, do: str, **more: Any) -> Any:
        return await ask_supervisor(self.socket, {"do": do, **more}, START_S)

    async def workers(self) -> list[dict[str, Any]]:
        return (await self.ask("status"))["workers"]

    async def until(self, check) -> list[dict[str, Any]]:
        with anyio.fail_after(START_S):
            while not check(workers := await self.workers()):  # noqa: ASYNC110 - another process
                await anyio.sleep(0.05)
        return workers

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(START_S):
            return await self.process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@asynccontextmanager
async def supervision(
    world: World,
    folder: Path,
    entry: dict[str, Any],
    agents: str = AGENT_FILE,
    arguments: Sequence[str] = (),
    **overrides: Any,
) -> AsyncIterator[Supervision]:
    """Supervise ``live_agents:Worker`` of the text ``agents``, as ``entry`` says."""
    (folder / "live_agents.py").write_text(agents)
    tree = world.settings(ECHO, **overrides)
    tree["agent"]["class"] = "live_agents:Worker"
    tree["observability"] = {"metrics": {"enabled": True, "port": 0}}
    (folder / "agent.yaml").write_text(yaml.safe_dump(tree))
    (folder / "stack.yaml").write_text(
        yaml.safe_dump({"agents": [{"config": "agent.yaml", **entry}], "state_dir": str(folder / "state")})
    )
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "import sys; from agentweave_bus.cli import main; sys.exit(main())"),
            *("supervise", "stack.yaml", *arguments),
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    try:
        yield Supervision(process, folder)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def scraped(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def pids(workers: list[dict[str, Any]]) -> set[int]:
    return {one["pid"] for one in workers}


def all_ready(workers: list[dict[str, Any]]) -> bool:
    return all(one["state"] == "ready" and one["beat"] is not None for one in workers)
