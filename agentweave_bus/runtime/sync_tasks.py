"""Handles of tasks for scripts without an event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.tasks.events import TaskEvent
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.tasks.status import TaskStatus
from agentweave_bus.types import TaskResult

__all__ = ["RunBlocking", "SyncTaskHandle"]

T = TypeVar("T")


class RunBlocking(Protocol):
    """Runs something on the client's event loop and returns what came of it."""

    def __call__(self, start: Callable[[], Coroutine[Any, Any, T]], /) -> T:
        """Run it."""


class SyncTaskHandle:
    """:class:`~agentweave_bus.tasks.handle.TaskHandle` for scripts: the same, blocking."""

    def __init__(self, handle: TaskHandle, run: RunBlocking) -> None:
        self._handle = handle
        self._run = run

    @property
    def handle(self) -> TaskHandle:
        """The handle that this one is for."""
        return self._handle

    @property
    def id(self) -> str:
        """The task's id."""
        return self._handle.id

    @property
    def target(self) -> str:
        """The SPIFFE ID of the agent that the task is for."""
        return self._handle.target

    @property
    def capability(self) -> str:
        """What it is asked for."""
        return self._handle.capability

    @property
    def reference(self) -> str:
        """The text that names this task, here and in any other process of its submitter."""
        return self._handle.reference

    @property
    def full_reference(self) -> str:
        """The text that names it for everybody else, too: it says whose task it is."""
        return self._handle.full_reference

    @property
    def digest(self) -> str | None:
        """The digest of the submitted head, in hexadecimal, where it is known."""
        return self._handle.digest

    def __repr__(self) -> str:
        return f"<SyncTaskHandle {self.reference}>"

    def status(self) -> TaskStatus:
        """Do what :meth:`TaskHandle.status` does."""
        return self._run(self._handle.status)

    def result(self, timeout: float | None = None) -> TaskResult:
        """Do what :meth:`TaskHandle.result` does; ``timeout`` is in seconds."""
        return self._run(lambda: self._handle.result(timeout))

    def cancel(self, reason: str = "", **options: Any) -> TaskStatus:
        """Do what :meth:`TaskHandle.cancel` does."""
        return self._run(lambda: self._handle.cancel(reason, **options))

    def approve(self, reason: str = "", **options: Any) -> TaskStatus:
        """Do what :meth:`TaskHandle.approve` does."""
        return self._run(lambda: self._handle.approve(reason, **options))

    def reject(self, reason: str = "", **options: Any) -> TaskStatus:
        """Do what :meth:`TaskHandle.reject` does."""
        return self._run(lambda: self._handle.reject(reason, **options))

    def events(self, *, after: str | None = None) -> Iterator[TaskEvent]:
        """Do what :meth:`TaskHandle.events` does, as an iterator that blocks for the next one."""
        events = self._handle.events(after=after)

        async def following() -> TaskEvent | None:
            return await anext(events, None)

        try:
            while (event := self._run(following)) is not None:
                yield event
        finally:
            with suppress(AgentWeaveError):  # the client has disconnected, and its events are over
                self._run(lambda: _closed(events))


async def _closed(events: AsyncGenerator[TaskEvent]) -> None:
    await events.aclose()
