"""Fault: the client library gets stuck while it closes a connection."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.probes import CLI

pytestmark = pytest.mark.anyio


async def test_a_connection_whose_own_closing_is_stuck_is_cut_all_the_same(world):
    """The library is 'closed' before it closes: a second close() does nothing, so only cutting ends the socket."""
    far = await world.client(CLI)
    session = await far.parts.keeper.session(1)
    client, transport = session._client, session._client._transport._io_writer.transport
    waiting = [one._wait_for_msgs_task for one in client._subs.values()]
    assert waiting
    client._flush_pending = (
        asyncio.Event().wait
    )  # as with a flush queue that is full, or a peer that reads nothing
    stuck = asyncio.create_task(client._process_op_err(ConnectionError("stale")))
    await asyncio.sleep(0.01)
    assert client.is_closed
    await session.close()
    try:
        assert transport.is_closing()
        await asyncio.wait_for(asyncio.wait(waiting), 30)
    finally:
        stuck.cancel()
        transport.abort()
