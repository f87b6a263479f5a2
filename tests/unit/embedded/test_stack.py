"""The embedded stack takes its grants from where agents take theirs, whatever that is."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime

import anyio
import pytest

from agentweave_bus.authz import Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.bus.connection import BrokerClient
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.embedded import stack as stack_module
from agentweave_bus.embedded.stack import StackSettings, embedded_stack
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.identity import (
    IdentitySource,
    RetiredAuthorities,
    SpiffeID,
    SPIFFEIdentityProvider,
    client_context,
)
from agentweave_bus.identity.revocation_file import RevokedEntry, add_revocation, remove_revocations

CALLER = SpiffeID("spiffe://a.test/client/cli")
CALLEE = SpiffeID("spiffe://a.test/agent/callee")
GRANTS = f"grants: [{{caller: '{CALLER}', callee: '{CALLEE}', capabilities: [greet]}}]\n"


@pytest.fixture
def policies(tmp_path):
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "data.yaml").write_text("shop: {open: true}\n")
    return folder


@contextlib.asynccontextmanager
async def running(policies, tmp_path):
    settings = StackSettings("a.test", tmp_path / "state", (CALLER, CALLEE), grants=policies)
    async with embedded_stack(settings, settle=False) as stack:
        yield stack


async def may_ask(stack) -> bool:
    """Whether the broker lets the caller publish to the callee now."""
    source = IdentitySource(
        SPIFFEIdentityProvider(stack.api.endpoint(CALLER), CALLER),
        allowed_trust_domains=(),
        expected_id=CALLER,
    )
    await source.start(5)
    refused = []

    async def error(problem):
        refused.append(problem)

    client = BrokerClient()
    await client.connect(
        stack.bus_url,
        tls=client_context(source, stack.broker_id),
        tls_hostname="127.0.0.1",
        tls_handshake_first=True,
        allow_reconnect=False,
        error_cb=error,
    )
    try:
        await client.publish(call_subject(CALLEE, "greet"), b"")
        await client.flush(5)
    finally:
        await client.close()
        await source.aclose()
    return not refused


async def asked_until(stack, wanted) -> None:
    with anyio.fail_after(30):
        while await may_ask(stack) != wanted:  # noqa: ASYNC110 - the broker is another process
            await anyio.sleep(0.2)


@pytest.mark.anyio
async def test_a_policy_directory_with_grants_yml_grants_at_the_broker(policies, tmp_path):
    (policies / "grants.yml").write_text(GRANTS)
    async with running(policies, tmp_path) as stack:
        assert await may_ask(stack)


@pytest.mark.anyio
async def test_a_policy_directory_without_grants_grants_nothing_until_one_comes(policies, tmp_path):
    async with running(policies, tmp_path) as stack:
        assert not await may_ask(stack)
        (policies / "grants.yaml").write_text(GRANTS)
        await asked_until(stack, wanted=True)
        (policies / "grants.yaml").unlink()
        await asked_until(stack, wanted=False)


@pytest.mark.anyio
async def test_whatever_is_wrong_with_its_files_the_stack_goes_on(policies, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise KeyError("nobody foresaw this")

    async def told(count):
        with anyio.fail_after(30):
            while len(caplog.records) < count:  # noqa: ASYNC110 - there is no event for it
                await anyio.sleep(0.02)

    caplog.set_level("ERROR", logger="agentweave_bus.embedded.stack")
    (policies / "grants.yaml").write_text(GRANTS)
    async with running(policies, tmp_path) as stack:
        (policies / "grants.yaml").write_text(GRANTS + "note: 2026-02-30\n")
        stack.look_again()
        await told(1)
        with monkeypatch.context() as patch:
            patch.setattr(Grants, "load", fails)
            (policies / "grants.yaml").write_text(GRANTS + "operators: []\n")
            stack.look_again()
            await told(2)
        with monkeypatch.context() as patch:
            patch.setattr(stack_module, "broker_users", fails)
            (policies / "grants.yaml").write_text("grants: []\n")
            stack.look_again()
            await told(3)
            stack.look_again()
            assert await may_ask(stack)
        assert [bool(record.exc_info) for record in caplog.records] == [False, True, True]
        await stack.in_line()
        assert not await may_ask(stack)


@pytest.mark.anyio
async def test_the_control_role_remembers_an_authority_that_left_until_it_is_revoked(tmp_path, monkeypatch):
    """In the state directory, as agents do: it reads what was parked or given up weeks ago."""
    made, revoked = [], tmp_path / "revoked.yaml"
    revoked.write_text("revoked: []\n")

    def remembers(*args, **more):
        made.append(RetiredAuthorities(*args, **more))
        return made[-1]

    async def until(remembered):
        with anyio.fail_after(30):
            while (made[0].bundle_at("a.test", 0, now_ms=now_ms()) is not None) != remembered:  # noqa: ASYNC110 - no event
                await anyio.sleep(0.01)

    monkeypatch.setattr(stack_module, "RetiredAuthorities", remembers)
    settings = StackSettings("a.test", tmp_path / "state", (), revocations=revoked)
    async with embedded_stack(settings, settle=False) as stack:
        authority = stack.api.authority
        (old,) = authority.bundle.authority_fingerprints
        authority.rotate()
        stack.api.rotate()
        authority.retire()
        stack.api.announce()
        await until(remembered=True)
        (folder,) = (tmp_path / "state" / "authorities").iterdir()
        assert folder.name.startswith("agentweave-control-")
        entry = RevokedEntry(authority=old.hex(), reason="stolen", time=datetime.now(UTC))
        add_revocation(revoked, entry)
        stack.look_again()
        await until(remembered=False)
        await stack.in_line()
        remove_revocations(revoked, entry.subject)
        stack.look_again()
        await stack.in_line()
        await until(remembered=False)


def now_ms():
    return time.time_ns() // 1_000_000


def test_a_file_is_its_own_grants_file_and_nothing_has_none(policies):
    assert grants_file(None) is None
    assert grants_file(policies) is None
    assert grants_file(policies / "any.yaml") == policies / "any.yaml"


def test_two_grants_files_are_refused(policies):
    for name in ("grants.yaml", "grants.yml"):
        (policies / name).write_text(GRANTS)
    with pytest.raises(ConfigurationError, match="keep one"):
        grants_file(policies)
