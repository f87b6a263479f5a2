"""The real console with the real gate and headers, and a model that a test fills: no broker stands behind it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.console.guard import Sessions
from agentweave_bus.console.listening import LOOPBACK, bind, names_of, serving
from agentweave_bus.console.model import SOURCES, ConsoleModel
from agentweave_bus.console.observed import AskedFor, ObservedRecord
from agentweave_bus.console.server import console_app
from agentweave_bus.console.streaming import LiveState
from agentweave_bus.console.watched import Watched
from agentweave_bus.types import TaskState

__all__ = ["AGENT", "CLIENT", "DOMAIN", "Stage", "decision", "letter", "record", "worker"]

DOMAIN = "shop.test"
AGENT = f"spiffe://{DOMAIN}/agent/order"
CLIENT = f"spiffe://{DOMAIN}/client/web"
OPERATOR = f"spiffe://{DOMAIN}/client/operator"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def key_of(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def record(
    number: int, state: TaskState = TaskState.COMPLETED, *, seen: int = 0, **changed: Any
) -> ObservedRecord:
    """Record ``seen`` of task ``number``, as the control role tells it."""
    values: dict[str, Any] = {
        "agent": AGENT,
        "sender": CLIENT,
        "key": key_of(number),
        "capability": "create_order",
        "id": f"task-{number}",
        "number": seen,
        "epoch": 1,
        "state": state,
        "at": now_ms() - 1_000 * number,
        "stored_at": now_ms() - 1_000 * number,
    }
    if state is TaskState.AUTH_REQUIRED:
        values["asked"] = AskedFor(approvers=(OPERATOR,), until=now_ms() + 600_000)
    return ObservedRecord(**values | changed)


def decision(number: int, *, allowed: bool = True, **changed: Any) -> dict[str, Any]:
    """An audit record of a decision."""
    return {
        "event": "admission",
        "ts": now_ms() - 1_000 * number,
        "log": "order",
        "audit_id": f"{'a' * 32}-{number}",
        "id": f"call-{number}",
        "digest": key_of(number),
        "caller": CLIENT,
        "callee": AGENT,
        "action": "create_order",
        "direction": "inbound",
        "allowed": allowed,
        "reason": "granted" if allowed else "no grant allows it",
        "revision": "r1",
        **changed,
    }


def letter(number: int, **changed: Any) -> dict[str, Any]:
    """A dead letter as the control role lists it."""
    return {
        "letter": f"{AGENT}#create_order/{key_of(number)}.1",
        "state": "waiting",
        "reason": "the card was declined",
        "given_up_at": now_ms() - 60_000,
        "attempts": 3,
        "task": {"id": f"task-{number}", "sender": CLIENT, "capability": "create_order"},
        **changed,
    }


def worker(number: int, **changed: Any) -> dict[str, Any]:
    """A place of a worker as the supervisor tells it."""
    return {
        "agent": "order",
        "name": f"order-{number}",
        "state": "ready",
        "why": "",
        "pid": None,
        "restarts": 0,
        "up_s": None,
        "beat": None,
        **changed,
    }


class Stage:
    """A console; ``url`` opens it, once for each profile. It can be taken away and put back."""

    def __init__(self, *, actions: bool = False) -> None:
        self.model = ConsoleModel(trust_domain=DOMAIN, clock_ms=now_ms)
        self.actions = actions
        self.story: dict[str, Any] = {}
        self.acted: list[tuple[str, Any]] = []
        """What pages asked to have done."""
        for name in SOURCES:
            self.model.source_well(name)
        self._sessions = Sessions()
        self._port = 0

    @property
    def url(self) -> str:
        return f"{names_of(LOOPBACK, self._port)[0]}?token={self._sessions.token}"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Stage]:
        """Serve it for the length of the block; at the same address as the last time."""
        watched = Watched()
        fixed: dict[str, Any] = {
            "as": OPERATOR,
            "trust_domain": DOMAIN,
            "actions": self.actions,
            "version": "0",
        }
        if self.actions:
            fixed["csrf"] = self._sessions.act_value
        state = LiveState(self.model.sections, fixed, watched, now_ms)
        listener = bind(LOOPBACK, self._port)
        self._port = listener.getsockname()[1]
        _, hosts = names_of(LOOPBACK, self._port)
        further = [
            Route("/api/task/{key}", self._tell),
            Route("/api/act/{what}", self._act, methods=["POST"]),
        ]
        app = console_app(self.model, state, watched, sessions=self._sessions, hosts=hosts, further=further)
        async with serving(app, listener, state.close), owned_tasks() as group:
            group.start_soon(state.run)
            try:
                yield self
            finally:
                group.cancel_scope.cancel()

    async def _tell(self, request: Request) -> JSONResponse:
        row = self.model.tasks.get(request.path_params["key"])
        if row is None:
            return JSONResponse({"error": "no such task is held"}, 404)
        return JSONResponse(
            {"row": row.to_json(), "chain": [], "principal": None, "timeline": [], "approval": None}
            | self.story
        )

    async def _act(self, request: Request) -> JSONResponse:
        self.acted.append((request.path_params["what"], await request.json()))
        return JSONResponse({"said": request.path_params["what"]})
