"""Task groups that raise what went wrong, not a group of one.

anyio wraps whatever leaves a task group in an ``ExceptionGroup``, also what the body itself raised. A
context manager that holds a group inside would so turn the ``AuthorizationError`` of its user's code into
something that ``except AuthorizationError`` does not catch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

__all__ = ["owned_tasks"]


@asynccontextmanager
async def owned_tasks() -> AsyncIterator[TaskGroup]:
    """Open a task group whose only exception, the body's or a task's, is raised as it is.

    Several at once stay a group.
    """
    try:
        async with anyio.create_task_group() as group:
            yield group
    except BaseExceptionGroup as failures:
        if len(failures.exceptions) != 1:
            raise
        failure = failures.exceptions[0]
    else:
        return
    raise failure  # outside of the handler, so that the group is not shown as its context
