"""Whether a process should be sent work: what has to be well for that, part by part.

It is asked on threads of the listener, so that a stuck event loop is told and does not keep the answer back.
Whoever asks may be a stranger: why a part is not well is said in a sentence that is the same everywhere,
without names and addresses. The log says more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from agentweave_bus.bus.connection import Keeper
from agentweave_bus.exceptions import SvidUnavailableError
from agentweave_bus.identity import IdentitySource
from agentweave_bus.observability.metrics import BreakerState, Metrics, ReadyPart
from agentweave_bus.runtime.event_service import EventService
from agentweave_bus.runtime.loop_lag import LoopLag
from agentweave_bus.runtime.task_service import TaskService
from agentweave_bus.runtime.wiring import Connected

__all__ = ["DEAF_S", "STUCK_S", "Readiness", "Serving", "base_parts", "has_svid", "serving_parts"]

DEAF_S: Final = 60.0
"""A queue is asked anew every 35 s at the latest; who has not asked for so long is deaf."""

STUCK_S: Final = 5.0
"""An event loop that is so late does not really receive."""

Check = Callable[[], str | None]
"""Returns why a part is not as it must be, for anybody to read; ``None`` where it is. On any thread."""


class Readiness:
    """The parts of one process; ``details`` is what is told besides them."""

    def __init__(
        self, parts: Mapping[ReadyPart, Check], details: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self._parts = dict(parts)
        self._details = details

    def told(self) -> tuple[bool, Mapping[str, Any]]:
        """Return whether all is well, then each part, and under ``why`` what is the matter."""
        checked = {part: check() for part, check in self._parts.items()}
        why = {str(part): reason for part, reason in checked.items() if reason is not None}
        told = {str(part): reason is None for part, reason in checked.items()}
        return not why, {**told, **({"why": why} if why else {}), **self._details()}

    def shown_in(self, metrics: Metrics) -> None:
        """Have each part be a series; looked at when somebody asks for the metrics."""
        for part, check in self._parts.items():
            metrics.ready.labels(part).set_function(partial(_as_number, check))


def _as_number(check: Check) -> float:
    return float(check() is None)


def has_svid(source: IdentitySource) -> bool:
    """Say whether there is an SVID that has not expired."""
    try:
        source.svid  # noqa: B018 - it raises when there is none
    except SvidUnavailableError:
        return False
    return True


def base_parts(source: IdentitySource, keeper: Keeper) -> dict[ReadyPart, Check]:
    """Return what every process needs that talks over the broker."""

    def connected() -> str | None:
        return None if keeper.connected else "there is no connection to the broker"

    def identity() -> str | None:
        return None if has_svid(source) else "there is no valid SVID"

    return {ReadyPart.CONNECTED: connected, ReadyPart.IDENTITY: identity}


class Serving(NamedTuple):
    """What serves an agent, as far as its readiness goes by it. ``started`` says whether the agent has."""

    subjects: Sequence[str]
    """On which it is called."""
    tasks: TaskService
    events: EventService
    lag: LoopLag
    started: Callable[[], bool]


def serving_parts(parts: Connected, serving: Serving) -> dict[ReadyPart, Check]:
    """Return what a worker needs to be of use."""

    def subscribed() -> str | None:
        return None if all(map(parts.keeper.hears, serving.subjects)) else "some calls do not get here"

    def receiving() -> str | None:
        if not parts.keeper.connected:
            return "there is no connection to the broker"
        if not serving.started():
            return "the agent has not started yet"
        if serving.lag.seconds > STUCK_S:
            return "the event loop is stuck"
        idle = max(_known(serving.tasks.idle_s, serving.events.idle_s), default=0.0)
        return "no task was asked for in a minute although there is room" if idle > DEAF_S else None

    def policy() -> str | None:
        if not parts.authorizer.answering or parts.metrics.breaker_is(BreakerState.OPEN):
            return "the policy gives no answer"
        return None

    return {
        **base_parts(parts.source, parts.keeper),
        ReadyPart.SUBSCRIBED: subscribed,
        ReadyPart.RECEIVING: receiving,
        ReadyPart.POLICY: policy,
    }


def _known(*seconds: float | None) -> Iterator[float]:
    return (one for one in seconds if one is not None)
