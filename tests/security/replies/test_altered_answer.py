"""Attack: the callee's own answer, altered on the way."""

from __future__ import annotations

import msgpack
import pytest

from agentweave_bus.envelope import encode_payload
from tests.integration.callee import reply_to, result_of
from tests.integration.probes import ECHO, MALLORY
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.unit.envelope.world import sign_head

pytestmark = pytest.mark.anyio

PAYLOAD = 4


@refused_by(Layer.CALLER, "another result under a genuine answer's signature", by=Adversary.BROKER)
async def test_another_result(question):
    parts = msgpack.unpackb(reply_to(question.message, question.world.issue(ECHO)).frame)
    parts[PAYLOAD] = encode_payload(result_of({"answer": "a million"}))
    await question.answer(msgpack.packb(parts))
    await question.all_dropped()


@refused_by(Layer.CALLER, "a genuine answer with single bits flipped", by=Adversary.BROKER)
async def test_one_bit_anywhere(question):
    genuine = reply_to(question.message, question.world.issue(ECHO)).frame
    positions = range(0, len(genuine), len(genuine) // 40)
    for position in positions:
        flipped = bytes([genuine[position] ^ 1])
        await question.mallory.client.publish(
            question.message.reply, genuine[:position] + flipped + genuine[position + 1 :]
        )
    await question.all_dropped(len(positions))


@refused_by(Layer.CALLER, "a genuine answer cut or lengthened", by=Adversary.BROKER)
async def test_cut_lengthened_and_no_head(question):
    svid = question.world.issue(ECHO)
    genuine = reply_to(question.message, svid).frame
    wrong = [b"", b"{}", genuine[:-1], genuine + b"\0", genuine * 2, sign_head(b"\x80", svid, b"").frame]
    for data in wrong:
        await question.answer(data)
    await question.all_dropped(len(wrong))


@refused_by(Layer.CALLER, "another certificate under a genuine answer", by=Adversary.BROKER)
async def test_another_chain(question):
    parts = msgpack.unpackb(reply_to(question.message, question.world.issue(ECHO)).frame)
    for svid in (question.world.issue(MALLORY), question.world.issue(ECHO)):
        parts[3] = list(svid.cert_chain)
        await question.answer(msgpack.packb(parts))
    await question.all_dropped(2)
