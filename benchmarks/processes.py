"""Child processes of a benchmark: started, awaited until ready, and ended, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from agentweave_bus.supervisor.lifeline import dies_with_this_process
from benchmarks.child import READY_FD
from benchmarks.load import Load, Sample
from benchmarks.places import Place

__all__ = ["ClientProcess", "child_command", "child_process", "client_process", "worker_process"]

READY_S: Final = 60.0
STOP_S: Final = 15.0
_SLACK_S: Final = 60.0
_CHILD: Final = "benchmarks.child"


@asynccontextmanager
async def child_process(
    command: Sequence[str], log: Path, environment: Mapping[str, str], *, is_client: bool = False
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run ``command`` from the time it writes ``ready`` on its descriptor until the end of the block.

    A client's standard output is the caller's to read. All else that is written goes to ``log``, whose end
    is quoted when it does not become ready.
    """
    read_fd, write_fd = os.pipe()
    with log.open("wb") as errors, os.fdopen(read_fd, "rb", buffering=0) as pipe:
        try:
            process = await asyncio.create_subprocess_exec(
                *dies_with_this_process(command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE if is_client else errors,
                stderr=errors,
                env={**os.environ, **environment, READY_FD: str(write_fd)},
                pass_fds=(write_fd,),
            )
        finally:
            os.close(write_fd)
        try:
            await _await_ready(pipe, log)
            yield process
        finally:
            await _end(process, is_client=is_client)


async def _await_ready(pipe: object, log: Path) -> None:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        async with asyncio.timeout(READY_S):
            line = await reader.readline()
    finally:
        transport.close()
    if not line.startswith(b"ready"):
        tail = await asyncio.to_thread(_tail, log)
        raise RuntimeError(f"a child ended instead of becoming ready ({log}):\n{tail}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


async def _end(process: asyncio.subprocess.Process, *, is_client: bool) -> None:
    if process.stdin is not None:
        process.stdin.close()  # ends a client
    with contextlib.suppress(ProcessLookupError):
        if not is_client:
            process.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def child_command(part: str, place: Place, module: str = _CHILD) -> list[str]:
    """Return what runs a part of a row; ``module`` is what plays it."""
    return [sys.executable, "-m", module, part, place.to_json()]


@asynccontextmanager
async def worker_process(place: Place, log: Path, environment: Mapping[str, str]) -> AsyncIterator[int]:
    """Run the worker of ``place``; yield its process id."""
    async with child_process(child_command("worker", place), log, environment) as process:
        yield process.pid


class ClientProcess:
    """A client that waits for loads. Made by :func:`client_process`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def run(self, load: Load, processes: Mapping[str, int]) -> Sample:
        """Have it run ``load`` and return what it found."""
        asked = {"load": asdict(load), "processes": {**processes, "client": self.pid}}
        return Sample(**await self.ask(asked, load.warm_s + load.seconds + _SLACK_S))

    async def ask(self, asked: Mapping[str, Any], limit_s: float) -> Any:
        """Tell it one thing to do and return what it answers within ``limit_s`` seconds."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asked).encode() + b"\n")
        async with asyncio.timeout(limit_s):
            line = await stdout.readline()
        if not line:
            tail = await asyncio.to_thread(_tail, self._log)
            raise RuntimeError(f"a client ended while it was measured ({self._log}):\n{tail}")
        return json.loads(line)


@asynccontextmanager
async def client_process(
    place: Place, log: Path, environment: Mapping[str, str], module: str = _CHILD
) -> AsyncIterator[ClientProcess]:
    """Run the client of ``place`` until the end of the block."""
    command = child_command("client", place, module)
    async with child_process(command, log, environment, is_client=True) as process:
        yield ClientProcess(process, log)
