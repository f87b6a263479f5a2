"""Serving an agent: the gate in front of its capabilities, its context, its signals, its readiness.

The order of starting: connect; run ``on_start``; say ready. Calls that arrive before that wait. The order
of stopping: take no new calls; let those in flight finish, for ``bus.drain_timeout`` at most; run
``on_stop``; disconnect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import anyio
from prometheus_client import generate_latest

from agentweave_bus.agent import (
    BoundCapability,
    RequestContext,
    SecureAgent,
    ValidatedCall,
    bind_context,
)
from agentweave_bus.bus.admission import Admitted
from agentweave_bus.bus.reception import tell_outcome
from agentweave_bus.bus.responder import Responder
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.client import Parent, TaskOptions
from agentweave_bus.envelope import Head, Kind, Requester, VerifiedLink, requester
from agentweave_bus.identity import IdentitySnapshot, X509Svid
from agentweave_bus.observability.conventions import handler_attributes
from agentweave_bus.observability.logs import log_context
from agentweave_bus.observability.metrics import Direction, Metrics
from agentweave_bus.observability.spans import Span, handed_on, inner_span, traceparent
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.runtime import lifecycle
from agentweave_bus.runtime.beating import report
from agentweave_bus.runtime.event_service import EventService
from agentweave_bus.runtime.gates import gates
from agentweave_bus.runtime.loop_lag import LoopLag
from agentweave_bus.runtime.readiness import Readiness, Serving, serving_parts
from agentweave_bus.runtime.surroundings import REAL, Surroundings
from agentweave_bus.runtime.task_service import Steps, TaskService, Telling
from agentweave_bus.runtime.wiring import Connected, connected
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.attempt import Attempted, TaskRun
from agentweave_bus.tasks.event_performer import EventRun
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.tasks.publishing import PublishedEvent
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.types import TaskResult

__all__ = ["Runner"]

_log = logging.getLogger(__name__)

_ON_STOP_SECONDS: Final = 10.0
_KIND_TOLD: Final = {kind: (Kind.TASK if kind is Kind.REISSUE else kind).value for kind in Kind}
"""What a handler is told of a request's kind: what the control role reissues is a task."""


class _ConnectedAgent:
    """What a running agent calls through; see ``agent.AgentRuntime``."""

    def __init__(self, parts: Connected) -> None:
        self._parts = parts

    @property
    def spiffe_id(self) -> SpiffeID:
        return self._parts.me

    async def call(
        self,
        target: str,
        capability: str,
        payload: Any,
        *,
        timeout: float,  # noqa: ASYNC109 - it travels in the envelope, too
        context: RequestContext | None,
        principal: Mapping[str, Any] | None,
        scope: Sequence[str] | None,
    ) -> TaskResult:
        return await self._parts.client.call(
            target,
            capability,
            payload,
            timeout=timeout,
            parent=_parent(context),
            principal=principal,
            scope=scope,
            trace=_position(context),
        )

    async def submit(
        self,
        target: str,
        capability: str,
        payload: Any,
        *,
        context: RequestContext | None,
        idempotency_key: str | None,
        deadline: float | None,
        delay: float | None,
        at: datetime | None,
        every: str | None,
        priority: int | None,
        retry: Retry | None,
        principal: Mapping[str, Any] | None,
        scope: Sequence[str] | None,
    ) -> TaskHandle:
        options = TaskOptions(
            idempotency_key=idempotency_key,
            deadline=deadline,
            delay=delay,
            at=at,
            every=every,
            priority=priority,
            retry=None if retry is None else retry.to_map(),
            timeout=self._parts.config.bus.call_timeout,
            parent=_parent(context),
            principal=principal,
            scope=scope,
        )
        submitted = await self._parts.client.submit(target, capability, payload, options)
        return self._parts.handles.of(*submitted)

    async def publish(
        self,
        name: str,
        data: Any,
        *,
        key: str | None,
        deadline: float,
        context: RequestContext | None,
    ) -> PublishedEvent:
        return await self._parts.publisher.publish(
            name,
            data,
            key=key,
            deadline=deadline,
            timeout=self._parts.config.bus.call_timeout,
            parent=_parent(context),
            trace=_position(context),
        )


def _parent(context: RequestContext | None) -> Parent | None:
    """Say what a nested call carries: the chain that led here, and the request itself as its last link.

    There is none outside of a request, nor in a compensation whose request has no time left: who undoes
    something then acts for itself.
    """
    if context is None or not context.links:
        return None
    served = context.links[-1]
    head = served.head
    reissued = head.kind is Kind.REISSUE
    origin = context.links[-2] if reissued else served
    link = VerifiedLink(
        iss=origin.head.iss,
        aud=head.aud,
        cap=head.cap,
        kind=origin.head.kind,
        id=head.id,
        iat=head.iat,
        exp=head.exp,
        digest=origin.digest,
        scope=head.scope,
        principal=None,
        sender_expired=False,
        reissued_by=head.iss if reissued else None,
    )
    return Parent(
        links=context.links,
        via=tuple(one.to_context() for one in (*context.via, link)),
        deadline_ms=head.exp,
        principal=context.principal,
        scope=head.scope,
        trace=_position(context),
    )


def _position(context: RequestContext | None) -> str | None:
    """Return where in the trace something is sent: in a step of a handler, not beside it."""
    return traceparent() or (None if context is None else context.trace)


class Runner:
    """Serves an agent: connects it, answers its calls, and takes it down in order when told to stop.

    The order of stopping: no new calls; those in flight finish, for ``bus.drain_timeout`` at most;
    ``on_stop``, for 10 s at most; disconnect. While it serves, the process's log is the configured one,
    unless the program has configured logging itself. ``on_started`` is called once, before it is said that
    calls are taken.
    """

    def __init__(
        self, surroundings: Surroundings = REAL, *, on_started: Callable[[], None] = lambda: None
    ) -> None:
        self._surroundings = surroundings
        self._on_started = on_started

    async def run(self, agent: SecureAgent) -> None:
        """Serve ``agent`` until cancelled, or until SIGINT or SIGTERM. Errors as of :func:`connected`."""
        with lifecycle.logging_of(agent.config.observability.logging):
            for warning in agent.config.warnings:
                _log.warning("%s", warning)
            served = _Served(agent, self._on_started)
            async with connected(
                agent.config,
                identity_provider=agent.identity_provider,
                authz_provider=agent.authz_provider,
                serve=served.wire,
                surroundings=self._surroundings,
            ) as parts:
                await served.until_stopped(parts)


class _Served:
    """One agent while it is served."""

    def __init__(self, agent: SecureAgent, on_started: Callable[[], None]) -> None:
        self._agent = agent
        self._on_started = on_started
        self._responder: Responder | None = None
        self._tasks: TaskService | None = None
        self._events: EventService | None = None
        self._parts: Connected | None = None
        self._started = anyio.Event()
        self._metrics = Metrics.create()  # until wire() says which
        self._tracing = Tracing.off()
        self._surroundings = REAL

    def wire(self, parts: Connected) -> None:
        """Put the gate and the responder in front of the agent's capabilities."""
        table = self._agent.capability_table
        for name in table:
            parts.metrics.declare_capability(Direction.INBOUND, name)
        admission, events, self._responder, claims = gates(parts, table, self._dispatch)
        self._tasks = TaskService(parts, admission, table, self._dispatch_task)
        self._events = EventService(parts, events, self._agent.event_handlers, self._dispatch_event)
        parts.keeper.on_session(claims.on_session)
        parts.keeper.on_session(self._responder.on_session)
        self._parts, self._metrics, self._tracing = parts, parts.metrics, parts.tracing
        self._surroundings = parts.surroundings

    async def until_stopped(self, parts: Connected) -> None:
        """Serve until a signal or cancellation, then take down in order."""
        assert self._responder is not None
        assert self._tasks is not None
        assert self._events is not None
        lag = LoopLag(parts.surroundings.monotonic_s)
        async with self._responder.running(), owned_tasks() as group:
            signals = parts.surroundings.stop_signals or lifecycle.stop_signals
            with signals() as stop_signal, self._health_listener(parts, lag) as metrics_url:
                await self._agent.begin_serving(_ConnectedAgent(parts))
                try:
                    self._on_started()
                    self._started.set()
                    group.start_soon(self._announce_rotations, parts)
                    group.start_soon(lag.run)
                    async with self._tasks.running(), self._events.running():
                        pipe = lifecycle.say_ready(parts.me, metrics_url)
                        exposed = metrics_url is not None
                        group.start_soon(partial(report, pipe, parts, self._tasks, exposed=exposed))
                        await stop_signal()
                        await parts.keeper.drain(parts.config.bus.drain_timeout, self._drain)
                        if exposed:
                            pipe.counted(generate_latest(parts.metrics.registry))
                finally:
                    group.cancel_scope.cancel()
                    with anyio.move_on_after(_ON_STOP_SECONDS, shield=True):
                        await self._agent.end_serving()

    def _health_listener(self, parts: Connected, lag: LoopLag) -> AbstractContextManager[str | None]:
        assert self._responder is not None
        assert self._tasks is not None
        assert self._events is not None

        def details() -> Mapping[str, Any]:
            return {"policy_revision": parts.authorizer.revision}

        serving = Serving(self._responder.subjects, self._tasks, self._events, lag, self._started.is_set)
        checks = serving_parts(parts, serving)
        parts.metrics.event_loop_lag.set_function(lambda: lag.seconds)
        settings = parts.config.observability.metrics
        return lifecycle.health_listener(settings, parts.metrics, parts.me, Readiness(checks, details))

    async def _drain(self) -> None:
        """Take no more tasks and events, and return when what runs has ended."""
        assert self._tasks is not None
        assert self._events is not None
        async with owned_tasks() as group:
            group.start_soon(self._tasks.drain)
            group.start_soon(self._events.drain)

    async def _dispatch(self, admitted: Admitted) -> dict[str, Any]:
        """Run an admitted request in its context. Calls that come early wait until the agent has started."""
        if not self._started.is_set():
            await self._started.wait()
        head = admitted.request.head
        asks = requester(admitted.request, admitted.via)
        began = time.perf_counter()
        assert isinstance(admitted.capability, BoundCapability)
        assert isinstance(admitted.payload, ValidatedCall)
        bound = admitted.capability
        with self._span(head, bound) as span, log_context(task=head.id, caller=str(asks.iss)):
            # What the handler calls belongs below this span, not beside it.
            with bind_context(self._context(admitted, asks, span.traceparent)):
                result = await bound.invoke(admitted.payload)
            tell_outcome(span, failed=result.status == "failed")
        self._metrics.handler_ended(head.cap, time.perf_counter() - began)
        return result.to_json()

    async def _dispatch_task(self, run: TaskRun) -> Attempted:
        """Run one attempt at a task in its context, or undo what earlier ones did."""
        admitted, asks, head = run.admitted, run.opened.asks, run.admitted.request.head
        parts, bound, call = self._parts, admitted.capability, admitted.payload
        assert parts is not None
        assert isinstance(bound, BoundCapability)
        assert isinstance(call, ValidatedCall)
        began = time.perf_counter()
        store, telling, epoch = Steps(parts, run), Telling(parts.desk, run), run.record.epoch
        with (
            self._span(head, bound, attempt=epoch) as span,
            log_context(task=head.id, caller=str(asks.iss)),
        ):
            context = self._context(admitted, asks, span.traceparent, epoch)
            try:
                with bind_context(context):
                    if run.give_up is None:
                        attempt = await bound.attempt(
                            call,
                            last_attempt=run.last,
                            store=store,
                            sink=telling,
                            seconds=parts.config.bus.task_timeout,
                        )
                    else:
                        result = TaskResult(status="failed", error=run.give_up)
                        # So began what is out of attempts or of time; what is cancelled was to run.
                        exhausted = run.record.body.undoes is True
                        attempt = await bound.give_up(call, result, store=store, exhausted=exhausted)
            finally:
                await telling.finish()
            tell_outcome(span, failed=attempt.result.status == "failed", retry=attempt.retry)
        self._metrics.handler_ended(head.cap, time.perf_counter() - began)
        return Attempted(
            attempt.result.to_json(),
            attempt.retry,
            attempt.retry_after,
            attempt.correlation_id,
            attempt.exhausted,
            telling.mark(),
            attempt.undoing,
            attempt.not_undone,
        )

    async def _dispatch_event(self, run: EventRun) -> Attempted:
        """Run one attempt at an event in its context."""
        admitted, asks, head = run.admitted, run.opened.asks, run.admitted.request.head
        parts, bound, call = self._parts, admitted.capability, admitted.payload
        assert parts is not None
        assert isinstance(bound, BoundCapability)
        assert isinstance(call, ValidatedCall)
        began = time.perf_counter()
        with (
            self._span(head, bound, attempt=run.attempt) as span,
            log_context(task=head.id, caller=str(asks.iss)),
        ):
            context = self._context(admitted, asks, span.traceparent)
            context = replace(context, attempt=run.attempt, event=head.cap, key=head.idk)
            with bind_context(context):
                attempt = await bound.attempt(
                    call, last_attempt=run.last, seconds=parts.config.bus.task_timeout
                )
            tell_outcome(span, failed=attempt.result.status == "failed", retry=attempt.retry)
        self._metrics.handler_ended(bound.name, time.perf_counter() - began)
        return Attempted(attempt.result.to_json(), attempt.retry, attempt.retry_after, attempt.correlation_id)

    def _context(
        self, admitted: Admitted, asks: Requester, trace: str | None, attempt: int = 1
    ) -> RequestContext:
        head = admitted.request.head
        return RequestContext(
            caller_spiffe_id=str(asks.iss),
            request_time=datetime.fromtimestamp(head.iat / 1000, UTC),
            task_id=head.id,
            deadline_ms=head.exp,
            kind=_KIND_TOLD[head.kind],
            transport="bus",
            via=asks.via,
            principal=asks.principal,
            links=admitted.links,
            trace=trace,
            attempt=attempt,
            time_ns=self._surroundings.time_ns,
            monotonic_ns=self._surroundings.monotonic_ns,
        )

    def _span(
        self, head: Head, bound: BoundCapability, *, attempt: int | None = None
    ) -> AbstractContextManager[Span]:
        """Open the span of a handler; it is one of this agent's, so few names occur."""
        if not self._tracing.enabled:
            return handed_on(head.trace)
        return inner_span(f"handle {bound.name}", handler_attributes(bound.source, head.id, attempt))

    async def _announce_rotations(self, parts: Connected) -> None:
        newest: asyncio.Queue[X509Svid] = asyncio.Queue(maxsize=1)
        announced = parts.source.svid

        def changed(snapshot: IdentitySnapshot) -> None:
            nonlocal announced
            if snapshot.svid == announced:
                return  # it was a bundle that changed
            announced = snapshot.svid
            if newest.full():
                newest.get_nowait()
            newest.put_nowait(snapshot.svid)

        unsubscribe = parts.source.subscribe(changed)
        try:
            while True:
                await self._agent.announce_svid(await newest.get())
        finally:
            unsubscribe()
