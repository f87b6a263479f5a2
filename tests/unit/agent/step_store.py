"""A store of steps in memory that can crash the worker, and what gives a task to one worker after another."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from anyio.lowlevel import checkpoint

from agentweave_bus.agent import (
    Attempt,
    BoundCapability,
    CapabilityTable,
    RequestContext,
    bind_context,
    current_context,
)
from agentweave_bus.agent.capability import capability, marks_of
from agentweave_bus.agent.records import StepRecord
from agentweave_bus.exceptions import AttemptLostError
from agentweave_bus.types import TaskResult

CALLER = "spiffe://a.io/agent/order"
LOGGER = logging.getLogger("agentweave_bus.agents.probe")

_MOST = 60  # attempts, after which something goes in circles


class Crash(Exception):  # noqa: N818 - no error of anybody's
    """The worker died here. That it is an Exception lets handlers try to catch it, which must not help."""


class MemoryStore:
    """Keeps JSON texts, each name once. ``crashes`` are numbers of operations: -n before it, +n after it."""

    def __init__(self, *crashes: int) -> None:
        self.texts: dict[str, str] = {}
        self.crashes = list(crashes)
        self.operations = 0
        self.written: list[str] = []

    async def load(self, name: str) -> StepRecord | None:
        def do() -> StepRecord | None:
            text = self.texts.get(name)
            return None if text is None else StepRecord.from_json(json.loads(text))

        return await self._count(do)

    async def confirm(self) -> None:
        """Say nothing: there is one attempt at a time."""

    async def save(self, name: str, record: StepRecord) -> StepRecord:
        def do() -> StepRecord:
            if name in self.texts:
                raise AttemptLostError(f"{name} is taken")
            self.texts[name] = json.dumps(record.to_json())
            self.written.append(name)
            return StepRecord.from_json(json.loads(self.texts[name]))

        return await self._count(do)

    async def _count(self, do: Callable[[], Any]) -> Any:
        self.operations += 1
        await checkpoint()
        if -self.operations in self.crashes:
            raise Crash
        value = do()
        if self.operations in self.crashes:
            raise Crash
        return value

    def values(self) -> set[str]:
        """Return the names of the author's steps that have a value."""
        return {name for name, text in self.texts.items() if ":" not in name and "value" in json.loads(text)}


def bound(function: Any, **options: Any) -> BoundCapability:
    table = CapabilityTable(LOGGER)
    table.add_function(function if marks_of(function) else capability("probe", **options)(function))
    return table["probe"]


def task(attempt: int = 1, **options: Any) -> RequestContext:
    return RequestContext(caller_spiffe_id=CALLER, task_id="t-1", kind="task", attempt=attempt, **options)


async def attempt(
    function: Any,
    store: MemoryStore | None = None,
    *,
    number: int = 1,
    last: bool = False,
    sink: Any = None,
    context: RequestContext | None = None,
    **options: Any,
) -> Attempt:
    made = function if isinstance(function, BoundCapability) else bound(function, **options)
    with bind_context(context or task(number)):
        return await made.attempt(made.validate({}), last_attempt=last, store=store, sink=sink)


async def perform(function: Any, store: MemoryStore, *, attempts: int = 3, first: int = 1) -> Attempt:
    """Give a task to one worker after the other until it is done, as whoever serves tasks does."""
    made = bound(function)
    for number in range(first, _MOST):
        try:
            with bind_context(task(number)):
                outcome = await _one(made, store, number, attempts)
        except Crash:
            continue
        if not outcome.retry:
            return outcome
    raise AssertionError(f"not done after {_MOST} attempts: {store.written}")


def _one(made: BoundCapability, store: MemoryStore, number: int, attempts: int) -> Awaitable[Attempt]:
    call = made.validate({})
    if number > attempts:
        return made.give_up(call, TaskResult(status="failed", error="out of attempts"), store=store)
    return made.attempt(call, last_attempt=number == attempts, store=store)


def step(*args: Any, **kwargs: Any) -> Any:
    return current_context().step(*args, **kwargs)


class Recorder:
    """Functions of steps and compensations that note when they run."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def does(self, name: str, value: Any = None, error: Exception | None = None) -> Callable[..., Any]:
        async def function(*_: Any) -> Any:
            self.ran.append(name)
            if error is not None:
                raise error
            return value

        return function

    def undoes(self, name: str) -> Callable[[Any], Any]:
        async def compensate(value: Any) -> None:
            self.ran.append(f"undo {name}({value})")

        return compensate
