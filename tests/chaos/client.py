"""The processes of the client that are killed: ``python -m tests.chaos.client submit`` and ``… watch``.

What they know is in files: which tasks the broker has accepted, and which outcomes were seen. A new process
goes on from there, with the tasks' ids and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from agentweave_bus import AgentWeaveClient
from agentweave_bus.client import TaskOptions
from agentweave_bus.exceptions import AgentCallError, AgentWeaveError, BusError
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.record import TaskRef
from tests.chaos.broken import apply
from tests.chaos.effects import append_json, json_lines
from tests.chaos.plan import AGENT, CLIENT, Settings, key_of, kind_of, payload_of

_AT_ONCE = 48
_AGAIN_S = 0.25

_log = logging.getLogger(__name__)


async def submit(settings: Settings) -> None:
    """Submit what was not accepted yet, each when it is due, until all are."""
    accepted = {number for _, (number, *_) in json_lines(settings.accepted)}
    began = _began(settings)
    due = iter([number for number in range(settings.tasks) if number not in accepted])
    async with _connected(settings) as parts, asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(_submit_each(settings, parts.client, due, began))


def _began(settings: Settings) -> float:
    """Return when the first submitter of this run began, in seconds since the epoch."""
    path = settings.accepted.with_name("began")
    if not path.exists():
        append_json(path, time.time())
    return next(value for _, value in json_lines(path))


async def _submit_each(settings: Settings, client: Any, due: Iterator[int], began: float) -> None:
    for number in due:
        await asyncio.sleep(began + number * settings.spread_s / settings.tasks - time.time())
        kind = kind_of(number, settings.kinds)
        while True:
            options = TaskOptions(idempotency_key=key_of(number))
            try:
                task = await client.submit(str(AGENT), kind, payload_of(number, kind), options)
                break
            except AgentCallError as error:
                _log.info("task %d is submitted again: %s", number, error)
                await asyncio.sleep(_AGAIN_S)
        append_json(settings.accepted, [number, kind, task.ref.id, task.ref.key])


async def watch(settings: Settings) -> None:
    """Look after every accepted task until it has ended, and write down how."""
    seen = {number for _, (number, *_) in json_lines(settings.outcomes)}
    async with _connected(settings) as parts:
        places = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            async for number, kind, task_id, _key in _tail(settings, seen):
                await places.acquire()
                task = group.create_task(_outcome(settings, parts, number, kind, task_id))
                task.add_done_callback(lambda _task: places.release())


async def _tail(settings: Settings, seen: set[int]) -> AsyncIterator[list[Any]]:
    offset, count = 0, 0
    while count < settings.tasks:
        for behind, entry in json_lines(settings.accepted, offset):
            offset = behind
            count += 1
            if entry[0] not in seen:
                seen.add(entry[0])
                yield entry
        # A task that was accepted when its submitter was killed may be there twice.
        count = len(seen)
        await asyncio.sleep(0.1)


async def _outcome(settings: Settings, parts: Any, number: int, kind: str, task_id: str) -> None:
    log = TaskLog(parts.desk, TaskRef(AGENT, CLIENT, kind, task_id))
    while True:
        try:
            await log.refresh()
        except BusError as error:
            _log.info("task %d: %s", number, error)
        if log.ended:
            break
        await asyncio.sleep(_AGAIN_S)
    last = log.last
    assert last is not None
    append_json(settings.outcomes, [number, last.state.value, last.epoch, last.digest.hex()])


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[Any]:
    """Connect, however long that takes, and yield what the client is made of."""
    while True:
        client = AgentWeaveClient(settings.client_file)
        try:
            await client.__aenter__()
        except AgentWeaveError as error:
            _log.info("not connected yet: %s", error)
            await asyncio.sleep(_AGAIN_S)
        else:
            break
    try:
        yield client._connected()
    finally:
        await client.__aexit__(None, None, None)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("agentweave_bus").setLevel(logging.WARNING)
    settings = Settings.of_environment()
    apply(settings)
    asyncio.run({"submit": submit, "watch": watch}[sys.argv[1]](settings))


if __name__ == "__main__":
    main()
