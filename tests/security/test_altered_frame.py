"""Attack: an honest frame, altered on the way."""

from __future__ import annotations

import msgpack
import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from tests.integration.connections import heard_within
from tests.integration.probes import ECHO
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import PARTS, with_part

pytestmark = pytest.mark.anyio


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@refused_by(Step.PROOF, "another payload under the same signature", by=Adversary.BROKER)
async def test_another_payload_under_the_same_signature(attack):
    wanted = msgpack.packb({"text": "a million"})
    await attack.send(with_part(attack.message.data, "payload", lambda _: wanted))
    await attack.refused(reason="the payload is not the one whose hash the head holds")


def every_bit_refused_by(step, what):
    return refused_by(step, f"one bit of {what} altered", by=Adversary.BROKER)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("head", bytes, id="head", marks=every_bit_refused_by(Step.PROOF, "the head")),
        pytest.param("payload", bytes, id="payload", marks=every_bit_refused_by(Step.PROOF, "the payload")),
        pytest.param("proof", 0, id="signature", marks=every_bit_refused_by(Step.PROOF, "the signature")),
        pytest.param("chain", 0, id="certificate", marks=every_bit_refused_by(Step.CHAIN, "a certificate")),
    ],
)
async def test_one_bit_of_a_part(attack, name, part):
    """Of the first, the last, and forty between."""
    inside = msgpack.unpackb(attack.message.data)[PARTS[name]]
    whole = inside if part is bytes else inside[part]
    positions = sorted({*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1})
    for position in positions:
        changed = flipped(whole, position)
        value = changed if part is bytes else [changed, *inside[1:]]
        await attack.send(with_part(attack.message.data, name, lambda _, value=value: value))
    await attack.refused_all(len(positions))


@refused_by(Step.FRAME, "a frame cut, lengthened or emptied", by=Adversary.BROKER)
async def test_cut_lengthened_and_emptied(attack):
    frame = attack.message.data
    wrong = [b"", frame[:-1], frame + b"\xc0", b"\x00" * 100, frame * 2, b"\x96" + frame[1:-1]]
    for data in wrong:
        await attack.send(data)
    await attack.refused_all(len(wrong))


@refused_by(Step.SIZE, "a frame beyond the largest size", by=Adversary.BROKER)
async def test_beyond_the_size_of_a_frame(attack):
    await attack.send(attack.message.data + b"\0" * (1_048_576 - 4_000 - len(attack.message.data)))
    await attack.refused()


@refused_by(Step.PROOF, "the signature of another honest frame", by=Adversary.BROKER)
async def test_signature_of_another_honest_frame(attack):
    heard = await attack.mallory.listen(call_subject(ECHO, "wait"))
    attack.echo.gate.set()
    await attack.cli.ask(ECHO, "wait")
    attack.echo.ran.remove("wait")
    other = msgpack.unpackb((await heard_within(heard)).data)
    await attack.send(with_part(attack.message.data, "proof", lambda _: other[PARTS["proof"]]))
    await attack.refused()
