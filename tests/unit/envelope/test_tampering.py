"""Nothing in a frame can be changed: not a bit, not a key of the head, not a number of the proof."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentweave_bus.envelope import (
    EnvelopeVerifier,
    Head,
    Kind,
    Sealed,
    encode_payload,
    new_id,
    parse_head,
    verify_delegation,
)
from agentweave_bus.envelope.codec import pack
from agentweave_bus.exceptions import (
    ChainRefusedError,
    DelegationRefusedError,
    EnvelopeError,
    FederationError,
    MalformedEnvelopeError,
    SignatureRefusedError,
)
from agentweave_bus.identity.authority import Authority
from tests.unit.envelope.world import (
    CLIENT,
    CONTROL,
    DOMAIN,
    GATEWAY,
    NOW,
    ORDER,
    START,
    World,
    agent,
    draft,
    extend_via,
)

# A flipped bit in a certificate can make its serial number negative, which its parser warns of.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")

REFUSALS = (EnvelopeError, ChainRefusedError, FederationError)


def flipped(frame: bytes, bit: int) -> bytes:
    changed = bytearray(frame)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def batch(world: World, size: int) -> list[Sealed]:
    async def run() -> list[Sealed]:
        sealer = world.sealer(CLIENT)
        return await asyncio.gather(
            *(sealer.seal(draft(ORDER), encode_payload({"n": n})) for n in range(size))
        )

    return asyncio.run(run())


@pytest.fixture(scope="module")
def five(world: World) -> list[Sealed]:
    return batch(world, 5)


def test_every_single_bit_of_a_frame_counts_although_its_root_is_known(
    world: World, five: list[Sealed]
) -> None:
    frame, verifier = five[2].frame, world.verifier()
    for one in five:
        verifier.open(one.frame, now_ms=NOW)
    accepted = [bit for bit in range(len(frame) * 8) if opens(verifier, flipped(frame, bit))]
    assert accepted == []


def test_every_bit_counts_with_an_intermediate_and_a_root_sent_along() -> None:
    world = World(Authority(DOMAIN, intermediate=True, not_before=START))
    svid = world.svid(CLIENT)
    chain = (*svid.cert_chain, *world.authority.bundle.to_der())
    svid = type(svid)(svid.spiffe_id, chain, svid.private_key)
    frame, verifier = world.call(CLIENT, ORDER, svid=svid).frame, world.verifier()
    assert opens(verifier, frame)
    assert [bit for bit in range(0, len(frame) * 8, 3) if opens(verifier, flipped(frame, bit))] == []


def opens(verifier: EnvelopeVerifier, frame: bytes) -> bool:
    try:
        opened = verifier.open(frame, now_ms=NOW)
        verify_delegation(opened, verifier, now_ms=NOW)
    except REFUSALS:
        return False
    return True


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), warm=st.booleans())
def test_a_flipped_bit_of_a_frame_with_via_is_refused(world: World, where: float, warm: bool) -> None:
    frame = delegated(world).frame
    verifier = world.verifier()
    if warm:
        assert opens(verifier, frame)
    assert not opens(verifier, flipped(frame, int(where * len(frame) * 8)))


def delegated(world: World) -> Sealed:
    first = world.open(world.call(CLIENT, GATEWAY))
    second = world.open(world.call(GATEWAY, ORDER, via=extend_via(first)))
    return world.call(ORDER, agent("payment"), via=extend_via(second))


# --- keys of the head: all of them, in three heads -----------------------------------------------------

HASH = b"h" * 32


def requests(world: World) -> dict[str, Sealed]:
    scope = (f"{ORDER}#*",)
    parent = world.open(world.call(CLIENT, GATEWAY))
    common: dict[str, Any] = {"ctx": "c", "log": ("log", 7, HASH), "trace": "00-aa-bb-01"}
    return {
        "task": world.call(
            CLIENT,
            ORDER,
            kind=Kind.TASK,
            scope=scope,
            prn={"iss": "https://login.example", "sub": "alice"},
            reply="A" * 22,
            nbf=NOW + 1,
            idk="k",
            prio=3,
            retry={"attempts": 3},
            every="PT1H",
            **common,
        ),
        "call": world.call(GATEWAY, ORDER, via=extend_via(parent)),
        "progress": world.call(ORDER, CLIENT, kind=Kind.PROGRESS, re=HASH, seq=1, prev=HASH),
        "reissue": world.forge(CONTROL, ORDER, kind=Kind.REISSUE, att=1),
    }


OTHER: dict[str, tuple[str, Any]] = {
    # key: (head that has it, another value that is valid by itself)
    "kind": ("call", "task"),
    "id": ("call", new_id(NOW)),
    "iss": ("call", str(CLIENT)),
    "x5t": ("call", HASH),
    "aud": ("call", str(agent("other"))),
    "cap": ("call", "other"),
    "sub": ("call", "aw.call.acme=example.agent/x.other"),
    "iat": ("call", NOW + 1),
    "exp": ("call", NOW + 29_999),
    "pd": ("call", HASH),
    "ct": ("call", "text/plain"),
    "par": ("call", HASH),
    "nbf": ("task", NOW + 2),
    "scope": ("task", [f"{ORDER}#do"]),
    "prn": ("task", {"iss": "https://login.example", "sub": "mallory"}),
    "reply": ("task", "B" * 22),
    "ctx": ("task", "d"),
    "idk": ("task", "l"),
    "prio": ("task", 9),
    "retry": ("task", {"attempts": 4}),
    "every": ("task", "PT2H"),
    "log": ("task", ["log", 8, HASH]),
    "trace": ("task", "00-cc-bb-01"),
    "re": ("progress", b"i" * 32),
    "seq": ("progress", 2),
    "prev": ("progress", b"i" * 32),
    "att": ("reissue", 2),
}


def test_the_table_above_names_every_key() -> None:
    assert OTHER.keys() == set(Head._fields)


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "root known"])
def test_every_key_of_the_head_is_bound(world: World, key: str, warm: bool) -> None:
    name, other = OTHER[key]
    sealed = requests(world)[name]
    verifier = world.verifier()
    if warm:
        verifier.open(sealed.frame, now_ms=NOW)
    changed = with_head(sealed.frame, {key: other})
    parse_head(msgpack.unpackb(changed)[1])  # it is a good head; only the proof is not for it
    with pytest.raises(SignatureRefusedError, match="signature"):
        verifier.open(changed, now_ms=NOW)


@pytest.mark.parametrize("key", sorted(OTHER.keys() - {"kind", "iss"}))
def test_no_key_can_be_taken_away(world: World, key: str) -> None:
    sealed = requests(world)[OTHER[key][0]]
    with pytest.raises(SignatureRefusedError, match="signature"):
        world.verifier().open(with_head(sealed.frame, {key: None}), now_ms=NOW)


def with_head(frame: bytes, changes: dict[str, Any]) -> bytes:
    parts = msgpack.unpackb(frame)
    head = msgpack.unpackb(parts[1]) | changes
    parts[1] = pack({key: value for key, value in head.items() if value is not None})
    return pack(parts)


# --- the proof ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    {
        "index before": lambda p: p.__setitem__(2, p[2] - 1),
        "index after": lambda p: p.__setitem__(2, p[2] + 1),
        "size below": lambda p: p.__setitem__(1, p[1] - 1),
        "size above": lambda p: p.__setitem__(1, p[1] + 1),
        "path reversed": lambda p: p[3].reverse(),
        "path shorter": lambda p: p[3].pop(),
        "path longer": lambda p: p[3].append(b"x" * 32),
        "path empty": lambda p: p[3].clear(),
        "entry of 31 bytes": lambda p: p[3].__setitem__(0, p[3][0][:31]),
        "index beyond size": lambda p: p.__setitem__(2, p[1]),
        "index negative": lambda p: p.__setitem__(2, -1),
        "size zero": lambda p: p.__setitem__(1, 0),
        "size 257": lambda p: p.__setitem__(1, 257),
        "index true": lambda p: p.__setitem__(2, True),
        "signature empty": lambda p: p.__setitem__(0, b""),
        "a lone envelope": lambda p: p.__setitem__(slice(1, 4), [1, 0, []]),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "root known"])
def test_a_wrong_proof_is_refused(world: World, five: list[Sealed], change: Any, warm: bool) -> None:
    frame, verifier = five[2].frame, world.verifier()
    if warm:
        verifier.open(frame, now_ms=NOW)
    parts = msgpack.unpackb(frame)
    change[1](parts[2])
    with pytest.raises((SignatureRefusedError, MalformedEnvelopeError)):
        verifier.open(pack(parts), now_ms=NOW)


def test_the_path_of_a_neighbour_does_not_fit(world: World, five: list[Sealed]) -> None:
    parts, neighbour = msgpack.unpackb(five[2].frame), msgpack.unpackb(five[3].frame)
    parts[2] = neighbour[2]
    with pytest.raises(SignatureRefusedError):
        world.verifier().open(pack(parts), now_ms=NOW)


def test_a_known_root_spares_no_other_check(world: World, five: list[Sealed]) -> None:
    """A signature that is in memory for one certificate is worth nothing with another."""
    verifier = world.verifier()
    verifier.open(five[0].frame, now_ms=NOW)
    parts = msgpack.unpackb(five[1].frame)
    parts[3] = list(world.issue(CLIENT).cert_chain)
    with pytest.raises(SignatureRefusedError):
        verifier.open(pack(parts), now_ms=NOW)


def test_the_memory_of_roots_is_bounded_and_the_rest_of_a_batch_uses_it(
    world: World, five: list[Sealed]
) -> None:
    chains = world.verifier()._chains
    verifier = EnvelopeVerifier(chains, max_roots=2)
    for sealed in [*five, *(world.call(CLIENT, ORDER) for _ in range(5))]:
        verifier.open(sealed.frame, now_ms=NOW)
        assert len(verifier._roots) <= 2
    fresh = EnvelopeVerifier(chains)
    for sealed in five:
        fresh.open(sealed.frame, now_ms=NOW)
    assert len(fresh._roots) == 1


def test_a_failed_signature_is_not_remembered(world: World) -> None:
    sealed = world.call(CLIENT, ORDER)
    verifier = world.verifier()
    parts = msgpack.unpackb(sealed.frame)
    parts[2][0] = world.call(CLIENT, ORDER).link.proof.signature
    for _ in range(2):
        with pytest.raises(SignatureRefusedError):
            verifier.open(pack(parts), now_ms=NOW)
    assert not verifier._roots


def test_payload_and_links_belong_to_their_head(world: World) -> None:
    one, two = delegated(world), delegated(world)
    parts, others = msgpack.unpackb(one.frame), msgpack.unpackb(two.frame)
    swapped = pack([*parts[:5], others[5]])
    verifier = world.verifier()
    opened = verifier.open(swapped, now_ms=NOW)
    with pytest.raises(DelegationRefusedError) as refused:
        verify_delegation(opened, verifier, now_ms=NOW)
    assert refused.value.rule == 2
