"""What a configuration allows that should be known: sentences for the log, computed, never stored."""

from __future__ import annotations

from collections.abc import Iterator

from agentweave_bus.config.operation import ServerConfig, TracingConfig
from agentweave_bus.config.security import (
    AuthorizationConfig,
    IdentityConfig,
    TransportConfig,
    is_loopback_url,
)

__all__ = [
    "authorization_cautions",
    "identity_cautions",
    "server_cautions",
    "tracing_cautions",
    "transport_cautions",
]


def identity_cautions(identity: IdentityConfig) -> Iterator[str]:
    """Yield what should be known about ``identity``."""
    if identity.provider == "static":
        yield "identity.provider is 'static': keys lie in files and never rotate; development only."


def authorization_cautions(authorization: AuthorizationConfig) -> Iterator[str]:
    """Yield what should be known about ``authorization``."""
    if authorization.default_action != "deny":
        yield (
            f"authorization.default_action is {authorization.default_action!r}:"
            " calls run although no policy allows them; development only."
        )
    if not authorization.audit.enabled:
        yield "authorization.audit.enabled is false: no decision is recorded; development only."
    if authorization.provider == "opa":
        for endpoint in authorization.endpoints:
            if endpoint.startswith("http:") and not is_loopback_url(endpoint):
                yield (
                    f"authorization: {endpoint} is plain HTTP to another machine:"
                    " whoever can answer in OPA's place decides; development only."
                )


def transport_cautions(transport: TransportConfig) -> Iterator[str]:
    """Yield what should be known about ``transport``."""
    if transport.tls_min_version == "1.2":
        yield "transport.tls_min_version is 1.2: the bus uses TLS 1.3 all the same; development only."


def server_cautions(server: ServerConfig | None) -> Iterator[str]:
    """Yield what should be known about ``server``."""
    if server is not None:
        yield (
            f"server: nothing listens on {server.host}:{server.port}, because this version has no"
            " A2A adapter yet; the agent is reached over the bus."
        )


def tracing_cautions(tracing: TracingConfig) -> Iterator[str]:
    """Yield what should be known about ``observability.tracing``."""
    if tracing.otlp_endpoint is not None and not tracing.enabled:
        yield "observability.tracing.otlp_endpoint is set but tracing.enabled is false: nothing is exported."
