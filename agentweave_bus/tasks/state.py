"""The states of a task and what may follow what: a table, and nothing else.

::

    (none) ──> working ──> completed | failed | canceled | rejected
       │        │   ▲ └──> working          the attempt was lost; the next one
       │        ▼   │
       │     submitted                      to be tried again, later
       │        ▲
       │     auth_required | input_required somebody has to say something first
       └──> rejected | canceled | failed | auth_required

The *epoch* counts attempts: it is 0 until the first begins, one more with each ``working``, and stays what it
was with every other state. A terminal state is followed by nothing, with one exception: when an operator has
a task redriven that was given up (:mod:`.redrive`), ``failed`` is followed by ``working``: it begins anew.
"""

from __future__ import annotations

from typing import Final

from agentweave_bus.types import TaskState

__all__ = ["FOLLOWS", "REDRIVEN", "may_follow", "next_epoch"]

_WORKING: Final = TaskState.WORKING  # Python 3.11 takes long to find a member in its enum
_ENDED: Final = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELED, TaskState.REJECTED})
_WAITING: Final = frozenset({TaskState.AUTH_REQUIRED, TaskState.INPUT_REQUIRED})
_NOT_RUN: Final = frozenset({TaskState.FAILED, TaskState.CANCELED, TaskState.REJECTED})

FOLLOWS: Final[dict[TaskState | None, frozenset[TaskState]]] = {
    None: _NOT_RUN | _WAITING | {TaskState.WORKING},
    TaskState.WORKING: _ENDED | _WAITING | {TaskState.WORKING, TaskState.SUBMITTED},
    TaskState.SUBMITTED: _NOT_RUN | _WAITING | {TaskState.WORKING},
    TaskState.AUTH_REQUIRED: _NOT_RUN | {TaskState.WORKING, TaskState.SUBMITTED},
    TaskState.INPUT_REQUIRED: _NOT_RUN | {TaskState.WORKING, TaskState.SUBMITTED},
    **dict.fromkeys(_ENDED, frozenset()),
}
"""What may follow each state; ``None`` is a task of which there is no record."""

REDRIVEN: Final[dict[TaskState | None, frozenset[TaskState]]] = {
    TaskState.FAILED: frozenset({TaskState.WORKING})
}
"""What may follow by a redrive alone."""


def may_follow(
    before: TaskState | None,
    before_epoch: int,
    after: TaskState,
    after_epoch: int,
    *,
    redriven: bool = False,
) -> bool:
    """Say whether a task may go from one state to another, and from one attempt to another.

    ``redriven`` says that it does so by a redrive.
    """
    table = REDRIVEN if redriven else FOLLOWS
    return after in table.get(before, frozenset()) and after_epoch == next_epoch(before_epoch, after)


def next_epoch(epoch: int, state: TaskState) -> int:
    """Return the epoch of a record of ``state`` that follows one of ``epoch``."""
    return epoch + 1 if state is _WORKING else epoch
