"""What runs in the child processes: ``python -m benchmarks.durable.child worker|client PLACE``.

A worker does tasks until SIGTERM; on its standard input it is told to ``open`` and to ``close`` its gate,
and at the end of that it is open. A client reads one request a line, does it, and answers with one line. Both
say ``ready`` on the descriptor that they are given.

Nothing of this project is imported here: what a peer's process holds in memory is its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.child import PROFILE, commands, say_ready
from benchmarks.durable.peers import Submitter, peer_of
from benchmarks.places import Place
from benchmarks.sampler import install_sampler

__all__ = ["main"]


async def _worker(place: Place) -> None:
    gate = asyncio.Event()
    if place.options["gate"] == "open":
        gate.set()
    watching = asyncio.create_task(_watch(gate))
    try:
        await peer_of(place).serve(place, gate, say_ready)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def _watch(gate: asyncio.Event) -> None:
    told = await commands()
    while line := await told.readline():
        if line == b"open\n":
            gate.set()
        else:
            gate.clear()
    gate.set()


async def _client(place: Place) -> None:
    async with peer_of(place).client(place) as submitter:
        for queue in place.options["queues"].split(","):
            await submitter.submit(queue, 1)
        say_ready()
        told = await commands()
        while line := await told.readline():
            answer = await _do(submitter, **json.loads(line))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


async def _do(submitter: Submitter, what: str, queue: str, count: int, every_s: float = 0.0) -> Any:
    """Do one request: submit so many and say how long it took, or one by one; or cancel so many."""
    began = time.perf_counter()
    if what == "submit":
        await submitter.submit(queue, count)
        return time.perf_counter() - began
    if what == "cancel":
        return [await submitter.cancel(queue) for _ in range(count)]
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number * every_s - time.perf_counter()))
        await submitter.submit_stamped(queue)
    return None


def main() -> None:
    """Play the part that the command line names, on uvloop, whichever peer it is."""
    part, place = sys.argv[1], Place.from_json(sys.argv[2])
    if PROFILE in os.environ:
        install_sampler(Path(os.environ[PROFILE]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_client(place) if part == "client" else _worker(place))


if __name__ == "__main__":
    main()
