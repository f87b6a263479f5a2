"""Publishing events: allowed, signed, audited, and stored in the publisher's own stream.

An event is for nobody by name. Whoever the grants let receive it does so, now or when it is there again; that
the publisher may publish it is asked with its own trust domain in the callee's place. It counts as published
when the broker has stored it. Where no clear word comes it is sealed again with the same id and published
again: a subscriber may then see it twice, which it may in any case.

The stream is made when it is first needed: the broker then says that there is none, and the control role is
told that somebody publishes. Whether it is there is asked once, before the first event; who listens live
would otherwise let a stream that is missing look like an answer that is late.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

from agentweave_bus.authz import AuditLog, Authorizer, AuthzContext
from agentweave_bus.bus.connection import Keeper, NotPermittedError, Session
from agentweave_bus.bus.outbound import as_call_errors, check_arguments, noting_attempts, outbound_denial
from agentweave_bus.bus.records import decision_facts, sealed_facts
from agentweave_bus.bus.slots import SlotOutcome, acknowledged
from agentweave_bus.bus.streams import EVENT_MAX_AGE_S, events_stream_name
from agentweave_bus.bus.subjects import event_subject
from agentweave_bus.envelope import (
    Draft,
    Kind,
    Link,
    LogWitness,
    Sealed,
    Sealer,
    convert_payload,
    new_id,
)
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    NoResponderError,
    UnreachableError,
)
from agentweave_bus.observability.conventions import describe_sending
from agentweave_bus.observability.metrics import Direction, Metrics, RequestStatus
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.spiffe_id import SpiffeID, domain_id
from agentweave_bus.tasks.event_announcing import EventAnnouncement, announce_events

__all__ = ["DEFAULT_EVENT_SECONDS", "OnBehalf", "PublishedEvent", "Publisher", "Publishing"]

DEFAULT_EVENT_SECONDS: Final = float(EVENT_MAX_AGE_S)
"""How long an event counts, in seconds, where its publisher does not say: as long as it is kept."""

_ANSWER_S: Final = 5.0
_LOOK_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 2.0
_LONGEST_KEY: Final = 256


class PublishedEvent(NamedTuple):
    """An event that was stored: its name, its id, and the digest of its head in hexadecimal."""

    name: str
    id: str
    digest: str


class OnBehalf(Protocol):
    """The request while which something is published; ``client.Parent`` is one."""

    @property
    def links(self) -> tuple[Link, ...]:
        """What proves it."""

    @property
    def via(self) -> tuple[Mapping[str, Any], ...]:
        """How a policy sees it."""

    @property
    def principal(self) -> Mapping[str, str] | None:
        """For whom its origin acts."""

    @property
    def scope(self) -> tuple[str, ...] | None:
        """What it limits all that follows to."""


class Publishing(NamedTuple):
    """What a :class:`Publisher` stands on. ``clock_ms`` is in milliseconds since the epoch."""

    me: SpiffeID
    control: SpiffeID
    """Who makes streams at the broker."""
    keeper: Keeper
    sealer: Sealer
    authorizer: Authorizer
    audit: AuditLog
    metrics: Metrics
    tracing: Tracing
    clock_ms: Callable[[], int]
    patience_s: float
    """How long to wait for a stream that nobody has made yet."""
    monotonic: Callable[[], float] = time.monotonic


class Publisher:
    """Publishes the events of one identity."""

    def __init__(self, parts: Publishing) -> None:
        self._parts = parts
        self._stream = events_stream_name(parts.me)
        self._announced = -1.0
        self._there = False

    async def publish(
        self,
        name: str,
        data: Any = None,
        *,
        key: str | None = None,
        deadline: float = DEFAULT_EVENT_SECONDS,
        timeout: float = 30.0,  # noqa: ASYNC109 - what it bounds is told as unclear, not as cancelled
        parent: OnBehalf | None = None,
        trace: str | None = None,
    ) -> PublishedEvent:
        """Have the event ``name`` stored for whoever may receive it; return what names it.

        ``data`` is an object with what its handlers take. ``key`` says what it is about (an order's id), in
        the handlers' ``context.key``. ``deadline`` is in seconds from now: later it is handled no more.
        ``timeout`` (seconds) is for the storing alone.

        Raises:
            AuthorizationError: the policy or the broker does not let this identity publish it: no grant lets
                anybody receive it.
            CallRefusedError: name, data, key or deadline is none, or it is larger than the broker takes.
            CallTimeoutError: no clear answer in time; it may have been stored.
            UnreachableError: there was no connection, or nobody made a stream for it; nothing was stored.

        """
        parts = self._parts
        began = time.perf_counter()
        status = RequestStatus.ERROR
        try:
            with (
                parts.tracing.span("publish", kind="producer", parent=trace) as span,
                as_call_errors("event", "the event could not be published"),
            ):
                draft, value, payload = self._prepared(name, data, key, deadline, span.traceparent)
                if span.recorder is not None:
                    declared = parts.metrics.declares(Direction.OUTBOUND, name)
                    describe_sending(span, "publish", draft["sub"], draft["id"], len(payload), named=declared)
                facts = self._facts(name, value, parent)
                decision = await parts.authorizer.authorize(facts)
                parts.metrics.decided(
                    Direction.OUTBOUND, allowed=decision.allowed, standing=decision.standing
                )
                if not decision.allowed:
                    raise outbound_denial(facts, decision, audit=parts.audit, metrics=parts.metrics)

                async def record(sealed: Sealed) -> None:
                    entry = {"event": "publish", **sealed_facts(sealed), **decision_facts(facts, decision)}
                    await parts.audit.record(entry)

                on_sealed = noting_attempts(record) if parts.tracing.enabled else record
                links = () if parent is None else parent.links
                sealed = await self._store(draft, payload, links, on_sealed, timeout)
                status = RequestStatus.SUCCESS
                return PublishedEvent(name, sealed.head.id, sealed.digest.hex())
        except AuthorizationError:
            status = RequestStatus.DENIED
            raise
        finally:
            parts.metrics.request_ended(Direction.OUTBOUND, name, status, time.perf_counter() - began)

    # --- before anyone is asked --------------------------------------------------------------------------

    def _prepared(
        self, name: str, data: Any, key: str | None, deadline: float, trace: str | None
    ) -> tuple[Draft, Any, bytes]:
        """Check all that can be wrong; return the head to be, the data as they will be read, and as sent."""
        parts = self._parts
        try:
            subject = event_subject(parts.me, name)
            value, payload = convert_payload({} if data is None else data)
        except AgentWeaveError as error:
            raise CallRefusedError(str(error), step="local", reason=str(error)) from error
        check_arguments(name, value)
        if not (_is_number(deadline) and 0 < deadline <= DEFAULT_EVENT_SECONDS):
            raise CallRefusedError(
                f"an event's deadline is at most {DEFAULT_EVENT_SECONDS:.0f} seconds ahead, not {deadline!r}",
                step="local",
            )
        if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
            raise CallRefusedError(
                f"an event's key is 1 to {_LONGEST_KEY} printable characters, not {key!r:.80}", step="local"
            )
        now_ms = parts.clock_ms()
        draft = Draft(
            kind=Kind.EVENT,
            id=new_id(now_ms),
            aud=domain_id(parts.me.trust_domain),
            cap=name,
            sub=subject,
            iat=now_ms,
            exp=now_ms + max(1, int(deadline * 1000)),
            idk=key,
            trace=trace,
        )
        return draft, value, payload

    def _facts(self, name: str, value: Any, parent: OnBehalf | None) -> AuthzContext:
        me = self._parts.me
        return AuthzContext(
            caller=me,
            callee=domain_id(me.trust_domain),
            action=name,
            direction="outbound",
            payload=value,
            kind=Kind.EVENT.value,
            transport="bus",
            via=parent.via if parent else (),
            principal=parent.principal if parent else None,
            scope=parent.scope if parent else None,
        )

    # --- storing -----------------------------------------------------------------------------------------

    async def _store(
        self,
        draft: Draft,
        payload: bytes,
        via: tuple[Link, ...],
        on_sealed: Callable[[Sealed], Awaitable[None]],
        timeout_s: float,
    ) -> Sealed:
        monotonic = self._parts.monotonic
        began = monotonic()
        until, patient_until = began + timeout_s, began + min(timeout_s, self._parts.patience_s)
        pause, in_doubt = _FIRST_PAUSE_S, False
        while True:
            try:
                session = await self._parts.keeper.session(max(0.0, until - monotonic()))
            except UnreachableError:
                if in_doubt:
                    raise CallTimeoutError(f"the connection was lost; {_perhaps(draft)}") from None
                raise
            if not await self._has_stream(session):
                if not in_doubt and monotonic() + pause > patient_until:
                    raise NoResponderError(
                        "there is no stream for this identity's events: is a control role running?"
                    )
                await self._announce(session)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_S)
                continue
            draft = self._now(draft)
            sealed = await self._parts.sealer.seal(draft, payload, via)
            self._check_size(sealed, session)
            await on_sealed(sealed)
            outcome = await self._post(session, sealed, until - monotonic())
            now = monotonic()
            if outcome is SlotOutcome.WRITTEN:
                return sealed
            self._there = False  # looked at again; who listens live lets a missing one look like no answer
            in_doubt |= outcome is not SlotOutcome.NOWHERE
            if now + pause > until:
                raise CallTimeoutError(f"no clear word from the broker in time; {_perhaps(draft)}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_S)

    async def _has_stream(self, session: Session) -> bool:
        """Say whether the stream is there. Asked until it is, and again when a storing failed."""
        if not self._there:
            asked = f"$JS.API.STREAM.INFO.{self._stream}"
            try:
                answer = json.loads((await session.ask(asked, b"", timeout_s=_LOOK_S)).data)
            except (TimeoutError, ValueError, BusError):
                return True  # nobody can tell; whether something is stored will show
            self._there = not (isinstance(answer, dict) and "error" in answer)
        return self._there

    def _now(self, draft: Draft) -> Draft:
        """Return the head to be as of now: an event counts as old when its ``iat`` is."""
        now_ms = self._parts.clock_ms()
        return {**draft, "iat": now_ms, "exp": max(draft["exp"], now_ms + 1), "log": self._witness()}

    def _witness(self) -> LogWitness | None:
        return self._parts.audit.witness()

    def _check_size(self, sealed: Sealed, session: Session) -> None:
        if len(sealed.frame) > session.max_message_bytes:
            raise CallRefusedError(
                f"the event takes {len(sealed.frame)} bytes; {session.max_message_bytes} pass the broker",
                step="local",
                reason="too large for the broker",
            )

    async def _post(self, session: Session, sealed: Sealed, left_s: float) -> SlotOutcome:
        try:
            timeout_s = min(_ANSWER_S, max(0.001, left_s))
            stored = await session.ask(sealed.head.sub, sealed.frame, timeout_s=timeout_s)
            return acknowledged(stored, self._stream)
        except NotPermittedError:
            raise AuthorizationError(
                f"the broker does not let this identity publish {sealed.head.cap!r}:"
                " no grant covers it, or the broker has not been told of the grant yet",
                reason="the broker's permissions",
                direction="broker",
            ) from None
        except (TimeoutError, BusError):
            return SlotOutcome.UNCLEAR

    async def _announce(self, session: Session) -> None:
        """Tell the control role, once for all who find at the same time that there is no stream."""
        parts, now = self._parts, self._parts.monotonic()
        if 0 <= now - self._announced < _FIRST_PAUSE_S:
            return
        self._announced = now
        await announce_events(
            session,
            parts.me,
            parts.control,
            EventAnnouncement(publishes=True),
            sealer=parts.sealer,
            clock_ms=parts.clock_ms,
        )


def _perhaps(draft: Draft) -> str:
    return f"the event {draft['id']} may have been stored"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
