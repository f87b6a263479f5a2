"""The sections that decide who is trusted: ``identity``, ``authorization`` and ``transport``.

Every setting that weakens a promise is refused here in production, naming the line to change, and
reported as a warning in development (see :mod:`agentweave_bus.config.cautions`).
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from agentweave_bus.config.fields import (
    ConfigModel,
    Count,
    FilePath,
    Flag,
    Seconds,
    SpiffeIdText,
    TrustDomain,
    environment_of,
)

__all__ = [
    "AuditConfig",
    "AuthorizationConfig",
    "CircuitBreakerConfig",
    "IdentityConfig",
    "StaticIdentityConfig",
    "TransportConfig",
    "in_url",
    "is_loopback",
    "is_loopback_url",
]

DEFAULT_SPIFFE_ENDPOINT: Final = "unix:///run/spire/sockets/agent.sock"
DEFAULT_OPA_ENDPOINT: Final = "http://127.0.0.1:8181"

DEFAULT_AUTHORITY_HISTORY: Final = Path(".agentweave/authorities")

DEFAULT_REDACTION: Final = ("password", "new_password", "secret", "token", "api_key")

_POLICY_PATH: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*([/.][A-Za-z_][A-Za-z0-9_]*)*")
_FIELD_PATH: Final = re.compile(r"[^.\s]+(\.[^.\s]+)*")


def in_url(host: str) -> str:
    """Return an address or name as it stands in a URL: that of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Say whether an address or name is this machine's own, and nobody else's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_loopback_url(url: str) -> bool:
    """Tell whether ``url`` names this machine's loopback interface."""
    return is_loopback(urlsplit(url).hostname or "")


def _spiffe_endpoint(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return text
    raise ValueError(f"{text!r} must be unix:///path/to/socket: over TCP nothing shows who asks for an SVID")


def _opa_endpoint(text: str) -> str:
    parts = urlsplit(text)
    if parts.username or parts.query or parts.fragment:
        raise ValueError("an OPA endpoint has no credentials, query or fragment")
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return text
    if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0:
        return text.rstrip("/")
    raise ValueError(f"{text!r} must be unix:///path/to/socket, https://host:port or http://127.0.0.1:port")


def _field_path(text: str) -> str:
    if not _FIELD_PATH.fullmatch(text):
        raise ValueError(f"{text!r} must be a dotted path, such as payload.card_number")
    return text


OpaEndpoint = Annotated[str, AfterValidator(_opa_endpoint)]
FieldPath = Annotated[str, AfterValidator(_field_path)]


class StaticIdentityConfig(ConfigModel):
    """Files of a fixed identity (development only); PEM, one bundle file per trust domain."""

    cert_file: FilePath
    key_file: FilePath
    bundles: dict[TrustDomain, FilePath] = Field(min_length=1)


class IdentityConfig(ConfigModel):
    """Where the SVID comes from, and whose bundles are accepted."""

    provider: Literal["spiffe", "static"] = "spiffe"
    spiffe_endpoint: Annotated[str, AfterValidator(_spiffe_endpoint)] = DEFAULT_SPIFFE_ENDPOINT
    allowed_trust_domains: tuple[TrustDomain, ...] = ()
    revocations: FilePath | None = None
    authority_history: FilePath | None = DEFAULT_AUTHORITY_HISTORY
    static: StaticIdentityConfig | None = None

    @field_validator("provider")
    @classmethod
    def _static_in_development(cls, value: str, info: ValidationInfo) -> str:
        if value == "static" and environment_of(info) == "production":
            raise ValueError(
                "Security violation: 'static' identity not allowed in production environment;"
                " set identity.provider to 'spiffe'"
            )
        return value

    @model_validator(mode="after")
    def _static_files_named(self) -> IdentityConfig:
        if self.provider == "static" and self.static is None:
            raise ValueError("provider 'static' needs identity.static with cert_file, key_file and bundles")
        if self.provider != "static" and self.static is not None:
            raise ValueError("identity.static is read by provider 'static' only; remove it")
        return self


class CircuitBreakerConfig(ConfigModel):
    """When to stop asking: failures that open it, successes that close it, seconds until a probe."""

    failure_threshold: Count = 5
    success_threshold: Count = 2
    timeout: Seconds = 30.0


class AuditConfig(ConfigModel):
    """The audit log of decisions; ``max_file_bytes`` starts a new file that continues the chain."""

    enabled: Flag = True
    destination: str | None = None
    log_federated: Flag = True
    redact: tuple[FieldPath, ...] = DEFAULT_REDACTION
    keep_frames: Flag = True
    max_file_bytes: Annotated[int, Field(strict=True, ge=65_536, le=2**40)] = 64 * 1024 * 1024

    @field_validator("enabled")
    @classmethod
    def _off_in_development(cls, value: bool, info: ValidationInfo) -> bool:
        if not value and environment_of(info) == "production":
            raise ValueError(
                "Security violation: disabled audit not allowed in production environment;"
                " set authorization.audit.enabled to true"
            )
        return value

    @field_validator("destination")
    @classmethod
    def _file_destination(cls, value: str | None) -> str | None:
        if value is None or "://" not in value:
            return value
        parts = urlsplit(value)
        if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
            raise ValueError(f"{value!r} must be a path or file:///absolute/path")
        return value

    @property
    def path(self) -> Path:
        """The log file. Only to be asked of a loaded configuration, where ``destination`` is filled in."""
        assert self.destination is not None, "AgentConfig fills the destination in"
        return Path(self.destination.removeprefix("file://"))


class AuthorizationConfig(ConfigModel):
    """Which policy decides, where it is evaluated, and what happens when it can't be."""

    provider: Literal["embedded", "opa"] = "embedded"
    opa_endpoint: OpaEndpoint | None = None
    opa_endpoints: tuple[OpaEndpoint, ...] = ()
    opa_spiffe_id: SpiffeIdText | None = None
    opa_revisions: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    failover_strategy: Literal["priority", "round_robin"] = "priority"
    policy_path: str = "agentweave/grants"
    bundle: FilePath | None = None
    default_action: Literal["deny", "log-only", "allow"] = "deny"
    timeout_ms: Annotated[int, Field(strict=True, ge=1, le=60_000)] = 50
    circuit_breaker: CircuitBreakerConfig = CircuitBreakerConfig()
    audit: AuditConfig = AuditConfig()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Every OPA endpoint in the order written; loopback's port 8181 when none was."""
        if self.opa_endpoints:
            return self.opa_endpoints
        return (self.opa_endpoint or DEFAULT_OPA_ENDPOINT,)

    @property
    def policy_package(self) -> str:
        """``policy_path`` as a package, ``/`` between its parts and without a final ``/allow``."""
        return self.policy_path.replace(".", "/").removesuffix("/allow")

    @field_validator("default_action")
    @classmethod
    def _deny_in_production(cls, value: str, info: ValidationInfo) -> str:
        if value != "deny" and environment_of(info) == "production":
            raise ValueError(
                f"Security violation: '{value}' mode not allowed in production environment;"
                " change it to default_action: deny"
            )
        return value

    @field_validator("policy_path")
    @classmethod
    def _policy_path_parts(cls, value: str) -> str:
        if not _POLICY_PATH.fullmatch(value):
            raise ValueError(f"{value!r} must be a package path, such as agentweave/grants")
        return value

    @field_validator("opa_endpoint")
    @classmethod
    def _endpoint_protected(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("provider", "opa") == "opa":
            _refuse_plain_http(value, info)
        return value

    @field_validator("opa_endpoints")
    @classmethod
    def _endpoints_protected(cls, values: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for value in values if info.data.get("provider", "opa") == "opa" else ():
            _refuse_plain_http(value, info)
        return values

    @model_validator(mode="after")
    def _endpoints_consistent(self, info: ValidationInfo) -> AuthorizationConfig:
        if self.opa_endpoint and self.opa_endpoints:
            raise ValueError("give either opa_endpoint or opa_endpoints, not both")
        if self.provider != "opa":
            return self
        for endpoint in self.endpoints:
            _refuse_plain_http(endpoint, info)
            if endpoint.startswith("https:") and self.opa_spiffe_id is None:
                raise ValueError(
                    f"{endpoint} needs opa_spiffe_id: the SPIFFE ID that OPA's certificate must name"
                )
        return self


def _refuse_plain_http(endpoint: str, info: ValidationInfo) -> None:
    if endpoint.startswith("http:") and environment_of(info) == "production":
        raise ValueError(
            f"Security violation: {endpoint} not allowed in production environment:"
            " whoever can answer in OPA's place decides; use unix:///path/to/socket or https://"
        )


class TransportConfig(ConfigModel):
    """What TLS must be. The bus uses TLS 1.3 whatever is written here."""

    tls_min_version: Literal["1.2", "1.3"] = "1.3"
    peer_verification: Literal["strict"] = "strict"

    @field_validator("tls_min_version", mode="before")
    @classmethod
    def _version_as_text(cls, value: Any) -> Any:
        # YAML reads an unquoted 1.3 as a number.
        return str(value) if isinstance(value, float) else value

    @field_validator("tls_min_version")
    @classmethod
    def _tls_13_in_production(cls, value: str, info: ValidationInfo) -> str:
        if value == "1.2" and environment_of(info) == "production":
            raise ValueError(
                "Security violation: TLS 1.2 not allowed in production environment;"
                ' set transport.tls_min_version to "1.3"'
            )
        return value

    @field_validator("peer_verification", mode="before")
    @classmethod
    def _always_verified(cls, value: Any) -> Any:
        if value is None or value is False or value == "none":
            raise ValueError(
                "Security violation: peer_verification 'none' is never allowed;"
                " peers are always verified, set it to 'strict'"
            )
        return value
