"""Sealing: one signature for everything that leaves in the same turn of the event loop.

:meth:`Sealer.seal` queues a head and asks the loop to flush when the current turn is over; it never
waits for more to come. A flush builds one tree over what is queued with one certificate (256 heads at
most), signs its root, and hands each caller a frame with its own path, so that each envelope stays
verifiable by itself.
"""

from __future__ import annotations

import asyncio
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from agentweave_bus.envelope.delegation import check_rules
from agentweave_bus.envelope.envelope import DEFAULT_LIMITS, Draft, Head, Limits, protected_head, sha256
from agentweave_bus.envelope.frame import Link, Proof, encode_frame
from agentweave_bus.envelope.head import head_from_map, map_from_draft, pack_head
from agentweave_bus.envelope.merkle import Tree, leaf_hash
from agentweave_bus.envelope.verification import protected_root, signature_algorithm
from agentweave_bus.exceptions import AgentWeaveError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentweave_bus.identity.svid import X509Svid

__all__ = ["Sealed", "Sealer"]


class Sealed(NamedTuple):
    """An envelope ready to be sent: its bytes, and what its sender wants to know of it."""

    frame: bytes
    head: Head
    digest: bytes
    link: Link


class _Prepared(NamedTuple):
    """A head that waits for its signature."""

    head: Head
    head_bytes: bytes
    leaf: bytes
    digest: bytes
    svid: X509Svid
    payload: bytes
    via: tuple[Link, ...]


class Sealer:
    """Seals envelopes with the SVID that ``svid()`` returns at that moment.

    One instance belongs to one event loop. It needs no closing: a flush runs in the turn after the
    first :meth:`seal`, and whoever was cancelled meanwhile is left out.
    """

    def __init__(self, svid: Callable[[], X509Svid], limits: Limits = DEFAULT_LIMITS) -> None:
        self._svid = svid
        self._limits = limits
        self._queue: list[tuple[_Prepared, asyncio.Future[Sealed]]] = []

    async def seal(self, draft: Draft, payload: bytes, via: tuple[Link, ...] = ()) -> Sealed:
        """Seal ``payload`` under ``draft``, in one batch with everything else of this turn.

        Raises:
            MalformedEnvelopeError: a receiver would refuse the head, or the frame is too large.
            DelegationRefusedError: with ``via`` it would break a rule of delegation.
            SvidUnavailableError: there is no valid SVID.

        """
        return await self._queued(self._prepare(draft, payload, via))

    async def seal_all(
        self, drafts: Sequence[tuple[Draft, bytes, tuple[Link, ...]]]
    ) -> list[Sealed | AgentWeaveError]:
        """Do as :meth:`seal` for each draft, payload and via; what it would raise stands in its place."""
        sealed: list[asyncio.Future[Sealed] | AgentWeaveError] = []
        try:
            for draft, payload, via in drafts:
                try:
                    sealed.append(self._queued(self._prepare(draft, payload, via)))
                except AgentWeaveError as error:
                    sealed.append(error)
            return [one if isinstance(one, AgentWeaveError) else await _result(one) for one in sealed]
        finally:
            for one in sealed:  # cancelled meanwhile, or failed for a reason that nobody foresaw
                if isinstance(one, asyncio.Future) and not one.cancel() and not one.cancelled():
                    one.exception()

    def require_svid(self) -> None:
        """Make sure that something could be sealed now.

        Raises:
            SvidUnavailableError: there is no valid SVID.

        """
        self._svid()

    def seal_now(self, draft: Draft, payload: bytes, via: tuple[Link, ...] = ()) -> Sealed:
        """Seal at once, in a batch of one. Same errors as :meth:`seal`."""
        prepared = self._prepare(draft, payload, via)
        return _finish(prepared, *_sign([prepared]), 0, self._limits)

    def _prepare(self, draft: Draft, payload: bytes, via: tuple[Link, ...]) -> _Prepared:
        svid = self._svid()
        value = map_from_draft(
            draft, iss=svid.spiffe_id, x5t=svid.x5t, pd=sha256(payload), par=via[-1].digest if via else None
        )
        if via and draft.get("scope") is None and (inherited := via[-1].head.scope) is not None:
            value["scope"] = list(inherited)
        head = head_from_map(value, self._limits)
        check_rules(head, via, self._limits)
        head_bytes = pack_head(value, self._limits)
        protected = protected_head(head_bytes)
        return _Prepared(head, head_bytes, leaf_hash(protected), sha256(protected), svid, payload, via)

    def _queued(self, prepared: _Prepared) -> asyncio.Future[Sealed]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sealed] = loop.create_future()
        if not self._queue:
            loop.call_soon(self._flush)
        self._queue.append((prepared, future))
        if len(self._queue) >= self._limits.max_batch_heads:
            self._flush()
        return future

    def _flush(self) -> None:
        queued, self._queue = self._queue, []
        waiting = [one for one in queued if not one[1].done()]
        for _, group in groupby(waiting, key=lambda one: one[0].svid.x5t):
            self._seal_batch(list(group))

    def _seal_batch(self, batch: Sequence[tuple[_Prepared, asyncio.Future[Sealed]]]) -> None:
        try:
            tree, signature = _sign([prepared for prepared, _ in batch])
        except Exception as error:  # noqa: BLE001 - whoever awaits gets it
            for _, future in batch:
                future.set_exception(error)
            return
        for index, (prepared, future) in enumerate(batch):
            try:
                future.set_result(_finish(prepared, tree, signature, index, self._limits))
            except Exception as error:  # noqa: BLE001 - one frame too large is not the others' trouble
                future.set_exception(error)


async def _result(sealed: asyncio.Future[Sealed]) -> Sealed | AgentWeaveError:
    try:
        return await sealed
    except AgentWeaveError as error:
        return error


def _sign(batch: Sequence[_Prepared]) -> tuple[Tree, bytes]:
    tree = Tree([one.leaf for one in batch])
    key = batch[0].svid.private_key
    return tree, key.sign(protected_root(tree.size, tree.root), signature_algorithm(key.curve))


def _finish(prepared: _Prepared, tree: Tree, signature: bytes, index: int, limits: Limits) -> Sealed:
    proof = Proof(signature, tree.size, index, tree.path(index))
    link = Link(prepared.head_bytes, proof, prepared.svid.cert_chain, prepared.head, prepared.digest)
    frame = encode_frame(link, prepared.payload, prepared.via, limits)
    return Sealed(frame, prepared.head, prepared.digest, link)
