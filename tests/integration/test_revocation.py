"""Who is revoked is out at once, at every agent and at the broker, and comes back when that is undone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest

from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.embedded import stack as embedded
from agentweave_bus.exceptions import AgentCallError, BusError, CallTimeoutError, ConfigurationError
from agentweave_bus.identity import X509Svid, revocation_file
from agentweave_bus.identity.revocation_file import RevokedEntry, add_revocation, remove_revocations
from agentweave_bus.runtime.wiring import connected
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, FRONT, PATIENCE, Probe
from tests.integration.world import Caller, World, metric
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def stack_world(tmp_path_factory, anyio_backend):
    """A stack that follows ``revoked.yaml``. ``mine.yaml`` beside it is followed by whom a test tells to."""
    folder = tmp_path_factory.mktemp("revocation")
    for name in ("revoked", "mine"):
        (folder / f"{name}.yaml").write_text("revoked: []\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revocation_file, "_POLL_SECONDS", 0.05)  # half a second and one second, in service
        patch.setattr(embedded, "_POLL_S", 0.05)
        async with World.make(folder, revocations=folder / "revoked.yaml") as world:
            yield world


@pytest.fixture
async def world(stack_world):
    yield stack_world
    for name in ("revoked", "mine"):
        replace(stack_world.folder / f"{name}.yaml", "revoked: []\n")
    await stack_world.clear()


def replace(path: Path, text: str) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.replace(path)


def revoke(world: World, file: str, **what) -> RevokedEntry:
    entry = RevokedEntry.model_validate({"reason": "a test", "time": datetime.now(UTC), **what})
    assert add_revocation(world.folder / f"{file}.yaml", entry)
    return entry


def undo(world: World, file: str, entry: RevokedEntry) -> None:
    assert remove_revocations(world.folder / f"{file}.yaml", entry.subject)


async def follower(world: World, file: str = "revoked") -> Probe:
    return await world.agent(ECHO, identity__revocations=str(world.folder / f"{file}.yaml"))


async def lost(session) -> None:
    with anyio.fail_after(PATIENCE):
        await session.closed.wait()


async def works(cli: Caller) -> None:
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                assert await cli.ask(ECHO, "say", {"text": "hi"}, timeout=0.5) == {"said": "hi"}
            except AgentCallError:
                await anyio.sleep(0.02)
            else:
                return


async def refused_at_step_3(world: World, svid: X509Svid) -> str:
    """Call with ``svid`` over a broker that lets everything pass, until that is refused; say why."""
    raw = await world.raw()
    before = len(world.refusals("echo"))
    with anyio.fail_after(PATIENCE):
        while len(world.refusals("echo")) == before:  # the agent sees the file a moment after it changed
            forged = forged_call(svid)
            await raw.send(call_subject(ECHO, "work"), forged.frame, reply_of(forged))
            await anyio.sleep(0.02)
    record = world.refusals("echo")[before]
    assert (record["step"], record["step_name"]) == (3, "chain")
    return record["reason"]


# --- at the broker and everywhere, as a stack does it ------------------------------------------------------


async def test_a_revoked_caller_loses_its_connection_is_refused_and_comes_back(world):
    """By identity: no user at the broker for as long as it stands, and nobody takes its word besides."""
    await follower(world)
    cli = await world.client()
    await works(cli)
    session = await cli.parts.keeper.session(1)
    entry = revoke(world, "revoked", spiffe_id=CLI)
    await lost(session)
    with pytest.raises(AgentCallError):
        await cli.ask(ECHO, "say", {"text": "x"}, timeout=0.3)
    assert not cli.parts.keeper.connected
    assert "its identity is revoked" in await refused_at_step_3(world, cli.parts.source.svid)
    undo(world, "revoked", entry)
    await works(cli)


async def test_old_certificates_are_out_and_new_ones_in(world):
    """By time of issue: the connections are cut, the stack issues anew, and who holds that goes on."""
    await follower(world)
    cli = await world.client()
    await works(cli)
    old, session = cli.parts.source.svid, await cli.parts.keeper.session(1)
    revoke(world, "revoked", spiffe_id=CLI, issued_before=datetime.now(UTC).replace(microsecond=0))
    await lost(session)
    assert "issued to it as early" in await refused_at_step_3(world, old)
    await works(cli)
    world.stack.api.rotate(CLI)  # as after half of its lifetime; backdated as usual it would be revoked
    await until(lambda: cli.parts.source.svid == world.stack.api.current_svid(CLI), "the next certificate")
    await works(cli)


@pytest.mark.slow
async def test_one_certificate_is_out_and_its_owner_gets_another(world):
    """By fingerprint."""
    await follower(world)
    cli = await world.client()
    await works(cli)
    old, session = cli.parts.source.svid, await cli.parts.keeper.session(1)
    revoke(world, "revoked", fingerprint=old.x5t.hex())
    await lost(session)
    assert old.x5t.hex()[:16] in await refused_at_step_3(world, old)
    await works(cli)


# --- at an agent or client by itself -----------------------------------------------------------------------


async def test_a_running_agent_refuses_a_caller_whose_chain_it_remembers(world):
    echo = await follower(world, "mine")
    cli = await world.client()
    assert await cli.ask(ECHO, "work") == {"worked": ""}
    entry = revoke(world, "mine", spiffe_id=CLI)
    assert "its identity is revoked" in await refused_at_step_3(world, cli.parts.source.svid)
    ran = len(echo.ran)
    with pytest.raises(CallTimeoutError):
        await cli.ask(ECHO, "say", {"text": "x"}, timeout=0.3)
    undo(world, "mine", entry)
    await works(cli)
    assert set(echo.ran[ran:]) == {"say"}


async def test_what_a_revoked_authority_signed_is_refused_although_the_bundle_has_it(world):
    await follower(world, "mine")
    svid = world.issue(CLI)
    (authority,) = world.stack.api.authority.bundle.authority_fingerprints
    revoke(world, "mine", authority=authority.hex())
    assert "the authority" in await refused_at_step_3(world, svid)


async def test_what_a_revoked_identity_began_is_refused_when_others_hand_it_on(world):
    """A link of the delegation is revoked, the caller is not."""
    echo = await follower(world, "mine")
    await world.agent(FRONT)
    cli = await world.client()
    path = {"path": [str(ECHO)], "name": "whoami", "payload": {}}
    assert (await cli.ask(FRONT, "relay", path))["status"] == "completed"
    revoke(world, "mine", spiffe_id=CLI)
    await until(lambda: CLI in echo.parts.verifier._chains.revocations.revoked.spiffe_ids, "the change")
    before = len(world.refusals("echo"))
    assert (await cli.call(str(FRONT), "relay", path)).status == "failed"
    record = world.refusals("echo")[before]
    assert record["step_name"] == "delegation"
    assert "its identity is revoked" in record["reason"]


async def test_an_answer_of_the_revoked_does_not_count(world):
    await world.agent(ECHO)
    cli = await world.client(identity__revocations=str(world.folder / "mine.yaml"))
    await cli.ask(ECHO, "say", {"text": "x"})
    revoke(world, "mine", spiffe_id=ECHO)
    await until(lambda: ECHO in cli.parts.verifier._chains.revocations.revoked.spiffe_ids, "the change")
    with pytest.raises(CallTimeoutError):
        await cli.ask(ECHO, "say", {"text": "x"}, timeout=0.3)
    assert cli.dropped("forged") >= 1


@pytest.mark.slow
async def test_a_broker_that_is_revoked_is_not_spoken_to(world):
    """TLS peers are asked about, too."""
    revoke(world, "mine", spiffe_id=world.stack.broker_id)
    config = world.config(CLI, identity__revocations=str(world.folder / "mine.yaml"))
    with pytest.raises(BusError, match="its identity is revoked"):
        async with connected(config, connect_deadline_s=0.2):
            raise AssertionError("connected")


async def test_a_bad_file_leaves_what_was_revoked_and_counts_an_alarm(world):
    echo = await follower(world, "mine")
    svid = world.issue(CLI)
    revoke(world, "mine", fingerprint=svid.x5t.hex())
    await refused_at_step_3(world, svid)
    replace(world.folder / "mine.yaml", "revoked: [nonsense]")
    await until(lambda: metric(echo.parts, "agentweave_revocation_load_errors_total") == 1, "the alarm")
    await refused_at_step_3(world, svid)


async def test_after_slips_of_any_kind_agent_and_stack_go_on_and_follow_the_next_good_file(world):
    echo, cli = await follower(world), await world.client()
    await works(cli)
    slips = ("2026-02-30", "!!bool maybe", "!!timestamp soon", "!!int ''", "0x" + "f" * 100_000)
    for told, slip in enumerate(slips, 1):
        replace(world.folder / "revoked.yaml", f"revoked: {slip}\n")
        await until(
            lambda told=told: metric(echo.parts, "agentweave_revocation_load_errors_total") == told,
            "the alarm",
        )
        assert await cli.ask(ECHO, "say", {"text": "hi"}) == {"said": "hi"}
    replace(world.folder / "revoked.yaml", "revoked: []\n")
    session = await cli.parts.keeper.session(1)
    revoke(world, "revoked", spiffe_id=CLI)
    await lost(session)


async def test_a_change_empties_what_stood(world):
    echo = await follower(world, "mine")
    cli = await world.client()
    await cli.ask(ECHO, "say", {"text": "x"})
    assert len(echo.parts.authorizer._standing) == 1
    revoke(world, "mine", fingerprint="ab" * 32)
    await until(lambda: len(echo.parts.authorizer._standing) == 0, "the standing answers to go")


async def test_without_the_file_nobody_starts(world):
    config = world.config(CLI, identity__revocations=str(world.folder / "gone.yaml"))
    with pytest.raises(ConfigurationError, match=r"gone\.yaml can't be read"):
        async with connected(config):
            raise AssertionError("started")
