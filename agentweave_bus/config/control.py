"""The file of ``agentweave control``: the control role at brokers of one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, model_validator

from agentweave_bus.config.cautions import identity_cautions
from agentweave_bus.config.document import KeyPath
from agentweave_bus.config.fields import (
    ConfigModel,
    Environment,
    FilePath,
    Seconds,
    SpiffeIdText,
    TrustDomain,
    environment_of,
)
from agentweave_bus.config.loading import IDENTITY_FILES, default_socket, validated
from agentweave_bus.config.operation import DEFAULT_SERVERS, ObservabilityConfig, bus_url
from agentweave_bus.config.security import IdentityConfig
from agentweave_bus.config.sources import Settings, choose_environment
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["ControlBus", "ControlConfig", "StreamsConfig", "load_control"]

_FILE_KEYS: Final[tuple[KeyPath, ...]] = (("grants",), *IDENTITY_FILES)


_MIB: Final = 1024 * 1024
_DAY: Final = 86_400


class ControlBus(ConfigModel):
    """How the brokers are reached; times are seconds."""

    servers: Annotated[tuple[Annotated[str, AfterValidator(bus_url)], ...], Field(min_length=1)] = (
        DEFAULT_SERVERS
    )
    server_spiffe_id: SpiffeIdText | None = None
    connect_timeout: Seconds = 5.0
    reconnect_wait: Seconds = 0.5


class StreamsConfig(ConfigModel):
    """How much is kept for each agent, how often and for how long; ``record_age`` is in seconds."""

    replicas: Literal[1, 3, 5] = 1
    queue_tasks: Annotated[int, Field(strict=True, ge=1, le=10**9)] = 2_000_000
    queue_bytes: Annotated[int, Field(strict=True, ge=16 * _MIB, le=2**50)] = 4096 * _MIB
    record_age: Annotated[int, Field(strict=True, ge=32 * _DAY, le=366 * _DAY)] = 32 * _DAY
    dead_bytes: Annotated[int, Field(strict=True, ge=16 * _MIB, le=2**50)] = 1024 * _MIB
    event_bytes: Annotated[int, Field(strict=True, ge=16 * _MIB, le=2**50)] = 1024 * _MIB


class ControlConfig(ConfigModel):
    """What the control role of a trust domain goes by.

    ``grants`` is a grants file or a directory of policies. ``identities`` are those who have a user at the
    broker besides whoever the grants name exactly.
    """

    trust_domain: TrustDomain
    grants: FilePath
    identities: tuple[SpiffeIdText, ...] = ()
    state_dir: FilePath = Path(".agentweave")
    identity: IdentityConfig = IdentityConfig()
    bus: ControlBus = ControlBus()
    streams: StreamsConfig = StreamsConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    _environment: Environment = PrivateAttr(default="production")

    @property
    def broker(self) -> SpiffeID:
        """The SPIFFE ID that the broker must show."""
        named = self.bus.server_spiffe_id
        return SpiffeID.of(self.trust_domain, "agentweave", "broker") if named is None else named

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed here but should be known: one sentence each, for the log."""
        return tuple(identity_cautions(self.identity))

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Fill in what follows from the trust domain and the state directory, where it is not given."""
        if not isinstance(data, Mapping) or not isinstance(data.get("identity", {}), Mapping):
            return data
        identity = dict(data.get("identity", {}))
        if isinstance(data.get("trust_domain"), str) and not identity.get("allowed_trust_domains"):
            identity["allowed_trust_domains"] = [data["trust_domain"]]
        if isinstance(folder := data.get("state_dir"), str) and "authority_history" not in identity:
            identity["authority_history"] = str(Path(folder) / "authorities")
        return {**data, "identity": identity}

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        self._environment = environment_of(info)
        allowed = self.identity.allowed_trust_domains
        if self.trust_domain not in allowed:
            raise ValueError(f"identity.allowed_trust_domains must list {self.trust_domain!r}, too")
        for one in (self.broker, *self.identities):
            if one.trust_domain not in allowed:
                raise ValueError(
                    f"{one} is of a trust domain that identity.allowed_trust_domains does not list"
                )
        return self


def load_control(path: str | Path, *, environment: str | None = None) -> ControlConfig:
    """Return the checked configuration of a control role.

    Names of files are relative to the file, ``state_dir`` and ``identity.authority_history`` to the working
    directory. Variables ``AGENTWEAVE_<SECTION>__<KEY>`` beat the file.

    Raises:
        ConfigurationError: with every problem found.

    """
    variables = dict(os.environ)
    chosen = choose_environment(environment, variables)
    settings = Settings()
    settings.read_file(Path(path), _FILE_KEYS)
    settings.read_variables(variables)
    default_socket(settings, variables)
    return validated(ControlConfig, settings, chosen)
