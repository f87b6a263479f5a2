"""Operators and dead letters: who may, what is listed, what comes back and what can't."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, capability
from agentweave_bus.authz import AuthzDecision, Grants
from agentweave_bus.bus.streams import STATE_MAX_AGE_S, dead_stream_name, state_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import task_subject
from agentweave_bus.control import dead_letters
from agentweave_bus.envelope import Draft, Kind, control_role, encode_payload, new_id
from agentweave_bus.exceptions import (
    AgentCallError,
    AuthorizationError,
    CallTimeoutError,
    ConfigurationError,
    TaskFailedError,
)
from agentweave_bus.runtime.operators import DeadLetterCalls
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.queue import Delivery
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus
from tests.security.forging import with_part

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000


class SickAgent(SecureAgent):
    """Gives up until it is ``well``."""

    def on_start(self) -> None:
        self.well = False
        self.ran: list[str] = []

    @capability("work", retry=Retry(attempts=1))
    async def work(self, name: str) -> str:
        self.ran.append(name)
        if name == "refused":
            raise TaskFailedError("no")  # an outcome, and no dead letter
        if not self.well and name != "well":
            raise RetryableError("it is sick")
        return name


class Ward:
    """The agent, who submits, and operators."""

    def __init__(self, bus: MemoryBus) -> None:
        self.bus = bus
        self.target = bus.id("agent/sick")

    async def begin(self) -> None:
        bus = self.bus
        await bus.grant("client/cli", "agent/sick", "work")
        operators = [{"who": str(bus.id("client/operator")), "may": ["control:redrive"]}]
        await bus.set_grants(
            {**bus.grants.model_dump(mode="json", exclude_none=True), "operators": operators}
        )
        self.agent = await bus.start(SickAgent)
        self.client = await bus.client("client/cli")
        self.operator = await self.calls("client/operator")

    async def calls(self, who: str) -> DeadLetterCalls:
        await self.bus.client(who)
        parts = self.bus._held[-1].parts
        assert parts is not None
        return DeadLetterCalls(parts)

    async def given_up(self, name: str = "a", **options: Any) -> tuple[TaskHandle, str]:
        """Have a task given up; return its handle and the reference of its dead letter."""
        known = {one["letter"] for one in await self.letters(all=True)}
        handle = await self.client.submit(str(self.target), "work", {"name": name}, **options)
        assert (await handle.result(10)).status == "failed"
        (new,) = [one["letter"] for one in await self.letters(all=True) if one["letter"] not in known]
        await self.idle()
        return handle, new

    async def letters(self, **options: Any) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = (await self.operator.list(**options))["letters"]
        return listed

    async def idle(self) -> None:
        """Wait until the queue is empty."""
        stream = self.bus.broker.jetstream.streams[tasks_stream_name(self.target)]
        async with asyncio.timeout(30):
            while stream.messages:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.002)

    def audit(self, **wanted: Any) -> list[dict[str, Any]]:
        return self.bus.audit(control_role(self.bus.trust_domain), **wanted)


@pytest.fixture
async def ward(bus: MemoryBus) -> Ward:
    ward = Ward(bus)
    await ward.begin()
    return ward


async def test_from_a_dead_letter_to_a_completed_task(ward: Ward) -> None:
    handle, letter = await ward.given_up("a")
    (row,) = await ward.letters()
    assert row["letter"] == letter
    assert row["state"] == "waiting"
    assert "it is sick" in row["reason"]
    assert row["task"] == {"id": handle.id, "sender": str(ward.bus.id("client/cli")), "capability": "work"}
    shown = await ward.operator.show(letter)
    assert shown["now"]["state"] == "failed"
    assert [one["state"] for one in shown["history"]] == ["working"]
    assert "payload" not in shown
    assert "not_redrivable" not in shown
    assert (await ward.operator.show(letter, payload=True))["payload"] == {"name": "a"}
    ward.agent.well = True
    told = await ward.operator.redrive(letter)
    assert told["reference"] == handle.reference
    assert told["attempt"] == 2
    await ward.idle()
    status = await handle.status()
    assert (status.state, status.attempt) == ("completed", 2)
    again = ward.client.task(handle.reference)
    assert (await again.result(10)).data == "a"
    assert [one.state async for one in again.events()] == ["working", "failed", "working", "completed"]
    assert await ward.letters() == []
    assert [one["state"] for one in await ward.letters(all=True)] == ["redriven"]
    assert ward.agent.ran == ["a", "a"]


async def test_each_act_is_audited_at_both_ends_as_the_operators_act(ward: Ward) -> None:
    _, letter = await ward.given_up()
    await ward.operator.redrive(letter)
    called = ward.bus.audit("client/operator", event="call")
    admitted = ward.audit(event="admission")
    assert {one["action"] for one in called + admitted} == {"control:redrive"}
    assert [one["digest"] for one in called] == [one["digest"] for one in admitted]
    assert [one["cap"] for one in admitted][-1] == "dlq_redrive"
    (reissue,) = ward.audit(event="reissue")
    assert reissue["operator"] == str(ward.bus.id("client/operator"))
    assert reissue["request"] == admitted[-1]["digest"]
    assert reissue["letter"] == letter
    assert ward.audit(event="outcome", digest=admitted[-1]["digest"])


async def test_who_is_no_operator_is_denied_by_each_line(ward: Ward) -> None:
    """By its own policy; past that by the broker; past that by the control role."""
    _, letter = await ward.given_up()
    other = await ward.calls("client/cli2")
    with pytest.raises(AuthorizationError, match="no entry of operators lets") as denied:
        await other.redrive(letter)
    assert denied.value.direction == "outbound"
    assert ward.agent.ran == ["a"]
    assert ward.audit(event="reissue") == []


async def test_a_grant_of_everything_is_no_operators_entry(ward: Ward) -> None:
    _, letter = await ward.given_up()
    await ward.bus.grant("client/cli2", control_role(ward.bus.trust_domain), "*")
    other = await ward.calls("client/cli2")
    with pytest.raises(AuthorizationError):
        await other.list()
    other._parts.authorizer.authorize = _allow  # type: ignore[method-assign]
    other._timeout = 0.3
    with pytest.raises(CallTimeoutError):  # the broker lets nobody answer it, either
        await other.redrive(letter)
    refusals = ward.audit(event="refusal", step_name="authorization")
    assert {(one["action"], one["allowed"]) for one in refusals} == {("control:redrive", False)}
    assert ward.audit(event="reissue") == []


async def _allow(_context: object) -> AuthzDecision:
    return AuthzDecision(allowed=True, reason="patched")


async def test_an_operator_who_is_one_no_more_is_denied(ward: Ward) -> None:
    _, letter = await ward.given_up()
    grants = ward.bus.grants
    await ward.bus.set_grants(grants.model_copy(update={"operators": ()}))
    with pytest.raises(AuthorizationError):
        await ward.operator.redrive(letter)


async def test_redriven_twice_it_runs_once_more(ward: Ward) -> None:
    _, letter = await ward.given_up()
    ward.agent.well = True
    await ward.operator.redrive(letter)
    await ward.idle()
    with pytest.raises(AgentCallError, match="redriven already, and is completed in attempt 2"):
        await ward.operator.redrive(letter)
    assert ward.agent.ran == ["a"] * 2


async def test_given_up_again_it_is_another_dead_letter_that_can_be_redriven(ward: Ward) -> None:
    handle, letter = await ward.given_up()
    await ward.operator.redrive(letter)
    await ward.idle()
    (second,) = await ward.letters()
    assert second["letter"] != letter
    assert second["attempts"] == 2
    with pytest.raises(AgentCallError, match="redriven already"):
        await ward.operator.redrive(letter)
    ward.agent.well = True
    await ward.operator.redrive(second["letter"])
    await ward.idle()
    assert (await handle.status()).state == "completed"
    assert ward.agent.ran == ["a"] * 3


async def test_a_redrive_that_nobody_begins_in_time_can_be_made_again(ward: Ward) -> None:
    handle, letter = await ward.given_up()
    await ward.bus.stop(ward.agent)
    await ward.operator.redrive(letter, deadline=5)
    await ward.bus.clock.advance(6)
    ward.agent = await ward.bus.start(SickAgent)
    await ward.idle()
    assert ward.agent.ran == []
    assert [one["state"] for one in await ward.letters()] == ["waiting"]
    ward.agent.well = True
    await ward.operator.redrive(letter)
    await ward.idle()
    assert (await handle.status()).state == "completed"


async def test_what_is_dropped_is_listed_no_more(ward: Ward) -> None:
    _, first = await ward.given_up("a")
    _, second = await ward.given_up("b")
    told = await ward.operator.drop(first, reason="ordered again by phone")
    assert told["dropped"]["by"] == str(ward.bus.id("client/operator"))
    assert [one["letter"] for one in await ward.letters()] == [second]
    shown = await ward.operator.show(first)
    assert shown["state"] == "dropped"
    assert shown["dropped"]["reason"] == "ordered again by phone"
    again = await ward.operator.drop(first, reason="another one")
    assert again == told


async def test_a_list_goes_on_where_it_ended(ward: Ward) -> None:
    letters = [(await ward.given_up(name))[1] for name in "abcde"]
    found, after = [], None
    while True:
        page = await ward.operator.list(limit=2, after=after)
        assert len(page["letters"]) <= 2
        found += [one["letter"] for one in page["letters"]]
        after = page["after"]
        if after is None:
            break
    assert found == letters
    assert await ward.letters(agent=str(ward.bus.id("agent/other"))) == []
    assert len(await ward.letters(agent=str(ward.target))) == 5


async def test_what_never_verified_is_shown_and_can_be_dropped_and_not_redriven(ward: Ward) -> None:
    stream = ward.bus.broker.jetstream.streams
    await ward.given_up()
    stream[tasks_stream_name(ward.target)].store(task_subject(ward.target, "work"), b"no envelope", None)
    await ward.idle()
    (row,) = [one for one in await ward.letters() if one["state"] == "unverified"]
    shown = await ward.operator.show(row["letter"], payload=True)
    assert "never verified" in shown["not_redrivable"]
    assert "payload" not in shown
    with pytest.raises(AgentCallError, match="never verified"):
        await ward.operator.redrive(row["letter"])
    await ward.operator.drop(row["letter"])
    assert len(await ward.letters()) == 1


@pytest.mark.parametrize(
    "text", ["", "x", "spiffe://test.local/agent/sick#work/abc.1", "spiffe://test.local#work/"]
)
async def test_what_names_no_dead_letter_is_said_before_anybody_is_asked(ward: Ward, text: str) -> None:
    with pytest.raises(ConfigurationError, match="names no dead letter"):
        await ward.operator.redrive(text)


async def test_a_dead_letter_that_is_not_there(ward: Ward) -> None:
    _, letter = await ward.given_up()
    missing = letter.replace(letter.rpartition("/")[2], f"{'0' * 64}.1")
    for act in (ward.operator.show, ward.operator.redrive, ward.operator.drop):
        with pytest.raises(AgentCallError, match="no such dead letter"):
            await act(missing)


async def test_a_frame_that_was_exchanged_is_not_redriven(ward: Ward) -> None:
    _, first = await ward.given_up("a")
    _, second = await ward.given_up("b")
    stream = ward.bus.broker.jetstream.streams[dead_stream_name(ward.target)]
    frames = [one for one in stream.messages.values() if one.subject.endswith(".frame")]
    number = frames[0].sequence
    stream.messages[number] = replace(frames[0], data=frames[1].data)
    with pytest.raises(AgentCallError, match="not the one that was given up"):
        await ward.operator.redrive(first)
    await ward.operator.redrive(second)


async def test_a_redrive_ends_a_day_before_what_is_recorded_of_the_task_is_forgotten(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, letter = await ward.given_up()
    stream = ward.bus.broker.jetstream.streams[state_stream_name(ward.target)]
    began_ms = min(one.time_ns for one in stream.messages.values()) // 1_000_000
    assert dead_letters._RECORDED_MS == STATE_MAX_AGE_S * 1000
    monkeypatch.setattr(dead_letters, "_RECORDED_MS", DAY_MS)
    with pytest.raises(AgentCallError, match="about to be forgotten"):
        await ward.operator.redrive(letter)
    assert "about to be forgotten" in (await ward.operator.show(letter))["not_redrivable"]
    monkeypatch.setattr(dead_letters, "_RECORDED_MS", DAY_MS + 60 * 60_000)
    assert (await ward.operator.redrive(letter))["expires"] == began_ms + 60 * 60_000


async def planted(ward: Ward, *, again: bool = False, spoilt: bool = False, state: str) -> str:
    """A dead letter that the agent writes of a task of which it has not given up; its reference.

    The frame is the task's; or the same sealed ``again``, or with its signature ``spoilt``.
    """
    agent, client = ward.bus._held[0].parts, ward.bus._held[1].parts
    assert agent is not None
    assert client is not None
    now_ms = client.desk.clock_ms()
    place = task_subject(ward.target, "work")
    draft = Draft(
        kind=Kind.TASK,
        id=new_id(now_ms),
        aud=ward.target,
        cap="work",
        sub=place,
        iat=now_ms,
        exp=now_ms + 60_000,
    )
    payload = encode_payload({"name": "well" if state == "completed" else "refused"})
    sealed = await client.sealer.seal(draft, payload)
    ward.bus.broker.jetstream.streams[tasks_stream_name(ward.target)].store(place, sealed.frame, None)
    await ward.idle()
    log = TaskLog(agent.desk, TaskRef(ward.target, client.me, "work", draft["id"]))
    await log.refresh()
    assert log.last is not None
    assert log.last.state == state
    assert await ward.letters(all=True) == []
    frame = sealed.frame
    if again:
        frame = (await client.sealer.seal({**draft, "iat": now_ms + 1}, payload)).frame
    if spoilt:
        frame = with_part(
            frame, "proof", lambda proof: [proof[0][:-1] + bytes([proof[0][-1] ^ 1]), *proof[1:]]
        )
    delivery = Delivery(frame, place, 1, now_ms, "")
    await DeadLetters(ward.target, agent.desk).write(delivery, "planted", log=log, digest=sealed.digest)
    (row,) = await ward.letters(all=True)
    return str(row["letter"])


async def test_what_has_not_failed_is_not_redriven(ward: Ward) -> None:
    letter = await planted(ward, state="completed")
    with pytest.raises(AgentCallError, match="has not failed: it is completed"):
        await ward.operator.redrive(letter)
    assert (await ward.operator.show(letter))["not_redrivable"]


async def test_another_task_of_the_same_id_is_not_redriven(ward: Ward) -> None:
    letter = await planted(ward, state="failed", again=True)
    with pytest.raises(AgentCallError, match="used for another task"):
        await ward.operator.redrive(letter)


async def test_a_frame_whose_signature_is_none_is_neither_shown_nor_redriven(ward: Ward) -> None:
    letter = await planted(ward, state="failed", spoilt=True)
    with pytest.raises(AgentCallError, match="does not verify now"):
        await ward.operator.redrive(letter)
    assert "payload" not in await ward.operator.show(letter, payload=True)


async def test_the_page_on_durable_tasks_runs(ward: Ward) -> None:
    text = (Path(__file__).parents[3] / "docs" / "durable-tasks.md").read_text()
    section = next(
        one for one in re.split(r"^## ", text, flags=re.MULTILINE) if one.startswith("Dead letters")
    )
    namespace: dict[str, Any] = {"__name__": "dead_letters"}
    for block in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        exec(compile(block, "durable-tasks.md", "exec", dont_inherit=True), namespace)
    handles = [(await ward.given_up(name))[0] for name in "ab"]

    @asynccontextmanager
    async def operator(_config: object) -> AsyncIterator[DeadLetterCalls]:
        yield ward.operator

    namespace["Operator"] = operator
    told = await namespace["redrive_all"](None, str(ward.target))
    assert told == [one.reference for one in handles]
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert Grants.parse(block).operator_may("spiffe://acme-corp.io/client/operator", "control:redrive")
