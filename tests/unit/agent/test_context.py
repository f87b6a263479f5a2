"""The request context: one per call, with a deadline that clocks can't stretch."""

from __future__ import annotations

import asyncio
import math
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import anyio
import pytest

from agentweave_bus.agent import RequestContext, bind_context, current_context, find_context
from agentweave_bus.exceptions import AgentWeaveError

CALLER = "spiffe://a.io/agent/order"


def test_there_is_none_outside_a_request() -> None:
    assert find_context() is None
    with pytest.raises(AgentWeaveError, match="no request is being handled here"):
        current_context()


def test_it_is_there_inside_and_gone_after() -> None:
    with bind_context(RequestContext(caller_spiffe_id=CALLER)) as context:
        assert current_context() is context
    assert find_context() is None


@pytest.mark.anyio
async def test_concurrent_requests_never_see_each_others() -> None:
    seen: dict[str, str] = {}

    async def handle(task_id: str) -> None:
        with bind_context(RequestContext(caller_spiffe_id=CALLER, task_id=task_id)):
            await anyio.lowlevel.checkpoint()
            seen[task_id] = current_context().task_id

    async with anyio.create_task_group() as group:
        for i in range(20):
            group.start_soon(handle, str(i))
    assert seen == {str(i): str(i) for i in range(20)}


@pytest.mark.anyio
async def test_a_task_that_a_handler_starts_inherits_it() -> None:
    async def child() -> str:
        return current_context().task_id

    with bind_context(RequestContext(caller_spiffe_id=CALLER, task_id="t")):
        task = asyncio.create_task(child())
    assert await task == "t"


def test_without_a_deadline_time_is_endless() -> None:
    assert RequestContext(caller_spiffe_id=CALLER).remaining() == math.inf


def test_the_remaining_time_is_counted_on_the_monotonic_clock() -> None:
    wall = [time.time_ns()]
    deadline_ms = wall[0] // 1_000_000 + 5_000
    context = RequestContext(caller_spiffe_id=CALLER, deadline_ms=deadline_ms, time_ns=lambda: wall[0])
    assert 4 < context.remaining() <= 5.01
    wall[0] = 0  # somebody sets the clock back by decades
    assert 4 < context.remaining() <= 5.01


def test_a_deadline_that_has_passed_leaves_nothing() -> None:
    assert RequestContext(caller_spiffe_id=CALLER, deadline_ms=1).remaining() == 0


def test_the_origin_is_the_first_link_or_else_the_caller() -> None:
    link = SimpleNamespace(iss="spiffe://a.io/client/cli")
    assert RequestContext(caller_spiffe_id=CALLER).origin == CALLER
    assert RequestContext(caller_spiffe_id=CALLER, via=(link, SimpleNamespace(iss="x"))).origin == link.iss


def test_request_time_is_aware() -> None:
    assert RequestContext(caller_spiffe_id=CALLER).request_time.tzinfo is UTC
    with pytest.raises(AgentWeaveError, match="aware"):
        RequestContext(caller_spiffe_id=CALLER, request_time=datetime(2026, 1, 1))  # noqa: DTZ001


def test_it_can_not_be_changed() -> None:
    with pytest.raises(AttributeError):
        RequestContext(caller_spiffe_id=CALLER).caller_spiffe_id = "x"  # type: ignore[misc]
