"""What an operator can do from the page, where the console was opened with actions.

Each act is said as the command line says it: signed by the operator's own identity, decided on by policies,
and in the audit logs. The page learns in words what became of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentweave_bus.console.answers import json_answer
from agentweave_bus.console.broker_feed import BrokerCalls, BrokerFeed
from agentweave_bus.exceptions import AgentWeaveError, AuthorizationError

__all__ = ["Acts"]

_log = logging.getLogger(__name__)

_MOST_BYTES: Final = 16 * 1024
_BODY_S: Final = 5.0
_ACT_S: Final = 30.0
_WAIT_S: Final = 15.0
_AT_ONCE: Final = 4


class _Asked(BaseModel):
    """``ref`` is the reference of a task, or of a dead letter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: Annotated[str, Field(strict=True, min_length=1, max_length=4_096)]
    reason: Annotated[str, Field(strict=True, max_length=1_000)] = ""


async def _approve(calls: BrokerCalls, asked: _Asked) -> str:
    status = await calls.task(asked.ref).approve(asked.reason, timeout=_WAIT_S)
    return f"approved; the task is {status.state.value}"


async def _reject(calls: BrokerCalls, asked: _Asked) -> str:
    status = await calls.task(asked.ref).reject(asked.reason, timeout=_WAIT_S)
    return f"rejected; the task is {status.state.value}"


async def _cancel(calls: BrokerCalls, asked: _Asked) -> str:
    status = await calls.cancel(asked.ref, asked.reason, timeout=_WAIT_S)
    return f"the task is {status.state.value}"


async def _redrive(calls: BrokerCalls, asked: _Asked) -> str:
    told = await calls.redrive(asked.ref)
    return f"queued again, attempt {told['attempt']}"


async def _drop(calls: BrokerCalls, asked: _Asked) -> str:
    await calls.drop(asked.ref, reason=asked.reason)
    return "dropped"


_ACTS: Final[Mapping[str, Callable[[BrokerCalls, _Asked], Awaitable[str]]]] = {
    "approve": _approve,
    "reject": _reject,
    "cancel": _cancel,
    "redrive": _redrive,
    "drop": _drop,
}


class Acts:
    """Does what the page asks for, a few at once. That it is the page which asks is the guard's business."""

    def __init__(self, broker: BrokerFeed) -> None:
        self._broker = broker
        self._places = asyncio.Semaphore(_AT_ONCE)

    def routes(self) -> list[BaseRoute]:
        """Return where it is asked."""
        return [Route("/api/act/{act}", self._act, methods=["POST"])]

    async def _act(self, request: Request) -> Response:
        act = request.path_params["act"]
        do = _ACTS.get(act)
        if do is None:
            return json_answer({"error": "there is no such act"}, 404)
        try:
            asked = _Asked.model_validate_json(await _body(request))
        except (ValidationError, TimeoutError, ClientDisconnect):
            return json_answer({"error": "what is asked for is not understood"}, 400)
        try:
            async with asyncio.timeout(_ACT_S), self._places:
                said = await do(self._broker.calls, asked)
        except AuthorizationError as error:
            return _not_done(act, str(error), 403)
        except AgentWeaveError as error:
            return _not_done(act, str(error), 409)
        except TimeoutError:
            return _not_done(act, "nobody has answered in time; it may still happen", 504)
        _log.info("the console's page asked for %s: %s", act, said)
        return json_answer({"said": said})


def _not_done(act: str, why: str, status: int) -> Response:
    _log.warning("the console's page asked for %s, which was not done: %s", act, why)
    return json_answer({"error": why}, status)


async def _body(request: Request) -> bytes:
    """Read a body within a bounded time; one that is too long comes as an empty one, which is no JSON."""
    data = b""
    async with asyncio.timeout(_BODY_S):
        async for chunk in request.stream():
            data += chunk
            if len(data) > _MOST_BYTES:
                return b""
    return data
