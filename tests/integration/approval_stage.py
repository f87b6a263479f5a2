"""A task on a real broker that waits for its approval, and all who might say something about it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from agentweave_bus import TaskHandle
from agentweave_bus.bus.subjects import control_subject
from agentweave_bus.envelope import Draft, Kind, new_id
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.identity import X509Svid
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.approving import DecisionBody
from agentweave_bus.types import TaskState
from tests.integration.connections import Raw
from tests.integration.probes import CLI, ECHO, FRONT, GRANTS, MIDDLE, OTHER, PATIENCE, Probe
from tests.integration.world import Caller, World
from tests.security.forging import sealed_by

__all__ = ["ApprovalStage", "approval_cast", "approval_stage"]

APPROVED_GRANTS: dict[str, Any] = {
    "grants": [
        {
            "caller": [str(CLI), str(FRONT)],
            "callee": str(ECHO),
            "capabilities": ["work"],
            # MIDDLE is named but no operator; CLI is an operator, and covered by the prefix only.
            "approval": {"by": [str(OTHER), str(MIDDLE), "spiffe://demo.test/client/*"], "within": 600},
        },
        {
            "caller": str(CLI),
            "callee": str(ECHO),
            "capabilities": ["say"],
            "approval": {"by": str(OTHER), "within": 1},
        },
        {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["whoami"]},
    ],
    "operators": [
        {"who": [str(OTHER), str(CLI), str(FRONT)], "may": ["control:approve", "control:reject"]},
        {"who": str(OTHER), "may": ["control:observe"]},
    ],
}


@dataclass
class ApprovalStage:
    """``other`` may approve, ``mallory`` owns the broker."""

    world: World
    echo: Probe
    cli: Caller
    other: Caller
    mallory: Raw
    submitted: list[TaskHandle] = field(default_factory=list)

    async def waiting(self, name: str = "work") -> TaskHandle:
        """A task that waits for its approval: ``work`` for ten minutes, ``say`` for a second."""
        handle = await self.cli.client.submit(str(ECHO), name, {"text": "much"})
        self.submitted.append(handle)
        async with asyncio.timeout(PATIENCE):
            while (await handle.status()).state is not TaskState.AUTH_REQUIRED:  # noqa: ASYNC110 - it is looked for
                await asyncio.sleep(0.02)
        return handle

    def head(self, handle: TaskHandle, verb: str = "approve", **changed: Any) -> dict[str, Any]:
        """What the head of an honest decision would say, but for what is changed."""
        now_ms = clock_ms()
        return {
            "kind": Kind.CONTROL,
            "id": new_id(now_ms),
            "aud": ECHO,
            "cap": verb,
            "sub": control_subject(ECHO, verb),
            "iat": now_ms,
            "exp": now_ms + 30_000,
            "re": bytes.fromhex(handle.digest or ""),
        } | changed

    def says(self, handle: TaskHandle, **changed: Any) -> bytes:
        """Its payload."""
        record = handle._log.records[0].digest.hex()
        said = {"id": handle.id, "cap": "work", "pd": handle._pd, "record": record, "sender": str(CLI)}
        return DecisionBody(**said | changed).encoded()

    @staticmethod
    def sealed(svid: X509Svid, head: dict[str, Any], payload: bytes, *, iss: SpiffeID) -> bytes:
        """Sign any head with a key, in anybody's name."""
        value = map_from_draft(Draft(**head), iss=iss, x5t=svid.x5t, pd=sha256(payload), par=None)
        return sealed_by(svid, pack(value), payload).frame

    async def say(self, frame: bytes, verb: str = "approve") -> None:
        """Have the worker hear a frame, past every permission."""
        await self.mallory.send(control_subject(ECHO, verb), frame)


@pytest.fixture(scope="module")
async def approval_cast(session_world: World) -> AsyncIterator[ApprovalStage]:
    """Everybody, for all tests of a module, with grants of their own."""
    world = session_world
    world.grant(APPROVED_GRANTS)
    await world.stack.in_line()
    try:
        echo = await world.agent(ECHO)
        stage = ApprovalStage(
            world, echo, await world.client(CLI), await world.client(OTHER), await world.raw()
        )
        yield stage
        for handle in stage.submitted:  # under other grants the next agent of this name would run them
            await handle.cancel(timeout=PATIENCE)
    finally:
        world.grant(GRANTS)
        await world.stack.in_line()
        await world.clear()


@pytest.fixture
def approval_stage(approval_cast: ApprovalStage) -> ApprovalStage:
    """The same, with nothing run yet."""
    approval_cast.echo.ran.clear()
    return approval_cast
