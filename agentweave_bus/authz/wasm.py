"""The embedded engine: OPA's own compiler output, evaluated in this process.

``EmbeddedEngine.load(source)`` reads a directory (or one grants file), swaps policy and data in as one,
and keeps what it had if anything is wrong with the new ones. A decision is one call of about a tenth of
a millisecond, so it is made in the caller's thread; each thread has a sandbox of its own, which is thrown
away after any failure. Whatever fails inside is a :class:`PolicyUnavailableError`, which means deny.

Compiling Rego is ``policy_source``'s work, the sandbox ``wasm_module``'s.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

from agentweave_bus.authz.engine import (
    ANSWER_RULES,
    PolicyAnswer,
    Standing,
    package_of,
    read_standing,
    unavailable,
)
from agentweave_bus.authz.host_builtins import UNDEFINED, HostBuiltins
from agentweave_bus.authz.policy_data import read_data
from agentweave_bus.authz.policy_input import PolicyInput, check_standing_input, parse_strict
from agentweave_bus.authz.policy_source import default_cache, load_policy
from agentweave_bus.authz.wasm_module import ModuleLimits, PolicyInstance, PolicyModule
from agentweave_bus.exceptions import PolicyUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["EmbeddedEngine"]

_REVISION_CHARACTERS: Final = 32


@dataclass(frozen=True, slots=True)
class _Policy:
    """Everything that is swapped at once."""

    module: PolicyModule
    data: bytes
    revision: str
    standing: frozenset[str]


class _Sandboxes(threading.local):
    """The calling thread's sandbox, and the policy that it was made of."""

    policy: _Policy | None = None
    instance: PolicyInstance | None = None


_MODULES: Final[WeakValueDictionary[tuple[bytes, ModuleLimits], PolicyModule]] = WeakValueDictionary()
"""Modules in use by some engine of this process. Compiling one takes a tenth of a second."""


class EmbeddedEngine:
    """Evaluates policies in process; see ``engine.PolicyEngine``.

    Until :meth:`load` has succeeded once, every question raises ``PolicyUnavailableError``.

    Args:
        limits: bounds of a sandbox.
        cache: where modules compiled from a user's Rego are kept.
        now_ns: the clock that policies see (nanoseconds since the epoch).

    """

    def __init__(
        self,
        *,
        limits: ModuleLimits | None = None,
        cache: Path | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._limits = limits or ModuleLimits()
        self._cache = cache or default_cache()
        self._now_ns = now_ns
        self._policy: _Policy | None = None
        self._sandboxes = _Sandboxes()

    @classmethod
    def from_directory(cls, source: Path | None, **options: Any) -> EmbeddedEngine:
        """Return an engine that has loaded ``source``; options as for the class. Raises as :meth:`load`."""
        engine = cls(**options)
        engine.load(source)
        return engine

    # --- loading -----------------------------------------------------------------------------------

    def load(self, source: Path | None) -> str:
        """Take policy and data from ``source``, both or neither, and return the revision.

        ``source`` is a directory (Rego or ``policy.wasm``, ``grants.yaml``, ``data.yaml``, each optional),
        one grants file, or None for the shipped policies without any grant. Blocks: it reads files and
        may run a compiler.

        Raises:
            PolicyLoadError: something is wrong with it. What was loaded before stays in use.

        """
        self._policy = policy = self._read(source)
        return policy.revision

    def _read(self, source: Path | None) -> _Policy:
        compiled = load_policy(source, self._cache)
        data = read_data(source)
        module = self._module(compiled.wasm)
        standing = _standing_packages(module) if compiled.standing_checked else frozenset()
        policy = _Policy(module, data, _revision(compiled.wasm, data), standing)
        self._new_instance(policy)  # proves that the data fits before anyone depends on it
        return policy

    def _module(self, wasm: bytes) -> PolicyModule:
        loaded = self._policy
        digest = hashlib.sha256(wasm).digest()
        if loaded is not None and loaded.module.digest == digest:
            return loaded.module
        known = _MODULES.get((digest, self._limits))
        if known is None:
            known = _MODULES[digest, self._limits] = PolicyModule(wasm, self._limits)
        return known

    # --- asking ------------------------------------------------------------------------------------

    @property
    def revision(self) -> str:
        """Digest of policy and data in use; empty before the first load."""
        return "" if self._policy is None else self._policy.revision

    @property
    def packages(self) -> frozenset[str]:
        """The packages that can be asked."""
        entrypoints = () if self._policy is None else self._policy.module.entrypoints
        return frozenset(path.rpartition("/")[0] for path in entrypoints)

    def has_standing(self, package: str) -> bool:
        """Whether ``package`` has a standing rule that may be asked."""
        return self._policy is not None and package_of(package) in self._policy.standing

    async def evaluate(self, package: str, input_json: bytes) -> PolicyAnswer:
        """Ask ``package``; see ``engine.PolicyEngine``."""
        return self.evaluate_now(package, input_json)

    def evaluate_now(self, package: str, input_json: bytes) -> PolicyAnswer:
        """Ask ``package`` without an event loop; same answers, same errors."""
        policy = self._loaded()
        question = PolicyInput(input_json)
        name = package_of(package)
        self._check_known(policy, name)
        for rule in ANSWER_RULES:
            value = self._ask(policy, f"{name}/{rule}", question)
            if value is not UNDEFINED:
                return PolicyAnswer(True, rule, value, policy.revision)
        return PolicyAnswer(False, None, None, policy.revision)

    async def evaluate_standing(self, package: str, input_json: bytes) -> Standing | None:
        """Ask for a standing answer; see ``engine.PolicyEngine``."""
        policy = self._loaded()
        name = package_of(package)
        if name not in policy.standing:
            return None
        question = PolicyInput(input_json)
        check_standing_input(parse_strict(question))
        return read_standing(self._ask(policy, f"{name}/standing", question, clock_allowed=False))

    async def aclose(self) -> None:
        """Forget the policy. Sandboxes go when their threads do, or at once in this one."""
        self._policy = None
        self._sandboxes.policy = self._sandboxes.instance = None

    # --- sandboxes -----------------------------------------------------------------------------------

    def _loaded(self) -> _Policy:
        if self._policy is None:
            raise unavailable("none is loaded")
        return self._policy

    def _check_known(self, policy: _Policy, package: str) -> None:
        if not any(f"{package}/{rule}" in policy.module.entrypoints for rule in ANSWER_RULES):
            known = ", ".join(sorted(self.packages))
            raise unavailable(f"there is no package {package} with allow or decision (there are: {known})")

    def _ask(self, policy: _Policy, path: str, question: PolicyInput, *, clock_allowed: bool = True) -> Any:
        entrypoint = policy.module.entrypoints.get(path)
        if entrypoint is None:
            return UNDEFINED
        instance = self._instance(policy)
        try:
            return instance.evaluate(entrypoint, question, clock_allowed=clock_allowed)
        except PolicyUnavailableError:
            self._sandboxes.instance = None
            raise

    def _instance(self, policy: _Policy) -> PolicyInstance:
        mine = self._sandboxes
        if mine.instance is None or mine.policy is not policy:
            mine.instance, mine.policy = self._new_instance(policy), policy
        return mine.instance

    def _new_instance(self, policy: _Policy) -> PolicyInstance:
        return PolicyInstance(policy.module, policy.data, HostBuiltins(self._now_ns))


def _standing_packages(module: PolicyModule) -> frozenset[str]:
    return frozenset(
        path.removesuffix("/standing") for path in module.entrypoints if path.endswith("/standing")
    )


def _revision(wasm: bytes, data: bytes) -> str:
    both = hashlib.sha256(wasm).digest() + hashlib.sha256(data).digest()
    return hashlib.sha256(both).hexdigest()[:_REVISION_CHARACTERS]
