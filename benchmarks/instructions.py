"""How many processor instructions a call takes: the figure that stays when a machine is busy with other work.

Counted by Linux's ``perf``, for worker and client, without the kernel's own. Not for every machine: it takes
that program, and the right to watch processes (root, or a low ``kernel.perf_event_paranoid``).
"""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.load import Load
from benchmarks.report import TITLES, table
from benchmarks.rows import Row
from benchmarks.run import say
from benchmarks.world import Contender, World

__all__ = ["Counted", "Instructions", "check_perf", "count_instructions", "counting", "instructions_table"]

_WARM: Final = Load(64, 1.0, 1.0)
_BEGIN_S: Final = 0.5  # perf does not say when it has begun; what it misses is one of thousands
_EVENTS: Final = "instructions:u,cycles:u"
_COUNT: Final = re.compile(rb"^(\d+),", re.MULTILINE)


class Counted(NamedTuple):
    """What was counted of a process: its instructions, and in how many cycles a processor did them."""

    instructions: int
    cycles: int


@dataclass(frozen=True, slots=True)
class Instructions:
    """Of one row: how many instructions a call took in the worker and in the client."""

    worker: float
    client: float


async def count_instructions(rows: Sequence[Row], *, tasks: int, seconds: float) -> dict[str, Instructions]:
    """Count for each row, with ``tasks`` calls in flight for ``seconds``.

    Raises:
        RuntimeError: ``perf`` is not there, or may not count.

    """
    check_perf()
    found = {}
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        async with World(Path(folder), rows, None).contenders() as contenders:
            for contender in contenders:
                say(contender.row.name)
                found[contender.row.name] = await _counted(contender, Load(tasks, 0.0, seconds))
    say("")
    return found


async def _counted(contender: Contender, load: Load) -> Instructions:
    await contender.client.run(_WARM, contender.processes)
    counts: dict[str, Counted] = {}
    async with (
        counting(contender.processes["worker"], "worker", counts),
        counting(contender.client.pid, "client", counts),
    ):
        sample = await contender.client.run(load, contender.processes)
    worker, client = (counts[part].instructions / sample.calls for part in ("worker", "client"))
    return Instructions(worker, client)


def check_perf() -> None:
    """Raise RuntimeError where there is no ``perf``."""
    if shutil.which("perf") is None:
        raise RuntimeError("perf is not installed (Debian's package linux-perf)")


@asynccontextmanager
async def counting(pid: int, name: str, counts: dict[str, Counted]) -> AsyncIterator[None]:
    """Count what a process does during the block, and put it under ``name``."""
    perf = await asyncio.create_subprocess_exec(
        *("perf", "stat", "-x,", "-e", _EVENTS, "-p", str(pid)), stderr=asyncio.subprocess.PIPE
    )
    try:
        await asyncio.sleep(_BEGIN_S)
        yield
    finally:
        if perf.returncode is None:
            perf.send_signal(signal.SIGINT)
        _, told = await perf.communicate()
    if len(found := _COUNT.findall(told)) != len(Counted._fields):
        raise RuntimeError(f"perf does not count: {told.decode(errors='replace').strip()}")
    counts[name] = Counted(*map(int, found))


def instructions_table(found: Mapping[str, Instructions]) -> str:
    """Return a line for each row, in thousands, and how many times the first row's they are."""
    head = ["thousand instructions a call", "worker", "client", "both", "times the first"]
    base = next(iter(found.values()))
    lines = [
        [
            TITLES[name],
            f"{one.worker / 1000:,.0f}",
            f"{one.client / 1000:,.0f}",
            f"{(one.worker + one.client) / 1000:,.0f}",
            f"{(one.worker + one.client) / (base.worker + base.client):.1f}",
        ]
        for name, one in found.items()
    ]
    return table(head, lines)
