"""What every attack of this suite says of itself: what it tries, who tries it, and what refuses it.

A test names these with :func:`refused_by`. The ``attack`` fixture asserts that very step, and the table of
``docs/security.md`` is made from the same marks, so the page can say nothing that no test has seen.
"""

from __future__ import annotations

from enum import Enum

import pytest

from agentweave_bus.bus.admission import Step

__all__ = ["Adversary", "Layer", "refused_by"]


class Adversary(Enum):
    """Who attacks."""

    STRANGER = "a stranger without an SVID"
    AGENT = "another agent, with its own SVID and permissions"
    DOMAIN = "another trust domain's authority"
    THIEF = "who holds a stolen or expired key"
    BROKER = "who owns the broker"
    POLICY = "who answers for the policy server"
    CALLER = "a caller who was granted something"
    INTRUDER = "who can edit files on a machine"


class Layer(Enum):
    """What refuses an attack, where it is not a step of admission (:class:`Step`)."""

    HANDSHAKE = "TLS handshake"
    PERMISSIONS = "broker permissions"
    STREAM = "stream configuration"
    CALLER = "caller: answers are verified"
    RECORD = "readers of a task's log: records and progress are verified"
    WORKER = "worker: cancellations and approvals are verified"
    CONTROL = "control role: announcements, parked tasks, dead letters and records are verified"
    POLICY_LOAD = "policy loading"
    NAMES = "names"
    CONFIGURATION = "configuration"
    AUDIT = "audit verification"


def refused_by(where: Step | Layer, what: str, *, by: Adversary) -> pytest.MarkDecorator:
    """Mark a test as an attack: ``what`` is tried (a few words, no full stop), ``where`` it ends."""
    return pytest.mark.refused_by(where, what=what, by=by)
