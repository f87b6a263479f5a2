"""Answering calls with spans around them: the call as a whole, and the sending of its reply."""

from __future__ import annotations

from typing import Any

from nats.aio.msg import Msg

from agentweave_bus.bus.admission import AdmissionRefusedError, Admitted
from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.reception import Described, current_reception, received
from agentweave_bus.bus.responder import Responder
from agentweave_bus.envelope import OpenedEnvelope
from agentweave_bus.observability.conventions import CALLER, OTHER_METHOD, TASK_ID, call_attributes
from agentweave_bus.observability.spans import inner_span
from agentweave_bus.observability.tracing import Tracing

__all__ = ["TracedResponder"]


class TracedResponder(Responder):
    """Serves the calls of one agent, with spans; see :class:`Responder`."""

    def __init__(self, *, tracing: Tracing, **parts: Any) -> None:
        super().__init__(**parts)
        self._tracing = tracing

    async def _answer(self, session: Session, message: Msg) -> None:
        with received(self._tracing, "server", self._described):
            await super()._answer(session, message)

    async def _reply(
        self, session: Session, admitted: Admitted, result: dict[str, Any], began: float
    ) -> None:
        with inner_span("reply"):
            await super()._reply(session, admitted, result, began)
        if result["status"] == "failed" and (reception := current_reception()) is not None:
            reception.failed("failed")

    async def _refuse(self, session: Session, refusal: AdmissionRefusedError) -> None:
        with inner_span("reply"):
            await super()._refuse(session, refusal)

    def _described(self, request: OpenedEnvelope, capability: str | None) -> Described:
        attributes = call_attributes(str(self._me), capability)
        attributes[CALLER] = str(request.head.iss)
        attributes[TASK_ID] = request.head.id
        return Described(str(attributes["rpc.method"]) if capability else OTHER_METHOD, attributes)
