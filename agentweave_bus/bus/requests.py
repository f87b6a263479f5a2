"""Making calls: a signed request, and the one answer that counts.

An attempt is one sealed envelope; all attempts of a call carry the same ``id`` and each has a digest of
its own. An answer counts when it verifies, comes from whom was asked, is addressed here, names the digest
of an attempt in flight, and arrives on that attempt's reply subject. The first valid one wins. Everything
else is dropped and counted: ``late`` (nobody waits on that subject any more), ``duplicate`` (the call is
answered) or ``forged`` (it fails a check; :mod:`agentweave_bus.bus.dropped` says which).

When an attempt is made again, with the same ``id``:

- nothing was subscribed to the subject: after growing delays, for as long as the callee may need to come
  back after a restart, its own or the broker's (``RetryRule.patience``);
- no answer came in the attempt's share of the time, or the connection was lost: only for calls said to be
  ``safe``; others fail at once with ``CallTimeoutError`` or ``ConnectionLostError``, since the work may have
  been done;
- the callee refused with ``retry_after``: nothing ran, so a new call with a new ``id`` is made. Not so when
  an earlier attempt ended by the word, which nobody signs, that nobody was there: that attempt may have been
  received, so the ``id`` stays, whose claim lets the work be done once.

Whether the call is allowed was asked before; see ``client.py``.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple

import anyio
from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session, too_late
from agentweave_bus.bus.dropped import DropLog, WhyDropped, dropped_words
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.bus.turns import Turns
from agentweave_bus.envelope import (
    Draft,
    EnvelopeVerifier,
    Kind,
    Link,
    LogWitness,
    OpenedEnvelope,
    Sealed,
    Sealer,
    check_time_reply,
    decode_payload,
    new_id,
)
from agentweave_bus.exceptions import (
    AgentCallError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    ConnectionLostError,
    EnvelopeError,
    FederationError,
    IdentityError,
    NoResponderError,
    PayloadError,
)
from agentweave_bus.observability.metrics import DropReason, Metrics
from agentweave_bus.observability.printable import escape_line
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Answer", "Request", "Requests", "RetryRule"]

_NO_RESPONDERS: Final = "503"
_MOST_DOUBLINGS: Final = 32
_MAX_SAID: Final = 1_000  # characters of what a callee says of itself in one part of a refusal
_MOST_FORGED: Final = 1_000
"""How many answers to one call are verified in vain, a tenth of a second in all. Then no more are."""


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How a call is made again; times are seconds.

    ``attempts`` (at least 1) bounds how often work is asked for whose answer is missing, and how often
    a callee is asked that is busy. Attempts that reach nobody are bounded by time, ``patience``: what counts
    there is how long a restart takes, not how many questions fit into it.
    """

    attempts: int = 3
    first_delay: float = 0.05
    last_delay: float = 2.0
    patience: float = 2.0

    def delay(self, attempt: int) -> float:
        """How long to wait after ``attempt`` (counted from 1) failed: doubling, with jitter."""
        delay = min(self.first_delay * 2.0 ** min(attempt - 1, _MOST_DOUBLINGS), self.last_delay)
        return delay * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


class Request(NamedTuple):
    """A call that is allowed and now to be made. ``deadline_ms`` is in milliseconds since the epoch."""

    callee: SpiffeID
    capability: str
    payload: bytes
    deadline_ms: int
    via: tuple[Link, ...] = ()
    scope: tuple[str, ...] | None = None
    principal: Mapping[str, str] | None = None
    safe: bool = False
    trace: str | None = None
    on_sealed: Callable[[Sealed], Awaitable[None]] | None = None
    """Awaited with each sealed attempt before it is sent; what it raises ends the call. The last field."""

    def recorded_by(self, on_sealed: Callable[[Sealed], Awaitable[None]]) -> Request:
        """Return the same request whose sealed attempts are shown to ``on_sealed``."""
        return Request(*self[:-1], on_sealed)


class Answer(NamedTuple):
    """A verified reply: its decoded payload and the digest of its head."""

    value: Any
    digest: bytes


class _Signal(Enum):
    """Why an attempt ended without an answer."""

    NO_RESPONDER = "no responder"
    FORBIDDEN = "forbidden"
    NO_ANSWER = "no answer"


class _Call:
    """One call and its attempts: a digest each, and whether it is over without having run."""

    def __init__(self, request: Request, call_id: str, deadline: float) -> None:
        self.request = request
        self.id = call_id
        self.deadline = deadline  # by the monotonic clock, in seconds
        self.attempts: dict[bytes, bool] = {}
        self.in_doubt = False  # an attempt ended without a signed answer, so it may have been received
        self.dropped: dict[WhyDropped, int] = {}
        self.subjects: set[str] = set()
        self.answer: OpenedEnvelope | None = None
        self.woken: asyncio.Future[_Signal | OpenedEnvelope] = asyncio.get_running_loop().create_future()

    def wake(self, reason: _Signal | OpenedEnvelope) -> None:
        if isinstance(reason, OpenedEnvelope):
            self.answer = reason
        if not self.woken.done():
            self.woken.set_result(reason)

    def nobody_there(self) -> None:
        """Note that the broker had nobody to give an attempt to. It names none, so it means all so far.

        That may be a lie, so from here on the call keeps its id; see docs/security.md.
        """
        self.in_doubt = True
        self.attempts = dict.fromkeys(self.attempts, True)
        self.wake(_Signal.NO_RESPONDER)

    @property
    def is_answered(self) -> bool:
        """Whether no other answer can count. In doubt a refusal of one attempt leaves the others open."""
        answer = self.answer
        return answer is not None and not (self.in_doubt and answer.head.kind is Kind.REFUSAL)

    def go_on_after(self, refusal: OpenedEnvelope) -> None:
        """Count ``refusal`` as the end of its attempt only; what came after it stands."""
        assert refusal.head.re is not None
        self.attempts.pop(refusal.head.re, None)
        if self.answer is refusal:
            self.answer = None

    def renew(self) -> asyncio.Future[_Signal | OpenedEnvelope]:
        """Return the future of the next attempt; already answered if an answer came meanwhile."""
        self.woken = asyncio.get_running_loop().create_future()
        if self.answer is not None:
            self.woken.set_result(self.answer)
        return self.woken


class Requests:
    """Makes calls over the bus for one identity.

    ``clock_ms`` is the time that envelopes carry; ``monotonic`` (seconds) is what waiting is measured by,
    so that a clock that is set while a call is in flight neither ends nor prolongs it.
    """

    def __init__(
        self,
        *,
        keeper: Keeper,
        sealer: Sealer,
        verifier: EnvelopeVerifier,
        retry: RetryRule,
        metrics: Metrics,
        clock_ms: Callable[[], int],
        witness: Callable[[], LogWitness | None],
        max_pending: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeper = keeper
        self._sealer = sealer
        self._verifier = verifier
        self._retry = retry
        self._metrics = metrics
        self._clock_ms = clock_ms
        self._monotonic = monotonic
        self._witness = witness
        self._max_pending = max_pending
        self._pending = 0
        self._turns = Turns()
        self._calls: dict[str, _Call] = {}
        self._drop_log = DropLog(monotonic)
        keeper.on_session(self._on_session)
        keeper.on_permission_error(self._on_permission_error)

    async def call(self, request: Request) -> Answer:
        """Make the call and return its verified answer.

        Raises:
            AuthorizationError: the callee's policy, or the broker, does not allow it.
            CallRefusedError: the callee refused it for another reason, or too many calls are in flight.
            CallTimeoutError: no answer by the deadline (``ConnectionLostError``: the connection was lost).
            UnreachableError: nothing received it (``NoResponderError`` when nobody is subscribed).

        """
        if self._pending >= self._max_pending:
            raise CallRefusedError(
                f"{self._max_pending} calls are in flight already (bus.max_pending_calls)",
                step="local",
                reason="busy",
            )
        self._pending += 1
        try:
            return await self._call(request)
        finally:
            self._pending -= 1

    async def _call(self, request: Request) -> Answer:
        now_ms = self._clock_ms()
        deadline = self._monotonic() + (request.deadline_ms - now_ms) / 1000
        call = _Call(request, new_id(now_ms), deadline)
        try:
            opened = await self._answered(call)
            asked = 1
            while (wait := self._asks_again(call, opened, asked)) is not None:
                if call.in_doubt:
                    call.go_on_after(opened)
                    opened = await self._pause(call, wait) or await self._answered(call)
                else:
                    self._forget(call)
                    await asyncio.sleep(wait)
                    call = _Call(request, new_id(self._clock_ms()), deadline)
                    opened = await self._answered(call)
                asked += 1
            return _answer_of(call, opened)
        finally:
            self._forget(call)

    def _asks_again(self, call: _Call, opened: OpenedEnvelope, asked: int) -> float | None:
        """Return after how many seconds to ask again, where the answer is to come again and there is time."""
        if opened.head.kind is not Kind.REFUSAL or asked >= self._retry.attempts:
            return None
        wait = _retry_after(opened)
        return None if wait is None or wait >= self._until(call.deadline) else wait

    def _forget(self, call: _Call) -> None:
        call.woken.cancel()
        for subject in call.subjects:
            self._calls.pop(subject, None)

    async def _answered(self, call: _Call) -> OpenedEnvelope:
        """Make attempts until there is an answer, or no reason to make another one."""
        unanswered, give_up = 0, None
        for attempt in count(1):
            outcome = await self._attempt(call, last=unanswered + 1 == self._retry.attempts)
            if isinstance(outcome, OpenedEnvelope):
                return outcome
            delay = self._retry.delay(attempt)
            if outcome is _Signal.NO_ANSWER:
                unanswered, give_up = unanswered + 1, None
            else:
                give_up = give_up or self._monotonic() + self._retry.patience
                delay = self._delay_within(call, delay, give_up)
            if (answer := await self._pause(call, delay)) is not None:
                return answer
            self._metrics.call_retries.inc()
        raise AssertionError("counting does not end")

    def _delay_within(self, call: _Call, delay: float, give_up: float) -> float:
        """Return when to ask again where nobody was; the last time is at ``give_up``."""
        left = self._until(give_up)
        if left == 0 or delay >= self._until(call.deadline):
            raise NoResponderError(
                f"no replica of {call.request.callee} takes {call.request.capability!r} at the moment:"
                " is it running, and is that the capability's name?"
            )
        return min(delay, left)

    async def _attempt(self, call: _Call, *, last: bool) -> OpenedEnvelope | _Signal:
        """Send once and wait. A signal says why it may be made again."""
        request = call.request
        final = last or not request.safe
        session = await self._keeper.session(self._until(call.deadline))
        woken = call.renew()
        session.watch(woken)
        within_s = max(0.001, self._until(call.deadline) / (1 if final else 2))
        timer = asyncio.get_running_loop().call_later(within_s, too_late, woken)
        try:
            await self._send(session, call, within_s)
            signal = await woken
        except BusError as error:
            if final:
                raise ConnectionLostError(
                    f"the connection was lost while {request.callee} was asked; the work may have been done"
                ) from error
            return _Signal.NO_ANSWER
        except TimeoutError:
            if final:
                raise CallTimeoutError(
                    f"no answer from {request.callee} to {request.capability!r} in time;"
                    f" the work may have been done{dropped_words(call.dropped)}"
                ) from None
            return _Signal.NO_ANSWER
        finally:
            timer.cancel()
            woken.cancel()
            session.unwatch(woken)
        return self._conclude(signal, request)

    @staticmethod
    def _conclude(signal: _Signal | OpenedEnvelope, request: Request) -> _Signal | OpenedEnvelope:
        if signal is _Signal.FORBIDDEN:
            raise AuthorizationError(
                f"the broker does not let this identity call {request.capability!r} of {request.callee}:"
                " no grant covers it, or the broker has not been told of the grant yet",
                reason="the broker's permissions",
                direction="broker",
            )
        return signal

    async def _pause(self, call: _Call, delay: float) -> OpenedEnvelope | None:
        """Wait before the next attempt, unless an answer to an earlier one comes first."""
        call.renew()
        with anyio.move_on_after(min(delay, self._until(call.deadline))):
            while call.answer is None:
                await call.renew()  # what is no answer ends no pause
        return call.answer

    async def _send(self, session: Session, call: _Call, within_s: float) -> None:
        request, now_ms = call.request, self._clock_ms()
        subject = call_subject(request.callee, request.capability)
        reply = reply_subject(session.me, session.instance, call.id)
        draft: Draft = {
            "kind": Kind.CALL,
            "id": call.id,
            "aud": request.callee,
            "cap": request.capability,
            "sub": subject,
            "iat": now_ms,
            "exp": max(request.deadline_ms, now_ms + 1),
            "reply": session.instance,
            "scope": request.scope,
            "prn": None if request.via else request.principal,
            "log": self._witness(),
            "trace": request.trace,
        }
        sealed = await self._sealer.seal(draft, request.payload, request.via)
        if len(sealed.frame) > session.max_message_bytes:
            raise CallRefusedError(
                f"the call takes {len(sealed.frame)} bytes; the broker lets {session.max_message_bytes} pass",
                step="local",
                reason="too large for the broker",
            )
        if request.on_sealed is not None:
            await request.on_sealed(sealed)
        call.attempts[sealed.digest] = False
        call.subjects.add(reply)
        self._calls[reply] = call
        await session.publish_within(within_s, subject, sealed.frame, reply)

    def _until(self, instant: float) -> float:
        return max(0.0, instant - self._monotonic())

    async def _on_session(self, session: Session) -> None:
        await session.receive_replies(partial(self._on_reply, session.me))

    def _on_permission_error(self, verb: str, subject: str) -> None:
        if verb != "publish":
            return
        for call in set(self._calls.values()):
            # The client library gives the broker's words in lower case.
            if call_subject(call.request.callee, call.request.capability).lower() == subject.lower():
                call.wake(_Signal.FORBIDDEN)

    async def _on_reply(self, me: SpiffeID, message: Msg) -> None:
        call = self._calls.get(message.subject)
        if call is None:
            self._metrics.reply_dropped(DropReason.LATE)
        elif not message.data and message.headers and message.headers.get("Status") == _NO_RESPONDERS:
            call.nobody_there()
        elif call.is_answered:
            self._metrics.reply_dropped(DropReason.DUPLICATE)
        elif sum(call.dropped.values()) >= _MOST_FORGED:
            self._metrics.reply_dropped(DropReason.FORGED)  # unopened, or they would keep all others waiting
        elif isinstance(opened := self._open(me, call, message), WhyDropped):
            self._metrics.reply_dropped(DropReason.FORGED)
            call.dropped[opened] = call.dropped.get(opened, 0) + 1
            self._drop_log.note(call.request.callee, call.request.capability, opened)
        elif opened.head.kind is Kind.REPLY or self._all_refused(call, opened):
            call.wake(opened)
            await self._turns.taken()

    def _open(self, me: SpiffeID, call: _Call, message: Msg) -> OpenedEnvelope | WhyDropped:
        """Verify an answer, or say what about it is not what was asked for."""
        now_ms = self._clock_ms()
        try:
            opened = self._verifier.open(message.data, now_ms=now_ms)
            check_time_reply(opened.head, now_ms)
        except (EnvelopeError, IdentityError, FederationError) as error:
            return WhyDropped.of(error)
        head, request = opened.head, call.request
        genuine = (
            head.kind in (Kind.REPLY, Kind.REFUSAL)
            and head.iss == request.callee
            and head.aud == me
            and head.cap == request.capability
            and head.sub == message.subject
            and head.re in call.attempts
            and not opened.via
        )
        return opened if genuine else WhyDropped.OTHER

    @staticmethod
    def _all_refused(call: _Call, refusal: OpenedEnvelope) -> bool:
        """Note a refusal; it ends the wait only when no attempt is left that may still be answered."""
        assert refusal.head.re is not None
        call.attempts[refusal.head.re] = True
        return all(call.attempts.values())


def _answer_of(call: _Call, opened: OpenedEnvelope) -> Answer:
    value = _value_of(opened)
    if opened.head.kind is Kind.REFUSAL:
        raise _refusal(opened, value, in_doubt=call.in_doubt)
    return Answer(value, opened.digest)


def _value_of(opened: OpenedEnvelope) -> Any:
    try:
        return decode_payload(opened.payload)
    except PayloadError as error:
        raise AgentCallError(f"the answer of {opened.head.iss} is no JSON value: {error}") from error


def _retry_after(refusal: OpenedEnvelope) -> float | None:
    """Return when the callee says to come again, in seconds, if nothing but time is in the way."""
    body = _value_of(refusal)
    if not isinstance(body, dict) or body.get("step") == "authorization":
        return None
    wait = body.get("retry_after")
    return float(wait) if isinstance(wait, (int, float)) and wait >= 0 else None


def _said(value: Any) -> str:
    """Return a callee's words as they may stand in a sentence of ours: on one line, and not endless."""
    text = escape_line(str(value)[: _MAX_SAID + 1])
    return text if len(text) <= _MAX_SAID else f"{text[: _MAX_SAID - 1]}…"


def _refusal(opened: OpenedEnvelope, value: Any, *, in_doubt: bool) -> AgentCallError:
    body = value if isinstance(value, dict) else {}
    step, reason, audit_id = (_said(body.get(key, "")) for key in ("step", "reason", "audit_id"))
    callee, capability = opened.head.iss, opened.head.cap
    if step == "authorization":
        return AuthorizationError(
            f"{callee} denied {capability!r}: {reason} (audit id {audit_id})",
            reason=reason,
            audit_id=audit_id,
        )
    doubt = "; an attempt before this one may have been received all the same" if in_doubt else ""
    return CallRefusedError(
        f"{callee} refused {capability!r} at {step}: {reason} (audit id {audit_id}){doubt}",
        step=step,
        reason=reason,
        audit_id=audit_id,
        retry_after=None if in_doubt else _retry_after(opened),
    )
