"""Whether a long queue is as quick as a short one."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.durable.rows import TaskRow
from benchmarks.durable.run import Turn
from benchmarks.durable.world import Contender, TaskWorld
from benchmarks.report import spread, table, verdicts_table
from benchmarks.results import Figure, ratio
from benchmarks.run import say
from benchmarks.targets import Verdict

__all__ = ["LengthSample", "LongRun", "large_report", "measure_long_queue"]

SHORT: Final = 1_000
_FEW: Final = "few"
_MANY: Final = "many"
_CLIENTS: Final = 2
_CHUNK: Final = 5_000
_CHUNK_S: Final = 120.0
_FIRST: Final = 500
_WITHIN: Final = 0.8


@dataclass(frozen=True, slots=True)
class LengthSample:
    """Tasks a second: stored, and got done by one worker."""

    submitted: float
    worked: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRun:
    """What was found: how many were ``queued`` of those ``wanted``, and the rounds.

    ``filled_s`` is how many seconds that took, ``megabytes`` (of 10^6 bytes) what they take on disk.
    """

    wanted: int
    queued: int
    filled_s: float
    megabytes: float
    short: Sequence[LengthSample]
    long: Sequence[LengthSample]

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> LongRun:
        """Read what ``dataclasses.asdict`` made."""
        parts = {one: [LengthSample(**sample) for sample in value[one]] for one in ("short", "long")}
        return LongRun(**{**value, **parts})


async def measure_long_queue(
    row: TaskRow, queued: int, *, rounds: int, seconds: float, limit_s: float
) -> LongRun:
    """Fill a queue with ``queued`` tasks and measure it, and one with a thousand, turn and turn about.

    Filling ends after ``limit_s`` seconds, however many that were.
    """
    queues = {_FEW: 1, _MANY: 1}
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        world = TaskWorld(Path(folder), [row], queues=queues, closed=tuple(queues), clients=_CLIENTS)
        async with world.contenders() as (contender,):
            await _fill(contender, _FEW, SHORT, limit_s)
            began = time.monotonic()
            held = {_FEW: SHORT, _MANY: await _fill(contender, _MANY, queued, limit_s)}
            filled_s = time.monotonic() - began
            stored = await contender.queues[_MANY].stored_bytes()
            found = await _rounds(contender, held, rounds, seconds)
    return LongRun(
        wanted=queued,
        queued=held[_MANY],
        filled_s=filled_s,
        megabytes=stored / 1e6,
        short=found[_FEW],
        long=found[_MANY],
    )


async def _fill(contender: Contender, queue: str, count: int, limit_s: float) -> int:
    """Submit ``count`` tasks by all clients at once; return how many there are then."""
    left, until, done = count, time.monotonic() + limit_s, 0

    async def feed(number: int) -> None:
        nonlocal left, done
        while left and time.monotonic() < until:
            size = min(_CHUNK, left)
            left -= size
            asked = {"what": "submit", "queue": queue, "count": size}
            await contender.clients[number].ask(asked, _CHUNK_S)
            done += size
            say(f"{done:,} of {count:,} tasks queued")

    async with asyncio.TaskGroup() as group:
        for number in range(len(contender.clients)):
            group.create_task(feed(number))
    say("")
    return done


async def _rounds(
    contender: Contender, held: dict[str, int], rounds: int, seconds: float
) -> dict[str, list[LengthSample]]:
    turn = Turn(contender)
    found: dict[str, list[LengthSample]] = {queue: [] for queue in held}
    counts = dict.fromkeys(held, _FIRST)
    for number in range(-1, rounds):  # the first one warms up
        for queue in held if number % 2 == 0 else reversed(list(held)):
            say(f"round {number + 1} of {rounds}: {held[queue]:,} queued")
            sample = await _sample(turn, contender, queue, held[queue], counts[queue])
            counts[queue] = max(_FIRST, int(sample.worked * seconds))
            if number >= 0:
                found[queue].append(sample)
    say("")
    return found


async def _sample(turn: Turn, contender: Contender, queue: str, held: int, count: int) -> LengthSample:
    """Submit ``count`` tasks on top of those that are held, and let one worker get as many done."""
    submitted = await turn.submitted(queue, count)
    worked, _ = await turn.worked(contender.queues[queue], leave=held)
    contender.queues[queue].tell("close")
    await turn.settled()
    return LengthSample(submitted, worked)


def large_report(run: LongRun) -> str:
    """Return the rates with few and with many tasks in the queue, and whether they are the same."""
    lines = [
        [f"{queued:,}", *(spread(Figure.of(values)) for values in _columns(samples))]
        for queued, samples in ((SHORT, run.short), (run.queued, run.long))
    ]
    verdicts = []
    for what, of in (("submitting", _submitted), ("one worker", _worked)):
        found = ratio(run.long, run.short, of)
        wanted = f"{what}: with {run.queued:,} queued at least {_WITHIN:g} x that with {SHORT:,}"
        verdicts.append(Verdict(wanted, found, found.median >= _WITHIN))
    short = "" if run.queued >= run.wanted else f" The time was up before {run.wanted:,} were queued."
    return (
        table(["tasks in the queue", "submitted, /s", "one worker, /s"], lines)
        + f"\n\n{verdicts_table(verdicts)}\n\n"
        + f"It took {run.filled_s:,.0f} s to queue {run.queued:,} tasks, from {_CLIENTS} processes. They take"
        + f" {run.megabytes:,.0f} MB on disk.{short}"
    )


def _columns(samples: Sequence[LengthSample]) -> tuple[list[float], list[float]]:
    return [_submitted(one) for one in samples], [_worked(one) for one in samples]


def _submitted(one: LengthSample) -> float:
    return one.submitted


def _worked(one: LengthSample) -> float:
    return one.worked
