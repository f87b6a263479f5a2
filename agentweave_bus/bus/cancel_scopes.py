"""Cancel scopes for what happens with every task.

``anyio.CancelScope()`` looks up each time which kind of event loop runs, and sets up twice what it returns.
That takes three times as long as making one of the same kind as another.
"""

from __future__ import annotations

from functools import cache

from anyio import CancelScope

__all__ = ["cancel_scope"]


def cancel_scope() -> CancelScope:
    """Return a new scope, without a deadline and not shielded. Call it where an event loop runs."""
    return _kind()()


@cache
def _kind() -> type[CancelScope]:
    return type(CancelScope())
