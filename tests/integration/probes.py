"""Who takes part in a live world, and agents whose tests see what they do and hold them where they like.

What is held open lives in a task of its own, because task groups must be left in the task that entered
them, and fixtures and tests are different tasks.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import anyio

from agentweave_bus import (
    SecureAgent,
    TaskFailedError,
    capability,
    requires_peer,
)
from agentweave_bus.config import AgentConfig
from agentweave_bus.identity import (
    X509Svid,
)
from agentweave_bus.runtime import Runner
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.spiffe_id import SpiffeID

T = TypeVar("T")

DOMAIN = "demo.test"
ECHO = SpiffeID(f"spiffe://{DOMAIN}/agent/echo")
FRONT = SpiffeID(f"spiffe://{DOMAIN}/agent/front")
MIDDLE = SpiffeID(f"spiffe://{DOMAIN}/agent/middle")
ABSENT = SpiffeID(f"spiffe://{DOMAIN}/agent/Absent")  # an upper-case letter: paths may have them
CLI = SpiffeID(f"spiffe://{DOMAIN}/client/cli")
OTHER = SpiffeID(f"spiffe://{DOMAIN}/client/other")
OPERATOR = SpiffeID(f"spiffe://{DOMAIN}/client/operator")
MALLORY = SpiffeID(f"spiffe://{DOMAIN}/client/mallory")
IDENTITIES = (ECHO, FRONT, MIDDLE, ABSENT, CLI, OTHER, OPERATOR)

PATIENCE = 30.0
"""Seconds after which an event that should come at once counts as missing."""

GRANTS: dict[str, Any] = {
    "grants": [
        {
            "caller": str(CLI),
            "callee": [str(ECHO), str(ABSENT)],
            "capabilities": ["*"],
            "principals": ["https://login.example"],
        },
        {
            "caller": str(CLI),
            "callee": [str(FRONT), str(MIDDLE)],
            "capabilities": ["relay"],
            "principals": ["https://login.example"],
        },
        {"caller": str(FRONT), "callee": [str(MIDDLE)], "capabilities": ["relay"]},
        {"caller": str(FRONT), "callee": [str(ECHO)], "capabilities": ["whoami", "say", "work", "wait"]},
        {"caller": str(MIDDLE), "callee": [str(ECHO)], "capabilities": ["whoami", "say"]},
        {"caller": str(CLI), "callee": [str(ECHO)], "capabilities": ["order.*"], "kinds": ["event"]},
    ],
    "operators": [{"who": str(OPERATOR), "may": ["control:redrive", "control:observe", "control:cancel"]}],
}


class Held(Generic[T]):
    """A context manager that is held open by a task of its own."""

    def __init__(self, task: asyncio.Task[None], value: T, leave: asyncio.Event) -> None:
        self._task = task
        self._leave = leave
        self.value = value

    @classmethod
    async def open(cls, manager: AbstractAsyncContextManager[T]) -> Held[T]:
        entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        leave = asyncio.Event()
        task = asyncio.create_task(_hold(manager, entered, leave))
        await asyncio.wait({task, entered}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not entered.done():
            task.result()
        assert entered.done(), "not entered within a minute"
        return cls(task, entered.result(), leave)

    async def close(self) -> None:
        self._leave.set()
        async with asyncio.timeout(60):
            await self._task


async def _hold(
    manager: AbstractAsyncContextManager[T], entered: asyncio.Future[T], leave: asyncio.Event
) -> None:
    async with manager as value:
        entered.set_result(value)
        await leave.wait()


class Probe(SecureAgent):
    """An agent whose tests can see what it did and hold it where they like."""

    def __init__(self, config: AgentConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.ran: list[str] = []
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.thread_gate = threading.Event()
        self.svids: list[X509Svid] = []
        self.started = asyncio.Event()
        self.stopped = False
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.on_rotation = asyncio.Event()
        self.most_at_once = 0
        self._at_once = 0

    async def on_start(self) -> None:
        await self.may_start.wait()
        self.started.set()

    async def on_stop(self) -> None:
        self.stopped = True

    async def on_svid_update(self, new_svid: X509Svid) -> None:
        self.svids.append(new_svid)
        self.on_rotation.set()

    @property
    def parts(self) -> Connected:
        return self._SecureAgent__runtime._parts  # type: ignore[attr-defined,no-any-return]

    @capability("say", safe=True)
    async def say(self, text: str) -> dict[str, Any]:
        """Do no harm, however often."""
        self.ran.append("say")
        return {"said": text}

    @capability("work")
    async def work(self, text: str = "") -> dict[str, Any]:
        """Do something that must not be done twice."""
        self.ran.append("work")
        return {"worked": text}

    @capability("wait")
    async def wait(self) -> dict[str, Any]:
        """Wait for the test's gate."""
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.ran.append("wait")
            self.entered.set()
            await self.gate.wait()
        finally:
            self._at_once -= 1
        return {"waited": True}

    @capability("hold", safe=True)
    async def hold(self, text: str) -> dict[str, Any]:
        """Wait likewise, with a payload of any size in hand."""
        return {"held": len(text), **await self.wait()}

    @capability("wait_safe", safe=True)
    async def wait_safe(self) -> dict[str, Any]:
        """Likewise, and harmless."""
        return await self.wait()

    @capability("stubborn")
    async def stubborn(self) -> dict[str, Any]:
        """Likewise, whatever its deadline."""
        with anyio.CancelScope(shield=True):
            return await self.wait()

    @capability("block")
    def block(self) -> dict[str, Any]:
        """Block a thread until the test lets go."""
        self.ran.append("block")
        self.get_loop().call_soon_threadsafe(self.entered.set)
        assert self.thread_gate.wait(PATIENCE)
        return {"blocked": True}

    @capability("boom")
    async def boom(self) -> dict[str, Any]:
        """Fail in an unexpected way."""
        raise RuntimeError("a secret of the handler")

    @capability("decline")
    async def decline(self) -> dict[str, Any]:
        """Fail in words for the caller."""
        raise TaskFailedError("out of stock")

    @capability("huge")
    async def huge(self, size: int) -> dict[str, Any]:
        """Answer with as many bytes as asked for."""
        return {"text": "x" * size}

    @capability("inner")
    @requires_peer(f"spiffe://{DOMAIN}/agent/*")
    async def inner(self) -> dict[str, Any]:
        """For agents only, whatever the grants say."""
        self.ran.append("inner")
        return {}

    @capability("whoami")
    async def whoami(self) -> dict[str, Any]:
        """Say what the verified request says."""
        context = self.context
        self.ran.append("whoami")
        return {
            "caller": context.caller_spiffe_id,
            "via": [{"iss": str(link.iss), "aud": str(link.aud), "cap": link.cap} for link in context.via],
            "principal": None if context.principal is None else dict(context.principal),
            "deadline_ms": context.deadline_ms,
            "scope": context.links[-1].head.scope and list(context.links[-1].head.scope),
        }

    @capability("relay")
    async def relay(self, path: list[str], name: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Ask the next agent on the path; the last one for ``name``."""
        self.ran.append("relay")
        target, *rest = path
        if rest:
            name, payload = "relay", {"path": rest, "name": name, "payload": payload}
        result = await self.call_agent(target, name, payload, timeout=300)
        return {"status": result.status, "value": data_of(result), "error": result.error}

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.loop

    loop: asyncio.AbstractEventLoop


def data_of(result: Any) -> Any:
    """The data of a result's first part."""
    if not result.messages:
        return None
    return result.messages[0].parts[0].data


_STOP: ContextVar[asyncio.Event] = ContextVar("stop")


async def stop_asked_for() -> None:
    """Stands for the signals: a test stops one agent of several in its process, which no signal can."""
    await _STOP.get().wait()


class Running:
    """An agent served in this process, by the same runner as in its own."""

    def __init__(self, agent: Probe) -> None:
        self.agent = agent
        self._stop = asyncio.Event()
        agent.loop = asyncio.get_running_loop()
        token = _STOP.set(self._stop)
        self._task = asyncio.create_task(Runner().run(agent))
        _STOP.reset(token)

    async def ready(self) -> Running:
        await self.until(self.agent.started)
        return self

    async def until(self, event: asyncio.Event) -> None:
        """Wait for an event, or the agent's end, whose error is raised."""
        waiter = asyncio.create_task(event.wait())
        await asyncio.wait({self._task, waiter}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._task.done():
            self._task.result()
        assert event.is_set()

    def ask_to_stop(self) -> None:
        self._stop.set()

    async def stop(self) -> None:
        """As SIGTERM does."""
        self._stop.set()
        async with asyncio.timeout(40):
            await self._task

    async def crash(self) -> None:
        """As near to a crash as a task can come: nothing is drained."""
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=PATIENCE)
