"""Attack: an honest frame, altered on the way."""

from __future__ import annotations

import msgpack
import pytest

from tests.integration.connections import until

pytestmark = pytest.mark.anyio

PARTS = {"version": 0, "head": 1, "proof": 2, "chain": 3, "payload": 4, "via": 5}
STEP = {"head": "proof", "proof": "proof", "chain": "chain", "payload": "proof"}


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def with_part(frame, name, change):
    parts = msgpack.unpackb(frame)
    parts[PARTS[name]] = change(parts[PARTS[name]])
    return msgpack.packb(parts)


async def test_another_payload_under_the_same_signature(attack):
    wanted = msgpack.packb({"text": "a million"})
    await attack.send(with_part(attack.message.data, "payload", lambda _: wanted))
    record = await attack.refused("proof", reason="the payload is not the one whose hash the head holds")
    assert record["step"] == 4


@pytest.mark.parametrize("where", [0.0, 0.5, 0.99], ids=["front", "middle", "end"])
@pytest.mark.parametrize("name", ["head", "payload"])
async def test_one_bit_of_a_part(attack, name, where):
    def change(part):
        return flipped(part, int(len(part) * where))

    await attack.send(with_part(attack.message.data, name, change))
    await attack.refused(STEP[name])


async def test_one_bit_anywhere(attack):
    frame = attack.message.data
    positions = range(0, len(frame), max(1, len(frame) // 40))
    for position in positions:
        await attack.send(flipped(frame, position))
    await until(lambda: len(attack.refusals()) == len(positions), "every refusal")
    assert attack.echo.ran == ["work"]
    assert {one["step_name"] for one in attack.refusals()} <= {"frame", "chain", "proof"}


async def test_cut_lengthened_and_emptied(attack):
    frame = attack.message.data
    wrong = [b"", frame[:-1], frame + b"\xc0", b"\x00" * 100, frame * 2, b"\x96" + frame[1:-1]]
    for data in wrong:
        await attack.send(data)
    await until(lambda: len(attack.refusals()) == len(wrong), "every refusal")
    assert {one["step_name"] for one in attack.refusals()} == {"frame"}
    assert attack.echo.ran == ["work"]


async def test_beyond_the_size_of_a_frame(attack):
    await attack.send(attack.message.data + b"\0" * (1_048_576 - 4_000 - len(attack.message.data)))
    await attack.refused("size")


async def test_signature_of_another_honest_frame(attack):
    from agentweave_bus.bus.subjects import call_subject
    from tests.integration.connections import heard_within
    from tests.integration.probes import ECHO

    heard = await attack.mallory.listen(call_subject(ECHO, "wait"))
    attack.echo.gate.set()
    await attack.cli.ask(ECHO, "wait")
    attack.echo.ran.remove("wait")
    other = msgpack.unpackb((await heard_within(heard)).data)
    await attack.send(with_part(attack.message.data, "proof", lambda _: other[PARTS["proof"]]))
    await attack.refused("proof")
