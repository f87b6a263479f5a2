"""The configuration of one agent: every section together, and the rules that span sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from agentweave_bus.config.cautions import (
    authorization_cautions,
    identity_cautions,
    server_cautions,
    tracing_cautions,
    transport_cautions,
)
from agentweave_bus.config.fields import (
    CapabilityName,
    ConfigModel,
    Environment,
    HandlerPath,
    Name,
    TrustDomain,
    environment_of,
    is_name,
)
from agentweave_bus.config.operation import BusConfig, ObservabilityConfig, ServerConfig
from agentweave_bus.config.security import AuthorizationConfig, IdentityConfig, TransportConfig
from agentweave_bus.spiffe_id import SpiffeID, check_trust_domain

__all__ = ["AgentConfig", "AgentSection", "CapabilityConfig"]


class CapabilityConfig(ConfigModel):
    """One capability as the agent's card describes it; modes are media types."""

    name: CapabilityName
    description: str = ""
    input_modes: tuple[str, ...] = ("application/json",)
    output_modes: tuple[str, ...] = ("application/json",)


class AgentSection(ConfigModel):
    """Who the agent is. ``capabilities`` is None when the file lists none, so nothing is compared."""

    name: Name
    trust_domain: TrustDomain
    description: str = ""
    class_: Annotated[HandlerPath | None, Field(alias="class")] = None
    path: str = ""
    capabilities: tuple[CapabilityConfig, ...] | None = None

    @property
    def spiffe_id(self) -> SpiffeID:
        """The identity that the SVID must have."""
        return SpiffeID.of(self.trust_domain, *self.path.split("/"))

    @field_validator("path")
    @classmethod
    def _valid_path(cls, value: str) -> str:
        SpiffeID.of("any.domain", *value.split("/"))
        return value

    @field_validator("capabilities")
    @classmethod
    def _unique(cls, value: tuple[CapabilityConfig, ...] | None) -> tuple[CapabilityConfig, ...] | None:
        names = [capability.name for capability in value or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"listed twice: {', '.join(sorted(twice))}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_path(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "path" not in data and is_name(data.get("name")):
            return {**data, "path": f"agent/{data['name']}"}
        return data

    @model_validator(mode="after")
    def _not_too_long(self) -> Self:
        SpiffeID.of(self.trust_domain, *self.path.split("/"))
        return self


class AgentConfig(ConfigModel):
    """Everything an agent or client is configured with; made by :func:`load_config`.

    Built directly, it is validated for production; :func:`load_config` is told the environment.
    """

    agent: AgentSection
    identity: IdentityConfig = IdentityConfig()
    authorization: AuthorizationConfig = AuthorizationConfig()
    transport: TransportConfig = TransportConfig()
    server: ServerConfig | None = None
    bus: BusConfig = BusConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    _environment: Environment = PrivateAttr(default="production")

    @property
    def environment(self) -> Environment:
        """``production`` or ``development``: what this configuration was validated for."""
        return self._environment

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed here but should be known: one sentence each, for the log."""
        return (
            *identity_cautions(self.identity),
            *authorization_cautions(self.authorization),
            *transport_cautions(self.transport),
            *server_cautions(self.server),
            *tracing_cautions(self.observability.tracing),
        )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return fill_defaults(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        self._environment = environment_of(info)
        allowed = self.identity.allowed_trust_domains
        if self.agent.trust_domain not in allowed:
            raise ValueError(
                f"identity.allowed_trust_domains must list the agent's own {self.agent.trust_domain!r}, too"
            )
        server = self.bus.server_spiffe_id
        if server is not None and server.trust_domain not in allowed:
            raise ValueError(
                f"bus.server_spiffe_id is in {server.trust_domain!r},"
                " which identity.allowed_trust_domains does not list"
            )
        return self


def fill_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the settings whose default follows from the agent's name and trust domain.

    Done before validation and only from a valid name and domain, so that a mistake there is
    reported once, at its own key.
    """
    filled = dict(data)
    agent = _as_mapping(filled.get("agent"))
    domain, name = agent.get("trust_domain"), agent.get("name")
    if _is_trust_domain(domain):
        _fill(filled, ("identity", "allowed_trust_domains"), [domain])
        _fill(filled, ("bus", "server_spiffe_id"), f"spiffe://{domain}/agentweave/broker")
    if is_name(name):
        _fill(filled, ("authorization", "audit", "destination"), f".agentweave/audit/{name}.jsonl")
    return filled


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, ConfigModel):
        return value.model_dump(by_alias=True, exclude_unset=True)
    return value if isinstance(value, Mapping) else {}


def _is_trust_domain(value: Any) -> bool:
    try:
        return isinstance(value, str) and check_trust_domain(value) == value
    except ValueError:
        return False


def _fill(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set ``path`` where it is not given; leave what is no mapping for validation to refuse."""
    *sections, key = path
    for section in sections:
        child = tree.get(section, {})
        if isinstance(child, ConfigModel):
            child = _as_mapping(child)
        if not isinstance(child, Mapping):
            return
        tree[section] = dict(child)
        tree = tree[section]
    if tree.get(key) is None:
        tree[key] = value
