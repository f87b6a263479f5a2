"""Attack: another encoding of the same, or what a lenient reader takes for the same.

Two readers could take two meanings from it, or one meaning could have several digests and so escape the
memory of replays. Each is tried at every place of a frame, of a head and of a payload; head and payload
are those of a call that is otherwise honest, and are signed as they are.
"""

from __future__ import annotations

import msgpack
import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope.codec import pack
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO
from tests.security import encodings
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import HONEST, forged_call, forged_head, reply_of, sealed_by

pytestmark = pytest.mark.anyio

FORMS = {
    encodings.longer_integers: "an integer written longer than needed",
    encodings.longer_lengths: "a length written longer than needed",
    encodings.extensions: "an extension type or a timestamp",
    encodings.other_types: "another type of the same value",
    encodings.doubled_keys: "a key that stands twice",
    encodings.foreign_keys: "a key that is no text, or none that is known",
}
OPTIONAL = {"scope": [f"{ECHO}#*"], "prn": {"iss": "https://login.example", "sub": "me"}, "prio": 1}
"""Optional keys, so that the head holds a list, a map within the map and a small number."""


def forms(where, place, *left_out):
    marked = [
        pytest.param(
            form, id=form.__name__, marks=refused_by(where, f"in the {place}: {what}", by=Adversary.CALLER)
        )
        for form, what in FORMS.items()
        if form not in left_out
    ]
    return pytest.mark.parametrize("form", marked)  # fmt: skip


@forms(Step.FRAME, "frame", encodings.doubled_keys, encodings.foreign_keys)
async def test_a_frame(attack, form):
    frames = list(encodings.encodings(msgpack.unpackb(attack.message.data), form))
    for frame in frames:
        await attack.send(frame)
    await attack.refused_all(len(frames))


async def test_the_head_that_is_written_otherwise_below_is_admitted(attack):
    """Honest; what the attacks below write otherwise is what makes them fail."""
    svid = attack.world.issue(CLI)
    forged = forged_call(svid, raw=OPTIONAL)
    inbox = await attack.mallory.listen(reply_of(forged))
    await attack.send(forged.frame, reply=reply_of(forged))
    await heard_within(inbox)
    await attack.admitted()


@forms(Step.HEAD, "head")
async def test_a_head(attack, form):
    svid, payload = attack.world.issue(CLI), pack(HONEST)
    heads = list(encodings.encodings(forged_head(svid, payload, raw=OPTIONAL), form))
    for head in heads:
        await attack.send(sealed_by(svid, head, payload).frame)
    await attack.refused_all(len(heads))


@refused_by(Step.HEAD, "in the head: more after its end, or less", by=Adversary.CALLER)
async def test_after_the_end_of_a_head(attack):
    svid, payload = attack.world.issue(CLI), pack(HONEST)
    heads = [one for one in encodings.trailing(forged_head(svid, payload)) if one]  # b"" is no frame's head
    for head in heads:
        await attack.send(sealed_by(svid, head, payload).frame)
    await attack.refused_all(len(heads))


async def send_payloads(attack, payloads, name):
    svid = attack.world.issue(CLI)
    assert payloads
    for payload in payloads:
        forged = forged_call(svid, cap=name, sub=call_subject(ECHO, name), payload=payload)
        await attack.send(forged.frame, subject=forged.head.sub, reply=reply_of(forged))
    await attack.refused_all(len(payloads))


@forms(Step.PAYLOAD, "payload", encodings.longer_integers, encodings.foreign_keys)
async def test_a_payload_of_texts_lists_and_maps(attack, form):
    value = {"path": ["x"], "name": "say", "payload": {}}
    await send_payloads(attack, list(encodings.encodings(value, form)), "relay")


@forms(Step.PAYLOAD, "payload")
async def test_a_payload_with_a_number(attack, form):
    await send_payloads(attack, list(encodings.encodings({"size": 5}, form)), "huge")


@refused_by(Step.PAYLOAD, "in the payload: more after its end, or less", by=Adversary.CALLER)
async def test_after_the_end_of_a_payload(attack):
    await send_payloads(attack, list(encodings.trailing({"text": "x"})), "say")


@refused_by(Step.PAYLOAD, "in the payload: a text that is no text", by=Adversary.CALLER)
async def test_a_text_that_is_no_text(attack):
    """Bytes that are no UTF-8, halves of characters, and the long form of a short character."""
    wrong = [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"]
    whole = pack({"text": "x"})[:-2]
    await send_payloads(attack, [whole + bytes([0xA0 + len(one)]) + one for one in wrong], "say")
