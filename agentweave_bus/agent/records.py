"""What is written down of a durable step, and where: a set-once store that others implement."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

from agentweave_bus.agent.failures import correlation_id, words_of
from agentweave_bus.envelope.codec import to_json_value
from agentweave_bus.exceptions import AgentWeaveError, PayloadError, StepFailedError
from agentweave_bus.types import JsonValue

__all__ = ["StepRecord", "StepStore", "failure_record", "shown_failure", "told_again"]

_OURS: Final = AgentWeaveError.__module__


@dataclass(frozen=True, slots=True)
class StepRecord:
    """How a step ended: with ``value``, a JSON value, or else with ``error``, a JSON object."""

    value: JsonValue = None
    error: Mapping[str, JsonValue] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return ``{"value": …}`` or ``{"error": {…}}``."""
        return {"value": self.value} if self.error is None else {"error": dict(self.error)}

    @classmethod
    def from_json(cls, value: JsonValue) -> Self:
        """Read what :meth:`to_json` wrote; raises :class:`PayloadError` for anything else."""
        if isinstance(value, dict):
            if value.keys() == {"value"}:
                return cls(value["value"])
            error = value.get("error")
            if value.keys() == {"error"} and isinstance(error, dict):
                return cls(None, error)
        raise PayloadError('a step\'s record is {"value": …} or {"error": {…}}')


class StepStore(Protocol):
    """Where one task's steps are written down; each name once, for all attempts of the task.

    A name is text of at most 128 printable characters, of which ``:`` marks those that are not an
    author's. Any error but :class:`PayloadError` stops the attempt, with nothing decided: it is raised
    from :meth:`~agentweave_bus.agent.dispatch.BoundCapability.attempt`.
    """

    async def load(self, name: str) -> StepRecord | None:
        """Return what was saved under ``name``; ``None`` if nothing was."""

    async def confirm(self) -> None:
        """Make sure, just before a step's function runs, that this attempt still has the task.

        A worker that stood still for a while may have lost it without knowing, and the step may be on
        record by now.

        Raises:
            AttemptLostError: another attempt has begun, or the task has ended.

        """

    async def save(self, name: str, record: StepRecord) -> StepRecord:
        """Write ``record`` under ``name``, which nothing stands under, and return what stands there now.

        Raises:
            AttemptLostError: another attempt wrote there, so it has the task.
            PayloadError: the record can't be stored: it is too large.

        """


def failure_record(error: AgentWeaveError) -> StepRecord:
    """Return the record of a step that ended with ``error``."""
    attributes: dict[str, JsonValue] = dict(_attributes(error))
    return StepRecord(
        error={"type": _our_class(error).__name__, "message": words_of(error), "attributes": attributes}
    )


def shown_failure(error: Exception, step: str) -> AgentWeaveError:
    """Return what a handler sees of ``error``, raised by a step's function: the same as in a replay.

    An error of this package is seen as it is, one derived from it as what it derives from. Any other
    becomes a :class:`StepFailedError` with a fresh correlation id.
    """
    if isinstance(error, AgentWeaveError):
        return error if type(error).__module__ == _OURS else told_again(failure_record(error), step)
    number = correlation_id()
    return StepFailedError(
        f"step {step!r} failed: internal error; correlation id {number}", step=step, correlation_id=number
    )


def told_again(record: StepRecord, step: str) -> AgentWeaveError:
    """Return the error of a recorded failure, as :func:`shown_failure` returned it then."""
    error = record.error or {}
    kind = getattr(sys.modules[_OURS], str(error.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, AgentWeaveError)):
        kind = AgentWeaveError  # a newer version's
    again = kind.__new__(kind)
    Exception.__init__(again, str(error.get("message", f"step {step!r} failed")))
    attributes = error.get("attributes")
    if isinstance(attributes, dict):
        vars(again).update(attributes)
    return again


def _attributes(error: AgentWeaveError) -> Iterator[tuple[str, JsonValue]]:
    for name, value in vars(error).items():
        with suppress(PayloadError):  # what a derived error carries need not have a JSON form
            yield name, to_json_value(value)


def _our_class(error: AgentWeaveError) -> type[BaseException]:
    return next(kind for kind in type(error).__mro__ if kind.__module__ == _OURS)
