"""Cancelling: the control ``cancel``, as it is said and as it is heard.

Who may: the task's own sender, who is known by the key that follows from ``iss``; or whom the policy allows
``control:cancel``. A task that runs here is cancelled here. One of which no attempt is open gets the record
``canceled`` from whoever is first to write it; its worker then finds that it has ended.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, Final

from agentweave_bus.authz import AuditLog, Authorizer, AuthzDecision
from agentweave_bus.bus.claim_rates import ClaimRates
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.records import decision_facts, envelope_facts
from agentweave_bus.envelope import OpenedEnvelope
from agentweave_bus.exceptions import AuditError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.control_sender import ControlBody, ControlSender
from agentweave_bus.tasks.hearing import Hearing
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import RecordBody, TaskRef
from agentweave_bus.types import TaskState

__all__ = ["CANCEL", "CancelBody", "CancelSender", "Controls", "OnCancel"]

_log = logging.getLogger(__name__)

CANCEL: Final = "cancel"

_MOST_REMEMBERED: Final = 4_096
_SAID_NOTHING: Final = "cancelled"

OnCancel = Callable[[str, bytes, str], bool]
"""Cancels the task with this key and digest of its head for this reason, if it runs here; says whether."""


class CancelBody(ControlBody):
    """The payload of ``cancel``. The record of a task that never began has to name its ``pd``.

    So who does not say that cancels only what is on record.
    """


class CancelSender(ControlSender):
    """Says ``cancel`` for one identity. Make it before the keeper opens."""

    async def send(self, ref: TaskRef, *, task: bytes, pd: str | None, reason: str) -> None:
        """Tell every replica of a task's agent, once, to cancel it. ``task`` is the digest of its head.

        Without ``pd``, the SHA-256 of its payload, it is of no effect on a task that is not on record.

        Raises as :meth:`say`, and PayloadError for a reason of more than 1,000 characters.
        """
        body = self.body(CancelBody, ref, pd=pd, reason=reason)
        await self.say(CANCEL, ref, task, body, reason or _SAID_NOTHING)


class Controls(Hearing[CancelBody]):
    """Hears which tasks of one agent are to be cancelled; see :class:`Hearing`."""

    def __init__(
        self,
        *,
        desk: Desk,
        keeper: Keeper,
        me: SpiffeID,
        capabilities: Collection[str],
        authorizer: Authorizer,
        audit: AuditLog,
        on_cancel: OnCancel,
    ) -> None:
        super().__init__(
            CancelBody,
            "cancellation",
            [CANCEL],
            desk=desk,
            keeper=keeper,
            me=me,
            capabilities=capabilities,
            audit=audit,
        )
        self._authorizer = authorizer
        self._on_cancel = on_cancel
        self._heard: OrderedDict[tuple[SpiffeID, str, bytes], None] = OrderedDict()
        self._rates = ClaimRates()

    async def _heed(self, verb: str, opened: OpenedEnvelope, ref: TaskRef, body: CancelBody) -> None:
        if await self._allowed(verb, opened, ref, body):
            await self._cancel(opened, ref, body)

    async def _allowed(self, verb: str, opened: OpenedEnvelope, ref: TaskRef, body: CancelBody) -> bool:
        """Ask who may cancel this task; record it the first time, before anything is done."""
        head = opened.head
        assert head.re is not None
        own = head.iss == ref.sender
        known = (head.iss, ref.key, head.re)
        if own and known in self._heard:
            return True
        facts = self._facts(verb, opened, ref, body)
        if own:
            decision = AuthzDecision(allowed=True, reason="it is the task's own sender")
        else:
            decision = await self._authorizer.authorize(facts)
        record: dict[str, Any] = {
            "event": "control" if decision.allowed else "refusal",
            **envelope_facts(opened, self._notes),
            **decision_facts(facts, decision),
            "task": ref.id,
        }
        if not decision.allowed:
            self._write_refusal(record, decision.reason)
            return False
        if known in self._heard:
            return True
        try:
            await self._audit.record(record)
        except AuditError as error:
            self._notes.forget(head)
            _log.error("a control is not heeded, because it can't be recorded: %s", error)
            return False
        self._heard[known] = None
        if len(self._heard) > _MOST_REMEMBERED:
            self._heard.popitem(last=False)
        return True

    async def _cancel(self, opened: OpenedEnvelope, ref: TaskRef, body: CancelBody) -> None:
        task, reason = opened.head.re, body.reason or _SAID_NOTHING
        assert task is not None
        if self._on_cancel(ref.key, task, reason):
            return
        log = TaskLog(self._desk, ref)
        await log.refresh()
        last = log.last
        if last is not None and (last.state is TaskState.WORKING or last.state.terminal or last.task != task):
            return
        pd = body.pd if last is None else last.body.pd
        if pd is None:
            return
        if last is None and not self._rates.take(opened.head.iss, self._desk.clock_ms()):
            return  # of tasks that never were anybody could make records that stand for a month
        await log.append(RecordBody(state=TaskState.CANCELED, pd=pd, message=reason), task)
