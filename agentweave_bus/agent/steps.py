"""Durable steps: parts of a handler whose results outlive the worker, and how they are undone.

A :class:`Steps` belongs to one run of a handler. With a store, a step that was recorded in an earlier
attempt returns what it returned then, and its function does not run. When the task has failed for good,
:meth:`Steps.run_compensations` undoes the recorded steps, last first, and each only once.

A compensation is code, and code can't be stored. After a crash the handler therefore runs again to name
its compensations: recorded steps return, and at the first that is not recorded it is stopped (*replay*).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

from anyio import fail_after, move_on_after, sleep_forever

from agentweave_bus.agent.failures import NO_FAILURE, Again, correlation_id, failed, may_be_retried
from agentweave_bus.agent.records import StepRecord, failure_record, shown_failure, told_again
from agentweave_bus.agent.saga import Halt, Ledger, Saga, Verdict
from agentweave_bus.envelope.blob import WIDE_LIMITS
from agentweave_bus.envelope.codec import to_json_value
from agentweave_bus.exceptions import AgentWeaveError, StepFailedError
from agentweave_bus.names import CAPABILITY_NAME
from agentweave_bus.observability.spans import inner_span, note
from agentweave_bus.types import JsonValue, TaskResult

__all__ = ["MOST_PASSES", "Steps", "Undone"]

MOST_PASSES: Final = 8
"""How often compensations are gone through before a task is given up with some of them not done."""

_COMPENSATION_SECONDS: Final = 60.0  # for one, where the capability has no timeout
_OTHERS_SECONDS: Final = 1.0
_STEP: Final = "agentweave.step"
_logger: Final = logging.getLogger(__name__)
_inside: Final[ContextVar[str | None]] = ContextVar("agentweave_step", default=None)

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a plain function in a thread and returns what it returned."""


@dataclass(frozen=True, slots=True)
class Undone:
    """What came of the compensations.

    ``unfinished`` says that they are to be tried again (not before ``retry_after`` seconds where that is
    given), and that ``result`` is not the task's outcome yet. ``exhausted`` is the verdict's; ``not_undone``
    says that something is left of what was done.
    """

    result: TaskResult
    unfinished: bool = False
    retry_after: float | None = None
    correlation_id: str | None = None
    exhausted: bool = False
    not_undone: bool = False


@dataclass(frozen=True, slots=True)
class _Done:
    """A completed step that has a compensation, reached in this run."""

    value: JsonValue
    compensate: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a compensation is not done."""

    correlation_id: str
    again: Again


class Steps:
    """The steps of one run of a handler; without a ``ledger`` nothing is recorded and nothing replayed.

    ``timeout`` is the limit of one compensation in seconds.
    """

    def __init__(
        self, in_thread: InThread, ledger: Ledger | None = None, *, timeout: float | None = None
    ) -> None:
        self.verdict: Verdict | None = None  # standing: this run is a replay
        self._in_thread = in_thread
        self._ledger = ledger
        self._timeout = timeout or _COMPENSATION_SECONDS
        self._names: set[str] = set()
        self._done: dict[str, _Done] = {}
        self._failed: set[str] = set()
        self._passed_over: dict[str, StepRecord] = {}
        self._owed: set[str] = set()  # in a replay: what is still to be found
        self._looked = ledger is None or ledger.fresh
        self._over = False

    @cached_property
    def _saga(self) -> Saga | None:
        # When it is asked for: most handlers take no steps.
        return None if self._ledger is None else Saga(self._ledger)

    # --- running ------------------------------------------------------------------------------------

    async def run(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        compensate: Callable[[Any], Any] | None,
    ) -> Any:
        """Run the step ``name``, or return what it returned; see ``RequestContext.step``."""
        self._claim(name, function, compensate)
        ledger, saga = self._ledger, self._saga
        call = partial(function, *args, **kwargs)
        if ledger is None or saga is None:
            return self._keep(name, await self._perform(name, call), compensate)
        if not self._looked:
            await self._look(saga)
        record = await ledger.load(name)
        if record is not None:
            return await self._replay(name, record, compensate, ledger.halt)
        if self.verdict is not None:
            await self._end_of_replay(ledger.halt)
        await self._write_passed_over(ledger)
        if compensate is not None:
            await saga.announce(name)
        await ledger.confirm()
        return self._keep(name, await self._record(name, call, ledger), compensate)

    def close(self) -> None:
        """Refuse steps from here on: the handler has ended."""
        self._over = True

    def _claim(self, name: object, function: object, compensate: object) -> None:
        outer = _inside.get()
        if outer is not None:
            raise AgentWeaveError(f"step {name!r:.80} can't stand inside step {outer!r}: put it behind it")
        if self._over:
            raise AgentWeaveError(f"step {name!r:.80} comes too late: its handler has ended")
        if not (isinstance(name, str) and CAPABILITY_NAME.fullmatch(name)):
            raise AgentWeaveError(
                f"{name!r:.80} can't name a step:"
                " use 1 to 64 of a-z, 0-9, '_' and '-', a letter or digit first"
            )
        if not callable(function) or not (compensate is None or callable(compensate)):
            raise AgentWeaveError(f"step {name!r} takes a function and its arguments, not what it returned")
        if name in self._names:
            raise AgentWeaveError(f"there are two steps {name!r} in one run: give each a name of its own")
        self._names.add(name)

    async def _perform(self, name: str, call: partial[Any]) -> JsonValue:
        """Run a step's function. What it raises is raised in the form that a replay would raise."""
        token = _inside.set(name)
        try:
            with inner_span(f"step {name}", {_STEP: name}):
                value: JsonValue = to_json_value(await self._await(call), WIDE_LIMITS)
        except Exception as error:
            shown = shown_failure(error, name)
            if isinstance(shown, StepFailedError) and shown is not error:
                extra = {"correlation_id": shown.correlation_id, "step": name}
                _logger.exception("step %s failed", name, extra=extra)
            if shown is error:
                raise
            raise shown from error
        finally:
            _inside.reset(token)
        return value

    async def _await(self, call: partial[Any]) -> Any:
        if inspect.iscoroutinefunction(call.func):
            return await call()
        value = await self._in_thread(call)
        return await value if inspect.isawaitable(value) else value

    def _keep(self, name: str, value: JsonValue, compensate: Callable[[Any], Any] | None) -> JsonValue:
        if compensate is not None:
            # A copy: what the handler does to the value must not change what is undone.
            self._done[name] = _Done(to_json_value(value, WIDE_LIMITS), compensate)
        return value

    async def _record(self, name: str, call: partial[Any], ledger: Ledger) -> JsonValue:
        try:
            value = await self._perform(name, call)
        except AgentWeaveError as error:
            self._failed.add(name)
            record = failure_record(error)
            if may_be_retried(error):
                self._passed_over[name] = record
            else:
                await ledger.save(name, record)
            raise
        record = await ledger.save(name, StepRecord(value))
        return record.value

    async def _write_passed_over(self, ledger: Ledger) -> None:
        """Record failures after which the handler went on: the next attempt has to take the same way."""
        while self._passed_over:
            await ledger.save(*self._passed_over.popitem())

    # --- replaying ----------------------------------------------------------------------------------

    async def _replay(
        self, name: str, record: StepRecord, compensate: Callable[[Any], Any] | None, halt: Halt
    ) -> JsonValue:
        note("step recorded earlier", {_STEP: name})
        if record.error is not None:
            self._failed.add(name)
            raise told_again(record, name)
        self._keep(name, record.value, compensate)
        if self.verdict is not None:
            self._owed.discard(name)
            if not self._owed:
                await halt.stop()
        return record.value

    async def _look(self, saga: Saga) -> None:
        """Find out whether the task failed for good in an earlier attempt."""
        verdict = await saga.verdict()
        if verdict is not None:
            await self._begin_replay(saga, verdict)
        self._looked = True

    async def _begin_replay(self, saga: Saga, verdict: Verdict) -> None:
        owed = {name for name in await self._recorded(saga) if not await saga.is_undone(name)}
        if self.verdict is None:  # steps that run side by side look side by side, too
            self._owed, self.verdict = owed, verdict

    async def _end_of_replay(self, halt: Halt) -> None:
        """Stop at a step that was not recorded; first let steps that run beside it be found."""
        if self._owed:
            with move_on_after(_OTHERS_SECONDS):
                await sleep_forever()
        await halt.stop()

    # --- undoing ------------------------------------------------------------------------------------

    async def condemn(self, verdict: Verdict) -> bool:
        """Let the task fail for good before its handler runs; return whether to run it, as a replay.

        Where nothing is to be undone nothing is written, and the handler must not run.
        """
        saga = self._saga
        if saga is None or not await self._recorded(saga):
            return False
        await self._begin_replay(saga, await saga.settle(verdict))
        self._looked = True
        return await saga.begin_pass(MOST_PASSES) <= MOST_PASSES and bool(self._owed)

    async def run_compensations(self, verdict: Verdict) -> Undone:
        """Undo what was recorded, last first. ``verdict`` is the task's, unless one stands already.

        A compensation that fails is tried again in another pass, and so are those before it; in the last
        pass the others run all the same, and the result names what was not undone. Without a ledger there
        is one pass.
        """
        self.close()
        if self._saga is None:
            return await self._undo_from_memory(verdict)
        names = await self._recorded(self._saga)
        for name in set(self._saga.announced).difference(names, self._failed):
            _logger.warning("step %s began and has no result: what it did, if anything, is not undone", name)
        if not names:
            return _undone(verdict, {})
        verdict = self.verdict or await self._saga.settle(verdict)
        return await self._pass_through(self._saga, names, verdict)

    async def _undo_from_memory(self, verdict: Verdict) -> Undone:
        left: dict[str, _Trouble] = {}
        for name in reversed(self._done):
            trouble = await self._undo(name)
            if trouble:
                left[name] = trouble
        return _undone(verdict, left)

    async def _recorded(self, saga: Saga) -> list[str]:
        """Return the completed steps that have a compensation, last first."""
        await saga.recall()
        return [name for name in reversed(saga.announced) if await self._is_recorded(saga, name)]

    async def _is_recorded(self, saga: Saga, name: str) -> bool:
        return name in self._done or await saga.value_of(name) is not None

    async def _pass_through(self, saga: Saga, names: list[str], verdict: Verdict) -> Undone:
        number = await saga.begin_pass(MOST_PASSES)
        left: dict[str, _Trouble] = {}
        for name in names:
            if await saga.is_undone(name):
                continue
            trouble = await self._undo(name) if number <= MOST_PASSES else _given_up(name)
            if trouble is None:
                await saga.undone(name)
                continue
            left[name] = trouble
            if number < MOST_PASSES:
                return replace(_undone(verdict, left), unfinished=True, retry_after=trouble.again.after)
        return _undone(verdict, left)

    async def _undo(self, name: str) -> _Trouble | None:
        done = self._done.get(name)
        if done is None:
            number = correlation_id()
            extra = {"correlation_id": number, "step": name}
            _logger.error("step %s was not reached again, so it can't be undone", name, extra=extra)
            return _Trouble(number, Again())
        token = _inside.set(f"undo:{name}")
        try:
            with inner_span(f"undo {name}", {_STEP: name}), fail_after(self._timeout):
                await self._await(partial(done.compensate, done.value))
        except (asyncio.CancelledError, *NO_FAILURE):
            raise
        except BaseException as error:
            number = correlation_id(error)
            extra = {"correlation_id": number, "step": name}
            _logger.exception("the compensation of step %s failed", name, extra=extra)
            return _Trouble(number, may_be_retried(error) or Again())
        finally:
            _inside.reset(token)
        return None


def _given_up(name: str) -> _Trouble:
    number = correlation_id()
    extra = {"correlation_id": number, "step": name}
    _logger.error("step %s is not undone: %d passes did not get there", name, MOST_PASSES, extra=extra)
    return _Trouble(number, Again())


def _undone(verdict: Verdict, left: Mapping[str, _Trouble]) -> Undone:
    """Return the task's result, with what is not undone said in its error."""
    if not left:
        return Undone(verdict.result, correlation_id=verdict.correlation_id, exhausted=verdict.exhausted)
    said = "; ".join(
        f"the compensation of step {name!r} failed, correlation id {trouble.correlation_id}"
        for name, trouble in left.items()
    )
    error = verdict.result.error or failed("failed").error
    number = next(iter(left.values())).correlation_id
    return Undone(
        replace(verdict.result, error=f"{error}; {said}"),
        correlation_id=verdict.correlation_id or number,
        exhausted=verdict.exhausted,
        not_undone=True,
    )
