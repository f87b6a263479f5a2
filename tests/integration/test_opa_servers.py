"""Agents and clients whose policy is decided by real OPA servers (``authorization.provider: opa``)."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import anyio
import pytest

from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.exceptions import AuthorizationError
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import until
from tests.integration.opa_server import OpaServer
from tests.integration.probes import CLI, DOMAIN, ECHO, PATIENCE
from tests.integration.world import metric

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds the server to ask"),
]

OPA = SpiffeID(f"spiffe://{DOMAIN}/opa")

LIMITED = {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["huge"], "limits": {"max_size": 100}}
"""It looks at the payload, so that its policy is asked for every call."""
STANDING = {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["say", "work"]}
"""It looks at nothing that differs between calls, so that one answer stands for 30 s."""
UNASKED = "the policy could not be asked"
"""All that a caller is told of the callee's trouble with its OPA; where that is, is nobody else's business."""
GRANTS = {"grants": [LIMITED, STANDING]}


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="awopa-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def opa(folder):
    server = OpaServer(folder)
    yield server
    await server.aclose()


def asks(server, **overrides):
    """Settings that have an agent ask ``server``; the budget is generous, for the machine may be busy."""
    return {
        "authorization__provider": "opa",
        "authorization__opa_endpoint": server.url,
        "authorization__timeout_ms": 1500,
        "authorization__circuit_breaker": {"failure_threshold": 4, "success_threshold": 1, "timeout": 1.0},
        **overrides,
    }


async def denial(caller, name, payload):
    with pytest.raises(AuthorizationError) as refusal:
        await caller.call(str(ECHO), name, payload, timeout=PATIENCE)
    return refusal.value


def written(world):
    """The whole reason of the last refusal, in the agent's own audit log."""
    return world.refusals("echo")[-1]["reason"]


async def allowed_again(caller, name, payload):
    """Call until the policy allows it; everything but a denial is an error."""
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            return await caller.ask(ECHO, name, payload)
        except AuthorizationError:
            assert time.monotonic() < give_up
            await anyio.sleep(0.05)


async def denied_at_last(caller, name, payload):
    """Call until the policy denies it; return the denial."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        try:
            await caller.ask(ECHO, name, payload)
        except AuthorizationError as denied:
            return denied
        await anyio.sleep(0.05)
    raise AssertionError("never denied")


def breaker(parts, server):
    name = "agentweave_authz_endpoint_circuit_breaker_state"
    states = ("closed", "half_open", "open")
    return [one for one in states if metric(parts, name, endpoint=server.url, state=one)]


def kept_connections(agent):
    return agent.parts.authorizer._engine._endpoints[0].connections._idle


async def test_a_server_decides_for_both_sides_and_its_reason_reaches_the_caller(world, opa):
    await opa.start(GRANTS)
    echo = await world.agent(ECHO, **asks(opa))
    cli = await world.client(CLI, **asks(opa))
    lenient = await world.client(CLI, authorization__audit={"destination": str(world.folder / "other.jsonl")})
    assert await cli.ask(ECHO, "huge", {"size": 100}) == {"text": "x" * 100}
    assert await cli.ask(ECHO, "work", {"text": "x"}) == {"worked": "x"}

    denied = await denial(cli, "huge", {"size": 101})
    assert (denied.direction, denied.reason) == (
        "outbound",
        "grant 1 has the limit max_size 100 and size is 101",
    )
    denied = await denial(lenient, "huge", {"size": 101})  # its own policy allows everything
    assert (denied.direction, denied.reason) == (
        "inbound",
        "grant 1 has the limit max_size 100 and size is 101",
    )
    denied = await denial(lenient, "whoami", {})
    assert (denied.direction, denied.reason) == (
        "inbound",
        f"no grant lets {CLI} ask {ECHO} for whoami (kind call)",
    )
    assert echo.ran == ["work"]

    records = world.audit("echo", event="admission")
    assert {one["revision"] for one in records} == {echo.parts.authorizer.revision} != {""}
    assert metric(echo.parts, "agentweave_opa_requests_total") > 0
    assert metric(echo.parts, "agentweave_opa_errors_total") == 0


async def test_without_its_server_an_agent_denies_and_says_why_and_works_again_when_it_is_back(world, opa):
    await opa.start(GRANTS)
    echo = await world.agent(ECHO, **asks(opa))
    cli = await world.client(CLI)
    await cli.ask(ECHO, "huge", {"size": 1})
    for _ in range(2):
        await cli.ask(ECHO, "work", {"text": "stands"})
    assert metric(echo.parts, "agentweave_authz_standing_reused_total") == 1
    await opa.stop()

    denied = await denial(cli, "huge", {"size": 1})
    assert (denied.direction, denied.reason) == ("inbound", UNASKED)
    assert "opa.sock: [Errno 2]" in written(world)
    assert metric(echo.parts, "agentweave_opa_errors_total") == 2  # both attempts
    await denial(cli, "huge", {"size": 1})
    assert breaker(echo.parts, opa) == ["open"]
    assert metric(echo.parts, "agentweave_authz_circuit_breaker_state", state="open") == 1
    await denial(cli, "huge", {"size": 1})
    assert "the breakers of all OPA endpoints are open" in written(world)
    await denied_at_last(cli, "work", {"text": "an answer that stood stands no more"})

    await opa.start()
    assert await allowed_again(cli, "huge", {"size": 2}) == {"text": "xx"}
    assert breaker(echo.parts, opa) == ["closed"]
    assert await cli.ask(ECHO, "work", {"text": "x"}) == {"worked": "x"}


async def test_with_two_servers_one_may_be_away_and_the_metrics_say_which(world, folder):
    servers = [OpaServer(folder / name) for name in ("a", "b")]
    first, second = servers
    for server in servers:
        await server.start(GRANTS)
    urls = {"opa_endpoint": None, "opa_endpoints": [server.url for server in servers]}
    try:
        echo = await world.agent(ECHO, **asks(first, **{f"authorization__{k}": v for k, v in urls.items()}))
        cli = await world.client(CLI)
        assert [breaker(echo.parts, server) for server in servers] == [["closed"], ["closed"]]
        await cli.ask(ECHO, "huge", {"size": 1})
        await first.stop()
        for _ in range(4):
            await cli.ask(ECHO, "huge", {"size": 1})
        assert [breaker(echo.parts, server) for server in servers] == [["open"], ["closed"]]
        best = "agentweave_authz_circuit_breaker_state"
        assert metric(echo.parts, best, state="closed") == 1
        await second.stop()
        await denial(cli, "huge", {"size": 1})
        await first.start()
        await allowed_again(cli, "huge", {"size": 1})
        assert breaker(echo.parts, first) == ["closed"]
    finally:
        for server in servers:
            await server.aclose()


async def test_a_client_whose_server_is_away_sends_nothing(world, echo, opa):
    cli = await world.client(CLI, **asks(opa))  # never started
    denied = await denial(cli, "say", {"text": "x"})
    assert denied.direction == "outbound"
    assert "opa.sock" in denied.reason
    assert echo.ran == []
    await opa.start(GRANTS)
    await cli.ask(ECHO, "say", {"text": "x"})


@pytest.mark.slow  # it waits for time to pass
async def test_a_new_revision_takes_effect_also_on_answers_that_stood(world, opa):
    first = opa.publish(GRANTS)
    await opa.start()
    echo = await world.agent(ECHO, **asks(opa))
    cli = await world.client(CLI)
    await until(lambda: echo.parts.authorizer.revision == first, "the first revision")
    await cli.ask(ECHO, "work", {"text": "x"})
    await cli.ask(ECHO, "work", {"text": "x"})
    assert metric(echo.parts, "agentweave_authz_standing_reused_total") == 1

    second = opa.publish({"grants": [LIMITED | {"limits": {"max_size": 5}}]})
    assert second != first
    await until(lambda: echo.parts.authorizer.revision == second, "the second revision")
    assert (
        await denial(cli, "work", {"text": "x"})
    ).reason == f"no grant lets {CLI} ask {ECHO} for work (kind call)"
    assert "the limit max_size 5 and size is 6" in (await denial(cli, "huge", {"size": 6})).reason
    await cli.ask(ECHO, "huge", {"size": 5})

    opa.publish(GRANTS)
    await until(lambda: echo.parts.authorizer.revision == first, "the first revision again")
    await cli.ask(ECHO, "work", {"text": "x"})
    assert metric(echo.parts, "agentweave_opa_errors_total") == 0


async def test_over_https_both_prove_who_they_are_and_a_rotation_goes_unnoticed(world, folder):
    opa = OpaServer(folder, svid=world.issue(OPA), clients=world.stack.api.authority.bundle)
    await opa.start(GRANTS)
    try:
        echo = await world.agent(ECHO, **asks(opa, authorization__opa_spiffe_id=str(OPA)))
        cli = await world.client(CLI)
        await cli.ask(ECHO, "huge", {"size": 1})
        old = list(kept_connections(echo))
        world.stack.api.rotate(ECHO)
        with anyio.fail_after(PATIENCE):
            await echo.on_rotation.wait()
        for _ in range(5):
            await cli.ask(ECHO, "huge", {"size": 1})
        assert metric(echo.parts, "agentweave_opa_errors_total") == 0
        assert old
        assert not any(one in old for one in kept_connections(echo))  # those were made with the old SVID
    finally:
        await opa.aclose()


async def test_over_https_a_server_with_another_identity_is_not_believed(world, folder):
    opa = OpaServer(folder, svid=world.issue(OPA), clients=world.stack.api.authority.bundle)
    await opa.start(GRANTS)
    try:
        wanted = f"spiffe://{DOMAIN}/opa-of-another-team"
        await world.agent(ECHO, **asks(opa, authorization__opa_spiffe_id=wanted))
        cli = await world.client(CLI)
        denied = await denial(cli, "huge", {"size": 1})
        assert denied.reason == UNASKED
        assert f"the TLS peer is {OPA}, not {wanted}" in written(world)
    finally:
        await opa.aclose()
