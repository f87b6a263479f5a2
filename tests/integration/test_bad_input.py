"""What bad input gets: an error of the right class that names the thing and the way out; nothing half done."""

from __future__ import annotations

import json
import math
import time
from datetime import timedelta

import anyio
import pytest

from agentweave_bus import AgentCallError, AgentWeaveClient, AgentWeaveError, SyncAgentWeaveClient
from agentweave_bus.authz.audit_format import LogName
from agentweave_bus.exceptions import (
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    FederationError,
    IdentityError,
    NoResponderError,
    SvidUnavailableError,
)
from agentweave_bus.identity import Authority
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import Fixed
from tests.integration.probes import ABSENT, CLI, DOMAIN, ECHO, FRONT, OTHER, Held
from tests.integration.processes import worker_process

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def local(session_world):
    """A client for all tests whose call must not leave it; it has an audit log of its own."""
    destination = session_world.folder / "local" / "local.jsonl"
    config = session_world.config(CLI, authorization__audit={"destination": str(destination)})
    held = await Held.open(AgentWeaveClient(config))
    yield held.value
    await held.close()
    lines = [line for file in LogName.of(destination).files() for line in file.read_text().splitlines()]
    assert [json.loads(line)["event"] for line in lines] == [
        "start",
        "end",
    ]  # no policy was asked, nothing was sent


async def refused(cli, *args, **options):
    with pytest.raises(CallRefusedError) as refusal:
        await cli.call(*args, **options)
    return refusal.value


async def test_nobody_who_answers_is_named_soon(cli):
    began = time.monotonic()
    with pytest.raises(NoResponderError, match=rf"no replica of {ABSENT} takes 'say'.*is it running"):
        await cli.call(str(ABSENT), "say", {"text": "x"}, timeout=60)
    assert time.monotonic() - began < 30  # bus.retry.patience is 2 s


async def test_an_unknown_capability_is_named(echo, cli):
    with pytest.raises(NoResponderError, match=r"takes 'sya' at the moment.*is that the capability's name\?"):
        await cli.call(str(ECHO), "sya", {"text": "x"})


@pytest.mark.parametrize(
    "name", ["", ">", "*", "a.b", "UPPER", "-a", "a b", "a" * 65, "say\n", "ü", None, 3], ids=repr
)
async def test_what_can_be_no_capabilitys_name_leaves_this_process_not(local, name):
    error = await refused(local, str(ECHO), name)
    assert error.step == "local"
    assert "is no capability name" in str(error)


@pytest.mark.parametrize(
    "target",
    [
        "", "echo", "https://demo.test/agent/echo", "spiffe://", f"spiffe://{DOMAIN}", f"spiffe://{DOMAIN}/",
        f"spiffe://{DOMAIN.upper()}/agent/echo", f"{ECHO}/", f"{ECHO}\n", f"spiffe://{DOMAIN}//echo",
        f"spiffe://{DOMAIN}/../echo", f"spiffe://{DOMAIN}/agent/*", f"spiffe://{DOMAIN}/agent/>",
        f"spiffe://{DOMAIN}/agent/e cho", "spiffe://" + "a" * 300 + "/x", f"spiffe://{DOMAIN}/" + "a" * 3000,
        f"spiffe://user@{DOMAIN}/agent/echo", f"spiffe://{DOMAIN}:1/agent/echo", f"{ECHO}?x=1", f"{ECHO}#x",
    ],
    ids=lambda text: repr(text)[:40],
)  # fmt: skip
async def test_a_malformed_spiffe_id_is_refused_here(local, target):
    error = await refused(local, target, "say", {"text": "x"})
    assert error.step == "local"
    assert str(error)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, "3", True], ids=repr)
async def test_a_timeout_is_a_positive_number(local, seconds):
    error = await refused(local, str(ECHO), "say", {"text": "x"}, timeout=seconds)
    assert "positive number of seconds" in str(error)


async def test_an_endless_timeout_is_the_longest_one_allowed(world, echo):
    cli = await world.client(bus__max_call_timeout=0.3, bus__call_timeout=0.2)
    with pytest.raises(CallTimeoutError):
        await cli.call(str(ECHO), "stubborn", timeout=math.inf)
    echo.gate.set()


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({"text": "x" * 900_000}, "bytes"),
        ({"text": math.nan}, "NaN"),
        ({"text": math.inf}, "infinit"),
        ({"text": "\ud800"}, "surrogate"),
        ({"text": nested(40)}, "nest"),
        ({"text": 10**60}, "send it as text"),
        ({1: "x"}, "a key"),
        ({"text": object()}, "object"),
        ({"text": [0] * 200_000}, "items"),
        (["x"], "not an array"),
        ("x", "not a string"),
    ],
    ids=["large", "nan", "inf", "surrogate", "deep", "digits", "key", "object", "items", "array", "text"],
)
async def test_a_payload_that_is_no_bounded_json_is_refused_here(local, payload, said):
    error = await refused(local, str(ECHO), "say", payload)
    assert error.step == "local"
    assert said.lower() in str(error).lower()


async def test_what_the_capability_does_not_take_is_named(world, echo, cli):
    for number, (payload, said) in enumerate(
        [
            ({"text": 3}, "'text'"),
            ({}, "'text'"),
            ({"text": "x", "more": 1}, "'more'"),
        ]
    ):
        error = await refused(cli, str(ECHO), "say", payload)
        assert error.step == "payload"
        assert said in error.reason
        assert "say" in str(error)
        assert world.refusals("echo")[number]["audit_id"] == error.audit_id
    assert echo.ran == []


async def test_a_result_that_is_too_large_is_a_failure_that_says_so(world, echo, cli):
    result = await cli.call(str(ECHO), "huge", {"size": 900_000})
    assert result.status == "failed"
    assert "the result can't be sent" in result.error
    assert world.audit("echo", event="outcome")[-1]["status"] == "failed"


async def test_the_largest_payload_passes(echo, cli):
    assert await cli.ask(ECHO, "work", {"text": "x" * 780_000}) == {"worked": "x" * 780_000}


async def test_a_denial_here_names_reason_and_audit_id(world, echo):
    other = await world.client(OTHER)
    with pytest.raises(AuthorizationError) as denial:
        await other.call(str(ECHO), "say", {"text": "x"})
    error = denial.value
    assert error.direction == "outbound"
    assert error.reason in str(error)
    assert f"no grant lets {OTHER} ask {ECHO} for say" in error.reason
    record = world.refusals("other")[0]
    assert record["audit_id"] == error.audit_id
    assert (record["step_name"], record["allowed"]) == ("outbound", False)
    assert error.audit_id in str(error)
    assert world.audit("echo", event="admission") == world.refusals("echo") == []


async def test_a_denial_there_names_reason_and_audit_id(world, cli, tmp_path):
    """The caller's grants say yes, the callee's say no: the callee's hold."""
    none = tmp_path / "none.yaml"
    none.write_text("grants: []\n")
    echo = await world.agent(ECHO, authorization__bundle=str(none))
    with pytest.raises(AuthorizationError) as denial:
        await cli.call(str(ECHO), "work", {"text": "x"})
    error = denial.value
    assert error.direction == "inbound"
    record = world.refusals("echo")[0]
    assert record["audit_id"] == error.audit_id
    assert record["step_name"] == "authorization"
    assert record["caller"] == str(CLI)
    assert error.audit_id in str(error)
    assert echo.ran == []


async def test_a_peer_rule_holds_whatever_the_grants_say(world, echo, cli):
    with pytest.raises(AuthorizationError) as denial:
        await cli.call(str(ECHO), "inner")
    assert denial.value.direction == "inbound"
    assert echo.ran == []


async def test_who_may_not_call_does_not_learn_what_is_wrong_with_a_payload(world, cli, tmp_path):
    none = tmp_path / "none.yaml"
    none.write_text("grants: []\n")
    await world.agent(ECHO, authorization__bundle=str(none))
    with pytest.raises(CallRefusedError) as refusal:
        await cli.call(str(ECHO), "say", {"text": 3})
    assert refusal.value.reason == "not allowed"
    assert "'text'" in world.refusals("echo")[0]["reason"]


async def test_a_foreign_trust_domain_is_another_error_than_a_denial(world, cli):
    with pytest.raises(
        FederationError, match=r"trust domain of spiffe://else\.test/agent/x.*allowed_trust_domains"
    ):
        await cli.call("spiffe://else.test/agent/x", "say", {"text": "x"})
    assert world.refusals("cli") == []


async def test_no_workload_api_is_named_within_the_deadline(world):
    config = world.config(CLI, identity__spiffe_endpoint="unix:///nowhere/agent.sock")
    began = time.monotonic()
    with pytest.raises(IdentityError, match=r"/nowhere/agent\.sock|no identity within"):
        async with AgentWeaveClient(config, connect_deadline_s=1):
            pass
    assert time.monotonic() - began < 20


async def test_another_identity_than_the_configured_one_is_refused(world):
    config = world.config(CLI, identity__spiffe_endpoint=world.stack.api.endpoint(OTHER))
    with pytest.raises(IdentityError, match=rf"gives {OTHER}, but this process must be {CLI}"):
        async with AgentWeaveClient(config, connect_deadline_s=5):
            pass


async def test_an_expired_svid_can_not_connect(world):
    svid = world.issue(CLI, lifetime=timedelta(seconds=1))
    await anyio.sleep(max(0, svid.expiry.timestamp() - time.time()) + 0.1)
    config = world.config(CLI)
    provider = Fixed(svid, world.stack.api.authority.bundle)
    with pytest.raises(SvidUnavailableError, match=rf"the SVID of {CLI} expired at"):
        async with AgentWeaveClient(config, identity_provider=provider, connect_deadline_s=1):
            pass


async def test_no_broker_is_named_within_the_deadline(world):
    config = world.config(CLI, bus__servers=["tls://127.0.0.1:1"])
    began = time.monotonic()
    with pytest.raises(
        BusError, match=r"can't connect to the broker at tls://127\.0\.0\.1:1: .*refused|Connect call failed"
    ):
        async with AgentWeaveClient(config, connect_deadline_s=1):
            pass
    assert time.monotonic() - began < 15
    with pytest.raises(BusError, match=r"127\.0\.0\.1:1"):
        await anyio.to_thread.run_sync(lambda: SyncAgentWeaveClient(config, connect_deadline_s=1).__enter__())


async def test_a_broker_of_another_name_is_refused_before_anything_is_said(world):
    config = world.config(CLI, bus__server_spiffe_id=f"spiffe://{DOMAIN}/agentweave/other")
    with pytest.raises(BusError, match=rf"the TLS peer is {world.stack.broker_id}, not"):
        async with AgentWeaveClient(config, connect_deadline_s=1):
            pass


async def test_an_identity_that_the_broker_does_not_know_is_told(world):
    stranger = SpiffeID(f"spiffe://{DOMAIN}/client/stranger")
    provider = Fixed(world.issue(stranger), world.stack.api.authority.bundle)
    with pytest.raises(BusError, match=r"(?i)authorization violation"):
        async with AgentWeaveClient(world.config(stranger), identity_provider=provider, connect_deadline_s=1):
            pass


async def test_a_chain_of_another_authority_gets_no_connection(world):
    own = Authority(DOMAIN)  # the same name, another key
    provider = Fixed(own.issue(CLI, lifetime=timedelta(hours=1)), world.stack.api.authority.bundle)
    with pytest.raises(BusError, match="can't connect"):
        async with AgentWeaveClient(world.config(CLI), identity_provider=provider, connect_deadline_s=1):
            pass


@pytest.mark.slow  # it starts processes of its own
async def test_bad_files_end_a_worker_with_code_2_and_others_with_4(world, tmp_path):
    bad = tmp_path / "grants.yaml"
    bad.write_text("grants:\n  - callers: [x]\n")
    async with worker_process(world, ECHO, authorization__bundle=str(bad)) as worker:
        assert await worker.wait() in {2, 4}
        assert "grants.yaml:2" in worker.log.read_text()
    async with worker_process(world, ECHO, bus__server="tls://127.0.0.1:1") as worker:
        assert await worker.wait() == 2
        assert "bus.server" in worker.log.read_text()


async def test_a_client_outside_of_its_block_says_so(world):
    client = AgentWeaveClient(world.config(CLI))
    with pytest.raises(AgentWeaveError, match="inside its `with` block"):
        await client.call(str(ECHO), "say", {"text": "x"})
    async with client:
        with pytest.raises(AgentWeaveError, match="in use already"):
            await client.__aenter__()
    assert issubclass(CallRefusedError, AgentCallError)


async def test_only_the_origin_names_a_principal(world, cli, echo):
    front = await world.agent(FRONT)
    front.call_agent = lambda *args, **kwargs: type(front).call_agent(
        front, *args, **kwargs, principal={"iss": "https://login.example", "sub": "eve"}
    )
    call = {"path": [ECHO], "name": "whoami", "payload": {}}
    result = await cli.call(str(FRONT), "relay", call)
    assert result.status == "failed"
    assert echo.ran == []
    assert world.audit("front", event="call") == []
