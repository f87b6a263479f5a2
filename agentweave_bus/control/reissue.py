"""Reissues: how the control role brings a task back, in a new head of its own that changes nothing of it."""

from __future__ import annotations

from agentweave_bus.bus.subjects import Priority, task_subject
from agentweave_bus.envelope import Draft, Head, Kind, LogWitness

__all__ = ["reissue_draft"]


def reissue_draft(
    task: Head,
    *,
    task_id: str,
    now_ms: int,
    expires_ms: int,
    nbf: int | None = None,
    attempt: int | None = None,
    log: LogWitness | None = None,
) -> Draft:
    """Return what a reissue of ``task`` says; seal it with the task's payload and with it as the last link.

    ``task_id`` is the task's own, or that of one of its occurrences, due at ``nbf``. ``attempt`` is that with
    which a redrive lets it begin. Times are milliseconds since the epoch.
    """
    return Draft(
        kind=Kind.REISSUE,
        id=task_id,
        aud=task.aud,
        cap=task.cap,
        sub=task_subject(task.aud, task.cap, Priority.of(task.prio)),
        iat=now_ms,
        exp=max(expires_ms, now_ms + 1),
        ct=task.ct,
        nbf=nbf,
        scope=task.scope,
        att=attempt,
        ctx=task.ctx,
        idk=task.idk,
        prio=task.prio,
        retry=task.retry,
        log=log,
        trace=task.trace,
    )
