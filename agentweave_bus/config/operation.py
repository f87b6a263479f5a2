"""The sections that say how a process runs: ``server``, ``bus`` and ``observability``."""

from __future__ import annotations

from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from agentweave_bus.config.fields import ConfigModel, Count, Flag, Port, Seconds, SpiffeIdText
from agentweave_bus.config.security import CircuitBreakerConfig

__all__ = [
    "DEFAULT_SERVERS",
    "BusConfig",
    "LogLevel",
    "LoggingConfig",
    "MetricsConfig",
    "ObservabilityConfig",
    "RetryConfig",
    "ServerConfig",
    "TracingConfig",
    "bus_url",
]

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

_DEFAULT_BUS_PORT: Final = 4222
DEFAULT_SERVERS: Final[tuple[str, ...]] = (f"tls://127.0.0.1:{_DEFAULT_BUS_PORT}",)


def bus_url(text: str) -> str:
    """Check the address of a broker; return it with its port."""
    parts = urlsplit(text)
    if parts.scheme != "tls" or not parts.hostname:
        raise ValueError(f"{text!r} must be tls://host:port; the bus is never spoken to without TLS")
    if parts.username or parts.password or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("a bus server has no credentials, path or query; the SVID is the credential")
    return text if parts.port else f"{text.rstrip('/')}:{_DEFAULT_BUS_PORT}"


def _url_path(text: str) -> str:
    if not text.startswith("/") or "?" in text or "#" in text:
        raise ValueError(f"{text!r} must be a path that starts with '/'")
    if text in {"/healthz", "/readyz"}:
        raise ValueError(f"{text} is the health check's own path")
    return text


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{text!r} must be http://host:port or https://host:port")
    return text


class ServerConfig(ConfigModel):
    """The A2A endpoint for synchronous HTTPS calls."""

    host: str = "127.0.0.1"
    port: Port = 8443
    protocol: Literal["a2a"] = "a2a"


class RetryConfig(ConfigModel):
    """How a call is tried again; times are seconds.

    ``attempts`` bounds how often a busy agent is asked, and safe work whose answer is missing. ``patience``
    is how long a call waits for an agent that nobody runs at the moment.
    """

    attempts: Annotated[int, Field(strict=True, ge=1, le=20)] = 3
    base_delay: Seconds = 0.05
    max_delay: Seconds = 2.0
    patience: Annotated[float, Field(strict=True, gt=0, le=60)] = 2.0


class BusConfig(ConfigModel):
    """How the broker is reached and what is kept in flight; times are seconds."""

    servers: Annotated[tuple[Annotated[str, AfterValidator(bus_url)], ...], Field(min_length=1)] = (
        DEFAULT_SERVERS
    )
    server_spiffe_id: SpiffeIdText | None = None
    connect_timeout: Seconds = 5.0
    call_timeout: Seconds = 30.0
    max_call_timeout: Annotated[float, Field(strict=True, gt=0, le=600)] = 300.0
    max_in_flight: Count = 256
    max_in_flight_bytes: Annotated[int, Field(strict=True, ge=2 * 1024 * 1024, le=2**40)] = 64 * 1024 * 1024
    max_pending_calls: Count = 4096
    max_blob_bytes: Annotated[int, Field(strict=True, ge=1024 * 1024, le=1024**3)] = 64 * 1024 * 1024
    task_timeout: Annotated[float, Field(strict=True, gt=0, le=86_400)] = 900.0
    task_concurrency: Annotated[int, Field(strict=True, ge=1, le=1024)] = 32
    task_ack_wait: Annotated[float, Field(strict=True, ge=1, le=3_600)] = 30.0
    drain_timeout: Annotated[float, Field(strict=True, gt=0, le=3_600)] = 30.0
    reconnect_wait: Seconds = 0.5
    retry: RetryConfig = RetryConfig()
    circuit_breaker: CircuitBreakerConfig = CircuitBreakerConfig()

    @model_validator(mode="after")
    def _timeouts_ordered(self) -> BusConfig:
        if self.call_timeout > self.max_call_timeout:
            raise ValueError(
                f"call_timeout ({self.call_timeout:g} s) is above"
                f" max_call_timeout ({self.max_call_timeout:g} s)"
            )
        return self


class LoggingConfig(ConfigModel):
    """What is logged and how; ``loggers`` sets levels by logger name."""

    level: LogLevel = "INFO"
    format: Literal["json", "text"] = "json"
    loggers: dict[str, LogLevel] = Field(default_factory=dict)


class MetricsConfig(ConfigModel):
    """The listener of ``/metrics``, ``/healthz`` and ``/readyz``; port 0 takes a free one."""

    enabled: Flag = True
    host: str = "127.0.0.1"
    port: Port = 9090
    path: Annotated[str, AfterValidator(_url_path)] = "/metrics"


class TracingConfig(ConfigModel):
    """OpenTelemetry spans, and where they are exported to."""

    enabled: Flag = False
    otlp_endpoint: Annotated[str, AfterValidator(_http_url)] | None = None


class ObservabilityConfig(ConfigModel):
    """Logs, metrics and traces."""

    logging: LoggingConfig = LoggingConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
