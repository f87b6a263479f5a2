"""What a caller learns of a failure inside an agent: a number to ask about, and nothing else."""

from __future__ import annotations

import secrets

from agentweave_bus.types import TaskResult

__all__ = ["correlation_id", "failed"]


def correlation_id() -> str:
    """Return a fresh id that links what the caller is told with what the log holds."""
    return secrets.token_hex(8)


def failed(error: str) -> TaskResult:
    """Return a failed result with ``error`` for the caller."""
    return TaskResult(status="failed", error=error)
