"""The reference's federation example: two organizations, an authority each, one call across.

``acme-corp.io`` runs the broker. ``partner.com`` has an authority and a Workload API of its own; the two
sides have exchanged bundles and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import nats
import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.authz import verify_audit
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.config import load_config
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.envelope import Draft, Kind, Sealer, encode_payload, new_id
from agentweave_bus.exceptions import (
    AgentCallError,
    ChainRefusedError,
    ConfigurationError,
    FederationError,
    IdentityError,
)
from agentweave_bus.identity import (
    Authority,
    ChainVerifier,
    IdentityProvider,
    IdentitySource,
    X509Bundle,
    X509Svid,
    client_context,
)
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

ACME, PARTNER, STRANGER = "acme-corp.io", "partner.com", "stranger.example"
BILLING = SpiffeID(f"spiffe://{ACME}/agent/billing")
PAYMENT = SpiffeID(f"spiffe://{PARTNER}/agent/payment")
CLI = SpiffeID(f"spiffe://{ACME}/client/cli")
OUTSIDER = SpiffeID(f"spiffe://{STRANGER}/agent/billing")
STEP_4 = {"customer_id": "cust-123", "amount": "99.99", "description": "Monthly subscription"}


@dataclass(frozen=True)
class World:
    folder: Path
    stack: EmbeddedStack
    client: AgentWeaveClient
    connect: Callable[..., Any]
    running: dict[str, Any]
    partner: Authority
    stranger: Authority
    types: Callable[[str], Any]

    def audit(self, side: str) -> list[dict[str, Any]]:
        """Return the records that the agents of one side wrote."""
        logs = sorted((self.folder / side / "audit").glob("*.jsonl"))
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]

    def log(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.running[name].log.read_text().splitlines()]


@pytest.fixture(scope="module")
async def world(tree: Any, processes: Any, client: Any, shell: Any) -> AsyncIterator[World]:
    folder = tree("federation")
    acme = Authority.load_or_create(folder / "state" / "authority", ACME)  # the stack will find it there
    partner, stranger = Authority(PARTNER), Authority(STRANGER)
    settings = StackSettings(
        ACME,
        folder / "state",
        (BILLING, CLI),
        folder / "broker-grants.yaml",
        federated=(partner.bundle, stranger.bundle),
        foreign=(PAYMENT, OUTSIDER),
    )
    async with AsyncExitStack() as entered:
        sockets = entered.enter_context(tempfile.TemporaryDirectory(prefix="aw-"))
        api = WorkloadApiServer(partner, sockets, federated=(acme.bundle,))
        await entered.enter_async_context(api)
        await api.serve(PAYMENT)
        stack = await entered.enter_async_context(embedded_stack(settings, settle=False))
        at_partner = {
            **stack.environment(PAYMENT),
            "AGENTWEAVE_IDENTITY__SPIFFE_ENDPOINT": api.endpoint(PAYMENT),
        }
        scripts = {
            folder / "acme" / "billing_agent.py": stack.environment(BILLING),
            folder / "partner" / "payment_agent.py": at_partner,
        }
        running = await entered.enter_async_context(processes(scripts))
        config, variables = folder / "acme" / "config" / "client.yaml", stack.environment(CLI)
        cli = await entered.enter_async_context(client(config, variables))

        def connect(**overrides: Any) -> Any:
            return client(config, variables, **overrides)

        await stack.settled()

        def types(line: str) -> Any:
            return shell(line, folder / "acme", {**variables, "AGENTWEAVE_CONFIG": str(config)})

        yield World(folder, stack, cli, connect, running, partner, stranger, types)


async def bill(world: World, **changes: Any) -> Any:
    return await world.client.call(BILLING, "process_billing", STEP_4 | changes)


async def test_a_payment_across_trust_domains(world: World) -> None:
    result = await bill(world)
    assert result.status == "completed", result.error
    ((answer,),) = (message.parts for message in result.messages)
    assert answer.type == "data"
    expected = {"payment_status": "completed", "amount": "99.99", "processed_by": PAYMENT}
    assert {key: answer.data[key] for key in expected} == expected
    (artifact,) = result.artifacts
    paid = artifact["data"]["payment_data"]
    assert artifact["type"] == "billing_result"
    assert answer.data["transaction_id"] == paid["id"]
    assert answer.data["billing_id"] == paid["billing_id"] == artifact["data"]["billing_record"]["id"]
    assert (paid["source_domain"], paid["source_agent"]) == (ACME, BILLING)


async def test_step_4_typed_into_a_shell(world: World) -> None:
    typed = await world.types((world.folder / "acme" / "process_billing.sh").read_text())
    assert typed.returncode == 0, typed.stderr
    result = json.loads(typed.stdout)
    assert (result["status"], result["messages"][0]["role"]) == ("completed", "assistant")
    (part,) = result["messages"][0]["parts"]
    assert part["type"] == "data"
    assert set(part["data"]) == {"billing_id", "payment_status", "transaction_id", "amount", "processed_by"}


async def test_both_sides_log_what_the_reference_shows(world: World) -> None:
    await bill(world, customer_id="cust-log")
    (billing,) = (line for line in world.log("billing_agent") if line.get("customer_id") == "cust-log")
    assert billing["message"] == "Processing billing"
    assert (billing["amount"], billing["payment_agent"]) == ("99.99", PAYMENT)
    asked = [
        line
        for line in world.log("payment_agent")
        if line["message"] == "Processing federated payment request"
    ]
    assert {"caller_domain": ACME, "caller_id": BILLING, "currency": "USD"}.items() <= asked[-1].items()
    federated = [line for line in world.log("payment_agent") if line["message"].startswith("federated ")]
    assert federated[-1]["direction"] == "inbound"  # audit.log_federated


async def test_the_audit_tells_who_asked_whom_for_what_and_why(world: World) -> None:
    await bill(world, customer_id="cust-audit")
    (record,) = (
        one
        for one in world.audit("partner")
        if one["event"] == "admission" and one["input"]["context"]["payload"]["customer_id"] == "cust-audit"
    )
    told = {"caller": BILLING, "callee": PAYMENT, "action": "process_payment", "allowed": True}
    assert told.items() <= record.items()
    assert record["reason"] == "partner.authz allows it"
    context = record["input"]["context"]
    assert context["caller_trust_domain"] == ACME
    assert context["payload"]["amount"] == "99.99"
    assert [(link["iss"], link["cap"]) for link in context["via"]] == [(CLI, "process_billing")]


async def test_acmes_own_policy_refuses_before_anything_is_sent(world: World) -> None:
    ours = await bill(world, amount="1000000")
    assert ours.status == "failed"
    assert not [one for one in world.audit("partner") if '"1000000"' in json.dumps(one)]
    assert "the amount must be above 0 and below 1000000" in ours.error


async def bill_until(world: World, status: str) -> Any:
    """Bill until the partner has taken its changed file, which it looks for every second."""
    with anyio.fail_after(30):
        while (result := await bill(world)).status != status:  # noqa: ASYNC110 - another process
            await anyio.sleep(0.1)
    return result


async def test_the_partner_refuses_who_is_no_registered_partner(world: World) -> None:
    """Its own policy data decides, not ACME's: the partner strikes ACME off, and the next call is denied."""
    data = world.folder / "partner" / "policies" / "data.json"
    before = data.read_text()
    data.write_text(before.replace('"acme-corp.io",', "", 1))
    try:
        result = await bill_until(world, "failed")
    finally:
        data.write_text(before)
        await bill_until(world, "completed")
    assert "Payment processing failed" in result.error
    reasons = [one.get("reason") for one in world.audit("partner")]
    assert "acme-corp.io is no registered partner" in reasons


async def test_a_domain_that_is_not_listed_is_a_federation_error(world: World) -> None:
    with pytest.raises(FederationError) as refused:  # the client's allowed_trust_domains: its own alone
        await world.client.call(PAYMENT, "process_payment", {})
    assert refused.value.trust_domain == PARTNER
    assert isinstance(refused.value, AgentCallError)


async def test_a_listed_domain_without_a_bundle_is_a_federation_error(world: World) -> None:
    """Listing a domain is not enough: its bundle has to be there, and nobody else's will do."""
    listed = {"identity.allowed_trust_domains": [ACME, PARTNER, "other-partner.io"]}
    async with world.connect(**listed) as client:
        source = client._connected().source
        assert source.bundle_for(PARTNER).trust_domain == PARTNER
        with pytest.raises(FederationError) as missing:
            source.bundle_for("other-partner.io")
    assert missing.value.trust_domain == "other-partner.io"


class Given(IdentityProvider):
    """An identity that somebody made up at home, with the bundles that they need to reach the broker."""

    def __init__(self, svid: X509Svid, *bundles: X509Bundle) -> None:
        self._svid = svid
        self._bundles = {bundle.trust_domain: bundle for bundle in bundles}

    async def get_svid(self) -> X509Svid:
        return self._svid

    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        return self._bundles[trust_domain]

    def get_spiffe_id(self) -> str:
        return self._svid.spiffe_id


@asynccontextmanager
async def at_the_broker(world: World, svid: X509Svid) -> AsyncIterator[Any]:
    """Connect to the broker as ``svid`` says, without any of this project's agents."""
    domains = {svid.spiffe_id.trust_domain: svid, ACME: None}
    own = {
        PARTNER: world.partner.bundle,
        STRANGER: world.stranger.bundle,
        ACME: world.stack.api.authority.bundle,
    }
    source = IdentitySource(
        Given(svid, *(own[domain] for domain in domains)), allowed_trust_domains=domains, expected_id=None
    )
    await source.start(5)
    connection = await nats.connect(
        world.stack.bus_url,
        tls=client_context(source, world.stack.broker_id),
        tls_handshake_first=True,
        tls_hostname="127.0.0.1",
        allow_reconnect=False,
    )
    try:
        yield connection
    finally:
        await connection.close()
        await source.aclose()


def payment_request(svid: X509Svid, trace: str) -> tuple[str, str, bytes]:
    """Seal what billing would send, with the key of ``svid``; return subject, reply subject and frame."""
    now, subject, instance = clock_ms(), call_subject(PAYMENT, "process_payment"), "f" * 22
    draft = Draft(
        kind=Kind.CALL,
        id=new_id(now),
        aud=PAYMENT,
        cap="process_payment",
        sub=subject,
        iat=now,
        exp=now + 5000,
        reply=instance,
    )
    payload = {
        "billing_id": trace,
        "customer_id": "cust-123",
        "amount": "1",
        "currency": "USD",
        "description": "d",
    }
    sealed = Sealer(lambda: svid).seal_now(draft, encode_payload(payload))
    return subject, reply_subject(svid.spiffe_id, instance, draft["id"]), sealed.frame


async def refusals(world: World, step: str) -> float:
    """Return how many requests payment has refused at ``step``."""

    def scraped() -> str:
        with urllib.request.urlopen(world.running["payment_agent"].metrics_url, timeout=30) as answer:
            return str(answer.read().decode())

    lines = (await anyio.to_thread.run_sync(scraped)).splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("agentweave_admission_refusals_total{") and f'step="{step}"' in line
    )


async def is_refused(world: World, svid: X509Svid, trace: str) -> bool:
    """Send a payment request as ``svid`` and say whether payment refused its chain without running."""
    before = await refusals(world, "chain")
    async with at_the_broker(world, svid) as connection:
        subject, reply, frame = payment_request(svid, trace)
        await connection.publish(subject, frame, reply)
        await connection.flush()
        with anyio.fail_after(30):
            while await refusals(world, "chain") == before:  # noqa: ASYNC110 - another process
                await anyio.sleep(0.05)
    return trace not in world.running["payment_agent"].log.read_text()


async def test_the_same_request_signed_by_billing_itself_is_taken(world: World) -> None:
    """So that the refusals below are due to who signed, and to nothing else."""
    svid = world.stack.api.current_svid(BILLING)
    async with at_the_broker(world, svid) as connection:
        subject, reply, frame = payment_request(svid, "bill-genuine")
        answers = await connection.subscribe(reply)
        await connection.publish(subject, frame, reply)
        await answers.next_msg(timeout=5)
    assert "bill-genuine" in world.running["payment_agent"].log.read_text()


async def test_one_domains_authority_cannot_mint_the_others_identity(world: World) -> None:
    with pytest.raises(IdentityError):
        world.partner.issue(BILLING)  # an honest authority does not
    forged = world.partner.issue(BILLING, allow_foreign=True)
    assert forged.spiffe_id == BILLING
    assert await is_refused(world, forged, "bill-forged")


async def test_a_caller_of_an_unlisted_domain_is_refused_although_the_broker_lets_it_in(world: World) -> None:
    genuine = world.stranger.issue(OUTSIDER)
    assert await is_refused(world, genuine, "bill-stranger")
    said = [line["message"] for line in world.log("payment_agent")]
    assert any(STRANGER in message for message in said)


async def test_neither_side_believes_the_other_in_its_own_name(world: World) -> None:
    """Both bundles are at hand, and each counts for its own domain only."""
    async with world.connect(**{"identity.allowed_trust_domains": [ACME, PARTNER]}) as client:
        chains = ChainVerifier(client._connected().source)
        acme = world.stack.api.authority
        for authority, own, other in ((acme, BILLING, PAYMENT), (world.partner, PAYMENT, BILLING)):
            assert chains.verify(authority.issue(own).cert_chain, at_ms=clock_ms()).spiffe_id == own
            forged = authority.issue(other, allow_foreign=True)
            with pytest.raises(ChainRefusedError):
                chains.verify(forged.cert_chain, at_ms=clock_ms())


async def test_every_audit_log_verifies(world: World) -> None:
    await bill(world)
    logs = [world.folder / "acme" / "audit", world.folder / "partner" / "audit"]
    report = await anyio.to_thread.run_sync(verify_audit, logs)
    assert report.ok, report.problems
    assert len(report.chains) == 2


def test_the_own_domain_must_be_listed_too(world: World) -> None:
    config = world.folder / "acme" / "config" / "billing.yaml"
    with pytest.raises(ConfigurationError, match=r"must list the agent's own 'acme-corp\.io'"):
        load_config(config, overrides={"identity.allowed_trust_domains": [PARTNER]})


def test_the_yaml_says_what_the_reference_says(world: World) -> None:
    billing = load_config(world.folder / "acme" / "config" / "billing.yaml")
    payment = load_config(world.folder / "partner" / "config" / "payment.yaml")
    assert (billing.agent.spiffe_id, payment.agent.spiffe_id) == (BILLING, PAYMENT)
    assert payment.identity.allowed_trust_domains == (PARTNER, ACME, "other-partner.io")
    assert payment.authorization.audit.log_federated
    for config in (billing, payment):
        assert any("no A2A adapter yet" in warning for warning in config.warnings)  # server:


def test_only_federated_peers_may_ask_for_a_payment(world: World) -> None:
    """``@requires_federated_peer`` names two domains; the partner's own is none of them."""
    path = world.folder / "partner" / "payment_agent.py"
    spec = importlib.util.spec_from_file_location("payment_agent", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    agent = module.PaymentAgent.from_config(path.parent / "config" / "payment.yaml")
    rule = agent.capability_table["process_payment"].admits_peer
    assert rule(BILLING) is None
    assert rule(SpiffeID("spiffe://other-partner.io/agent/x")) is None
    for peer in (OUTSIDER, SpiffeID(f"spiffe://{PARTNER}/agent/x")):
        assert rule(peer)
