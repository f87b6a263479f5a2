"""When a task is due and until when it may be begun, from what its submitter says."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple, Protocol

from agentweave_bus.envelope import DEFAULT_LIMITS
from agentweave_bus.exceptions import CallRefusedError, ConfigurationError
from agentweave_bus.tasks.recurrence import recurrence

__all__ = ["DEFAULT_TASK_SECONDS", "TaskTimes", "milliseconds_of", "task_times"]

DEFAULT_TASK_SECONDS: Final = 86_400.0
"""How long a task may wait and run, in seconds, where its submitter does not say: a day."""

_LONGEST_MS: Final = DEFAULT_LIMITS.max_lifetime_ms
_LONGEST_S: Final = _LONGEST_MS / 1000
_PAST_MS: Final = 60_000
"""So long ago a task may have been due: who computed its time was slow, and did not mistype it."""


class SaidOfTimes(Protocol):
    """What a submitter may say about times; see ``client.TaskOptions``."""

    @property
    def deadline(self) -> float | None:
        """Until when it may be begun, in seconds from when it is due."""

    @property
    def delay(self) -> float | None:
        """When it is due, in seconds from now."""

    @property
    def at(self) -> datetime | None:
        """When it is due, as a time."""

    @property
    def every(self) -> str | None:
        """When it comes again."""


class TaskTimes(NamedTuple):
    """Milliseconds since the epoch. Without ``due_ms`` it is due now, and goes to the queue at once."""

    due_ms: int | None
    expires_ms: int


def task_times(said: SaidOfTimes, now_ms: int) -> TaskTimes:
    """Return the times of a task that is submitted at ``now_ms``.

    A recurring one that does not say when it is due is due first when its time comes up first: a period from
    now, or as its fields say. Its end is its deadline, at most and by default 31 days from now.

    Raises:
        CallRefusedError: they are none, contradict each other, or lie too far ahead.

    """
    deadline_s = said.deadline
    if deadline_s is None:
        deadline_s = DEFAULT_TASK_SECONDS if said.every is None else _LONGEST_S
    if not (_is_number(deadline_s) and 0 < deadline_s <= _LONGEST_S):
        raise _refused(
            f"a deadline lies above 0 and at most {_LONGEST_S:.0f} seconds ahead, not {said.deadline!r}"
        )
    due_ms = _due_ms(said, now_ms)
    if due_ms is None:
        return TaskTimes(None, now_ms + int(deadline_s * 1000))
    expires_ms = min(due_ms + int(deadline_s * 1000), now_ms + _LONGEST_MS)
    if due_ms >= expires_ms:
        raise _refused("a task can be due in 31 days at most")
    return TaskTimes(due_ms, expires_ms)


def milliseconds_of(at: datetime) -> int:
    """Return a time, which has its zone, in milliseconds since the epoch."""
    return round(at.timestamp() * 1000)


def _due_ms(said: SaidOfTimes, now_ms: int) -> int | None:
    if said.delay is not None and said.at is not None:
        raise _refused("a task has a delay or a time at which it is due, not both")
    due_ms = None
    if said.delay is not None:
        if not (_is_number(said.delay) and 0 <= said.delay <= _LONGEST_S):
            raise _refused(f"a delay is 0 to {_LONGEST_S:.0f} seconds, not {said.delay!r}")
        due_ms = now_ms + int(said.delay * 1000)
    elif said.at is not None:
        if said.at.tzinfo is None:
            raise _refused("the time at which a task is due is a datetime with its time zone")
        due_ms = milliseconds_of(said.at)
        if due_ms < now_ms - _PAST_MS:
            raise _refused(f"{said.at.isoformat()} is past: leave it out for a task that is due now")
    if said.every is None:
        return due_ms if due_ms is not None and due_ms > now_ms else None
    try:
        # Of a period the first time is now, or what was said, so that the next is a period later.
        begin_ms = now_ms if due_ms is None else max(now_ms, due_ms)
        times = recurrence(said.every, begin_ms)
    except ConfigurationError as error:
        raise _refused(str(error)) from error
    first_ms = times.next_after(begin_ms if due_ms is None else begin_ms - 1)
    assert first_ms is not None  # the recurrence was checked
    return first_ms


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refused(reason: str) -> CallRefusedError:
    return CallRefusedError(reason, step="local", reason=reason)
