"""Processing deliveries with a span around each: from the queue's handing it out until it is acknowledged.

A task or an event that is given out again, after a failure or the loss of a worker, is processed in another
span below the same sender's, so that all attempts are in one trace.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from agentweave_bus.bus.reception import Described, Describes, received
from agentweave_bus.envelope import OpenedEnvelope
from agentweave_bus.observability.conventions import CALLER, TASK_ID, message_attributes
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.tasks.queue import Delivery

__all__ = ["describe_message", "traced_deliveries"]

_OPERATION = "process"

Perform = Callable[[Delivery], Awaitable[None]]


def traced_deliveries(tracing: Tracing, perform: Perform) -> Perform:
    """Return ``perform`` with a span around it; itself where tracing is off."""
    if not tracing.enabled:
        return perform

    async def traced(delivery: Delivery) -> None:
        describe = describe_message(delivery.subject, delivery.delivered)
        with received(tracing, "consumer", describe):
            await perform(delivery)

    return traced


def describe_message(subject: str, delivered: int | None = None) -> Describes:
    """Return what describes a task or an event that came on ``subject``, for the how many-th time if known.

    Its span is named after the queue or, where a handler takes events of many names, after the handler's
    pattern.
    """

    def describe(request: OpenedEnvelope, capability: str | None) -> Described:
        head = request.head
        attributes = message_attributes(
            _OPERATION, sends=False, subject=subject, message_id=head.id, body_bytes=len(request.payload)
        )
        attributes["messaging.message.envelope.size"] = len(request.frame)
        attributes[CALLER] = str(head.iss)
        attributes[TASK_ID] = head.id
        if delivered is not None:
            attributes["agentweave.delivery"] = delivered
        if capability is None:
            return Described(_OPERATION, attributes)
        destination = subject
        if capability != head.cap:
            destination = attributes["messaging.destination.template"] = capability
        return Described(f"{_OPERATION} {destination}", attributes)

    return describe
