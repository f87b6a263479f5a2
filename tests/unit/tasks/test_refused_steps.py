"""A task that is not allowed any more between two attempts is rejected, and what its steps did is undone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, TaskHandle, capability
from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.admission import Admission
from agentweave_bus.bus.refusal import AdmissionRefusedError, Step
from agentweave_bus.bus.streams import dead_stream_name, tasks_stream_name
from agentweave_bus.envelope import OpenedEnvelope, decode_frame, decode_payload
from agentweave_bus.exceptions import AuditError, AuthorizationError, TaskFailedError
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio


class Bank(SecureAgent):
    """Notes in whose name it is asked."""

    def on_start(self) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.busy = 0

    @capability("charge")
    async def charge(self) -> str:
        return self._asked("charge")

    @capability("refund")
    async def refund(self) -> str:
        if self.busy:
            self.busy -= 1
            raise RetryableError("busy")
        return self._asked("refund")

    def _asked(self, what: str) -> str:
        self.asked.append((what, self.context.caller_spiffe_id.rpartition("/")[2], len(self.context.via)))
        return what


class Paying(SecureAgent):
    """Pays and wants another attempt; its handler notes each time that it gets behind its steps."""

    def on_start(self) -> None:
        self.went_on = 0
        self.then: Exception = RetryableError("later")

    @capability("pay", retry=Retry(attempts=5, first_delay=10, last_delay=10))
    async def pay(self, amount: int = 5) -> None:
        await self.context.step("charge", self.ask, "charge", compensate=self.refund)
        self.went_on += 1
        raise self.then

    async def ask(self, name: str) -> Any:
        bank = self.spiffe_id.replace("paying", "bank")
        result = await self.call_agent(bank, name, {})
        if result.status != "completed":
            raise RetryableError(str(result.error))
        return result.data

    async def refund(self, _charged: Any) -> None:
        await self.ask("refund")


class Shop:
    """Who pays, who is paid, and a task that has charged and waits for its next attempt."""

    def __init__(self, bus: MemoryBus, bank: Bank, paying: Paying) -> None:
        self.bus, self.bank, self.paying = bus, bank, paying

    async def between_attempts(self, **options: Any) -> TaskHandle:
        handle = await (await self.bus.client()).submit(self.paying.spiffe_id, "pay", {}, **options)
        async with asyncio.timeout(600):
            while (await handle.status()).retry_at is None:
                await self.bus.clock.advance(0.01)
        assert [one[0] for one in self.bank.asked] == ["charge"]
        return handle

    async def allow(self, *grants: dict[str, Any]) -> None:
        """Let only this be asked for, beside what the agent asks for in its own name."""
        own = {"caller": self.paying.spiffe_id, "callee": self.bank.spiffe_id}
        await self.bus.set_grants({"grants": [own | {"capabilities": ["charge", "refund"]}, *grants]})

    def pay(self, **more: Any) -> dict[str, Any]:
        """The grant to the client."""
        caller, callee = self.bus.id("client/cli"), self.paying.spiffe_id
        return {"caller": caller, "callee": callee, "capabilities": ["pay"], **more}

    @property
    def queue(self) -> dict[int, Any]:
        """What waits for who pays, by number."""
        messages: dict[int, Any]
        messages = self.bus.broker.jetstream.streams[tasks_stream_name(self.paying.spiffe_id)].messages
        return messages

    async def settled(self) -> None:
        """Wait until the queue has forgotten the task."""
        async with asyncio.timeout(600):
            while self.queue:
                await self.bus.clock.advance(1)

    def letters(self) -> list[str]:
        """The reasons of the dead letters."""
        stream = self.bus.broker.jetstream.streams[dead_stream_name(self.paying.spiffe_id)]
        frames = [one.data for one in stream.messages.values() if one.subject.endswith(".record")]
        return [decode_payload(decode_frame(frame).payload)["reason"] for frame in frames]


@pytest.fixture
async def shop(bus: MemoryBus) -> Shop:
    bank, paying = await bus.start(Bank), await bus.start(Paying)
    shop = Shop(bus, bank, paying)
    await shop.allow(shop.pay())
    return shop


CHARGED, REFUNDED = ("charge", "paying", 1), ("refund", "paying", 0)
"""The charge on the client's behalf, and the refund in the agent's own name."""


async def test_its_steps_are_undone_in_the_agents_own_name(shop: Shop) -> None:
    handle = await shop.between_attempts()
    await shop.allow(shop.pay(limits={"max_amount": 4}))
    await shop.settled()
    assert shop.bank.asked == [CHARGED, REFUNDED]
    assert shop.paying.went_on == 1
    with pytest.raises(AuthorizationError, match="max_amount"):
        await handle.result(30)
    assert shop.letters() == []


async def test_that_they_are_undone_is_audited_behind_the_refusal(shop: Shop) -> None:
    await shop.between_attempts()
    await shop.allow()
    await shop.settled()
    (refusal,) = shop.bus.audit(shop.paying, event="refusal")
    (undoing,) = shop.bus.audit(shop.paying, event="undoing")
    assert undoing["seq"] > refusal["seq"]
    assert (undoing["digest"], undoing["allowed"]) == (refusal["digest"], False)
    assert undoing["reason"] == refusal["reason"]


async def test_also_when_it_was_cancelled_before(shop: Shop) -> None:
    handle = await shop.between_attempts()
    assert (await handle.cancel()).state == "canceled"
    await shop.allow()
    await shop.settled()
    assert shop.bank.asked == [CHARGED, REFUNDED]
    assert (await handle.status()).state == "canceled"


async def test_a_compensation_that_fails_is_tried_again(shop: Shop) -> None:
    await shop.between_attempts()
    await shop.allow()
    shop.bank.busy = 2
    await shop.settled()
    assert shop.bank.asked == [CHARGED, REFUNDED]


async def test_a_task_that_had_failed_before_keeps_its_failure_as_its_outcome(shop: Shop) -> None:
    """It waits for nothing but being undone, and nobody has to allow that."""
    shop.bank.busy, shop.paying.then = 1, TaskFailedError("no")
    handle = await shop.between_attempts()
    await shop.allow(shop.pay(limits={"max_amount": 4}))
    await shop.settled()
    assert shop.bank.asked == [CHARGED, REFUNDED]
    assert (await handle.result(30)).error == "no"
    assert shop.letters() == []


async def test_what_nobody_approves_of_later_is_undone(shop: Shop) -> None:
    handle = await shop.between_attempts()
    await shop.allow(shop.pay(approval={"by": [shop.bus.id("person/anna")], "within": 60}))
    await shop.settled()
    assert shop.bank.asked == [CHARGED, REFUNDED]
    assert (await handle.status()).message == "not approved in time"


async def test_what_can_not_be_undone_is_a_dead_letter(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a deploy by which the handler takes other arguments."""

    async def unfit(_self: Admission, _task: object, _decision: object) -> None:
        raise AdmissionRefusedError(Step.PAYLOAD, "an unknown argument", told="an unknown argument")

    monkeypatch.setattr(Admission, "undo_task", unfit)
    handle = await shop.between_attempts()
    await shop.allow(shop.pay(limits={"max_amount": 4}))
    await shop.settled()
    assert shop.bank.asked == [CHARGED]
    (reason,) = shop.letters()
    assert reason.startswith("what its attempts did is not undone: ")
    assert "is not undone: refused at step 10 (payload): an unknown argument" in caplog.text
    assert (await handle.status()).state == "rejected"


async def test_what_its_agent_does_not_take_any_more_is_a_dead_letter(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await shop.between_attempts()

    async def another(_self: Admission, request: OpenedEnvelope, *_: object, **_more: object) -> None:
        raise AdmissionRefusedError(Step.BINDING, "content type", told="content type", request=request)

    monkeypatch.setattr(Admission, "_bind", another)
    await shop.settled()
    assert shop.letters() == [
        "what its attempts did is not undone: refused at step 6 (binding): content type"
    ]
    assert (await handle.status()).state == "rejected"


async def test_without_an_audit_record_nothing_is_undone_yet(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, full = AuditLog.record, [True]

    async def fails(self: AuditLog, fields: dict[str, Any], **more: Any) -> Any:
        if full and fields["event"] == "undoing":
            full.pop()
            raise AuditError("the disk is full")
        return await record(self, fields, **more)

    monkeypatch.setattr(AuditLog, "record", fails)
    await shop.between_attempts()
    await shop.allow()
    await shop.settled()
    assert full == []
    assert shop.bank.asked == [CHARGED, REFUNDED]
