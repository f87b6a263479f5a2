"""Attack: an answer that the policy gave before it changed, and that arrives after it has."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.connections import until
from tests.integration.opa_player import OpaPlayer, document, http
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.security.catalogue import Adversary, refused_by

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def player():
    folder = Path(tempfile.mkdtemp(prefix="awopa-"))
    server = OpaPlayer(folder)
    server.standing_packages = ("agentweave/grants",)
    await server.start()
    yield server
    await server.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
async def cast(session_world, player):
    world = session_world
    settings = {
        "authorization__provider": "opa",
        "authorization__opa_endpoint": player.url,
        "authorization__timeout_ms": 900,  # the question that is held back must not run out of time
        "authorization__circuit_breaker": {"failure_threshold": 10_000},
    }
    echo, cli, mallory = await world.agent(ECHO, **settings), await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


class Late:
    """Holds one rule's yes back until it is let go. Whatever else is asked is answered at once."""

    def __init__(self, player, rule):
        self._player, self._rule = player, rule
        self.held, self.let_go = asyncio.Event(), asyncio.Event()

    async def __call__(self, question, writer):
        if question.rule != self._rule or self.held.is_set():
            await self._player.well(question, writer)
            return
        self.held.set()
        answer = http(document({"allow": True, "cache_seconds": 30}, self._player.revision))  # as of now
        await self.let_go.wait()
        writer.write(answer)
        await writer.drain()


@pytest.fixture
async def attack(attack, player):
    """Nothing stands, and what is asked next is asked of the player."""
    player.revision, player.allow = "r1", True
    authorizer = attack.echo.parts.authorizer
    await authorizer.reload()
    authorizer.forget_standing()
    yield attack
    player.revision, player.allow = "r1", True
    await authorizer.reload()


async def asked(attack):
    return await attack.cli.ask(ECHO, "work", {"text": "x"})


async def denied(attack):
    with pytest.raises(AuthorizationError) as denial:
        await attack.cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE)
    return denial.value


def last(attack):
    return attack.world.audit("echo", event="admission")[-1]


@refused_by(Step.AUTHORIZATION, "a call under a standing answer that came late", by=Adversary.CALLER)
@pytest.mark.parametrize("change", ["revision", "revocation"])
async def test_a_late_standing_answer_fills_no_new_cache(attack, player, change):
    authorizer = attack.echo.parts.authorizer
    late = Late(player, "standing")
    with player.playing(late):
        call = asyncio.create_task(asked(attack))
        await asyncio.wait_for(late.held.wait(), PATIENCE)
        if change == "revision":
            player.revision = "r2"
            await authorizer.reload(force=False)
        else:
            authorizer.forget_standing()
        player.allow = False
        late.let_go.set()
        await call  # it was decided before
    attack.echo.ran.remove("work")
    denial = await denied(attack)
    player.allow = True
    record = await attack.refused(reason="the player")
    assert denial.audit_id == record["audit_id"]
    assert not record.get("reused")


@refused_by(Step.AUTHORIZATION, "a yes of the old policy that comes after the new one", by=Adversary.CALLER)
async def test_a_late_decision_is_none(attack, player):
    late = Late(player, "decision")
    with player.playing(late):
        call = asyncio.create_task(denied(attack))
        await asyncio.wait_for(late.held.wait(), PATIENCE)
        player.revision, player.allow = "r2", False
        await attack.echo.parts.authorizer.reload(force=False)
        late.let_go.set()
        denial = await call
    player.allow = True
    record = await attack.refused(reason="the player")  # asked again, and answered by the new policy
    assert denial.audit_id == record["audit_id"]
    assert record["revision"] == "r2"


@refused_by(Step.AUTHORIZATION, "a standing answer after its policy server is gone", by=Adversary.CALLER)
async def test_nothing_stands_when_nobody_knows_if_it_still_does(attack, player):
    await asked(attack)
    await asked(attack)
    assert last(attack)["reused"]
    attack.echo.ran[:] = ["work"]
    await player.stop()
    try:
        await until(lambda: not attack.echo.parts.authorizer.revision, "a poll that fails")
        denial = await denied(attack)
    finally:
        await player.start()
        await attack.echo.parts.authorizer.reload()
    assert denial.reason == "the policy could not be asked"
    await attack.refused(reason="opa.sock")
