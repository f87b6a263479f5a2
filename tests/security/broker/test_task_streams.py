"""Attack: what agents could do to the streams of durable tasks, their own and others'.

The streams are echo's, made as the control role makes them when echo announces itself. Everything is tried
by who may publish there (headers), and by who may not (the rest).
"""

from __future__ import annotations

import json

import pytest

from agentweave_bus.bus.streams import (
    dead_stream_name,
    progress_stream_name,
    state_stream_name,
    task_consumer,
    task_streams,
    tasks_stream_name,
)
from agentweave_bus.bus.subjects import (
    announce_subject,
    api_inbox,
    control_subject,
    dead_subject,
    progress_subject,
    pull_inbox,
    record_subject,
    records_of_sender,
    reply_inbox,
    step_subject,
    task_subject,
)
from tests.integration.announcing import announce, asked, consumer_info, served
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE, OTHER
from tests.security.broker.test_stream_headers import UNWANTED
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

TOKEN = "C" * 22
KEY = "0b" * 32
FREE = "0c" * 32
CONSUMER = task_consumer(ECHO, "work")

STREAMS = {
    "tasks": (CLI, lambda _key: task_subject(ECHO, "work")),
    "states": (ECHO, lambda key: record_subject(ECHO, CLI, key, 0)),
    "progress": (ECHO, lambda key: progress_subject(ECHO, CLI, key, 0)),
    "dead": (ECHO, lambda key: dead_subject(ECHO, "work", key, 0, "frame")),
}
NAMES = {
    "tasks": tasks_stream_name(ECHO),
    "states": state_stream_name(ECHO),
    "progress": progress_stream_name(ECHO),
    "dead": dead_stream_name(ECHO),
}
HEADERS = {
    **UNWANTED,
    "another stream": {"Nats-Expected-Stream": "tasks-x"},
    "key-value purge": {"KV-Operation": "PURGE", "Nats-Rollup": "sub"},
}


class Stage:
    """Connections of those who take part, and what they hear of JetStream."""

    def __init__(self, raws, answers, mallory):
        self.raws = raws
        self.answers = answers
        self.mallory = mallory

    async def publish(self, who, subject, headers=None, data=b"x" * 40):
        await self.raws[who].send(subject, data, f"{api_inbox(who, TOKEN)}.x", headers)
        return json.loads((await heard_within(self.answers[who])).data)

    async def contents(self, stream):
        state = (await asked(self.mallory, f"$JS.API.STREAM.INFO.{stream}"))["state"]
        return {
            name: state.get(name) for name in ("messages", "bytes", "first_seq", "last_seq", "num_deleted")
        }


@pytest.fixture(scope="module")
async def stage(session_world):
    """Echo serves ``work``; in each of its streams something of CLI's stands, and a record of OTHER's."""
    raws, answers = {}, {}
    for one in (ECHO, CLI, FRONT, MIDDLE, OTHER):
        raws[one] = await session_world.raw(one)
        answers[one] = await raws[one].listen(f"{api_inbox(one, TOKEN)}.*")
    stage = Stage(raws, answers, await session_world.raw())
    await announce(raws[ECHO], ECHO, "work")
    await served(stage.mallory, ECHO, "work")
    for who, subject in STREAMS.values():
        assert (await stage.publish(who, subject(KEY)))["seq"] > 0
    assert (await stage.publish(ECHO, record_subject(ECHO, FRONT, KEY, 0)))["seq"] > 0
    yield stage
    # What was queued here is no envelope, and not for workers of other tests.
    await asked(stage.mallory, f"$JS.API.STREAM.DELETE.{NAMES['tasks']}")
    await session_world.clear()


@refused_by(
    Layer.STREAM,
    "a JetStream header that works on a queue, or on a log of states, progress or dead letters",
    by=Adversary.AGENT,
)
@pytest.mark.parametrize("name", list(HEADERS))
@pytest.mark.parametrize("stream", list(STREAMS))
async def test_headers(stage, stream, name):
    """By the very agents that may publish there: on what stands, and on a subject that is free."""
    who, subject = STREAMS[stream]
    heard = await stage.mallory.listen("aw.dead.x")
    before = await stage.contents(NAMES[stream])
    for key in (KEY, FREE):
        for data in (b"", b"x" * 40):
            answer = await stage.publish(who, subject(key), HEADERS[name], data)
            assert answer["error"]["err_code"] > 0
    assert await stage.contents(NAMES[stream]) == before
    assert heard.empty()


@refused_by(Layer.STREAM, "writing a record, progress or a dead letter a second time", by=Adversary.AGENT)
@pytest.mark.parametrize("stream", ["states", "progress", "dead"])
async def test_a_slot_that_is_taken(stage, stream):
    who, subject = STREAMS[stream]
    before = await stage.contents(NAMES[stream])
    for headers in (None, {"Nats-Msg-Id": "new"}, {"Nats-Expected-Last-Subject-Sequence": "1"}):
        answer = await stage.publish(who, subject(KEY), headers, b"another outcome")
        assert answer["error"]["err_code"] in {10077, 10071}
    assert await stage.contents(NAMES[stream]) == before


@refused_by(
    Layer.PERMISSIONS,
    "publishing into the tasks, states, progress or dead letters of others",
    by=Adversary.AGENT,
)
@pytest.mark.parametrize("who", [CLI, FRONT, OTHER], ids=["submitter", "another submitter", "other"])
async def test_writing_for_others(stage, who):
    raw = stage.raws[who]
    subjects = [subject(FREE) for writer, subject in STREAMS.values() if writer == ECHO]
    subjects += [
        record_subject(ECHO, who, FREE, 0),
        step_subject(ECHO, FREE, "charge"),
        announce_subject(ECHO),
        control_subject(ECHO, "approve"),
        control_subject(ECHO, "reject"),
    ]
    if who == FRONT:
        subjects.append(task_subject(ECHO, "block"))  # granted others
    if who == OTHER:
        subjects += [task_subject(ECHO, "work"), control_subject(ECHO, "cancel")]
    for subject in subjects:
        said = await raw.denied(raw.client.publish(subject, b"x"))
        assert f'"{subject.lower()}"' in said


async def got(stage, who, stream, subject, body=b""):
    """What a direct get answers: its data and status."""
    await stage.raws[who].send(f"$JS.API.DIRECT.GET.{stream}.{subject}", body, f"{api_inbox(who, TOKEN)}.x")
    answer = await heard_within(stage.answers[who])
    return answer.data, (answer.headers or {}).get("Status")


async def test_a_submitter_reads_what_was_recorded_for_it(stage):
    """Honest: and so does the agent that recorded it."""
    mine = record_subject(ECHO, CLI, KEY, 0)
    assert await got(stage, CLI, NAMES["states"], mine) == (b"x" * 40, None)
    assert await got(stage, ECHO, NAMES["states"], mine) == (b"x" * 40, None)
    assert await got(stage, CLI, NAMES["progress"], progress_subject(ECHO, CLI, KEY, 0)) == (b"x" * 40, None)
    assert (await got(stage, CLI, NAMES["states"], record_subject(ECHO, CLI, KEY, 1)))[1] == "404"


@refused_by(Layer.PERMISSIONS, "reading what was recorded of another's task", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [CLI, OTHER], ids=["another submitter", "other"])
async def test_reading_what_is_anothers(stage, who):
    raw, states = stage.raws[who], NAMES["states"]
    theirs = record_subject(ECHO, FRONT, KEY, 0)
    prefix = theirs.rpartition(f".{KEY}")[0]
    for subject in (
        f"{states}.{theirs}",
        f"{states}.{prefix}.>",
        f"{states}.aw.state.>",
        f"{states}.>",
        states,
        f"{states}.{step_subject(ECHO, KEY, 'charge')}",
        f"{NAMES['progress']}.{progress_subject(ECHO, FRONT, KEY, 0)}",
        f"{NAMES['dead']}.{dead_subject(ECHO, 'work', KEY, 0, 'frame')}",
        f"{NAMES['tasks']}.{task_subject(ECHO, 'work')}",
    ):
        asks = f"$JS.API.DIRECT.GET.{subject}"
        said = await raw.denied(raw.client.publish(asks, b"", f"{api_inbox(who, TOKEN)}.x"))
        assert f'"{asks.lower()}"' in said
    for subject in (
        "aw.state.>",
        records_of_sender(FRONT),
        theirs,
        "aw.progress.>",
        "aw.dead.>",
        "aw.task.>",
    ):
        said = await raw.denied(raw.client.subscribe(subject))
        assert f'"{subject.lower()}"' in said


BODIES = {
    "a sequence": {"seq": 1},
    "another's subject": {"last_by_subj": record_subject(ECHO, FRONT, KEY, 0)},
    "what follows": {"next_by_subj": ">", "seq": 1},
    "many": {"multi_last": [">"], "batch": 100},
    "a batch": {"next_by_subj": ">", "seq": 1, "batch": 100},
}


@refused_by(
    Layer.STREAM,
    "asking on one's own subject, in the words of the request, for what is another's",
    by=Adversary.AGENT,
)
@pytest.mark.parametrize("name", list(BODIES))
async def test_reading_past_the_subject(stage, name):
    """The subject that may be asked on decides, whatever the request's body says."""
    body = json.dumps(BODIES[name]).encode()
    mine = record_subject(ECHO, CLI, KEY, 0)
    data, status = await got(stage, CLI, NAMES["states"], mine, body)
    assert (data, status) == (b"", "408")
    assert stage.answers[CLI].empty()


PLACE = f"{CONSUMER.stream}.{CONSUMER.name}"
TAP = {"stream_name": CONSUMER.stream, "config": {**CONSUMER.config, "durable_name": "tap", "name": "tap"}}
REQUESTS = {
    "pull": (f"$JS.API.CONSUMER.MSG.NEXT.{PLACE}", {"batch": 1}),
    "acknowledge": (f"$JS.ACK.{PLACE}.1.1.1.1.0", None),
    "terminate": (f"$JS.ACK.{PLACE}.1.1.1.1.0", b"+TERM"),
    "look at it": (f"$JS.API.CONSUMER.INFO.{PLACE}", {}),
    "make a consumer": (f"$JS.API.CONSUMER.CREATE.{CONSUMER.stream}.tap", TAP),
    "make a durable one": (f"$JS.API.CONSUMER.DURABLE.CREATE.{CONSUMER.stream}.tap", TAP),
    "make one that watches": (
        f"$JS.API.CONSUMER.CREATE.{NAMES['states']}",
        {"config": {"deliver_subject": "x"}},
    ),
    "change it": (
        f"$JS.API.CONSUMER.CREATE.{PLACE}",
        {"stream_name": CONSUMER.stream, "config": CONSUMER.config},
    ),
    "pause it": (f"$JS.API.CONSUMER.PAUSE.{PLACE}", {"pause_until": "2040-01-01T00:00:00Z"}),
    "reset it": (f"$JS.API.CONSUMER.RESET.{PLACE}", {}),
    "unpin it": (f"$JS.API.CONSUMER.UNPIN.{PLACE}", {"group": "x"}),
    "delete it": (f"$JS.API.CONSUMER.DELETE.{PLACE}", {}),
    "delete the queue": (f"$JS.API.STREAM.DELETE.{CONSUMER.stream}", {}),
    "purge the queue": (f"$JS.API.STREAM.PURGE.{CONSUMER.stream}", {}),
    "purge the states": (f"$JS.API.STREAM.PURGE.{NAMES['states']}", {}),
    "read the queue": (f"$JS.API.STREAM.MSG.GET.{CONSUMER.stream}", {"seq": 1}),
    "read the states": (f"$JS.API.STREAM.MSG.GET.{NAMES['states']}", {"seq": 1}),
    "change the states": (f"$JS.API.STREAM.UPDATE.{NAMES['states']}", task_streams(ECHO)[0].config),
}
OWN = frozenset({"pull", "acknowledge", "terminate", "look at it"})


@refused_by(
    Layer.PERMISSIONS,
    "pulling, acknowledging or tapping another's tasks, or making and changing consumers, also one's own",
    by=Adversary.AGENT,
)
@pytest.mark.parametrize("name", list(REQUESTS))
async def test_requests_about_a_queue(stage, name):
    """By its submitter, by others, and (but for what a worker does) by the agent itself."""
    subject, body = REQUESTS[name]
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    before = await stage.contents(CONSUMER.stream)
    for who in (CLI, FRONT, OTHER, ECHO):
        if who == ECHO and name in OWN:
            continue
        raw = stage.raws[who]
        said = await raw.denied(raw.client.publish(subject, data, f"{api_inbox(who, TOKEN)}.x"))
        assert f'"{subject.lower()}"' in said
    assert await stage.contents(CONSUMER.stream) == before


@refused_by(
    Layer.PERMISSIONS,
    "acknowledging another's task in the form in which domains and accounts come first",
    by=Adversary.AGENT,
)
async def test_throwing_away_anothers_task(stage):
    """The broker takes a pattern for that form for one of the short form, too. So nobody has it."""
    mallory = stage.mallory
    assert (await stage.publish(CLI, task_subject(ECHO, "work")))["seq"] > 0
    inbox = f"{pull_inbox(ECHO, TOKEN)}.x"
    given = await stage.raws[ECHO].listen(inbox)
    await stage.raws[ECHO].send(f"$JS.API.CONSUMER.MSG.NEXT.{PLACE}", b"", inbox)
    *_, sequence, delivered, time, _pending = (await heard_within(given)).reply.split(".")
    pending = (await consumer_info(mallory, CONSUMER))["num_ack_pending"]
    stored = (await stage.contents(CONSUMER.stream))["messages"]
    for who in (CLI, FRONT, OTHER):
        raw, own = stage.raws[who], tasks_stream_name(who)
        forged = f"$JS.ACK.{PLACE}.{own}.{sequence}.{delivered}.{time}.0"
        said = await raw.denied(raw.client.publish(forged, b"+ACK"))
        assert f'"{forged.lower()}"' in said
        longer = f"$JS.ACK.{own}.x.{PLACE}.1.{sequence}.{delivered}.{time}.0"  # allowed, and means nothing
        await raw.send(longer, b"+ACK")
    assert (await consumer_info(mallory, CONSUMER))["num_ack_pending"] == pending
    assert (await stage.contents(CONSUMER.stream))["messages"] == stored


@refused_by(Layer.PERMISSIONS, "listening where another pulls, or is told to cancel", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [CLI, FRONT, OTHER], ids=["submitter", "another submitter", "other"])
async def test_listening_to_what_is_for_a_worker(stage, who):
    raw = stage.raws[who]
    for subject in (
        f"{pull_inbox(ECHO, TOKEN)}.*",
        f"{api_inbox(ECHO, '*')}.>",
        control_subject(ECHO, "cancel"),
        announce_subject(ECHO),
        announce_subject(who),
        "aw.control.*.*.announce",
        task_subject(ECHO, "work"),
        f"{reply_inbox(ECHO, TOKEN)}.>",
    ):
        said = await raw.denied(raw.client.subscribe(subject))
        assert f'"{subject.lower()}"' in said
