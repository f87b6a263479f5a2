"""Attack: headers that make JetStream empty, overwrite, expire or schedule, sent to a stream of claims.

By the agent itself, which may publish there. Claims must stand against it, too: a worker that was taken over
for a moment must not leave its successors without the memory of what ran.

Two things refuse them. A claim's size bound covers its headers, so hardly any fits; and the stream allows none
of what they ask for, which is shown on a stream that is declared alike but for that bound.
"""

from __future__ import annotations

import json

import pytest

from agentweave_bus.bus.streams import claim_stream, claim_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix, api_inbox, call_subject, claim_subject
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

TOKEN = "B" * 22
STREAM = claim_stream_name(ECHO)
KEPT = b"k" * 32

UNWANTED = {
    "rollup of all": {"Nats-Rollup": "all"},
    "rollup of the subject": {"Nats-Rollup": "sub"},
    "time to live": {"Nats-TTL": "1s"},
    "a schedule": {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": "aw.dead.x"},
    "one time": {
        "Nats-Schedule": "@at 2030-01-01T00:00:00Z",
        "Nats-Schedule-Target": call_subject(ECHO, "work"),
    },
    "a schedule with a rollup": {
        "Nats-Schedule": "@every 1s",
        "Nats-Schedule-Target": "aw.dead.x",
        "Nats-Rollup": "sub",
    },
    "counting": {"Nats-Incr": "+1"},
    "a batch": {"Nats-Batch-Id": "b", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"},
    "another stream": {"Nats-Expected-Stream": "claims-x"},
    "a wrong last sequence": {"Nats-Expected-Last-Sequence": "999999999"},
    "a wrong last message": {"Nats-Expected-Last-Msg-Id": "no"},
    "a wrong subject sequence": {"Nats-Expected-Last-Subject-Sequence": "999999999"},
}
"""Refused on any subject. The rest is harmless on a free one, where it is a claim like others."""

TRIED = UNWANTED | {
    "no header": {},
    "message id": {"Nats-Msg-Id": "another"},
    "this stream": {"Nats-Expected-Stream": STREAM},
    "key-value delete": {"KV-Operation": "DEL"},
    "key-value purge": {"KV-Operation": "PURGE", "Nats-Rollup": "sub"},
    "a marker": {"Nats-Marker-Reason": "Remove"},
}


SMALL = {
    "rollup of all": {"Nats-Rollup": "all"},
    "rollup of the subject": {"Nats-Rollup": "sub"},
    "time to live": {"Nats-TTL": "1s"},
    "counting": {"Nats-Incr": "+1"},
    "a batch": {"Nats-Batch-Id": "b"},
}
"""With nothing beside them these fit into a claim."""

TOO_LARGE = 10054


class Claims:
    """A stream of claims: publishing to it, and what it holds as who owns the broker sees it."""

    def __init__(self, mallory, stream, prefix, publish):
        self.mallory = mallory
        self.stream = stream
        self.prefix = prefix
        self.publish = publish

    def subject(self, mark):
        return f"{self.prefix}.{mark * 64}"

    async def _ask(self, verb, body=b""):
        heard = await self.mallory.listen("probe.answer")
        await self.mallory.send(f"$JS.API.STREAM.{verb}.{self.stream}", body, "probe.answer")
        return json.loads((await heard_within(heard)).data)

    async def contents(self):
        state = (await self._ask("INFO"))["state"]
        return {key: state.get(key) for key in ("messages", "bytes", "first_seq", "last_seq", "num_deleted")}

    async def message(self, mark):
        ask = json.dumps({"last_by_subj": self.subject(mark)}).encode()
        return (await self._ask("MSG.GET", ask))["message"]

    async def unchanged_by(self, mark, headers, data=b"x" * 32):
        """Publish; return the error code. Whatever the stream held it still holds, and nothing more."""
        before = await self.contents()
        answer = await self.publish(self.subject(mark), headers, data)
        assert await self.contents() == before
        return answer["error"]["err_code"]


@pytest.fixture(scope="module")
async def mallory(session_world):
    yield await session_world.raw()
    await session_world.clear()


@pytest.fixture(scope="module")
async def real(session_world, mallory):
    """The stream of echo's claims, published to by echo's own identity. One claim stands: ``c``."""
    raw = await session_world.raw(ECHO)
    answers = await raw.listen(f"{api_inbox(ECHO, TOKEN)}.*")

    async def publish(subject, headers=None, data=KEPT):
        await raw.send(subject, data, f"{api_inbox(ECHO, TOKEN)}.x", headers)
        return json.loads((await heard_within(answers)).data)

    claims = Claims(mallory, STREAM, agent_prefix(Family.CLAIM, ECHO), publish)
    assert (await publish(claims.subject("c")))["seq"] > 0
    return claims


@pytest.fixture(scope="module")
async def roomy(mallory):
    """A stream declared as claims are, without the bound on size. One claim stands: ``c``."""
    answers = await mallory.listen("probe.roomy")

    async def publish(subject, headers=None, data=KEPT):
        await mallory.send(subject, data, "probe.roomy", headers)
        return json.loads((await heard_within(answers)).data)

    declared = claim_stream(ECHO).config
    copy = declared | {"name": "roomy", "subjects": ["roomy.*"], "max_msg_size": -1, "storage": "memory"}
    made = await publish("$JS.API.STREAM.CREATE.roomy", data=json.dumps(copy).encode())
    assert "error" not in made, made
    claims = Claims(mallory, "roomy", "roomy", publish)
    assert (await publish(claims.subject("c")))["seq"] > 0
    yield claims
    await publish("$JS.API.STREAM.DELETE.roomy", data=b"")


@refused_by(Layer.STREAM, "a JetStream header that would replace or remove a claim", by=Adversary.AGENT)
@pytest.mark.parametrize("name", list(TRIED))
async def test_on_a_claim_that_stands(real, name):
    message = await real.message("c")
    sequence = str(message["seq"])
    for headers in (TRIED[name], TRIED[name] | {"Nats-Expected-Last-Subject-Sequence": sequence}):
        for data in (b"", KEPT):
            assert await real.unchanged_by("c", headers, data) > 0
    assert await real.message("c") == message


@refused_by(Layer.STREAM, "a JetStream header that is small enough to fit into a claim", by=Adversary.AGENT)
@pytest.mark.parametrize("name", list(SMALL))
async def test_on_a_free_subject_where_it_fits(real, name):
    assert await real.unchanged_by("0", SMALL[name], b"") != TOO_LARGE


@refused_by(Layer.STREAM, "a JetStream header that works on a whole stream", by=Adversary.AGENT)
@pytest.mark.parametrize("mark", ["c", "0"], ids=["taken", "free"])
@pytest.mark.parametrize("name", list(UNWANTED))
async def test_were_claims_not_bounded_in_size(roomy, name, mark):
    """Nothing that a schedule would send arrives either."""
    heard = await roomy.mallory.listen("aw.dead.x")
    calls = await roomy.mallory.listen(call_subject(ECHO, "work"))
    message = await roomy.message("c")
    assert await roomy.unchanged_by(mark, UNWANTED[name]) != TOO_LARGE
    assert await roomy.message("c") == message
    assert heard.empty()
    assert calls.empty()


@refused_by(Layer.STREAM, "a claim larger than a digest", by=Adversary.AGENT)
async def test_a_large_claim(real):
    assert await real.unchanged_by("d", None, b"x" * 33) == TOO_LARGE


@refused_by(
    Layer.STREAM, "a message id that makes JetStream take a claim for a duplicate", by=Adversary.AGENT
)
async def test_a_message_id_before_the_claim(real):
    """Claims carry no headers, so no message id that anybody used can swallow one."""
    first = await real.publish(real.subject("e"), {"Nats-Msg-Id": "m"}, b"")
    assert first["seq"] > 0
    assert (await real.publish(real.subject("f"), {"Nats-Msg-Id": "m"}, b""))["duplicate"]
    claim = await real.publish(real.subject("f"))
    assert claim["seq"] > first["seq"]
    assert "duplicate" not in claim


async def test_an_honest_claim_has_no_headers(real, mallory, session_world):
    """Honest: nothing that a broker could strip."""
    heard = await mallory.listen(claim_subject(ECHO, "*"))
    echo, cli = await session_world.agent(ECHO), await session_world.client(CLI)
    await cli.ask(ECHO, "work", {"text": "x"})
    claim = await heard_within(heard)
    assert claim.headers is None
    assert len(claim.data) == 32
    assert echo.ran == ["work"]
