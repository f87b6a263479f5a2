"""What a handler may know of the request it serves.

A :class:`RequestContext` is made by whoever admitted the request, from verified values only, and is
bound to a context variable while the handler runs, so that concurrent requests never see each other's.
It travels into threads, and into tasks that a handler starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from agentweave_bus.agent.work import Work, check_progress, checked_artifact
from agentweave_bus.exceptions import AgentWeaveError

if TYPE_CHECKING:
    from agentweave_bus.envelope import Link, VerifiedLink

__all__ = ["RequestContext", "bind_context", "current_context", "find_context"]

_UNDOING_SECONDS: Final = 1.0  # with less than this left, compensations don't count on the request's time


@dataclass(frozen=True, init=False)
class RequestContext:
    """One request, as it was verified.

    ``caller_spiffe_id`` is who asked, proved by signature or mutual TLS. ``request_time`` is when the
    caller signed it (UTC, aware). ``task_id`` is the request's id, which a retry keeps. ``deadline_ms``
    is when the caller stops waiting (milliseconds since the epoch; ``None``: never). ``kind`` is the
    envelope's kind (``call``, ``task``, ``event``), ``transport`` is ``bus`` or ``a2a``. ``via`` holds
    the verified links of delegation, origin first (each with ``iss``, ``aud``, ``cap``, …), and is empty
    when the caller asks for itself. ``principal`` is for whom the origin says that it acts (``iss``,
    ``sub``, …), or ``None``. ``links`` is what a nested call must carry; ``trace`` a W3C traceparent,
    which nobody verified. ``attempt`` counts how often a task was begun, this time included; it is 1 for
    calls. ``event`` is the name of an event that is handled, and ``key`` what its publisher gave as its key.
    ``time_ns`` and ``monotonic_ns`` are the clocks of :meth:`remaining`.
    """

    caller_spiffe_id: str
    request_time: datetime
    task_id: str
    deadline_ms: int | None
    kind: str
    transport: str
    via: tuple[VerifiedLink, ...]
    principal: Mapping[str, Any] | None
    links: tuple[Link, ...]
    trace: str | None
    attempt: int
    event: str | None
    key: str | None
    time_ns: Callable[[], int] = field(repr=False, compare=False)
    monotonic_ns: Callable[[], int] = field(repr=False, compare=False)
    _expires: float = field(init=False, repr=False, compare=False)
    _work: Work | None = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        *,
        caller_spiffe_id: str,
        request_time: datetime | None = None,
        task_id: str = "",
        deadline_ms: int | None = None,
        kind: str = "call",
        transport: str = "bus",
        via: tuple[VerifiedLink, ...] = (),
        principal: Mapping[str, Any] | None = None,
        links: tuple[Link, ...] = (),
        trace: str | None = None,
        attempt: int = 1,
        event: str | None = None,
        key: str | None = None,
        time_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if request_time is None:
            request_time = datetime.now(UTC)
        elif request_time.tzinfo is None:
            raise AgentWeaveError("request_time must be an aware datetime")
        # Counted on the monotonic clock from here on: a clock that is set must not stretch a deadline.
        expires = math.inf
        if deadline_ms is not None:
            expires = monotonic_ns() / 1e9 + deadline_ms / 1000 - time_ns() / 1e9
        # At once, for each request makes one: what is frozen takes twice as long to set one by one.
        self.__dict__.update(
            caller_spiffe_id=caller_spiffe_id,
            request_time=request_time,
            task_id=task_id,
            deadline_ms=deadline_ms,
            kind=kind,
            transport=transport,
            via=via,
            principal=principal,
            links=links,
            trace=trace,
            attempt=attempt,
            event=event,
            key=key,
            time_ns=time_ns,
            monotonic_ns=monotonic_ns,
            _expires=expires,
            _work=None,
        )

    @property
    def origin(self) -> str:
        """The SPIFFE ID with which the chain of requests began: the caller's where there is no chain."""
        return str(self.via[0].iss) if self.via else self.caller_spiffe_id

    def remaining(self) -> float:
        """Return the seconds until the deadline, at least 0; infinite when there is none."""
        left = self._expires - self.monotonic_ns() / 1e9
        return left if left > 0 else 0.0

    async def step(
        self,
        name: str,
        function: Callable[..., Any],
        /,
        *args: Any,
        compensate: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run ``function(*args, **kwargs)`` once for the whole task, and return its result as JSON values.

        ``function`` is async, or plain and runs in a thread. In a later attempt of the task the recorded
        result is returned, or the recorded failure raised, and the function does not run. ``name`` is
        formed like a capability's and used once in a run. ``compensate`` takes the result; it runs when
        the task fails for good, last step first. In a call nothing is recorded, and compensations run when
        the handler fails.

        Raises:
            StepFailedError: the function raised what is no error of this package.
            AgentWeaveError: what the function raised; or the name is malformed or used twice, or the step
                stands inside another one.
            PayloadError: the result has no JSON form. What the function did is then not recorded.

        """
        return await self.own_work().steps.run(name, function, args, kwargs, compensate)

    async def progress(self, fraction: float, message: str = "") -> None:
        """Tell who watches the task that ``fraction`` (0 to 1) of it is done; the timeout begins anew.

        In a call nobody watches, and nothing happens.

        Raises:
            PayloadError: the fraction is another number, or the message is longer than 1000 characters.

        """
        check_progress(fraction, message)
        if self._work is not None:
            await self._work.progress(float(fraction), message)

    async def artifact(self, type: str, data: Any, *, name: str | None = None) -> None:  # noqa: A002 - its key in the artifact
        """Hand a part of the result to who watches the task; the timeout begins anew.

        It is not part of the result that the handler returns. In a call nothing happens.

        Raises:
            PayloadError: ``data`` has no JSON form, or is too large.

        """
        made = checked_artifact(type, data, name)
        if self._work is not None:
            await self._work.artifact(made)

    def own_work(self, work: Work | None = None) -> Work:
        """Return what this run has beside its request; ``work`` where its dispatcher gives it."""
        if work is not None or self._work is None:
            object.__setattr__(self, "_work", work or Work.of_call(self.caller_spiffe_id))
        assert self._work is not None
        return self._work

    def begun_work(self) -> Work | None:
        """Return it if there is one yet: in a call only after the first step."""
        return self._work

    def for_undoing(self) -> RequestContext:
        """Return the context in which compensations run.

        After the request's deadline nothing can be asked for on its behalf any more. What is undone then is
        undone in the agent's own name: nested calls carry no links, and have the time that they are given.
        """
        if self.remaining() > _UNDOING_SECONDS:
            return self
        return replace(self, deadline_ms=None, links=())


_current: ContextVar[RequestContext | None] = ContextVar("agentweave_request", default=None)


def find_context() -> RequestContext | None:
    """Return the request that is being handled here, or ``None`` outside one."""
    return _current.get()


def current_context() -> RequestContext:
    """Return the request that is being handled here.

    Raises:
        AgentWeaveError: no request is being handled here.

    """
    context = _current.get()
    if context is None:
        raise AgentWeaveError(
            "no request is being handled here: the context exists only inside a capability,"
            " and in tasks and threads that one starts"
        )
    return context


class bind_context:  # noqa: N801 - used like a function; a class, because each request makes one
    """Make ``context`` the current request inside the ``with`` block."""

    __slots__ = ("_context", "_token")

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    def __enter__(self) -> RequestContext:
        self._token = _current.set(self._context)
        return self._context

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
