"""What the page asks for on demand: one task's story, and more dead letters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentweave_bus.console.answers import json_answer
from agentweave_bus.console.broker_feed import BrokerFeed
from agentweave_bus.console.model import ConsoleModel
from agentweave_bus.console.story import task_story
from agentweave_bus.console.story_logs import TaskLogs, logs_of_task
from agentweave_bus.exceptions import AgentWeaveError

__all__ = ["Lookup"]

_log = logging.getLogger(__name__)

_LOOK_S: Final = 10.0
_AT_ONCE: Final = 4
_LONGEST_PLACE: Final = 4_096


class Lookup:
    """Asks the control role and reads the logs, for a few at once."""

    def __init__(self, model: ConsoleModel, broker: BrokerFeed, logs: Sequence[Path]) -> None:
        self._model = model
        self._broker = broker
        self._logs = logs
        self._places = asyncio.Semaphore(_AT_ONCE)

    def routes(self) -> list[BaseRoute]:
        """Return where it is asked."""
        return [Route("/api/task/{key}", self._task), Route("/api/letters", self._letters)]

    async def _task(self, request: Request) -> Response:
        row = self._model.tasks.get(request.path_params["key"])
        if row is None:
            return json_answer({"error": "the console does not hold this task, or no more"}, 404)

        async def story() -> dict[str, Any]:
            told = await self._broker.calls.observe_task(row.agent, row.sender, row.key)
            return task_story(row, told, await self._logs_of(row.id, told))

        return await self._answer(story)

    async def _letters(self, request: Request) -> Response:
        after = request.query_params.get("after", "")[:_LONGEST_PLACE] or None

        async def letters() -> dict[str, Any]:
            return await self._broker.calls.list(after=after)

        return await self._answer(letters)

    async def _logs_of(self, task_id: str | None, told: dict[str, Any]) -> TaskLogs:
        records = [one for one in told["records"] if one.get("genuine")]
        named = task_id or next((one["id"] for one in records if one.get("id")), None)
        digest = next((one["task"] for one in records if one.get("task")), "")
        if named is None or not self._logs:
            return TaskLogs([], [], whole=False)
        try:
            return await anyio.to_thread.run_sync(logs_of_task, self._logs, named, digest)
        except OSError as error:
            _log.warning("the audit logs can't be read: %s", error)
            return TaskLogs([], [], whole=False)

    async def _answer(self, ask: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
        try:
            async with asyncio.timeout(_LOOK_S), self._places:
                told = await ask()
        except AgentWeaveError as error:
            return json_answer({"error": str(error)}, 502)
        except TimeoutError:
            return json_answer({"error": "the control role does not answer"}, 504)
        return json_answer(told)
