"""Running the reference's agents as it says: ``python <name>_agent.py``, each a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.config import load_config

HERE = Path(__file__).parent
READY_S = 60.0
STOP_S = 30.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copy a folder of snippets to where it may write: agents keep their audit logs where they run."""

    def copied(name: str) -> Path:
        target = tmp_path_factory.mktemp(name.replace("/", "-")) / name.rpartition("/")[2]
        shutil.copytree(HERE / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        return target

    return copied


@dataclass(frozen=True)
class Process:
    """A running agent, its log file and where it serves its metrics."""

    log: Path
    metrics_url: str


@contextmanager
def agent_process(script: Path, environment: Mapping[str, str]) -> Iterator[Process]:
    """Run ``python <script>`` in its folder, from ready to an orderly end. Blocks; call it in a thread."""
    log = script.with_suffix(".log")
    read_end, write_end = os.pipe()
    variables = {
        **os.environ,
        "AGENTWEAVE_OBSERVABILITY__METRICS__PORT": "0",  # several agents share this machine
        "AGENTWEAVE_AUTHORIZATION__AUDIT__DESTINATION": f"audit/{script.stem}.jsonl",
        **environment,
        "AGENTWEAVE_READY_FD": str(write_end),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, script.name],
            cwd=script.parent,
            env=variables,
            stderr=output,
            pass_fds=[write_end],
        )
    os.close(write_end)
    try:
        yield Process(log, _wait_ready(process, read_end, log))
    finally:
        os.close(read_end)
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
    assert code == 0, log.read_text()


def _wait_ready(process: subprocess.Popen[bytes], read_end: int, log: Path) -> str:
    give_up = threading.Timer(READY_S, process.kill)  # its end closes the pipe
    give_up.start()
    try:
        word, _, url = os.read(read_end, 1000).decode().strip().partition(" ")
    finally:
        give_up.cancel()
    assert word == "ready", f"{process.args} did not become ready:\n{log.read_text()}"
    return url


@asynccontextmanager
async def agent_processes(
    scripts: Mapping[Path, Mapping[str, str]],
) -> AsyncIterator[dict[str, Process]]:
    """Run several scripts, each with its environment; they start side by side."""
    running: dict[str, Process] = {}
    managers = {script.stem: agent_process(script, variables) for script, variables in scripts.items()}

    async def begin(name: str) -> None:
        running[name] = await anyio.to_thread.run_sync(managers[name].__enter__)

    async def end(name: str) -> None:
        await anyio.to_thread.run_sync(managers[name].__exit__, None, None, None)

    try:
        async with anyio.create_task_group() as group:
            for name in managers:
                group.start_soon(begin, name)
        yield running
    finally:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for name in running:
                    group.start_soon(end, name)


@asynccontextmanager
async def client_at(
    config: Path, environment: Mapping[str, str], **overrides: Any
) -> AsyncIterator[AgentWeaveClient]:
    """Connect as the client of ``config``; ``environment`` is what a process would be given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        for name, value in environment.items():
            patch.setenv(name, value)
        loaded = load_config(config, overrides=overrides)
        async with AgentWeaveClient(loaded) as client:
            yield client


async def type_line(
    line: str, folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Type ``line`` into a shell in ``folder``, with this project's ``agentweave`` on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            ["sh", "-c", line],
            cwd=folder,
            env={**os.environ, **environment, "PATH": path},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    )


@pytest.fixture(scope="session")
def shell() -> Any:
    return type_line


@pytest.fixture(scope="session")
def processes() -> Any:
    return agent_processes


@pytest.fixture(scope="session")
def client() -> Any:
    return client_at
