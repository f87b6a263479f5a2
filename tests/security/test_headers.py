"""Attack: message headers. Whoever owns the broker can add and strip them, so they must mean nothing."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from tests.integration.connections import heard_within
from tests.integration.probes import CLI
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


async def test_added_headers_change_nothing(attack):
    """Honest call, under headers that mean nothing here."""
    forged = forged_call(attack.world.issue(CLI))
    inbox = await attack.mallory.listen(reply_of(forged))
    headers = {
        "Status": "503",
        "Nats-Msg-Id": "x",
        "Nats-Rollup": "all",
        "caller": "spiffe://demo.test/agent/admin",
        "X-Principal": "root",
        "traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01",
    }
    await attack.send(forged.frame, reply=reply_of(forged), headers=headers)
    await heard_within(inbox)
    record = attack.world.audit("echo", event="admission")[-1]
    assert record["caller"] == str(CLI)
    assert "root" not in str(record)
    assert "admin" not in str(record)


@refused_by(Step.FRAME, "message headers in place of a frame", by=Adversary.BROKER)
async def test_headers_in_place_of_a_frame_are_no_call(attack):
    await attack.send(b"", headers={"Status": "503"})
    await attack.refused()
