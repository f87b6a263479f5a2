"""Who asks, as the verified request says: nothing here is believed because somebody wrote it down."""

from __future__ import annotations

from typing import Any

from agentweave_bus import current_context

__all__ = ["asked_by", "principal_name", "request_key"]


def request_key() -> str:
    """Return what names this request among all: a repeated one has the same, and acts once."""
    context = current_context()
    return f"{context.caller_spiffe_id} {context.task_id}"


def principal_name() -> str | None:
    """Return for whom the origin of the request says that it acts, as one text."""
    principal = current_context().principal
    return None if principal is None else f"{principal['iss']} {principal['sub']}"


def asked_by() -> dict[str, Any]:
    """Return on whose behalf this is asked: the proved chain of requests, and the named principal.

    ``chain`` lists the SPIFFE IDs through which the request came, the origin first, the caller last.
    """
    context = current_context()
    chain = [str(link.iss) for link in context.via] + [context.caller_spiffe_id]
    principal = None if context.principal is None else dict(context.principal)
    return {"origin": context.origin, "chain": chain, "principal": principal}
