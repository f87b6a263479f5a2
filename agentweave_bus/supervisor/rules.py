"""What to do about a worker: whether to start it again and when, whether it is well, whether it is due.

Pure functions of what is known. Times are seconds by any clock that only goes forward.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, NamedTuple

from agentweave_bus.observability.heartbeat import Heartbeat

__all__ = [
    "CONFIGURATION_CODE",
    "HealthRule",
    "Next",
    "RecycleRule",
    "RestartRule",
    "Verdict",
    "after_exit",
    "due_for_recycling",
    "hangs",
    "is_deaf",
    "share_of",
]

CONFIGURATION_CODE: Final = 2
"""The exit code of a worker whose configuration is wrong: starting it again would not mend that."""

_MEGABYTE: Final = 1024 * 1024
_GOLDEN: Final = 0.618034
_EARLY: Final = 0.1
"""By which part of their age at most workers are recycled early, so that not all of them are due at once."""


@dataclass(frozen=True, slots=True)
class RestartRule:
    """When a worker that ended by itself is started again.

    ``policy`` is ``always``, ``on-failure`` (not after exit code 0) or ``never``. The pause doubles from
    ``first_s`` up to ``longest_s`` with each exit in a row; after ``limit`` of them it is given up. A row
    ends when a worker has run for ``within_s`` seconds.
    """

    policy: Literal["always", "on-failure", "never"] = "always"
    first_s: float = 0.5
    longest_s: float = 30.0
    limit: int = 5
    within_s: float = 60.0


@dataclass(frozen=True, slots=True)
class HealthRule:
    """When a worker that runs is not well.

    It hangs when it has said nothing for ``silent_s`` seconds. It is deaf when it has not asked for tasks for
    ``deaf_s`` seconds although it is connected and has room for some. It beats every ``beat_s`` seconds.
    """

    beat_s: float = 2.0
    silent_s: float = 20.0
    deaf_s: float = 120.0


@dataclass(frozen=True, slots=True)
class RecycleRule:
    """When a worker that is well is replaced by a fresh one; ``None`` is never."""

    tasks: int | None = None
    memory_mb: int | None = None
    after_s: float | None = None


class Next(Enum):
    """What comes after an exit."""

    RESTART = "restart"
    LEAVE = "leave"
    GIVE_UP = "give up"


class Verdict(NamedTuple):
    """What to do after an exit: ``after_s`` is the pause before a restart, in seconds."""

    next: Next
    after_s: float = 0.0
    why: str = ""


def after_exit(rule: RestartRule, exits: int, code: int, *, chance: float) -> Verdict:
    """Say what to do about a worker that ended with ``code``.

    ``exits`` is how many there were in a row, this one included; ``chance`` from 0 to 1 spreads restarts, so
    that workers that fell together do not come back in step.
    """
    if rule.policy == "never" or (rule.policy == "on-failure" and code == 0):
        return Verdict(Next.LEAVE, why=f"its restart policy is {rule.policy!r}")
    if code == CONFIGURATION_CODE:
        return Verdict(Next.GIVE_UP, why="its configuration is wrong")
    if exits > rule.limit:
        return Verdict(Next.GIVE_UP, why=f"it ended {exits} times and never ran for {rule.within_s:g} s")
    pause = min(rule.longest_s, rule.first_s * 2 ** (max(1, exits) - 1))
    return Verdict(Next.RESTART, pause * (0.75 + chance / 2))


def hangs(rule: HealthRule, silent_for_s: float) -> str | None:
    """Say why a worker that runs is taken to hang, so that only a kill ends it; ``None`` when it is not."""
    if silent_for_s <= rule.silent_s:
        return None
    return f"it has said nothing for {silent_for_s:.0f} s: its event loop hangs"


def is_deaf(rule: HealthRule, beat: Heartbeat | None) -> str | None:
    """Say why a worker that lives is taken to be deaf to its queues; ``None`` when it is not."""
    if beat is None or not beat.connected or beat.idle_s is None or beat.idle_s <= rule.deaf_s:
        return None
    return f"it has asked for no task for {beat.idle_s:.0f} s although it has room"


def share_of(place: str) -> float:
    """Return a number from 0 to 1 that is a place's own, always the same, and far from its neighbours'."""
    agent, _, number = place.rpartition("/")
    steps = int(number) if number.isdecimal() else 0
    return (zlib.crc32((agent or place).encode()) / 2**32 + steps * _GOLDEN) % 1


def due_for_recycling(
    rule: RecycleRule, beat: Heartbeat | None, age_s: float, *, early: float = 0.0
) -> str | None:
    """Say why a worker is to be replaced by a fresh one now; ``None`` when it is not.

    By its age it is due up to a tenth before its time: by all of that where ``early`` is 1.
    """
    if rule.after_s is not None and age_s >= rule.after_s * (1 - _EARLY * early):
        return f"it has run for {age_s:.0f} s"
    if beat is None:
        return None
    if rule.tasks is not None and beat.handled >= rule.tasks:
        return f"it has handled {beat.handled} requests"
    if rule.memory_mb is not None and beat.resident >= rule.memory_mb * _MEGABYTE:
        return f"it uses {beat.resident / _MEGABYTE:.0f} MB"
    return None
