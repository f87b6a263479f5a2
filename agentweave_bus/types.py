"""The plain values that travel between agents: tasks, results, messages, parts, cards.

They are frozen dataclasses that know their own JSON form and nothing else: no signature, no broker, no
policy. ``to_json()`` writes exactly what ``from_json()`` reads, and both are strict. Writing refuses
what is no JSON value; reading refuses unknown keys, missing keys and wrong types, and names the place
(``messages[0].parts[1].text``). Turning a ``Decimal`` or a ``datetime`` into JSON is the business of the
agent that returns it (:meth:`TaskResult.converted`), so that one conversion serves all.
"""

from __future__ import annotations

import difflib
import math
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, NotRequired, Self, TypeAlias, TypedDict, cast

from agentweave_bus.exceptions import PayloadError

__all__ = [
    "AgentCard",
    "Artifact",
    "Capability",
    "DataPart",
    "JsonValue",
    "Message",
    "Part",
    "ResultStatus",
    "Task",
    "TaskResult",
    "TaskState",
    "TextPart",
]

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
"""What JSON can say (RFC 8259), as Python values."""

_set: Final = object.__setattr__
"""Sets what is frozen, while it is made: once each, for each call makes several of these."""

_MAX_NESTING: Final = 64  # of what is written here; the envelope's own, lower bound is checked there


class TaskState(StrEnum):
    """The states of a task, as A2A 1.0 names them. Each equals its text: ``state == "working"``."""

    SUBMITTED = "submitted"
    WORKING = "working"
    INPUT_REQUIRED = "input_required"
    AUTH_REQUIRED = "auth_required"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"
    REJECTED = "rejected"

    @property
    def terminal(self) -> bool:
        """Whether a task in this state changes no more."""
        return self in _TERMINAL


_TERMINAL: Final = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELED, TaskState.REJECTED})


class ResultStatus(StrEnum):
    """How a capability ended. Each equals its text: ``result.status == "completed"``.

    ``degraded`` says that the answer stands but something behind it is unwell. It is for the agent's
    own eyes: on the wire it is written as ``completed``.
    """

    COMPLETED = "completed"
    FAILED = "failed"
    DEGRADED = "degraded"


_STATUSES: Final = {str(status): status for status in ResultStatus}
_WIRE_FORM: Final[Mapping[str, str]] = {
    ResultStatus.COMPLETED: "completed",
    ResultStatus.FAILED: "failed",
    ResultStatus.DEGRADED: "completed",
}


class Artifact(TypedDict):
    """A product of a task: a plain dict, so ``result.artifacts[0]["data"]`` reads its content.

    ``type`` says what it is in the agent's own words; ``data`` is any JSON value.
    """

    type: str
    data: Any
    name: NotRequired[str]
    description: NotRequired[str]


@dataclass(frozen=True, slots=True)
class DataPart:
    """A part of a message that holds ``data``, any JSON value."""

    data: Any

    @property
    def type(self) -> str:
        """``"data"``, as in the part's JSON."""
        return "data"

    def to_json(self) -> dict[str, Any]:
        """Return ``{"type": "data", "data": …}``.

        Raises:
            PayloadError: ``data`` is no JSON value; the message names the place.

        """
        _check_json(self.data, "data")
        return {"type": "data", "data": self.data}


@dataclass(frozen=True, slots=True)
class TextPart:
    """A part of a message that holds text for a person or a language model."""

    text: str

    def __post_init__(self) -> None:
        _expect(self.text, str, "text")

    @property
    def type(self) -> str:
        """``"text"``, as in the part's JSON."""
        return "text"

    def to_json(self) -> dict[str, Any]:
        """Return ``{"type": "text", "text": …}``."""
        return {"type": "text", "text": self.text}


Part: TypeAlias = DataPart | TextPart

_ROLES: Final = ("assistant", "user")


@dataclass(frozen=True, slots=True, init=False)
class Message:
    """What one side says: ``role`` is ``assistant`` (the agent) or ``user`` (who asked).

    Raises:
        PayloadError: the role is another, or a part is no :class:`DataPart` or :class:`TextPart`.

    """

    role: str
    parts: Sequence[Part] = ()

    def __init__(self, role: str, parts: Sequence[Part] = ()) -> None:
        _one_of(role, _ROLES, "role")
        _set(self, "role", role)
        _set(self, "parts", _instances(parts, (DataPart, TextPart), "parts"))

    def to_json(self) -> dict[str, Any]:
        """Return ``{"role": …, "parts": […]}``.

        Raises:
            PayloadError: a data part holds what is no JSON value.

        """
        return {"role": str(self.role), "parts": _written(self.parts, "parts")}

    @classmethod
    def from_json(cls, value: Any, *, where: str = "message") -> Self:
        """Read what :meth:`to_json` wrote; a :class:`PayloadError` names the place below ``where``."""
        fields = _keys(value, where, required=("role", "parts"))
        parts = _items(fields["parts"], f"{where}.parts")
        _one_of(fields["role"], _ROLES, f"{where}.role")
        return cls(fields["role"], [_part(part, where, i) for i, part in enumerate(parts)])


@dataclass(frozen=True, slots=True, init=False)
class TaskResult:
    """What a capability answers.

    ``status`` is ``completed``, ``failed`` or ``degraded`` and compares equal to those strings;
    ``error`` says to the caller what went wrong. Where no ``artifacts`` are given they follow from the
    data parts of the messages, one each, as ``{"type": "data", "data": …}``.

    Raises:
        PayloadError: the status or an artifact is malformed; the message names it.

    """

    status: str
    messages: Sequence[Message] = ()
    artifacts: Sequence[Mapping[str, Any]] = ()
    error: str | None = None

    def __init__(
        self,
        status: str,
        messages: Sequence[Message] = (),
        artifacts: Sequence[Mapping[str, Any]] = (),
        error: str | None = None,
    ) -> None:
        _one_of(status, _STATUSES, "status")
        said = _instances(messages, (Message,), "messages")
        given: list[Mapping[str, Any]] = []
        if artifacts != ():
            items = _items(artifacts, "artifacts")
            given = [_artifact(item, f"artifacts[{i}]") for i, item in enumerate(items)]
        if error is not None:
            _expect(error, str, "error")
        _set(self, "status", _STATUSES[status])
        _set(self, "messages", said)
        _set(self, "artifacts", given or _artifacts_of(said))
        _set(self, "error", error)

    @property
    def data(self) -> Any:
        """The first artifact's data, or ``None``: what most callers are after."""
        return self.artifacts[0]["data"] if self.artifacts else None

    def converted(self, convert: Callable[[Any], JsonValue]) -> TaskResult:
        """Return the same result with every piece of data passed through ``convert``."""
        messages = [replace(m, parts=[_converted(p, convert) for p in m.parts]) for m in self.messages]
        artifacts = [{**item, "data": convert(item["data"])} for item in self._own_artifacts()]
        return replace(self, messages=messages, artifacts=artifacts)

    def to_json(self, *, full: bool = False) -> dict[str, Any]:
        """Return the JSON form: ``status``, ``messages``, ``artifacts``, ``error``.

        Artifacts that only repeat the data parts are left out, since :meth:`from_json` finds them again;
        ``full`` writes them all the same, for readers who are not this class.

        Raises:
            PayloadError: some data is no JSON value; the message names the place.

        """
        wire: dict[str, Any] = {
            "status": _WIRE_FORM[self.status],
            "messages": _written(self.messages, "messages"),
        }
        artifacts = self.artifacts if full else self._own_artifacts()
        if artifacts:
            _check_json(artifacts, "artifacts")
            wire["artifacts"] = [dict(item) for item in artifacts]
        if self.error is not None:
            wire["error"] = self.error
        return wire

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what :meth:`to_json` wrote; raises :class:`PayloadError` for anything else."""
        fields = _keys(value, "result", required=("status",), optional=("messages", "artifacts", "error"))
        _one_of(fields["status"], _WIRE_STATUSES, "result.status")
        messages = _items(fields.get("messages", []), "result.messages")
        return cls(
            status=fields["status"],
            messages=[Message.from_json(m, where=f"messages[{i}]") for i, m in enumerate(messages)],
            artifacts=_items(fields["artifacts"], "result.artifacts") if "artifacts" in fields else (),
            error=fields.get("error"),
        )

    def _own_artifacts(self) -> Sequence[Mapping[str, Any]]:
        return () if self.artifacts == _artifacts_of(self.messages) else self.artifacts


_WIRE_STATUSES: Final = ("completed", "failed")


@dataclass(frozen=True, slots=True)
class Task:
    """A unit of work to ask for: the capability's name as ``type``, its arguments as ``payload``."""

    type: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def to_json(self) -> dict[str, Any]:
        """Return ``{"id": …, "type": …, "payload": …}``.

        Raises:
            PayloadError: the payload is no JSON object.

        """
        _check_json(self.payload, "payload")
        return {"id": self.id, "type": self.type, "payload": dict(self.payload)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what :meth:`to_json` wrote; raises :class:`PayloadError` for anything else."""
        fields = _keys(value, "task", required=("id", "type", "payload"))
        _expect(fields["id"], str, "task.id")
        _expect(fields["type"], str, "task.type")
        _expect(fields["payload"], dict, "task.payload")
        return cls(type=fields["type"], payload=fields["payload"], id=fields["id"])


_JSON_MODES: Final = ("application/json",)


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that an agent can be asked for, as its card lists it.

    ``input_modes`` and ``output_modes`` are media types; ``schema`` is the JSON schema of the arguments.
    """

    name: str
    description: str = ""
    input_modes: Sequence[str] = _JSON_MODES
    output_modes: Sequence[str] = _JSON_MODES
    schema: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; ``schema`` only where there is one."""
        wire: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "input_modes": list(self.input_modes),
            "output_modes": list(self.output_modes),
        }
        if self.schema is not None:
            _check_json(self.schema, "schema")
            wire["schema"] = dict(self.schema)
        return wire

    @classmethod
    def from_json(cls, value: Any, *, where: str = "capability") -> Self:
        """Read what :meth:`to_json` wrote; a :class:`PayloadError` names the place below ``where``."""
        optional = ("description", "input_modes", "output_modes", "schema")
        fields = dict(_keys(value, where, required=("name",), optional=optional))
        for key in ("name", "description"):
            _expect(fields.get(key, ""), str, f"{where}.{key}")
        for key in ("input_modes", "output_modes"):
            fields[key] = tuple(_texts(fields.get(key, list(_JSON_MODES)), f"{where}.{key}"))
        if fields.get("schema") is not None:
            _expect(fields["schema"], dict, f"{where}.schema")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class AgentCard:
    """Who an agent is and what it can be asked for."""

    name: str
    description: str
    spiffe_id: str
    capabilities: Sequence[Capability] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, with each capability's."""
        return {
            "name": self.name,
            "description": self.description,
            "spiffe_id": str(self.spiffe_id),
            "capabilities": [capability.to_json() for capability in self.capabilities],
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what :meth:`to_json` wrote; raises :class:`PayloadError` for anything else."""
        required = ("name", "description", "spiffe_id", "capabilities")
        fields = dict(_keys(value, "card", required=required))
        for key in required[:3]:
            _expect(fields[key], str, f"card.{key}")
        items = _items(fields.pop("capabilities"), "card.capabilities")
        read = [Capability.from_json(c, where=f"capabilities[{i}]") for i, c in enumerate(items)]
        return cls(**fields, capabilities=read)


# --- checks that name the place ------------------------------------------------------------------


def _artifacts_of(messages: Iterable[Message]) -> list[Mapping[str, Any]]:
    return [
        {"type": "data", "data": part.data}
        for message in messages
        for part in message.parts
        if isinstance(part, DataPart)
    ]


def _converted(part: Part, convert: Callable[[Any], JsonValue]) -> Part:
    return DataPart(convert(part.data)) if isinstance(part, DataPart) else part


def _artifact(value: Any, where: str) -> Artifact:
    fields = dict(_keys(value, where, required=("type", "data"), optional=("name", "description")))
    for key in ("type", "name", "description"):
        if key in fields:
            _expect(fields[key], str, f"{where}.{key}")
    return cast("Artifact", fields)


_DATA_KEYS: Final = frozenset({"type", "data"})


def _part(value: Any, message: str, index: int) -> Part:
    if type(value) is dict and value.keys() == _DATA_KEYS and value["type"] == "data":
        return DataPart(value["data"])  # most are; of others it is worked out where they stand
    where = f"{message}.parts[{index}]"
    kind = value.get("type") if isinstance(value, dict) else None
    _one_of(kind, ("data", "text"), f"{where}.type")
    fields = _keys(value, where, required=("type", cast("str", kind)))
    if kind == "data":
        return DataPart(fields["data"])
    _expect(fields["text"], str, f"{where}.text")
    return TextPart(fields["text"])


def _keys(
    value: Any, where: str, *, required: Sequence[str], optional: Sequence[str] = ()
) -> Mapping[str, Any]:
    _expect(value, dict, where)
    fields: Mapping[str, Any] = value
    for key in required:
        if key not in fields:
            raise PayloadError(f"{where}: {key!r} is missing")
    if len(fields) == len(required):
        return fields
    allowed = (*required, *optional)
    for key in fields:
        if key not in allowed:
            raise PayloadError(f"{where}: {key!r:.80} is no known key; use {', '.join(allowed)}")
    return fields


def _expect(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        raise PayloadError(f"{where} must be a {kind.__name__}, not {type(value).__name__}")


def _one_of(value: Any, allowed: Collection[str], where: str) -> None:
    if isinstance(value, str) and value in allowed:
        return
    near = difflib.get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    hint = f" (did you mean {str(near[0])!r}?)" if near else ""
    raise PayloadError(f"{where} must be one of {', '.join(allowed)}, not {value!r:.80}{hint}")


def _items(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise PayloadError(f"{where} must be a list, not {type(value).__name__}")
    return list(value)


def _texts(value: Any, where: str) -> list[str]:
    items = _items(value, where)
    for i, item in enumerate(items):
        _expect(item, str, f"{where}[{i}]")
    return items


def _instances(value: Any, kinds: tuple[type, ...], where: str) -> list[Any]:
    items = _items(value, where)
    for i, item in enumerate(items):
        if not isinstance(item, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise PayloadError(f"{where}[{i}] must be a {names}, not {type(item).__name__}")
    return items


def _written(items: Sequence[Part | Message], where: str) -> list[dict[str, Any]]:
    """Write each of ``items``; an error's place begins with ``where`` and the item's number."""
    written: list[dict[str, Any]] = []
    try:
        for item in items:
            written.append(item.to_json())  # noqa: PERF401 - their number says which one failed
    except PayloadError as error:
        raise PayloadError(f"{where}[{len(written)}].{error}") from None
    return written


_PLAIN: Final = frozenset({str, int, bool, type(None)})
"""The types of JSON whose every value is one of JSON."""


def _check_json(value: Any, where: str) -> None:
    """Refuse what is no JSON value. The place is worked out only when there is something to say."""
    if not _is_json(value, 0):
        _say_where(value, where, 0)


def _is_json(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if depth >= _MAX_NESTING:
        return _is_scalar(value)
    items: Iterable[Any]
    if kind is dict or isinstance(value, Mapping):
        for key in value:  # loops take half the time of all() here
            if not isinstance(key, str):
                return False
        items = value.values()
    elif kind is list or isinstance(value, (list, tuple)):
        items = value
    else:
        return _is_scalar(value)
    for item in items:  # noqa: SIM110 - as above
        if type(item) not in _PLAIN and not _is_json(item, depth + 1):
            return False
    return True


def _say_where(value: Any, where: str, depth: int) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _expect(key, str, f"each key of {where}")
            _say_where(item, f"{where}.{key}", _below(depth, where))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _say_where(item, f"{where}[{i}]", _below(depth, where))
    elif not _is_scalar(value):
        raise PayloadError(f"{where} is no JSON value but {_described(value)}")


def _below(depth: int, where: str) -> int:
    if depth >= _MAX_NESTING:
        raise PayloadError(f"{where:.80} is nested deeper than {_MAX_NESTING}")
    return depth + 1


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))


def _described(value: Any) -> str:
    name = type(value).__name__
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    return str(value) if isinstance(value, float) else f"{article} {name}"
