"""One module for each peer: ``serve(place, ready)`` is its worker, ``client(place)`` opens its client.

Which modules are imported is decided by the row, so that rows of this project need nobody else's packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias, cast

from benchmarks.packages import leave_out_others
from benchmarks.places import Place

__all__ = ["Call", "Peer", "WrongAnswerError", "peer_of"]

Call: TypeAlias = Callable[[], Awaitable[None]]
"""Makes one call with the benchmark's payload and checks that it came back (else WrongAnswerError)."""


class WrongAnswerError(Exception):
    """What came back is not what was sent: such a row measures something else."""


class Peer(Protocol):
    """What a module of this package offers."""

    async def serve(self, place: Place, ready: Callable[[], None]) -> None:
        """Answer calls until the process is told to stop; say ``ready`` when they are taken."""

    def client(self, place: Place) -> AbstractAsyncContextManager[Call]:
        """Connect for the length of the block."""


def peer_of(place: Place) -> Peer:
    """Import the module that plays ``place``'s part, with nothing that is another's."""
    leave_out_others(place.peer)
    return cast("Peer", importlib.import_module(f"benchmarks.peers.{place.peer}"))
