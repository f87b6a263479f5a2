"""Sending spans to a collector, as OTLP over HTTP, from a thread of its own.

A collector that can't be reached costs spans and nothing else: it is said once, and once when it answers
again. Headers, certificates and compression are OpenTelemetry's own: ``OTEL_EXPORTER_OTLP_HEADERS``,
``OTEL_EXPORTER_OTLP_CERTIFICATE``, ``OTEL_EXPORTER_OTLP_COMPRESSION``.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from agentweave_bus.exceptions import ConfigurationError

__all__ = ["Collector", "otlp_exporter"]

_log = logging.getLogger(__name__)

_TALKATIVE: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal", "urllib3")
"""Loggers that would tell of each attempt and each batch; a level that the configuration gives one stands."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Return what sends spans to ``endpoint``; without a path that of OTLP is meant, ``/v1/traces``.

    Raises:
        ConfigurationError: the package for it is not installed.

    """
    try:
        module = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ConfigurationError(
            "observability.tracing.otlp_endpoint needs a package that is not installed.",
            key="observability.tracing.otlp_endpoint",
            hint="Install agentweave-bus[otlp], which has opentelemetry-exporter-otlp-proto-http.",
        ) from error
    url = endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
    for name in _TALKATIVE:
        if (logger := logging.getLogger(name)).level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
    return Collector(url, module.OTLPSpanExporter(endpoint=url))


class Collector(SpanExporter):
    """Hands batches to ``exporter`` and tells, once each, when they don't arrive and when they do again."""

    def __init__(self, url: str, exporter: SpanExporter) -> None:
        self._url = url
        self._exporter = exporter
        self._lost = 0
        self._ended = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch; called by one thread at a time, and by none that serves requests."""
        result = SpanExportResult.FAILURE if self._ended.is_set() else self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                _log.warning("spans can't be delivered to %s and are dropped until they can", self._url)
            self._lost += len(spans)
        elif self._lost:
            _log.warning("spans are delivered to %s again; %d were dropped", self._url, self._lost)
            self._lost = 0
        return result

    @property
    def unreachable(self) -> bool:
        """Whether the last batch was not taken."""
        return self._lost > 0

    def shutdown(self) -> None:
        """Send nothing more, and end an attempt that waits for its turn."""
        if not self._ended.is_set():
            self._ended.set()
            self._exporter.shutdown()
