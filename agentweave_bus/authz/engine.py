"""What a policy engine is: one question, one answer, whoever evaluates it.

Two engines keep this protocol, with OPA's evaluator in two packagings: ``wasm.EmbeddedEngine`` (in
process) and ``opa.OpaServerEngine`` (REST). An engine never decides what its answer means: the
authorizer does, and everything but a clear yes is a no.

A policy package may define three rules:

``decision``
    ``{allow, reason, limits, require_approval}``. Where it is defined, it is the answer.
``allow``
    a boolean; the answer where ``decision`` is undefined.
``standing``
    ``{allow, cache_seconds, ...}``: an answer for every payload, asked with a reduced input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from agentweave_bus.exceptions import PolicyError, PolicyUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ANSWER_RULES",
    "MAX_CACHE_SECONDS",
    "PolicyAnswer",
    "PolicyEngine",
    "Standing",
    "package_of",
    "read_standing",
]

MAX_CACHE_SECONDS: Final = 60.0
"""A standing answer is never used for longer, whatever the policy says (seconds)."""

ANSWER_RULES: Final = ("decision", "allow")
"""The rules that answer, in the order in which they are asked."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A standing answer that allows, as the policy gave it.

    Attributes:
        cache_seconds: how long it may be used again, above 0 and at most ``MAX_CACHE_SECONDS``.
        reason: one sentence for people; may be empty.
        limits: what has to be counted at every use.

    """

    cache_seconds: float
    reason: str
    limits: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PolicyAnswer:
    """What the policy said.

    Attributes:
        defined: the package had an answer; if not, ``rule`` and ``result`` are None: deny.
        rule: which rule answered.
        result: its value, any JSON value: whoever reads it checks its type.
        revision: of the policy that answered.

    """

    defined: bool
    rule: Literal["decision", "allow"] | None
    result: Any
    revision: str


class PolicyEngine(Protocol):
    """Evaluates policy packages. Every method may be called from any thread."""

    @property
    def revision(self) -> str:
        """Names the policy and data in use now; changes whenever either does."""
        ...

    def has_standing(self, package: str) -> bool:
        """Whether it is worth asking ``package`` for a standing answer."""
        ...

    async def evaluate(self, package: str, input_json: bytes) -> PolicyAnswer:
        """Ask ``package`` (such as ``order/authz`` or ``order/authz/allow``) about ``input_json``.

        Raises:
            PayloadError: the input is not strict JSON within bounds (see ``policy_input``).
            PolicyUnavailableError: there is no trustworthy answer. Always a denial.

        """
        ...

    async def evaluate_standing(self, package: str, input_json: bytes) -> Standing | None:
        """Ask for a standing answer over an input without payload, task and time.

        Returns None where the package has none, does not allow, or gave no proper answer.

        Raises:
            PayloadError: the input holds more than a standing answer may depend on.
            PolicyUnavailableError: there is no trustworthy answer.

        """
        ...

    async def aclose(self) -> None:
        """Give back connections and instances. Harmless when called twice."""
        ...


def package_of(policy_path: str) -> str:
    """Return the package that ``policy_path`` names, without a trailing rule.

    ``order/authz``, ``order/authz/allow`` and ``order.authz`` all name ``order/authz``.

    Raises:
        PolicyError: it names no package.

    """
    parts = policy_path.strip("/").replace(".", "/").split("/")
    if parts[-1] in ANSWER_RULES and len(parts) > 1:
        parts = parts[:-1]
    if not all(part.isascii() and part.replace("-", "_").isidentifier() for part in parts):
        raise PolicyError(f"{policy_path!r} names no policy package; write it like 'order/authz'")
    return "/".join(parts)


def read_standing(value: Any) -> Standing | None:
    """Read the value of a ``standing`` rule; anything that does not clearly allow is None."""
    if not isinstance(value, dict) or value.get("allow") is not True:
        return None
    seconds = value.get("cache_seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        return None
    limits, reason = value.get("limits", {}), value.get("reason", "")
    if not isinstance(limits, dict) or not isinstance(reason, str):
        return None
    return Standing(cache_seconds=min(float(seconds), MAX_CACHE_SECONDS), reason=reason, limits=limits)


def unavailable(why: str) -> PolicyUnavailableError:
    """Return the error of an engine that has no trustworthy answer, with its cause in words."""
    return PolicyUnavailableError(f"the policy gave no answer: {why}")
