"""What operators ask of the control role, and which operators' act each of it is.

This is the one place that says so. Whoever checks it goes by it: the operator's own policy, the broker's
permissions and the gate of the control role.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["OBSERVE_ACT", "OPERATOR_CAPABILITIES", "REDRIVE_ACT", "WATCHING", "capabilities_of"]

REDRIVE_ACT: Final = "control:redrive"
"""Working on dead letters: looking at them, bringing tasks back, dropping letters."""

OBSERVE_ACT: Final = "control:observe"
"""Seeing who has tasks where, and how they go: never what is asked for, nor what comes of it."""

OPERATOR_CAPABILITIES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "dlq_list": REDRIVE_ACT,
        "dlq_show": REDRIVE_ACT,
        "dlq_redrive": REDRIVE_ACT,
        "dlq_drop": REDRIVE_ACT,
        "observe_queues": OBSERVE_ACT,
        "observe_records": OBSERVE_ACT,
        "observe_task": OBSERVE_ACT,
    }
)
"""The control role's capabilities, and the act by which each is decided on."""


WATCHING: Final = frozenset({"observe_queues", "observe_records"})
"""What a console asks each second: audit logs have it once a minute (:mod:`agentweave_bus.authz.repeats`)."""


def capabilities_of(may: Callable[[str], bool]) -> list[str]:
    """Return the capabilities of the control role for which ``may`` says yes of their act."""
    return [name for name, act in OPERATOR_CAPABILITIES.items() if may(act)]
