"""How many workers an agent should have, by the tasks that wait for it.

More at once, up to twice as many at a time, when there is more than the rule plans for each. One less when
that has been more than enough for a while: what waits and what is being worked on would fill the others by
half at most. So a load that does not change never brings the number up and down again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from agentweave_bus.supervisor.worker_process import WorkerProcess

__all__ = ["Load", "ScaleRule", "Scaler", "load_of", "next_size", "wanted"]

_FRESH_BEATS: Final = 3
"""What a worker said longer ago than so many beats does not count any more."""


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """From ``least`` to ``most`` workers, one for each ``backlog`` tasks that wait.

    There is one less when one less would have been enough for ``cool_down_s`` seconds.
    """

    least: int
    most: int
    backlog: int = 20
    cool_down_s: float = 60.0

    def bounded(self, size: int) -> int:
        """Return the nearest number of workers that there may be."""
        return min(max(size, self.least), self.most)


class Load(NamedTuple):
    """What there is to do: tasks that wait, and requests that are being worked on."""

    waiting: int
    running: int

    def __str__(self) -> str:
        return f"{self.waiting} tasks wait, {self.running} requests are worked on"


def wanted(rule: ScaleRule, size: int, load: Load) -> int:
    """Return how many workers a load calls for where there are ``size``."""
    more = _parts(load.waiting, rule.backlog)
    if more > size:
        return rule.bounded(more)
    enough = max(more, _parts(2 * (load.waiting + load.running), rule.backlog))
    return rule.bounded(min(size, enough))


def next_size(rule: ScaleRule, size: int, load: Load, calm_s: float) -> int:
    """Return how many workers there should be next, where there are ``size``.

    ``calm_s`` is for how many seconds one less would have been enough.
    """
    if size != rule.bounded(size):
        return rule.bounded(size)
    goal = wanted(rule, size, load)
    if goal > size:
        return min(goal, 2 * size)
    return size - 1 if goal < size and calm_s >= rule.cool_down_s else size


class Scaler:
    """Says when an agent's number of workers changes. Times are seconds by a clock that only goes forward."""

    def __init__(self, rule: ScaleRule) -> None:
        self.rule = rule
        self.held = False
        """Whether somebody has chosen the number, so that the load does not."""
        self.wanted: int | None = None
        """How many the load called for when last looked at; ``None`` where it is not known."""
        self._calm_since: float | None = None

    def next_size(self, now: float, size: int, load: Load | None, *, settled: bool) -> int:
        """Return how many workers there should be now, where there are ``size``.

        Nothing changes while the load is not known, or while those there are have not ``settled``: the load
        does not tell yet what they can do.
        """
        self.wanted = None if load is None else wanted(self.rule, size, load)
        if self.wanted is None or self.wanted >= size:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        if self.held or load is None or not settled:
            return size
        calm_s = 0.0 if self._calm_since is None else now - self._calm_since
        chosen = next_size(self.rule, size, load, calm_s)
        if chosen != size:
            self._calm_since = None
        return chosen


def load_of(processes: Iterable[WorkerProcess], now: float) -> Load | None:
    """Return the load of one agent as its workers told it lately; ``None`` where none of them knows.

    What waits is the same for all of them; the most that one has seen counts.
    """
    beats = [
        one.beat
        for one in processes
        if one.beat is not None and now - one.heard_at <= _FRESH_BEATS * (one.spec.beat_s or 0.0)
    ]
    waiting = max((beat.backlog for beat in beats if beat.backlog is not None), default=None)
    return None if waiting is None else Load(waiting, sum(beat.in_flight for beat in beats))


def _parts(count: int, size: int) -> int:
    return -(-count // size)
