"""The Workload API goes away, hangs or talks nonsense: an agent lives on with what it has, and heals."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest

from agentweave_bus.exceptions import SvidUnavailableError, UnreachableError
from agentweave_bus.identity import IdentitySource, SPIFFEIdentityProvider
from agentweave_bus.runtime.readiness import has_svid
from tests.faults.stage import answered, load
from tests.faults.workload_apis import garbled, instead, mute, nothing, played_api
from tests.integration.connections import Fixed, until
from tests.integration.probes import CLI, ECHO, OTHER
from tests.integration.world import metric

pytestmark = pytest.mark.anyio


@pytest.fixture
async def api(world, tmp_path):
    async with played_api(world, tmp_path) as one:
        await one.serve(ECHO)
        yield one


@pytest.fixture
async def agent(world, api):
    return await world.agent(ECHO, identity__spiffe_endpoint=api.endpoint(ECHO))


def errors(agent):
    return metric(agent.parts, "agentweave_svid_rotation_errors_total")


async def has(agent, svid):
    await until(lambda: agent.parts.source.svid == svid, "the API's SVID")


async def test_an_agent_outlives_its_workload_api_and_takes_the_next_svid_when_it_is_back(api, agent, cli):
    old = agent.parts.source.svid
    async with load(cli, at_once=4) as busy:
        await api.withdraw(ECHO)
        await busy.more(20)
        assert agent.parts.source.svid == old
        assert has_svid(agent.parts.source)
        await api.serve(ECHO)
        assert api.current_svid(ECHO) != old
        await has(agent, api.current_svid(ECHO))
        await busy.more(20)
    assert busy.failures == []
    api.rotate(ECHO)  # and it listens again
    await has(agent, api.current_svid(ECHO))


async def test_a_socket_that_is_removed_cuts_nobody_off_who_is_connected(api, agent, cli):
    os.unlink(api.endpoint(ECHO).removeprefix("unix://"))  # noqa: PTH108 - at once, on purpose
    api.rotate(ECHO)
    await has(agent, api.current_svid(ECHO))
    await cli.ask(ECHO, "say", {"text": "x"})


@pytest.mark.slow
async def test_a_workload_api_that_hangs_is_given_up_and_heals_the_agent_when_it_answers(
    world, cli, tmp_path
):
    """Noticed when a new SVID is overdue; the old one expires meanwhile."""
    async with played_api(world, tmp_path, timedelta(seconds=2)) as api:
        await api.serve(ECHO)
        provider = SPIFFEIdentityProvider(api.endpoint(ECHO), ECHO, fetch_timeout=0.2)
        agent = await world.agent(ECHO, provider=provider)
        before = errors(agent)
        await api.withdraw(ECHO)
        async with mute(api.endpoint(ECHO)):
            await cli.ask(ECHO, "say", {"text": "on the old one"})
            await until(lambda: errors(agent) > before, "noticing")
            await until(lambda: not has_svid(agent.parts.source), "the end of the SVID")
            with pytest.raises(SvidUnavailableError, match=r"expired at .*does not answer \(DEADLINE"):
                _ = agent.parts.source.svid
        await api.serve(ECHO, lifetime=timedelta(hours=1))
        await until(lambda: has_svid(agent.parts.source), "a new SVID")
        assert await answered(cli) == {"said": "there?"}


async def test_an_agent_that_starts_while_the_api_hangs_says_so(api):
    await api.withdraw(ECHO)
    provider = SPIFFEIdentityProvider(api.endpoint(ECHO), ECHO, fetch_timeout=0.1)
    async with mute(api.endpoint(ECHO)):
        began = time.monotonic()
        with pytest.raises(
            SvidUnavailableError, match=r"no identity within 0.3 s.*does not answer \(DEADLINE"
        ):
            await IdentitySource(provider, expected_id=ECHO).start(0.3)
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "said",
    [
        pytest.param("another", id="another identity"),
        pytest.param(garbled("x509_svid"), id="a chain of garbage"),
        pytest.param(garbled("x509_svid_key"), marks=pytest.mark.slow, id="a key of garbage"),
        pytest.param(garbled("bundle"), marks=pytest.mark.slow, id="a bundle of garbage"),
        pytest.param(nothing, marks=pytest.mark.slow, id="nothing"),
    ],
)
async def test_what_is_no_identity_of_this_agent_changes_nothing_until_the_right_one_comes(
    world, api, agent, cli, said
):
    old, bundle = agent.parts.source.svid, agent.parts.source.bundle_for(ECHO.trust_domain)
    before = errors(agent)
    api.says(instead(world.issue(OTHER)) if said == "another" else said)
    await until(lambda: errors(agent) > before, "noticing")
    assert agent.parts.source.svid == old
    assert agent.parts.source.bundle_for(ECHO.trust_domain) == bundle
    await cli.ask(ECHO, "work", {"text": "as before"})
    api.says(None)
    api.rotate(ECHO)
    await has(agent, api.current_svid(ECHO))
    assert await cli.ask(ECHO, "say", {"text": "healed"})


@pytest.mark.slow
async def test_svids_that_expire_while_the_api_is_gone_stop_calls_and_heal_when_it_is_back(world, tmp_path):
    """Both sides. Nothing is sent with an expired SVID, and nothing has to be restarted."""
    async with played_api(world, tmp_path, timedelta(seconds=3)) as api:
        await api.serve(ECHO)
        await api.serve(CLI)
        agent = await world.agent(ECHO, identity__spiffe_endpoint=api.endpoint(ECHO))
        cli = await world.client(CLI, identity__spiffe_endpoint=api.endpoint(CLI))
        await cli.ask(ECHO, "work", {"text": "still valid"})
        await api.aclose()
        await until(lambda: not has_svid(cli.parts.source), "the end of the caller's SVID")
        await until(lambda: not has_svid(agent.parts.source), "the end of the callee's SVID")
        with pytest.raises(UnreachableError, match=rf"the SVID of {CLI} expired at .* no newer one has come"):
            await cli.call(str(ECHO), "work", {"text": "x"}, timeout=1)
        assert agent.ran == ["work"]
        await api.serve(ECHO)
        await api.serve(CLI)
        await until(lambda: has_svid(cli.parts.source) and has_svid(agent.parts.source), "new SVIDs")
        assert await answered(cli) == {"said": "there?"}


@pytest.mark.slow
async def test_an_svid_that_expires_unrenewed_is_named_and_a_new_one_heals(world, echo):
    """A provider of the user's own falls silent."""
    provider = Fixed(world.issue(CLI, lifetime=timedelta(seconds=2)), world.stack.api.authority.bundle)
    cli = await world.client(CLI, provider=provider)
    await until(lambda: not has_svid(cli.parts.source), "the SVID's end")
    with pytest.raises(UnreachableError, match=rf"the SVID of {CLI} expired at"):
        await cli.call(str(ECHO), "say", {"text": "x"}, timeout=2)
    assert echo.ran == []
    provider.replace(world.issue(CLI))
    await until(lambda: cli.parts.source._snapshot.svid == provider.svid, "the new SVID")
    await cli.ask(ECHO, "say", {"text": "healed"})
