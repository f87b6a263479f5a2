"""Attack: very much of what is refused at once. It must not fill a disk, nor keep answers of others waiting."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from tests.integration.callee import reply_to
from tests.integration.connections import heard_within, until
from tests.integration.probes import ABSENT, CLI, ECHO, PATIENCE
from tests.integration.world import metric
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

MANY = 2_500


async def publish(raw, subject, frame, count, seen):
    """Send without waiting for each, but never more than the receiver's queue holds.

    ``seen`` returns how many of them the receiver has seen.
    """
    for begun in range(0, count, 500):
        sent = min(begun + 500, count)
        for _ in range(begun, sent):
            await raw.client.publish(subject, frame)
        await until(lambda sent=sent: seen() == sent, f"the first {sent}")


@refused_by(Step.FRAME, "thousands of frames that are none, to fill the audit log", by=Adversary.CALLER)
async def test_the_log_of_refusals(world):
    callee = await world.agent(ABSENT)
    raw = await world.raw(CLI)

    def counted():
        return metric(callee.parts, "agentweave_admission_refusals_total", step="frame", reason="refused")

    def noted():
        return world.refusals(ABSENT.path.rpartition("/")[2])

    before, written_before = counted(), len(noted())
    await publish(raw, call_subject(ABSENT, "work"), b"\0", MANY, lambda: counted() - before)
    written = len(noted()) - written_before
    assert 0 < written < MANY - 100
    await asyncio.sleep(0.1)  # a moment of the rate's own: there is nothing to wait for
    await raw.send(call_subject(ABSENT, "work"), b"\0")
    await until(lambda: len(noted()) - written_before > written, "one more record")
    missing = [one["unwritten"] for one in noted()[written_before:] if "unwritten" in one]
    assert sum(missing) + len(noted()) - written_before == MANY + 1
    cli = await world.client(CLI)
    await cli.ask(ABSENT, "work", {"text": "after"})
    assert callee.ran == ["work"]


@refused_by(Layer.CALLER, "thousands of forged answers to one call", by=Adversary.AGENT)
async def test_the_verification_of_answers(world):
    """A thousand are verified in vain; after that none to this call is, and calls of others go on."""
    await world.agent(ABSENT)
    cli = await world.client(CLI)
    raw = await world.raw(ECHO)
    heard = await raw.listen(call_subject(ECHO, "wait"))
    pending = asyncio.create_task(cli.call(str(ECHO), "wait", timeout=PATIENCE))
    message = await heard_within(heard)
    genuine = reply_to(message, world.issue(ECHO)).frame
    dropped = cli.dropped("forged")
    await publish(raw, message.reply, b"\0", 1_000, lambda: cli.dropped("forged") - dropped)
    await raw.send(message.reply, genuine)
    await until(lambda: cli.dropped("forged") - dropped == 1_001, "the one too many")
    assert not pending.done()
    await cli.ask(ABSENT, "work", {"text": "meanwhile"})
    pending.cancel()
    await asyncio.wait({pending})
