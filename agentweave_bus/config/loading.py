"""Load an agent's configuration: one call that reads, merges, checks and explains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from agentweave_bus.config.agent import AgentConfig
from agentweave_bus.config.document import KeyPath
from agentweave_bus.config.fields import Environment
from agentweave_bus.config.problems import to_configuration_error
from agentweave_bus.config.sources import Settings, choose_environment, choose_path
from agentweave_bus.exceptions import ConfigurationError

__all__ = ["IDENTITY_FILES", "default_socket", "load_config", "validated"]

_M = TypeVar("_M", bound=BaseModel)

# Files that an agent reads travel with its configuration; what it writes stays where it runs.
IDENTITY_FILES: Final[tuple[KeyPath, ...]] = (
    ("identity", "revocations"),
    ("identity", "static", "cert_file"),
    ("identity", "static", "key_file"),
    ("identity", "static", "bundles", "*"),
)
_FILE_KEYS: Final[tuple[KeyPath, ...]] = (*IDENTITY_FILES, ("authorization", "bundle"))


def load_config(
    path: str | Path | None = None,
    *,
    environment: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> AgentConfig:
    """Return the checked configuration of an agent or client.

    ``path`` beats ``AGENTWEAVE_CONFIG``; ``environment`` beats ``AGENTWEAVE_ENV``; without either the
    environment is production. ``overrides`` (nested, or with dotted names at the top) beat the
    variables ``AGENTWEAVE_<SECTION>__<KEY>``, which beat the file. File names in the file are
    relative to it, except of what an agent writes: ``authorization.audit.destination`` and
    ``identity.authority_history`` are relative to the working directory.

    Raises:
        ConfigurationError: with every problem found; ``key`` is the first one's dotted key.

    """
    variables = dict(os.environ)
    chosen = choose_environment(environment, variables)
    settings = Settings()
    file = choose_path(path, variables)
    if file is not None:
        settings.read_file(file, _FILE_KEYS)
    settings.read_variables(variables)
    settings.read_overrides(overrides or {})
    if file is None and not settings.tree:
        raise ConfigurationError("No configuration.", hint="Name a file, or set AGENTWEAVE_CONFIG.")
    default_socket(settings, variables)
    return validated(AgentConfig, settings, chosen)


def validated(model: type[_M], settings: Settings, environment: Environment) -> _M:
    """Check ``settings`` against ``model``.

    Raises:
        ConfigurationError: with every problem found.

    """
    try:
        return model.model_validate(settings.tree, context={"environment": environment})
    except ValidationError as error:
        raise to_configuration_error(error, model, settings.origins) from error


def default_socket(settings: Settings, variables: Mapping[str, str]) -> None:
    """Honour the variable of the SPIFFE Workload Endpoint specification (section 4)."""
    socket = variables.get("SPIFFE_ENDPOINT_SOCKET")
    identity = settings.tree.get("identity")
    if not socket or (isinstance(identity, dict) and identity.get("spiffe_endpoint")):
        return
    if identity is None or isinstance(identity, dict):
        settings.put(("identity", "spiffe_endpoint"), socket, "SPIFFE_ENDPOINT_SOCKET")
