"""Fault: an SVID runs out and no new one comes for a while."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest

from agentweave_bus.exceptions import CallTimeoutError, UnreachableError
from agentweave_bus.runtime.readiness import has_svid
from tests.faults.stage import answered
from tests.integration.connections import Fixed, until
from tests.integration.probes import ECHO

pytestmark = pytest.mark.anyio

SHORT = timedelta(seconds=2)


async def test_a_connection_lost_while_the_svid_is_expired_is_made_again_with_the_next_svid(world, cli):
    """The identity is missing for a while: that ends no keeper and no agent."""
    provider = Fixed(world.issue(ECHO), world.stack.api.authority.bundle)
    echo = await world.agent(ECHO, provider=provider)
    await cli.ask(ECHO, "say", {"text": "x"})
    provider.replace(world.issue(ECHO, lifetime=SHORT))
    await until(lambda: not has_svid(echo.parts.source), "the SVID's end")
    await world.stack.nats.kill()
    await world.stack.nats.start()
    await anyio.sleep(0.5)
    assert not world.running(echo)._task.done(), world.running(echo)._task.exception()
    provider.replace(world.issue(ECHO))
    assert await answered(cli) == {"said": "there?"}


async def test_a_callee_whose_svid_has_expired_does_not_run_what_it_cannot_answer(world, cli):
    """Its caller would wait to the deadline for work that was done."""
    provider = Fixed(world.issue(ECHO), world.stack.api.authority.bundle)
    echo = await world.agent(ECHO, provider=provider)
    await cli.ask(ECHO, "work", {"text": "x"})
    provider.replace(world.issue(ECHO, lifetime=SHORT))
    await until(lambda: not has_svid(echo.parts.source), "the SVID's end")
    with pytest.raises((CallTimeoutError, UnreachableError)):
        await cli.call(str(ECHO), "work", {"text": "y"}, timeout=1)
    assert echo.ran == ["work"]
