"""Attack: a call at a moment at which it can't be written down."""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager

import pytest

from agentweave_bus.authz import verify_audit
from agentweave_bus.bus.admission import Step
from agentweave_bus.exceptions import AuditError, CallRefusedError
from tests.integration.connections import until
from tests.integration.probes import ABSENT, CLI, ECHO, PATIENCE
from tests.integration.world import metric
from tests.security.catalogue import Adversary, refused_by

pytestmark = pytest.mark.anyio

FAILURES = "agentweave_audit_write_failures_total"
UNRECORDED = "not able to record the call"


@contextmanager
def leads_to(fd, path):
    """Have an open file descriptor write to ``path`` for a while; errors are the system's own."""
    original, other = os.dup(fd), os.open(path, os.O_WRONLY)
    os.dup2(other, fd)
    os.close(other)
    try:
        yield
    finally:
        os.dup2(original, fd)
        os.close(original)


async def quiet(log):
    """Wait until all is safe on disk, so that nothing but the test touches the file."""
    await until(lambda: log.witness() is not None and log.witness().seq == log._seq, "the disk")


async def refused_to(attack, name, payload):
    with pytest.raises(CallRefusedError) as refusal:
        await attack.cli.call(str(ECHO), name, payload, timeout=PATIENCE)
    assert (refusal.value.step, refusal.value.reason) == ("audit", UNRECORDED)
    return refusal.value


@refused_by(Step.AUDIT, "a call whose envelope can't be kept: the disk is full", by=Adversary.CALLER)
async def test_an_envelope_that_can_not_be_kept(attack):
    log = attack.echo.parts.audit
    with leads_to(log._frames._fd, "/dev/full"):
        refusal = await refused_to(attack, "work", {"text": "x"})
    record = await attack.refused(reason="a frame can't be kept: No space left on device")
    assert record["audit_id"] == refusal.audit_id
    assert metric(attack.echo.parts, FAILURES) >= 1


@refused_by(Step.AUDIT, "a call that can't be recorded: the disk is full", by=Adversary.CALLER)
@pytest.mark.parametrize(("name", "payload"), [("say", {"text": "x"}), ("work", {}), ("wait_safe", {})])
async def test_a_record_that_can_not_be_written(attack, name, payload):
    log, parts = attack.echo.parts.audit, attack.echo.parts
    failures = metric(parts, FAILURES)
    await quiet(log)
    written = log.file.read_bytes()
    with leads_to(log._fd, "/dev/full"):
        refusal = await refused_to(attack, name, payload)
        await attack.mallory.flush()
    assert refusal.audit_id == ""  # there is no record, not even of the refusal
    assert attack.echo.ran == ["work"]
    assert metric(parts, FAILURES) == failures + 2
    assert metric(parts, "agentweave_admission_refusals_total", step="audit", reason="refused") >= 1
    assert log.file.read_bytes() == written
    # With room again, the log goes on where it was, without a gap.
    await attack.cli.ask(ECHO, "say", {"text": "later"})
    assert attack.echo.ran == ["work", "say"]
    assert verify_audit([log.file]).ok


@refused_by(Step.AUDIT, "calls that come together and can't be recorded", by=Adversary.CALLER)
async def test_of_calls_that_come_together_none_runs_unrecorded(attack):
    log = attack.echo.parts.audit
    await quiet(log)
    with leads_to(log._fd, "/dev/full"):
        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(refused_to(attack, "say", {"text": "x"}))
    assert attack.echo.ran == ["work"]
    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(attack.cli.ask(ECHO, "say", {"text": "x"}))
    report = verify_audit([log.file])
    assert report.ok, report.problems
    admitted = attack.world.audit("echo", event="admission")
    assert len([one for one in admitted[-16:] if one["cap"] == "say"]) == 16 == attack.echo.ran.count("say")


@refused_by(Step.AUDIT, "calls after the disk lost what was written", by=Adversary.CALLER)
async def test_nothing_runs_once_nobody_knows_what_the_disk_holds(attack):
    world = attack.world
    fragile = await world.agent(ABSENT)
    await attack.cli.ask(ABSENT, "say", {"text": "x"})
    log = fragile.parts.audit
    await quiet(log)
    reading, writing = os.pipe()
    try:
        with leads_to(log._fd, f"/proc/self/fd/{writing}"):
            await attack.cli.ask(ABSENT, "say", {"text": "the system took it, and can't make it safe"})
            await until(lambda: log._refusal != "", "fsync")
        with pytest.raises(CallRefusedError, match=UNRECORDED):
            await attack.cli.call(str(ABSENT), "say", {"text": "x"}, timeout=PATIENCE)
    finally:
        os.close(reading)
        os.close(writing)
    assert fragile.ran == ["say", "say"]
    with pytest.raises(AuditError, match="fsync failed"):  # nor does it end as if all were well
        await world.running(fragile).stop()


async def test_a_caller_that_can_not_record_sends_nothing(attack):
    """Honest caller, whose own disk is full."""
    log = attack.cli.parts.audit
    heard = await attack.mallory.listen(attack.message.subject)
    await quiet(log)
    with leads_to(log._fd, "/dev/full"), pytest.raises(CallRefusedError, match="could not be recorded"):
        await attack.cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE)
    await attack.mallory.flush()
    assert heard.empty()
    assert attack.echo.ran == ["work"]
    await attack.cli.ask(ECHO, "work", {"text": "with room again"})
    assert attack.world.audit("cli", event="call", caller=str(CLI))
