"""What is sealed opens to the same; what is not exactly that is refused."""

from __future__ import annotations

import asyncio
import gc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentweave_bus.envelope import (
    Kind,
    Sealed,
    Sealer,
    decode_payload,
    encode_payload,
)
from agentweave_bus.exceptions import (
    ChainRefusedError,
    FederationError,
    MalformedEnvelopeError,
    SignatureRefusedError,
)
from agentweave_bus.identity.authority import Authority
from agentweave_bus.identity.svid import X509Svid
from tests.unit.envelope.world import (
    CLIENT,
    DOMAIN,
    NOW,
    ORDER,
    PAYMENT,
    START,
    World,
    agent,
    draft,
    sign_head,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(-1e30, 1e30, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-30)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcé", max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON)
def test_what_is_sealed_opens_to_the_same_value(world: World, value: object) -> None:
    sealed = world.call(CLIENT, ORDER, payload=value)
    opened = world.verifier().open(sealed.frame, now_ms=NOW)
    assert decode_payload(opened.payload) == value
    assert opened.head == sealed.head
    assert opened.digest == sealed.digest
    assert opened.sender.spiffe_id == opened.head.iss == CLIENT
    assert opened.head.x5t == world.svid(CLIENT).x5t
    assert opened.frame == sealed.frame


@pytest.mark.parametrize("curve", ["p256", "p384"])
def test_the_curve_of_the_leaf_decides_the_algorithm(world: World, curve: str) -> None:
    svid = world.issue(CLIENT, curve=curve)
    opened = world.open(world.call(CLIENT, ORDER, svid=svid))
    assert opened.sender.public_key.curve.name == {"p256": "secp256r1", "p384": "secp384r1"}[curve]


@pytest.mark.anyio
async def test_one_turn_of_the_loop_is_one_signature(world: World) -> None:
    sealer = world.sealer(CLIENT)
    payloads = [encode_payload({"n": n}) for n in range(5)]
    sealed = await asyncio.gather(*(sealer.seal(draft(ORDER), payload) for payload in payloads))
    assert {one.link.proof.signature for one in sealed} == {sealed[0].link.proof.signature}
    assert [(one.link.proof.size, one.link.proof.index) for one in sealed] == [(5, n) for n in range(5)]
    for one, payload in zip(sealed, payloads, strict=True):
        assert world.verifier().open(one.frame, now_ms=NOW).payload == payload  # each by itself


@pytest.mark.anyio
async def test_a_batch_has_at_most_256_heads(world: World) -> None:
    sealer = world.sealer(CLIENT)
    sealed = await asyncio.gather(*(sealer.seal(draft(ORDER), b"\xc0") for _ in range(300)))
    assert sorted({one.link.proof.size for one in sealed}) == [44, 256]
    verifier = world.verifier()
    for one in sealed:
        verifier.open(one.frame, now_ms=NOW)


@pytest.mark.anyio
async def test_a_batch_holds_heads_of_one_certificate(world: World) -> None:
    svids = [world.issue(CLIENT), world.issue(CLIENT)]
    sealer = Sealer(lambda: svids[0])
    first = asyncio.ensure_future(sealer.seal(draft(ORDER), b"\xc0"))
    second = asyncio.ensure_future(sealer.seal(draft(ORDER), b"\xc0"))
    await asyncio.sleep(0)  # both are queued; the flush has not run yet
    svids.reverse()
    third = await sealer.seal(draft(ORDER), b"\xc0")
    assert (await first).link.proof.size == (await second).link.proof.size == 2
    assert third.link.proof.size == 1
    assert third.head.x5t == svids[0].x5t
    for one in (await first, third):
        world.open(one)


@pytest.mark.anyio
async def test_who_was_cancelled_is_left_out(world: World) -> None:
    sealer = world.sealer(CLIENT)
    gone = asyncio.ensure_future(sealer.seal(draft(ORDER), b"\xc0"))
    stays = asyncio.ensure_future(sealer.seal(draft(ORDER), b"\xc0"))
    asyncio.get_running_loop().call_soon(gone.cancel)  # after both are queued, before the flush is over
    sealed = await stays
    assert gone.cancelled()
    world.open(sealed)


@pytest.mark.anyio
async def test_a_failing_key_fails_every_caller(world: World) -> None:
    class Broken:
        spiffe_id, x5t, cert_chain = CLIENT, world.svid(CLIENT).x5t, world.svid(CLIENT).cert_chain

        @property
        def private_key(self) -> object:
            raise RuntimeError("the key is gone")

    sealer = Sealer(Broken)  # type: ignore[arg-type,return-value]
    results = await asyncio.gather(
        *(sealer.seal(draft(ORDER), b"\xc0") for _ in range(3)), return_exceptions=True
    )
    assert [str(one) for one in results] == ["the key is gone"] * 3


@pytest.mark.anyio
async def test_several_are_sealed_together_and_what_is_wrong_with_one_stands_in_its_place(
    world: World,
) -> None:
    drafts = [
        (draft(ORDER), b"\xc0", ()),
        (draft(ORDER, id="7"), b"\xc0", ()),
        (draft(ORDER), b"\xc1" * 9, ()),
    ]
    first, second, third = await world.sealer(CLIENT).seal_all(drafts)
    assert isinstance(second, MalformedEnvelopeError)
    assert isinstance(first, Sealed)
    assert isinstance(third, Sealed)
    assert [one.link.proof.size for one in (first, third)] == [2, 2]
    world.open(first)


@pytest.mark.anyio
@pytest.mark.parametrize("cancelled", [True, False])
async def test_several_that_fail_or_are_cancelled_leave_nothing_behind(
    world: World, *, cancelled: bool
) -> None:
    svid, signed = world.svid(CLIENT), []

    class Key:
        curve = svid.private_key.curve

        def sign(self, root: bytes, _algorithm: object) -> bytes:
            signed.append(root)
            raise RuntimeError("the key is gone")

    class Own:
        spiffe_id, x5t, cert_chain, private_key = CLIENT, svid.x5t, svid.cert_chain, Key()

    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    sealer = Sealer(Own)  # type: ignore[arg-type,return-value]
    sealing = asyncio.ensure_future(sealer.seal_all([(draft(ORDER), b"\xc0", ())] * 4))
    await asyncio.sleep(0)
    if cancelled:
        sealing.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([sealing])
    assert sealing.cancelled() is cancelled
    assert sealing.cancelled() or str(sealing.exception()) == "the key is gone"
    await asyncio.sleep(0)
    gc.collect()
    assert told == []


def test_the_sealer_refuses_what_a_receiver_would(world: World) -> None:
    with pytest.raises(MalformedEnvelopeError, match="'id'"):
        world.call(CLIENT, ORDER, id="7")
    with pytest.raises(MalformedEnvelopeError, match="no key every"):
        world.call(CLIENT, ORDER, every="PT1H")
    with pytest.raises(MalformedEnvelopeError, match="payload has"):
        world.sealer(CLIENT).seal_now(draft(ORDER), b"x" * 800_000)


def test_a_signature_in_another_name_is_refused(world: World) -> None:
    forged = world.forge(PAYMENT, ORDER, raw={"iss": str(CLIENT)})
    with pytest.raises(SignatureRefusedError, match=f"{PAYMENT} signed a head in the name of {CLIENT}"):
        world.open(forged)


def test_a_head_of_another_certificate_of_the_same_agent_is_refused(world: World) -> None:
    other = world.issue(CLIENT)
    with pytest.raises(SignatureRefusedError, match="another certificate"):
        world.open(world.forge(CLIENT, ORDER, raw={"x5t": other.x5t}))


def test_another_payload_is_refused(world: World) -> None:
    sealed = world.call(CLIENT, ORDER)
    forged = sign_head(sealed.link.head_bytes, world.svid(CLIENT), encode_payload({"n": 2}))
    with pytest.raises(SignatureRefusedError, match="payload"):
        world.open(forged)


def test_a_foreign_domain_is_a_federation_error(world: World) -> None:
    stranger = Authority("other.example", not_before=START).issue(
        agent("x", "other.example"), not_before=START
    )
    with pytest.raises(FederationError):
        world.open(world.call(CLIENT, ORDER, svid=stranger))


def test_a_foreign_authority_can_not_speak_for_this_domain(world: World) -> None:
    stranger = Authority("other.example", not_before=START).issue(
        CLIENT, not_before=START, allow_foreign=True
    )
    with pytest.raises(ChainRefusedError):
        world.open(world.call(CLIENT, ORDER, svid=stranger))


def test_an_expired_sender_is_refused(world: World) -> None:
    svid = world.issue(CLIENT, lifetime_ms=3_000_000)
    with pytest.raises(ChainRefusedError):
        world.open(world.call(CLIENT, ORDER, svid=svid))


def with_chain(svid: X509Svid, *above: bytes) -> X509Svid:
    return type(svid)(svid.spiffe_id, (svid.cert_chain[0], *above), svid.private_key)


def test_certificates_beside_the_path_are_refused(world: World) -> None:
    svid, other = world.svid(CLIENT), world.svid(ORDER).cert_chain[0]
    for above in ((other,), (*world.authority.bundle.to_der(), other)):
        with pytest.raises(ChainRefusedError, match="beside"):
            world.open(world.call(CLIENT, ORDER, svid=with_chain(svid, *above)))


def test_a_root_that_is_sent_along_is_the_one_of_the_path(world: World) -> None:
    """Also when it is also an authority of the bundle, every byte of what was sent counts."""
    svid, (root,) = world.svid(CLIENT), world.authority.bundle.to_der()
    assert world.open(world.call(CLIENT, ORDER, svid=with_chain(svid, root))).head.iss == CLIENT
    altered = bytes([*root[:-1], root[-1] ^ 1])
    with pytest.raises(ChainRefusedError, match="beside"):
        world.open(world.call(CLIENT, ORDER, svid=with_chain(svid, altered)))


def test_an_intermediate_on_the_path_is_welcome() -> None:
    world = World(Authority(DOMAIN, intermediate=True, not_before=START))
    sealed = world.call(CLIENT, ORDER)
    assert len(sealed.link.chain) == 2
    assert world.open(sealed).head.kind is Kind.CALL
