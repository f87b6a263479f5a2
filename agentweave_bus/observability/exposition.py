"""The listener of ``/metrics``, ``/healthz`` and ``/readyz``.

A few threads beside the event loop, so that a scrape is answered (and health is told) even when the
loop is busy or stuck. It knows a registry and two callables, nothing else of the process. Plain
HTTP, on loopback unless configured otherwise; it only answers GET and HEAD and never shows payloads.

Clients that send slowly can't keep health checks out: a request has one deadline for all of it, and when
all places are taken a newcomer gets that of whoever has been sending for longest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final, Protocol, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from agentweave_bus.config import MetricsConfig
from agentweave_bus.config.security import in_url
from agentweave_bus.exceptions import ConfigurationError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Exposition", "HasRegistry", "HealthCheck"]

HealthCheck = Callable[[], tuple[bool, Mapping[str, Any]]]
"""Returns whether all is well, and details for a person; called on a thread, so quick and thread-safe."""

MAX_CONNECTIONS: Final = 16
REQUEST_SECONDS: Final = 5.0
"""For a whole request and its answer, however often the client sends something."""

_log = logging.getLogger(__name__)


class HasRegistry(Protocol):
    """Whatever has metrics."""

    @property
    def registry(self) -> CollectorRegistry:
        """Where they are."""


class Exposition:
    """Serves until closed; also a context manager.

    ``health`` says whether the process should live on, ``ready`` whether it should be sent work.
    """

    def __init__(
        self, config: MetricsConfig, metrics: HasRegistry, *, health: HealthCheck, ready: HealthCheck
    ) -> None:
        self._config = config
        self._app = _Routes(
            {
                config.path: make_wsgi_app(metrics.registry),
                "/healthz": _check_app(health),
                "/readyz": _check_app(ready),
            }
        )
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port that is listened on; 0 before :meth:`start`."""
        return 0 if self._server is None else int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where the metrics are, once it is started."""
        return f"http://{in_url(self._config.host)}:{self.port}{self._config.path}"

    def start(self) -> None:
        """Bind and serve; returns at once.

        Raises:
            ConfigurationError: the address can't be bound.

        """
        host, port = self._config.host, self._config.port
        try:
            self._server = _Server(host, port, self._app)
        except OSError as error:
            raise ConfigurationError(
                f"Metrics can't listen on {host}:{port}: {error.strerror or error}.",
                key="observability.metrics.port",
                hint="Choose another observability.metrics.port, or 0 for any free one.",
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="agentweave-exposition"
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, end open connections and wait for their threads; may be called twice."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is None or thread is None:
            return
        server.shutdown()
        thread.join()
        server.end_connections()
        server.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Routes:
    """Exact paths, GET and HEAD."""

    def __init__(self, apps: Mapping[str, WSGIApplication]) -> None:
        self._apps = apps

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        app = self._apps.get(environ["PATH_INFO"])
        if app is None:
            return _answer(start_response, HTTPStatus.NOT_FOUND, {"error": "not found"})
        method = environ["REQUEST_METHOD"]
        if method not in {"GET", "HEAD"}:
            return _answer(start_response, HTTPStatus.METHOD_NOT_ALLOWED, {"error": "use GET"})
        body = app({**environ, "REQUEST_METHOD": "GET"}, start_response)
        return [] if method == "HEAD" else body


def _check_app(check: HealthCheck) -> WSGIApplication:
    def app(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            well, details = check()
        except Exception:  # noqa: BLE001 -- whatever the check raises, the process is not well
            _log.exception("A health check failed.")
            well, details = False, {"error": "the check itself failed"}
        status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
        return _answer(start_response, status, {"ok": well, **details})

    return app


def _answer(start_response: StartResponse, status: HTTPStatus, value: Mapping[str, Any]) -> Iterable[bytes]:
    body = json.dumps(value, default=str).encode() + b"\n"
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response(f"{status.value} {status.phrase}", headers)
    return [body]


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    server: _Server

    def parse_request(self) -> bool:
        return super().parse_request() and self.server.has_arrived(self.connection)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the parent's name
        _log.debug(format, *args)


class _Server(ThreadingMixIn, WSGIServer):
    """A WSGI server with a bound on connections, and on the time of each."""

    daemon_threads = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, app: WSGIApplication) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: dict[socket.socket, float] = {}  # with when each must be done, soonest first
        self._arriving: dict[socket.socket, None] = {}  # those of them whose request is not yet complete
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        # The parent's would look the host's name up, which can take seconds without a resolver.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        """Make room for a connection: who has been sending longest leaves, who awaits an answer stays."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS and not self._evict():
                return False
            self._open[request] = time.monotonic() + REQUEST_SECONDS
            self._arriving[request] = None
            return True

    def _evict(self) -> bool:
        oldest = next(iter(self._arriving), None)
        if oldest is None:
            return False
        del self._open[oldest], self._arriving[oldest]
        _end(oldest)
        return True

    def has_arrived(self, request: socket.socket) -> bool:
        """Note that a request is complete; False if its place was given away meanwhile."""
        with self._lock:
            self._arriving.pop(request, None)
            return request in self._open

    def service_actions(self) -> None:
        """End what has taken too long; called between any two connections, and 20 times a second."""
        now = time.monotonic()
        with self._lock:
            for request, due in self._open.items():
                if due > now:
                    break
                _end(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
            self._arriving.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        _log.debug("A connection to the metrics listener broke.", exc_info=True)

    def end_connections(self) -> None:
        """Wake the threads that are still busy with a client."""
        with self._lock:
            for request in self._open:
                _end(request)


def _end(request: socket.socket) -> None:
    """Wake the thread that reads from, or writes to, a slow client."""
    with contextlib.suppress(OSError):  # the client was faster
        request.shutdown(socket.SHUT_RDWR)
