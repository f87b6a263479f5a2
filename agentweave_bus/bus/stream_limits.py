"""How much is kept, how often and for how long: what whoever runs the brokers may choose.

Everything else about a stream (``bus/streams.py``) follows from what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["DEFAULT_STREAM_LIMITS", "StreamLimits"]

_GIB: Final = 1024**3


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """The limits of the streams at a broker; bytes are sizes on disk, which it reserves for each agent.

    Attributes:
        replicas: how many servers keep each stream: 1, 3 or 5.
        queue_tasks: tasks for an agent that wait or run, over all of its capabilities. More are refused.
        queue_bytes: their size. More are refused.
        record_age_s: for how long records of tasks, and large payloads, are kept; longer than any task lives.
        dead_bytes: an agent's dead letters. Where there is no room for more, tasks stay in the queue.
        event_bytes: the events that an agent published. The oldest give way.

    """

    replicas: int = 1
    queue_tasks: int = 2_000_000
    queue_bytes: int = 4 * _GIB
    record_age_s: int = 32 * 86_400
    dead_bytes: int = _GIB
    event_bytes: int = _GIB


DEFAULT_STREAM_LIMITS: Final = StreamLimits()
