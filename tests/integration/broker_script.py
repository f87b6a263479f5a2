"""What the bus relies on at a broker, as one script whose transcript is compared between two brokers."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Protocol

from nats.aio.msg import Msg

from agentweave_bus.bus.streams import claim_stream
from agentweave_bus.spiffe_id import SpiffeID

ECHO = SpiffeID("spiffe://demo.test/agent/echo")
CLAIMS = claim_stream(ECHO)
CLAIM = "aw.claim.demo=test.agent/echo"
RIGHTS = {"publish": {"allow": ["aw.call.*.echo", "r.>"]}, "subscribe": {"allow": ["mine.*", "in.>"]}}
SECOND = 1_000_000_000
SHORT = 0.25
"""Seconds that a message may take in the script."""

Transcript = list[tuple[str, Any]]


class Connection(Protocol):
    """What both clients have."""

    async def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None: ...

    async def subscribe(self, subject: str, queue: str = "", cb: Any = None) -> Any: ...

    async def flush(self) -> None: ...


class Side:
    """One broker: somebody who may do anything, somebody who may do little, and what they were told."""

    def __init__(self, admin: Connection, worker: Connection, refused: asyncio.Queue[str]) -> None:
        self.admin, self.worker, self.refused = admin, worker, refused
        self._number = 0

    async def hear(self, connection: Connection, subject: str, queue: str = "") -> asyncio.Queue[Msg]:
        heard: asyncio.Queue[Msg] = asyncio.Queue()

        async def received(message: Msg) -> None:
            heard.put_nowait(message)

        await connection.subscribe(subject, queue=queue, cb=received)
        await settled(connection)
        return heard

    async def ask(self, subject: str, data: Any = b"", headers: dict[str, str] | None = None) -> Msg:
        self._number += 1
        heard = await self.hear(self.admin, f"ask.{self._number}")
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        await self.admin.publish(subject, body, f"ask.{self._number}", headers)
        return await within(heard)

    async def api(self, verb: str, body: Any = b"") -> dict[str, Any]:
        return json.loads((await self.ask(f"$JS.API.{verb}", body)).data)

    async def store(self, subject: str, data: bytes = b"x", headers: dict[str, str] | None = None) -> Any:
        """Publish to a stream and tell the acknowledgement."""
        answer = await self.ask(subject, data, headers)
        if answer.headers and answer.headers.get("Status"):
            return answer.headers["Status"]
        told = json.loads(answer.data)
        error = told.get("error")
        if error is not None:
            return (error["code"], error["err_code"], error["description"])
        return told["seq"], bool(told.get("duplicate"))


async def settled(connection: Connection) -> None:
    """Wait until the broker has everything. Twice: the library's ping overtakes its own buffer."""
    await connection.flush()
    await connection.flush()


async def within(heard: asyncio.Queue[Any], seconds: float = 5) -> Any:
    async with asyncio.timeout(seconds):
        return await heard.get()


def shown(message: Msg) -> tuple[str, bytes, str | None]:
    status = None if message.headers is None else message.headers.get("Status")
    return message.subject, message.data, status


async def routing(side: Side) -> Transcript:
    said: Transcript = []
    plain = await side.hear(side.admin, "in.*.b")
    rest = await side.hear(side.admin, "in.>")
    groups = [await side.hear(side.admin, "in.a.b", "group") for _ in range(2)]
    for subject in ("in.a.b", "in.a.b.c", "in.a", "in"):
        await side.admin.publish(subject, subject.encode(), "", {"K": "v"} if subject == "in.a" else None)
    await settled(side.admin)
    said.append(("plain", [shown(plain.get_nowait()) for _ in range(plain.qsize())]))
    messages = [rest.get_nowait() for _ in range(rest.qsize())]
    said.append(("rest", [(shown(one), one.headers) for one in messages]))
    said.append(("group", sum(one.qsize() for one in groups)))
    nobody = await side.ask("nobody.is.there")
    headers = {str(key): value for key, value in (nobody.headers or {}).items()}
    said.append(("nobody", (nobody.data, headers["Status"], headers["Nats-Subject"])))
    return said


async def permissions(side: Side) -> Transcript:
    said: Transcript = []
    heard = await side.hear(side.admin, ">")
    for subject in ("aw.call.x.echo", "aw.call.x.other", "aw.call.echo", "R.x", "r.y.z"):
        await side.worker.publish(subject, b"")
    await settled(side.worker)
    await settled(side.admin)
    subjects = [heard.get_nowait().subject for _ in range(heard.qsize())]
    said.append(("published", [one for one in subjects if one.split(".")[0] in ("aw", "r", "R")]))
    for subject in ("mine.a", "mine.*", "mine.a.b", ">", "in.>", "in.*", "mine.>"):
        await side.worker.subscribe(subject, cb=_ignore)
    await settled(side.worker)
    said.append(("refused", [await within(side.refused) for _ in range(5)]))
    said.append(("no more", side.refused.qsize()))
    return said


async def _ignore(_message: Msg) -> None: ...


async def claims(side: Side) -> Transcript:
    """What a claim may answer: the stream as it is declared for agents."""
    said: Transcript = []
    missing = await side.api(f"STREAM.INFO.{CLAIMS.name}")
    said.append(("missing", missing["error"]))
    made = await side.api(f"STREAM.CREATE.{CLAIMS.name}", CLAIMS.config)
    said.append(
        ("made", {key: made["config"][key] for key in sorted(CLAIMS.config) if key in made["config"]})
    )
    for name, subject, data, headers in (
        ("held", "one", b"1" * 32, None),
        ("again", "one", b"1" * 32, None),
        ("another", "two", b"2", None),
        ("too large", "three", b"3" * 33, None),
        ("rollup", "four", b"4", {"Nats-Rollup": "all"}),
        ("short-lived", "four", b"4", {"Nats-TTL": "1s"}),
        ("scheduled", "four", b"4", {"Nats-Schedule": "@at 2099-01-01T00:00:00Z"}),
        ("expected", "five", b"5", {"Nats-Expected-Last-Subject-Sequence": "0"}),
        ("expected too late", "two", b"6", {"Nats-Expected-Last-Subject-Sequence": "0"}),
        ("expected wrongly", "six", b"6", {"Nats-Expected-Last-Sequence": "9"}),
        ("another stream", "six", b"6", {"Nats-Expected-Stream": "other"}),
        ("named", "six", b"6", {"Nats-Msg-Id": "m"}),
        ("named again", "seven", b"6", {"Nats-Msg-Id": "m"}),
    ):
        said.append((name, await side.store(f"{CLAIM}.{subject}", data, headers)))
    said.append(("elsewhere", await side.store("aw.claim.demo=test.agent/echo")))
    state = (await side.api(f"STREAM.INFO.{CLAIMS.name}"))["state"]
    said.append(("state", {key: state[key] for key in ("messages", "first_seq", "last_seq", "num_subjects")}))
    return said


async def limits(side: Side) -> Transcript:
    said: Transcript = []
    common = {"storage": "memory", "num_replicas": 1, "allow_direct": True}
    await side.api("STREAM.CREATE.old", {"name": "old", "subjects": ["o.*"], "max_msgs": 2, **common})
    said.append(("old", [await side.store(f"o.{name}") for name in "aabc"]))
    state = (await side.api("STREAM.INFO.old"))["state"]
    said.append(("old state", (state["messages"], state["first_seq"], state["last_seq"])))
    last = {"name": "last", "subjects": ["l.*"], "max_msgs_per_subject": 1, **common}
    await side.api("STREAM.CREATE.last", last)
    for data in (b"1", b"2"):
        await side.store("l.a", data, {"K": "v"})
    for name, subject in (("there", "l.a"), ("not there", "l.b")):
        found = await side.ask(f"$JS.API.DIRECT.GET.last.{subject}")
        headers = dict(found.headers or {})
        headers.pop("Nats-Time-Stamp", None)
        said.append((name, (found.data, sorted(headers.items()))))
    message = (await side.api("STREAM.MSG.GET.last", {"last_by_subj": "l.a"}))["message"]
    said.append(("read", {key: message[key] for key in ("subject", "seq", "data")}))
    said.append(("gone", (await side.api("STREAM.MSG.GET.last", {"seq": 1}))["error"]))
    for name, headers in (
        ("scheduled", {"Nats-Schedule": "@at 2099-01-01T00:00:00Z"}),
        ("as expected", {"Nats-Expected-Last-Subject-Sequence": "2"}),
        ("expected too late", {"Nats-Expected-Last-Subject-Sequence": "2"}),
        ("expected wrongly", {"Nats-Expected-Last-Sequence": "9"}),
        ("another stream", {"Nats-Expected-Stream": "other"}),
        ("named", {"Nats-Msg-Id": "m"}),
        ("named again", {"Nats-Msg-Id": "m", "Nats-Expected-Last-Sequence": "9"}),
    ):
        said.append((name, await side.store("l.a", b"x", headers)))
    different = {**last, "max_msgs_per_subject": 2}
    said.append(("made otherwise", (await side.api("STREAM.CREATE.last", different))["error"]))
    said.append(("made again", "error" in await side.api("STREAM.CREATE.last", last)))
    return said


def consumer(**settings: Any) -> dict[str, Any]:
    config = {"durable_name": "c", "ack_policy": "explicit", **settings}
    return {"stream_name": "work", "config": config}


async def redelivery(side: Side) -> Transcript:
    """Who does not acknowledge gets it again, as often and as late as declared."""
    said: Transcript = []
    config = {"name": "work", "subjects": ["w.*"], "retention": "workqueue", "storage": "memory"}
    await side.api("STREAM.CREATE.work", {**config, "num_replicas": 1})
    settings = consumer(ack_wait=int(SHORT * SECOND), max_deliver=3, max_ack_pending=2)
    await side.api("CONSUMER.DURABLE.CREATE.work.c", settings)
    advice = await side.hear(side.admin, "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>")
    heard = await side.hear(side.admin, "pull")
    loop = asyncio.get_running_loop()

    async def pull(batch: int = 1, **more: Any) -> None:
        body = json.dumps({"batch": batch, "expires": 5 * SECOND, **more}).encode()
        await side.admin.publish("$JS.API.CONSUMER.MSG.NEXT.work.c", body, "pull")

    async def got() -> Msg:
        message = await within(heard)
        fields = message.reply.split(".")
        said.append(("given", (message.subject, message.data, *fields[:7], fields[8])))
        return message

    async def waited(begun: float) -> None:
        said.append(("after", round((loop.time() - begun) / SHORT)))

    await side.admin.publish("$JS.API.CONSUMER.MSG.NEXT.work.c", b'{"batch":1,"no_wait":true}', "pull")
    said.append(("nothing", (await within(heard)).headers))
    for name in "abc":
        await side.store(f"w.{name}", name.encode())
    await pull(3)  # two come, since no more may be unacknowledged
    first, second = await got(), await got()
    said.append(("waiting", heard.qsize()))
    await side.admin.publish(second.reply, b"+ACK")
    third = await got()
    begun = loop.time()
    await side.admin.publish(third.reply, b"-NAK")  # at once
    await pull()
    third = await got()
    await waited(begun)
    await side.admin.publish(third.reply, b"+TERM")
    await asyncio.sleep(SHORT / 2)
    begun = loop.time()
    await side.admin.publish(first.reply, b"+WPI")  # its time begins anew
    await pull()
    first = await got()
    await waited(begun)
    begun = loop.time()
    await side.admin.publish(
        first.reply, json.dumps({"delay": int(2 * SHORT * SECOND)}).encode().join((b"-NAK ", b""))
    )
    await pull()
    first = await got()
    await waited(begun)
    await pull()  # given up when somebody asks for it once more
    given_up = json.loads((await within(advice)).data)
    said.append(("given up", [given_up[key] for key in ("stream_seq", "deliveries")]))
    info = await side.api("CONSUMER.INFO.work.c")
    said.append(("info", {key: info[key] for key in ("num_ack_pending", "num_pending", "num_waiting")}))
    state = (await side.api("STREAM.INFO.work"))["state"]
    said.append(("left", (state["messages"], state["first_seq"])))
    await side.admin.publish(
        "$JS.API.CONSUMER.MSG.NEXT.work.c", json.dumps({"batch": 2, "expires": SECOND // 10}).encode(), "pull"
    )
    said.append(("expired", (await within(heard)).headers))
    return said


async def backoff(side: Side) -> Transcript:
    said: Transcript = []
    await side.api(
        "STREAM.CREATE.back", {"name": "back", "subjects": ["b.*"], "num_replicas": 1, "storage": "memory"}
    )
    steps = [int(SHORT * SECOND), int(2 * SHORT * SECOND)]
    settings = consumer(backoff=steps, max_deliver=4)
    await side.api("CONSUMER.DURABLE.CREATE.back.c", {**settings, "stream_name": "back"})
    heard = await side.hear(side.admin, "pull-b")
    await side.store("b.a")
    loop = asyncio.get_running_loop()
    await side.admin.publish(
        "$JS.API.CONSUMER.MSG.NEXT.back.c", json.dumps({"batch": 9, "expires": 9 * SECOND}).encode(), "pull-b"
    )
    begun, late = loop.time(), ""
    for _ in range(3):
        message = await within(heard)
        said.append(("again", (message.reply.split(".")[4], round((loop.time() - begun) / SHORT))))
        begun, late = loop.time(), late or message.reply
    await side.admin.publish(late, b"+ACK", "acked")  # of the first delivery, when the third is out
    await settled(side.admin)
    info = await side.api("CONSUMER.INFO.back.c")
    said.append(("late", info["num_ack_pending"]))
    said.append(("acknowledged", shown(await side.ask(message.reply, b"+ACK"))[1:]))
    info = await side.api("CONSUMER.INFO.back.c")
    said.append(("done", info["num_ack_pending"]))
    state = (await side.api("STREAM.INFO.back"))["state"]
    said.append(("kept", state["messages"]))
    return said


SCENES = {scene.__name__: scene for scene in (routing, permissions, claims, limits, redelivery, backoff)}
