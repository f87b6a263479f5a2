"""Calling agents: what happens on the caller's side, in this order.

1. The target and the payload are checked; nothing has been said to anyone yet.
2. The outbound policy is asked. A denial ends it here, audited, without touching the network.
3. The circuit breaker of the callee lets it pass, or not.
4. A transport carries the sealed request and brings the verified answer. The record of the decision
   names the digest of each sealed attempt before it leaves.

A task that is submitted takes the same steps, but the third: whether the agent is well does not matter to a
queue. It is accepted when the broker has stored it, and what becomes of it is asked of its handle.

A call made while another one is served passes that one as ``parent``. Its ``via`` then proves on whose
behalf the call is made, and it gets no more time than its parent has left.

Identity, policy and transport come from outside; ``runtime/wiring.py`` puts them together.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any, Final, NamedTuple, Protocol

from agentweave_bus.authz import AuditLog, Authorizer, AuthzContext, AuthzDecision, Grants
from agentweave_bus.authz.circuit_breaker import BreakerSettings, CircuitBreaker, Permit
from agentweave_bus.authz.repeats import Repeats
from agentweave_bus.bus.blobs import Blobs
from agentweave_bus.bus.outbound import (
    as_call_error,
    as_call_errors,
    attempt_notes,
    check_arguments,
    noting_attempts,
    outbound_denial,
)
from agentweave_bus.bus.records import decision_facts, sealed_facts
from agentweave_bus.bus.requests import Answer, Request
from agentweave_bus.bus.subjects import call_subject, check_capability
from agentweave_bus.envelope import (
    DEFAULT_LIMITS,
    JSON_CONTENT_TYPE,
    Head,
    Limits,
    Link,
    Sealed,
    convert_payload,
    new_id,
)
from agentweave_bus.envelope.blob import (
    BLOB_CONTENT_TYPE,
    DEFAULT_MAX_BLOB_BYTES,
    WIDE_LIMITS,
    blob_limits,
    blob_summary,
)
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    CircuitOpenError,
    ConnectionLostError,
    FederationError,
    NoResponderError,
    PayloadError,
    UnreachableError,
)
from agentweave_bus.observability.conventions import call_attributes, describe_sending
from agentweave_bus.observability.metrics import Direction, Metrics, RequestStatus
from agentweave_bus.observability.spans import Span, handed_on
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.schedule import Schedule
from agentweave_bus.tasks.submission import Submission, Submissions, id_of_key
from agentweave_bus.tasks.task_times import task_times
from agentweave_bus.types import JsonValue, TaskResult

__all__ = ["CalleeBreakers", "Client", "Parent", "Submitted", "TaskOptions", "Transport", "reach_of"]

_MAX_SCOPE: Final = 64
_MOST_LINKS_PARKED: Final = DEFAULT_LIMITS.max_via_links - 2
"""A parked task is itself a link when it is brought back, and so is what brings it back."""

_MAX_BREAKERS: Final = 1024


@dataclass(frozen=True, slots=True)
class Parent:
    """The request that is being served while another call is made.

    ``links`` prove it, ``via`` is how a policy sees it (origin first, the request itself last),
    ``deadline_ms`` is when it expires, in milliseconds since the epoch.
    """

    links: tuple[Link, ...]
    via: tuple[Mapping[str, Any], ...]
    deadline_ms: int
    principal: Mapping[str, str] | None = None
    scope: tuple[str, ...] | None = None
    trace: str | None = None


class CallOptions(NamedTuple):
    """What may be said about a call beside what is called; see :meth:`Client.call`."""

    timeout: float = 30.0
    parent: Parent | None = None
    principal: Mapping[str, str] | None = None
    scope: Sequence[str] | None = None
    safe: bool = False
    action: str | None = None
    watching: bool = False


class Transport(Protocol):
    """Carries an allowed request to its callee and brings the verified answer."""

    async def call(self, request: Request) -> Answer:
        """Make the call. Raises :class:`AgentCallError`."""


class Submitted(NamedTuple):
    """A task that was stored: which one, the digests of its head and payload, and until when it may begin.

    ``schedule`` is when it is due, of one that is parked.
    """

    ref: TaskRef
    digest: bytes
    pd: bytes
    expires_ms: int
    schedule: Schedule | None = None


class CalleeBreakers:
    """A circuit breaker for each agent called lately, at most 1,024 of them."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._breakers: OrderedDict[SpiffeID, CircuitBreaker] = OrderedDict()

    def of(self, callee: SpiffeID) -> CircuitBreaker:
        """Return the breaker of ``callee``; a new one is closed."""
        breaker = self._breakers.pop(callee, None) or CircuitBreaker(self._settings)
        self._breakers[callee] = breaker
        if len(self._breakers) > _MAX_BREAKERS:
            self._breakers.popitem(last=False)
        return breaker


class TaskOptions(NamedTuple):
    """What may be said about a task beside what is asked for; see :meth:`Client.submit`."""

    idempotency_key: str | None = None
    deadline: float | None = None
    delay: float | None = None
    at: datetime | None = None
    every: str | None = None
    priority: int | None = None
    retry: Mapping[str, int] | None = None
    timeout: float = 30.0
    parent: Parent | None = None
    principal: Mapping[str, str] | None = None
    scope: Sequence[str] | None = None


class _Allowed(NamedTuple):
    """A task that the own policy allows: the how many-th of those asked about, and why."""

    number: int
    task: Submission
    facts: AuthzContext
    decision: AuthzDecision


@dataclass(slots=True)
class Client:
    """Calls agents as one identity. Made by ``runtime/wiring.py``; people use ``AgentWeaveClient``."""

    me: SpiffeID
    authorizer: Authorizer
    audit: AuditLog
    transport: Transport
    breakers: CalleeBreakers
    allowed_trust_domains: Callable[[], frozenset[str]]
    metrics: Metrics
    clock_ms: Callable[[], int]
    max_timeout: float = 300.0
    monotonic_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000
    """What breakers measure by, in milliseconds: a wall clock that is set must not open or close one."""
    tracing: Tracing = field(default_factory=Tracing.off)
    submissions: Submissions | None = None
    blobs: Blobs | None = None
    repeats: Repeats = field(default_factory=Repeats)

    async def call(
        self,
        target: str,
        capability: str,
        payload: Any = None,
        *,
        timeout: float = 30.0,  # noqa: ASYNC109 - it travels in the envelope, too
        parent: Parent | None = None,
        principal: Mapping[str, str] | None = None,
        scope: Sequence[str] | None = None,
        safe: bool = False,
        action: str | None = None,
        watching: bool = False,
        trace: str | None = None,
    ) -> TaskResult:
        """Ask ``target`` for ``capability`` and return its result.

        ``timeout`` is in seconds, for everything. ``principal`` names for whom this caller says that it
        acts; only the origin of a delegation may, and its callee's policy must let it. ``scope`` limits
        what the call and all that follows from it may reach. ``safe`` says that the capability may run
        twice without harm, so that a call is made again when its answer is missing. ``action`` is what
        policies decide on where that is not the capability: an operator's act. ``watching`` says that it is
        made again and again, so that the audit log has it once a minute (:mod:`.authz.repeats`).

        A remote failure is a result with ``status == "failed"``; anything else raises.

        Raises:
            AgentCallError: one of its branches says what went wrong.

        """
        options = CallOptions(timeout, parent, principal, scope, safe, action, watching)
        began = time.perf_counter()
        status = RequestStatus.ERROR
        in_flight = self.metrics.in_flight(Direction.OUTBOUND)
        in_flight.inc()
        try:
            result = await self._traced(target, capability, payload, options, trace)
            status = RequestStatus.ERROR if result.status == "failed" else RequestStatus.SUCCESS
        except AuthorizationError:
            status = RequestStatus.DENIED
            raise
        except CallRefusedError:
            status = RequestStatus.REFUSED
            raise
        finally:
            in_flight.dec()
            seconds = time.perf_counter() - began
            self.metrics.request_ended(Direction.OUTBOUND, capability, status, seconds)
        return result

    async def _traced(
        self, target: str, capability: str, payload: Any, options: CallOptions, trace: str | None
    ) -> TaskResult:
        """Make the call inside a span, whose position the request carries.

        The name and the attributes are set only once the request is known to be well formed, and the method
        is named only if a grant names it: a caller's mistakes must not become names in somebody's tracing
        system.
        """
        position = trace or (options.parent.trace if options.parent else None)
        with self.tracing.span("call", kind="client", parent=position) as span:
            request, facts = self._prepare(target, capability, payload, options, span.traceparent)
            if span.recorder is not None:
                self._describe(span, str(request.callee), capability)
            result = await self._carry(request, facts, watching=options.watching)
            if result.status == "failed":
                span.set_error("failed")
            return result

    def _describe(self, span: Span, callee: str, capability: str) -> None:
        declared = self.metrics.declares(Direction.OUTBOUND, capability)
        attributes = call_attributes(callee, capability if declared else None)
        span.rename(str(attributes["rpc.method"]))
        for name, value in attributes.items():
            span.set_attribute(name, value)

    def _prepare(
        self, target: str, capability: str, payload: Any, options: CallOptions, trace: str | None
    ) -> tuple[Request, AuthzContext]:
        """Step 1: everything that can be wrong before anyone is asked."""
        parent, principal = options.parent, options.principal
        _check_principal(parent, principal)
        try:
            callee, value, data = self._checked(target, capability, payload)
        except CallRefusedError as refused:
            raise _with_a_way_out(refused, payload) from refused.__cause__
        request = Request(
            callee=callee,
            capability=capability,
            payload=data,
            deadline_ms=self._deadline_ms(options.timeout, parent),
            via=parent.links if parent else (),
            scope=self._scope(callee, capability, parent, principal, options.scope),
            principal=dict(principal) if principal else None,
            safe=options.safe,
            trace=trace,
        )
        facts = self._facts(request, callee, value, parent)
        return request, facts if options.action is None else replace(facts, action=options.action)

    async def submit(
        self, target: str, capability: str, payload: Any, options: TaskOptions, *, trace: str | None = None
    ) -> Submitted:
        """Have a task stored for ``target`` and return what names it. It is accepted when this returns.

        ``options.deadline`` is in seconds from when it is due: it is not begun later. ``options.timeout``
        (seconds) is for the storing alone. With ``delay`` (seconds) or ``at`` (a time with its zone) it is
        due then and not now; ``every`` lets it come again (:mod:`.tasks.recurrence`), until the deadline.
        Tasks with one ``idempotency_key`` are one task, whose outcome all of them have; with another payload
        it is an error, which the handle tells. ``retry`` may ask for fewer attempts and longer waits than the
        capability declares.

        Raises:
            AgentCallError: it was not stored (with ``CallTimeoutError``: perhaps not); one of its branches
                says why.

        """
        parent = options.parent
        position = trace or (parent.trace if parent else None)
        with self.tracing.span("submit", kind="producer", parent=position) as span:
            task, facts = self._prepare_task(target, capability, payload, options, span.traceparent)
            if span.recorder is not None:
                declared = self.metrics.declares(Direction.OUTBOUND, capability)
                size = len(task.payload)
                describe_sending(span, "submit", task.place[0], task.id, size, named=declared)
            (outcome,) = await self._submitted([(task, facts)], options.timeout)
            if isinstance(outcome, AgentCallError):
                raise outcome
            return outcome

    async def submit_all(
        self, target: str, capability: str, payloads: Sequence[tuple[Any, str | None]], options: TaskOptions
    ) -> list[Submitted | Exception]:
        """Have a task stored for each payload, beside which stands its idempotency key, all at once.

        Returns for each what :meth:`submit` would return or raise.
        """
        if self.tracing.enabled:  # each has a span, and they lie beside each other
            alone = [
                self.submit(target, capability, payload, _with_key(options, key)) for payload, key in payloads
            ]
            return [_outcome(one) for one in await asyncio.gather(*alone, return_exceptions=True)]
        outcomes: list[Submitted | Exception | None] = [None] * len(payloads)
        prepared: dict[int, tuple[Submission, AuthzContext]] = {}
        with handed_on(options.parent.trace if options.parent else None) as position:
            for number, (payload, key) in enumerate(payloads):
                try:
                    prepared[number] = self._prepare_task(
                        target, capability, payload, _with_key(options, key), position.traceparent
                    )
                except Exception as error:  # noqa: BLE001 - it is raised where this one's outcome is asked for
                    outcomes[number] = error
        submitted = await self._submitted([*prepared.values()], options.timeout)
        for number, outcome in zip(prepared, submitted, strict=True):
            outcomes[number] = outcome
        return [one for one in outcomes if one is not None]

    async def _submitted(
        self, tasks: Sequence[tuple[Submission, AuthzContext]], timeout_s: float
    ) -> list[Submitted | AgentCallError]:
        """Take steps 2 and 4 for some tasks at once; return what came of each."""
        outcomes: list[Submitted | AgentCallError | None] = [None] * len(tasks)
        allowed: list[_Allowed] = []
        decisions = await self.authorizer.authorize_all([facts for _, facts in tasks])  # 2
        for number, ((task, facts), decision) in enumerate(zip(tasks, decisions, strict=True)):
            self.metrics.decided(Direction.OUTBOUND, allowed=decision.allowed, standing=decision.standing)
            if task.content_type == BLOB_CONTENT_TYPE:
                told = replace(facts, payload=blob_summary(len(task.payload), sha256(task.payload)))
            else:
                told = facts
            if decision.allowed:
                allowed.append(_Allowed(number, task, told, decision))
            else:
                outcomes[number] = self._denied(told, decision)
        together = _storable(allowed)
        for one, outcome in zip(chain(*together), await self._all_stored(together, timeout_s), strict=True):
            outcomes[one.number] = outcome if isinstance(outcome, AgentCallError) else self._named(*outcome)
        return [one for one in outcomes if one is not None]

    async def _all_stored(
        self, groups: Sequence[Sequence[_Allowed]], timeout_s: float
    ) -> list[tuple[Submission, Sealed] | AgentCallError]:
        """Take step 4 for groups at the same time; return what came of each task, in their order."""
        if len(groups) == 1:
            return await self._stored(groups[0], timeout_s)
        async with asyncio.TaskGroup() as at_once:
            storing = [at_once.create_task(self._stored(group, timeout_s)) for group in groups]
        return [outcome for group in storing for outcome in group.result()]

    async def _stored(
        self, tasks: Sequence[_Allowed], timeout_s: float
    ) -> list[tuple[Submission, Sealed] | AgentCallError]:
        """Store what is allowed, each attempt with a record of the decision before it leaves."""
        assert self.submissions is not None  # who is wired to the bus has them
        note_attempt = attempt_notes() if self.tracing.enabled else None

        async def record(attempts: Sequence[tuple[int, Sealed]]) -> None:
            entries = []
            for number, sealed in attempts:
                if note_attempt is not None:
                    note_attempt(sealed)
                entries.append(_entry(tasks[number], sealed))
            await self.audit.record_all(entries)

        submissions, left_s = [one.task for one in tasks], timeout_s
        could_not = f"the task could not be stored for {submissions[0].agent}"
        if submissions[0].content_type == BLOB_CONTENT_TYPE:  # then it is alone
            try:
                submissions[0], left_s = await self._stored_apart(submissions[0], timeout_s)
            except AgentWeaveError as error:
                return [as_call_error(error, "task", could_not)]
        stored = await self.submissions.store(submissions, record, timeout_s=left_s)
        return [
            as_call_error(one, "task", could_not) if isinstance(one, AgentWeaveError) else (task, one)
            for task, one in zip(submissions, stored, strict=True)
        ]

    def _named(self, task: Submission, sealed: Sealed) -> Submitted:
        head = sealed.head
        ref = TaskRef(task.agent, self.me, task.capability, task.id)
        return Submitted(ref, sealed.digest, head.pd, head.exp, _schedule(head))

    async def _stored_apart(self, task: Submission, timeout_s: float) -> tuple[Submission, float]:
        """Store a payload that is too large for a message; return what refers to it, and the time left."""
        assert self.blobs is not None  # who is wired to the bus has them
        began = self.monotonic_ms()
        ref = TaskRef(task.agent, self.me, task.capability, task.id)
        blob = await self.blobs.put(task.agent, task.payload, f"task {ref.key}", timeout_s=timeout_s)
        left_s = timeout_s - (self.monotonic_ms() - began) / 1000
        return task._replace(payload=blob.encoded()), max(0.1, left_s)

    def _prepare_task(
        self, target: str, capability: str, payload: Any, options: TaskOptions, trace: str | None
    ) -> tuple[Submission, AuthzContext]:
        """Step 1: everything that can be wrong before anyone is asked."""
        parent, principal = options.parent, options.principal
        _check_principal(parent, principal)
        agent, value, data, content_type = self._checked_large(target, capability, payload)
        now_ms, key = self.clock_ms(), options.idempotency_key
        times = task_times(options, now_ms)
        if times.due_ms is not None and parent is not None and len(parent.links) > _MOST_LINKS_PARKED:
            raise CallRefusedError(
                "what led to this task is too long a chain to be parked with it", step="local"
            )
        task = Submission(
            agent=agent,
            capability=capability,
            payload=data,
            id=new_id(now_ms) if key is None else id_of_key(self.me, agent, capability, key),
            expires_ms=times.expires_ms,
            due_ms=times.due_ms,
            every=options.every,
            via=parent.links if parent else (),
            scope=self._scope(agent, capability, parent, principal, options.scope),
            principal=dict(principal) if principal else None,
            idempotency_key=key,
            priority=options.priority,
            retry=options.retry,
            trace=trace,
            content_type=content_type,
        )
        return task, self._facts(task, agent, value, parent)

    def _checked_large(
        self, target: str, capability: str, payload: Any
    ) -> tuple[SpiffeID, JsonValue, bytes, str]:
        """Do as :meth:`_checked`, for what may be larger than a message; return its content type, too."""
        try:
            return (*self._checked(target, capability, payload, DEFAULT_LIMITS), JSON_CONTENT_TYPE)
        except CallRefusedError as refused:
            if not isinstance(refused.__cause__, PayloadError):
                raise
        most = DEFAULT_MAX_BLOB_BYTES if self.blobs is None else self.blobs.max_bytes
        return (*self._checked(target, capability, payload, blob_limits(most)), BLOB_CONTENT_TYPE)

    def _checked(
        self, target: str, capability: str, payload: Any, limits: Limits = DEFAULT_LIMITS
    ) -> tuple[SpiffeID, JsonValue, bytes]:
        """Return the callee, the payload as it will be read, and its bytes, if all can be."""
        try:
            callee = _addressed(target, check_capability(capability))
            value, data = convert_payload({} if payload is None else payload, limits)
        except AgentWeaveError as error:
            raise CallRefusedError(str(error), step="local", reason=str(error)) from error
        check_arguments(capability, value)
        if callee.trust_domain not in self.allowed_trust_domains():
            self.metrics.federation_errors.inc()
            raise FederationError(
                f"the trust domain of {callee} is not in identity.allowed_trust_domains",
                trust_domain=callee.trust_domain,
            )
        return callee, value, data

    def _scope(
        self,
        callee: SpiffeID,
        capability: str,
        parent: Parent | None,
        principal: Mapping[str, str] | None,
        scope: Sequence[str] | None,
    ) -> tuple[str, ...] | None:
        """Return what the call may reach. With a principal there always is a scope, at least the grants'."""
        if scope is not None:
            return tuple(scope)
        if principal is None or parent is not None:
            return None
        return reach_of(self.authorizer.grants, callee, capability)

    def _deadline_ms(self, timeout: float, parent: Parent | None) -> int:
        now_ms = self.clock_ms()
        if not _is_seconds(timeout):
            raise CallRefusedError(
                f"a timeout is a positive number of seconds, not {timeout!r}", step="local"
            )
        deadline = now_ms + int(min(timeout, self.max_timeout) * 1000)
        if parent is None:
            return deadline
        if parent.deadline_ms <= now_ms:
            raise CallTimeoutError("no time is left of the call on whose behalf this one would be made")
        return min(deadline, parent.deadline_ms)

    def _facts(
        self, request: Request | Submission, callee: SpiffeID, payload: JsonValue, parent: Parent | None
    ) -> AuthzContext:
        return AuthzContext(
            caller=self.me,
            callee=callee,
            action=request.capability,
            direction="outbound",
            payload=payload,
            kind="call" if isinstance(request, Request) else "task",
            transport="bus",
            via=parent.via if parent else (),
            principal=parent.principal if parent else request.principal,
            scope=request.scope if request.scope is not None else (parent.scope if parent else None),
        )

    async def _carry(self, request: Request, facts: AuthzContext, *, watching: bool) -> TaskResult:
        decision = await self.authorizer.authorize(facts)  # 2
        self.metrics.decided(Direction.OUTBOUND, allowed=decision.allowed, standing=decision.standing)
        if not decision.allowed:
            raise self._denied(facts, decision)
        breaker = self.breakers.of(request.callee)
        permit = breaker.acquire(self.monotonic_ms())  # 3
        if permit is None:
            wait = max(0.0, breaker.retry_after(self.monotonic_ms()))
            raise CircuitOpenError(
                f"calls to {request.callee} failed lately; tried again in {wait:.0f} s", retry_after=wait
            )
        try:
            result = await self._transported(request, facts, decision, watching=watching)  # 4
        except AgentCallError as error:
            _count(breaker, permit, error, self.monotonic_ms())
            raise
        except BaseException:
            breaker.abandoned(permit)
            raise
        breaker.succeeded(permit, self.monotonic_ms())
        return result

    async def _transported(
        self, request: Request, facts: AuthzContext, decision: AuthzDecision, *, watching: bool
    ) -> TaskResult:
        async def record(sealed: Sealed) -> None:
            kind = (request.callee, request.capability, decision.revision)
            before = self.repeats.due(kind, self.clock_ms()) if watching else {}
            if before is None:
                return
            entry = {"event": "call", **sealed_facts(sealed), **decision_facts(facts, decision)}
            await self.audit.record(entry | before if before else entry)
            if watching:
                self.repeats.recorded(kind, self.clock_ms())

        callee = request.callee
        on_sealed = noting_attempts(record) if self.tracing.enabled else record
        with as_call_errors("call", f"{callee} could not be asked"):
            try:
                answer = await self.transport.call(request.recorded_by(on_sealed))
                return TaskResult.from_json(answer.value)
            except PayloadError as error:
                raise AgentCallError(f"the answer of {callee} is no result: {error}") from error

    def _denied(self, facts: AuthzContext, decision: AuthzDecision) -> AuthorizationError:
        return outbound_denial(facts, decision, audit=self.audit, metrics=self.metrics)


@lru_cache(1024)  # many calls and tasks go to few
def _addressed(target: str, capability: str) -> SpiffeID:
    """Return the callee that ``target`` names. It and the capability are what can stand in a subject."""
    callee = SpiffeID(target)
    call_subject(callee, capability)
    return callee


def _with_key(options: TaskOptions, key: str | None) -> TaskOptions:
    return options if key is None else options._replace(idempotency_key=key)


def _outcome(gathered: Submitted | BaseException) -> Submitted | Exception:
    if isinstance(gathered, (Submitted, Exception)):
        return gathered
    raise gathered


def _storable(tasks: Sequence[_Allowed]) -> list[list[_Allowed]]:
    """Return which are stored together: what is too large for a message takes a time of its own."""
    small = [one for one in tasks if one.task.content_type != BLOB_CONTENT_TYPE]
    large = [[one] for one in tasks if one.task.content_type == BLOB_CONTENT_TYPE]
    return [small, *large] if small else large


def _entry(one: _Allowed, sealed: Sealed) -> dict[str, Any]:
    """Return what the audit log says of an attempt to submit a task."""
    entry = {"event": "submit", **sealed_facts(sealed), **decision_facts(one.facts, one.decision)}
    entry["pd"] = sealed.head.pd.hex()
    if (schedule := _schedule(sealed.head)) is not None:
        entry |= schedule.facts()
    return entry


def _schedule(head: Head) -> Schedule | None:
    return None if head.nbf is None else Schedule(head.nbf, head.exp, head.every)


def _with_a_way_out(refused: CallRefusedError, payload: Any) -> CallRefusedError:
    """Say of a payload that is too large for a call, and of no other, that a task could carry it."""
    if not isinstance(refused.__cause__, PayloadError):
        return refused
    try:
        convert_payload(payload, WIDE_LIMITS)
    except PayloadError:
        return refused
    told = f"{refused}; submit it as a task instead, whose payload may have bus.max_blob_bytes"
    return CallRefusedError(told, step="local", reason=told)


def _check_principal(parent: Parent | None, principal: Mapping[str, str] | None) -> None:
    if parent is not None and principal is not None:
        raise CallRefusedError(
            "only the origin of a delegation names a principal; this is asked for on behalf of another",
            step="local",
        )


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0  # and no NaN


def _count(breaker: CircuitBreaker, permit: Permit, error: AgentCallError, now_ms: int) -> None:
    """Tell the callee's breaker what a failed call says about the callee, if anything."""
    if isinstance(error, ConnectionLostError):
        breaker.abandoned(permit)  # the broker's trouble, or ours
    elif isinstance(error, (CallTimeoutError, NoResponderError)):
        breaker.failed(permit, now_ms)
    elif isinstance(error, UnreachableError) or _is_local(error):
        breaker.abandoned(permit)  # it was not asked
    else:
        breaker.succeeded(permit, now_ms)  # it is well: it said no


def _is_local(error: AgentCallError) -> bool:
    if isinstance(error, AuthorizationError):
        return error.direction != "inbound"
    return isinstance(error, CallRefusedError) and error.step == "local"


def reach_of(grants: Grants | None, callee: SpiffeID, capability: str) -> tuple[str, ...]:
    """Return the scope of a call by the grants: the capability itself and all that its callee may reach on.

    Raises:
        CallRefusedError: the grants reach further than a scope can say; name one.

    """
    scope = {f"{callee}#{capability}": None}
    open_ends, seen = [callee], {str(callee)}
    while open_ends and grants is not None:
        caller = open_ends.pop()
        for reach in grants.callees_of(caller):
            scope.update(dict.fromkeys(reach.scope_entries(caller)))
            if reach.agent not in seen:
                seen.add(reach.agent)
                open_ends.append(SpiffeID(reach.agent))
    if len(scope) > _MAX_SCOPE:
        raise CallRefusedError(f"a scope holds at most {_MAX_SCOPE} entries; name one", step="local")
    return tuple(scope)
