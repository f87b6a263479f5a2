"""Every error that this package raises, in one tree.

The branches follow what a caller can do about the failure::

    AgentWeaveError
    ├── ConfigurationError          change a file or a variable; ``key`` and ``hint`` say which
    ├── InvalidSpiffeIdError        the text is no SPIFFE ID (also a ValueError)
    ├── IdentityError               who I am, or who the peer is, could not be established
    │   ├── SvidUnavailableError    no SVID, or none that is still valid
    │   ├── WorkloadApiUnavailableError  no Workload API at the configured socket
    │   ├── BundleUnavailableError  no trust bundle for a trust domain
    │   └── ChainRefusedError       a certificate chain did not verify
    ├── EnvelopeError               bytes that are not an acceptable envelope
    │   ├── MalformedEnvelopeError  size, framing, types, canonical form
    │   ├── SignatureRefusedError   proof, root or payload hash
    │   ├── DelegationRefusedError  the ``via`` chain breaks a rule (``rule`` is 1 to 6)
    │   └── TimeRefusedError        expired, future or stale
    ├── PayloadError                a payload that is no bounded JSON value, or not what the handler takes
    │   └── BlobError               a payload by reference that is missing, or not what was signed
    ├── PolicyError                 the policy could not be loaded or asked
    │   ├── PolicyLoadError         does not compile, or breaks a rule for policies
    │   └── PolicyUnavailableError  no trustworthy answer in time (always a denial)
    ├── AuditError                  the audit log can't be written, or does not verify
    ├── TaskFailedError             raised by a handler: the task failed, and the caller may read why
    ├── RetryableError              raised by a handler: not now, try again later
    ├── StepFailedError             a step's function raised; the log has it under ``correlation_id``
    ├── AttemptLostError            another worker has taken the task over; what this one has is dropped
    ├── WorkerError                 a worker process did not start, or ended; ``exit_code`` is its code
    ├── BusError                    the broker
    └── AgentCallError              a call ended without a result
        ├── FederationError         the peer's trust domain is not allowed, or its bundle is missing
        ├── AuthorizationError      denied; ``reason`` and ``audit_id`` say by what
        ├── CallRefusedError        the peer refused the request; ``step`` and ``reason`` say why
        ├── CallTimeoutError        no answer before the deadline; the work may have been done
        │   └── ConnectionLostError the connection to the broker broke while the answer was awaited
        ├── UnreachableError        nothing received the request
        │   ├── NoResponderError    no replica of the agent is subscribed
        │   └── CircuitOpenError    recent calls failed; not tried again yet
        ├── QueueFullError          the queue of tasks is full; nothing was stored
        ├── IdempotencyError        the idempotency key was used with another payload
        ├── TaskCanceledError       the task was cancelled; ``reason`` says why
        └── TaskNotFoundError       no task of this sender has this id

Messages are for the person who reads them. Programs read attributes, never messages.
"""

from __future__ import annotations

import math

__all__ = [
    "AgentCallError",
    "AgentWeaveError",
    "AttemptLostError",
    "AuditError",
    "AuthorizationError",
    "BlobError",
    "BundleUnavailableError",
    "BusError",
    "CallRefusedError",
    "CallTimeoutError",
    "ChainRefusedError",
    "CircuitOpenError",
    "ConfigurationError",
    "ConnectionLostError",
    "DelegationRefusedError",
    "EnvelopeError",
    "FederationError",
    "IdempotencyError",
    "IdentityError",
    "InvalidSpiffeIdError",
    "MalformedEnvelopeError",
    "NoResponderError",
    "PayloadError",
    "PolicyError",
    "PolicyLoadError",
    "PolicyUnavailableError",
    "QueueFullError",
    "RetryableError",
    "SignatureRefusedError",
    "StepFailedError",
    "SvidUnavailableError",
    "TaskCanceledError",
    "TaskFailedError",
    "TaskNotFoundError",
    "TimeRefusedError",
    "UnreachableError",
    "WorkerError",
    "WorkloadApiUnavailableError",
]


class AgentWeaveError(Exception):
    """Root of every error of this package."""


class ConfigurationError(AgentWeaveError):
    """A setting is unknown, malformed or not allowed here.

    ``key`` is the dotted name of the setting (``authorization.default_action``) where there is one;
    ``hint`` is the way out, one sentence.
    """

    def __init__(self, message: str, *, key: str | None = None, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} {hint}")
        self.key = key
        self.hint = hint


class InvalidSpiffeIdError(AgentWeaveError, ValueError):
    """A text that is no valid SPIFFE ID (SPIFFE-ID section 2)."""


class IdentityError(AgentWeaveError):
    """An identity could not be established."""


class SvidUnavailableError(IdentityError):
    """No X.509-SVID could be had, or the one at hand has expired."""


class WorkloadApiUnavailableError(IdentityError):
    """There is no Workload API where the configuration says; asking again soon would not help."""


class BundleUnavailableError(IdentityError):
    """There is no trust bundle for ``trust_domain``."""

    def __init__(self, message: str, *, trust_domain: str) -> None:
        super().__init__(message)
        self.trust_domain = trust_domain


class ChainRefusedError(IdentityError):
    """A certificate chain is not a valid X.509-SVID of its trust domain."""


class EnvelopeError(AgentWeaveError):
    """Bytes that are not an acceptable envelope."""


class MalformedEnvelopeError(EnvelopeError):
    """The frame or head breaks a bound or the canonical form."""


class SignatureRefusedError(EnvelopeError):
    """The proof does not cover the head, or the head does not cover the payload."""


class DelegationRefusedError(EnvelopeError):
    """The ``via`` chain breaks a rule of delegation; ``rule`` is its number, 1 to 6."""

    def __init__(self, message: str, *, rule: int) -> None:
        super().__init__(message)
        self.rule = rule


class TimeRefusedError(EnvelopeError):
    """The envelope is expired, not yet valid, from the future or stale."""


class PayloadError(AgentWeaveError):
    """A payload is not a bounded JSON value, or not what the capability takes."""


class BlobError(PayloadError):
    """A payload that travels by reference can't be had: the reference is none, or the blob is not its.

    ``missing`` says that a part of it is not there (any more, or not yet); else it never will be right.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class PolicyError(AgentWeaveError):
    """A policy could not be loaded or asked."""


class PolicyLoadError(PolicyError):
    """A policy does not compile, or breaks a rule for policies."""


class PolicyUnavailableError(PolicyError):
    """No trustworthy answer came in time. Always treated as a denial."""


class AuditError(AgentWeaveError):
    """The audit log can't be written, or does not verify."""


class TaskFailedError(AgentWeaveError):
    """Raised by a capability's handler to fail the task with a message that the caller may read.

    Any other exception of a handler is told to the caller as a correlation id only.
    """


class RetryableError(AgentWeaveError):
    """Raised by a capability's handler: it can't be done now, and may be later.

    A task is tried again, as far as the capability's ``retry`` goes; not before ``retry_after`` seconds
    where that is given. A call is answered with a failed result that has the message; so does the task
    that is out of attempts.
    """

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        if retry_after is not None and not (0 <= retry_after < math.inf):
            raise ValueError(f"retry_after is a number of seconds from 0, not {retry_after!r}")
        self.retry_after = retry_after


class StepFailedError(AgentWeaveError):
    """The function of a durable step raised what is no error of this package.

    ``step`` is the step's name. The traceback stands in the log of the run that saw it, under
    ``correlation_id``; in that run it is the ``__cause__`` as well, but not when the step is replayed.
    """

    def __init__(self, message: str, *, step: str, correlation_id: str) -> None:
        super().__init__(message)
        self.step = step
        self.correlation_id = correlation_id


class AttemptLostError(AgentWeaveError):
    """Another worker has taken the task over, so nothing that this attempt does is recorded any more.

    Handlers don't see it: their attempt is cancelled.
    """


class WorkerError(AgentWeaveError):
    """The worker process ``name`` did not become ready.

    ``exit_code`` is what it ended with (2 for a wrong configuration, see ``worker.main``), minus the
    number of the signal that ended it, or None when it had not ended.
    """

    def __init__(self, message: str, *, name: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.exit_code = exit_code


class BusError(AgentWeaveError):
    """The broker can't be reached or refused the connection."""


class AgentCallError(AgentWeaveError):
    """A call ended without a result. Catching this one catches all that can happen to a call."""


class FederationError(AgentCallError):
    """The peer's trust domain is not in ``allowed_trust_domains``, or its bundle is missing."""

    def __init__(self, message: str, *, trust_domain: str) -> None:
        super().__init__(message)
        self.trust_domain = trust_domain


class AuthorizationError(AgentCallError):
    """A policy denied the call.

    ``reason`` is the policy's, ``audit_id`` names the audit record of the decision on the side that
    denied, and ``direction`` is where it was denied: ``outbound`` (this side's policy), ``broker``
    (its permissions) or ``inbound`` (the callee's policy).
    """

    def __init__(
        self, message: str, *, reason: str = "", audit_id: str = "", direction: str = "inbound"
    ) -> None:
        super().__init__(message)
        self.reason = reason or message
        self.audit_id = audit_id
        self.direction = direction


class CallRefusedError(AgentCallError):
    """The callee verified who asked and refused the request at admission ``step`` with ``reason``.

    ``retry_after`` is given, in seconds, when nothing ran and a new call may fare better. ``step`` is
    ``local`` when the request never left this process.
    """

    def __init__(
        self,
        message: str,
        *,
        step: str = "",
        reason: str = "",
        audit_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.reason = reason
        self.audit_id = audit_id
        self.retry_after = retry_after


class CallTimeoutError(AgentCallError):
    """No verified answer came before the deadline; the callee may have done the work."""


class ConnectionLostError(CallTimeoutError):
    """The connection to the broker broke while an answer was awaited; the callee may have done the work.

    It says nothing about the callee, which may be well.
    """


class UnreachableError(AgentCallError):
    """Nothing received the request, so nothing ran."""


class NoResponderError(UnreachableError):
    """No replica of the called agent is subscribed to the capability."""


class CircuitOpenError(UnreachableError):
    """Calls to this agent failed lately; it is not tried again before ``retry_after`` seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(AgentCallError):
    """The called agent's queue of tasks is full. Nothing was stored, so it may be submitted again later."""


class IdempotencyError(AgentCallError):
    """The idempotency key was used before with another payload; ``task_id`` is the id that they share.

    The task of the first payload is not touched by this.
    """

    def __init__(self, message: str, *, task_id: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id


class TaskCanceledError(AgentCallError):
    """The task was cancelled before it had a result; ``reason`` is what was said by who cancelled it."""

    def __init__(self, message: str, *, reason: str = "", task_id: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.task_id = task_id


class TaskNotFoundError(AgentCallError):
    """There is no such task that this identity submitted, or its records have expired."""

    def __init__(self, message: str, *, task_id: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id
