"""What ends a call, a task or an event on its sender's side: bad payloads, denials, and other errors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final

from agentweave_bus.authz import AuditLog, AuthzContext, AuthzDecision
from agentweave_bus.bus.records import decision_facts
from agentweave_bus.envelope import Sealed
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AuditError,
    AuthorizationError,
    CallRefusedError,
    EnvelopeError,
    UnreachableError,
)
from agentweave_bus.observability.conventions import ATTEMPT
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.observability.spans import note
from agentweave_bus.types import JsonValue

__all__ = [
    "OnSealed",
    "as_call_error",
    "as_call_errors",
    "attempt_notes",
    "check_arguments",
    "noting_attempts",
    "outbound_denial",
]

_log = logging.getLogger(__name__)

_DENIALS: Final = {
    "call": "calling {action} of {callee} is not allowed: {reason} (audit id {audit_id})",
    "task": "submitting {action} to {callee} is not allowed: {reason} (audit id {audit_id})",
    "event": "publishing {action} is not allowed: {reason} (audit id {audit_id})",
}


_JSON_TYPES: Final = {type(None): "null", str: "a string", list: "an array", bool: "a boolean"}


def check_arguments(name: str, value: JsonValue) -> None:
    """Refuse a payload that no handler takes: what is sent to one names its arguments.

    Raises:
        CallRefusedError: ``value``, the payload as it will be read, is no object.

    """
    if isinstance(value, dict):
        return
    told = (
        f"what is sent to {name!r} must be an object that names the arguments of its handler, such as"
        f' {{"order_id": "o-17"}}, not {_JSON_TYPES.get(type(value), "a number")}'
    )
    raise CallRefusedError(told, step="local", reason=told)


OnSealed = Callable[[Sealed], Awaitable[None]]
"""Is shown each sealed attempt before it is sent."""


def attempt_notes() -> Callable[[Sealed], None]:
    """Return what notes each attempt to send something on the current span. For where tracing is on."""
    attempts = itertools.count(1)

    def noting(sealed: Sealed) -> None:
        note("sealed", {ATTEMPT: next(attempts), "messaging.message.envelope.size": len(sealed.frame)})

    return noting


def noting_attempts(on_sealed: OnSealed) -> OnSealed:
    """Return the same, with each attempt noted on the current span. Used only where tracing is on."""
    note_attempt = attempt_notes()

    async def noting(sealed: Sealed) -> None:
        note_attempt(sealed)
        await on_sealed(sealed)

    return noting


def outbound_denial(
    facts: AuthzContext, decision: AuthzDecision, *, audit: AuditLog, metrics: Metrics
) -> AuthorizationError:
    """Record that the own policy denies to send something, and return what is raised then."""
    record = {"event": "refusal", "step": 0, "step_name": "outbound", **decision_facts(facts, decision)}
    try:
        audit_id = audit.append(record).audit_id
    except AuditError as error:  # the denial stands all the same
        metrics.audit_write_failures.inc()
        _log.error("a denial could not be recorded: %s", error)
        audit_id = ""
    told = _DENIALS[facts.kind].format(
        action=repr(facts.action),
        callee=facts.callee,
        reason=decision.reason,
        audit_id=audit_id or "none: the audit log failed",
    )
    return AuthorizationError(told, reason=decision.reason, audit_id=audit_id, direction="outbound")


class as_call_errors:  # noqa: N801 - a context manager, and none of a generator: each call enters one
    """Make one of the branches of ``AgentCallError`` of whatever keeps something from being sent.

    ``what`` is a ``call``, a ``task`` or an ``event``; ``could_not`` says what could not be done where
    nothing was.
    """

    __slots__ = ("_could_not", "_what")

    def __init__(self, what: str, could_not: str) -> None:
        self._what = what
        self._could_not = could_not

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise the branch in place of an error that is none."""
        if isinstance(error, AgentWeaveError) and not isinstance(error, AgentCallError):
            raise as_call_error(error, self._what, self._could_not)


def as_call_error(error: AgentWeaveError, what: str, could_not: str) -> AgentCallError:
    """Return the branch that stands for ``error``, its cause; the words are of :class:`as_call_errors`."""
    if isinstance(error, AgentCallError):
        return error
    if isinstance(error, AuditError):
        told: AgentCallError = CallRefusedError(f"the {what} could not be recorded: {error}", step="local")
    elif isinstance(error, EnvelopeError):
        told = CallRefusedError(f"the {what} can't be sealed: {error}", step="local")
    else:
        told = UnreachableError(f"{could_not}: {error}")
    told.__cause__ = error
    return told
