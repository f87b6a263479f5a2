"""The control role on a real broker: who announces itself has what it needs, and keeps it over restarts."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest

from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.bus.stream_limits import StreamLimits
from agentweave_bus.bus.streams import MAX_CONSUMERS, task_consumer, task_streams, tasks_stream
from agentweave_bus.bus.subjects import Priority, pull_inbox, task_subject
from agentweave_bus.control import reconcile
from agentweave_bus.control.reconcile import reconcile_consumers, reconcile_streams
from agentweave_bus.embedded.stack import StackSettings, embedded_stack
from agentweave_bus.envelope import Sealer, control_role
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.identity import ChainVerifier, IdentitySource
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.announcing import Announcer
from tests.integration.announcing import announce, asked, consumer_info, served
from tests.integration.connections import Fixed, heard_within
from tests.integration.probes import ABSENT, CLI, DOMAIN, ECHO, FRONT, PATIENCE

pytestmark = pytest.mark.anyio

CONTROL = control_role(DOMAIN)


async def pulled(raw, agent, capability):
    """What the consumer of a capability gives out to its own agent."""
    spec, inbox = task_consumer(agent, capability), f"{pull_inbox(agent, 'A' * 22)}.x"
    heard = await raw.listen(inbox)
    body = json.dumps({"batch": 1, "expires": 10_000_000_000}).encode()
    await raw.send(f"$JS.API.CONSUMER.MSG.NEXT.{spec.stream}.{spec.name}", body, inbox)
    return await heard_within(heard)


async def test_who_announces_itself_can_queue_pull_and_acknowledge(world, mallory):
    echo, cli = await world.raw(ECHO), await world.raw(CLI)
    await announce(echo, ECHO, "work", "say")
    await served(mallory, ECHO, "work")
    await served(mallory, ECHO, "say")
    for stream in task_streams(ECHO):
        assert (await asked(mallory, f"$JS.API.STREAM.INFO.{stream.name}"))["config"]["deny_purge"] is True
    await cli.send(task_subject(ECHO, "work"), b"a task")
    task = await pulled(echo, ECHO, "work")
    assert task.data == b"a task"
    await echo.send(task.reply, b"+ACK")
    assert echo.refused == []
    with anyio.fail_after(PATIENCE):
        while await world.stored(mallory, tasks_stream(ECHO).name):  # it takes an acknowledgement up later
            pass


async def test_announced_again_nothing_changes(world, mallory):
    front = await world.raw(FRONT)
    await announce(front, FRONT, "relay")
    await served(mallory, FRONT, "relay")
    before = await consumer_info(mallory, task_consumer(FRONT, "relay"))
    await announce(front, FRONT, "relay")
    await announce(front, FRONT, "later")
    await served(mallory, FRONT, "later")
    assert (await consumer_info(mallory, task_consumer(FRONT, "relay")))["created"] == before["created"]


async def test_queues_wait_for_a_word_as_long_as_was_announced_last(world, mallory):
    """The same consumer: who pulls from it sees no difference."""
    front, spec = await world.raw(FRONT), task_consumer(FRONT, "patient")
    await announce(front, FRONT, "patient", ack_wait=2.5)
    await served(mallory, FRONT, "patient")
    made = await consumer_info(mallory, spec)
    assert made["config"]["ack_wait"] == 2_500_000_000
    await announce(front, FRONT, "patient", ack_wait=9)
    with anyio.fail_after(PATIENCE):
        while (info := await consumer_info(mallory, spec))["config"]["ack_wait"] != 9_000_000_000:  # noqa: ASYNC110 - no event
            await anyio.sleep(0.01)
    assert info["created"] == made["created"]


@pytest.fixture
async def control(world):
    """A second connection of the control role, for declarations that the first would not make."""
    svid = world.issue(CONTROL)
    source = IdentitySource(Fixed(svid, world.stack.api.authority.bundle))
    await source.start(5)
    address = BusAddress([world.stack.bus_url], world.stack.broker_id)
    async with Keeper(source, ChainVerifier(source), address).open(deadline_s=PATIENCE) as keeper:
        yield await keeper.session(PATIENCE)
    await source.aclose()


def changed(spec, **changes):
    return replace(spec, config=spec.config | changes)


async def told(control, consumer):
    subject = f"$JS.API.CONSUMER.INFO.{consumer.stream}.{consumer.name}"
    return json.loads((await control.ask(subject, b"", timeout_s=PATIENCE)).data)


async def test_a_changed_declaration_is_applied_and_an_impossible_one_refused(control):
    agent = SpiffeID(f"spiffe://{DOMAIN}/agent/declared")
    queue, consumer = tasks_stream(agent), task_consumer(agent, "pay")
    assert await reconcile_streams(control, [queue]) == [queue.name]
    assert await reconcile_consumers(control, [consumer]) == [consumer.name]
    # As declared: what the broker fills in makes no difference.
    created = (await told(control, consumer))["created"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconcile, "_apply", None)
        patch.setattr(reconcile, "_apply_consumer", None)
        assert await reconcile_streams(control, [queue]) == []
        assert await reconcile_consumers(control, [consumer]) == []
    longer = changed(consumer, ack_wait=60_000_000_000)
    assert await reconcile_consumers(control, [longer]) == []
    info = await told(control, consumer)
    assert (info["config"]["ack_wait"], info["created"]) == (60_000_000_000, created)
    with pytest.raises(ConfigurationError, match="deliver policy can not be updated") as refused:
        await reconcile_consumers(control, [changed(consumer, deliver_policy="new")])
    assert "Remove it by hand" in refused.value.hint
    with pytest.raises(ConfigurationError, match="retention") as refused:
        await reconcile_streams(control, [changed(queue, retention="limits")])
    assert refused.value.hint


@pytest.mark.slow  # hundreds of consumers
async def test_an_agent_has_so_many_consumers_and_no_more(world, mallory):
    """However often it announces others; and the next agent is served all the same."""
    absent, front = await world.raw(ABSENT), await world.raw(FRONT)
    await announce(absent, ABSENT, *(f"one{number:03}" for number in range(MAX_CONSUMERS)))
    await served(mallory, ABSENT, f"one{MAX_CONSUMERS - 1:03}")
    await announce(absent, ABSENT, *(f"two{number:03}" for number in range(MAX_CONSUMERS)))
    await announce(front, FRONT, "meanwhile")
    await served(mallory, FRONT, "meanwhile")
    info = await asked(mallory, f"$JS.API.STREAM.INFO.{tasks_stream(ABSENT).name}")
    assert info["state"]["consumer_count"] == MAX_CONSUMERS * len(Priority)


async def test_a_broker_that_was_killed_has_all_of_it_again(world, mallory):
    echo, cli = await world.raw(ECHO), await world.raw(CLI)
    await announce(echo, ECHO, "block")
    await served(mallory, ECHO, "block")
    await cli.send(task_subject(ECHO, "block"), b"stored")
    await until_stored(world, mallory)
    await world.stack.nats.kill()
    await world.stack.nats.start()
    echo, mallory = await world.raw(ECHO), await world.raw()
    task = await pulled(echo, ECHO, "block")
    assert task.data == b"stored"
    await echo.send(task.reply, b"+ACK")
    with anyio.fail_after(PATIENCE):  # the control role needs a moment to be back; a worker repeats itself
        while await consumer_info(mallory, task_consumer(ECHO, "after")) is None:
            await announce(echo, ECHO, "after")
            await anyio.sleep(0.1)


async def until_stored(world, mallory):
    with anyio.fail_after(PATIENCE):
        while await world.stored(mallory, tasks_stream(ECHO).name) == 0:  # noqa: ASYNC110 - no event
            await anyio.sleep(0.01)


async def test_a_stack_that_was_stopped_has_all_of_it_again_and_what_was_lost_is_announced_anew(tmp_path):
    """The announcer says it again until there is somebody to hear it."""
    agent = SpiffeID("spiffe://again.test/agent/a")
    spec = task_consumer(agent, "pay")
    settings = StackSettings("again.test", tmp_path / "state", (agent,))
    made = []
    for restarted in (False, True):
        async with (
            embedded_stack(settings, settle=False) as stack,
            session_of(stack, agent) as (source, session),
        ):
            sealer = Sealer(lambda source=source: source.svid)
            capabilities = ["pay", "ship"] if restarted else ["pay"]
            announcer = Announcer(
                agent, control_role("again.test"), capabilities, sealer=sealer, clock_ms=clock_ms
            )
            if restarted:
                assert await status_of_pull(session, spec) == b"408"
                spec = task_consumer(agent, "ship")
            with anyio.fail_after(PATIENCE):
                while await status_of_pull(session, spec) == b"503":
                    await announcer.announce(session)
            made.append(spec.name)
    assert len(set(made)) == 2


async def status_of_pull(session, spec):
    body = json.dumps({"batch": 1, "expires": 5_000_000}).encode()
    answer = await session.ask(
        f"$JS.API.CONSUMER.MSG.NEXT.{spec.stream}.{spec.name}", body, timeout_s=PATIENCE
    )
    return (answer.headers or {}).get("Status", "").encode()


@asynccontextmanager
async def session_of(stack, agent):
    """A session of ``agent`` on a stack, as a worker has it."""
    svid = stack.api.authority.issue(agent)
    source = IdentitySource(Fixed(svid, stack.api.authority.bundle))
    await source.start(5)
    address = BusAddress([stack.bus_url], stack.broker_id)
    async with Keeper(source, ChainVerifier(source), address).open(deadline_s=PATIENCE) as keeper:
        yield source, await keeper.session(PATIENCE)
    await source.aclose()


async def test_changed_limits_are_applied_and_what_is_stored_stays(control, mallory):
    agent = SpiffeID(f"spiffe://{DOMAIN}/agent/limited")
    before = StreamLimits(queue_tasks=5)
    await reconcile_streams(control, task_streams(agent, limits=before))
    for number in range(3):
        await mallory.send(task_subject(agent, "work"), b"%d" % number)
    after = StreamLimits(
        queue_tasks=2, queue_bytes=2**24, record_age_s=before.record_age_s + 1, dead_bytes=2**24
    )
    assert await reconcile_streams(control, task_streams(agent, limits=after)) == []
    told = [
        await asked(mallory, f"$JS.API.STREAM.INFO.{one.name}") for one in task_streams(agent, limits=after)
    ]
    states, _, dead, queue = [one["config"] for one in told]
    assert (queue["max_msgs"], queue["max_bytes"], dead["max_bytes"]) == (2, 2**24, 2**24)
    assert states["max_age"] == after.record_age_s * 1_000_000_000
    assert told[-1]["state"]["messages"] == 3


async def test_what_the_servers_can_not_do_is_refused_with_what_to_do(control):
    agent = SpiffeID(f"spiffe://{DOMAIN}/agent/thrice")
    with pytest.raises(
        ConfigurationError, match=r"states by .*/thrice.*replicas > 1 not supported"
    ) as refusal:
        await reconcile_streams(control, task_streams(agent, limits=StreamLimits(replicas=3)))
    assert "Set streams.replicas to 1" in str(refusal.value)
    with pytest.raises(ConfigurationError, match=r"tasks for .*/thrice.*insufficient") as refusal:
        await reconcile_streams(control, task_streams(agent, limits=StreamLimits(queue_bytes=2**50)))
    assert "max_file_store" in str(refusal.value)
