"""Each check of the doctor, well and ill. The faults are real: sockets, files, processes that answer wrongly."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import nats.errors
import pytest
import yaml

from agentweave_bus.authz import Grants
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.cli.checks import broker, identity, machine, policy
from agentweave_bus.cli.checks.finding import (
    Check,
    Finding,
    Status,
    exit_code,
    failed,
    ok,
    run_checks,
    skipped,
    warning,
)
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.config import load_config
from agentweave_bus.exceptions import ConfigurationError, IdentityError, PolicyLoadError
from agentweave_bus.identity import Authority, PeerRefusedError
from agentweave_bus.spiffe_id import SpiffeID

DOMAIN = "shop.test"
ORDER, STOCK = (SpiffeID(f"spiffe://{DOMAIN}/agent/{name}") for name in ("order", "stock"))
CLI = SpiffeID(f"spiffe://{DOMAIN}/client/cli")
NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def one(findings: object) -> Finding:
    (finding,) = list(findings)  # type: ignore[call-overload]
    assert isinstance(finding, Finding)
    return finding


# --- running them ------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_each_check_has_a_deadline_and_errors_are_findings() -> None:
    async def hangs() -> list[Finding]:
        await anyio.sleep_forever()
        raise AssertionError

    async def raises() -> list[Finding]:
        raise ConfigurationError("wrong")

    async def well() -> list[Finding]:
        return [ok("fine")]

    async def breaks() -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/proc/1/mem")

    checks = [Check("a", hangs), Check("b", raises), Check("c", well), Check("d", breaks)]
    found = [pair async for pair in run_checks(checks, deadline_s=0.05)]
    assert [(name, finding.status, finding.code) for name, finding in found] == [
        ("a", Status.FAILED, ExitCode.UNREACHABLE),
        ("b", Status.FAILED, ExitCode.USAGE),
        ("c", Status.OK, ExitCode.DONE),
        ("d", Status.FAILED, ExitCode.USAGE),
    ]
    assert "PermissionError: [Errno 13] Permission denied: '/proc/1/mem'" in found[-1][1].found


def test_the_exit_code_is_of_what_has_to_be_put_right_first() -> None:
    far = failed("x", "", ExitCode.UNREACHABLE)
    assert exit_code([ok("x"), warning("x", ""), skipped("x")]) == 0
    assert exit_code([far]) == 4
    assert exit_code([far, failed("x", "", ExitCode.DENIED)]) == 3
    assert exit_code([far, failed("x", "")]) == 2


# --- versions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("2.15.1", True), ("2.14.4", True), ("2.14.3", False), ("2.13.9", False), ("2.12.14", True),
        ("2.12.13", False), ("v2.12.15-beta", True), ("2.10.0", False), ("", False), ("nonsense", False),
    ],
)  # fmt: skip
def test_the_brokers_version(text: str, good: bool) -> None:
    assert (machine.broker_version_finding(text).status is Status.OK) is good


def test_python_and_the_client_library() -> None:
    assert one(machine.version_findings()).status is Status.OK
    assert "Python is too old" in one(machine.version_findings((3, 10, 9))).found
    assert "nats-py is too old" in one(machine.version_findings(nats_py="2.10.9")).found


def program(folder: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program that says something first of all that is found, alone."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    monkeypatch.setenv("AGENTWEAVE_TOOLS", str(folder))


@pytest.mark.parametrize(
    ("says", "status"),
    [("Version: 1.21.3", Status.OK), ("Version: 1.20.0", Status.WARNING), ("Version: 0.70.0", Status.FAILED)],
)
def test_the_opa_that_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, status: Status
) -> None:
    program(tmp_path, "opa", says, monkeypatch)
    assert machine.opa_finding(needed=True).status is status


def test_no_opa_matters_where_rego_has_to_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "AGENTWEAVE_TOOLS", "PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    assert machine.opa_finding(needed=False).status is Status.OK
    assert machine.opa_finding(needed=True).status is Status.FAILED
    assert policy.has_own_rego(tmp_path) is False
    (tmp_path / "order.rego").write_text("package order.authz\n")
    assert policy.has_own_rego(tmp_path) is True


def test_a_server_program_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(machine.tool_findings()).status is Status.OK
    program(tmp_path, "nats-server", "nats-server: v2.10.1", monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))
    found = one(machine.tool_findings())
    assert found.status is Status.FAILED
    assert "is 2.10.1" in found.found


# --- disk and files ----------------------------------------------------------------------------------------


def test_an_audit_log_that_can_be_written_and_one_that_can_not(tmp_path: Path) -> None:
    assert one(machine.audit_findings(tmp_path / "later" / "a.jsonl")).status is Status.OK
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    found = one(machine.audit_findings(tmp_path / "file" / "a.jsonl"))
    assert (found.status, found.code) == (Status.FAILED, ExitCode.USAGE)
    assert "can't be written: Not a directory" in found.found
    (tmp_path / "a.jsonl").mkdir()
    assert "Is a directory" in one(machine.audit_findings(tmp_path / "a.jsonl")).found


@pytest.mark.parametrize(
    ("free", "status"),
    [
        (50 * 1024**3, Status.OK),
        (20 * 1024**3, Status.WARNING),
        (2**29, Status.WARNING),
        (2**20, Status.FAILED),
    ],
)
def test_a_disk_that_gets_full(free: int, status: Status) -> None:
    assert machine.disk_finding(Path("a"), free=free, total=1000 * 1024**3).status is status


@pytest.mark.parametrize(
    ("mode", "secret", "said"),
    [
        (0o600, True, None), (0o640, True, "may be read"), (0o640, False, None), (0o644, False, None),
        (0o664, False, "may be changed"), (0o646, False, "may be changed"),
    ],
)  # fmt: skip
def test_files_that_are_open_to_others(tmp_path: Path, mode: int, secret: bool, said: str | None) -> None:
    path = tmp_path / "file"
    path.write_text("")
    path.chmod(mode)
    found = machine.open_to_others(path, secret=secret)
    assert (found is None) if said is None else (found is not None and said in found.found)


def test_folders_that_are_open_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "chmod go-w" in (machine.open_to_others(tmp_path) or ok("")).advice
    tmp_path.chmod(0o1777)
    assert machine.open_to_others(tmp_path) is None
    assert "chmod 700" in (machine.open_to_others(tmp_path, secret=True) or ok("")).advice
    assert machine.open_to_others(tmp_path / "nothing") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user(tmp_path: Path) -> None:
    os.chown(tmp_path, 12_345, -1)
    assert (machine.open_to_others(tmp_path) or ok("")).status is Status.WARNING


# --- ports -------------------------------------------------------------------------------------------------


@contextmanager
def answering(answer: bytes, *, wait_for: int = 1) -> Iterator[int]:
    """Listen on a port and give each who connects and writes the same answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    if wait_for:
                        connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def test_a_port_that_is_free_taken_or_taken_by_the_agent_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert machine.port_finding("key", "127.0.0.1", port).status is Status.OK
    assert machine.port_finding("key", "127.0.0.1", 0).status is Status.OK
    said = b'HTTP/1.0 200 OK\r\n\r\n{"agent": "' + ORDER.encode() + b'"}'
    with answering(said) as taken:
        assert machine.port_finding("key", "127.0.0.1", taken, mine=str(ORDER)).status is Status.OK
        found = machine.port_finding("bus.port", "127.0.0.1", taken, mine=str(STOCK))
        assert (found.status, found.code) == (Status.FAILED, ExitCode.USAGE)
        assert "Set bus.port to another" in found.advice


# --- identity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "status", "said"),
    [
        (timedelta(minutes=10), Status.OK, "valid for 50 minutes"),
        (timedelta(minutes=50), Status.WARNING, "expires in 10 minutes"),
        (timedelta(hours=3), Status.FAILED, "expired at"),
        (timedelta(hours=-1), Status.FAILED, "valid only from"),
    ],
)
def test_how_long_an_svid_lasts(at: timedelta, status: Status, said: str) -> None:
    svid = Authority(DOMAIN).issue(ORDER, not_before=NOW, lifetime=timedelta(hours=1))
    found = identity.svid_finding(svid.not_before, svid.expiry, now_s=(NOW + at).timestamp())
    assert found.status is status
    assert said in found.found


def config(folder: Path, **sections: object) -> Path:
    path = folder / "order.yaml"
    path.write_text(yaml.safe_dump({"agent": {"name": "order", "trust_domain": DOMAIN}, **sections}))
    return path


@pytest.mark.anyio
@pytest.mark.parametrize("fault", ["missing", "a file", "nobody answers", "nonsense"])
async def test_workload_apis_that_give_nothing(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "api.sock"
    if fault == "a file":
        path.write_text("")
    server = socket.socket(socket.AF_UNIX)
    if fault in {"nobody answers", "nonsense"}:
        server.bind(str(path))
    if fault == "nonsense":
        server.listen(8)  # takes the connection and never says a word
    loaded = load_config(config(tmp_path, identity={"spiffe_endpoint": f"unix://{path}"}))
    provider = identity.provider_of(loaded, seconds=0.3)
    try:
        with pytest.raises(IdentityError) as refused:
            await identity.get_svid(provider)
    finally:
        await provider.aclose()
        server.close()
    expected = {"missing": "no Workload API at", "a file": "is no socket"}.get(fault, "answer")
    assert expected in str(refused.value)


def test_an_identity_that_is_another(tmp_path: Path) -> None:
    loaded = load_config(config(tmp_path))
    assert one(identity.identity_findings(loaded, Authority(DOMAIN).issue(ORDER))).status is Status.OK
    found = one(identity.identity_findings(loaded, Authority(DOMAIN).issue(STOCK)))
    assert (found.status, found.code) == (Status.FAILED, ExitCode.DENIED)


def test_who_could_take_the_identity(tmp_path: Path) -> None:
    """A socket's folder in which others may put a socket of their own, and a key that others may read."""
    folder = tmp_path / "sockets"
    folder.mkdir()
    loaded = load_config(config(tmp_path, identity={"spiffe_endpoint": f"unix://{folder}/api.sock"}))
    folder.chmod(0o755)
    assert list(identity.identity_files(loaded)) == []
    folder.chmod(0o777)
    assert "may be changed" in one(identity.identity_files(loaded)).found
    for name in ("cert", "key", "bundle"):
        (folder / name).write_text("")
    static = {"cert_file": str(folder / "cert"), "key_file": str(folder / "key")}
    section = {"provider": "static", "static": static | {"bundles": {DOMAIN: str(folder / "bundle")}}}
    loaded = load_config(config(tmp_path, identity=section), environment="development")
    (folder / "key").chmod(0o600)
    assert list(identity.identity_files(loaded)) == []
    (folder / "key").chmod(0o644)
    assert "may be read" in one(identity.identity_files(loaded)).found


def test_an_identity_that_stands_in_the_file_of_revocations(tmp_path: Path) -> None:
    svid = Authority(DOMAIN).issue(ORDER)
    file = tmp_path / "revoked.yaml"
    assert "no file" in one(identity.revocation_findings(None, svid)).found
    file.write_text("revoked: []")
    assert one(identity.revocation_findings(file, svid)).status is Status.OK
    entry = {"reason": "x", "time": NOW.isoformat()}
    for what in (
        {"spiffe_id": str(ORDER)},
        {"fingerprint": svid.x5t.hex()},
        {"spiffe_id": str(ORDER), "issued_before": datetime.now(UTC).isoformat()},
    ):
        file.write_text(yaml.safe_dump({"revoked": [entry | what]}))
        found = one(identity.revocation_findings(file, svid))
        assert (found.status, found.code) == (Status.FAILED, ExitCode.DENIED)


def test_a_file_of_revocations_that_is_missing_empty_or_wrong(tmp_path: Path) -> None:
    file = tmp_path / "revoked.yaml"
    found = one(identity.revocation_findings(file, None))
    assert (found.status, found.code) == (Status.FAILED, ExitCode.USAGE)
    assert "can't be read" in found.found
    assert f"write the line `revoked: []` into {file}" in found.advice
    for text in ("", "revoked:\n", "revoked: [nonsense]\n"):
        file.write_text(text)
        found = one(identity.revocation_findings(file, None))
        assert (found.status, "`revoked: []`" in found.advice) == (Status.FAILED, True)


# --- broker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "said", "code"),
    [
        (PeerRefusedError("the TLS peer is x, not y"), "not y", 3),
        (nats.errors.AuthorizationError(), "has no user", 3),
        (socket.gaierror("unknown"), "no such host", 4),
        (ConnectionRefusedError(), "nothing listens", 4),
        (TimeoutError(), "does not answer", 4),
        (ConnectionResetError("by peer"), "hung up", 4),
        (nats.errors.Error("stale"), "tls://x:1: outer", 4),
    ],
)
def test_why_a_connection_was_not_made(cause: BaseException, said: str, code: int) -> None:
    outer = ValueError("outer")
    outer.__cause__ = cause
    found = broker.connect_failure("tls://x:1", outer)
    assert found.status is Status.FAILED
    assert said in found.found
    assert found.code == code
    assert found.advice


@pytest.mark.parametrize(
    ("ahead", "off", "status"),
    [
        (0.01, 0.01, Status.OK), (-0.9, 0, Status.OK), (1.5, 0, Status.WARNING), (2.5, 0, Status.FAILED),
        (-40, 0.5, Status.FAILED), (2.5, 1.0, Status.WARNING),
    ],
)  # fmt: skip
def test_clocks_that_differ(ahead: float, off: float, status: Status) -> None:
    assert broker.clock_finding(ahead, off).status is status


# --- policy ------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_policies_that_are_missing_wrong_or_lack_the_package(tmp_path: Path) -> None:
    assert one(await policy.policy_findings(None)).status is Status.WARNING
    with pytest.raises(PolicyLoadError, match="does not exist"):
        await policy.policy_findings(tmp_path / "gone")
    file = tmp_path / "grants.yaml"
    file.write_text("grants: []")
    assert one(await policy.policy_findings(file)).status is Status.OK
    found = one(await policy.policy_findings(file, "agentweave/grant"))
    assert (found.status, "Did you mean agentweave/grants?" in found.advice) == (Status.FAILED, True)
    file.write_text("grants: [nonsense]")
    with pytest.raises(PolicyLoadError):
        await policy.policy_findings(file)
    file.write_text("grants: []")
    file.chmod(0o666)
    assert "may be changed" in (await policy.policy_findings(file))[1].found


@pytest.mark.anyio
@pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds what compiles Rego")
async def test_rego_that_does_not_compile(tmp_path: Path) -> None:
    (tmp_path / "order.rego").write_text("package order.authz\nallow if {")
    with pytest.raises(PolicyLoadError, match=r"order\.rego:2"):
        await policy.policy_findings(tmp_path, "order/authz")


@pytest.mark.anyio
async def test_opa_servers_that_do_not_answer(tmp_path: Path) -> None:
    section = {"provider": "opa", "opa_endpoint": f"unix://{tmp_path}/opa.sock"}
    loaded = load_config(config(tmp_path, authorization=section))
    found = one(await policy.opa_server_findings(loaded, None))
    assert (found.status, found.code) == (Status.FAILED, ExitCode.UNREACHABLE)
    embedded = load_config(config(tmp_path))
    assert one(await policy.opa_server_findings(embedded, None)).status is Status.OK


# --- grants ------------------------------------------------------------------------------------------------

KNOWN = policy.Known(
    DOMAIN,
    frozenset({ORDER, STOCK, CLI}),
    {str(STOCK): ["take", "health"]},
    {str(STOCK): frozenset({DOMAIN}), str(ORDER): frozenset({DOMAIN, "other.test"})},
)


def grant(caller: str = CLI, callee: str = STOCK, names: tuple[str, ...] = ("take",), **more: object) -> dict:  # type: ignore[type-arg]
    return {"caller": str(caller), "callee": str(callee), "capabilities": list(names), **more}


def judged(folder: Path, *grants: object) -> list[str]:
    file = folder / "grants.yaml"
    file.write_text(yaml.safe_dump({"grants": list(grants)}))
    findings = list(policy.grants_findings(file, KNOWN))
    if [finding.status for finding in findings] == [Status.OK]:
        return []
    assert {finding.status for finding in findings} == {Status.WARNING}
    return [finding.found.partition("grants.yaml: ")[2] for finding in findings]


def test_one_grant_is_counted_as_one(tmp_path: Path) -> None:
    file = tmp_path / "grants.yaml"
    file.write_text(yaml.safe_dump({"grants": [grant()]}))
    assert one(policy.grants_findings(file, KNOWN)).found.endswith(": 1 grant, which can match")
    file.write_text(yaml.safe_dump({"grants": [grant(), grant(names=("health",))]}))
    assert one(policy.grants_findings(file, KNOWN)).found.endswith(": 2 grants, each of which can match")


@pytest.mark.parametrize(
    "good",
    [
        [grant()],
        [grant(), grant(names=("health",))],
        [grant(f"spiffe://{DOMAIN}/client/*")],
        [grant("spiffe://other.test/agent/x", ORDER)],
        [grant(limits={"max_amount": 5}), grant(names=("health",))],
        [grant(limits={"max_amount": 5}), grant(limits={"max_amount": 9}, principals=["https://a.example"])],
        [grant(on_behalf_of=[str(ORDER)]), grant()][:1],
        [grant(f"spiffe://{DOMAIN}/agentweave/control")],
        [grant(kinds=["call"]), grant(kinds=["task"])],
    ],
)
def test_grants_that_can_match(tmp_path: Path, good: list[object]) -> None:
    assert judged(tmp_path, *good) == []


@pytest.mark.parametrize(
    ("grants", "said"),
    [
        ([grant(names=("tak",))], "has no capability 'tak'; did you mean 'take'?"),
        ([grant(f"spiffe://{DOMAIN}/client/cly")], f"is nobody here; did you mean {CLI}?"),
        ([grant(f"spiffe://{DOMAIN}/team/*")], "is nobody here"),
        ([grant(ORDER, f"spiffe://{DOMAIN}/agent/gone", ("x",))], "callee"),
        ([grant("spiffe://other.test/agent/x")], "allowed_trust_domains lack other.test"),
        ([grant(), grant(limits={"max_amount": 5})], "its limits never bite"),
        ([grant(names=("*",)), grant()], "adds nothing to grants[0]"),
        ([grant(f"spiffe://{DOMAIN}/client/*"), grant()], "adds nothing to grants[0]"),
        ([grant(), grant(on_behalf_of=[str(ORDER)])], "adds nothing to grants[0]"),
        ([grant(principals=["*"]), grant(principals=["https://a.example"])], "adds nothing to grants[0]"),
        ([grant(), grant()], "repeats grants[0]"),
    ],
)
def test_grants_that_are_in_vain(tmp_path: Path, grants: list[object], said: str) -> None:
    (found,) = judged(tmp_path, *grants)
    assert said in found


def test_without_a_stack_nobody_is_said_not_to_exist() -> None:
    grants = Grants.parse(yaml.safe_dump({"grants": [grant("spiffe://anywhere.test/agent/x")]}))
    assert list(policy.idle_grants(grants, policy.Known())) == []
