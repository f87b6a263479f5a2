"""Attack: a capability whose own code opens it to others, asked for under a grant of everything."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import encode_payload
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

INNER = {"cap": "inner", "sub": call_subject(ECHO, "inner"), "payload": encode_payload({})}


@refused_by(
    Step.AUTHORIZATION,
    "a capability that its code opens to agents only, under a grant of all",
    by=Adversary.CALLER,
)
@pytest.mark.parametrize("forged", [False, True], ids=["by its client", "sealed by hand"])
async def test_a_caller_to_whom_it_is_not_open(attack, forged):
    """The policy would allow it, and is not even asked."""
    if forged:
        call = forged_call(attack.world.issue(CLI), **INNER)
        await attack.send(call.frame, subject=INNER["sub"], reply=reply_of(call))
    else:
        with pytest.raises(AuthorizationError, match="not open to"):
            await attack.cli.call(str(ECHO), "inner", {}, timeout=PATIENCE)
    record = await attack.refused(reason=f"inner: it is not open to {CLI}")
    assert not record.get("revision")
