"""Attack: references to large payloads, and what lies behind them.

The sender is somebody who may submit tasks and has a library of his own: he signs whatever reference he likes,
and stores whatever he likes under his own prefix. Who owns the broker stores under anybody's. In no case does a
handler run with something else than all of what was signed, nor does an agent fetch for somebody what that one
may not read himself.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import blob_stream_name
from agentweave_bus.bus.subjects import api_inbox, blob_subject, blobs_of, reply_subject, task_subject
from agentweave_bus.client import TaskOptions
from agentweave_bus.envelope import Draft, Kind, Sealed, encode_payload, new_id
from agentweave_bus.envelope.blob import BLOB_CONTENT_TYPE, CHUNK_BYTES, WIDE_LIMITS, BlobReference
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.exceptions import CallRefusedError, CallTimeoutError
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.submission import Submission
from tests.integration.connections import Raw, heard_within, until
from tests.integration.probes import CLI, ECHO, FRONT, PATIENCE, Probe
from tests.integration.world import Caller, World
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, sealed_by

pytestmark = pytest.mark.anyio

DATA = encode_payload({"text": "d" * 700_000})
CHUNKS = [DATA[:CHUNK_BYTES], DATA[CHUNK_BYTES:]]
TOKEN = "B" * 22


async def recorded(_sealed: object) -> None:
    """Stands for an audit log."""


@dataclass
class BlobStage:
    """A submitter who may do what he likes with his own key, a worker, and who owns the broker."""

    world: World
    echo: Probe
    cli: Caller
    mallory: Raw
    turn: int = 0
    fetched: int = 0

    def reference(self, data: bytes = DATA) -> BlobReference:
        """A reference whose place is used by this test alone."""
        self.turn += 1
        return BlobReference.of(data, f"attack {self.turn}")

    async def store(self, reference: BlobReference, chunks: list[bytes], writer: SpiffeID = CLI) -> None:
        """Store anything where the chunks of a reference belong, as who owns the broker."""
        answers = await self.mallory.listen(f"probe.blobs.{self.turn}")
        for number, chunk in enumerate(chunks):
            subject = blob_subject(writer, ECHO, reference.key, number)
            await self.mallory.send(subject, chunk, f"probe.blobs.{self.turn}")
            assert "error" not in json.loads((await heard_within(answers)).data)

    async def submit(self, reference: Any, **changed: Any) -> TaskHandle:
        """Submit a task to ``work`` whose payload is a reference, or anything that says it were one."""
        payload = reference if isinstance(reference, bytes) else encode_payload(said(reference))
        now_ms = clock_ms()
        values: dict[str, Any] = {
            "agent": ECHO,
            "capability": "work",
            "payload": payload,
            "id": new_id(now_ms),
            "expires_ms": now_ms + 60_000,
            "content_type": BLOB_CONTENT_TYPE,
        } | changed
        parts = self.cli.parts
        task = Submission(**values)
        assert parts.client.submissions is not None
        (sealed,) = await parts.client.submissions.store([task], recorded, timeout_s=PATIENCE)
        assert isinstance(sealed, Sealed)
        ref = TaskRef(ECHO, CLI, task.capability, task.id)
        return parts.handles.of(ref, sealed.digest, sealed.head.pd, sealed.head.exp)

    async def rejected(self, handle: TaskHandle, words: str) -> None:
        """The task ends, its handler has not run, and its sender is told why."""
        with pytest.raises(CallRefusedError, match=words) as caught:
            await handle.result(PATIENCE)
        assert caught.value.step == "payload"
        assert self.echo.ran == []

    async def stays_missing(self, handle: TaskHandle) -> None:
        """The worker finds nothing, gives the task back, and has not run it."""
        words = "refused at step 10 (payload): chunk 0 of a large payload is not there"
        reason = words.partition(": ")[2]
        await until(
            lambda: any(
                one["reason"] == reason and one["id"] == handle.id for one in self.world.refusals("echo")
            ),
            "a refusal",
        )
        with pytest.raises(CallTimeoutError):
            await handle.result(0.1)
        assert self.echo.ran == []
        await handle.cancel()


def said(reference: Any) -> Any:
    return reference.to_json() if isinstance(reference, BlobReference) else reference


@pytest.fixture(scope="module")
async def cast(session_world: World) -> AsyncIterator[BlobStage]:
    world = session_world
    stage = BlobStage(world, await world.agent(ECHO), await world.client(CLI), await world.raw())
    handle = await stage.cli.client.submit(str(ECHO), "work", {"text": "x" * 1_000_000})
    await handle.result(PATIENCE)  # now there is a stream for the client's
    blobs = stage.echo.parts.desk.blobs
    assert blobs is not None
    fetch = blobs.fetch

    async def counted(*args: Any, **options: Any) -> bytes:
        stage.fetched += 1
        return await fetch(*args, **options)

    blobs.fetch = counted  # type: ignore[method-assign]
    yield stage
    await world.clear()


@pytest.fixture
def stage(cast: BlobStage) -> BlobStage:
    cast.echo.ran.clear()
    cast.fetched = 0
    return cast


async def test_the_reference_as_it_should_be(stage: BlobStage) -> None:
    """Honest: what the attacks here change runs when nothing is changed."""
    reference = stage.reference()
    await stage.store(reference, CHUNKS)
    handle = await stage.submit(reference)
    assert (await handle.result(PATIENCE)).data == {"worked": "d" * 700_000}
    assert stage.fetched == 1


@refused_by(Step.PAYLOAD, "a chunk of a large payload with a byte altered", by=Adversary.BROKER)
async def test_an_altered_chunk(stage: BlobStage) -> None:
    reference = stage.reference()
    await stage.store(reference, [CHUNKS[0], CHUNKS[1][:-1] + b"e"])
    await stage.rejected(await stage.submit(reference), "chunk 1 of a large payload is not what was signed")


@refused_by(Step.PAYLOAD, "chunks of a large payload in another order", by=Adversary.BROKER)
async def test_chunks_in_another_order(stage: BlobStage) -> None:
    data = DATA[:-7] + b"d" * (2 * CHUNK_BYTES - len(DATA) + 7)
    chunks = [data[:CHUNK_BYTES], data[CHUNK_BYTES:]]
    reference = stage.reference(data)
    await stage.store(reference, chunks[::-1])
    await stage.rejected(await stage.submit(reference), "chunk 0 of a large payload is not what was signed")


@refused_by(Step.PAYLOAD, "a chunk of another large payload of the same sender", by=Adversary.BROKER)
async def test_a_chunk_of_another_one(stage: BlobStage) -> None:
    other = encode_payload({"text": "f" * 700_000})
    reference = stage.reference()
    await stage.store(reference, [CHUNKS[0], other[CHUNK_BYTES:]])
    await stage.rejected(await stage.submit(reference), "chunk 1 of a large payload is not what was signed")


@refused_by(Step.PAYLOAD, "a large payload whose last chunk is cut short", by=Adversary.BROKER)
async def test_a_chunk_cut_short(stage: BlobStage) -> None:
    reference = stage.reference()
    await stage.store(reference, [CHUNKS[0], CHUNKS[1][:-1]])
    await stage.rejected(await stage.submit(reference), "chunk 1 of a large payload is not what was signed")


@refused_by(
    Step.PAYLOAD, "chunks that are as signed, and a digest of the whole that is not", by=Adversary.CALLER
)
async def test_another_whole(stage: BlobStage) -> None:
    reference = stage.reference()._replace(digest=sha256(b"another"))
    await stage.store(reference, CHUNKS)
    await stage.rejected(await stage.submit(reference), "the whole is not")


def _changed(reference: BlobReference, **changes: Any) -> dict[str, Any]:
    return reference.to_json() | changes


LIES: dict[str, Any] = {
    "smaller than its chunks": lambda one: _changed(one, size=CHUNK_BYTES),
    "larger than its chunks": lambda one: _changed(one, size=4 * CHUNK_BYTES),
    "nothing": lambda one: _changed(one, size=0, chunks=[]),
    "negative": lambda one: _changed(one, size=-1),
    "a truth value": lambda one: _changed(one, size=True),
    "a fraction": lambda one: _changed(one, size=7e5),
    "terabytes": lambda one: _changed(one, size=2**40),
    "terabytes in one chunk": lambda one: _changed(
        one, size=2**40, chunk=2**40, chunks=one.to_json()["chunks"][:1]
    ),
    "a chunk of one byte": lambda one: _changed(one, size=2, chunk=1),
    "large chunks": lambda one: _changed(one, chunk=2 * CHUNK_BYTES, chunks=one.to_json()["chunks"][:1]),
    "many chunks": lambda one: _changed(one, chunk=4096, size=5000 * 4096, chunks=["0" * 64] * 5000),
    "a key that is a pattern": lambda one: _changed(one, key=">"),
    "a key with more tokens": lambda one: _changed(one, key=f"{'0' * 60}.0.*"),
    "digests that are none": lambda one: _changed(one, chunks=["x" * 64] * 2),
    "one more key": lambda one: _changed(one, writer=str(FRONT)),
    "no object": lambda _: [1],
    "no value": lambda _: b"\xc1",
    "another version": lambda one: _changed(one, v=2),
}


@pytest.mark.parametrize("lie", LIES)
@refused_by(
    Step.PAYLOAD, "a reference to a large payload that contradicts itself or a bound", by=Adversary.CALLER
)
async def test_a_reference_that_lies(stage: BlobStage, lie: str) -> None:
    reference = stage.reference()
    handle = await stage.submit(LIES[lie](reference))
    await stage.rejected(handle, "a reference|a payload of")
    assert stage.fetched == 0


@refused_by(
    Step.PAYLOAD,
    "a reference to a large payload that another sender stored for this agent",
    by=Adversary.CALLER,
)
async def test_a_reference_to_anothers(stage: BlobStage) -> None:
    front = await stage.world.agent(FRONT)
    handle = await front.parts.client.submit(str(ECHO), "work", {"text": "x" * 1_000_000}, TaskOptions())
    await front.parts.handles.of(*handle).result(PATIENCE)
    stage.echo.ran.clear()
    theirs = BlobReference.of(
        encode_payload({"text": "x" * 1_000_000}, WIDE_LIMITS), f"task {handle.ref.key}"
    )
    stands = await stage.echo.parts.desk.slots.read(
        blob_stream_name(FRONT), blob_subject(FRONT, ECHO, theirs.key, 0)
    )
    assert stands is not None
    await stage.stays_missing(await stage.submit(theirs))


@refused_by(Step.PAYLOAD, "a reference to what the agent itself has stored for others", by=Adversary.CALLER)
async def test_a_reference_to_the_agents_own(stage: BlobStage) -> None:
    blobs = stage.echo.parts.desk.blobs
    assert blobs is not None
    own = await blobs.put(ECHO, DATA, "a step's result", timeout_s=PATIENCE)
    await stage.stays_missing(await stage.submit(own))


@refused_by(
    Step.AUTHORIZATION, "a large payload of a sender without a grant, to be fetched", by=Adversary.AGENT
)
async def test_nothing_is_fetched_for_who_has_no_grant(stage: BlobStage) -> None:
    """It may submit other things to this agent, so it may store large payloads for it."""
    svid, now_ms = stage.world.issue(FRONT), clock_ms()
    payload = stage.reference().encoded()
    draft = Draft(
        kind=Kind.TASK,
        id=new_id(now_ms),
        aud=ECHO,
        cap="huge",
        sub=task_subject(ECHO, "huge"),
        iat=now_ms,
        exp=now_ms + 60_000,
        ct=BLOB_CONTENT_TYPE,
    )
    head = map_from_draft(draft, iss=FRONT, x5t=svid.x5t, pd=sha256(payload), par=None)
    await stage.mallory.send(draft["sub"], sealed_by(svid, pack(head), payload).frame)
    refusal = await stage.world.refusal("echo", id=draft["id"])
    assert (refusal["step_name"], stage.fetched) == ("authorization", 0)
    assert "neither a grant nor a standing answer" in refusal["reason"]


@refused_by(Step.BINDING, "a call whose payload is a reference", by=Adversary.CALLER)
async def test_a_reference_in_a_call(stage: BlobStage) -> None:
    reference = stage.reference()
    await stage.store(reference, CHUNKS)
    raw = await stage.world.raw(CLI)
    payload = reference.encoded()
    sealed = forged_call(raw.source.svid, payload=payload, ct=BLOB_CONTENT_TYPE, reply=TOKEN)
    await raw.send(sealed.head.sub, sealed.frame, reply_subject(CLI, TOKEN, sealed.head.id))
    refusal = await stage.world.refusal("echo", id=sealed.head.id)
    assert (refusal["step_name"], stage.fetched, stage.echo.ran) == ("binding", 0, [])


@pytest.mark.parametrize("act", ["read", "write"])
@refused_by(Layer.PERMISSIONS, "reading or writing the large payloads of others", by=Adversary.AGENT)
async def test_what_others_stored(stage: BlobStage, act: str) -> None:
    reference = stage.reference()
    await stage.store(reference, CHUNKS)
    front = await stage.world.raw(FRONT)
    subject = blob_subject(CLI, ECHO, reference.key, 0 if act == "read" else 2)
    place = f"$JS.API.DIRECT.GET.{blob_stream_name(CLI)}.{subject}" if act == "read" else subject
    inbox = f"{api_inbox(FRONT, TOKEN)}.x"
    assert "permissions violation" in (await front.denied(front.send(place, b"", inbox))).lower()


HEADERS = {
    "rollup of all": {"Nats-Rollup": "all"},
    "rollup of the subject": {"Nats-Rollup": "sub"},
    "time to live": {"Nats-TTL": "1s"},
    "a schedule": {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": "aw.dead.x"},
    "counting": {"Nats-Incr": "+1"},
    "a batch": {"Nats-Batch-Id": "b", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"},
}


@pytest.mark.parametrize("weapon", HEADERS)
@refused_by(
    Layer.STREAM, "a header that empties, expires or schedules, on large payloads", by=Adversary.CALLER
)
async def test_headers(stage: BlobStage, weapon: str) -> None:
    reference = stage.reference()
    await stage.store(reference, CHUNKS)
    mine = await stage.world.raw(CLI)
    answers = await mine.listen(f"{api_inbox(CLI, TOKEN)}.*")
    for key in (reference.key, "e" * 64):  # a slot that is taken, and one that is free
        subject = f"{blobs_of(CLI, ECHO)}.{key}.0"
        await mine.send(subject, b"another", f"{api_inbox(CLI, TOKEN)}.x", HEADERS[weapon])
        assert "error" in json.loads((await heard_within(answers)).data)
    handle = await stage.submit(reference)
    assert (await handle.result(PATIENCE)).data == {"worked": "d" * 700_000}


@refused_by(Layer.RECORD, "something else in the slot in which a result would be stored", by=Adversary.BROKER)
async def test_a_result_whose_place_is_taken(stage: BlobStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent stores it elsewhere, and says so in its record."""
    blobs = stage.echo.parts.desk.blobs
    assert blobs is not None
    await blobs.put(CLI, b"now there is a stream", "a stream", timeout_s=PATIENCE)
    write, taken = blobs._slots.write, []

    async def late(stream: str, subject: str, frame: bytes, **options: Any) -> Any:
        if subject.startswith(blobs_of(ECHO, CLI)) and not taken:
            taken.append(subject)
            await stage.mallory.send(subject, b"forged")
        return await write(stream, subject, frame, **options)

    monkeypatch.setattr(blobs._slots, "write", late)
    text = "r" * 1_000_000
    handle = await stage.cli.client.submit(str(ECHO), "work", {"text": text})
    assert (await handle.result(PATIENCE)).data == {"worked": text}
    stands = await stage.cli.parts.desk.slots.read(blob_stream_name(ECHO), taken[0])
    assert stands is not None
    assert stands.data == b"forged"


@refused_by(Layer.RECORD, "a result whose chunks another one has altered", by=Adversary.BROKER)
async def test_an_altered_result(stage: BlobStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the broker itself can do: it gives out other bytes than were stored."""
    handle = await stage.cli.client.submit(str(ECHO), "work", {"text": "r" * 1_000_000})
    slots = stage.cli.parts.desk.slots
    read = slots.read

    async def false(stream: str, subject: str, **options: Any) -> Any:
        stands = await read(stream, subject, **options)
        altered = stands is not None and stream == blob_stream_name(ECHO)
        return stands._replace(data=stands.data[::-1]) if altered and stands is not None else stands

    monkeypatch.setattr(slots, "read", false)
    with pytest.raises(CallRefusedError, match="is not what was signed"):
        await handle.result(PATIENCE)
