"""The snippets of the reference's FAQ: agents, configuration, metrics, and OPA's own interface."""

from __future__ import annotations

import http.client
import json
import re
import runpy
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client import generate_latest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.authz.policy_source import SHIPPED, find_opa
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.exceptions import AuthorizationError, ConfigurationError
from agentweave_bus.observability.metrics import BreakerState, Direction, Metrics, RequestStatus
from agentweave_bus.spiffe_id import SpiffeID
from tests.opa_socket import wait_until_healthy

pytestmark = pytest.mark.anyio

DOMAIN = "example.com"
AGENTS = ("my_agent", "custom_authz", "legacy_service")
CLIENTS = ("friend", "stranger")


def agent(name: str) -> SpiffeID:
    return SpiffeID(f"spiffe://{DOMAIN}/agent/{name}")


@dataclass(frozen=True)
class Running:
    stack: EmbeddedStack
    connect: Callable[[str], Any]
    agents: dict[str, Any]


@pytest.fixture(scope="module")
async def running(tree: Any, processes: Any, client: Any) -> AsyncIterator[Running]:
    folder = tree("faq")
    clients = {name: SpiffeID(f"spiffe://{DOMAIN}/client/{name}") for name in CLIENTS}
    identities = (*map(agent, AGENTS), *clients.values())
    settings = StackSettings(DOMAIN, folder / "state", identities, folder / "grants.yaml")
    async with AsyncExitStack() as entered:
        stack = await entered.enter_async_context(embedded_stack(settings, settle=False))

        def variables(name: str, identity: SpiffeID) -> dict[str, str]:
            config = folder / "config" / f"{name}.yaml"
            return {**stack.environment(identity), "AGENTWEAVE_CONFIG": str(config)}

        scripts = {folder / f"{name}.py": variables(name, agent(name)) for name in AGENTS}
        agents = await entered.enter_async_context(processes(scripts))

        def connect(name: str) -> Any:
            return client(folder / "config" / f"{name}.yaml", variables(name, clients[name]))

        await stack.settled()
        yield Running(stack, connect, agents)


# --- agents ----------------------------------------------------------------------------------------


async def test_on_svid_update_hears_of_each_rotation(running: Running) -> None:
    before = running.stack.api.current_svid(agent("my_agent"))
    running.stack.api.rotate(agent("my_agent"))
    after = running.stack.api.current_svid(agent("my_agent"))
    assert after.x5t != before.x5t
    log = running.agents["my_agent"].log
    with anyio.fail_after(30):
        while "SVID rotated" not in log.read_text():  # noqa: ASYNC110 - another process
            await anyio.sleep(0.05)
    said = [one for one in log.read_text().splitlines() if "SVID rotated" in one]
    assert json.loads(said[0])["expiry"] == after.expiry.isoformat()


async def test_a_custom_provider_decides(running: Running) -> None:
    target = agent("custom_authz")
    async with running.connect("friend") as friend:
        assert (await friend.call(target, "health")).data["status"] == "healthy"
    async with running.connect("stranger") as stranger:
        with pytest.raises(AuthorizationError) as refused:
            await stranger.call(target, "health")
    assert refused.value.direction == "inbound"
    assert "not_in_allowlist" in running.agents["custom_authz"].log.read_text()


async def test_a_wrapped_service_answers_with_a_plain_dict(running: Running) -> None:
    async with running.connect("friend") as friend:
        result = await friend.call(agent("legacy_service"), "process", {"data": {"a": 1}})
    assert (result.status, result.artifacts[0]["data"]) == ("completed", {"processed": {"a": 1}})


async def test_the_test_utilities() -> None:
    page = runpy.run_path(str(Path(__file__).parent / "faq" / "mock_agent.py"))
    await page["test_my_capability"]()


def test_an_agent_may_take_its_configuration_alone(tmp_path: Path) -> None:
    """The constructor of the FAQ's LangChain agent, without LangChain."""

    class LLMAgent(SecureAgent):
        def __init__(self, config):
            super().__init__(config)
            self.llm = object()

        @capability("chat")
        async def chat(self, message: str) -> dict:
            """Chat with LLM agent."""
            return {"response": message}

    path = tmp_path / "chat.yaml"
    path.write_text("agent: {name: chat, trust_domain: example.com}")
    agent = LLMAgent.from_config(path)
    assert agent.llm is not None
    assert "chat" in agent.capability_table


# --- configuration ---------------------------------------------------------------------------------


def loaded(tmp_path: Path, text: str, environment: str) -> AgentConfig:
    path = tmp_path / "config.yaml"
    path.write_text(f"agent: {{name: x, trust_domain: us.example.com}}\n{text}")
    return load_config(path, environment=environment)


LOG_ONLY = """
authorization:
  default_action: "log-only"
"""


def test_log_only_is_refused_in_production_with_the_faqs_sentence(tmp_path: Path) -> None:
    sentence = "Security violation: 'log-only' mode not allowed in production environment"
    with pytest.raises(ConfigurationError) as refused:
        loaded(tmp_path, LOG_ONLY, "production")
    assert sentence in str(refused.value)


def test_log_only_is_for_development(tmp_path: Path) -> None:
    config = loaded(tmp_path, LOG_ONLY, "development")
    assert config.authorization.default_action == "log-only"
    assert any("log-only" in warning for warning in config.warnings)


def test_deny_is_what_production_requires(tmp_path: Path) -> None:
    config = loaded(
        tmp_path, 'authorization:\n  default_action: "deny"  # Required in production\n', "production"
    )
    assert config.authorization.default_action == "deny"


def test_the_debug_logger(tmp_path: Path) -> None:
    text = 'observability:\n  logging:\n    loggers:\n      "agentweave.authz": "DEBUG"\n'
    assert loaded(tmp_path, text, "production").observability.logging.loggers == {"agentweave.authz": "DEBUG"}


def test_federated_regions(tmp_path: Path) -> None:
    text = """
identity:
  allowed_trust_domains:
    - "us.example.com"      # Own domain
    - "eu.example.com"      # Federated region
"""
    assert loaded(tmp_path, text, "production").identity.allowed_trust_domains == (
        "us.example.com",
        "eu.example.com",
    )


def test_the_circuit_breaker(tmp_path: Path) -> None:
    text = """
authorization:
  circuit_breaker:
    failure_threshold: 5    # Open after 5 failures
    success_threshold: 2    # Close after 2 successes
    timeout: 30             # Retry after 30 seconds
"""
    breaker = loaded(tmp_path, text, "production").authorization.circuit_breaker
    assert (breaker.failure_threshold, breaker.success_threshold, breaker.timeout) == (5, 2, 30)


OPA_HIGH_AVAILABILITY = """
authorization:
  provider: "opa"
  opa_endpoints:
    - "http://opa-1:8181"
    - "http://opa-2:8181"
    - "http://opa-3:8181"
  failover_strategy: "round_robin"
"""


def test_several_opa_servers_over_plain_http_are_for_development(tmp_path: Path) -> None:
    config = loaded(tmp_path, OPA_HIGH_AVAILABILITY, "development")
    assert config.authorization.endpoints == tuple(f"http://opa-{n}:8181" for n in (1, 2, 3))
    assert config.authorization.failover_strategy == "round_robin"
    assert len([one for one in config.warnings if "plain HTTP to another machine" in one]) == 3
    with pytest.raises(ConfigurationError, match="not allowed in production environment"):
        loaded(tmp_path, OPA_HIGH_AVAILABILITY, "production")


def test_metrics(tmp_path: Path) -> None:
    text = 'observability:\n  metrics:\n    enabled: true\n    port: 9090\n    path: "/metrics"\n'
    metrics = loaded(tmp_path, text, "production").observability.metrics
    assert (metrics.enabled, metrics.port, metrics.path) == (True, 9090, "/metrics")


def test_a_policy_path_may_end_in_allow(tmp_path: Path) -> None:
    config = loaded(tmp_path, 'authorization: {policy_path: "agentweave/authz/v2/allow"}', "production")
    assert config.authorization.policy_package == "agentweave/authz/v2"


# --- metrics ---------------------------------------------------------------------------------------

QUERIES = [
    'rate(agentweave_requests_total{status="error"}[5m]) / rate(agentweave_requests_total[5m]) > 0.05',
    "rate(agentweave_authz_denied_total[5m]) > 10",
    "agentweave_svid_rotation_errors_total > 0",
    "rate(agentweave_opa_errors_total[5m]) > 5",
    "histogram_quantile(0.99, rate(agentweave_request_duration_seconds_bucket[5m]) ) > 1",
    'agentweave_authz_circuit_breaker_state{state="open"}',
    'agentweave_authz_circuit_breaker_state{state="closed"}',
    "agentweave_authz_allowed_total",
    "agentweave_svid_rotation_total",
    "agentweave_opa_requests_total",
]


@pytest.fixture(scope="module")
def exposition() -> list[str]:
    metrics = Metrics.create()
    metrics.declare_capability(Direction.INBOUND, "search")
    metrics.request_ended(Direction.INBOUND, "search", RequestStatus.ERROR, 0.1)
    return generate_latest(metrics.registry).decode().splitlines()


@pytest.mark.parametrize("query", QUERIES)
def test_what_a_query_selects_is_exposed(exposition: list[str], query: str) -> None:
    selectors = re.findall(r"(agentweave_\w+)(?:\{(\w+=\"\w+\")\})?", query)
    assert selectors
    for name, label in selectors:
        lines = [line for line in exposition if re.match(rf"{name}[ {{]", line)]
        assert any(label in line for line in lines), (name, label)


def test_the_latency_query_has_its_buckets(exposition: list[str]) -> None:
    buckets = [one for one in exposition if one.startswith("agentweave_request_duration_seconds_bucket{")]
    assert all('le="' in one for one in buckets)
    assert any('le="+Inf"' in one for one in buckets)


def test_the_breakers_states_are_series_of_zero_and_one() -> None:
    metrics = Metrics.create()

    def values() -> dict[str, float]:
        text = generate_latest(metrics.registry).decode()
        found = re.findall(
            r'^agentweave_authz_circuit_breaker_state\{state="(\w+)"\} (\S+)$', text, re.MULTILINE
        )
        return {state: float(value) for state, value in found}

    assert values() == {"open": 0, "half_open": 0, "closed": 1}
    metrics.breaker_changed("http://opa-1:8181", BreakerState.OPEN)
    assert values() == {"open": 1, "half_open": 0, "closed": 0}


# --- OPA's own interface ---------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("opa")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(str(self._path))


@pytest.fixture(scope="module")
def opa() -> Iterator[Callable[..., Any]]:
    """Run a real OPA server over the shipped policies; return a function that asks it."""
    binary = find_opa()
    if binary is None:
        pytest.skip("no opa binary: 'make tools' builds it")
    with tempfile.TemporaryDirectory(prefix="aw-") as folder:
        path, data = Path(folder) / "opa.sock", Path(folder) / "data.json"
        data.write_text(json.dumps({"allowed_callers": {agent("target"): [agent("caller")]}}))
        sources = [str(one) for one in SHIPPED.glob("*.rego") if not one.name.endswith("_test.rego")]
        arguments = [
            "run",
            "--server",
            "--addr",
            f"unix://{path}",
            "--log-level",
            "error",
            str(data),
            *sources,
        ]
        server = subprocess.Popen([binary, *arguments], stderr=subprocess.PIPE)
        try:
            wait_until_healthy(path, server)
            yield lambda method, url, body=None: ask(path, method, url, body)
        finally:
            server.terminate()
            server.communicate(timeout=10)


def ask(path: Path, method: str, url: str, body: Any) -> tuple[int, Any]:
    connection = UnixConnection(path)
    try:
        connection.request(method, url, body if isinstance(body, str) else json.dumps(body))
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else None
    finally:
        connection.close()


QUESTION = {
    "caller_spiffe_id": agent("caller"),
    "callee_spiffe_id": agent("target"),
    "action": "process_data",
}


def test_opa_is_asked_directly(opa: Callable[..., Any]) -> None:
    status, answer = opa("POST", "/v1/data/agentweave/authz/allow", {"input": QUESTION})
    assert (status, answer["result"]) == (200, True)
    other = QUESTION | {"caller_spiffe_id": agent("other")}
    assert opa("POST", "/v1/data/agentweave/authz/allow", {"input": other})[1]["result"] is False


def test_explain_belongs_into_the_query_string(opa: Callable[..., Any]) -> None:
    _, in_body = opa("POST", "/v1/data/agentweave/authz/allow", {"input": QUESTION, "explain": "full"})
    assert "explanation" not in in_body
    _, in_query = opa("POST", "/v1/data/agentweave/authz/allow?explain=full", {"input": QUESTION})
    assert in_query["explanation"]


def test_opa_has_no_document_of_decisions(opa: Callable[..., Any]) -> None:
    assert "result" not in opa("GET", "/v1/data/system/decisions")[1]


def test_a_policy_is_replaced_by_a_second_version_of_it(opa: Callable[..., Any]) -> None:
    text = (
        'package agentweave.authz.v2\n\ndefault allow := false\n\nallow if input.action == "process_data"\n'
    )
    assert opa("PUT", "/v1/policies/authz-v2", text)[0] == 200
    assert opa("POST", "/v1/data/agentweave/authz/v2/allow", {"input": QUESTION})[1]["result"] is True
    assert opa("DELETE", "/v1/policies/authz-v2")[0] == 200
    assert "result" not in opa("POST", "/v1/data/agentweave/authz/v2/allow", {"input": QUESTION})[1]
