"""From an error to an exit code and a message: the one place that decides.

0 done, 1 the task failed, 2 usage or configuration, 3 denied, 4 unreachable or timed out.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuditError,
    AuthorizationError,
    BundleUnavailableError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    ConfigurationError,
    FederationError,
    IdempotencyError,
    IdentityError,
    InvalidSpiffeIdError,
    PayloadError,
    PolicyLoadError,
    PolicyUnavailableError,
    QueueFullError,
    SvidUnavailableError,
    TaskNotFoundError,
    UnreachableError,
    WorkerError,
    WorkloadApiUnavailableError,
)

__all__ = ["ExitCode", "exit_code_of", "message_of", "single_error"]


class ExitCode(IntEnum):
    """What a command's exit code means."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DENIED = 3
    UNREACHABLE = 4


# The first that matches decides, so that a branch's exceptions stand before the branch.
_CODES: Final[tuple[tuple[type[AgentWeaveError], ExitCode], ...]] = (
    (ConfigurationError, ExitCode.USAGE),
    (InvalidSpiffeIdError, ExitCode.USAGE),
    (PayloadError, ExitCode.USAGE),
    (PolicyLoadError, ExitCode.USAGE),
    (AuditError, ExitCode.USAGE),
    (AuthorizationError, ExitCode.DENIED),
    (FederationError, ExitCode.DENIED),
    (PolicyUnavailableError, ExitCode.DENIED),
    (WorkloadApiUnavailableError, ExitCode.UNREACHABLE),
    (SvidUnavailableError, ExitCode.UNREACHABLE),
    (BundleUnavailableError, ExitCode.UNREACHABLE),
    (IdentityError, ExitCode.DENIED),
    (CallTimeoutError, ExitCode.UNREACHABLE),
    (UnreachableError, ExitCode.UNREACHABLE),
    (QueueFullError, ExitCode.UNREACHABLE),
    (IdempotencyError, ExitCode.USAGE),
    (TaskNotFoundError, ExitCode.USAGE),
    (BusError, ExitCode.UNREACHABLE),
)
_USAGE_STEPS: Final = frozenset({"local", "binding", "payload"})
_SHUT_OUT: Final = ("authorization", "authentication")  # what a nats-server says to whom it does not know
_NOT_TOLD: Final = "not allowed"  # what admission tells those who may not know more


def exit_code_of(error: AgentWeaveError) -> ExitCode:
    """Return the exit code of a command that ended with ``error``."""
    if isinstance(error, CallRefusedError):
        return _refusal_code(error)
    if isinstance(error, WorkerError):
        known = {int(ExitCode.USAGE), int(ExitCode.UNREACHABLE)}
        return ExitCode(error.exit_code) if error.exit_code in known else ExitCode.FAILED
    if isinstance(error, BusError) and _shut_out(error):
        return ExitCode.DENIED
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILED)


def _shut_out(error: BaseException | None) -> bool:
    """Say whether the broker was reached and did not let this identity in: it has no user there."""
    while error is not None:
        # By name: the library takes long to import, which asking for help must not wait for.
        of_the_library = type(error).__module__.partition(".")[0] == "nats"
        if of_the_library and any(word in str(error).lower() for word in _SHUT_OUT):
            return True
        error = error.__cause__
    return False


def _refusal_code(error: CallRefusedError) -> ExitCode:
    if error.retry_after is not None:
        return ExitCode.UNREACHABLE
    if error.step in _USAGE_STEPS and error.reason != _NOT_TOLD:
        return ExitCode.USAGE
    return ExitCode.DENIED


def message_of(error: AgentWeaveError) -> str:
    """Return what to tell a person about ``error``: what happened, and the way on."""
    audit_id = getattr(error, "audit_id", "")
    text = str(error)
    if audit_id and exit_code_of(error) in (ExitCode.DENIED, ExitCode.USAGE):
        text += f"\n  The whole story: agentweave why {audit_id}"
    if isinstance(error, BusError) and _shut_out(error):
        text += (
            "\n  The broker does not let this identity in: no grant or stack names it, or it is revoked."
            " Look with: agentweave doctor"
        )
    return text


def single_error(error: BaseException) -> BaseException:
    """Return what a group of one holds, as deep as that goes; anything else as it is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
