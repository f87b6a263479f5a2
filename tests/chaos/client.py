"""The processes of the client that are killed: ``python -m tests.chaos.client submit`` and ``… watch``.

What they know is in files: which tasks the broker has accepted, and which events of them were seen. A new
process goes on from there, with the tasks' references, the last cursors, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from agentweave_bus import AgentWeaveClient
from agentweave_bus.exceptions import AgentCallError, AgentWeaveError
from agentweave_bus.tasks.handle import TaskHandle
from tests.chaos.broken import apply
from tests.chaos.effects import append_json, json_lines
from tests.chaos.plan import AGENT, TERMINAL, Settings, is_cancelled, key_of, kind_of, payload_of

_AT_ONCE = 48
_AGAIN_S = 0.25
_SECOND_THOUGHTS_S = 0.5

_log = logging.getLogger(__name__)


async def submit(settings: Settings) -> None:
    """Submit what was not accepted yet, each when it is due, until all are."""
    accepted = {number for _, (number, *_) in json_lines(settings.accepted)}
    began = _began(settings)
    due = iter([number for number in range(settings.tasks) if number not in accepted])
    async with _connected(settings) as client, asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(_submit_each(settings, client, due, began, group))


def _began(settings: Settings) -> float:
    """Return when the first submitter of this run began, in seconds since the epoch."""
    path = settings.accepted.with_name("began")
    if not path.exists():
        append_json(path, time.time())
    return next(value for _, value in json_lines(path))


async def _submit_each(
    settings: Settings,
    client: AgentWeaveClient,
    due: Iterator[int],
    began: float,
    group: asyncio.TaskGroup,
) -> None:
    for number in due:
        await asyncio.sleep(began + number * settings.spread_s / settings.tasks - time.time())
        kind = kind_of(number, settings.kinds)
        while True:
            try:
                task = await client.submit(
                    str(AGENT), kind, payload_of(number, kind), idempotency_key=key_of(number)
                )
                break
            except AgentCallError as error:
                _log.info("task %d is submitted again: %s", number, error)
                await asyncio.sleep(_AGAIN_S)
        append_json(settings.accepted, [number, kind, task.id, task.reference])
        if is_cancelled(number, kind):
            group.create_task(_cancel(task))


async def _cancel(task: TaskHandle) -> None:
    await asyncio.sleep(_SECOND_THOUGHTS_S)
    try:
        await task.cancel("not wanted any more")
    except AgentCallError as error:
        _log.warning("task %s: %s", task.reference, error)


async def watch(settings: Settings) -> None:
    """Look after every accepted task until it has ended, and write down each event as it comes."""
    seen: dict[int, str] = {}
    ended: set[int] = set()
    for _, (number, what, cursor, *_) in json_lines(settings.events):
        seen[number] = cursor
        ended |= {number} if what in TERMINAL else set()
    async with _connected(settings) as client:
        places = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            async for number, reference in _tail(settings, ended):
                await places.acquire()
                task = group.create_task(_follow(settings, client, number, reference, seen.get(number)))
                task.add_done_callback(lambda _task: places.release())


async def _tail(settings: Settings, ended: set[int]) -> AsyncIterator[tuple[int, str]]:
    """Yield each task that is accepted and not known to have ended, once, until there can be no more."""
    known = set(ended)
    offset = 0
    while len(known) < settings.tasks:
        for behind, (number, _kind, _id, reference) in json_lines(settings.accepted, offset):
            offset = behind
            if number not in known:
                known.add(number)
                yield number, reference
        await asyncio.sleep(0.1)


async def _follow(
    settings: Settings, client: AgentWeaveClient, number: int, reference: str, after: str | None
) -> None:
    while True:
        try:
            async for event in client.task(reference).events(after=after):
                after = event.cursor
                what = event.kind if event.state is None else event.state.value
                append_json(settings.events, [number, what, event.cursor, event.attempt])
        except AgentCallError as error:
            _log.warning("task %d is looked at again: %s", number, error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[AgentWeaveClient]:
    """Connect, however long that takes."""
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
        yield client
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
