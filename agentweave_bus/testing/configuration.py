"""Configurations of whoever takes part in a test: the given one, with its places replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["agent_config", "named_after"]

_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")

Settings = Callable[[SpiffeID], Mapping[str, Any]]


def named_after(kind: type) -> str:
    """Return the name of an agent after its class: ``OrderDeskAgent`` is ``order-desk``."""
    words = _WORD.findall(kind.__name__)
    if len(words) > 1 and words[-1] == "Agent":
        words.pop()
    return "-".join(word.lower() for word in words)


def agent_config(
    given: AgentConfig | Path | str | None, identity: SpiffeID | None, settings: Settings
) -> AgentConfig:
    """Return a configuration with ``settings`` (dotted names) in place of its own.

    ``given`` is one, or a file; without it the configuration is that of ``identity`` and nothing else.

    Raises:
        ConfigurationError: the file is wrong.

    """
    if isinstance(given, AgentConfig):
        return _replaced(given, settings(given.agent.spiffe_id))
    if given is not None:
        loaded = load_config(given, environment="production")
        return _replaced(loaded, settings(loaded.agent.spiffe_id))
    assert identity is not None
    name = identity.path.rpartition("/")[2].lower()
    section = {"name": name, "trust_domain": identity.trust_domain, "path": identity.path[1:]}
    return _replaced(AgentConfig.model_validate({"agent": section}), settings(identity))


def _replaced(config: AgentConfig, settings: Mapping[str, Any]) -> AgentConfig:
    tree = config.model_dump(by_alias=True, exclude_none=True)
    for dotted, value in settings.items():
        *sections, key = dotted.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return AgentConfig.model_validate(tree, context={"environment": config.environment})
