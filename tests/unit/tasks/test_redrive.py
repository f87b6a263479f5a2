"""A redrive begins a failed task anew, once; what is no genuine one begins nothing."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, capability
from agentweave_bus.bus.streams import dead_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import task_subject
from agentweave_bus.client import Submitted, TaskOptions
from agentweave_bus.control.reissue import reissue_draft
from agentweave_bus.envelope import (
    Draft,
    Kind,
    Link,
    Proof,
    Sealed,
    Sealer,
    control_role,
    decode_frame,
    decode_link,
    parse_head,
)
from agentweave_bus.envelope.codec import pack, unpack_exact
from agentweave_bus.envelope.envelope import protected_head
from agentweave_bus.envelope.merkle import leaf_hash
from agentweave_bus.envelope.signing import _Prepared, _sign
from agentweave_bus.exceptions import TaskFailedError
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.tasks import log as task_log
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.queue import Delivery
from agentweave_bus.tasks.record import RecordBody
from agentweave_bus.tasks.redrive import redrive_evidence
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState

pytestmark = pytest.mark.anyio

ONCE = Retry(attempts=1)


class TrialAgent(SecureAgent):
    """Its tasks are given up until it is ``mended``. It notes what it did and what it undid."""

    def on_start(self) -> None:
        self.mended = False
        self.ran: list[str] = []
        self.kinds: list[tuple[str, str]] = []

    @capability("work", retry=ONCE)
    async def work(self, name: str) -> str:
        self.ran.append(name)
        self.kinds.append((self.context.kind, self.context.caller_spiffe_id))
        self._trouble()
        return name

    @capability("telling", retry=ONCE)
    async def telling(self) -> None:
        await self.context.progress(0.5, "so far")
        await self.context.artifact("piece", 1)
        self._trouble()

    @capability("steps", retry=ONCE)
    async def steps(self) -> list[str]:
        step = self.context.step
        kept = await step("kept", self._do, "kept")
        undone = await step("undone", self._do, "undone", compensate=self._undo)
        await step("troubled", self._trouble)
        return [kept, undone]

    @capability("recorded", retry=ONCE)
    async def recorded(self) -> str:
        try:
            await self.context.step("first", self._refuse)
        except TaskFailedError:
            await self.context.step("second", self._do, "second")
        self._trouble()
        return "done"

    def _refuse(self) -> str:
        self.ran.append("first")
        if not self.mended:
            raise TaskFailedError("not now")
        return "first"

    def _do(self, name: str) -> str:
        self.ran.append(name)
        return name

    def _undo(self, name: str) -> None:
        self.ran.append(f"-{name}")

    def _trouble(self) -> None:
        if not self.mended:
            raise RetryableError("not yet")


class Trial:
    """The agent, a client, and the control role's key."""

    def __init__(self, bus: MemoryBus, agent: TrialAgent, client: Connected) -> None:
        self.bus = bus
        self.agent = agent
        self.client = client
        self.target = bus.id("agent/trial")
        self.control = Sealer(lambda: bus.domain().issue(control_role(bus.trust_domain)))

    async def given_up(self, capability: str = "work", **payload: Any) -> tuple[Submitted, TaskLog]:
        submitted = await self.client.client.submit(self.target, capability, payload, TaskOptions())
        log = TaskLog(self.client.desk, submitted.ref)
        await self.until_ended(log, 1)
        return submitted, log

    async def until_ended(self, log: TaskLog, epoch: int) -> None:
        async with asyncio.timeout(30):
            while not (log.ended and log.epoch >= epoch and not self.stored(tasks_stream_name(self.target))):
                await log.refresh()
                await asyncio.sleep(0.002)

    async def handled(self) -> None:
        async with asyncio.timeout(30):
            while self.stored(tasks_stream_name(self.target)):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.002)

    def stored(self, name: str) -> list[Any]:
        return list(self.bus.broker.jetstream.streams[name].messages.values())

    def letters(self) -> list[bytes]:
        dead = self.stored(dead_stream_name(self.target))
        return [one.data for one in dead if one.subject.endswith(".frame")]

    async def reissue(self, attempt: int, *, sealed_again: bool = False, **changes: Any) -> Sealed:
        """Reissue what was given up first; or the same task in another head of its sender's."""
        frame = decode_frame(self.letters()[0])
        original = Link(frame.head, frame.proof, frame.chain)
        head, now_ms = parse_head(frame.head), self.client.desk.clock_ms()
        if sealed_again:
            draft = Draft(
                kind=Kind.TASK,
                id=head.id,
                aud=head.aud,
                cap=head.cap,
                sub=head.sub,
                iat=now_ms,
                exp=head.exp,
            )
            original = (await self.client.sealer.seal(draft, frame.payload)).link
        assert head.kind is Kind.TASK
        draft = reissue_draft(
            head, task_id=head.id, now_ms=now_ms, expires_ms=now_ms + 60_000, attempt=attempt
        )
        draft |= changes
        return await self.control.seal(draft, frame.payload, (*frame.via, original))

    def put(self, sealed: Sealed) -> None:
        self.bus.broker.jetstream.streams[tasks_stream_name(self.target)].store(
            sealed.head.sub, sealed.frame, None
        )


@pytest.fixture
async def trial(bus: MemoryBus) -> Trial:
    await bus.grant("client/cli", "agent/trial", "work", "steps", "recorded", "telling")
    agent = await bus.start(TrialAgent)
    await bus.client("client/cli")
    client = bus._held[-1].parts
    assert client is not None
    return Trial(bus, agent, client)


def states(log: TaskLog) -> list[tuple[str, int]]:
    return [(one.state.value, one.epoch) for one in log.records]


async def test_a_redriven_task_begins_anew_and_completes(trial: Trial) -> None:
    submitted, log = await trial.given_up(name="a")
    assert states(log) == [("working", 1), ("failed", 1)]
    trial.agent.mended = True
    trial.put(await trial.reissue(2))
    await trial.until_ended(log, 2)
    assert states(log) == [("working", 1), ("failed", 1), ("working", 2), ("completed", 2)]
    assert [one.task for one in log.records] == [submitted.digest] * 4
    assert trial.agent.kinds == [("task", str(trial.bus.id("client/cli")))] * 2
    admitted = trial.bus.audit(trial.agent, event="admission")[-1]
    assert admitted["input"]["context"]["reissued_by"] == str(control_role(trial.bus.trust_domain))
    assert len(trial.letters()) == 1


async def test_it_tells_its_progress_anew(trial: Trial) -> None:
    submitted, log = await trial.given_up("telling")
    trial.agent.mended = True
    trial.put(await trial.reissue(2))
    await trial.until_ended(log, 2)
    handle = trial.client.handles.of(submitted.ref)
    told = [one.state or one.kind async for one in handle.events()]
    assert told == [
        *("working", "progress", "artifact", "failed"),
        *("working", "progress", "artifact", "completed"),
    ]


async def test_failed_again_it_is_a_dead_letter_again_and_can_be_redriven_again(trial: Trial) -> None:
    _, log = await trial.given_up(name="a")
    for attempt in (2, 3):
        trial.put(await trial.reissue(attempt))
        await trial.until_ended(log, attempt)
        assert len(trial.letters()) == attempt
    assert [state for state, _ in states(log)] == ["working", "failed"] * 3
    assert log.redriven == 3


async def test_a_redrive_that_is_replayed_runs_nothing(trial: Trial) -> None:
    _, log = await trial.given_up(name="a")
    first = await trial.reissue(2)
    trial.put(first)
    await trial.until_ended(log, 2)
    for _ in range(2):
        trial.put(first)
    await trial.handled()
    second = await trial.reissue(3)
    trial.put(second)
    await trial.until_ended(log, 3)
    for one in (first, second, await trial.reissue(2)):
        trial.put(one)
    await trial.handled()
    assert trial.agent.ran == ["a"] * 3
    assert len(trial.letters()) == 3


async def test_two_redrives_at_once_are_one(trial: Trial) -> None:
    _, log = await trial.given_up(name="a")
    trial.agent.mended = True
    for sealed in (await trial.reissue(2), await trial.reissue(2)):
        trial.put(sealed)
    async with asyncio.timeout(30):
        while not (await log.refresh() and log.closed):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.002)
    await trial.bus.clock.advance(31)  # the second is given back for as long as the first may run
    await trial.handled()
    assert trial.agent.ran == ["a"] * 2


@pytest.mark.parametrize("attempt", [1, 3, 4])
async def test_a_redrive_to_another_attempt_begins_nothing(trial: Trial, attempt: int) -> None:
    _, log = await trial.given_up(name="a")
    trial.put(await trial.reissue(attempt))
    await trial.handled()
    assert not await log.refresh()
    assert trial.agent.ran == ["a"]
    (refused,) = trial.bus.audit(trial.agent, event="refusal")
    assert "failed in attempt 1" in refused["reason"]


async def test_a_task_whose_log_is_full_is_not_redriven(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, log = await trial.given_up(name="a")
    monkeypatch.setattr(task_log, "_MOST_RECORDS", task_log._ROOM_TO_END + 2)
    trial.put(await trial.reissue(2))
    await trial.handled()
    assert not await log.refresh()
    assert trial.agent.ran == ["a"]
    (refused,) = trial.bus.audit(trial.agent, event="refusal")
    assert "has 2 records, and room for few more" in refused["reason"]
    assert len(trial.letters()) == 1


async def test_what_did_not_fail_is_not_redriven(trial: Trial) -> None:
    _, log = await trial.given_up(name="a")
    trial.agent.mended = True
    trial.put(await trial.reissue(2))
    await trial.until_ended(log, 2)
    trial.put(await trial.reissue(3))
    await trial.handled()
    assert not await log.refresh()
    assert log.last is not None
    assert log.last.state is TaskState.COMPLETED
    assert trial.agent.ran == ["a"] * 2


async def test_without_the_log_of_the_task_nothing_is_redriven(trial: Trial) -> None:
    """As when it is older than what is recorded of it is kept, or a broker has lost it."""
    _, log = await trial.given_up(name="a")
    sealed = await trial.reissue(2)
    stream = trial.bus.broker.jetstream.streams[log.ref.stream]
    for sequence in list(stream.messages):
        stream._drop(sequence)
    trial.put(sealed)
    await trial.handled()
    assert trial.agent.ran == ["a"]
    (refused,) = trial.bus.audit(trial.agent, event="refusal")
    assert "has no record" in refused["reason"]
    assert len(trial.letters()) == 2  # so that somebody hears of it


async def test_a_redrive_whose_time_is_over_leaves_the_task_failed(trial: Trial) -> None:
    _, log = await trial.given_up(name="a")
    now_ms = trial.client.desk.clock_ms()
    trial.put(await trial.reissue(2, iat=now_ms - 2_000, exp=now_ms - 1_000))
    await trial.handled()
    assert not await log.refresh()
    assert states(log) == [("working", 1), ("failed", 1)]
    assert len(trial.letters()) == 1


async def test_what_was_done_stays_done_and_what_was_undone_is_done_again(trial: Trial) -> None:
    _, log = await trial.given_up("steps")
    assert trial.agent.ran == ["kept", "undone", "-undone"]
    trial.agent.ran.clear()
    trial.put(await trial.reissue(2))
    await trial.until_ended(log, 2)
    assert trial.agent.ran == ["undone", "-undone"]
    trial.agent.ran.clear()
    trial.agent.mended = True
    trial.put(await trial.reissue(3))
    await trial.until_ended(log, 3)
    assert trial.agent.ran == ["undone"]
    assert log.last is not None
    assert log.last.body.result is not None
    assert log.last.body.result["messages"][0]["parts"][0]["data"] == ["kept", "undone"]


async def test_a_step_that_failed_runs_again(trial: Trial) -> None:
    _, log = await trial.given_up("recorded")
    assert trial.agent.ran == ["first", "second"]
    trial.agent.mended = True
    trial.put(await trial.reissue(2))
    await trial.until_ended(log, 2)
    assert trial.agent.ran == ["first", "second", "first"]
    assert log.last is not None
    assert log.last.state is TaskState.COMPLETED


async def test_a_task_of_anothers_payload_does_not_take_the_place_of_a_dead_letter(trial: Trial) -> None:
    """It has the same key, under which the other one's dead letter has its place."""
    first, log = await trial.given_up(name="a")
    agent = trial.bus._held[0].parts
    assert agent is not None
    delivery = Delivery(b"sealed by somebody", task_subject(trial.target, "work"), 1, 0, "")
    await DeadLetters(trial.target, agent.desk).write(delivery, "another", log=log, digest=b"\x07" * 32)
    places = {one.subject.rpartition(".")[0] for one in trial.stored(dead_stream_name(trial.target))}
    assert len(places) == 2
    assert sum(first.ref.key in place for place in places) == 1


async def working_again(trial: Trial, log: TaskLog, evidence: str | None) -> bool:
    """Whether a reader believes the agent's own record that it works on a failed task again."""
    agent = trial.bus._held[0].parts
    assert agent is not None
    mine = TaskLog(agent.desk, log.ref)
    await mine.refresh()
    assert mine.last is not None
    pd = mine.last.body.pd
    body = RecordBody(state=TaskState.WORKING, pd=pd, redrive=evidence or "x")
    if evidence is None:
        body = body._replace(redrive=None)
        mine._is_open_to = lambda _body: True  # type: ignore[method-assign]
    assert await mine.append(body, mine.last.task) is not None
    return await log.refresh()


async def test_a_record_with_a_genuine_redrive_is_believed(trial: Trial) -> None:
    """Honest: nothing but what is wrong with them keeps the others out."""
    _, log = await trial.given_up(name="a")
    assert await working_again(trial, log, redrive_evidence((await trial.reissue(2)).link))


@pytest.mark.parametrize(
    "wrong", ["none", "no link", "attempt", "task", "sealed again", "forged", "agent", "a plain reissue"]
)
async def test_a_record_without_a_genuine_redrive_is_passed_over(trial: Trial, wrong: str) -> None:
    """Also one that the agent itself signed: it can't bring back what has failed."""
    _, log = await trial.given_up(name="a")
    agent = trial.bus._held[0].parts
    assert agent is not None
    evidence: str | None = None
    if wrong == "no link":
        evidence = "AAAA"
    elif wrong == "attempt":
        evidence = redrive_evidence((await trial.reissue(3)).link)
    elif wrong == "a plain reissue":
        evidence = redrive_evidence((await trial.reissue(2, att=None)).link)
    elif wrong == "task":
        evidence = redrive_evidence((await trial.reissue(2)).link)
        _, log = await trial.given_up(name="b")
    elif wrong == "sealed again":
        evidence = redrive_evidence((await trial.reissue(2, sealed_again=True)).link)
    elif wrong == "forged":
        genuine = (await trial.reissue(2)).link
        proof = (await trial.reissue(3)).link.proof
        evidence = redrive_evidence(Link(genuine.head_bytes, proof, genuine.chain))
    elif wrong == "agent":
        evidence = redrive_evidence((await trial.reissue(2)).link)
        evidence = redrive_evidence(by_agent(agent, trial, evidence))
    assert not await working_again(trial, log, evidence)
    assert states(log) == [("working", 1), ("failed", 1)]


@pytest.mark.parametrize(("later_s", "believed"), [(85, True), (95, False)])
async def test_a_record_with_a_redrive_that_was_over_is_passed_over(
    trial: Trial, later_s: int, believed: bool
) -> None:
    """It may have been signed later, by an old key of the control role's; clocks may differ by 30 s."""
    _, log = await trial.given_up(name="a")
    evidence = redrive_evidence((await trial.reissue(2)).link)
    await trial.bus.clock.advance(later_s)
    assert await working_again(trial, log, evidence) is believed


@pytest.mark.parametrize(("ahead_ms", "believed"), [(25_000, True), (35_000, False)])
async def test_a_record_with_a_redrive_of_later_is_passed_over(
    trial: Trial, ahead_ms: int, believed: bool
) -> None:
    _, log = await trial.given_up(name="a")
    iat = trial.client.desk.clock_ms() + ahead_ms
    evidence = redrive_evidence((await trial.reissue(2, iat=iat)).link)
    assert await working_again(trial, log, evidence) is believed


def by_agent(agent: Connected, trial: Trial, evidence: str) -> Link:
    """A head like a redrive's, signed by the agent: no sealer makes one, so its parts are put together."""
    link = decode_link(base64.b64decode(evidence))
    svid = agent.source.svid
    value = unpack_exact(link.head_bytes, "a head", max_items=64, max_bytes=32_768)
    head_bytes = pack(value | {"iss": str(svid.spiffe_id), "x5t": svid.x5t})
    prepared = _Prepared(link.head, head_bytes, leaf_hash(protected_head(head_bytes)), b"", svid, b"", ())
    tree, signature = _sign([prepared])
    return Link(head_bytes, Proof(signature, tree.size, 0, tree.path(0)), svid.cert_chain)
