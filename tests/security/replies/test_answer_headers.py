"""Attack: message headers on answers. The broker can add and strip them, so nothing may depend on one.

The single one that is read is the broker's own 503 on an empty message: test_false_no_responders.py.
"""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.envelope import decode_frame, parse_head
from tests.integration.callee import reply_to, result_of
from tests.integration.connections import heard_within
from tests.integration.probes import ECHO, PATIENCE, data_of
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

ADDED = {
    "Status": "503",
    "Description": "No Responders",
    "Nats-Service-Error": "denied",
    "Nats-Service-Error-Code": "403",
    "Nats-Msg-Id": "x",
    "caller": "spiffe://demo.test/agent/admin",
}


@refused_by(Layer.CALLER, "headers added to a genuine answer", by=Adversary.BROKER)
@pytest.mark.parametrize("name", [*ADDED, "all"])
async def test_added_headers_change_nothing(question, name):
    headers = ADDED if name == "all" else {name: ADDED[name]}
    body = result_of({"answer": "genuine"})
    await question.answer(reply_to(question.message, question.world.issue(ECHO), body).frame, headers)
    async with asyncio.timeout(PATIENCE):
        assert data_of(await question.task) == {"answer": "genuine"}
    assert question.dropped("forged") == 0


@refused_by(Layer.CALLER, "headers alone in place of an answer", by=Adversary.BROKER)
async def test_headers_in_place_of_an_answer(question):
    alone = [{"Status": "100"}, {"Status": "404"}, {"Status": "408"}, {"Status": "409"}, {"Status": "5030"}]
    alone += [{"status": "503"}, {"Nats-Service-Error-Code": "503"}]
    for headers in alone:
        await question.answer(b"", headers)
    await question.all_dropped(len(alone))
    assert question.overheard.empty()  # none of them made the caller ask again


async def test_there_are_none_to_strip(question):
    """Honest: call and answer say all in what is signed: who, to whom, for what, until when, for which request."""
    recorded = await question.mallory.listen(question.message.reply)
    await question.honest()
    answer = await heard_within(recorded)
    for message in (question.message, answer):
        assert message.headers is None
    head = parse_head(decode_frame(answer.data).head)
    assert (head.iss, head.sub) == (ECHO, question.message.reply)
