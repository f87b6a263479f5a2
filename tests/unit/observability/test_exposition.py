"""The listener, over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from agentweave_bus.config import MetricsConfig
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability import exposition
from agentweave_bus.observability.exposition import MAX_CONNECTIONS, Exposition
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.supervisor.fetching import fetch_all


class Checks:
    """What the process would say of itself."""

    def __init__(self) -> None:
        self.healthy = True
        self.broken = False

    def health(self):
        if self.broken:
            raise RuntimeError("secret detail")
        return self.healthy, {"bus": "connected" if self.healthy else "lost"}

    def ready(self):
        return True, {}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics.create()


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
def listener(metrics: Metrics, checks: Checks) -> Iterator[Exposition]:
    with Exposition(MetricsConfig(port=0), metrics, health=checks.health, ready=checks.ready) as listener:
        yield listener


def get(listener: Exposition, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_metrics_are_served(listener: Exposition, metrics: Metrics) -> None:
    metrics.svid_rotations.inc()
    status, text = get(listener, "/metrics")
    assert status == 200
    assert "agentweave_svid_rotation_total 1.0" in text


def test_health_and_readiness_are_asked_each_time(listener: Exposition, checks: Checks) -> None:
    assert get(listener, "/healthz") == (200, '{"ok": true, "bus": "connected"}\n')
    checks.healthy = False
    assert get(listener, "/healthz") == (503, '{"ok": false, "bus": "lost"}\n')
    assert get(listener, "/readyz")[0] == 200


def test_a_check_that_breaks_is_not_well_and_tells_no_detail(
    listener: Exposition, checks: Checks, caplog: pytest.LogCaptureFixture
) -> None:
    checks.broken = True
    status, text = get(listener, "/healthz")
    assert status == 503
    assert json.loads(text)["ok"] is False
    assert "secret detail" not in text
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 404), ("/metrics/x", "GET", 404), ("/metrics", "POST", 405), ("/healthz", "DELETE", 405)],
)
def test_nothing_else_is_served(listener: Exposition, path: str, method: str, status: int) -> None:
    assert get(listener, path, method)[0] == status


def test_head_has_no_body(listener: Exposition) -> None:
    for path in ("/healthz", "/metrics"):
        with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as raw:
            raw.sendall(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.0 200")
        assert answer.partition(b"\r\n\r\n")[2] == b""


def test_the_path_is_configurable(metrics: Metrics, checks: Checks) -> None:
    config = MetricsConfig(port=0, path="/internal/metrics")
    with Exposition(config, metrics, health=checks.health, ready=checks.ready) as listener:
        assert get(listener, "/internal/metrics")[0] == 200
        assert get(listener, "/metrics")[0] == 404


@pytest.mark.parametrize(("host", "named"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_its_address_can_be_asked(host: str, named: str, metrics: Metrics, checks: Checks) -> None:
    settings = MetricsConfig(host=host, port=0)
    with Exposition(settings, metrics, health=checks.health, ready=checks.ready) as listener:
        assert listener.url == f"http://{named}:{listener.port}/metrics"
        (page,) = fetch_all([listener.url])
    assert page is not None
    assert page.status == 200


def test_a_taken_port_is_named_with_the_way_out(
    listener: Exposition, metrics: Metrics, checks: Checks
) -> None:
    second = Exposition(MetricsConfig(port=listener.port), metrics, health=checks.health, ready=checks.ready)
    with pytest.raises(ConfigurationError, match="or 0 for any free one") as caught:
        second.start()
    assert caught.value.key == "observability.metrics.port"
    second.close()


def test_closing_frees_the_port_and_the_threads_even_with_a_silent_client(
    metrics: Metrics, checks: Checks
) -> None:
    before = threading.active_count()
    listener = Exposition(MetricsConfig(port=0), metrics, health=checks.health, ready=checks.ready)
    listener.start()
    port = listener.port
    with socket.create_connection(("127.0.0.1", port), timeout=5) as silent:
        assert get(listener, "/healthz")[0] == 200  # so the silent one has been accepted, too
        listener.close()
        assert silent.recv(10) == b""
    assert threading.active_count() == before
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    Exposition(MetricsConfig(port=port), metrics, health=checks.health, ready=checks.ready).close()


@pytest.fixture
def silent(listener: Exposition) -> Iterator[list[socket.socket]]:
    """As many connections as there may be, of clients that have not sent a whole request."""
    held = [socket.create_connection(("127.0.0.1", listener.port), timeout=5) for _ in range(MAX_CONNECTIONS)]
    for each in held:
        each.sendall(b"GET /heal")
    yield held
    for each in held:
        each.close()


def test_health_is_told_when_slow_clients_hold_all_places(
    listener: Exposition, silent: list[socket.socket]
) -> None:
    for _ in range(3):
        assert get(listener, "/healthz")[0] == 200
    assert silent[0].recv(1) == b"", "who has been sending for longest leaves"
    silent[-1].sendall(b"thz HTTP/1.0\r\n\r\n")
    assert silent[-1].recv(12) == b"HTTP/1.0 200", "the others stay"


def test_connections_are_bounded(checks: Checks) -> None:
    """Those that wait for an answer keep their places: what they wait for could be stuck."""
    asked, stuck = threading.Semaphore(0), threading.Event()

    def health() -> tuple[bool, dict[str, str]]:
        asked.release()
        stuck.wait(5)
        return True, {}

    with Exposition(MetricsConfig(port=0), Metrics.create(), health=health, ready=checks.ready) as busy:
        waiting = [
            socket.create_connection(("127.0.0.1", busy.port), timeout=5) for _ in range(MAX_CONNECTIONS)
        ]
        for each in waiting:
            each.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert asked.acquire(timeout=5)
        with socket.create_connection(("127.0.0.1", busy.port), timeout=5) as refused:
            assert refused.recv(1) == b""
        stuck.set()
        for each in waiting:
            assert each.recv(12) == b"HTTP/1.0 200"
            each.close()


def test_a_request_has_one_deadline_however_often_something_is_sent(
    listener: Exposition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exposition, "REQUEST_SECONDS", 0.4)
    with socket.create_connection(("127.0.0.1", listener.port), timeout=0.1) as slow:
        began = time.monotonic()
        while time.monotonic() - began < 40:
            try:
                slow.send(b"G")
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert time.monotonic() - began < 20
