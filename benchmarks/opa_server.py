"""A real OPA server with a bundle of the benchmark's grants, on a unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from agentweave_bus.authz.policy_bundle import build_bundle
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.supervisor.lifeline import dies_with_this_process

__all__ = ["opa_server"]

_START_S: Final = 20.0


@asynccontextmanager
async def opa_server(folder: Path, grants: Path) -> AsyncIterator[tuple[str, int]]:
    """Run one for the length of the block; yield its URL and its process id."""
    program = find_opa()
    if program is None:
        raise RuntimeError("there is no opa: run `make tools`")
    bundle, socket = folder / "bundle.tar.gz", folder / "opa.sock"
    bundle.write_bytes(await asyncio.to_thread(build_bundle, grants))
    command = [str(program), "run", "--server", "--addr", f"unix://{socket}", "--bundle", str(bundle)]
    command += ["--log-level", "error", "--skip-version-check"]
    process = await asyncio.create_subprocess_exec(
        *dies_with_this_process(command), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_START_S):
            while not await _answers(socket):
                if process.returncode is not None:
                    raise RuntimeError(f"opa ended with exit code {process.returncode}")
                await asyncio.sleep(0.05)
        yield f"unix://{socket}", process.pid
    finally:
        process.kill()
        await process.wait()


async def _answers(socket: Path) -> bool:
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return False
    writer.write(b"GET /health?bundles HTTP/1.1\r\nHost: opa\r\nConnection: close\r\n\r\n")
    try:
        return b" 200 " in await reader.readline()
    finally:
        writer.close()
