"""A group raises what went wrong as it is."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from agentweave_bus.bus.task_groups import owned_tasks

pytestmark = pytest.mark.anyio


async def fail(error):
    raise error


async def test_what_the_body_raises():
    with pytest.raises(KeyError, match="body"):
        async with owned_tasks():
            raise KeyError("body")


async def test_what_a_task_raises_which_ends_the_body():
    with pytest.raises(KeyError, match="task"):  # noqa: PT012 - the block is what is tested
        async with owned_tasks() as group:
            group.start_soon(fail, KeyError("task"))
            await anyio.sleep_forever()


async def test_several_stay_a_group():
    with pytest.raises(ExceptionGroup) as both:  # noqa: PT012 - likewise
        async with owned_tasks() as group:
            group.start_soon(fail, KeyError("task"))
            await anyio.lowlevel.checkpoint()
            raise ValueError("body")
    assert {type(one) for one in both.value.exceptions} <= {KeyError, ValueError}


async def test_cancellation_is_no_error():
    with anyio.move_on_after(0.01) as scope:
        async with owned_tasks() as group:
            group.start_soon(anyio.sleep_forever)
            await anyio.sleep_forever()
    assert scope.cancelled_caught
