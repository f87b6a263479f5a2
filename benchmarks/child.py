"""What runs in the child processes: ``python -m benchmarks.child worker|client PLACE``.

A worker serves until SIGTERM. A client reads one load a line from standard input, runs it, and answers
with one line; it ends at the end of its input. Both say ``ready`` on the descriptor that they are given.

Nothing of this project is imported here: what a peer's process holds in memory is its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.load import Load, closed_loop
from benchmarks.peers import peer_of
from benchmarks.places import Place
from benchmarks.sampler import install_sampler

__all__ = ["PROFILE", "READY_FD", "commands", "main", "say_ready"]

READY_FD: Final = "AGENTWEAVE_READY_FD"
"""As the workers of this project know it."""

PROFILE: Final = "BENCHMARK_PROFILE"
"""The file to which a child writes where its time went; sampled from SIGUSR2 on."""


def say_ready() -> None:
    """Tell whoever started this process that it is ready."""
    os.write(int(os.environ[READY_FD]), b"ready\n")


async def commands() -> asyncio.StreamReader:
    """Return standard input, to be read by lines."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    return reader


async def _client(place: Place) -> None:
    async with peer_of(place).client(place) as call:
        await call()
        say_ready()
        told = await commands()
        while line := await told.readline():
            asked = json.loads(line)
            sample = await closed_loop(call, Load(**asked["load"]), asked["processes"])
            sys.stdout.write(json.dumps(asdict(sample)) + "\n")
            sys.stdout.flush()


def main() -> None:
    """Play the part that the command line names, on uvloop, whichever peer it is."""
    part, place = sys.argv[1], Place.from_json(sys.argv[2])
    if PROFILE in os.environ:
        install_sampler(Path(os.environ[PROFILE]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_client(place) if part == "client" else peer_of(place).serve(place, say_ready))


if __name__ == "__main__":
    main()
