"""Standing answers: a policy's word that holds for a while, kept for exactly that while.

A policy's rule ``standing`` sees the reduced input only (:meth:`AuthzContext.standing_input`), so its
answer holds for every action that agrees in that input. Two things could make a kept answer wrong:
time, and a change of what decided. So an entry ends at most 60 seconds after the policy was *asked*,
and carries the policy's generation from before it was asked: an answer that arrives after the policy
has changed is never kept, and one kept before is never used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from agentweave_bus.authz.engine import MAX_CACHE_SECONDS

if TYPE_CHECKING:
    from agentweave_bus.authz.decision import AuthzContext, AuthzDecision

__all__ = ["MAX_STANDING_ENTRIES", "Asked", "StandingCache", "standing_key"]

MAX_STANDING_ENTRIES: Final = 4096

StandingKey: TypeAlias = "tuple[object, ...]"


def standing_key(context: AuthzContext) -> StandingKey:
    """Return what two actions agree in if and only if their standing inputs are the same."""
    principal, scope, via = context.principal, context.scope, context.via
    links = (
        [(link.get("iss"), link.get("aud"), link.get("cap"), link.get("kind")) for link in via] if via else ()
    )
    return (
        context.caller,
        context.callee,
        context.action,
        context.direction,
        context.kind,
        context.transport,
        tuple(links),
        # As text: as Python values True and 1 would be the same key, and a policy tells them apart.
        None if principal is None else json.dumps(principal, sort_keys=True, default=repr),
        None if scope is None else tuple(scope),
    )


class Asked(NamedTuple):
    """When and of which policy something was asked.

    ``at`` is in seconds of a clock that never goes back; ``generation`` changes with the policy.
    """

    at: float
    generation: tuple[int, str]


@dataclass(frozen=True, slots=True)
class _Entry:
    decision: AuthzDecision | None
    until: float
    generation: tuple[int, str]


class StandingCache:
    """The answers kept, at most ``max_entries``, oldest out first. Time is passed in."""

    def __init__(self, *, max_entries: int = MAX_STANDING_ENTRIES) -> None:
        self._max_entries = max_entries
        self._entries: dict[StandingKey, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: StandingKey, now: Asked) -> AuthzDecision | None:
        """Return the decision kept for ``key`` if it still stands."""
        entry = self._current(key, now)
        return None if entry is None else entry.decision

    def is_known_not_to_stand(self, key: StandingKey, now: Asked) -> bool:
        """Say whether the policy lately said that nothing stands for ``key``: saves a question."""
        entry = self._current(key, now)
        return entry is not None and entry.decision is None

    def keep(self, key: StandingKey, decision: AuthzDecision, seconds: float, asked: Asked) -> None:
        """Keep ``decision`` for ``seconds`` after it was asked for, at most 60."""
        until = asked.at + min(seconds, MAX_CACHE_SECONDS)
        self._put(key, _Entry(replace(decision, standing=True), until, asked.generation))

    def keep_none(self, key: StandingKey, asked: Asked) -> None:
        """Remember that nothing stands for ``key``."""
        self._put(key, _Entry(None, asked.at + MAX_CACHE_SECONDS, asked.generation))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _current(self, key: StandingKey, now: Asked) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if now.at < entry.until and entry.generation == now.generation:
            return entry
        del self._entries[key]
        return None

    def _put(self, key: StandingKey, entry: _Entry) -> None:
        self._entries.pop(key, None)
        while len(self._entries) >= self._max_entries:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = entry
