"""Policies as tests name them, put in front of the real engine and the real authorizer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agentweave_bus.authz import Authorizer, Grants
from agentweave_bus.authz.authorizer import DEFAULT_POLICY_PATH
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.authz.wasm import EmbeddedEngine

__all__ = ["LoadedPolicy", "PolicySource", "load_policy_source"]

PolicySource = Grants | Mapping[str, Any] | Path | str
"""Grants, as an object or as the content of their file, or the path of a grants file or policy directory."""


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy that can be asked. ``package`` is what an agent's ``policy_path`` names."""

    engine: EmbeddedEngine
    grants: Grants | None
    package: str = DEFAULT_POLICY_PATH

    def authorizer(self) -> Authorizer:
        """Return a new authorizer over it: nothing is remembered, and no limit is used up."""
        return Authorizer(self.engine, policy_path=self.package, grants=self.grants)


def load_policy_source(source: PolicySource, package: str | None = None) -> LoadedPolicy:
    """Load a policy. Blocks: Rego of your own is compiled.

    Raises:
        ConfigurationError: the grants are wrong.
        PolicyLoadError: the policy can't be loaded.

    """
    package = package or DEFAULT_POLICY_PATH
    if isinstance(source, Path | str):
        path = Path(source)
        file = grants_file(path)
        grants = None if file is None else Grants.load(file)
        return LoadedPolicy(EmbeddedEngine.from_directory(path), grants, package)
    checked = source if isinstance(source, Grants) else Grants.model_validate(source)
    with tempfile.TemporaryDirectory(prefix="agentweave-test-") as folder:
        file = Path(folder) / "grants.yaml"
        file.write_text(yaml.safe_dump(checked.model_dump(mode="json", exclude_none=True)))
        return LoadedPolicy(EmbeddedEngine.from_directory(file), checked, package)
