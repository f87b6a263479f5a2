"""A full disk: under an audit log, its caller's or its callee's, and under the broker's streams."""

from __future__ import annotations

import resource
from contextlib import suppress

import anyio
import pytest

from agentweave_bus.authz import verify_audit
from agentweave_bus.bus import claims
from agentweave_bus.exceptions import AuditError, CallRefusedError
from tests.faults.disks import small_disk
from tests.integration.callee import replaced
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.processes import worker_process
from tests.integration.world import World, metric

pytestmark = pytest.mark.anyio

NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "512k") as one:
        yield one


def on(disk, **more):
    return {"authorization__audit": {"destination": str(disk.path / "log.jsonl"), **more}}


def fill(disk, one):
    """Fill the disk, and what is left of the last block of the log of ``one`` with small records."""
    disk.fill()
    with suppress(AuditError):
        for _ in range(1000):
            one.parts.audit.append({"event": "filler"})


async def refused_for_the_record(cli, name):
    with pytest.raises(CallRefusedError, match="not able to record the call") as refused:
        await cli.call(str(ECHO), name, {"text": "unrecorded"}, timeout=PATIENCE)
    assert (refused.value.step, refused.value.retry_after) == ("audit", None)


async def test_a_callee_that_cannot_record_runs_nothing_and_goes_on_when_there_is_space(world, cli, disk):
    echo = await world.agent(ECHO, **on(disk))
    await cli.ask(ECHO, "work", {"text": "recorded"})
    fill(disk, echo)
    before = metric(echo.parts, "agentweave_audit_write_failures_total")
    for name in ("work", "say"):  # whose frame is kept, and one with a record only
        for _ in range(3):
            await refused_for_the_record(cli, name)
    assert echo.ran == ["work"]
    assert metric(echo.parts, "agentweave_audit_write_failures_total") >= before + 6
    disk.empty()
    assert await cli.ask(ECHO, "work", {"text": "again"}) == {"worked": "again"}
    assert await cli.ask(ECHO, "say", {"text": "again"}) == {"said": "again"}
    assert verify_audit([disk.path]).problems == ()


async def test_an_answer_goes_out_although_its_outcome_cannot_be_recorded(world, cli, disk):
    """The work is done: the answer must not be lost over its record. It is an alarm."""
    echo = await world.agent(ECHO, **on(disk))
    answers = []
    async with anyio.create_task_group() as group:

        async def ask():
            answers.append(await cli.ask(ECHO, "wait"))

        group.start_soon(ask)
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        fill(disk, echo)
        before = metric(echo.parts, "agentweave_audit_write_failures_total")
        echo.gate.set()
    assert answers == [{"waited": True}]
    assert metric(echo.parts, "agentweave_audit_write_failures_total") == before + 1
    disk.empty()
    await cli.ask(ECHO, "say", {"text": "again"})
    assert verify_audit([disk.path]).problems == ()


async def test_a_caller_that_cannot_record_sends_nothing_and_goes_on_when_there_is_space(world, echo, disk):
    cli = await world.client(CLI, **on(disk))
    await cli.ask(ECHO, "say", {"text": "recorded"})
    fill(disk, cli)
    for _ in range(6):  # more than opens a breaker: it says nothing about the callee
        with pytest.raises(CallRefusedError, match="the call could not be recorded") as refused:
            await cli.call(str(ECHO), "work", {"text": "unrecorded"}, timeout=PATIENCE)
        assert refused.value.step == "local"
    assert echo.ran == ["say"]
    disk.empty()
    assert await cli.ask(ECHO, "work", {"text": "again"}) == {"worked": "again"}
    assert verify_audit([disk.path]).problems == ()


@pytest.mark.slow
async def test_a_worker_whose_log_has_reached_its_limit_refuses_until_it_is_raised(world, cli, tmp_path):
    """RLIMIT_FSIZE, in the middle of a record: half a line is taken back."""
    audit = {"destination": str(tmp_path / "audit" / "log.jsonl")}
    async with worker_process(world, ECHO, authorization__audit=audit) as worker:
        await cli.ask(ECHO, "say", {"text": "recorded"})
        log = next((tmp_path / "audit").glob("*.jsonl"))
        await until(lambda: "outcome" in log.read_text(), "the outcome")
        size = log.stat().st_size
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        for _ in range(3):
            await refused_for_the_record(cli, "say")
        assert log.stat().st_size == size
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, NO_LIMIT)
        assert await cli.ask(ECHO, "say", {"text": "again"})
    assert verify_audit([log]).problems == ()


async def test_a_disk_that_is_full_when_a_new_file_is_due_breaks_no_chain(world, cli, disk):
    echo = await world.agent(ECHO, **on(disk, max_file_bytes=65_536))
    while echo.parts.audit.file.stat().st_size < 65_536:
        echo.parts.audit.append({"event": "filler", "text": "x" * 3000})
    disk.fill()
    for _ in range(3):
        await refused_for_the_record(cli, "say")
    disk.empty()
    await cli.ask(ECHO, "say", {"text": "again"})
    assert len(list(disk.path.glob("*.jsonl"))) > 1
    assert verify_audit([disk.path]).problems == ()


@pytest.mark.slow
async def test_when_the_brokers_disk_is_full_nothing_runs_unclaimed_and_safe_calls_go_on(tmp_path):
    """Claims are on that disk, and nothing else is."""
    with small_disk(tmp_path / "state" / "broker" / "streams", "24m") as disk:
        (tmp_path / "state" / "broker").chmod(0o700)
        async with World.make(tmp_path) as world:
            with replaced(claims, "_TIMEOUT_S", 0.3):
                await _fill_the_brokers_disk(world, disk)


async def _fill_the_brokers_disk(world, disk):
    echo, cli = await world.agent(ECHO), await world.client(CLI)
    await cli.ask(ECHO, "work", {"text": "claimed"})
    disk.fill()
    with suppress(CallRefusedError):
        for _ in range(60):
            await cli.ask(ECHO, "work", {"text": "x"}, timeout=1)
    ran = len(echo.ran)
    for _ in range(3):
        with pytest.raises(CallRefusedError, match="not ready to take this call") as refused:
            await cli.call(str(ECHO), "work", {"text": "x"}, timeout=1)
        assert (refused.value.step, refused.value.retry_after) == ("replay", 1.0)
    assert len(echo.ran) == ran
    assert await cli.ask(ECHO, "say", {"text": "needs no claim"})
    disk.empty()
    await world.stack.nats.restart()
    assert await cli.ask(ECHO, "work", {"text": "again"}) == {"worked": "again"}
