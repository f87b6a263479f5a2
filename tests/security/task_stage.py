"""A durable task on a real broker, and somebody who owns that broker and writes what he likes about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus import TaskHandle
from agentweave_bus.bus.streams import progress_stream_name, state_stream_name
from agentweave_bus.bus.subjects import control_subject, progress_subject, record_subject
from agentweave_bus.envelope import Draft, Kind, new_id
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.exceptions import CallTimeoutError
from agentweave_bus.identity import X509Svid
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.controls import CancelBody
from agentweave_bus.tasks.progress import ProgressBody
from agentweave_bus.tasks.record import RECORD_TYPE, RecordBody, TaskRef
from agentweave_bus.types import TaskState
from tests.integration.connections import Raw, heard_within
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.task_probe import TaskProbe
from tests.integration.world import Caller, World, metric
from tests.security.forging import sealed_by

__all__ = ["TaskStage", "stage", "task_cast"]

RESULT = {"status": "completed", "messages": [], "artifacts": [{"type": "data", "data": {"count": 666}}]}


@dataclass
class TaskStage:
    """Submitter, worker and adversary. A task that runs waits for its turns; see :class:`TaskProbe`."""

    world: World
    probe: TaskProbe
    cli: Caller
    mallory: Raw
    before: dict[str, float] = field(default_factory=dict)
    answers: asyncio.Queue[Msg] | None = None

    async def running(self) -> TaskHandle:
        """A task that has begun and waits: ``working`` is its record 0."""
        handle = await self.queued()
        await asyncio.wait_for(self.probe.entered.wait(), PATIENCE)
        return handle

    async def queued(self) -> TaskHandle:
        """A task that is stored; it begins when none runs before it."""
        return await self.cli.client.submit(str(ECHO), "pieces", {"count": 2})

    async def finished(self) -> TaskHandle:
        """A task that has ended, with two messages of progress and two artifacts."""
        handle = await self.running()
        self.probe.take_turns(2)
        assert (await handle.result(PATIENCE)).data == {"count": 2}
        self.probe.entered.clear()
        return handle

    def foreign(self, who: str) -> float:
        """What worker or client have passed over since the test began."""
        now = self._foreign()
        return now[who] - self.before[who]

    def _foreign(self) -> dict[str, float]:
        name = "agentweave_foreign_records_total"
        return {"worker": metric(self.probe.parts, name), "client": metric(self.cli.parts, name)}

    # what the adversary writes

    def record(self, handle: TaskHandle, slot: int, **changed: Any) -> dict[str, Any]:
        """What the head of a record in ``slot`` would say that follows on ``working``."""
        first = handle._log.records[0] if handle._log.records else None
        now_ms = clock_ms()
        return {
            "kind": Kind.RECORD,
            "id": new_id(now_ms),
            "aud": SpiffeID(f"spiffe://{ECHO.trust_domain}"),
            "cap": RECORD_TYPE,
            "sub": record_subject(ECHO, CLI, handle._ref.key, slot),
            "iat": now_ms,
            "exp": now_ms + 60_000,
            "re": bytes.fromhex(handle.digest or ""),
            "seq": 0 if first is None else 1,
            "prev": None if first is None else first.digest,
            "att": 0 if first is None else 1,
        } | changed

    def progress(self, handle: TaskHandle, slot: int, **changed: Any) -> dict[str, Any]:
        """What the head of progress in ``slot`` would say, of which there was none yet."""
        now_ms = clock_ms()
        return {
            "kind": Kind.PROGRESS,
            "id": new_id(now_ms),
            "aud": CLI,
            "cap": "pieces",
            "sub": progress_subject(ECHO, CLI, handle._ref.key, slot),
            "iat": now_ms,
            "exp": now_ms + 60_000,
            "re": bytes.fromhex(handle.digest or ""),
            "seq": 0,
        } | changed

    def cancel(self, handle: TaskHandle, **changed: Any) -> dict[str, Any]:
        """What the head of a cancellation would say."""
        now_ms = clock_ms()
        return {
            "kind": Kind.CONTROL,
            "id": new_id(now_ms),
            "aud": ECHO,
            "cap": "cancel",
            "sub": control_subject(ECHO, "cancel"),
            "iat": now_ms,
            "exp": now_ms + 30_000,
            "re": bytes.fromhex(handle.digest or ""),
        } | changed

    def says(self, handle: TaskHandle, state: TaskState) -> bytes:
        """The payload of a record; one of a completed task has a result that was never made."""
        return self.body(handle, state).encoded()

    @staticmethod
    def body(handle: TaskHandle, state: TaskState, **more: Any) -> RecordBody:
        """What a forged record says."""
        result = RESULT if state is TaskState.COMPLETED else None
        return RecordBody(state=state, pd=handle._pd or "", result=result, message="forged", **more)

    def cancels(self, handle: TaskHandle, **more: Any) -> bytes:
        """The payload of a cancellation."""
        return CancelBody(id=handle.id, cap="pieces", pd=handle._pd or "", reason="forged", **more).encoded()

    @staticmethod
    def tells() -> bytes:
        """The payload of progress that was never made."""
        return ProgressBody(attempt=1, fraction=1.0, message="forged").encoded()

    def sealed(self, svid: X509Svid, head: dict[str, Any], payload: bytes, *, iss: SpiffeID) -> bytes:
        """Sign any head with a key, in anybody's name."""
        value = map_from_draft(Draft(**head), iss=iss, x5t=svid.x5t, pd=sha256(payload), par=None)
        return sealed_by(svid, pack(value), payload).frame

    async def store(self, subject: str, frame: bytes) -> None:
        """Take a slot, as who owns the broker."""
        if self.answers is None:
            self.answers = await self.mallory.listen("probe.slots")
        await self.mallory.send(subject, frame, "probe.slots")
        answer = json.loads((await heard_within(self.answers)).data)
        assert "error" not in answer, answer

    async def stands(self, ref: TaskRef, kind: str, slot: int) -> bytes:
        """What stands in a slot."""
        name, place = {
            "record": (state_stream_name(ECHO), ref.subject(slot)),
            "progress": (progress_stream_name(ECHO), progress_subject(ECHO, CLI, ref.key, slot)),
        }[kind]
        stored = await self.cli.parts.desk.slots.read(name, place)
        assert stored is not None
        return stored.data

    # what must have come of it

    async def nothing_came_of_it(self, handle: TaskHandle) -> None:
        """The submitter believes what it did before, and the task ends as if nothing had been written."""
        with pytest.raises(CallTimeoutError):
            await self.cli.client.task(handle.reference).result(0.1)
        assert not self.probe.cleaned_up.is_set()
        self.probe.take_turns(2)
        assert (await handle.result(PATIENCE)).data == {"count": 2}
        events = [event async for event in self.cli.client.task(handle.reference).events()]
        told = [one.fraction for one in events if one.kind == "progress"]
        assert told == sorted(told)
        assert (told[-1], [one.artifact["data"] for one in events if one.artifact]) == (1.0, [0, 1])
        assert not [one for one in events if one.message == "forged" or one.kind == "gap"]
        assert str(events[-1].state) == "completed"


@pytest.fixture(scope="module")
async def task_cast(session_world: World) -> AsyncIterator[TaskStage]:
    """Everybody, for all tests of a module."""
    world = session_world
    probe = await world.agent(ECHO, TaskProbe)
    assert isinstance(probe, TaskProbe)
    yield TaskStage(world, probe, await world.client(CLI), await world.raw())
    await world.clear()


@pytest.fixture
async def stage(task_cast: TaskStage) -> AsyncIterator[TaskStage]:
    """Nothing runs when a test begins, nor when it has ended."""
    stage, probe = task_cast, task_cast.probe
    for noticed in (probe.entered, probe.cleaned_up):
        noticed.clear()
    while not probe.turns.empty():
        probe.turns.get_nowait()
    probe.ran.clear()
    stage.before = stage._foreign()
    yield stage
    probe.take_turns(8)  # for what a test that failed has left behind
    last = await stage.cli.client.submit(str(ECHO), "pieces", {"count": 0})  # they run one after the other
    await last.result(PATIENCE)
