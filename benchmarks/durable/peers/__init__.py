"""One module for each peer: ``serve`` is its worker, ``client`` opens what submits to it.

Which modules are imported is decided by the row, so that nobody's process holds another's packages.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, cast

from benchmarks.packages import leave_out_others
from benchmarks.places import Place

__all__ = ["Submitter", "TaskPeer", "peer_of"]


class Submitter(Protocol):
    """A client that is connected."""

    async def submit(self, queue: str, count: int) -> None:
        """Have ``count`` tasks stored, as many at once as pays; return when the last one is accepted."""

    async def submit_stamped(self, queue: str) -> None:
        """Have one stored whose handler writes down how long ago that was."""

    async def cancel(self, queue: str) -> float:
        """Cancel a task whose handler runs; return after how many seconds the handler felt it."""


class TaskPeer(Protocol):
    """What a module of this package offers."""

    async def serve(self, place: Place, gate: asyncio.Event, ready: Callable[[], None]) -> None:
        """Do tasks until the process is told to stop, and begin none while ``gate`` is not set."""

    def client(self, place: Place) -> AbstractAsyncContextManager[Submitter]:
        """Connect for the length of the block."""


def peer_of(place: Place) -> TaskPeer:
    """Import the module that plays ``place``'s part, with nothing that is another's."""
    leave_out_others(place.peer)
    return cast("TaskPeer", importlib.import_module(f"benchmarks.durable.peers.{place.peer}"))
