"""``agentweave dev`` and ``up --reload`` over agents of a test's own, as a real process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import tty
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from agentweave_bus.runtime import AgentWeaveClient
from tests.integration.probes import PATIENCE
from tests.integration.test_cli_up import clean_environment

DOMAIN = "agentweave.local"
FRONT = f"spiffe://{DOMAIN}/agent/front"
BACK = f"spiffe://{DOMAIN}/agent/back"

START_S = 60.0

FILES = {
    "front.py": """
from agentweave_bus import SecureAgent, capability

BACK = "spiffe://agentweave.local/agent/back"

class Front(SecureAgent):
    @capability("ask")
    async def ask(self, word: str = "") -> dict:
        return (await self.call_agent(BACK, "answer", {"word": word})).data

    @capability("patience")
    async def patience(self, seconds: float, timeout: float, afterwards: float = 0) -> dict:
        asked = {"seconds": seconds, "afterwards": afterwards}
        return (await self.call_agent(BACK, "stand", asked, timeout=timeout)).data

    @capability("look")
    async def look(self, capability: str, timeout: float) -> dict:
        return (await self.call_agent(BACK, capability, {"word": "see"}, timeout=timeout)).data

    @capability("echo", safe=True)
    async def echo(self, word: str) -> dict:
        return {"front": word}
""",
    "words.py": """
def answer(word: str) -> str:
    return "first " + word
""",
    "back.py": """
import asyncio, os, time
from agentweave_bus import SecureAgent, capability
from words import answer

FRONT = "spiffe://agentweave.local/agent/front"

class Back(SecureAgent):
    @capability("answer", safe=True)
    async def answer(self, word: str) -> dict:
        return {"answer": answer(word), "pid": os.getpid()}

    @capability("stand")
    async def stand(self, seconds: float, afterwards: float) -> dict:
        time.sleep(seconds)
        await asyncio.sleep(afterwards)
        nested = await self.call_agent(FRONT, "echo", {"word": "after"})
        return {"stood": seconds, "nested": nested.data["front"], "left": self.context.remaining()}

    @capability("once")
    async def once(self, mark: str, seconds: float) -> dict:
        with open(mark, "a") as file:
            file.write("x")
        time.sleep(seconds)
        await asyncio.sleep(0.8)
        return {"attempt": self.context.attempt}

    @capability("look")
    async def look(self, word: str) -> dict:
        breakpoint()
        return {"looked": word}

    @capability("look_plain")
    def look_plain(self, word: str) -> dict:
        breakpoint()
        return {"looked": word}

    @capability("secret")
    async def secret(self) -> dict:
        return {}
""",
    "front.yaml": """
agent: {name: front, trust_domain: agentweave.local, class: 'front:Front'}
""",
    "back.yaml": """
agent: {name: back, trust_domain: agentweave.local, class: 'back:Back'}
""",
    "agentweave.yaml": """
grants: grants.yaml
agents:
  - config: front.yaml
  - config: back.yaml
    env: {AGENTWEAVE_BUS__TASK_ACK_WAIT: "1.0"}
""",
    "grants.yaml": """
grants:
  - caller: spiffe://agentweave.local/client/cli
    callee: spiffe://agentweave.local/agent/front
    capabilities: [ask, patience, look, echo, health]
  - caller: spiffe://agentweave.local/agent/front
    callee: spiffe://agentweave.local/agent/back
    capabilities: [answer, stand, look, look_plain]
  - caller: spiffe://agentweave.local/agent/back
    callee: spiffe://agentweave.local/agent/front
    capabilities: [echo]
  - caller: spiffe://agentweave.local/client/cli
    callee: spiffe://agentweave.local/agent/back
    capabilities: [once, health]
    kinds: [call, task]
""",
}


class Running:
    """The process of a command that serves the agents."""

    def __init__(
        self, process: asyncio.subprocess.Process, folder: Path, runtime: Path, terminal: Terminal
    ) -> None:
        self.process = process
        self.folder = folder
        self.runtime = runtime
        self.facts: dict[str, Any] = {}
        self.terminal = terminal

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def edit(self, name: str, old: str, new: str) -> None:
        """Change a file as an editor does, whole."""
        path = self.folder / name
        text = path.read_text()
        assert old in text
        fresh = path.with_suffix(".tmp")
        fresh.write_text(text.replace(old, new))
        fresh.replace(path)

    async def until(self, said: str, since: int = 0) -> None:
        await until(lambda: said in self.log[since:], lambda: f"{said!r} not in:\n{self.log}")

    async def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(START_S):
            return await self.process.wait()


class Terminal:
    """What a person sees of a process, and types."""

    def __init__(self, descriptor: int) -> None:
        self.seen = ""
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)

    def type(self, line: str) -> None:
        os.write(self._descriptor, f"{line}\n".encode())

    async def until(self, shown: str, since: int = 0) -> str:
        """Wait until something is shown, and return all that is since then."""
        with anyio.move_on_after(START_S):
            while shown not in self.seen[since:]:
                await anyio.wait_readable(self._descriptor)
                self.seen += os.read(self._descriptor, 65536).decode()
        assert shown in self.seen[since:], self.seen
        return self.seen[since:]


async def until(check: Callable[[], bool], told: Callable[[], str]) -> None:
    with anyio.move_on_after(PATIENCE):
        while not check():  # noqa: ASYNC110 - another process
            await anyio.sleep(0.02)
    assert check(), told()


@asynccontextmanager
async def running(folder: Path, *arguments: str) -> AsyncIterator[Running]:
    """Run ``agentweave`` with ``arguments`` in ``folder``, in a terminal, until it has said that it is ready."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    runtime = Path(tempfile.mkdtemp(prefix="aw-"))  # short: a socket's path may have 107 bytes
    terminal, its_end = os.openpty()
    tty.setraw(its_end)
    with (folder / "log.txt").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "import sys; from agentweave_bus.cli import main; sys.exit(main())"),
            *(*arguments, "--json"),
            cwd=folder,
            env=clean_environment(XDG_RUNTIME_DIR=str(runtime)),
            stdin=its_end,
            stdout=its_end,
            stderr=log,
        )
    one = Running(process, folder, runtime, Terminal(terminal))
    try:
        os.close(its_end)
        one.facts = json.loads(await one.terminal.until("\n}\n"))
        yield one
    finally:
        os.close(terminal)
        if process.returncode is None:
            process.kill()
            await process.wait()
        shutil.rmtree(runtime, ignore_errors=True)


@asynccontextmanager
async def client_of(one: Running) -> AsyncIterator[AgentWeaveClient]:
    async with AgentWeaveClient(one.folder / ".agentweave" / "clients" / "cli.yaml") as client:
        yield client


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
