"""Scopes that are made cheaply are those of anyio."""

from __future__ import annotations

import anyio
import pytest

from agentweave_bus.bus.cancel_scopes import cancel_scope

pytestmark = pytest.mark.anyio


async def test_each_is_one_of_its_own_and_of_anyios_kind() -> None:
    outer, inner = cancel_scope(), cancel_scope()
    assert type(outer) is type(anyio.CancelScope())
    with outer:
        with inner:
            inner.cancel()
            await anyio.sleep(10)
        assert inner.cancelled_caught
        outer.deadline = anyio.current_time()
        await anyio.sleep(10)
    assert outer.cancelled_caught
    with anyio.fail_after(10), cancel_scope() as scope:
        assert (scope.deadline, scope.shield) == (float("inf"), False)
        await anyio.lowlevel.checkpoint()
    assert not scope.cancelled_caught
