"""Every name that the reference documents use is there, or on the list of what is not there yet."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from agentweave_bus.config import AgentConfig
from agentweave_bus.config.problems import known_keys
from agentweave_bus.observability.metrics import DECLARATIONS

ROOT = Path(__file__).parents[2]
ERRATA = (ROOT / "docs" / "reference-errata.md").read_text()

IMPORTED = [
    "SecureAgent",
    "SecureAgent.from_config",
    "SecureAgent.run",
    "SecureAgent.logger",
    "SecureAgent.spiffe_id",
    "SecureAgent.call_agent",
    "SecureAgent.context",
    "SecureAgent.on_svid_update",
    "BaseAgent",
    "capability",
    "requires_federated_peer",
    "types.TaskResult",
    "types.Message",
    "types.DataPart",
    "types.Task",
    "types.AgentCard",
    "types.AgentCard.to_json",
    "types.Capability",
    "exceptions.AgentCallError",
    "exceptions.AuthorizationError",
    "exceptions.FederationError",
    "identity.IdentityProvider",
    "identity.IdentityProvider.get_svid",
    "identity.IdentityProvider.get_trust_bundle",
    "identity.IdentityProvider.get_spiffe_id",
    "identity.SPIFFEIdentityProvider",
    "identity.StaticMTLSProvider",
    "identity.X509Svid",
    "identity.X509Svid.cert_chain_path",
    "identity.X509Svid.private_key_path",
    "identity.X509Svid.expiry",
    "identity.X509Bundle",
    "authz.AuthorizationProvider",
    "authz.AuthorizationProvider.authorize",
    "authz.AuthzContext",
    "authz.AuthzContext.caller",
    "authz.AuthzDecision",
    "authz.AuthzDecision.allow",
    "authz.AuthzDecision.allowed",
    "authz.PolicyEnforcer",
    "authz.OPAEnforcer",
    "authz.OPAEnforcer.check_inbound",
    "authz.OPAEnforcer.check_outbound",
    "authz.AllowAllProvider",
    "testing.MockSecureAgent",
    "testing.MockIdentityProvider",
    "secrets.AWSSecretsProvider",
]
"""With the module that a document or the table of names gives, below the package."""

ANYWHERE = [
    "A2AClient",
    "A2AServer",
    "SecureChannel",
    "ConnectionPool",
    "CircuitBreaker",
    "RetryPolicy",
    "Task.to_jsonrpc",
]
"""Classes, or their methods, for which no module is given."""

ENDPOINTS = ("/.well-known/a2a/tasks/send", "/a2a/v1/tasks")

SETTINGS = [
    "agent.name",
    "agent.trust_domain",
    "agent.description",
    "agent.class",
    "agent.capabilities[].name",
    "agent.capabilities[].description",
    "agent.capabilities[].input_modes",
    "agent.capabilities[].output_modes",
    "identity.provider",
    "identity.spiffe_endpoint",
    "identity.allowed_trust_domains",
    "authorization.provider",
    "authorization.opa_endpoint",
    "authorization.opa_endpoints",
    "authorization.failover_strategy",
    "authorization.policy_path",
    "authorization.bundle",
    "authorization.default_action",
    "authorization.circuit_breaker.failure_threshold",
    "authorization.circuit_breaker.success_threshold",
    "authorization.circuit_breaker.timeout",
    "authorization.audit.enabled",
    "authorization.audit.destination",
    "authorization.audit.log_federated",
    "transport.tls_min_version",
    "transport.peer_verification",
    "server.host",
    "server.port",
    "server.protocol",
    "observability.logging.loggers",
    "observability.metrics.enabled",
    "observability.metrics.port",
    "observability.metrics.path",
]

METRICS = [
    "agentweave_requests_total",
    "agentweave_request_duration_seconds",
    "agentweave_authz_allowed_total",
    "agentweave_authz_denied_total",
    "agentweave_authz_circuit_breaker_state",
    "agentweave_svid_rotation_total",
    "agentweave_svid_rotation_errors_total",
    "agentweave_opa_requests_total",
    "agentweave_opa_errors_total",
    "agentweave_mtls_handshakes_total",
    "agentweave_task_duration_seconds",
    "agentweave_federation_errors_total",
    "agentweave_certificate_expiry_timestamp_seconds",
]


def importable(name: str) -> bool:
    """Say whether ``name``, below the package, can be imported or read off what can."""
    parts = name.split(".")
    for split in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["agentweave_bus", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", ()):
                return False
            found = getattr(found, part, None)
        return True
    return False


@cache
def nodes() -> tuple[ast.AST, ...]:
    """Return the syntax of the whole package."""
    sources = (path.read_text() for path in (ROOT / "agentweave_bus").rglob("*.py"))
    return tuple(node for source in sources for node in ast.walk(ast.parse(source)))


@cache
def defined() -> frozenset[str]:
    """Return every class of the package, and ``Class.method`` of each."""
    found = set()
    for node in nodes():
        if isinstance(node, ast.ClassDef):
            methods = (one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {node.name, *(f"{node.name}.{one.name}" for one in methods)}
    return frozenset(found)


@cache
def literals() -> frozenset[str]:
    """Return every text in the package's code."""
    constants = (node.value for node in nodes() if isinstance(node, ast.Constant))
    return frozenset(value for value in constants if isinstance(value, str))


def missing() -> set[str]:
    """Return the names that can't be had."""
    gone = {f"agentweave_bus.{name}" for name in IMPORTED if not importable(name)}
    gone |= {name for name in ANYWHERE if name not in defined()}
    gone |= {path for path in ENDPOINTS if path not in literals()}
    if not any(ROOT.glob("docker-compose*.y*ml")):
        gone.add("docker-compose.yaml")
    return gone


def listed() -> set[str]:
    """Return the names below "Not yet"."""
    section = ERRATA.split("## Not yet")[1]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def test_what_is_listed_as_missing_is_exactly_what_is_missing() -> None:
    assert listed() == missing()


def test_the_check_tells_what_is_there_from_what_is_not() -> None:
    assert importable("SecureAgent")
    assert importable("authz.AuthzContext.caller")
    assert not importable("SecureAgent.fly")
    assert not importable("nowhere.Nothing")
    assert "CircuitBreaker" in defined()


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_exists(key: str) -> None:
    assert key in known_keys(AgentConfig)


def test_every_metric_exists() -> None:
    assert set(METRICS) <= {declaration.name for declaration in DECLARATIONS.values()}
