"""Attack: what the callee truly signed, but not as the answer to this request.

Each forgery differs from the honest answer in one thing only, so each check of the caller stands alone.
"""

from __future__ import annotations

import pytest

from agentweave_bus.envelope import Kind, Link, decode_frame, encode_payload
from agentweave_bus.envelope.frame import encode_frame
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.callee import reply_to, request_of, result_of
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, OTHER
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio


@refused_by(Layer.CALLER, "the callee's genuine answer to another request", by=Adversary.BROKER)
async def test_the_answer_to_an_earlier_call(question):
    """Recorded on the way, and played at the next request of the same caller for the same thing."""
    recorded = await question.mallory.listen(question.message.reply)
    await question.honest()
    answer = await heard_within(recorded)
    await question.ask()
    await question.answer(answer.data)
    await question.all_dropped()


CHANGES = {
    "another request's digest": lambda _: {"re": b"\1" * 32},
    "the digest of no head but the payload": lambda m: {"re": request_of(m)[0].pd},
    "another addressee": lambda _: {"aud": OTHER},
    "another capability": lambda _: {"cap": "say"},
    "another subject": lambda m: {"sub": m.subject},
    "the inbox of the same caller's other request": lambda m: {
        "sub": m.reply[:-1] + ("0" if m.reply.endswith("f") else "f")
    },
    "progress": lambda _: {"kind": Kind.PROGRESS, "seq": 0},
    "control": lambda _: {"kind": Kind.CONTROL},
    "a minute ago": lambda _: {"iat": clock_ms() - 60_000},
    "in a minute": lambda _: {"iat": clock_ms() + 60_000, "exp": clock_ms() + 90_000},
}


@refused_by(
    Layer.CALLER,
    "an answer that the callee signed, with one field that is not this request's",
    by=Adversary.AGENT,
)
@pytest.mark.parametrize("changed", list(CHANGES))
async def test_one_field_that_is_not_this_requests(question, changed):
    changes = CHANGES[changed](question.message)
    await question.answer(reply_to(question.message, question.world.issue(ECHO), **changes).frame)
    await question.all_dropped()


@refused_by(Layer.CALLER, "an answer with a delegation under it", by=Adversary.BROKER)
async def test_an_answer_with_links(question):
    """Links are outside the signed head of an answer, so whoever carries it could add some."""
    genuine = reply_to(question.message, question.world.issue(ECHO))
    asked = decode_frame(question.message.data)
    link = Link(asked.head, asked.proof, asked.chain)
    payload = encode_payload(result_of({"answer": "forged"}))
    await question.answer(encode_frame(genuine.link, payload, (link,)))
    await question.all_dropped()


@refused_by(Layer.CALLER, "the request itself as its answer", by=Adversary.BROKER)
async def test_the_request_sent_back(question):
    assert request_of(question.message)[0].iss == CLI
    await question.answer(question.message.data)
    await question.all_dropped()
