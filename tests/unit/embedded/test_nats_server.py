"""A real nats-server as a child: found, started, reloaded, killed, and joined over mutual TLS."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import anyio
import nats
import nats.errors
import pytest
import uvloop

from agentweave_bus.embedded.nats_server import (
    MINIMUM_VERSION,
    NatsServer,
    NatsServerBinary,
    find_nats_server,
    tools_directory,
)
from agentweave_bus.exceptions import BusError, ConfigurationError
from agentweave_bus.identity import Authority, IdentitySource, PeerRefusedError, SpiffeID, client_context

BROKER = SpiffeID("spiffe://a.test/broker")
WORKER = SpiffeID("spiffe://a.test/agent/worker")
PLAIN = "server_name: test\n"


def script(path, answer, code=0):
    path.write_text(f"#!/bin/sh\n{answer}\nexit {code}\n")
    path.chmod(0o755)
    return path


def program(folder, version):
    folder.mkdir(exist_ok=True)
    return script(folder / "nats-server", f"echo nats-server: v{version}")


@pytest.fixture
def only(monkeypatch, tmp_path):
    """Hide every real nats-server."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(sys, "executable", str(empty / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(empty))
    return tmp_path


def test_the_first_recent_one_is_taken(only, monkeypatch):
    tools = only / "tools"
    recent = program(only / "empty", "2.15.1")
    assert find_nats_server(tools=tools) == NatsServerBinary(recent, (2, 15, 1))
    kept = program(tools, ".".join(map(str, MINIMUM_VERSION)))
    monkeypatch.setenv("PATH", str(only / "nowhere"))
    assert find_nats_server(tools=tools).path == kept
    first = program(only / "bin", "2.99.0")
    monkeypatch.setenv("PATH", str(only / "bin"))
    assert find_nats_server(tools=tools).path == first


def test_old_and_broken_ones_are_passed_over_and_named(only, monkeypatch):
    old = program(only / "bin", "2.14.3")
    monkeypatch.setenv("PATH", str(old.parent))
    broken = only / "tools" / "nats-server"
    broken.parent.mkdir()
    script(broken, "echo nonsense", code=1)
    with pytest.raises(ConfigurationError) as refusal:
        find_nats_server(tools=broken.parent)
    text = str(refusal.value)
    assert f"{old} is 2.14.3" in text
    assert f"{broken} is not runnable" in text
    assert "agentweave-bus[embedded]" in text


def test_none_at_all_says_how_to_get_one(only):
    with pytest.raises(ConfigurationError, match=r"2\.14\.4 or later was found\. Install agentweave-bus"):
        find_nats_server(tools=only / "tools")


def test_the_tools_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTWEAVE_TOOLS", str(tmp_path))
    assert tools_directory() == tmp_path
    monkeypatch.delenv("AGENTWEAVE_TOOLS")
    assert tools_directory() == Path.home() / ".cache" / "agentweave" / "tools"


def test_the_installed_package_brings_one():
    assert find_nats_server().version >= MINIMUM_VERSION


@pytest.mark.anyio
async def test_it_is_ready_when_start_returns_and_gone_after_stop(tmp_path):
    async with NatsServer(PLAIN, tmp_path) as server:
        connection = await nats.connect(server.url)
        assert connection.connected_url.port == server.port
        await connection.close()
        pid = server.pid
        assert os.getsid(pid) == pid  # Ctrl-C in our terminal is not for it
        await server.start()
        assert server.pid == pid
        other = NatsServer(PLAIN, tmp_path / "other")
        async with other:
            assert other.port != server.port
    assert not server.running
    assert server.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await server.stop()


@pytest.mark.anyio
async def test_a_restart_and_a_crash_keep_the_port(tmp_path):
    async with NatsServer(PLAIN, tmp_path) as server:
        port, pid = server.port, server.pid
        await server.restart()
        assert server.port == port
        assert server.pid != pid
        os.kill(server.pid, signal.SIGKILL)
        with anyio.fail_after(30):
            assert await server.wait() == -signal.SIGKILL
        assert not server.running
        await server.start()
        assert server.port == port
        await (await nats.connect(server.url)).close()


@pytest.mark.anyio
async def test_a_port_that_is_taken_names_the_key(tmp_path):
    async with NatsServer(PLAIN, tmp_path) as server:
        second = NatsServer(PLAIN, tmp_path / "second", port=server.port)
        with pytest.raises(ConfigurationError, match=f"Port {server.port} .* is taken") as refusal:
            await second.start()
        assert refusal.value.key == "bus.port"
        assert not second.running


@pytest.mark.anyio
async def test_one_that_ignores_sigterm_is_killed(tmp_path):
    stubborn = script(
        tmp_path / "nats-server",
        "trap '' TERM; echo '[1] [INF] Listening for client connections on 127.0.0.1:1' >&2\n"
        "echo '[1] [INF] Server is ready' >&2; while :; do sleep 0.1; done",
    )
    server = NatsServer(PLAIN, tmp_path / "d", binary=NatsServerBinary(stubborn, (9, 0, 0)), timeout=0.5)
    await server.start()
    with anyio.fail_after(30):
        await server.stop()
    assert not server.running


@pytest.mark.anyio
async def test_one_that_is_never_ready_is_bounded_quoted_and_ended(tmp_path):
    silent = script(tmp_path / "nats-server", "echo '[1] [ERR] I am stuck' >&2; exec sleep 60")
    server = NatsServer(PLAIN, tmp_path / "d", binary=NatsServerBinary(silent, (9, 0, 0)), timeout=0.5)
    with anyio.fail_after(30), pytest.raises(BusError, match=r"within 0\.5 s.*I am stuck"):
        await server.start()
    assert not server.running


@pytest.mark.anyio
async def test_one_that_is_given_up_is_ended_and_reaped(tmp_path):
    os.mkfifo(said := tmp_path / "pid")
    deaf = script(tmp_path / "nats-server", f"trap '' TERM; echo $$ > {said}; while :; do sleep 0.1; done")
    server = NatsServer(PLAIN, tmp_path / "d", binary=NatsServerBinary(deaf, (9, 0, 0)))
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(server.start)
            pid = int(await anyio.to_thread.run_sync(said.read_text))
            group.cancel_scope.cancel()
    assert not server.running
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.anyio
async def test_a_bad_configuration_is_quoted(tmp_path):
    with pytest.raises(ConfigurationError, match="no_such_setting"):
        await NatsServer("no_such_setting: 1\n", tmp_path).start()
    with pytest.raises(ConfigurationError, match="log_file"):
        NatsServer("log_file: x\n", tmp_path)
    with pytest.raises(BusError, match="not started"):
        _ = NatsServer(PLAIN, tmp_path).port


@pytest.mark.anyio
async def test_a_reload_takes_effect_and_a_bad_one_is_undone(tmp_path):
    def users(*names):
        listed = ", ".join(f'{{user: "{name}", password: "p"}}' for name in names)
        return PLAIN + f"authorization {{ users: [{listed}] }}\n"

    async with NatsServer(users("one"), tmp_path) as server:
        pid, port = server.pid, server.port
        await server.reload(users("one", "two"))
        connection = await nats.connect(server.url, user="two", password="p")
        await connection.close()
        with pytest.raises(ConfigurationError, match="no_such_setting"):
            await server.reload("no_such_setting: 1\n")
        assert (server.pid, server.port) == (pid, port)
        assert server.config_path.read_text() == users("one", "two")
        await server.reload()
        await server.restart()
        with anyio.fail_after(30):
            await (await nats.connect(server.url, user="two", password="p")).close()
    with pytest.raises(BusError, match="not running"):
        await server.reload()


@pytest.mark.anyio
async def test_a_flood_of_log_lines_is_bounded(tmp_path):
    async with NatsServer(PLAIN + "trace: true\n", tmp_path) as server:
        connection = await nats.connect(server.url)
        for _ in range(500):
            await connection.publish("x", b"y" * 1000)
        await connection.flush()
        await connection.close()
        assert len(server.log_tail) <= 200


def secured(tmp_path, authority, svid):
    files = {"cert.pem": svid.chain_pem(), "key.pem": svid.key_pem(), "ca.pem": authority.bundle.to_pem()}
    for name, content in files.items():
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_bytes(content)
    return f"""
        tls {{
          cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem", ca_file: "{tmp_path}/ca.pem"
          verify_and_map: true, handshake_first: true, min_version: "1.3"
        }}
        authorization {{ users: [
          {{ user: "{WORKER}", permissions: {{ publish: ["work.>", "_INBOX.>"], subscribe: ["work.>", "_INBOX.>"] }} }}
        ] }}
        debug: true
    """


class Identity:
    """A started source over a fixed SVID."""

    def __new__(cls, svid, bundle):
        from agentweave_bus.identity import IdentityProvider

        class Fixed(IdentityProvider):
            async def get_svid(self):
                return svid

            async def get_trust_bundle(self, trust_domain):
                return bundle

            def get_spiffe_id(self):
                return svid.spiffe_id

        return IdentitySource(Fixed())


async def connect(server, context):
    errors = []

    async def note(error):
        errors.append(error)

    try:
        connection = await nats.connect(
            server.url,
            tls=context,
            tls_handshake_first=True,
            allow_reconnect=False,
            connect_timeout=5,
            error_cb=note,
        )
    except Exception as error:
        errors.append(error)
        return None, errors
    return connection, errors


def causes(errors):
    for error in errors:
        cause = error
        while cause is not None:
            yield cause
            cause = cause.__cause__ or cause.__context__


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("intermediate", [False, True])
def test_a_client_joins_over_mutual_tls_only_the_broker_it_expects(tmp_path, loop_factory, intermediate):
    async def scenario():
        authority = Authority("a.test", intermediate=intermediate)
        worker = Identity(authority.issue(WORKER), authority.bundle)
        await worker.start(5)
        async with NatsServer(secured(tmp_path, authority, authority.issue(BROKER)), tmp_path) as server:
            connection, errors = await connect(server, client_context(worker, BROKER))
            assert errors == []
            subscription = await connection.subscribe("work.x")
            await connection.publish("work.x", b"hello")
            assert (await subscription.next_msg(timeout=5)).data == b"hello"
            await connection.close()

            before = len(server.log_tail)
            connection, errors = await connect(server, client_context(worker, SpiffeID.of("a.test", "other")))
            assert connection is None
            assert any(isinstance(one, PeerRefusedError) for one in causes(errors))
            refused = [line for line in server.log_tail[before:] if re.search("CONNECT|work", line)]
            assert refused == []

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.anyio
async def test_an_identity_without_a_user_is_refused_by_the_server(tmp_path):
    authority = Authority("a.test")
    stranger = Identity(authority.issue(SpiffeID.of("a.test", "agent", "stranger")), authority.bundle)
    await stranger.start(5)
    async with NatsServer(secured(tmp_path, authority, authority.issue(BROKER)), tmp_path) as server:
        connection, errors = await connect(server, client_context(stranger, BROKER))
        assert connection is None
        assert any("uthorization" in str(error) for error in causes(errors))
