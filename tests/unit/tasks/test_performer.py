"""What a worker does with what its queue gives out: each task has one outcome, whatever happens on the way."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable
from typing import Any, Final, cast

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.bus.streams import dead_stream_name, state_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import task_subject
from agentweave_bus.client import Submitted, TaskOptions
from agentweave_bus.envelope import Draft, Kind, decode_frame, decode_payload, encode_payload, new_id
from agentweave_bus.exceptions import AuthorizationError, NoResponderError, TaskFailedError
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.tasks import performer
from agentweave_bus.tasks.attempt import Kept
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState

pytestmark = pytest.mark.anyio

DELIVERY: Final = Delivery(b"", "aw.task", 1, 0, "$JS.ACK.here")


class ToilAgent(SecureAgent):
    """Notes what it runs; some of it fails, some of it takes until it is told to go on."""

    def on_start(self) -> None:
        self.ran: list[str] = []
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    @capability("work")
    async def work(self, name: str) -> dict[str, str]:
        self.ran.append(name)
        return {"done": name}

    @capability("fail")
    async def fail(self, name: str) -> None:
        self.ran.append(name)
        raise TaskFailedError(f"{name} can't be done")

    @capability("toil")
    async def toil(self, name: str) -> str:
        self.ran.append(name)
        self.begun.set()
        await self.go_on.wait()
        return name


class Yard:
    """The agent, a client, and looks at what the broker keeps."""

    def __init__(self, bus: MemoryBus, agent: ToilAgent, client: Connected, worker: Connected) -> None:
        self.bus = bus
        self.agent = agent
        self.client = client
        self.worker = worker
        self.target = bus.id("agent/toil")

    async def submit(self, capability: str = "work", name: str = "a", **options: Any) -> Submitted:
        return await self.client.client.submit(
            self.target, capability, {"name": name}, TaskOptions(**options)
        )

    async def ended(self, submitted: Submitted) -> TaskLog:
        """Wait for the task's end, and for its leaving the queue."""
        log = TaskLog(self.client.desk, submitted.ref)
        await self.until(lambda: log.ended, log.refresh)
        await self.until(lambda: not self.queued)
        return log

    async def ended_but_queued(self, submitted: Submitted) -> TaskLog:
        log = TaskLog(self.client.desk, submitted.ref)
        await self.until(lambda: log.ended, log.refresh)
        return log

    async def until(self, check: Callable[[], bool], look: Callable[[], Any] | None = None) -> None:
        async with asyncio.timeout(30):
            while not check():
                if look is not None:
                    await look()
                await asyncio.sleep(0.002)

    def stored(self, name: str) -> list[Any]:
        return list(self.bus.broker.jetstream.streams[name].messages.values())

    @property
    def queued(self) -> int:
        return len(self.stored(tasks_stream_name(self.target)))

    @property
    def dead(self) -> int:
        return sum(one.subject.endswith(".record") for one in self.stored(dead_stream_name(self.target)))

    async def smuggle(self, **changed: Any) -> None:
        """Put an envelope of the client's into the queue, past the client's own checks."""
        parts, now_ms = self.client, self.client.desk.clock_ms()
        draft = Draft(
            kind=Kind.TASK,
            id=new_id(now_ms),
            aud=self.target,
            cap="work",
            sub=task_subject(self.target, "work"),
            iat=now_ms,
            exp=now_ms + 60_000,
        )
        sealed = await parts.sealer.seal({**draft, **changed}, encode_payload({"name": "smuggled"}))
        self.put(sealed.frame, changed.get("cap", "work"))

    def put(self, frame: bytes, capability: str = "work") -> None:
        stream = self.bus.broker.jetstream.streams[tasks_stream_name(self.target)]
        stream.store(task_subject(self.target, capability), frame, None)


@pytest.fixture
async def yard(bus: MemoryBus) -> Yard:
    await bus.grant("client/cli", "agent/toil", "work", "fail", "toil")
    agent = await bus.start(ToilAgent)
    await bus.client("client/cli")
    worker, client = (one.parts for one in bus._held)
    assert worker is not None
    assert client is not None
    yard = Yard(bus, agent, client, worker)
    await yard.until(lambda: tasks_stream_name(yard.target) in bus.broker.jetstream.streams)
    return yard


def states(log: TaskLog) -> list[tuple[str, int]]:
    return [(one.state.value, one.epoch) for one in log.records]


async def test_a_task_runs_once_and_its_outcome_is_recorded_once(yard: Yard) -> None:
    log = await yard.ended(await yard.submit())
    assert states(log) == [("working", 1), ("completed", 1)]
    assert log.last is not None
    assert log.last.body.result is not None
    assert log.last.body.result["messages"][0]["parts"][0]["data"] == {"done": "a"}
    assert yard.agent.ran == ["a"]
    assert yard.dead == 0


async def test_it_is_authorized_and_audited_at_both_ends(yard: Yard) -> None:
    submitted = await yard.submit()
    await yard.ended(submitted)
    (sent,) = yard.bus.audit("client/cli", event="submit")
    admitted, outcome = yard.bus.audit(yard.agent, digest=sent["digest"])
    assert sent["digest"] == submitted.digest.hex()
    assert admitted["input"]["context"]["kind"] == "task"
    assert admitted["input"]["context"]["stored_at"] > 0
    assert (admitted["event"], admitted["allowed"], outcome["status"]) == ("admission", True, "completed")


async def test_a_failure_is_an_outcome_and_no_dead_letter(yard: Yard) -> None:
    log = await yard.ended(await yard.submit("fail"))
    assert states(log) == [("working", 1), ("failed", 1)]
    assert log.last is not None
    assert log.last.body.result is not None
    assert log.last.body.result["error"] == "a can't be done"
    assert (yard.agent.ran, yard.dead) == (["a"], 0)


async def test_what_its_own_policy_denies_is_not_stored(yard: Yard) -> None:
    await yard.bus.set_grants({})
    with pytest.raises(AuthorizationError) as caught:
        await yard.submit()
    assert caught.value.direction == "outbound"
    assert yard.queued == 0


async def test_what_the_agents_policy_denies_is_rejected_and_never_run(yard: Yard) -> None:
    await yard.smuggle(cap="work", kind=Kind.TASK)  # it is granted: runs
    await yard.until(lambda: yard.agent.ran == ["smuggled"])
    await yard.bus.set_grants({})
    await yard.smuggle()
    await yard.until(lambda: not yard.queued)
    refusals = yard.bus.audit(yard.agent, event="refusal")
    assert [one["step_name"] for one in refusals] == ["authorization"]
    assert yard.agent.ran == ["smuggled"]


async def test_a_queue_that_nobody_has_made_is_told_as_such(yard: Yard) -> None:
    await yard.bus.grant("client/cli", "agent/absent", "work")
    with pytest.raises(NoResponderError, match="has no queue"):
        await yard.client.client.submit(yard.bus.id("agent/absent"), "work", {}, TaskOptions(timeout=5))


async def test_the_same_idempotency_key_is_the_same_task(yard: Yard) -> None:
    first = await yard.submit(idempotency_key="order-17")
    again = await yard.submit(idempotency_key="order-17")
    assert first.ref == again.ref
    log = await yard.ended(first)
    assert states(log) == [("working", 1), ("completed", 1)]
    assert yard.agent.ran == ["a"]
    late = await yard.submit(idempotency_key="order-17")
    await yard.ended(late)
    assert (yard.agent.ran, yard.dead) == (["a"], 0)


async def test_a_key_with_another_payload_is_audited_and_no_dead_letter(yard: Yard) -> None:
    """Its submitter is told; nothing is lost that an operator could bring back."""
    await yard.ended(await yard.submit(idempotency_key="order-17"))
    other = await yard.submit(name="b", idempotency_key="order-17")
    log = await yard.ended(other)
    assert (yard.agent.ran, yard.dead) == (["a"], 0)
    assert states(log) == [("working", 1), ("completed", 1)]
    assert log.records[0].body.pd != other.pd.hex()
    (refusal,) = yard.bus.audit(yard.agent, event="refusal")
    assert (refusal["step_name"], refusal["digest"]) == ("replay", other.digest.hex())
    assert "another payload" in refusal["reason"]


async def test_an_expired_task_under_a_key_that_runs_leaves_the_log_of_that_one_alone(yard: Yard) -> None:
    running = await yard.submit("toil")
    await yard.agent.begun.wait()
    now_ms = yard.client.desk.clock_ms()
    await yard.smuggle(
        id=running.ref.id,
        cap="toil",
        sub=task_subject(yard.target, "toil"),
        iat=now_ms - 20_000,
        exp=now_ms - 1,
    )
    await yard.until(lambda: yard.queued == 1)
    yard.agent.go_on.set()
    log = await yard.ended(running)
    assert states(log) == [("working", 1), ("completed", 1)]
    assert (log._foreign, yard.dead) == (0, 0)


async def test_what_is_expired_is_not_run(yard: Yard) -> None:
    now_ms = yard.client.desk.clock_ms()
    await yard.smuggle(iat=now_ms - 20_000, exp=now_ms - 10)
    await yard.until(lambda: not yard.queued)
    assert yard.agent.ran == []


async def test_of_what_nobody_has_signed_only_how_it_began_is_kept(yard: Yard) -> None:
    garbage = b"no frame at all" * 1_000
    yard.put(garbage)
    await yard.until(lambda: not yard.queued)
    (letter,) = yard.stored(dead_stream_name(yard.target))
    assert letter.subject.endswith(".record")
    told = decode_payload(decode_frame(letter.data).payload)
    assert (told["size"], told["frame"]) == (len(garbage), hashlib.sha256(garbage).hexdigest())
    assert base64.b64decode(told["beginning"]) == garbage[:1_024]
    assert yard.agent.ran == []


async def test_only_some_of_what_nobody_has_signed_leaves_a_dead_letter(
    yard: Yard, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(230):
        yard.put(b"no frame %d" % number)
    await yard.until(lambda: not yard.queued)
    assert yard.dead == 200
    assert sum("let go and counted" in one.message for one in caplog.records) == 1
    await yard.bus.clock.advance(300)
    yard.put(b"no frame, later")
    await yard.until(lambda: not yard.queued)
    assert yard.dead == 201
    assert "30 frames that can't be verified left no dead letter" in caplog.text


async def test_what_somebody_has_signed_is_kept_untouched(yard: Yard) -> None:
    await yard.smuggle(kind=Kind.CALL)
    (frame,) = (one.data for one in yard.stored(tasks_stream_name(yard.target)))
    await yard.until(lambda: not yard.queued)
    kept = [one.data for one in yard.stored(dead_stream_name(yard.target)) if one.subject.endswith(".frame")]
    assert kept == [frame]


async def test_a_call_in_the_queue_is_no_task(yard: Yard) -> None:
    await yard.smuggle(kind=Kind.CALL)
    await yard.until(lambda: not yard.queued)
    assert (yard.agent.ran, yard.dead) == ([], 1)


async def test_a_task_for_somebody_else_is_no_task_of_mine(yard: Yard) -> None:
    await yard.smuggle(aud=yard.bus.id("agent/other"))
    await yard.until(lambda: not yard.queued)
    assert (yard.agent.ran, yard.dead) == ([], 1)


async def test_a_policy_that_does_not_answer_sends_it_back_and_loses_nothing(yard: Yard) -> None:
    submitted = None
    with yard.bus.opa_down():
        await yard.smuggle()
        await yard.until(lambda: bool(yard.bus.audit(yard.agent, event="refusal")))
        assert (yard.queued, yard.agent.ran) == (1, [])
    await yard.bus.clock.advance(3)
    await yard.until(lambda: yard.agent.ran == ["smuggled"])
    assert submitted is None


async def test_a_worker_that_dies_loses_its_attempt_and_not_the_task(yard: Yard) -> None:
    submitted = await yard.submit("toil")
    await asyncio.wait_for(yard.agent.begun.wait(), 30)
    await yard.bus.kill_worker(yard.agent)
    yard.agent = await yard.bus.start(ToilAgent)
    yard.agent.go_on.set()
    await yard.bus.clock.advance(31)
    log = await yard.ended(submitted)
    assert states(log) == [("working", 1), ("submitted", 1), ("working", 2), ("completed", 2)]
    assert yard.agent.ran == ["a"]


async def test_a_task_given_out_twice_is_left_to_who_works_on_it(yard: Yard) -> None:
    """A broker that was killed gives out again what is being worked on, and counts from one."""
    submitted = await yard.submit("toil")
    await asyncio.wait_for(yard.agent.begun.wait(), 30)
    (frame,) = [one.data for one in yard.stored(tasks_stream_name(yard.target))]
    yard.put(frame, "toil")
    await yard.bus.clock.advance(5)
    assert yard.agent.ran == ["a"]
    yard.agent.go_on.set()
    log = await yard.ended_but_queued(submitted)
    assert states(log) == [("working", 1), ("completed", 1)]
    await yard.bus.clock.advance(30)
    await yard.until(lambda: not yard.queued)
    assert yard.agent.ran == ["a"]


async def test_a_worker_that_vanishes_is_taken_for_lost_after_a_while(yard: Yard) -> None:
    submitted = await yard.submit("toil")
    await asyncio.wait_for(yard.agent.begun.wait(), 30)
    for client in [one for one in yard.bus.broker.clients if one.user == yard.target]:
        client.cut()
    await yard.bus.clock.advance(1)
    yard.agent.go_on.set()
    await yard.bus.clock.advance(60)
    log = await yard.ended(submitted)
    assert states(log)[-1][0] == "completed"


async def test_a_worker_told_to_stop_finishes_what_it_does(yard: Yard) -> None:
    submitted = await yard.submit("toil")
    await asyncio.wait_for(yard.agent.begun.wait(), 30)
    stopping = asyncio.ensure_future(yard.bus.stop(yard.agent))
    await asyncio.sleep(0.05)
    yard.agent.go_on.set()
    await asyncio.wait_for(stopping, 30)
    log = await yard.ended(submitted)
    assert states(log) == [("working", 1), ("completed", 1)]


async def test_a_connection_that_is_lost_while_a_worker_stops_costs_no_outcome(yard: Yard) -> None:
    submitted = await yard.submit("toil")
    await asyncio.wait_for(yard.agent.begun.wait(), 30)
    stopping = asyncio.ensure_future(yard.bus.stop(yard.agent))
    await asyncio.sleep(0.05)
    for client in [one for one in yard.bus.broker.clients if one.user == yard.target]:
        client.cut()
    await yard.bus.clock.advance(1)
    yard.agent.go_on.set()
    await asyncio.wait_for(stopping, 30)
    log = await yard.ended(submitted)
    assert states(log) == [("working", 1), ("completed", 1)]


async def test_who_is_cancelled_in_the_moment_in_which_a_delivery_is_kept_no_more_is_cancelled() -> None:
    class Held:
        """Cancels the worker in the very turn in which telling the broker is given up."""

        async def keep(self, _delivery: Delivery) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                worker.cancel()
                raise

    went_on = asyncio.Event()

    async def work() -> None:
        async with Kept(cast("Acknowledgements", Held()), DELIVERY, every_s=0.001, seconds=10):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0)
        went_on.set()

    worker = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await worker
    assert not went_on.is_set()


async def test_what_goes_wrong_while_a_delivery_is_kept_is_raised() -> None:
    class Broken:
        async def keep(self, _delivery: Delivery) -> None:
            raise RuntimeError("broken")

    kept = Kept(cast("Acknowledgements", Broken()), DELIVERY, every_s=0.01, seconds=0.005)
    with pytest.raises(RuntimeError, match="broken"):
        async with kept:
            await asyncio.sleep(0.05)


async def test_a_worker_told_to_stop_gives_back_what_takes_too_long_and_no_attempt_is_lost(
    yard: Yard,
) -> None:
    submitted = await yard.submit("toil", retry={"attempts": 1})
    await asyncio.wait_for(yard.agent.begun.wait(), 30)
    stopping = asyncio.ensure_future(yard.bus.stop(yard.agent))
    await yard.bus.clock.advance(28)  # tasks have 27 of bus.drain_timeout's 30 seconds
    await asyncio.wait_for(stopping, 30)
    yard.agent = await yard.bus.start(ToilAgent)
    yard.agent.go_on.set()
    log = await yard.ended(submitted)
    assert states(log) == [("working", 1), ("submitted", 1), ("working", 2), ("completed", 2)]
    assert log.records[1].body.given_back
    assert yard.agent.ran == ["a"]


async def test_a_task_lost_too_often_is_given_up_and_becomes_a_dead_letter(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performer, "_LAST_WORDS_S", 0.0)  # as who is killed has none
    submitted = await yard.submit("toil", retry={"attempts": 2})
    for _ in range(2):
        await asyncio.wait_for(yard.agent.begun.wait(), 30)
        await yard.bus.kill_worker(yard.agent)
        yard.agent = await yard.bus.start(ToilAgent)
        for _ in range(3):  # until the broker misses it, and until it is sure to be nobody's
            await yard.bus.clock.advance(31)
    log = await yard.ended(submitted)
    assert states(log) == [("working", 1), ("working", 2), ("working", 3), ("failed", 3)]
    assert yard.dead == 1


async def test_no_more_run_at_once_than_there_are_places_and_none_is_lost(yard: Yard) -> None:
    submitted = await asyncio.gather(*(yard.submit(name=str(number)) for number in range(100)))
    for one in submitted:
        await yard.ended(one)
    assert sorted(yard.agent.ran, key=int) == [str(number) for number in range(100)]


async def test_states_are_what_they_say(yard: Yard) -> None:
    log = await yard.ended(await yard.submit())
    assert log.last is not None
    assert log.last.state is TaskState.COMPLETED


@pytest.mark.parametrize("rule", [{"attempts": 0}, {"forever": 1}])
async def test_what_asks_for_no_rule_of_retries_is_rejected_once_and_for_all(
    yard: Yard, caplog: pytest.LogCaptureFixture, rule: dict[str, int]
) -> None:
    await yard.smuggle(retry=rule)
    await yard.until(lambda: yard.queued == 0)
    assert yard.agent.ran == []
    (stored,) = yard.stored(state_stream_name(yard.target))
    payload = decode_payload(decode_frame(stored.data).payload)
    assert (payload["state"], payload["step"]) == ("rejected", "payload")
    assert payload["message"].startswith("retry: ")
    assert "error of the bus itself" not in caplog.text
