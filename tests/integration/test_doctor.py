"""The doctor beside a real broker and a real Workload API, in health and with each fault really there."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
import yaml

from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.cli.checks import broker
from agentweave_bus.cli.checks.finding import Finding, Status, exit_code, run_checks
from agentweave_bus.cli.checks.patient import examine
from agentweave_bus.cli.doctor import CHECKS, Doctor
from agentweave_bus.cli.exit_codes import exit_code_of, message_of, single_error
from agentweave_bus.config import load_config, load_stack
from agentweave_bus.embedded.assembly import local_stack
from agentweave_bus.exceptions import BusError
from agentweave_bus.identity import Authority, IdentitySource, X509Svid
from agentweave_bus.identity.revocation_file import RevokedEntry, add_revocation
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import Fixed
from tests.integration.probes import CLI, DOMAIN, ECHO
from tests.integration.world import World

pytestmark = pytest.mark.anyio


def written(world: World, tmp_path: Path, who: SpiffeID = CLI, **overrides: object) -> Path:
    sections = {name: overrides.pop(name) for name in list(overrides) if "__" not in name}
    tree = {**world.settings(who, **overrides), **sections}
    tree["authorization"]["audit"]["destination"] = str(tmp_path / "audit.jsonl")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def static(world: World, tmp_path: Path, svid: X509Svid) -> dict[str, object]:
    """An identity from files, in place of the Workload API's."""
    files = {"cert_file": svid.chain_pem(), "key_file": svid.key_pem()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "bundle").write_bytes(world.stack.api.authority.bundle.to_pem())
    section = {name: str(tmp_path / name) for name in files} | {"bundles": {DOMAIN: str(tmp_path / "bundle")}}
    return {"provider": "static", "static": section}


async def examined(path: Path, *, environment: str = "production") -> dict[str, list[Finding]]:
    patient = examine(str(path), environment, None)
    found: dict[str, list[Finding]] = {}
    async with Doctor.of(patient, seconds=4.0) as doctor:
        async for name, finding in run_checks(doctor.checks(), deadline_s=4.0):
            found.setdefault(name, []).append(finding)
    assert list(found) == list(CHECKS)
    return found


def ill(found: dict[str, list[Finding]]) -> dict[str, str]:
    """What failed, by check."""
    return {
        name: one.found for name, several in found.items() for one in several if one.status is Status.FAILED
    }


async def test_all_is_well(world, tmp_path):
    found = await examined(written(world, tmp_path))
    assert ill(found) == {}
    assert {name for name, several in found.items() if several[0].status is Status.SKIPPED} == {
        "agents",
        "stack",
    }
    assert str(CLI) in found["workload-api"][0].found
    assert "nats-server 2." in found["broker"][0].found
    assert "(measured to 0.0 s)" in found["clock"][0].found


async def test_nothing_listens(world, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = await examined(written(world, tmp_path, bus__servers=[f"tls://127.0.0.1:{port}"]))
    assert list(ill(found)) == ["broker"]
    assert "nothing listens at" in ill(found)["broker"]
    assert found["clock"][0].status is Status.SKIPPED
    assert exit_code(one for several in found.values() for one in several) == 4


@pytest.mark.slow
async def test_the_server_is_another(world, tmp_path):
    other = f"spiffe://{DOMAIN}/agentweave/other"
    found = await examined(written(world, tmp_path, bus__server_spiffe_id=other))
    assert list(ill(found)) == ["broker"]
    assert f"not {other}" in ill(found)["broker"]
    assert exit_code(one for several in found.values() for one in several) == 3


async def test_the_broker_has_no_user_for_this_identity(world, tmp_path):
    stranger = SpiffeID(f"spiffe://{DOMAIN}/client/stranger")
    await world.stack.api.serve(stranger)
    path = written(world, tmp_path, stranger)
    try:
        found = await examined(path)
        with pytest.raises((BusError, BaseExceptionGroup)) as refused:
            async with AgentWeaveClient(load_config(path), connect_deadline_s=1.5):
                pass
    finally:
        await world.stack.api.withdraw(stranger)
    error = single_error(refused.value)
    assert isinstance(error, BusError)
    assert exit_code_of(error) == 3
    assert "agentweave doctor" in message_of(error)
    assert list(ill(found)) == ["broker"]
    assert "has no user for this identity" in ill(found)["broker"]


async def test_the_broker_refuses_the_certificate(world, tmp_path):
    foreign = Authority(DOMAIN).issue(CLI)
    path = written(world, tmp_path, identity=static(world, tmp_path, foreign))
    found = await examined(path, environment="development")
    assert list(ill(found)) == ["broker"]
    assert (
        "TLS" in ill(found)["broker"]
        or "hung up" in ill(found)["broker"]
        or "ended" in found["broker"][0].advice
    )


@pytest.mark.slow  # a failed handshake is given up after seconds
@pytest.mark.parametrize("says", [b"INFO {}\r\n", None], ids=["in plain text", "never"])
async def test_who_listens_is_no_broker(world, tmp_path, says):
    async def serve(stream):
        async with stream:
            if says is not None:
                await stream.send(says)
            await anyio.sleep_forever()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    path = written(world, tmp_path, bus__servers=[f"tls://127.0.0.1:{port}"], bus__connect_timeout=0.5)
    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, serve)
        found = await examined(path)
        group.cancel_scope.cancel()
    await listener.aclose()
    assert list(ill(found)) == ["broker"]
    assert found["broker"][0].code == 4
    assert ("does not answer in time" if says is None else "a nats-server that speaks before TLS") in ill(
        found
    )["broker"]


@pytest.mark.parametrize(
    ("begins", "said"), [(timedelta(hours=-3), "expired at"), (timedelta(hours=1), "valid only from")]
)
async def test_an_svid_of_another_time(world, tmp_path, begins, said):
    svid = world.issue(CLI, not_before=datetime.now(UTC) + begins)
    path = written(world, tmp_path, identity=static(world, tmp_path, svid))
    found = await examined(path, environment="development")
    assert list(ill(found)) == ["svid"]
    assert said in ill(found)["svid"]
    assert found["broker"][0].status is Status.SKIPPED


async def test_no_workload_api(world, tmp_path):
    path = written(world, tmp_path, identity={"spiffe_endpoint": f"unix://{tmp_path}/no.sock"})
    found = await examined(path)
    assert list(ill(found)) == ["workload-api"]
    assert "no Workload API at" in ill(found)["workload-api"]


async def test_the_workload_api_gives_another_identity(world, tmp_path):
    endpoint = world.stack.api.endpoint(ECHO)
    found = await examined(written(world, tmp_path, identity={"spiffe_endpoint": endpoint}))
    assert list(ill(found)) == ["workload-api"]
    assert f"gives {ECHO}" in ill(found)["workload-api"]


@pytest.mark.parametrize(("ahead", "status"), [(0, Status.OK), (10, Status.FAILED), (-10, Status.FAILED)])
async def test_the_clock_is_compared_with_the_brokers(world, tmp_path, ahead, status):
    config = examine(str(written(world, tmp_path)), None, None).configs[0]
    source = IdentitySource(Fixed(world.issue(CLI), world.stack.api.authority.bundle))
    await source.start(5)
    async with broker.connected_session(config, source, world.stack.bus_url) as session:
        measured = await broker.broker_time(session, CLI, timeout_s=5, clock=lambda: time.time() + ahead)
    await source.aclose()
    assert abs(measured[0] - ahead) < 5
    assert broker.clock_finding(*measured).status is status


@pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds what compiles Rego")
async def test_what_lies_here_is_looked_at_too(world, tmp_path):
    """Several faults at once: each is found by its own check, and the exit code is that of the files."""
    (tmp_path / "order.rego").write_text("package order.authz\nallow if {")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = written(
            world,
            tmp_path,
            authorization={"bundle": str(tmp_path), "audit": {}},
            observability={"metrics": {"port": taken.getsockname()[1]}},
            identity__revocations=str(tmp_path / "gone.yaml"),
        )
        found = await examined(path)
    assert list(ill(found)) == ["ports", "policy", "revocations"]
    assert "order.rego:2" in ill(found)["policy"]
    assert exit_code(one for several in found.values() for one in several) == 2


@pytest.mark.slow
async def test_a_running_stack_and_a_client_of_it_that_is_revoked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grants.yaml").write_text("grants: []\n")
    (tmp_path / "revoked.yaml").write_text("revoked: []\n")
    stack = {"grants": "grants.yaml", "revocations": "revoked.yaml", "clients": ["cli", "other"]}
    (tmp_path / "agentweave.yaml").write_text(yaml.safe_dump(stack))
    async with local_stack(load_stack(), lambda _worker, _line: None) as running:
        found = await examined(tmp_path / "agentweave.yaml")
        assert ill(found) == {}
        assert found["stack"][0].found == "the stack is running"
        cli = SpiffeID("spiffe://agentweave.local/client/cli")
        entry = RevokedEntry.model_validate(
            {"spiffe_id": str(cli), "reason": "a test", "time": datetime.now(UTC)}
        )
        add_revocation(tmp_path / "revoked.yaml", entry)
        with anyio.fail_after(30):
            while "has no user" not in ill(found).get("broker", ""):  # the broker first cuts who is connected
                found = await examined(tmp_path / "agentweave.yaml")
        assert set(ill(found)) == {"broker", "revocations"}
        assert "its identity is revoked" in ill(found)["revocations"]
        other = await examined(running.clients[SpiffeID("spiffe://agentweave.local/client/other")])
        assert ill(other) == {}
