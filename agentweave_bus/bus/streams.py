"""Streams: the declarations of what JetStream keeps, in one place.

The control role makes them (``control/reconcile.py``); workers only ever use them. A claim stream
holds one message per claimed call. It refuses a second message on a subject instead of replacing the
first, and nobody may delete or purge, so a claim, once made, stands until its age is up. It takes messages
of exactly a digest's size or less: the broker's own acknowledgements, which an agent could have sent to
any subject by naming it as the reply subject, are larger.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Any, Final

from agentweave_bus.bus.subjects import Family, agent_prefix
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["CLAIM_MAX_AGE_S", "StreamSpec", "claim_stream", "claim_stream_name"]

CLAIM_MAX_AGE_S: Final = 660
"""Longer than the longest call's lifetime plus clock skew on both sides, in seconds."""

_NANOSECONDS: Final = 1_000_000_000
_CLAIM_BYTES: Final = 32
_MAX_CLAIMS: Final = 2_000_000
"""Held at once by one agent: 3,000 calls a second that are not safe, for as long as a claim stands."""


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as it should be: its name and the configuration that JetStream's API takes."""

    name: str
    config: dict[str, Any]


def claim_stream_name(agent: SpiffeID) -> str:
    """Return the name of the stream of ``agent``'s claims; a stream's name may hold no dot or slash."""
    digest = hashlib.sha256(agent_prefix(Family.CLAIM, agent).encode()).digest()
    return "claims-" + base64.b32encode(digest).decode().rstrip("=").lower()


def claim_stream(agent: SpiffeID, *, replicas: int = 1) -> StreamSpec:
    """Declare the stream in which ``agent`` claims calls across its replicas and restarts."""
    name = claim_stream_name(agent)
    return StreamSpec(
        name,
        {
            "name": name,
            "description": f"calls claimed by {agent}",
            "subjects": [f"{agent_prefix(Family.CLAIM, agent)}.*"],
            "storage": "file",
            "retention": "limits",
            "discard": "new",
            "discard_new_per_subject": True,
            "max_msgs_per_subject": 1,
            "max_age": CLAIM_MAX_AGE_S * _NANOSECONDS,
            "max_msgs": _MAX_CLAIMS,
            "max_msg_size": _CLAIM_BYTES,
            "duplicate_window": 100_000_000,
            "num_replicas": replicas,
            "deny_delete": True,
            "deny_purge": True,
            "allow_rollup_hdrs": False,
            "allow_direct": False,
        },
    )
