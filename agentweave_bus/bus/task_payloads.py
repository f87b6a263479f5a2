"""Payloads of tasks that travel by reference: fetched where there is room, and only as they were signed.

It is asked for a payload when it is known that its sender may have it fetched. Where it is fetched from is no
part of the reference: it is what the task's sender has stored for this agent, so nobody can have an agent
fetch what he may not read himself.
"""

from __future__ import annotations

from typing import Any, Final

from agentweave_bus.bus.admitted import OpenedTask
from agentweave_bus.bus.blob_room import BlobRoom
from agentweave_bus.bus.blobs import Blobs
from agentweave_bus.bus.refusal import AdmissionRefusedError, Step
from agentweave_bus.envelope.blob import BlobReference
from agentweave_bus.exceptions import BlobError, BusError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["TaskPayloads"]

_AGAIN_S: Final = 1.0
_NO_ROOM: Final = "too many large payloads are held here already"
_BUSY: Final = "busy with other large payloads; try again"


class TaskPayloads:
    """Fetches what tasks refer to. Without ``blobs`` there is nothing that they could."""

    def __init__(self, blobs: Blobs | None) -> None:
        self._blobs = blobs
        self._room = BlobRoom(0 if blobs is None else 2 * blobs.max_bytes)

    async def fetched(self, task: OpenedTask) -> tuple[BlobReference, bytes]:
        """Return a task's reference and all that it refers to, which holds room until :meth:`leave`.

        Raises:
            AdmissionRefusedError: it can't be had; ``retry_after`` says that it may be later.

        """
        try:
            most = 0 if self._blobs is None else self._blobs.max_bytes
            reference = BlobReference.decode(task.request.payload, max_bytes=most)
        except BlobError as error:
            raise _refused(task, error) from error
        sender = task.asks.iss
        if not await self._room.enter(sender, reference.size):
            raise AdmissionRefusedError(Step.ROOM, _NO_ROOM, request=task.request, told=_BUSY)
        assert self._blobs is not None  # or no reference is small enough
        try:
            return reference, await self._blobs.fetch(sender, reference)
        except (BlobError, BusError) as error:
            self.leave(sender, reference.size)
            raise _refused(task, error) from error
        except BaseException:
            self.leave(sender, reference.size)
            raise

    def leave(self, sender: SpiffeID, size: int) -> None:
        """Give back the room of a payload of so many bytes."""
        self._room.leave(sender, size)

    async def decode(self, data: bytes) -> Any:
        """Decode what was fetched. Raises PayloadError."""
        assert self._blobs is not None  # it was fetched
        return await self._blobs.decode(data)


def _refused(task: OpenedTask, error: BlobError | BusError) -> AdmissionRefusedError:
    for_good = isinstance(error, BlobError) and not error.missing
    return AdmissionRefusedError(
        Step.PAYLOAD,
        str(error),
        told=str(error),
        request=task.request,
        retry_after=None if for_good else _AGAIN_S,
    )
