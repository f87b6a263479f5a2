"""One attempt at a task: its handler runs, and what comes out is a result, another attempt, or undoing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from agentweave_bus.agent.context import RequestContext, bind_context, current_context
from agentweave_bus.agent.failures import (
    NO_FAILURE,
    being_cancelled,
    broken,
    correlation_id,
    failed,
    may_be_retried,
    words_of,
)
from agentweave_bus.agent.records import StepStore
from agentweave_bus.agent.saga import Halt, Ledger, Verdict
from agentweave_bus.agent.work import Deadline, ProgressSink, Work
from agentweave_bus.exceptions import RetryableError, StepFailedError, TaskFailedError
from agentweave_bus.types import ResultStatus, TaskResult

__all__ = ["Attempt", "Performance"]


class Attempt(NamedTuple):
    """How one attempt at a task ended.

    ``retry`` says that the task is to be tried again, not before ``retry_after`` seconds where that is
    given; ``result`` is its outcome if that does not happen. ``correlation_id`` is under which the log has
    the failure, if it has it. ``exhausted`` says that it would be tried again if there were attempts left
    (however many passes it took to undo it), ``undoing`` that the task has failed, and what is to be tried
    again is to undo it, ``not_undone`` that something is left of what it did.
    """

    result: TaskResult
    retry: bool = False
    retry_after: float | None = None
    correlation_id: str | None = None
    exhausted: bool = False
    undoing: bool = False
    not_undone: bool = False


class Performance(NamedTuple):
    """A capability's handler with its arguments, to be run as a task.

    ``timeout`` is the seconds that an attempt may go without progress. The current request's context is
    that of the task.
    """

    name: str
    timeout: float | None
    logger: logging.Logger
    handler: Callable[[], Awaitable[TaskResult]]
    store: StepStore | None
    sink: ProgressSink | None = None

    async def attempt(self, *, last_attempt: bool) -> Attempt:
        """Run the handler; see ``BoundCapability.attempt``."""
        context = current_context()
        if context.remaining() <= 0:
            too_late = self._too_late(0.0, again=False)
            return await self.give_up(Verdict(too_late.result, too_late.correlation_id))
        work = self._begin(context, fresh=context.attempt == 1)
        ended = await self._run(context, work)
        verdict = work.steps.verdict
        if verdict is None:
            if ended.result.status is not ResultStatus.FAILED or (ended.retry and not last_attempt):
                return ended
            verdict = Verdict(ended.result, ended.correlation_id, exhausted=ended.retry)
        return await self._undo(context, work, verdict)

    async def give_up(self, verdict: Verdict) -> Attempt:
        """Let the task fail without an attempt; see ``BoundCapability.give_up``."""
        context = current_context().for_undoing()
        work = self._begin(context, fresh=False)
        with bind_context(context):
            if await work.steps.condemn(verdict):
                await self._run(context, work)
        return await self._undo(context, work, verdict)

    def _begin(self, context: RequestContext, *, fresh: bool) -> Work:
        ledger = None if self.store is None else Ledger(self.store, Halt(), fresh=fresh)
        work = Work.of_attempt(context.caller_spiffe_id, ledger, self.timeout, self.sink)
        return context.own_work(work)

    async def _run(self, context: RequestContext, work: Work) -> Attempt:
        """Run the handler until it ends, its time is over, or its steps halt it."""
        assert work.halt is not None
        ended, limit = None, work.halt.scope
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            with limit:
                deadline = work.deadline = Deadline(limit, self.timeout, began + context.remaining())
                ended = await self._ended()
        finally:
            work.steps.close()
        if work.halt.fault is not None:
            raise work.halt.fault
        if work.steps.verdict is not None:
            return Attempt(work.steps.verdict.result)  # whatever the handler did: it only replayed its steps
        if ended is not None and not (limit.cancel_called and ended.result.status is ResultStatus.FAILED):
            return ended
        # The loop's clock may be some milliseconds behind the one by which the context counts.
        again = not deadline.is_last and context.remaining() > 0
        return self._too_late(loop.time() - began, again=again)

    async def _ended(self) -> Attempt:
        try:
            return Attempt(await self.handler())
        except TaskFailedError as error:
            return Attempt(failed(words_of(error)))
        except asyncio.CancelledError as error:
            if being_cancelled():
                raise
            return self._broken(error)  # the handler awaited something that was cancelled
        except NO_FAILURE:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the handler's; logged below
            return self._broken(error)

    def _broken(self, error: BaseException) -> Attempt:
        again = may_be_retried(error)
        if isinstance(error, RetryableError):
            return Attempt(failed(words_of(error)), retry=True, retry_after=error.retry_after)
        number = correlation_id(error)
        traced = None if isinstance(error, StepFailedError) else error  # the step's run has logged it
        self.logger.error("capability %s failed", self.name, exc_info=traced, extra=self._extra(number))
        return Attempt(broken(number), again is not None, again.after if again else None, number)

    def _too_late(self, seconds: float, *, again: bool) -> Attempt:
        number = correlation_id()
        message = "capability %s had not ended after %.3f s"
        self.logger.warning(message, self.name, seconds, extra=self._extra(number))
        result = failed(f"deadline exceeded; correlation id {number}")
        return Attempt(result, retry=again, correlation_id=number)

    def _extra(self, number: str) -> dict[str, object]:
        context = current_context()
        return {
            "correlation_id": number,
            "capability": self.name,
            "caller": context.caller_spiffe_id,
            "task_id": context.task_id,
            "attempt": context.attempt,
        }

    async def _undo(self, context: RequestContext, work: Work, verdict: Verdict) -> Attempt:
        with bind_context(context.for_undoing()):
            undone = await work.steps.run_compensations(verdict)
        return Attempt(
            undone.result,
            undone.unfinished,
            undone.retry_after,
            undone.correlation_id,
            undone.exhausted,
            undoing=undone.unfinished,
            not_undone=undone.not_undone,
        )
