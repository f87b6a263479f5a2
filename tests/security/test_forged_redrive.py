"""Attack: bringing a task back that has failed, or making believe that it was brought back."""

from __future__ import annotations

import base64

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import dead_stream_name
from agentweave_bus.bus.subjects import call_subject, dead_subject, reply_subject, task_subject
from agentweave_bus.envelope import (
    Kind,
    Link,
    claim_key,
    control_role,
    decode_frame,
    encode_link,
    encode_payload,
)
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import AgentCallError
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.dead_letters import DEAD_TYPE, DeadLetterBody, LetterReference
from agentweave_bus.tasks.record import RECORD_TYPE, RecordBody
from agentweave_bus.types import TaskState
from tests.integration.connections import heard_within, until
from tests.integration.dead_letter_cast import *  # noqa: F403
from tests.integration.probes import DOMAIN, ECHO, FRONT, MALLORY, OPERATOR
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call

pytestmark = pytest.mark.anyio

CONTROL = control_role(DOMAIN)
QUEUE = task_subject(ECHO, "heal")


async def dead_frame(cast, row):
    """What was given up, as it came."""
    place = LetterReference.parse(row["letter"]).subject("frame")
    stands = await cast.probe.parts.desk.slots.read(dead_stream_name(ECHO), place)
    return stands.data


async def original(cast, row):
    """The task as its submitter signed it, out of its dead letter, and its payload."""
    frame = decode_frame(await dead_frame(cast, row))
    return Link(frame.head, frame.proof, frame.chain), frame.payload


async def reissued(cast, row, svid, *, iss=CONTROL, **changes):
    """A redrive that is honest but for who signs it, and ``changes``."""
    link, payload = await original(cast, row)
    now = clock_ms()
    values = {
        "kind": Kind.REISSUE,
        "id": link.head.id,
        "cap": "heal",
        "sub": QUEUE,
        "exp": now + 60_000,
        "reply": None,
        "att": 2,
        "via": (link,),
    }
    return forged_call(svid, iss=iss, payload=payload, **{**values, **changes})


async def nothing_runs(cast, handle, step):
    """It was refused at that step, or let go, and the task has failed as before."""
    if step is not None:
        await cast.world.refusal("echo", step=step.number)
        assert {one["step"] for one in cast.world.refusals("echo")} == {step.number}
    await cast.idle()
    status = await cast.cli.client.task(handle.reference).status()
    assert (status.state, status.attempt) == (TaskState.FAILED, 1)
    assert cast.probe.ran == ["ann"]


@pytest.fixture
async def failed(sickbed):
    """A task that was given up, and would be done if it were begun again."""
    handle, row = await sickbed.given_up("ann")
    sickbed.probe.well = True
    for file in (sickbed.world.folder / "audit").glob("echo*"):
        file.write_text("")
    return sickbed, handle, row


async def sent(cast, frame):
    await cast.mallory.send(QUEUE, frame)


@refused_by(Step.BINDING, "a redrive signed by another agent", by=Adversary.AGENT)
async def test_by_another_agent(failed):
    cast, handle, row = failed
    await sent(cast, (await reissued(cast, row, cast.world.issue(FRONT), iss=FRONT)).frame)
    await nothing_runs(cast, handle, Step.BINDING)


@refused_by(Step.BINDING, "a redrive signed by an operator, past the control role", by=Adversary.CALLER)
async def test_by_the_operator(failed):
    cast, handle, row = failed
    await sent(cast, (await reissued(cast, row, cast.world.issue(OPERATOR), iss=OPERATOR)).frame)
    await nothing_runs(cast, handle, Step.BINDING)


@refused_by(Step.BINDING, "a redrive signed by the agent that gave the task up", by=Adversary.AGENT)
async def test_by_the_agent_itself(failed):
    cast, handle, row = failed
    await sent(cast, (await reissued(cast, row, cast.world.issue(ECHO), iss=ECHO)).frame)
    await nothing_runs(cast, handle, Step.BINDING)


@refused_by(Step.PROOF, "a redrive in the control role's name", by=Adversary.BROKER)
async def test_in_the_control_roles_name(failed):
    cast, handle, row = failed
    await sent(cast, (await reissued(cast, row, cast.mallory.source.svid)).frame)
    await nothing_runs(cast, handle, Step.PROOF)


@refused_by(Step.DELEGATION, "a redrive of a task whose payload is another", by=Adversary.THIEF)
async def test_with_another_payload(failed):
    """Even who has the control role's key can't have done what nobody asked for."""
    cast, handle, row = failed
    link, _ = await original(cast, row)
    payload = encode_payload({"name": "mallory"})
    values = {"kind": Kind.REISSUE, "id": link.head.id, "cap": "heal", "sub": QUEUE, "reply": None, "att": 2}
    frame = forged_call(
        cast.world.issue(CONTROL),
        iss=CONTROL,
        payload=payload,
        via=(link,),
        exp=clock_ms() + 60_000,
        **values,
    ).frame
    await sent(cast, frame)
    await nothing_runs(cast, handle, Step.DELEGATION)


@refused_by(Step.DELEGATION, "a redrive of a task that nobody has asked for", by=Adversary.THIEF)
async def test_of_no_task(failed):
    cast, handle, row = failed
    await sent(cast, (await reissued(cast, row, cast.world.issue(CONTROL), via=())).frame)
    await nothing_runs(cast, handle, Step.DELEGATION)


@pytest.mark.parametrize("attempt", [1, 3, 99])
@refused_by(Step.REPLAY, "a redrive to an attempt that is not the next", by=Adversary.THIEF)
async def test_to_another_attempt(failed, attempt):
    cast, handle, row = failed
    await sent(cast, (await reissued(cast, row, cast.world.issue(CONTROL), att=attempt)).frame)
    await nothing_runs(cast, handle, Step.REPLAY)


@refused_by(Layer.RECORD, "a task that failed, queued again as it was", by=Adversary.CALLER)
async def test_the_task_itself_again(failed):
    cast, handle, row = failed
    await sent(cast, await dead_frame(cast, row))
    await nothing_runs(cast, handle, None)


@refused_by(Layer.RECORD, "a genuine redrive, queued again after it has run", by=Adversary.BROKER)
async def test_again_what_has_run(failed):
    cast, handle, row = failed
    heard = await cast.mallory.listen(QUEUE)
    cast.probe.well = False
    await cast.operator.redrive(row["letter"])
    frame = (await heard_within(heard)).data
    await until(lambda: cast.probe.ran == ["ann", "ann"], "the second attempt")
    await cast.idle()
    cast.probe.well = True
    await sent(cast, frame)
    await cast.idle()
    assert cast.probe.ran == ["ann", "ann"]
    assert (await handle.status()).attempt == 2


async def begun_again(cast, handle, row, *, svid, iss, evidence):
    """Write ``working`` behind ``failed``, as who owns the broker."""
    await handle.status()
    link, _ = await original(cast, row)
    last, now = handle._log.last, clock_ms()
    assert (last.state, last.number) == (TaskState.FAILED, 1)
    body = RecordBody(state=TaskState.WORKING, pd=last.body.pd, redrive=evidence)
    subject = handle._ref.subject(2)
    values = {
        "kind": Kind.RECORD,
        "aud": SpiffeID(f"spiffe://{DOMAIN}"),
        "cap": RECORD_TYPE,
        "sub": subject,
        "exp": now + 60_000,
        "reply": None,
        "re": link.digest,
        "seq": 2,
        "prev": last.digest,
        "att": 2,
    }
    frame = forged_call(svid, iss=iss, payload=body.encoded(), **values).frame
    await cast.mallory.send(subject, frame)
    await cast.mallory.flush()


@pytest.mark.parametrize("who", [MALLORY, FRONT, CONTROL, ECHO], ids=["owner", "agent", "control", "itself"])
@refused_by(
    Layer.RECORD, "a record that a failed task has begun again, without a redrive", by=Adversary.BROKER
)
async def test_a_record_that_it_began_again(failed, who):
    """Nobody can write it: not even the task's agent, whose own key this is in the last case."""
    cast, handle, row = failed
    svid = cast.mallory.source.svid if who == MALLORY else cast.world.issue(who)
    fake = await reissued(cast, row, cast.world.issue(ECHO), iss=ECHO)
    evidence = base64.b64encode(encode_link(fake.link)).decode()
    await begun_again(cast, handle, row, svid=svid, iss=who, evidence=evidence)
    await nothing_runs(cast, handle, None)
    # And it is in nobody's way.
    await cast.operator.redrive(row["letter"])
    await cast.state(handle, TaskState.COMPLETED)


@refused_by(Layer.PERMISSIONS, "asking the control role to redrive, by another agent", by=Adversary.AGENT)
async def test_asking_without_being_an_operator(failed):
    cast, handle, _row = failed
    raw = await cast.world.raw(FRONT)
    await raw.send(call_subject(CONTROL, "dlq_redrive"), b"x")
    await until(lambda: bool(raw.refused), "the broker's refusal")
    await nothing_runs(cast, handle, None)


def asked(svid, iss, letter, **changes):
    """A call to the control role, with the reply subject that belongs to it."""
    subject = call_subject(CONTROL, "dlq_redrive")
    values = {"aud": CONTROL, "cap": "dlq_redrive", "sub": subject, "reply": "A" * 22, **changes}
    return forged_call(svid, iss=iss, payload=encode_payload({"letter": letter}), **values)


async def ask(cast, sealed, iss):
    reply = reply_subject(iss, sealed.head.reply, sealed.head.id)
    await cast.mallory.send(sealed.head.sub, sealed.frame, reply)


@refused_by(Step.AUTHORIZATION, "asking the control role past the broker's permissions", by=Adversary.BROKER)
async def test_asking_past_the_broker(failed):
    cast, handle, row = failed
    sealed = asked(cast.world.issue(FRONT), FRONT, row["letter"])
    await ask(cast, sealed, FRONT)
    refused = await cast.refusal(digest=sealed.digest.hex())
    assert (refused["step"], refused["action"]) == (Step.AUTHORIZATION.number, "control:redrive")
    await nothing_runs(cast, handle, None)


@refused_by(Step.PROOF, "asking the control role in an operator's name", by=Adversary.BROKER)
async def test_asking_in_an_operators_name(failed):
    cast, handle, row = failed
    before = len(cast.control_audit(event="refusal", step=Step.PROOF.number))
    await ask(cast, asked(cast.mallory.source.svid, OPERATOR, row["letter"]), OPERATOR)
    await until(
        lambda: len(cast.control_audit(event="refusal", step=Step.PROOF.number)) > before, "the refusal"
    )
    await nothing_runs(cast, handle, None)


@refused_by(Step.REPLAY, "an operator's own request, sent again", by=Adversary.BROKER)
async def test_an_operators_request_again(failed):
    cast, handle, row = failed
    heard = await cast.mallory.listen(call_subject(CONTROL, "dlq_redrive"))
    await cast.operator.redrive(row["letter"])
    message = await heard_within(heard)
    await cast.state(handle, TaskState.COMPLETED)
    await cast.mallory.send(message.subject, message.data, message.reply)
    refused = await cast.refusal(step=Step.REPLAY.number)
    assert refused["cap"] == "dlq_redrive"
    assert len(cast.control_audit(event="reissue", letter=row["letter"])) == 1


def letter_of(svid, iss, key, frame, *, task=None):
    """A dead letter's record that was never written by who may."""
    now = clock_ms()
    body = DeadLetterBody(
        reason="forged",
        frame=sha256(frame).hex(),
        stored_at=now,
        given_up_at=now,
        delivered=1,
        attempts=1,
        task=task,
    )
    values = {
        "kind": Kind.RECORD,
        "aud": SpiffeID(f"spiffe://{DOMAIN}"),
        "cap": DEAD_TYPE,
        "sub": dead_subject(ECHO, "heal", key, 1, "record"),
        "exp": now + 60_000,
        "reply": None,
        "att": 1,
    }
    payload = encode_payload(body.model_dump(mode="json", exclude_none=True))
    return forged_call(svid, iss=iss, payload=payload, **values).frame


async def planted(cast, svid, iss, frame, *, task=None, key=None):
    key = sha256(frame).hex() if key is None else key
    record = letter_of(svid, iss, key, frame, task=task)
    await cast.mallory.send(dead_subject(ECHO, "heal", key, 1, "frame"), frame)
    await cast.mallory.send(dead_subject(ECHO, "heal", key, 1, "record"), record)
    await cast.mallory.flush()
    return f"{ECHO}#heal/{key}.1"


@refused_by(Layer.CONTROL, "a dead letter that its agent has not written", by=Adversary.BROKER)
async def test_a_planted_dead_letter(sickbed):
    cast = sickbed
    letter = await planted(cast, cast.world.issue(FRONT), FRONT, b"by another agent")
    (row,) = [one for one in await cast.letters() if one["letter"] == letter]
    assert row["state"] == "doubtful"
    with pytest.raises(AgentCallError, match="its record is not believed"):
        await cast.operator.redrive(letter)


@refused_by(
    Layer.CONTROL, "a dead letter, by its agent's stolen key, of a task that never was", by=Adversary.THIEF
)
async def test_a_dead_letter_of_a_task_that_never_was(sickbed):
    """A task that the thief asks for himself, as another: nothing says that it has failed."""
    cast = sickbed
    link = forged_call(
        cast.mallory.source.svid, iss=MALLORY, kind=Kind.TASK, cap="heal", sub=QUEUE, reply=None,
        payload=encode_payload({"name": "mallory"}),
    )  # fmt: skip
    task = {"id": link.head.id, "sender": str(MALLORY), "capability": "heal"}
    key = claim_key(MALLORY, ECHO, "heal", link.head.id)
    letter = await planted(cast, cast.world.issue(ECHO), ECHO, link.frame, task=task, key=key)
    with pytest.raises(AgentCallError, match="nothing is recorded of the task"):
        await cast.operator.redrive(letter)
    assert cast.probe.ran == []


@refused_by(Layer.CONTROL, "a dead letter of somebody else's task, as one's own", by=Adversary.THIEF)
async def test_a_dead_letter_that_says_another_task(failed):
    """The frame is genuine, and the record names another sender than it has."""
    cast, handle, row = failed
    link, _payload = await original(cast, row)
    task = {"id": link.head.id, "sender": str(FRONT), "capability": "heal"}
    key = claim_key(FRONT, ECHO, "heal", link.head.id)
    letter = await planted(
        cast, cast.world.issue(ECHO), ECHO, await dead_frame(cast, row), task=task, key=key
    )
    with pytest.raises(AgentCallError, match="another task than its record says"):
        await cast.operator.redrive(letter)
    await nothing_runs(cast, handle, None)


@refused_by(Layer.CONTROL, "a genuine dead letter's record, copied to another place", by=Adversary.BROKER)
async def test_a_copied_dead_letter(failed):
    cast, _handle, row = failed
    copied = LetterReference(ECHO, "heal", "c" * 64, 1)
    slots = cast.probe.parts.desk.slots
    genuine = LetterReference.parse(row["letter"])
    for part in ("frame", "record"):
        stands = await slots.read(dead_stream_name(ECHO), genuine.subject(part))
        await cast.mallory.send(copied.subject(part), stands.data)
    await cast.mallory.flush()
    (listed,) = [one for one in await cast.letters() if one["letter"] == str(copied)]
    assert listed["state"] == "doubtful"
    with pytest.raises(AgentCallError, match="its record is not believed"):
        await cast.operator.redrive(str(copied))


@refused_by(Layer.CONTROL, "a record that a dead letter was dropped, by its own agent", by=Adversary.AGENT)
async def test_dropped_by_who_may_not(failed):
    cast, _handle, row = failed
    place = LetterReference.parse(row["letter"]).subject("dropped")
    values = {
        "kind": Kind.RECORD,
        "aud": SpiffeID(f"spiffe://{DOMAIN}"),
        "cap": "task.dropped",
        "sub": place,
        "exp": clock_ms() + 60_000,
        "reply": None,
        "att": 1,
    }
    payload = encode_payload({"by": str(OPERATOR), "reason": "forged"})
    frame = forged_call(cast.world.issue(ECHO), iss=ECHO, payload=payload, **values).frame
    await cast.mallory.send(place, frame)
    await cast.mallory.flush()
    assert row["letter"] in {one["letter"] for one in await cast.letters()}
    with pytest.raises(AgentCallError, match="something else stands"):
        await cast.operator.drop(row["letter"])


async def test_the_same_but_genuine(failed):
    """Honest: nothing but what is forged keeps the others out."""
    cast, handle, row = failed
    await sent(cast, (await reissued(cast, row, cast.world.issue(CONTROL))).frame)
    await cast.state(handle, TaskState.COMPLETED)
    assert cast.probe.ran == ["ann", "ann"]
