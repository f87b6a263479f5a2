"""The server engine against a real OPA, and against servers that misbehave on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from agentweave_bus.authz.circuit_breaker import BreakerSettings, BreakerState
from agentweave_bus.authz.opa import OpaServerEngine, OpaSettings
from agentweave_bus.authz.opa_http import OpaAddress
from agentweave_bus.authz.policy_bundle import build_bundle
from agentweave_bus.authz.policy_input import PolicyInput, write_input
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.exceptions import ConfigurationError, PayloadError, PolicyUnavailableError
from agentweave_bus.identity.authority import Authority
from agentweave_bus.identity.bundle import X509Bundle
from agentweave_bus.identity.provider import IdentityProvider
from agentweave_bus.identity.rotation import IdentitySource
from agentweave_bus.identity.svid import X509Svid
from agentweave_bus.identity.tls import client_context
from agentweave_bus.spiffe_id import SpiffeID
from tests.opa_socket import wait_until_healthy

ORDER = "spiffe://agentweave.io/agent/order"
PAYMENT = "spiffe://agentweave.io/agent/payment"
GRANTS = f"""
grants:
  - {{caller: {ORDER}, callee: {PAYMENT}, capabilities: [process_payment], limits: {{max_amount: 1000}}}}
  - {{caller: {ORDER}, callee: {PAYMENT}, capabilities: [health]}}
"""
PATIENT = 2000
"""A budget (milliseconds) for tests that are not about budgets: the machine may be busy."""

needs_opa = pytest.mark.skipif(
    find_opa() is None, reason="no opa binary: 'make tools' builds the server to ask"
)
pytestmark = pytest.mark.anyio


def request(action: str = "process_payment", **payload: object) -> PolicyInput:
    context = {"kind": "call", "transport": "bus", "via": [], "payload": payload}
    if not payload:
        del context["payload"]
    return write_input(
        {
            "caller_spiffe_id": ORDER,
            "callee_spiffe_id": PAYMENT,
            "action": action,
            "direction": "inbound",
            "context": context,
        }
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path (sockets need one) that nobody else can write."""
    path = Path(tempfile.mkdtemp(prefix="awopa-"))
    yield path
    shutil.rmtree(path)


class RealOpa:
    """An ``opa run --server`` on a unix socket, with the bundle of a grants file."""

    def __init__(self, folder: Path, name: str = "opa") -> None:
        self.socket = folder / f"{name}.sock"
        self.url = f"unix://{self.socket}"
        self._bundle = folder / f"{name}.tar.gz"
        self._source = folder / f"{name}-policies"
        self._source.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, grants: str = GRANTS, rego: str = "") -> None:
        (self._source / "grants.yaml").write_text(grants)
        if rego:
            (self._source / "own.rego").write_text("package own.authz\nimport rego.v1\n" + rego)
        self._bundle.write_bytes(build_bundle(self._source))
        arguments = [
            "run",
            "--server",
            "--addr",
            self.url,
            "--log-level",
            "error",
            "--disable-telemetry",
            "-b",
        ]
        self._process = subprocess.Popen([str(find_opa()), *arguments, self._bundle])
        wait_until_healthy(self.socket, self._process)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
            self.socket.unlink(missing_ok=True)


@pytest.fixture
def opa(folder: Path) -> Iterator[RealOpa]:
    server = RealOpa(folder)
    yield server
    server.stop()


@contextlib.asynccontextmanager
async def asking(*urls: str, **settings: object) -> AsyncIterator[OpaServerEngine]:
    settings = {"budget_ms": PATIENT, "environment": "development"} | settings
    engine = OpaServerEngine(urls, OpaSettings(**settings))  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        await engine.aclose()


# --- a real OPA --------------------------------------------------------------------------------------------


@needs_opa
async def test_a_real_server_answers_with_its_revision(opa: RealOpa) -> None:
    opa.start()
    async with asking(opa.url) as engine:
        await engine.refresh()
        answer = await engine.evaluate("agentweave/grants/allow", request(amount=19))
        assert (answer.defined, answer.rule) == (True, "decision")
        assert answer.result == {"allow": True, "reason": "grant 1 allows it", "limits": {}}
        assert answer.revision == engine.revision != ""
        denied = await engine.evaluate("agentweave/grants", request(amount=1001))
        assert denied.result["reason"] == "grant 1 has the limit max_amount 1000 and amount is 1001"
        nobody = await engine.evaluate("nobody/authz", request(amount=1))
        assert (nobody.defined, nobody.rule) == (False, None)


@needs_opa
async def test_the_first_question_needs_no_poll_before_it(opa: RealOpa) -> None:
    opa.start()
    async with asking(opa.url) as engine:
        assert (await engine.evaluate("agentweave/grants", request(amount=19))).result["allow"] is True


@needs_opa
async def test_standing_answers_are_asked_only_of_checked_packages(opa: RealOpa) -> None:
    opa.start(
        rego='default allow := false\nstanding := {"allow": true, "cache_seconds": 90} if input.action == "health"'
    )
    async with asking(opa.url) as engine:
        assert not engine.has_standing("own/authz")
        await engine.refresh()
        assert engine.has_standing("own/authz")
        assert not engine.has_standing("payment/authz")
        standing = await engine.evaluate_standing("own/authz", request("health"))
        assert standing is not None
        assert standing.cache_seconds == 60
        assert await engine.evaluate_standing("own/authz", request("other")) is None
        assert await engine.evaluate_standing("payment/authz", request("health")) is None
        with pytest.raises(PayloadError, match="payload"):
            await engine.evaluate_standing("own/authz", request("health", amount=1))


@needs_opa
async def test_a_new_revision_is_believed_when_it_is_the_servers_current_one(opa: RealOpa) -> None:
    opa.start()
    async with asking(opa.url) as engine:
        await engine.refresh()
        old = engine.revision
        opa.stop()
        opa.start(GRANTS.replace("1000", "10"))
        answer = await engine.evaluate("agentweave/grants", request(amount=19))
        assert answer.result["allow"] is False
        assert answer.revision == engine.revision != old


@needs_opa
async def test_a_pinned_revision_is_the_only_one_believed(opa: RealOpa) -> None:
    opa.start()
    async with asking(opa.url) as learning:
        await learning.refresh()
        revision = learning.revision
    async with asking(opa.url, accepted_revisions={revision}) as engine:
        assert (await engine.evaluate("agentweave/grants", request(amount=1))).result["allow"] is True
    async with asking(opa.url, accepted_revisions={"another"}) as engine:
        with pytest.raises(PolicyUnavailableError, match="not an accepted one"):
            await engine.evaluate("agentweave/grants", request(amount=1))


@needs_opa
async def test_a_conflict_in_the_policy_is_no_fault_of_the_server(opa: RealOpa) -> None:
    """Else whoever can send such a request could open the breaker for everybody."""
    opa.start(rego='allow := true if input.action == "a"\nallow := false if input.context.kind == "call"')
    async with asking(opa.url, breaker=BreakerSettings(failure_threshold=1)) as engine:
        for _ in range(3):
            with pytest.raises(PolicyUnavailableError, match="multiple outputs"):
                await engine.evaluate("own/authz", request("a", x=1))
        assert engine.breaker_states() == {opa.url: BreakerState.CLOSED}


@needs_opa
async def test_a_server_that_was_restarted_is_asked_again(opa: RealOpa) -> None:
    opa.start()
    async with asking(opa.url) as engine:
        await engine.refresh()
        opa.stop()
        with pytest.raises(PolicyUnavailableError):
            await engine.evaluate("agentweave/grants", request(amount=1))
        with pytest.raises(PolicyUnavailableError, match="no OPA endpoint"):
            await engine.refresh()
        assert engine.revision == ""
        assert not engine.has_standing("agentweave/grants")
        opa.start()
        assert (await engine.evaluate("agentweave/grants", request(amount=1))).result["allow"] is True


@needs_opa
async def test_many_questions_at_once(opa: RealOpa) -> None:
    opa.start()
    async with asking(opa.url, connections=4, budget_ms=10_000) as engine:
        questions = [
            engine.evaluate("agentweave/grants", request(amount=amount)) for amount in (1, 2000) * 60
        ]
        answers = await asyncio.gather(*questions)
        assert [answer.result["allow"] for answer in answers] == [True, False] * 60
        assert len(engine._endpoints[0].connections._idle) <= 4


@needs_opa
async def test_https_checks_who_the_server_is(folder: Path) -> None:
    authority = Authority("agentweave.io")
    (folder / "policies").mkdir()
    (folder / "policies" / "grants.yaml").write_text(GRANTS)
    (folder / "bundle.tar.gz").write_bytes(build_bundle(folder / "policies"))
    theirs = authority.issue(SpiffeID(OPA_ID))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tls = ["--tls-cert-file", theirs.cert_chain_path, "--tls-private-key-file", theirs.private_key_path]
    command = [str(find_opa()), "run", "--server", "--addr", f"127.0.0.1:{port}", "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(
        *command, "--skip-version-check", *tls, "-b", str(folder / "bundle.tar.gz"), pass_fds=fds_of(theirs)
    )
    try:
        source = IdentitySource(
            OneIdentity(authority), allowed_trust_domains=["agentweave.io"], expected_id=SpiffeID(ORDER)
        )
        await source.start(10)
        await listening(port)
        settings = OpaSettings(budget_ms=PATIENT)
        good = OpaServerEngine(
            [f"https://127.0.0.1:{port}"], settings, tls=lambda: client_context(source, SpiffeID(OPA_ID))
        )
        assert (await good.evaluate("agentweave/grants", request(amount=1))).result["allow"] is True
        await good.aclose()
        stranger = OpaServerEngine(
            [f"https://127.0.0.1:{port}"], settings, tls=lambda: client_context(source, SpiffeID(PAYMENT))
        )
        with pytest.raises(PolicyUnavailableError, match=r"spiffe://agentweave\.io/opa"):
            await stranger.evaluate("agentweave/grants", request(amount=1))
        await stranger.aclose()
        await source.aclose()
    finally:
        process.kill()
        await process.wait()


OPA_ID = "spiffe://agentweave.io/opa"


def fds_of(svid: X509Svid) -> list[int]:
    """The memory files that a child has to inherit."""
    return [
        int(path.rpartition("/")[2])
        for path in (svid.cert_chain_path, svid.private_key_path)
        if "/fd/" in path
    ]


async def listening(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


class OneIdentity(IdentityProvider):
    """The order agent's identity, from a development authority."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._svid = authority.issue(SpiffeID(ORDER))

    async def get_svid(self) -> X509Svid:
        return self._svid

    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        return self._authority.bundle

    def get_spiffe_id(self) -> str:
        return ORDER


# --- servers that misbehave ----------------------------------------------------------------------------------

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def http(body: object, status: int = 200, head: str = "") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(raw)}\r\n{head}\r\n".encode() + raw


def opa_says(allow: object, revision: str = "r1") -> bytes:
    return http({"result": {"allow": allow}, "provenance": {"bundles": {"b": {"revision": revision}}}})


def always(answer: bytes, asked: list[bytes] | None = None) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(size)
                if asked is not None:
                    asked.append(head.split(b" ")[1])
                writer.write(answer)
                await writer.drain()

    return behave


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@contextlib.asynccontextmanager
async def serving(folder: Path, name: str, behaviour: Behaviour) -> AsyncIterator[str]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behaviour(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(connected, folder / name)
    try:
        yield f"unix://{folder / name}"
    finally:
        server.close()


async def ask(engine: OpaServerEngine) -> object:
    return (await engine.evaluate("x/authz", request("a", x=1))).result["allow"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 20_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        http(b"no json"),
        http([]),
        http({"result": {"allow": True}}),
        http({"result": {"allow": True}, "provenance": {"bundles": {}}}),
        http({"result": {"allow": True}, "provenance": {"bundles": {"a": {"revision": "r1"}, "b": {}}}}),
        http({"result": {"allow": True}, "provenance": {"bundles": {"b": {"revision": ""}}}}),
        http({"result": {"allow": True}, "provenance": {"bundles": {"b": {"revision": "r1"}}}}, status=401),
        http({"result": {"allow": True}, "provenance": {"bundles": {"b": {"revision": "r1"}}}}, status=503),
    ],
    ids=str,
)
async def test_what_is_no_proper_answer_is_none(folder: Path, answer: bytes) -> None:
    async with serving(folder, "odd.sock", always(answer)) as url, asking(url, budget_ms=200) as engine:
        with pytest.raises(PolicyUnavailableError):
            await ask(engine)


async def test_an_answer_in_chunks_is_read(folder: Path) -> None:
    body = opa_says(True).partition(b"\r\n\r\n")[2]
    chunks = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (10, body[:10], len(body) - 10, body[10:])
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    async with serving(folder, "chunks.sock", always(answer)) as url, asking(url) as engine:
        assert await ask(engine) is True
        assert await ask(engine) is True


async def test_silence_is_cut_off_after_two_budgets(folder: Path) -> None:
    async with serving(folder, "mute.sock", silence) as url, asking(url, budget_ms=50) as engine:
        started = time.monotonic()
        with pytest.raises(PolicyUnavailableError, match="no answer in time"):
            await ask(engine)
        assert 0.09 < time.monotonic() - started < 20


async def test_one_budget_is_for_the_answer_and_for_its_revision(folder: Path) -> None:
    """Else a question would take twice as long as the settings say."""
    asked: list[bytes] = []

    async def slow_then_mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.read(65536):
            asked.append(head.split(b" ")[0])
            if asked[-1] == b"POST":
                await asyncio.sleep(2.4)
                writer.write(opa_says(True))

    once = BreakerSettings(failure_threshold=1)
    async with (
        serving(folder, "slow.sock", slow_then_mute) as url,
        asking(url, budget_ms=3000, breaker=once) as engine,
    ):
        started = time.monotonic()
        with pytest.raises(PolicyUnavailableError, match="no answer in time"):
            await ask(engine)
        assert time.monotonic() - started < 5.2
    assert asked == [b"POST", b"GET"]


async def test_another_endpoint_is_asked_when_one_fails(folder: Path) -> None:
    async with (
        serving(folder, "mute.sock", silence) as mute,
        serving(folder, "good.sock", always(opa_says(True))) as good,
        asking(mute, good, budget_ms=200) as engine,
    ):
        assert await ask(engine) is True


async def test_priority_asks_the_first_and_round_robin_takes_turns(folder: Path) -> None:
    asked: dict[str, list[bytes]] = {"one": [], "two": []}
    async with (
        serving(folder, "one.sock", always(opa_says(True), asked["one"])) as one,
        serving(folder, "two.sock", always(opa_says(True), asked["two"])) as two,
    ):
        async with asking(one, two, strategy="priority") as engine:
            for _ in range(4):
                await ask(engine)
        assert not asked["two"]
        asked["one"].clear()
        async with asking(one, two, strategy="round_robin") as engine:
            await engine.refresh()
            for calls in asked.values():
                calls.clear()
            for _ in range(4):
                await ask(engine)
        assert {name: len(calls) for name, calls in asked.items()} == {"one": 2, "two": 2}


async def test_an_endpoint_that_fails_is_left_alone_and_then_probed(folder: Path) -> None:
    now = [0]
    asked: list[bytes] = []
    told: list[BreakerState] = []
    behaviour = [always(http(b"broken"), asked)]

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await behaviour[0](reader, writer)

    async with serving(folder, "flaky.sock", behave) as url:
        engine = OpaServerEngine(
            [url],
            OpaSettings(budget_ms=PATIENT),
            on_breaker=lambda _, state: told.append(state),
            monotonic_ms=lambda: now[0],
        )
        for _ in range(3):  # two attempts each: five failures open it
            with pytest.raises(PolicyUnavailableError):
                await ask(engine)
        assert len(asked) == 5
        with pytest.raises(PolicyUnavailableError, match="breakers"):
            await ask(engine)
        assert len(asked) == 5
        engine.drop_connections()
        behaviour[0] = always(opa_says(False))
        now[0] = 30_000
        assert await ask(engine) is False
        assert await ask(engine) is False
        assert told == [BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN, BreakerState.CLOSED]
        await engine.aclose()


async def test_a_denial_is_no_failure(folder: Path) -> None:
    async with (
        serving(folder, "no.sock", always(opa_says(False))) as url,
        asking(url, breaker=BreakerSettings(failure_threshold=1)) as engine,
    ):
        for _ in range(3):
            assert await ask(engine) is False
        assert set(engine.breaker_states().values()) == {BreakerState.CLOSED}


async def test_endpoints_that_disagree_about_the_revision_give_no_standing(folder: Path) -> None:
    def checked(revision: str) -> bytes:
        return http(
            {"result": {"standing": ["x/authz"]}, "provenance": {"bundles": {"b": {"revision": revision}}}}
        )

    async with (
        serving(folder, "a.sock", always(checked("r1"))) as a,
        serving(folder, "b.sock", always(checked("r2"))) as b,
    ):
        async with asking(a, b) as engine:
            await engine.refresh()
            assert engine.revision == ""
            assert not engine.has_standing("x/authz")
        async with asking(a) as engine:
            await engine.refresh()
            assert engine.has_standing("x/authz")


async def test_servers_without_revisions_are_for_development(folder: Path) -> None:
    plain = http({"result": {"allow": True}})
    async with (
        serving(folder, "plain.sock", always(plain)) as url,
        asking(url, require_revision=False) as engine,
    ):
        assert await ask(engine) is True
        assert engine.revision == ""
    with pytest.raises(ConfigurationError, match="revisions"):
        OpaSettings(require_revision=False)


async def test_the_package_and_the_input_reach_the_server_as_they_are(folder: Path) -> None:
    asked: list[bytes] = []
    async with serving(folder, "see.sock", always(opa_says(True), asked)) as url, asking(url) as engine:
        await engine.refresh()
        await engine.evaluate("order.authz", request("a", x=1))
    assert asked == [b"/v1/data/agentweave_bundle?provenance", b"/v1/data/order/authz/decision?provenance"]


# --- where it may listen ---------------------------------------------------------------------------------------


async def test_a_socket_that_others_could_replace_is_not_asked(folder: Path) -> None:
    asked: list[bytes] = []
    async with serving(folder, "open.sock", always(opa_says(True), asked)) as url, asking(url) as engine:
        os.chmod(folder, 0o777)  # noqa: PTH101
        with pytest.raises(PolicyUnavailableError, match="can change"):
            await ask(engine)
        assert not asked
        os.chmod(folder, 0o755)  # noqa: PTH101
        assert await ask(engine) is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
async def test_a_socket_in_a_strangers_folder_is_not_asked(folder: Path) -> None:
    async with serving(folder, "theirs.sock", always(opa_says(True))) as url, asking(url) as engine:
        os.chown(folder, 12345, 12345)
        with pytest.raises(PolicyUnavailableError, match="can change"):
            await ask(engine)


@pytest.mark.parametrize(
    "url", ["", "opa", "unix://opa.sock", "unix:opa", "ftp://x", "https://", "https://h/path", "http:///x"]
)
async def test_malformed_addresses_are_named(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no address"):
        OpaServerEngine([url])


async def test_plain_http_is_for_development() -> None:
    with pytest.raises(ConfigurationError, match="not encrypted"):
        OpaAddress.parse("http://127.0.0.1:8181", environment="production")
    assert not OpaAddress.parse("http://127.0.0.1:8181", environment="development").is_plain_off_loopback
    assert not OpaAddress.parse("http://[::1]:8181", environment="development").is_plain_off_loopback
    assert OpaAddress.parse("http://opa:8181", environment="development").is_plain_off_loopback


async def test_https_needs_an_identity() -> None:
    with pytest.raises(ConfigurationError, match="identity"):
        OpaServerEngine(["https://opa:8181"])


async def test_no_endpoint_at_all() -> None:
    with pytest.raises(ConfigurationError, match="no OPA endpoint"):
        OpaServerEngine([])
