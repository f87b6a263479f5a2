"""What stands in front of one agent's handlers: the gates for calls, tasks and events, and who answers calls.

Where tracing is on, they are those with spans around them; they decide nothing else and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from agentweave_bus.agent import BoundCapability
from agentweave_bus.bus.admission import Admission
from agentweave_bus.bus.claims import Claims
from agentweave_bus.bus.event_admission import EventAdmission
from agentweave_bus.bus.occupancy import Occupancy
from agentweave_bus.bus.responder import Dispatch, Responder
from agentweave_bus.bus.traced_admission import TracedAdmission, TracedEventAdmission
from agentweave_bus.bus.traced_responder import TracedResponder
from agentweave_bus.runtime.wiring import Connected

__all__ = ["Gates", "gates"]


class Gates(NamedTuple):
    """The gates of one agent; they share the places in which its callers are handled."""

    admission: Admission
    """For calls and tasks."""
    events: EventAdmission
    responder: Responder
    """Lets calls through the first and answers them."""
    claims: Claims


def gates(parts: Connected, table: Mapping[str, BoundCapability], dispatch: Dispatch) -> Gates:
    """Put gates in front of the capabilities in ``table``, whose calls ``dispatch`` runs."""
    claims = Claims(parts.me, parts.keeper)
    bus = parts.config.bus
    occupancy = Occupancy(bus.max_in_flight, bus.max_in_flight_bytes)
    gate: dict[str, Any] = {
        "me": parts.me,
        "verifier": parts.verifier,
        "capabilities": table,
        "authorizer": parts.authorizer,
        "audit": parts.audit,
        "claims": claims,
        "occupancy": occupancy,
        "metrics": parts.metrics,
        "clock_ms": parts.surroundings.clock_ms,
    }
    answering: dict[str, Any] = {
        "me": parts.me,
        "capabilities": table,
        "dispatch": dispatch,
        "sealer": parts.sealer,
        "audit": parts.audit,
        "metrics": parts.metrics,
        "clock_ms": parts.surroundings.clock_ms,
        "taken_in": occupancy.taken_in,
        "queued_bytes": occupancy.max_bytes,
    }
    blobs, tracing = parts.desk.blobs, parts.tracing
    if tracing.enabled:
        admission: Admission = TracedAdmission(**gate, blobs=blobs, tracing=tracing)
        events: EventAdmission = TracedEventAdmission(**gate, tracing=tracing)
        responder: Responder = TracedResponder(**answering, admission=admission, tracing=tracing)
    else:
        admission, events = Admission(**gate, blobs=blobs), EventAdmission(**gate)
        responder = Responder(**answering, admission=admission)
    return Gates(admission, events, responder, claims)
