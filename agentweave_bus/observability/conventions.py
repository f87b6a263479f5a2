"""What spans are called and what they say, by OpenTelemetry's semantic conventions 1.44.

A call is a remote procedure call (``rpc.*``), whose method is the agent's SPIFFE ID and the capability; tasks
and events are messages (``messaging.*``), whose destination is the subject. What the conventions have no name
for begins with ``agentweave.``. Values are ids, names and sizes; never payloads, nor texts of errors or of
policies, which may quote them.
"""

from __future__ import annotations

from typing import Final

from agentweave_bus.observability.spans import AttributeValue, Span

__all__ = [
    "ATTEMPT",
    "AUDIT_ID",
    "CALLER",
    "OTHER_METHOD",
    "TASK_ID",
    "Attributes",
    "call_attributes",
    "describe_sending",
    "handler_attributes",
    "message_attributes",
]

Attributes = dict[str, AttributeValue]

OTHER_METHOD: Final = "_OTHER"
"""Stands for a method that nobody has declared, so that inventing names makes no new ones here."""

AUDIT_ID: Final = "agentweave.audit_id"
TASK_ID: Final = "agentweave.task.id"
CALLER: Final = "agentweave.caller"
ATTEMPT: Final = "agentweave.attempt"


def handler_attributes(function: str, task_id: str, attempt: int | None) -> Attributes:
    """Return what the span of a handler says; ``function`` is its name in the code."""
    attributes: Attributes = {"code.function.name": function, TASK_ID: task_id}
    return attributes if attempt is None else {**attributes, ATTEMPT: attempt}


def call_attributes(agent: str, capability: str | None) -> Attributes:
    """Return what the span of a call to ``agent`` says; ``None`` for a capability that is not known."""
    return {
        "rpc.system.name": "agentweave",
        "rpc.method": OTHER_METHOD if capability is None else f"{agent}/{capability}",
        "server.address": agent,
    }


def message_attributes(
    operation: str, *, sends: bool, subject: str, message_id: str, body_bytes: int
) -> Attributes:
    """Return what the span says in which a task or an event is sent, or processed.

    ``operation`` is what this package calls that; ``subject`` is where the message travels or is stored.
    """
    return {
        "messaging.system": "nats",
        "messaging.operation.name": operation,
        "messaging.operation.type": "send" if sends else "process",
        "messaging.destination.name": subject,
        "messaging.message.id": message_id,
        "messaging.message.body.size": body_bytes,
    }


def describe_sending(
    span: Span, operation: str, subject: str, message_id: str, body_bytes: int, *, named: bool
) -> None:
    """Describe the span of a task or an event that is sent; its subject names it only if it is ``named``."""
    if named:
        span.rename(f"{operation} {subject}")
    for name, value in message_attributes(
        operation, sends=True, subject=subject, message_id=message_id, body_bytes=body_bytes
    ).items():
        span.set_attribute(name, value)
