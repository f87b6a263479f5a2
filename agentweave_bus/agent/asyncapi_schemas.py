"""The schemas of an AsyncAPI document: of arguments, in AsyncAPI's dialect, and of what all agents share.

AsyncAPI's own schemas are JSON Schema draft 07; pydantic writes draft 2020-12. They differ in the items of a
tuple, and in where definitions are referred to: in this document they are among its components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from agentweave_bus.bus.subjects import MAX_SUBJECT_BYTES
from agentweave_bus.envelope import Kind
from agentweave_bus.tasks.approving import DecisionBody
from agentweave_bus.tasks.controls import CancelBody
from agentweave_bus.tasks.progress import ProgressBody
from agentweave_bus.tasks.record import RecordPayload

__all__ = ["Schemas"]

_DEFINITIONS: Final = "#/$defs/"
_COMPONENTS: Final = "#/components/schemas/"
_LITERAL: Final = frozenset({"const", "default", "enum", "examples"})
_NAMED: Final = frozenset({"properties", "patternProperties", "$defs"})

_TEXT: Final = {"type": "string"}
_TIME: Final = {"type": "integer", "minimum": 0, "description": "milliseconds since 1970-01-01T00:00:00Z"}
_BYTES: Final = {"type": "string", "format": "binary", "description": "32 bytes"}
_SPIFFE_ID: Final = {"type": "string", "format": "uri", "pattern": "^spiffe://", "maxLength": 2048}

_HEAD: Final[dict[str, Any]] = {
    "type": "object",
    "description": "The head of the envelope, which its sender signs. It is in the frame, beside the payload;"
    " NATS headers are not used. docs/wire-format.md says more.",
    "required": ["kind", "id", "iss", "x5t", "aud", "cap", "sub", "iat", "exp", "pd", "ct"],
    "properties": {
        "kind": {"type": "string", "enum": [str(kind) for kind in Kind]},
        "id": {"type": "string", "format": "uuid"},
        "iss": {**_SPIFFE_ID, "description": "the sender"},
        "aud": {**_SPIFFE_ID, "description": "the recipient; of events and records a trust domain"},
        "cap": {"type": "string", "description": "the capability, or the event's name"},
        "sub": {"type": "string", "maxLength": MAX_SUBJECT_BYTES, "description": "the subject it is sent on"},
        "iat": {**_TIME, "title": "issued at"},
        "exp": {**_TIME, "title": "expires at"},
        "nbf": {**_TIME, "title": "not before"},
        "x5t": {**_BYTES, "title": "SHA-256 of the sender's certificate"},
        "pd": {**_BYTES, "title": "SHA-256 of the payload"},
        "ct": {"type": "string", "description": "the payload's content type"},
        "re": {**_BYTES, "title": "digest of the head that this is about"},
        "reply": {"type": "string", "pattern": "^[A-Za-z0-9]{22}$", "description": "where answers go"},
        "idk": {"type": "string", "description": "idempotency key"},
        "prio": {"type": "integer", "minimum": 0, "maximum": 9},
        "prn": {"type": "object", "additionalProperties": _TEXT, "description": "for whom the sender acts"},
        "scope": {"type": "array", "items": _TEXT},
        "seq": {"type": "integer", "minimum": 0},
        "att": {"type": "integer", "minimum": 0},
    },
}

_DATA: Final = {"description": "any JSON value"}
_PART: Final[dict[str, Any]] = {
    "oneOf": [
        {
            "type": "object",
            "required": ["type", "data"],
            "additionalProperties": False,
            "properties": {"type": {"const": "data"}, "data": _DATA},
        },
        {
            "type": "object",
            "required": ["type", "text"],
            "additionalProperties": False,
            "properties": {"type": {"const": "text"}, "text": _TEXT},
        },
    ]
}
_RESULT: Final[dict[str, Any]] = {
    "type": "object",
    "description": "What a capability answers. What its handler returns is the data of the first data part.",
    "required": ["status"],
    "additionalProperties": False,
    "properties": {
        "status": {"type": "string", "enum": ["completed", "failed"]},
        "messages": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["role", "parts"],
                "additionalProperties": False,
                "properties": {
                    "role": {"type": "string", "enum": ["assistant", "user"]},
                    "parts": {"type": "array", "items": _PART},
                },
            },
        },
        "artifacts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "data"],
                "additionalProperties": False,
                "properties": {"type": _TEXT, "data": _DATA, "name": _TEXT, "description": _TEXT},
            },
        },
        "error": {"type": "string"},
    },
}
_REFUSAL: Final[dict[str, Any]] = {
    "type": "object",
    "description": "Why a request was not admitted; nothing has run.",
    "required": ["step", "reason", "audit_id"],
    "additionalProperties": False,
    "properties": {
        "step": {"type": "string", "description": "the admission step"},
        "reason": _TEXT,
        "audit_id": {"type": "string", "description": "in the agent's audit log"},
        "retry_after": {"type": "number", "minimum": 0, "description": "seconds after which to ask again"},
    },
}
_SHARED: Final[dict[str, Any]] = {"head": _HEAD, "result": _RESULT, "refusal": _REFUSAL}
_BODIES: Final[dict[str, type[BaseModel]]] = {
    "record": RecordPayload,
    "progress": ProgressBody,
    "cancel": CancelBody,
    "decision": DecisionBody,
}


class Schemas:
    """The schemas of one document, by their names in its components."""

    def __init__(self) -> None:
        self.all: dict[str, Any] = dict(_SHARED)
        for name, body in _BODIES.items():
            self.add(name, body.model_json_schema())

    def add(self, name: str, schema: Mapping[str, Any]) -> None:
        """Add a schema that pydantic wrote, and its definitions as ``<name>.<definition>``."""
        self.all[name] = _translated({key: part for key, part in schema.items() if key != "$defs"}, name)
        for definition, part in schema.get("$defs", {}).items():
            self.all[f"{name}.{definition}"] = _translated(part, name)


def _translated(schema: Any, name: str) -> Any:
    if isinstance(schema, list):
        return [_translated(one, name) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {}
    for key, value in schema.items():
        if key in _LITERAL:
            made[key] = value
        elif key in _NAMED:
            made[key] = {one: _translated(part, name) for one, part in value.items()}
        elif key == "$ref":
            made[key] = value.replace(_DEFINITIONS, f"{_COMPONENTS}{name}.")
        else:
            made[key] = _translated(value, name)
    if "prefixItems" in made:
        rest = made.pop("items", None)
        made["items"] = made.pop("prefixItems")
        if rest is not None:
            made["additionalItems"] = rest
    return made
