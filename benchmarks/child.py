"""What runs in the child processes: ``python -m benchmarks.child worker|client PLACE``.

A worker serves until SIGTERM. A client reads one load a line from standard input, runs it, and answers
with one line; it ends at the end of its input. Both say ``ready`` on the descriptor that they are given.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict

from agentweave_bus.runtime import READY_FD
from agentweave_bus.worker import run_on_fastest_loop
from benchmarks.load import Load, closed_loop
from benchmarks.peers import peer_of
from benchmarks.places import Place

__all__ = ["main"]


def _ready() -> None:
    os.write(int(os.environ[READY_FD]), b"ready\n")


async def _commands() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    return reader


async def _client(place: Place) -> None:
    async with peer_of(place).client(place) as call:
        await call()
        _ready()
        commands = await _commands()
        while line := await commands.readline():
            asked = json.loads(line)
            sample = await closed_loop(call, Load(**asked["load"]), asked["processes"])
            sys.stdout.write(json.dumps(asdict(sample)) + "\n")
            sys.stdout.flush()


def main() -> None:
    """Play the part that the command line names."""
    part, place = sys.argv[1], Place.from_json(sys.argv[2])
    run_on_fastest_loop(_client(place) if part == "client" else peer_of(place).serve(place, _ready))


if __name__ == "__main__":
    main()
