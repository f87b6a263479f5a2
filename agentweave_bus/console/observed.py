"""What the control role tells of queues and records, as it is read here.

It comes signed by the control role, so its form is checked and no more. What is unknown is left out, so that
a console can look at a newer control role.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from agentweave_bus.exceptions import AgentCallError
from agentweave_bus.types import TaskState

__all__ = ["FalseRecord", "ObservedRecord", "Queues", "RecordPage", "read_page", "read_queues"]

_Text = Annotated[str, Field(strict=True, max_length=4_096)]
_Count = Annotated[int, Field(strict=True, ge=0, le=2**63)]


class _Told(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class AskedFor(_Told):
    """Whose approval a task waits for; ``until`` is in milliseconds since the epoch."""

    approvers: tuple[_Text, ...] = ()
    until: _Count | None = None


class ObservedRecord(_Told):
    """A record of a task that the control role found genuine. Times are in milliseconds since the epoch."""

    genuine: Literal[True] = True
    agent: _Text
    sender: _Text
    key: _Text
    capability: _Text | None = None
    id: _Text | None = None
    number: _Count
    epoch: _Count
    state: TaskState
    message: _Text | None = None
    error: _Text | None = None
    retry_at: _Count | None = None
    at: _Count
    stored_at: _Count
    writer: _Text = ""
    digest: _Text = ""
    task: Any = None
    step: _Text | None = None
    undoes: bool | None = None
    redrive: bool | None = None
    asked: AskedFor | None = None
    decided: dict[str, Any] | None = None


class FalseRecord(_Told):
    """What stands in an agent's stream and is no genuine record; ``why`` says what is wrong with it."""

    genuine: Literal[False]
    agent: _Text
    at: _Count = 0
    why: _Text = ""


class RecordPage(_Told):
    """Some records, in the order in which each agent's stand, and from where on to ask for more."""

    records: tuple[FalseRecord | ObservedRecord, ...]
    after: dict[str, int]
    more: bool = False


class CapabilityQueue(_Told):
    """How many tasks wait for a capability, how many are under way, and how many of those came again."""

    agent: _Text
    capability: _Text
    pending: _Count = 0
    in_flight: _Count = 0
    redelivered: _Count = 0
    workers_waiting: _Count = 0


class ParkedTasks(_Told):
    """How many tasks of an agent are parked until they are due."""

    agent: _Text
    waiting: _Count = 0


class LetterCount(_Told):
    """How many dead letters an agent has."""

    agent: _Text
    count: _Count = 0


class Queues(_Told):
    """All that waits, by agent."""

    queues: tuple[CapabilityQueue, ...] = ()
    parked: tuple[ParkedTasks, ...] = ()
    letters: tuple[LetterCount, ...] = ()


_PAGES: Final = TypeAdapter(RecordPage)
_QUEUES: Final = TypeAdapter(Queues)


def read_page(answer: Any) -> RecordPage:
    """Read the answer to ``observe_records``. Raises AgentCallError for one that is none."""
    try:
        return _PAGES.validate_python(answer)
    except ValidationError as error:
        raise _not_understood("observe_records", error) from error


def read_queues(answer: Any) -> Queues:
    """Read the answer to ``observe_queues``. Raises AgentCallError for one that is none."""
    try:
        return _QUEUES.validate_python(answer)
    except ValidationError as error:
        raise _not_understood("observe_queues", error) from error


def _not_understood(capability: str, error: ValidationError) -> AgentCallError:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return AgentCallError(f"the answer to {capability} is not understood: {place}: {first['msg']}")
