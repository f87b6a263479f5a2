"""What durable tasks rely on at a broker: set-once slots, work queues, and pulling from them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from nats.aio.msg import Msg

from tests.integration.broker_script import SECOND, Side, Transcript, settled, within

DAY = 86_400 * SECOND
WAIT = 1.0
"""Seconds that a message may take, in the script. Long, so that a busy machine changes nothing."""
QUEUE = {
    "name": "tasks",
    "description": "queued for somebody",
    "subjects": ["aw.task.demo=test.agent/a.*"],
    "storage": "file",
    "retention": "workqueue",
    "discard": "new",
    "max_msgs": 1000,
    "max_bytes": 1_000_000,
    "max_age": 31 * DAY,
    "deny_delete": True,
    "deny_purge": True,
    "num_replicas": 1,
}
TASK = "aw.task.demo=test.agent/a.cap"
NEXT = "$JS.API.CONSUMER.MSG.NEXT.tasks.c"
SLOTS = {
    "name": "slots",
    "subjects": ["aw.state.demo=test.agent/a.>"],
    "storage": "file",
    "retention": "limits",
    "discard": "new",
    "discard_new_per_subject": True,
    "max_msgs_per_subject": 1,
    "max_age": 32 * DAY,
    "deny_delete": True,
    "deny_purge": True,
    "allow_direct": True,
    "num_replicas": 1,
}
STATE = "aw.state.demo=test.agent/a.b.key"


def told(message: Msg) -> tuple[str, bytes, list[tuple[str, str]]]:
    """A message without what differs between two runs."""
    headers = {str.__str__(key): value for key, value in (message.headers or {}).items()}
    if headers.get("Status") == "503":
        headers.pop("Description", None)  # the client library takes the next line for it
    if "Nats-Time-Stamp" in headers:
        right = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?Z", headers["Nats-Time-Stamp"])
        headers["Nats-Time-Stamp"] = "a time" if right else headers["Nats-Time-Stamp"]
    return message.subject, message.data, sorted(headers.items())


def config_of(answer: dict[str, Any]) -> Any:
    """A declaration as it is told, or why it is refused. Of the server's own metadata only the names."""
    if "error" in answer:
        return answer["error"]
    config = dict(answer["config"])
    config["metadata"] = sorted(config["metadata"])
    return sorted(config.items(), key=lambda item: item[0])


async def slots(side: Side) -> Transcript:
    """A subject that is written once: what its writer, its reader and a listener are told."""
    said: Transcript = []
    said.append(("made", config_of(await side.api("STREAM.CREATE.slots", SLOTS))))
    heard = await side.hear(side.admin, "aw.state.>")
    for name, data, headers in (
        ("first", b"1", None),
        ("taken", b"2", None),
        ("named", b"3", {"Nats-Msg-Id": "m"}),
        ("expected", b"4", {"Nats-Expected-Last-Subject-Sequence": "1"}),
    ):
        said.append((name, await side.store(f"{STATE}.0", data, headers)))
    said.append(("next", await side.store(f"{STATE}.1", b"5", {"K": "v"})))
    await settled(side.admin)
    said.append(("heard", [told(heard.get_nowait())[:2] for _ in range(heard.qsize())]))
    for subject, body in (
        (f"slots.{STATE}.0", b""),
        (f"slots.{STATE}.1", b""),
        (f"slots.{STATE}.2", b""),
        (f"slots.{STATE}.*", b""),
        ("slots.elsewhere", b""),
        (f"slots.{STATE}.0", b'{"seq":2}'),
        (f"slots.{STATE}.0", b"{"),
        ("slots", b""),
        ("slots", b'{"seq":1}'),
        ("slots", json.dumps({"last_by_subj": f"{STATE}.1"}).encode()),
        ("slots", b'{"next_by_subj":"aw.state.>","seq":2}'),
        ("slots", b'{"next_by_subj":"aw.state.>","seq":3}'),
        (f"nowhere.{STATE}.0", b""),
    ):
        said.append(
            (f"read {subject} {body!r}", told(await side.ask(f"$JS.API.DIRECT.GET.{subject}", body))[1:])
        )
    for verb, body in (("STREAM.MSG.DELETE", {"seq": 1}), ("STREAM.PURGE", {"filter": f"{STATE}.0"})):
        said.append((verb, (await side.api(f"{verb}.slots", body))["error"]))
    said.append(("asked for nothing", (await side.api("STREAM.MSG.GET.slots", {}))["error"]))
    state = (await side.api("STREAM.INFO.slots"))["state"]
    said.append(("state", {key: state[key] for key in sorted(state) if not key.endswith("_ts")}))
    return said


async def room(side: Side) -> Transcript:
    """How much a stream takes, and what it says when it is full."""
    said: Transcript = []
    for storage, most in (("file", 3 * 35), ("memory", 3 * 21)):
        name = f"b{storage[0]}"
        config = {**SLOTS, "name": name, "subjects": [f"{name}.*"], "storage": storage, "max_bytes": most}
        await side.api(f"STREAM.CREATE.{name}", config)
        stored = [await side.store(f"{name}.{number}") for number in (0, 1, 2, 0, 3)]
        said.append((storage, stored))
        await side.store(f"{name}.h", b"", {"a": "b"})
        state = (await side.api(f"STREAM.INFO.{name}"))["state"]
        said.append((f"{storage} state", (state["messages"], state["bytes"])))
        config = {**config, "max_bytes": 1000, "max_msgs": 4}
        said.append((f"{storage} widened", config_of(await side.api(f"STREAM.UPDATE.{name}", config))))
        said.append((f"{storage} on", [await side.store(f"{name}.{key}", b"", {"a": "b"}) for key in "h01"]))
        state = (await side.api(f"STREAM.INFO.{name}"))["state"]
        said.append((f"{storage} state", (state["messages"], state["bytes"])))
    replaced = {
        "name": "rep",
        "subjects": ["rep.*"],
        "discard": "new",
        "max_msgs_per_subject": 1,
        "max_msgs": 2,
    }
    await side.api("STREAM.CREATE.rep", {**replaced, "storage": "memory", "max_bytes": 100})
    said.append(("replaced", [await side.store(f"rep.{name}") for name in "aabcb"]))
    said.append(("replaced by more", [await side.store("rep.b", b"x" * size) for size in (100, 57)]))
    old = {"name": "old", "subjects": ["old.*"], "storage": "memory", "num_replicas": 1, "max_bytes": 65}
    await side.api("STREAM.CREATE.old", old)
    said.append(("old", [await side.store(f"old.{number}") for number in range(4)]))
    state = (await side.api("STREAM.INFO.old"))["state"]
    said.append(("old state", (state["messages"], state["bytes"], state["first_seq"])))
    said.append(("too large for all", await side.store("old.9", b"x" * 100)))
    state = (await side.api("STREAM.INFO.old"))["state"]
    said.append(("nothing left", {key: state[key] for key in ("messages", "bytes", "first_seq", "last_seq")}))
    for number, (name, change) in enumerate(
        (
            ("per subject, not new", {"discard": "old"}),
            ("per subject, of how many", {"max_msgs_per_subject": -1}),
            ("window", {"max_age": SECOND, "duplicate_window": 2 * SECOND}),
            ("short", {"max_age": SECOND}),
            ("unknown", {"no_such_thing": 1}),
            ("elsewhere", {"name": "other"}),
            ("overlapping", {"subjects": ["old.>"]}),
            ("not overlapping", {"subjects": ["old"]}),
        )
    ):
        config = {**SLOTS, "name": f"n{number}", "subjects": [f"n{number}.*"], **change}
        answer = await side.api(f"STREAM.CREATE.n{number}", config)
        said.append((name, config_of(answer)))
    for name, change in (
        ("deletable", {"deny_delete": False}),
        ("purgeable", {"deny_purge": False}),
        ("queue", {"retention": "workqueue"}),
        ("storage", {"storage": "memory"}),
    ):
        changed = {**SLOTS, "name": "bf", "subjects": ["bf.*"], **change}
        said.append((name, config_of(await side.api("STREAM.UPDATE.bf", changed))))
    said.append(("missing", (await side.api("STREAM.UPDATE.nope", {**SLOTS, "name": "nope"}))["error"]))
    return said


def consumer(action: str = "", stream: str = "tasks", **settings: Any) -> dict[str, Any]:
    config = {"name": "c", "durable_name": "c", "ack_policy": "explicit", "filter_subject": TASK, **settings}
    return {"stream_name": stream, "config": config, **({"action": action} if action else {})}


async def consumers(side: Side) -> Transcript:
    """What a consumer of a work queue may be, and how it changes."""
    said: Transcript = []
    said.append(("queue", config_of(await side.api("STREAM.CREATE.tasks", QUEUE))))
    said.append(("stored", [await side.store(TASK) for _ in range(3)]))
    said.append(("of another", await side.store(TASK + "2")))
    create = f"CONSUMER.CREATE.tasks.c.{TASK}"
    full = {"ack_wait": 30 * SECOND, "max_deliver": -1, "max_ack_pending": 20_000, "metadata": {"a": TASK}}
    other = {"name": "d", "durable_name": "d"}
    for name, subject, body in (
        ("no stream", f"CONSUMER.CREATE.nope.c.{TASK}", consumer(stream="nope")),
        ("update what is not there", create, consumer("update", **full)),
        ("create", create, consumer("create", **full)),
        ("create again", create, consumer("create", **full)),
        ("create otherwise", create, consumer("create", **{**full, "ack_wait": SECOND})),
        ("update", create, consumer("update", **{**full, "ack_wait": SECOND})),
        ("either", create, consumer(**full)),
        ("defaults", create, consumer()),
        ("with backoff", create, consumer(max_deliver=3, backoff=[SECOND, 2 * SECOND])),
        ("another filter", f"CONSUMER.CREATE.tasks.c.{TASK}.x", consumer()),
        ("another name", f"CONSUMER.CREATE.tasks.x.{TASK}", consumer()),
        ("another stream", create, consumer(stream="other")),
        ("same filter", f"CONSUMER.CREATE.tasks.d.{TASK}", consumer(**other)),
        ("wider filter", "CONSUMER.CREATE.tasks.d", consumer(**other, filter_subject="aw.task.*.*.*")),
        ("all", "CONSUMER.CREATE.tasks.d", consumer(**other, filter_subject="")),
        ("no acks", "CONSUMER.CREATE.tasks.d", consumer(**other, filter_subject="x", ack_policy="none")),
        ("new", "CONSUMER.CREATE.tasks.d", consumer(**other, filter_subject="x", deliver_policy="new")),
        ("backoff", create, consumer(max_deliver=1, backoff=[SECOND, SECOND])),
        ("unknown", create, consumer(no_such_thing=1)),
        ("waiting", create, consumer(max_waiting=3)),
        ("policy", create, consumer(deliver_policy="new")),
        ("nothing", "CONSUMER.CREATE.tasks.e", {"stream_name": "tasks", "config": {}}),
        ("described", "CONSUMER.INFO.tasks.c", b""),
        ("missing", "CONSUMER.INFO.tasks.nope", b""),
        ("nowhere", "CONSUMER.INFO.nope.nope", b""),
    ):
        answer = await side.api(subject, body)
        said.append((name, (config_of(answer), answer.get("num_pending"))))
    said.append(("not read directly", told(await side.ask(f"$JS.API.DIRECT.GET.tasks.{TASK}"))[1:]))
    said.append(("no such consumer", told(await side.ask("$JS.API.CONSUMER.MSG.NEXT.tasks.nope"))[1:]))
    said.append(("no such stream", told(await side.ask("$JS.API.CONSUMER.MSG.NEXT.nope.c"))[1:]))
    gone = [await side.api("CONSUMER.DELETE.tasks.c") for _ in range(2)]
    said.append(("deleted", [one.get("success") or one["error"] for one in gone]))
    return said


class Puller:
    """Who pulls from the consumer ``c``: each request has an inbox of its own."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.inboxes: dict[str, asyncio.Queue[Msg]] = {}
        self.said: Transcript = []

    async def begin(self, **settings: Any) -> None:
        """Make the queue and its consumer anew."""
        await self.side.api("STREAM.DELETE.tasks")
        await self.side.api("STREAM.CREATE.tasks", {**QUEUE, "storage": "memory"})
        await self.side.api("CONSUMER.CREATE.tasks.c", consumer(ack_wait=int(WAIT * SECOND), **settings))

    async def store(self, names: str) -> None:
        for name in names:
            await self.side.store(TASK, name.encode())

    async def pull(self, name: str, **body: Any) -> None:
        if name not in self.inboxes:
            self.inboxes[name] = await self.side.hear(self.side.admin, f"pull.{name}")
        await self.side.admin.publish(NEXT, json.dumps(body).encode(), f"pull.{name}")
        await self.calm()

    async def calm(self, seconds: float = 0.02) -> None:
        """Let the broker do what it does behind its connections."""
        await settled(self.side.admin)
        await asyncio.sleep(seconds)
        await settled(self.side.admin)

    async def comes(self, what: str, name: str) -> Msg:
        """Wait for a message, and tell it."""
        message = await within(self.inboxes[name])
        self._tell(f"{what}: {name}", message)
        return message

    def got(self, what: str, *, in_turn: bool = True) -> list[Msg]:
        """Tell what has come, inbox by inbox; return what was given out.

        Args:
            in_turn: Whether their order is the same in every run.
        """
        given, before = [], len(self.said)
        for name, inbox in self.inboxes.items():
            while inbox.qsize():
                message = inbox.get_nowait()
                self._tell(f"{what}: {name}", message)
                if message.reply:
                    given.append(message)
        if not in_turn:
            self.said[before:] = sorted(self.said[before:], key=repr)
        return given

    def _tell(self, what: str, message: Msg) -> None:
        fields = message.reply.split(".")
        fact = (what, (told(message), (fields[:7], fields[8]) if message.reply else None))
        if "Idle Heartbeat" not in repr(fact) or fact != self.said[-1]:  # how many is the machine's affair
            self.said.append(fact)

    async def info(self, what: str) -> None:
        info = await self.side.api("CONSUMER.INFO.tasks.c")
        keys = ("num_ack_pending", "num_redelivered", "num_waiting", "num_pending")
        places = {
            key: (info[key]["consumer_seq"], info[key]["stream_seq"]) for key in ("delivered", "ack_floor")
        }
        messages = (await self.side.api("STREAM.INFO.tasks"))["state"]["messages"]
        self.said.append((what, {key: info[key] for key in keys} | places | {"messages": messages}))

    async def answer(self, what: str, message: Msg, word: bytes) -> None:
        self.said.append((what, told(await self.side.ask(message.reply, word))[1:]))


async def pulling(side: Side) -> Transcript:
    """Several requests at one consumer: turns, and what those are told who get nothing."""
    one = Puller(side)
    await one.begin(max_waiting=3)
    await one.pull("a", batch=3, expires=SECOND)
    await one.pull("b", batch=2, expires=SECOND)
    await one.pull("c", batch=1, expires=SECOND)
    await one.pull("d", batch=1, expires=SECOND)
    await one.pull("d", batch=1, expires=SECOND, idle_heartbeat=SECOND // 4)
    await one.info("waiting")
    await one.store("1234567")
    await one.calm()
    for message in one.got("turns"):
        await side.admin.publish(message.reply, b"+ACK")
    await one.pull("d", batch=5, no_wait=True)
    for message in one.got("one is left"):
        await side.admin.publish(message.reply, b"+ACK")
    await one.pull("d", batch=5, no_wait=True)
    await one.pull("d", batch=1, idle_heartbeat=SECOND)
    await one.pull("d", batch=1, expires=SECOND, idle_heartbeat=SECOND)
    one.got("nothing")
    await one.pull("a", batch=2, expires=int(0.5 * SECOND), idle_heartbeat=int(0.2 * SECOND))
    await one.pull("b", batch=3, expires=int(0.2 * SECOND), no_wait=True)
    await one.calm(0.6)
    one.got("time is up")
    await one.info("nobody waits")
    await one.store("xy")
    await one.pull("b", batch=3, expires=SECOND, no_wait=True)
    await one.pull("c")
    await one.calm()
    one.got("what there is")
    subscription = await side.admin.subscribe("gone", cb=_ignore)
    await side.admin.publish(NEXT, b'{"batch":1,"expires":5000000000}', "gone")
    await subscription.unsubscribe()
    await one.info("unsubscribed")
    await one.pull("a", batch=1, expires=9 * SECOND)
    await one.comes("again, since nobody has acknowledged", "c")
    await one.comes("and the other one", "a")
    await one.pull("a", batch=9, expires=9 * SECOND)
    await side.api("CONSUMER.DELETE.tasks.c")
    await one.calm()
    one.got("deleted")
    return one.said


async def _ignore(_message: Msg) -> None: ...


async def acknowledging(side: Side) -> Transcript:
    """What becomes of a message by what is said of it, in time and too late."""
    one = Puller(side)
    await one.begin()
    await one.store("abcd")
    await one.pull("p", batch=4, expires=SECOND)
    a, b, c, d = one.got("given")
    await one.info("given")
    await one.answer("acknowledged", b, b"+ACK")
    await one.info("one is acknowledged")
    await one.answer("acknowledged again", b, b"+ACK")
    await one.answer("ended", a, b"+TERM it is no good")
    await one.info("one is ended")
    await one.answer("given back", d, b"-NAK")
    await one.answer("given back", c, b"-NAK")
    await one.answer("given back twice", c, b"-NAK")
    await one.answer("nonsense", c, b"nonsense")
    await one.info("given back")
    await one.pull("p", batch=4, no_wait=True)
    again = one.got("in that order")
    await one.calm(WAIT + 0.1)
    await one.info("nobody pulls")
    await one.answer("progress, too late", again[0], b"+WPI")
    await one.pull("p", batch=2, no_wait=True)
    one.got("late, whichever the broker noticed first", in_turn=False)
    await one.answer("an earlier attempt", d, b"-NAK")
    await one.pull("p", batch=1, no_wait=True)
    one.got("counts, too")
    await one.answer("ended by an earlier attempt", c, b"+TERM")
    await one.info("ended")
    begun = asyncio.get_running_loop().time()
    await one.answer("later", d, b'-NAK {"delay": %d}' % (WAIT * SECOND))
    await one.info("later")
    await one.pull("p", batch=1, expires=9 * SECOND)
    message = await one.comes("later", "p")
    one.said.append(("after", round((asyncio.get_running_loop().time() - begun) / WAIT)))
    await one.answer("at last", message, b"")
    await one.info("done")
    one.got("nothing more")
    for name, subject in (
        ("no such consumer", "$JS.ACK.tasks.nope.1.1.1.1.1"),
        ("too short", "$JS.ACK.tasks.c.1.1"),
        ("with a domain", "$JS.ACK._.hash.tasks.c.1.1.1.1.1.x"),
    ):
        one.said.append((name, told(await side.ask(subject, b"+ACK"))[1:]))
    await one.store("e")
    heard = await side.hear(side.admin, "unanswered")
    await side.admin.publish("$JS.ACK.tasks.c.1.5.9.1.0", b"+ACK", "unanswered")
    await one.calm()
    one.said.append(("not given out yet", heard.qsize()))
    await one.info("it stays")
    return one.said


async def keeping(side: Side) -> Transcript:
    """What a work queue keeps: all that one of its consumers may still need."""
    one = Puller(side)
    await one.begin(max_deliver=1)
    other = consumer(name="d", durable_name="d", filter_subject=TASK + "2")
    await side.api(f"CONSUMER.CREATE.tasks.d.{TASK}2", other)
    for subject in (TASK, TASK + "2", TASK + "3", TASK):
        await side.store(subject)
    await one.pull("p", batch=2, expires=SECOND // 10)
    first, second = one.got("given")
    for name, sequence in (("another's", 2), ("nobody's", 3)):
        answer = await side.ask(f"$JS.ACK.tasks.c.1.{sequence}.1.1.0", b"+ACK")
        one.said.append((name, told(answer)[1:]))
        await one.info(name)
    await one.answer("done", second, b"+ACK")
    await one.calm(WAIT)
    await one.pull("q", batch=1, expires=SECOND // 10)
    await one.comes("given up", "q")
    await one.info("given up")
    await one.answer("after all", first, b"+ACK")
    await one.info("after all")
    await side.api("CONSUMER.DELETE.tasks.d")
    await one.info("its consumer is gone")
    return one.said


async def pending(side: Side) -> Transcript:
    """How many may be out at once, and what is too old."""
    one = Puller(side)
    await one.begin(max_ack_pending=2)
    await one.store("abc")
    await one.pull("p", batch=2, expires=3 * SECOND)
    for message in one.got("two"):
        await one.answer("later", message, b'-NAK {"delay": 5000000000}')
    await one.info("full")
    await one.pull("q", batch=1, no_wait=True)
    one.got("neither given nor told")
    await one.pull("r", batch=1, expires=SECOND // 10)
    await one.comes("what is to come later counts", "r")
    await one.comes("who did not want to wait", "q")
    await one.pull("p", batch=2, expires=3 * SECOND)
    await one.pull("q", batch=1, no_wait=True)
    await one.comes("others wait for it", "q")
    await one.answer("at once", message, b"-NAK")
    second = await one.comes("what comes again does not", "p")
    await one.answer("acknowledged", second, b"+ACK")
    await one.comes("the next", "p")
    await one.info("full again")
    await side.api("STREAM.UPDATE.tasks", {**QUEUE, "storage": "memory", "max_age": SECOND // 10, **_SHORT})
    await one.calm(0.5)
    await one.info("too old")
    one.got("nothing comes")
    return one.said


async def waking(side: Side) -> Transcript:
    """Message schedules: what is refused, what takes the place of what, and what comes when it is due."""
    said: Transcript = []
    config = {
        "name": "wakeups",
        "subjects": ["aw.wakeup.>"],
        "storage": "file",
        "retention": "workqueue",
        "max_age": 32 * DAY,
        "deny_delete": True,
        "deny_purge": True,
        "num_replicas": 1,
        "allow_msg_schedules": True,
    }
    said.append(("new", config_of(await side.api("STREAM.CREATE.wakeups", {**config, "discard": "new"}))))
    said.append(("made", config_of(await side.api("STREAM.CREATE.wakeups", config))))
    off = {**config, "allow_msg_schedules": False, "deny_purge": False}
    said.append(("off", config_of(await side.api("STREAM.UPDATE.wakeups", off))))
    made = consumer("", "wakeups", name="w", durable_name="w", filter_subject="aw.wakeup.due.>")
    await side.api("CONSUMER.CREATE.wakeups.w", made)
    inbox = await side.hear(side.admin, "pull.w")
    request = json.dumps({"batch": 3, "expires": 5 * SECOND}).encode()
    await side.admin.publish("$JS.API.CONSUMER.MSG.NEXT.wakeups.w", request, "pull.w")
    past, never = "@at 2020-01-01T00:00:00Z", "@at 2199-01-01T00:00:00.5Z"
    for name, headers in (
        ("no target", {"Nats-Schedule": past}),
        ("itself", {"Nats-Schedule": past, "Nats-Schedule-Target": "aw.wakeup.plan.x"}),
        ("elsewhere", {"Nats-Schedule": past, "Nats-Schedule-Target": "aw.task.x"}),
        ("everywhere", {"Nats-Schedule": past, "Nats-Schedule-Target": "aw.wakeup.>"}),
        ("no time", {"Nats-Schedule": "@at noon", "Nats-Schedule-Target": "aw.wakeup.due.x"}),
        ("never", {"Nats-Schedule": never, "Nats-Schedule-Target": "aw.wakeup.due.x"}),
        ("in its place", {"Nats-Schedule": never, "Nats-Schedule-Target": "aw.wakeup.due.y"}),
    ):
        said.append((name, await side.store("aw.wakeup.plan.x", b"x", headers)))
    for name in "ab":
        due = {"Nats-Schedule": past, "Nats-Schedule-Target": f"aw.wakeup.due.{name}", "K": "v"}
        said.append((f"due {name}", await side.store(f"aw.wakeup.plan.{name}", name.encode(), due)))
        await asyncio.sleep(0.3)  # one after the other
    for _ in range(2):
        message = await within(inbox)
        said.append(("came", told(message)))
        await side.ask(message.reply, b"+ACK")
    state = (await side.api("STREAM.INFO.wakeups"))["state"]
    said.append(("left", {key: state[key] for key in ("messages", "last_seq", "num_subjects")}))
    left = await side.api("STREAM.MSG.GET.wakeups", {"last_by_subj": "aw.wakeup.plan.x"})
    said.append(("kept", left["message"]["hdrs"]))
    for subject in ("aw.wakeup.due.*", "nobody.>"):
        names = await side.api("STREAM.NAMES", {"subject": subject})
        said.append(
            (f"names {subject}", {key: names[key] for key in ("total", "offset", "limit", "streams")})
        )
    said.append(("not deleted", (await side.api("STREAM.MSG.DELETE.wakeups", {"seq": 1}))["error"]))
    await side.api("STREAM.CREATE.parked", {"name": "parked", "subjects": ["aw.park.>"]})
    await side.store("aw.park.x")
    for number in (1, 1):
        gone = await side.api("STREAM.MSG.DELETE.parked", {"seq": number, "no_erase": True})
        said.append(("deleted", gone.get("success") or gone["error"]))
    for name in ("wakeups", "parked"):
        await side.api(f"STREAM.DELETE.{name}")
    return said


_SHORT = {"duplicate_window": SECOND // 10}
TASK_SCENES = {
    scene.__name__: scene
    for scene in (slots, room, consumers, pulling, acknowledging, keeping, pending, waking)
}
