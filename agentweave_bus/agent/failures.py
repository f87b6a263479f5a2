"""What a failure of a handler means: what its caller learns, and whether a task may be tried again."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agentweave_bus.exceptions import (
    CallRefusedError,
    CallTimeoutError,
    CircuitOpenError,
    RetryableError,
    StepFailedError,
    UnreachableError,
)
from agentweave_bus.types import TaskResult

__all__ = [
    "NO_FAILURE",
    "Again",
    "being_cancelled",
    "broken",
    "correlation_id",
    "failed",
    "may_be_retried",
    "words_of",
]

NO_FAILURE: Final = (KeyboardInterrupt, GeneratorExit)
"""What may come out of a handler and is none of its own: the end of the process, or of the coroutine.

All else is its failure, ``SystemExit`` included: no handler ends a worker that others work in.
"""

_PASSING = (RetryableError, CallTimeoutError, UnreachableError)


@dataclass(frozen=True, slots=True)
class Again:
    """That something may be tried again, and not before ``after`` seconds where that is known."""

    after: float | None = None


def may_be_retried(error: BaseException) -> Again | None:
    """Return whether what failed with ``error`` may succeed later; ``None`` when it may not.

    It may after a :class:`RetryableError`, after a nested call without an answer or that reached nobody
    (:class:`CallTimeoutError`, :class:`UnreachableError`), and after a refusal that says when to come
    again. A group may when everything in it may. Nothing else may: not a failure that was meant, a
    denial, wrong arguments, or an error that nobody thought of.
    """
    waits = [_wait(leaf) for leaf in _leaves(error)]
    if not waits or None in waits:
        return None
    return Again(max((one.after for one in waits if one and one.after is not None), default=None))


def _wait(error: BaseException) -> Again | None:
    if isinstance(error, CallRefusedError):
        return None if error.retry_after is None else Again(error.retry_after)
    if not isinstance(error, _PASSING):
        return None
    return Again(error.retry_after if isinstance(error, (RetryableError, CircuitOpenError)) else None)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for inner in error.exceptions:
        yield from _leaves(inner)


def being_cancelled() -> bool:
    """Return whether somebody wants the current task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def correlation_id(error: BaseException | None = None) -> str:
    """Return an id that links what the caller is told with what the log holds: fresh, or a failed step's."""
    return error.correlation_id if isinstance(error, StepFailedError) else secrets.token_hex(8)


def words_of(error: BaseException) -> str:
    """Return what an error says, as text that can be written down whatever it is."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - whatever it is, it is the handler's
        text = type(error).__name__
    return text.encode(errors="replace").decode()


def broken(number: str) -> TaskResult:
    """Return the failed result of which the caller learns nothing but ``number``, a correlation id."""
    return failed(f"internal error; correlation id {number}")


def failed(error: str) -> TaskResult:
    """Return a failed result with ``error`` for the caller."""
    return TaskResult(status="failed", error=error)
