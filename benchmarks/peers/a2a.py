"""An echo agent of a2a-sdk over plain HTTP, served by uvicorn and called by the SDK's own client."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import httpx
import uvicorn
from a2a.client import Client, ClientConfig, create_client
from a2a.helpers import new_text_message, new_text_part
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import (
    AgentCapabilities,
    AgentCard,
    AgentInterface,
    AgentSkill,
    Message,
    Role,
    SendMessageRequest,
)
from starlette.applications import Starlette

from benchmarks.peers import Call, WrongAnswerError
from benchmarks.places import PAYLOAD, Place

__all__ = ["client", "serve"]

_CALL_S: Final = 60.0
_CLIENTS: Final = 16
_KEEP_S: Final = 600
"""How long the server keeps an idle connection. By default as long as the client does, so that after another
row's turn one could be closed just as it is used."""


class _Echo(AgentExecutor):
    """Answers at once with a message: the SDK's shortest way, without a task to be followed."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        await event_queue.enqueue_event(
            new_text_message(context.get_user_input(), context_id=context.context_id)
        )

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise NotImplementedError


def _card(url: str) -> AgentCard:
    return AgentCard(
        name="echo",
        description="Says what it was told.",
        version="1",
        supported_interfaces=[AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")],
        capabilities=AgentCapabilities(streaming=False),
        default_input_modes=["text/plain"],
        default_output_modes=["text/plain"],
        skills=[AgentSkill(id="echo", name="echo", description="Echo.", tags=["echo"])],
    )


async def serve(place: Place, ready: Callable[[], None]) -> None:
    """Serve the agent with one process of uvicorn, on uvloop, without an access log."""
    card, where = _card(place.address), urlsplit(place.address)
    handler = DefaultRequestHandler(_Echo(), InMemoryTaskStore(), card)
    app = Starlette(routes=[*create_agent_card_routes(card), *create_jsonrpc_routes(handler, "/")])
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=where.hostname or "",
            port=where.port or 0,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=_KEEP_S,
        )
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, setattr, server, "should_exit", True)
    serving = asyncio.ensure_future(server.serve())
    while not server.started:  # noqa: ASYNC110 - it has no event for it
        await asyncio.sleep(0.05)
    ready()
    await serving


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[Call]:
    """Connect with several of the SDK's clients, which take turns.

    The HTTP library below searches its whole pool for every request, so that one client becomes slow when
    much is in flight.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    async with AsyncExitStack() as stack:
        agents = itertools.cycle([await _agent(place, stack) for _ in range(_CLIENTS)])

        async def call() -> None:
            said = Message(message_id=uuid.uuid4().hex, role=Role.ROLE_USER, parts=[new_text_part(PAYLOAD)])
            answers = [one async for one in next(agents).send_message(SendMessageRequest(message=said))]
            if answers[0].message.parts[0].text != PAYLOAD:
                raise WrongAnswerError("a2a: another answer than was sent")

        yield call


async def _agent(place: Place, stack: AsyncExitStack) -> Client:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    http = await stack.enter_async_context(httpx.AsyncClient(limits=limits, timeout=_CALL_S))
    return await create_client(place.address, ClientConfig(streaming=False, httpx_client=http))
