"""A circuit breaker: stop asking what fails, and try again carefully.

The whole behaviour is the table :data:`TRANSITIONS`; everything else counts. A breaker does not know
what it guards, starts no timer and reads no clock: time is passed in. It is used for each OPA endpoint
and, by the bus, for each callee.

    permit = breaker.acquire(now_ms)        # None: open, do not ask
    ... ask ...
    breaker.succeeded(permit, now_ms)       # or failed(), or abandoned() if it says nothing

A permit that was given before the state changed says nothing about the present one and is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "TRANSITIONS",
    "BreakerEvent",
    "BreakerSettings",
    "BreakerState",
    "CircuitBreaker",
    "Permit",
    "Transition",
]


class BreakerState(StrEnum):
    """Whether to ask."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerEvent(StrEnum):
    """What can happen: an attempt ends, or the waiting time of an open breaker is over."""

    SUCCESS = "success"
    FAILURE = "failure"
    COOLED = "cooled"


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When to change state.

    Attributes:
        failure_threshold: so many failures in a row open the breaker.
        success_threshold: so many successful probes in a row close it.
        timeout: seconds that it stays open before it probes.

    Raises:
        ValueError: a threshold below 1, or a timeout that is not positive.

    """

    failure_threshold: int = 5
    success_threshold: int = 2
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.failure_threshold < 1 or self.success_threshold < 1 or not self.timeout > 0:
            raise ValueError("a breaker's thresholds are at least 1, and its timeout is above 0")


@dataclass(frozen=True, slots=True)
class Transition:
    """Where an event leads, once it has come often enough in a row (``after`` names the setting)."""

    to: BreakerState
    after: Literal["failure_threshold", "success_threshold"] | None = None


TRANSITIONS: Final[Mapping[tuple[BreakerState, BreakerEvent], Transition]] = {
    (BreakerState.CLOSED, BreakerEvent.SUCCESS): Transition(BreakerState.CLOSED),
    (BreakerState.CLOSED, BreakerEvent.FAILURE): Transition(BreakerState.OPEN, "failure_threshold"),
    (BreakerState.OPEN, BreakerEvent.COOLED): Transition(BreakerState.HALF_OPEN),
    (BreakerState.HALF_OPEN, BreakerEvent.SUCCESS): Transition(BreakerState.CLOSED, "success_threshold"),
    (BreakerState.HALF_OPEN, BreakerEvent.FAILURE): Transition(BreakerState.OPEN),
}
"""What is not in it changes nothing."""


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to make one attempt, given in one state."""

    generation: int


class CircuitBreaker:
    """One breaker. ``now_ms`` is any clock that does not go back, in milliseconds.

    Args:
        settings: thresholds and timeout.
        on_change: told the old and the new state.

    """

    def __init__(
        self,
        settings: BreakerSettings | None = None,
        *,
        on_change: Callable[[BreakerState, BreakerState], None] | None = None,
    ) -> None:
        self._settings = settings or BreakerSettings()
        self._on_change = on_change
        self._state = BreakerState.CLOSED
        self._generation = 0
        self._count = 0
        self._since_ms = 0
        self._probing_since_ms: int | None = None

    def state(self, now_ms: int) -> BreakerState:
        """Return the state at ``now_ms``."""
        if self._state is BreakerState.OPEN and self.retry_after(now_ms) <= 0:
            self._happened(BreakerEvent.COOLED, now_ms)
        return self._state

    def acquire(self, now_ms: int) -> Permit | None:
        """Return leave for one attempt, or None. Half-open, there is one attempt at a time."""
        state = self.state(now_ms)
        if state is BreakerState.OPEN:
            return None
        if state is BreakerState.HALF_OPEN:
            if self._is_probing(now_ms):
                return None
            self._probing_since_ms = now_ms
        return Permit(self._generation)

    def succeeded(self, permit: Permit, now_ms: int) -> None:
        """Count a success."""
        self._ended(permit, BreakerEvent.SUCCESS, now_ms)

    def failed(self, permit: Permit, now_ms: int) -> None:
        """Count a failure."""
        self._ended(permit, BreakerEvent.FAILURE, now_ms)

    def abandoned(self, permit: Permit) -> None:
        """Take back a permit whose attempt says nothing (it was cancelled)."""
        if permit.generation == self._generation:
            self._probing_since_ms = None

    def retry_after(self, now_ms: int) -> float:
        """Return the seconds until an open breaker probes; 0 or less if it may be asked."""
        if self._state is not BreakerState.OPEN:
            return 0.0
        return self._settings.timeout - (now_ms - self._since_ms) / 1000

    def _is_probing(self, now_ms: int) -> bool:
        """Say whether a probe is out. One that never reported is given up after the timeout."""
        since = self._probing_since_ms
        return since is not None and now_ms - since < self._settings.timeout * 1000

    def _ended(self, permit: Permit, event: BreakerEvent, now_ms: int) -> None:
        if permit.generation == self._generation:
            self._probing_since_ms = None
            self._happened(event, now_ms)

    def _happened(self, event: BreakerEvent, now_ms: int) -> None:
        transition = TRANSITIONS.get((self._state, event))
        if transition is None:
            return
        self._count += 1
        if transition.after is None or self._count >= getattr(self._settings, transition.after):
            self._go(transition.to, now_ms)

    def _go(self, state: BreakerState, now_ms: int) -> None:
        old, self._state, self._count = self._state, state, 0
        if old is state:
            return
        self._generation += 1
        self._since_ms = now_ms
        self._probing_since_ms = None
        if self._on_change is not None:
            self._on_change(old, state)
