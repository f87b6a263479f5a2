"""Tasks that wait until somebody has approved of them: who may, what it is good for, and how it ends."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import AgentWeaveClient, SecureAgent, TaskHandle, capability
from agentweave_bus.authz import ApprovalTerms, AuthzDecision, Grants
from agentweave_bus.bus.streams import tasks_stream_name
from agentweave_bus.envelope import new_id
from agentweave_bus.exceptions import (
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    RetryableError,
    TaskCanceledError,
)
from agentweave_bus.tasks import parking
from agentweave_bus.tasks.approval import Asked, Decided
from agentweave_bus.tasks.handle import TaskReference
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.tasks.record import RecordBody, TaskRef
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState

PAGE = (Path(__file__).parents[3] / "docs" / "durable-tasks.md").read_text()

pytestmark = pytest.mark.anyio

ANNA, BERT, CLI = "person/anna", "person/bert", "client/cli"


class PayAgent(SecureAgent):
    """Pays; how often it fails first is asked for."""

    def on_start(self) -> None:
        self.paid: list[int] = []

    @capability("pay", retry=Retry(attempts=3, first_delay=0.5, last_delay=1))
    async def pay(self, amount: int, fails: int = 0) -> dict[str, int]:
        if self.context.attempt <= fails:
            raise RetryableError("the till is closed")
        self.paid.append(amount)
        return {"paid": amount}


class OrderAgent(SecureAgent):
    """Has things paid for on behalf of others."""

    @capability("order")
    async def order(self, amount: int) -> dict[str, str]:
        target = f"spiffe://{self.spiffe_id.trust_domain}/agent/pay"
        handle = await self.submit_agent(target, "pay", {"amount": amount})
        return {"reference": handle.full_reference}


@dataclass
class Till:
    """The agent, who submits, who approves, and what else a test changes."""

    bus: MemoryBus
    agent: PayAgent
    cli: AgentWeaveClient
    anna: AgentWeaveClient

    async def submit(self, amount: int = 5_000, **options: Any) -> TaskHandle:
        payload = {"amount": amount, "fails": options.pop("fails", 0)}
        return await self.cli.submit(self.bus.id("agent/pay"), "pay", payload, **options)

    async def waiting(self, amount: int = 5_000, **options: Any) -> TaskHandle:
        """A task that waits for its approval and has been given back to the queue."""
        handle = await self.submit(amount, **options)
        await self.until(handle, TaskState.AUTH_REQUIRED)
        await self.given_back()
        return handle

    async def given_back(self) -> None:
        async with asyncio.timeout(30):
            while not self._waits():  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.005)

    def _waits(self) -> bool:
        stream = self.bus.broker.jetstream.streams[tasks_stream_name(self.bus.id("agent/pay"))]
        soon = asyncio.get_running_loop().time() + 31  # as long as one who works on it has
        pending = [one for consumer in stream.consumers.values() for one in consumer._pending.values()]
        return bool(pending) and all(one.due is not None and one.due > soon for one in pending)

    async def until(self, handle: TaskHandle, *states: TaskState) -> None:
        async with asyncio.timeout(30):
            while (await handle.status()).state not in states:  # noqa: ASYNC110 - it is looked for
                await asyncio.sleep(0.01)

    async def set(self, grant: dict[str, Any], **more: Any) -> None:
        """Replace the one grant for paying, or what stands beside it."""
        entry = {"caller": [self.bus.id(CLI)], "callee": self.bus.id("agent/pay"), "capabilities": ["pay"]}
        operators = more.pop("operators", [ANNA, BERT, CLI])
        await self.bus.set_grants(
            {
                "grants": [entry | grant],
                "operators": [
                    {
                        "who": [self.bus.id(one) for one in operators],
                        "may": ["control:approve", "control:reject"],
                    }
                ],
            }
        )

    def audited(self, **facts: Any) -> list[dict[str, Any]]:
        return self.bus.audit(self.agent, **facts)


def approval(bus: MemoryBus, *by: str, **more: Any) -> dict[str, Any]:
    return {"approval": {"by": [bus.id(one) for one in by], "above": {"amount": 1_000}, **more}}


@pytest.fixture
async def till(bus: MemoryBus) -> Till:
    till = Till(bus, None, None, None)  # type: ignore[arg-type]
    await till.set(approval(bus, ANNA))
    till.agent = await bus.start(PayAgent)
    till.cli, till.anna = await bus.client(CLI), await bus.client(ANNA)
    return till


async def test_up_to_the_bound_nobody_is_asked(till: Till) -> None:
    handle = await till.submit(1_000)
    assert (await handle.result(30)).data == {"paid": 1_000}
    assert [event.state async for event in handle.events()] == ["working", "completed"]


async def test_a_task_waits_until_it_is_approved_of(till: Till) -> None:
    handle = await till.waiting()
    assert till.agent.paid == []
    status = await handle.status()
    assert status.approval is not None
    assert status.approval["approvers"] == [till.bus.id(ANNA)]
    assert status.approval["payload"] == {"amount": 5_000, "fails": 0}
    assert 86_000_000 < status.approval["until"] - (status.since_ms or 0) <= 86_400_000
    assert status.to_json()["approval"] == status.approval
    assert "approved of" in (status.message or "")

    approved = await till.anna.task(handle.full_reference).approve("a good customer")
    assert approved.state in ("submitted", "working", "completed")
    began = asyncio.get_running_loop().time()
    assert (await handle.result(30)).data == {"paid": 5_000}
    assert asyncio.get_running_loop().time() - began < 30  # it comes at once, not at the next look
    events = [event async for event in handle.events()]
    assert [event.state for event in events] == ["auth_required", "submitted", "working", "completed"]
    assert events[0].approval == status.approval
    assert events[1].message == f"approved by {till.bus.id(ANNA)}: a good customer"
    assert till.agent.paid == [5_000]


async def test_the_log_does_not_call_it_refused(till: Till, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "agentweave_bus.bus.admission"):
        await till.waiting()
    (told,) = (one for one in caplog.records if one.name == "agentweave_bus.bus.admission")
    assert (told.levelname, told.getMessage()) == (
        "INFO",
        "a task waits: needs a person's approval: grant 1 allows it once it is approved of",
    )


async def test_it_holds_no_place_of_a_worker(till: Till) -> None:
    async with asyncio.timeout(30):
        waiting = [await till.submit() for _ in range(40)]  # there are 32 places
        for handle in waiting:
            await till.until(handle, TaskState.AUTH_REQUIRED)
        assert (await (await till.submit(1)).result()).data == {"paid": 1}


async def test_the_decision_is_audited_and_its_frame_is_kept(till: Till) -> None:
    handle = await till.waiting()
    await till.anna.task(handle.full_reference).approve("fine")
    await handle.result(30)
    (asked,) = till.audited(event="refusal", step_name="authorization")
    assert asked["approvers"] == [till.bus.id(ANNA)]
    (control,) = till.audited(event="control")
    assert (control["action"], control["caller"], control["task"], control["allowed"]) == (
        "control:approve",
        till.bus.id(ANNA),
        handle.id,
        True,
    )
    decided = handle._log.records[1].body.decided
    assert decided is not None
    assert decided.control == control["digest"]
    (admitted,) = till.audited(event="admission")
    assert admitted["input"]["context"]["approval"] == {
        "by": till.bus.id(ANNA),
        "at": decided.at,
        "reason": "fine",
    }
    (said,) = till.bus.audit(ANNA, event="control")
    assert (said["digest"], said["reason"]) == (control["digest"], "fine")


async def test_rejected_it_never_runs(till: Till) -> None:
    handle = await till.waiting()
    status = await till.anna.task(handle.full_reference).reject("too much")
    assert (status.state, status.message) == ("rejected", f"rejected by {till.bus.id(ANNA)}: too much")
    with pytest.raises(AuthorizationError, match="too much"):
        await handle.result(30)
    assert till.agent.paid == []
    await gone(till)


async def test_when_its_time_is_up_it_is_rejected(till: Till) -> None:
    await till.set(approval(till.bus, ANNA, within=300))
    handle = await till.waiting()
    await till.bus.clock.advance(299)
    assert (await handle.status()).state == "auth_required"
    await till.bus.clock.advance(2)
    with pytest.raises(AuthorizationError, match="not approved in time"):
        await handle.result(30)
    with pytest.raises(CallRefusedError, match="waits for nobody"):
        await till.anna.task(handle.full_reference).approve()
    await gone(till)


async def test_the_tasks_own_end_comes_first(till: Till) -> None:
    handle = await till.waiting(deadline=120)
    await till.bus.clock.advance(121)
    result = await handle.result(30)
    assert result.status == "failed"
    assert "expired" in str(result.error)
    assert till.agent.paid == []


async def test_it_outlives_its_worker_and_the_broker(till: Till) -> None:
    handle = await till.waiting()
    await till.bus.kill_worker(till.agent)
    async with till.bus.running(PayAgent) as again:
        await till.anna.task(handle.full_reference).approve(timeout=20)
        await till.bus.clock.advance(61)  # nobody here has given it back, so it waits for the next look
        assert (await handle.result(30)).data == {"paid": 5_000}
        assert again.paid == [5_000]


async def test_approved_of_while_no_worker_is_there_it_is_heeded_when_one_is(till: Till) -> None:
    handle = await till.waiting()
    await till.bus.stop(till.agent)
    approving = asyncio.create_task(till.anna.task(handle.full_reference).approve(timeout=20))
    await asyncio.sleep(0.2)
    async with till.bus.running(PayAgent):
        await till.bus.clock.advance(1)
        await approving
        await till.bus.clock.advance(61)
        assert (await handle.result(30)).status == "completed"


async def test_one_approval_is_for_the_task_with_all_its_attempts(till: Till) -> None:
    handle = await till.waiting(fails=2)
    await till.anna.task(handle.full_reference).approve()
    assert (await handle.result(10)).data == {"paid": 5_000}
    states = [str(event.state) async for event in handle.events()]
    assert states.count("auth_required") == 1
    assert states.count("working") == 3


async def test_an_approval_is_for_one_task(till: Till) -> None:
    first = await till.waiting()
    await till.anna.task(first.full_reference).approve()
    await first.result(30)
    second = await till.waiting()
    assert (await second.status()).state == "auth_required"


async def test_a_policy_that_says_no_since_wins(till: Till) -> None:
    handle = await till.waiting()
    await till.set(approval(till.bus, ANNA) | {"limits": {"max_amount": 4_000}})
    await till.anna.task(handle.full_reference).approve()
    with pytest.raises(AuthorizationError, match="max_amount"):
        await handle.result(30)
    assert till.agent.paid == []


def dies_before_it_wakes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gives a task back to be delivered at once gets lost."""
    back = Acknowledgements.back

    async def lost(self: Acknowledgements, delivery: Delivery, delay_s: float) -> None:
        if delay_s:
            await back(self, delivery, delay_s)

    monkeypatch.setattr(Acknowledgements, "back", lost)


async def test_a_policy_that_asks_another_since_has_it_asked(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await till.waiting()
    with monkeypatch.context() as patched:
        dies_before_it_wakes_anything(patched)
        assert (await till.anna.task(handle.full_reference).approve()).state == "submitted"
    await till.set(approval(till.bus, BERT))
    await till.bus.clock.advance(61)
    status = await handle.status()
    assert status.approval is not None
    assert status.approval["approvers"] == [till.bus.id(BERT)]
    assert till.agent.paid == []
    bert = await till.bus.client(BERT)
    await bert.task(handle.full_reference).approve()
    assert (await handle.result(30)).status == "completed"


async def test_a_policy_that_does_not_look_at_approvals_allows_nothing(till: Till) -> None:
    """It would be asked again and again otherwise."""
    parts = till.bus._of(till.agent).parts
    assert parts is not None
    authorizer = parts.authorizer
    asked = authorizer.authorize

    async def deaf(context: Any) -> AuthzDecision:
        if context.kind != "task":
            return await asked(context)
        terms = ApprovalTerms((till.bus.id(ANNA),))
        return AuthzDecision(False, "always", require_approval=True, approval=terms)

    authorizer.authorize = deaf  # type: ignore[method-assign]
    handle = await till.waiting()
    await till.anna.task(handle.full_reference).approve()
    with pytest.raises(AuthorizationError, match="always"):
        await handle.result(30)


async def test_who_has_no_right_to_approve_is_not_heard(till: Till) -> None:
    handle = await till.waiting()
    await till.set(approval(till.bus, ANNA), operators=[BERT])
    with pytest.raises((AuthorizationError, CallTimeoutError)):
        await till.anna.task(handle.full_reference).approve(timeout=0.3)
    assert (await handle.status()).state == "auth_required"


async def test_who_was_not_named_may_not(till: Till) -> None:
    handle = await till.waiting()
    bert = await till.bus.client(BERT)
    with pytest.raises((AuthorizationError, CallTimeoutError)):
        await bert.task(handle.full_reference).approve(timeout=0.3)
    assert (await handle.status()).state == "auth_required"


async def test_the_submitter_may_only_where_it_is_named(till: Till) -> None:
    await till.set({"approval": {"by": [f"spiffe://{till.bus.id(CLI).trust_domain}/client/*"]}})
    handle = await till.waiting()
    with pytest.raises(AuthorizationError, match="takes part"):
        await handle.approve()
    await till.set(approval(till.bus, CLI))
    named = await till.waiting()
    await named.approve("my own")
    assert (await named.result(30)).status == "completed"


async def test_on_whose_behalf_it_is_may_not_either(till: Till) -> None:
    bus = till.bus
    people = f"spiffe://{bus.id(CLI).trust_domain}/*"
    grant = {"callee": bus.id("agent/pay"), "capabilities": ["pay"], "approval": {"by": [people]}}
    orders = {"caller": bus.id(CLI), "callee": bus.id("agent/order"), "capabilities": ["order"]}
    grants = [grant | {"caller": bus.id("agent/order")}, orders]
    may = [{"who": [people], "may": ["control:*"]}]
    await bus.set_grants({"grants": grants, "operators": may})
    await bus.start(OrderAgent)
    ordered = await till.cli.call(bus.id("agent/order"), "order", {"amount": 5_000})
    reference = ordered.data["reference"]
    waiting = till.anna.task(reference)
    await till.until(waiting, TaskState.AUTH_REQUIRED)
    with pytest.raises(AuthorizationError, match="takes part"):
        await till.cli.task(reference).approve()
    assert waiting.reference == reference
    await waiting.approve()
    assert (await waiting.result(30)).status == "completed"


async def test_a_call_is_refused_and_says_what_to_do(till: Till) -> None:
    with pytest.raises(AuthorizationError, match="submit it as a task"):
        await till.cli.call(till.bus.id("agent/pay"), "pay", {"amount": 5_000})
    assert till.agent.paid == []


async def test_what_waits_can_be_cancelled(till: Till) -> None:
    handle = await till.waiting()
    await handle.cancel("changed my mind")
    with pytest.raises(TaskCanceledError):
        await handle.result(30)
    with pytest.raises(CallRefusedError, match="waits for nobody"):
        await till.anna.task(handle.full_reference).approve()
    await till.bus.clock.advance(61)
    await gone(till)
    assert till.agent.paid == []


async def test_what_is_approved_of_has_to_begin_in_time(till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    await till.set(approval(till.bus, ANNA, within=100))
    handle = await till.waiting()
    await till.bus.clock.advance(70)
    dies_before_it_wakes_anything(monkeypatch)
    assert (await till.anna.task(handle.full_reference).approve()).state == "submitted"
    await till.bus.clock.advance(61)
    with pytest.raises(AuthorizationError, match="not begun in time"):
        await handle.result(30)
    assert till.agent.paid == []


async def test_many_that_wait_are_looked_at_in_turn(till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "_LOOKS_A_SECOND", 0.01)
    for _ in range(3):
        await till.waiting()
    stream = till.bus.broker.jetstream.streams[tasks_stream_name(till.bus.id("agent/pay"))]
    dues = [one.due or 0 for consumer in stream.consumers.values() for one in consumer._pending.values()]
    assert max(dues) - asyncio.get_running_loop().time() > 290


DECIDED = {"by": "spiffe://a.test/person/anna", "at": 5, "control": "0d" * 32}
WRONG: dict[str, tuple[TaskState, dict[str, Any]]] = {
    "by another": (TaskState.SUBMITTED, {"by": "spiffe://a.test/agent/pay"}),
    "by who takes part": (TaskState.SUBMITTED, {"by": "spiffe://a.test/person/cli"}),
    "too late": (TaskState.SUBMITTED, {"at": 7}),
    "that began at once": (TaskState.WORKING, {}),
}


@pytest.mark.parametrize("name", [*WRONG, "none"])
async def test_a_record_of_a_decision_that_does_not_count_is_believed_by_nobody(
    till: Till, name: str
) -> None:
    """Also where the agent itself has written it."""
    parts = till.bus._of(till.agent).parts
    assert parts is not None
    ref = TaskRef(till.bus.id("agent/pay"), till.bus.id(CLI), "pay", new_id(parts.desk.clock_ms()))
    asked = Asked(approvers=["spiffe://a.test/person/*"], until=6, involved=["spiffe://a.test/person/cli"])
    mine, pd = TaskLog(parts.desk, ref), "ab" * 32
    await mine.append(RecordBody(state=TaskState.AUTH_REQUIRED, pd=pd, asked=asked), b"\x07" * 32)
    state, changed = WRONG.get(name, (TaskState.SUBMITTED, {}))
    body = RecordBody(state=state, pd=pd, decided=Decided.model_validate(DECIDED | changed))
    await mine.append(body, b"\x07" * 32)
    seen = TaskLog(parts.desk, ref)
    await seen.refresh()
    assert len(seen.records) == (2 if name == "none" else 1)
    assert (seen.approval is not None) == (name == "none")


def test_a_reference_may_name_the_submitter() -> None:
    text = "spiffe://a.test/agent/pay#pay/01890a5d-ac96-774b-bcce-b302099a8057@spiffe://a.test/client/cli"
    reference = TaskReference.parse(text)
    assert (str(reference), reference.sender) == (text, "spiffe://a.test/client/cli")


async def test_the_page_on_durable_tasks_shows_what_works(till: Till) -> None:
    section = PAGE.split("\n## Approvals\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    shown = Grants.parse(text)
    assert shown.approvals_by("spiffe://shop.test/person/anna") == shown.grants
    assert shown.operator_may("spiffe://shop.test/person/anna", "control:reject")
    names: dict[str, Any] = {}
    exec(compile(code, "page", "exec", dont_inherit=True), names)
    handle = await till.waiting()
    await names["decide"](till.anna, handle.full_reference)
    assert (await handle.result(30)).data == {"paid": 5_000}


async def gone(till: Till) -> None:
    """Wait until the queue is empty."""
    check: Callable[[], int] = lambda: len(  # noqa: E731
        till.bus.broker.jetstream.streams[tasks_stream_name(till.bus.id("agent/pay"))].messages
    )
    async with asyncio.timeout(30):
        while check():  # noqa: ASYNC110 - the broker tells nobody
            await asyncio.sleep(0.01)
