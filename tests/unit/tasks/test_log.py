"""The log of a task: who loses a race gives way, and what is no record of it is nobody's word."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from agentweave_bus.envelope import Draft, EnvelopeVerifier, Kind, Sealer, encode_payload, new_id
from agentweave_bus.exceptions import BusError
from agentweave_bus.identity import ChainVerifier
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import RECORD_TYPE, TaskNamed
from agentweave_bus.types import TaskState
from tests.unit.tasks.conftest import TASK, World, body

pytestmark = pytest.mark.anyio


async def test_what_is_written_is_read_by_agent_and_submitter_in_order(world: World) -> None:
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(body(TaskState.SUBMITTED, message="later", retry_at=5), TASK)
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(body(TaskState.COMPLETED, result={"status": "completed"}), TASK)
    for who in ("agent", "client"):
        read = world.log(who)
        assert await read.refresh()
        assert [(one.state, one.epoch, one.number) for one in read.records] == [
            ("working", 1, 0),
            ("submitted", 1, 1),
            ("working", 2, 2),
            ("completed", 2, 3),
        ]
        assert [one._replace(stored_at_ms=None) for one in read.records] == log.records
        assert read.ended


async def test_the_first_record_names_the_task_and_no_other_does(world: World) -> None:
    log = world.log()
    for state in (TaskState.WORKING, TaskState.SUBMITTED, TaskState.WORKING):
        await log.append(body(state), TASK)
    read = world.log("client")
    await read.refresh()
    assert [one.body.task for one in read.records] == [
        TaskNamed(capability="work", id=world.task_id),
        None,
        None,
    ]


async def test_a_first_record_that_names_no_task_is_as_good(world: World) -> None:
    smuggle(world, 0, await forged(world, "agent", 0))
    log = world.log()
    await log.refresh()
    assert [(one.state, one.body.task) for one in log.records] == [("canceled", None)]


async def test_of_two_who_write_the_same_slot_one_wins_and_the_other_knows(world: World) -> None:
    first, second = world.log(), world.log()
    won = await asyncio.gather(*(one.append(body(TaskState.WORKING), TASK) for one in (first, second)))
    assert sorted(one is None for one in won) == [False, True]
    assert [one.digest for one in first.records] == [one.digest for one in second.records]


async def test_a_late_outcome_is_dropped(world: World) -> None:
    slow, quick = world.log(), world.log()
    await slow.append(body(TaskState.WORKING), TASK)
    await quick.refresh()
    await quick.append(body(TaskState.WORKING), TASK)
    assert await slow.append(body(TaskState.COMPLETED), TASK) is None
    assert slow.epoch == 2
    assert await quick.append(body(TaskState.COMPLETED), TASK) is not None


async def test_nothing_is_written_after_the_end(world: World) -> None:
    log = world.log()
    await log.append(body(TaskState.CANCELED, message="no more"), TASK)
    assert await log.append(body(TaskState.WORKING), TASK) is None
    other = world.log()
    assert await other.append(body(TaskState.WORKING), TASK) is None
    assert other.ended


async def forged(world: World, who: str, slot: int, **changed: object) -> bytes:
    """Seal what would be the record in ``slot``, as somebody, with some of it changed."""
    parts = world.parts[who]
    now_ms = parts.desk.clock_ms()
    draft = Draft(
        kind=Kind.RECORD,
        id=new_id(now_ms),
        aud=type(parts.me)(f"spiffe://{world.ref.agent.trust_domain}"),
        cap=RECORD_TYPE,
        sub=world.ref.subject(slot),
        iat=now_ms,
        exp=now_ms + 60_000,
        re=TASK,
        seq=0,
        att=0,
    )
    draft |= {name: value for name, value in changed.items() if name != "says"}
    sealed = await parts.sealer.seal(draft, changed.get("says") or body(TaskState.CANCELED).encoded())
    return sealed.frame


def smuggle(world: World, slot: int, frame: bytes) -> None:
    """Store a frame where only somebody with full rights at the broker can."""
    stream = world.bus.broker.jetstream.streams[world.ref.stream]
    stream.store(world.ref.subject(slot), frame, None)


def naming(**changed: str) -> bytes:
    """Return what a record says that names some task."""
    return body(TaskState.CANCELED, task=TaskNamed(**{"capability": "work", "id": "x", **changed})).encoded()


FORGERIES = {
    "of another agent": ("mallory", {}),
    "of the submitter": ("client", {}),
    "of another place": ("agent", {"sub": "aw.state.a.b.c.d.e.0"}),
    "of another kind": ("agent", {"kind": Kind.EVENT, "re": None, "seq": None, "att": None}),
    "of another type": ("agent", {"cap": "task.step"}),
    "of no attempt": ("agent", {"att": None}),
    "of no task": ("agent", {"re": None}),
    "that skips an attempt": ("agent", {"att": 3}),
    "whose payload is none": ("agent", {"says": encode_payload({"state": "canceled"})}),
    "of another agent whose clock goes ahead": ("mallory", {"iat": 2**50, "exp": 2**50 + 60_000}),
    "of another agent whose payload can't be read": ("mallory", {"says": b"\xc1"}),
    "that names another capability": ("agent", {"says": naming(capability="other")}),
    "that names another task": ("agent", {"says": naming(id="other")}),
    "that completes what never began": ("agent", {"says": body(TaskState.COMPLETED).encoded()}),
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_what_is_no_record_is_passed_over_counted_and_stops_nothing(world: World, name: str) -> None:
    who, changed = FORGERIES[name]
    smuggle(world, 0, await forged(world, who, 0, **changed))
    log = world.log()
    record = await log.append(body(TaskState.WORKING), TASK)
    assert record is not None
    assert record.number == 0
    reader = world.log("client")
    await reader.refresh()
    assert [one._replace(stored_at_ms=None) for one in reader.records] == [record]
    for one in ("agent", "client"):
        counted = world.parts[one].metrics.registry.get_sample_value("agentweave_foreign_records_total")
        assert counted == 1


async def test_noise_is_passed_over_up_to_a_bound(world: World) -> None:
    for slot in range(70):
        smuggle(world, slot, b"\xff" * slot)
    with pytest.raises(BusError, match="full of what is no record"):
        await world.log("client").refresh()


async def test_a_copy_of_a_genuine_record_counts_nowhere_else(world: World) -> None:
    other = World(world.bus, world.parts, new_id(world.desk("agent").clock_ms()))
    await other.log().append(body(TaskState.CANCELED), TASK)
    copied = world.bus.broker.jetstream.streams[world.ref.stream].last_of(other.ref.subject(0))
    assert copied is not None
    smuggle(world, 0, copied.data)
    log = world.log("client")
    await log.refresh()
    assert log.records == []


async def replace_authority(world: World) -> None:
    """Have everybody's authority replaced; returns when nobody trusts the one before any more."""
    await world.bus.rotate_ca()
    bundles = [world.parts[who].source.bundle_for for who in ("agent", "client")]
    async with asyncio.timeout(30):
        while any(len(one("test.local").authority_fingerprints) > 1 for one in bundles):  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)


def new_host(world: World, who: str) -> Desk:
    """Return how the logs look to somebody whose host does not remember the authorities of before."""
    desk = world.desk(who)
    return replace(desk, verifier=EnvelopeVerifier(ChainVerifier(world.parts[who].source)))


async def test_records_outlive_the_authority_of_who_signed_them(world: World) -> None:
    await world.log().append(body(TaskState.WORKING), TASK)
    await replace_authority(world)
    log = world.log()
    assert await log.refresh()
    await log.append(body(TaskState.COMPLETED), TASK)  # by the new one
    await world.bus.clock.advance(timedelta(minutes=2))
    for who in ("agent", "client"):
        read = world.log(who)
        await read.refresh()
        assert [one.state for one in read.records] == ["working", "completed"]


async def test_a_record_that_its_authority_signed_after_it_left_stops_everybody(world: World) -> None:
    """Who stole its key can do no more than that; to pass it over, one would have to know that it was him."""
    await world.log().append(body(TaskState.WORKING), TASK)
    domain = world.bus.domain()
    stolen = world.parts["agent"].source.svid
    await replace_authority(world)
    assert world.parts["agent"].source.svid != stolen
    parts = world.parts["agent"]
    late = replace(parts.desk, sealer=Sealer(lambda: stolen))
    log = TaskLog(late, world.ref)
    await log.refresh()
    await log.append(body(TaskState.COMPLETED), TASK)
    assert domain.bundle == parts.source.bundle_for("test.local")
    for who in ("agent", "client"):
        read = world.log(who)
        with pytest.raises(BusError, match="can't be verified now"):
            await read.refresh()
        assert [one.state for one in read.records] == ["working"]


async def test_what_may_be_genuine_and_cannot_be_verified_now_stops_everybody(world: World) -> None:
    """Passing it over could run a task a second time that has ended."""
    log = world.log()
    await log.append(body(TaskState.CANCELED), TASK)
    await replace_authority(world)
    for who in ("agent", "client"):
        read = TaskLog(new_host(world, who), world.ref)
        for _ in range(2):  # it does not get used to it
            with pytest.raises(BusError, match="can't be verified now"):
                await read.refresh()


@pytest.mark.slow  # two hours of everybody's polling
async def test_records_outlive_the_certificate_that_signed_them(world: World) -> None:
    await world.log().append(body(TaskState.CANCELED, message="long ago"), TASK)
    await world.bus.clock.advance(timedelta(hours=2))
    log = world.log("client")
    await log.refresh()
    assert log.last is not None
    assert log.last.body.message == "long ago"


async def test_who_may_not_read_a_log_is_told_at_once(world: World) -> None:
    await world.log().append(body(TaskState.WORKING), TASK)
    with pytest.raises(BusError, match="does not let this identity read"):
        await asyncio.wait_for(world.log("mallory").refresh(), 30)


@pytest.mark.slow  # two hours of everybody's polling
async def test_a_record_written_late_is_readable_for_good(world: World) -> None:
    """Its worker stood still, or had no broker, between signing and storing it."""
    frame = await forged(world, "agent", 0)
    await world.bus.clock.advance(45)
    smuggle(world, 0, frame)
    await world.bus.clock.advance(timedelta(hours=2))
    log = world.log("client")
    await log.refresh()
    assert [one.state for one in log.records] == [TaskState.CANCELED]


async def test_who_pulls_on_a_lost_connection_is_told_so_in_the_bus_s_own_words(world: World) -> None:
    session = await world.parts["agent"].keeper.session(1)
    await session._client.close()
    with pytest.raises(BusError, match="is lost"):
        await session.receive_pulled("aw.inbox.x", lambda _message: asyncio.sleep(0))
