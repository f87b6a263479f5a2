"""Which callers a capability is open to, stated beside its code.

A peer rule is asked before the policy and can only narrow what the policy allows. It looks at the
verified caller, never at whom the caller acts for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from agentweave_bus.exceptions import ConfigurationError, InvalidSpiffeIdError
from agentweave_bus.spiffe_id import SpiffeID, check_trust_domain

__all__ = ["PeerPatterns", "PeerRule", "TrustDomains"]

_ANY_BELOW: Final = "/*"


@dataclass(frozen=True, slots=True)
class TrustDomains:
    """Admits callers of the named trust domains.

    Raises:
        ConfigurationError: none is named, or one is no trust domain.

    """

    names: frozenset[str]

    @classmethod
    def of(cls, trust_domains: Iterable[str]) -> TrustDomains:
        """Check ``trust_domains`` and make the rule."""
        return cls(frozenset(_checked(trust_domains, check_trust_domain, "trust domain")))

    def refusal(self, caller: SpiffeID) -> str | None:
        """Return why ``caller`` is not admitted, or ``None`` when it is."""
        if caller.trust_domain in self.names:
            return None
        return f"it is not open to callers of trust domain {caller.trust_domain}"


@dataclass(frozen=True, slots=True)
class PeerPatterns:
    """Admits callers whose SPIFFE ID matches a pattern.

    A pattern is an exact SPIFFE ID, or one that ends in ``/*`` and stands for every ID below it, at any
    depth: the same forms as in ``grants.yaml``.

    Raises:
        ConfigurationError: there is none, or one is malformed.

    """

    exact: frozenset[str]
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Iterable[str]) -> PeerPatterns:
        """Check ``patterns`` and make the rule."""
        checked = _checked(patterns, _check_pattern, "peer pattern")
        prefixes = tuple(pattern[:-1] for pattern in checked if pattern.endswith(_ANY_BELOW))
        return cls(frozenset(p for p in checked if not p.endswith(_ANY_BELOW)), prefixes)

    def refusal(self, caller: SpiffeID) -> str | None:
        """Return why ``caller`` is not admitted, or ``None`` when it is."""
        if caller in self.exact or caller.startswith(self.prefixes):
            return None
        return f"it is not open to {caller}"


PeerRule = TrustDomains | PeerPatterns


def _check_pattern(pattern: str) -> str:
    SpiffeID(pattern.removesuffix(_ANY_BELOW))
    return pattern


def _checked(items: Iterable[str], check: Callable[[str], str], what: str) -> list[str]:
    if isinstance(items, str):
        raise ConfigurationError(f"{items!r} must stand in a list.", hint=f"Write [{items!r}].")
    checked = [_checked_one(item, check, what) for item in items]
    if not checked:
        raise ConfigurationError(f"No {what} is named, so nobody could call.", hint="Name at least one.")
    return checked


def _checked_one(item: str, check: Callable[[str], str], what: str) -> str:
    if not isinstance(item, str):
        raise ConfigurationError(f"A {what} must be text, not {type(item).__name__}.")
    try:
        return check(item)
    except InvalidSpiffeIdError as error:
        raise ConfigurationError(f"Bad {what}: {error}") from error
