"""The snippets of the reference's architecture page."""

from __future__ import annotations

import dataclasses
import importlib.util
import ssl
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentweave_bus.agent import RequestContext, bind_context
from agentweave_bus.authz import Authorizer, AuthzDecision, OPAEnforcer, PolicyEnforcer
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.exceptions import AuthorizationError, ConfigurationError, IdentityError
from agentweave_bus.identity import (
    Authority,
    IdentityProvider,
    SPIFFEIdentityProvider,
    StaticMTLSProvider,
    X509Bundle,
    X509Svid,
)
from agentweave_bus.runtime import connected
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.types import AgentCard, Capability, Task, TaskResult

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent / "architecture"
DOMAIN = "company.com"
ORCHESTRATOR = SpiffeID(f"spiffe://{DOMAIN}/agent/orchestrator")
TARGET = f"spiffe://{DOMAIN}/agent/target"


def snippet(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interactions() -> ModuleType:
    return snippet("interactions")


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[IdentityProvider]:
    with tempfile.TemporaryDirectory(prefix="aw-") as sockets:
        async with WorkloadApiServer(Authority(DOMAIN), sockets) as api:
            provider = SPIFFEIdentityProvider(await api.serve(ORCHESTRATOR))
            await provider.start()
            yield provider
            await provider.aclose()


@pytest.fixture(scope="module")
def authz() -> OPAEnforcer:
    authorization = load_config(HERE / "company.yaml").authorization
    engine = EmbeddedEngine.from_directory(None)
    return OPAEnforcer(Authorizer(engine, policy_path=authorization.policy_path), TARGET)


async def test_the_search_agent_takes_filters_or_none() -> None:
    config = AgentConfig.model_validate({"agent": {"name": "search", "trust_domain": DOMAIN}})
    agent = snippet("search_agent").SearchAgent(config)

    class Database:
        async def search(self, query: str, filters: Any) -> list[Any]:
            return [query, filters]

    agent._database = Database()
    bound = agent.capability_table["search"]
    for payload, found in (
        ({"query": "q"}, ["q", None]),
        ({"query": "q", "filters": None}, ["q", None]),
        ({"query": "q", "filters": {"a": 1}}, ["q", {"a": 1}]),
    ):
        with bind_context(RequestContext(caller_spiffe_id=ORCHESTRATOR)):
            result = await bound.invoke(bound.validate(payload))
        assert result.to_json() == {
            "status": "completed",
            "messages": [],
            "artifacts": [{"type": "results", "data": found}],
        }


async def test_the_spiffe_provider_answers_the_three_questions(provider: SPIFFEIdentityProvider) -> None:
    assert isinstance(await provider.get_svid(), X509Svid)
    assert isinstance(await provider.get_trust_bundle(DOMAIN), X509Bundle)
    assert provider.get_spiffe_id() == ORCHESTRATOR


def test_identity_provider_is_an_interface() -> None:
    assert issubclass(SPIFFEIdentityProvider, IdentityProvider)
    assert issubclass(StaticMTLSProvider, IdentityProvider)
    for missing in ("get_svid", "get_trust_bundle", "get_spiffe_id"):
        rest = {
            name: lambda self: None
            for name in ("get_svid", "get_trust_bundle", "get_spiffe_id")
            if name != missing
        }
        with pytest.raises(TypeError, match=missing):
            type("Incomplete", (IdentityProvider,), rest)()


async def test_identity_and_transport(interactions: ModuleType, provider: SPIFFEIdentityProvider) -> None:
    context = await interactions.identity_and_transport(provider)
    assert isinstance(context, ssl.SSLContext)  # the pair was loaded, so chain and key belong together


async def test_identity_and_authorization(
    interactions: ModuleType, provider: SPIFFEIdentityProvider, authz: OPAEnforcer
) -> None:
    decision = await interactions.identity_and_authorization(provider, authz)
    assert (decision.allowed, decision.allow) == (True, True)


async def test_authorization_and_communication(interactions: ModuleType, authz: OPAEnforcer) -> None:
    ran = []

    async def route_to_capability(task: Task) -> TaskResult:
        ran.append(task)
        return TaskResult(status="completed")

    handle = interactions.authorization_and_communication
    task = Task(type="search", payload={"query": "..."})
    result = await handle(task, ORCHESTRATOR, authz, route_to_capability)
    assert (result.status, ran) == ("completed", [task])
    for denied in (Task(type="delete"), Task(type="index")):
        peer = ORCHESTRATOR if denied.type == "delete" else f"spiffe://{DOMAIN}/agent/other"
        with pytest.raises(AuthorizationError):
            await handle(denied, peer, authz, route_to_capability)
    assert ran == [task]


async def test_the_policy_allows_what_it_lists(authz: OPAEnforcer) -> None:
    assert isinstance(authz, PolicyEnforcer)
    for action, allowed in (("search", True), ("index", True), ("delete", False)):
        assert (await authz.check_inbound(ORCHESTRATOR, action, {})).allowed is allowed
    assert not (await authz.check_inbound(f"spiffe://{DOMAIN}/agent/other", "search")).allowed
    other_way = await authz.check_outbound(TARGET, ORCHESTRATOR, "search", {"payload": {"query": "q"}})
    assert not other_way.allowed


@pytest.mark.parametrize("spelling", ["allowed", "allow"])
def test_a_decision_is_frozen_and_has_the_three_fields(spelling: str) -> None:
    decision = AuthzDecision(**{spelling: True}, reason="because", audit_id="a-1")  # type: ignore[arg-type]
    assert (decision.allowed, decision.allow, decision.reason, decision.audit_id) == (
        True,
        True,
        "because",
        "a-1",
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.allowed = False  # type: ignore[misc]


def test_an_agent_card_serializes() -> None:
    card = AgentCard(
        name="search",
        description="Searches data stores for information.",
        spiffe_id=f"spiffe://{DOMAIN}/agent/search",
        capabilities=[Capability(name="search")],
    )
    wire = card.to_json()
    assert (wire["name"], wire["spiffe_id"]) == ("search", f"spiffe://{DOMAIN}/agent/search")
    assert [one["name"] for one in wire["capabilities"]] == ["search"]
    assert AgentCard.from_json(wire) == card


async def test_an_agent_does_not_start_without_an_svid(tmp_path: Path) -> None:
    overrides = {
        "identity.spiffe_endpoint": f"unix://{tmp_path}/none.sock",
        "authorization.audit.destination": str(tmp_path / "audit.jsonl"),
    }
    config = load_config(HERE / "company.yaml", overrides=overrides)
    with pytest.raises(IdentityError):
        await connected(config, connect_deadline_s=0.3).__aenter__()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "transport.peer_verification",
            "none",
            "Security violation: peer_verification 'none' is never allowed",
        ),
        (
            "authorization.default_action",
            "allow",
            "Security violation: 'allow' mode not allowed in production environment",
        ),
        ("transport.tls_min_version", "1.1", "transport.tls_min_version"),
        ("agent.path", "agent/Ä", "agent.path"),
        ("bus.server_spiffe_id", "https://company.com/broker", "bus.server_spiffe_id"),
    ],
)
def test_what_configuration_validation_enforces(key: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_config(HERE / "company.yaml", overrides={key: value})
    assert sentence in str(refused.value)
