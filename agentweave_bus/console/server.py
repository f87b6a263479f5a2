"""What the console answers: its page, the snapshot, its changes, and what is looked up on demand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from agentweave_bus.console.answers import json_answer
from agentweave_bus.console.guard import COOKIE, Guard, Sessions
from agentweave_bus.console.model import ConsoleModel, TaskFilter
from agentweave_bus.console.streaming import MOST_STREAMS, EventStream, LiveState
from agentweave_bus.console.watched import Watched

__all__ = ["console_app"]

PAGE_FOLDER: Final = Path(__file__).parent / "page"

_TYPES: Final = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_MOST_QUERY: Final = 200


def console_app(
    model: ConsoleModel,
    state: LiveState,
    watched: Watched,
    *,
    sessions: Sessions,
    hosts: frozenset[str],
    cookie: str = COOKIE,
    further: Sequence[BaseRoute] = (),
) -> ASGIApp:
    """Return the application; ``further`` are routes of other modules."""
    files = {path.name: path.read_bytes() for path in PAGE_FOLDER.iterdir() if path.suffix in _TYPES}

    def file(name: str) -> Response:
        data = files.get(name)
        if data is None:
            return json_answer({"error": "there is no such file"}, 404)
        return Response(data, media_type=_TYPES[Path(name).suffix])

    async def index(_: Request) -> Response:
        return file("index.html")

    async def page(request: Request) -> Response:
        return file(request.path_params["name"])

    async def snapshot(_: Request) -> Response:
        return Response(state.whole()[0], media_type="application/json")

    async def tasks(request: Request) -> Response:
        asked = {name: request.query_params.get(name, "")[:_MOST_QUERY] for name in _ASKED}
        found = model.found(TaskFilter(**{_ASKED[name]: value for name, value in asked.items()}))
        return json_answer(found)

    routes = [
        Route("/", index),
        Route("/page/{name}", page),
        Route("/api/state", snapshot),
        Route("/api/events", _Events(state, watched)),
        Route("/api/tasks", tasks),
        *further,
    ]
    return Guard(
        Starlette(routes=routes), sessions=sessions, hosts=hosts, cookie=cookie
    )  # outermost: it sees errors, too


_ASKED: Final = {"state": "state", "agent": "agent", "capability": "capability", "q": "text"}


class _Events:
    """Opens streams, up to so many at once."""

    def __init__(self, state: LiveState, watched: Watched) -> None:
        self._state = state
        self._watched = watched

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._watched.looking >= MOST_STREAMS:
            answer: ASGIApp = json_answer({"error": "too many pages are open"}, 503)
        else:
            answer = EventStream(self._state, self._watched)
        await answer(scope, receive, send)
