"""Names, labels and the reference documents' queries."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from agentweave_bus.observability.metrics import (
    DECLARATIONS,
    BreakerState,
    Direction,
    DropReason,
    Metrics,
    RequestStatus,
)

REFERENCE_NAMES = [
    "agentweave_requests_total",
    "agentweave_request_duration_seconds_bucket",
    "agentweave_authz_allowed_total",
    "agentweave_authz_denied_total",
    "agentweave_authz_circuit_breaker_state",
    "agentweave_svid_rotation_total",
    "agentweave_svid_rotation_errors_total",
    "agentweave_opa_requests_total",
    "agentweave_opa_errors_total",
]


DOCUMENT = (Path(__file__).parents[3] / "docs" / "observability.md").read_text()


def exposed(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize("name", REFERENCE_NAMES)
def test_the_reference_names_are_exposed_from_the_start(name: str) -> None:
    metrics = Metrics.create()
    if name.endswith("_bucket"):  # a histogram without an observation has no bucket yet
        metrics.request_ended(Direction.INBOUND, "x", RequestStatus.SUCCESS, 0.1)
    assert re.search(rf"^{name}(\{{.*\}})? [0-9.e+]+$", exposed(metrics), re.MULTILINE)


def test_failures_have_the_label_that_the_reference_alert_selects() -> None:
    metrics = Metrics.create()
    metrics.declare_capability(Direction.INBOUND, "create_order")
    series = 'agentweave_requests_total{capability="create_order",direction="inbound",status="error"}'
    assert f"{series} 0.0" in exposed(metrics)
    metrics.request_ended(Direction.INBOUND, "create_order", RequestStatus.ERROR, 0.02)
    assert f"{series} 1.0" in exposed(metrics)


def test_invented_capabilities_share_one_series() -> None:
    metrics = Metrics.create()
    for number in range(100):
        metrics.request_ended(Direction.INBOUND, f"invented-{number}", RequestStatus.REFUSED, 0.001)
        metrics.handler_ended(f"invented-{number}", 0.001)
    text = exposed(metrics)
    assert "invented" not in text
    assert 'agentweave_requests_total{capability="other",direction="inbound",status="refused"} 100.0' in text
    # Declared for one direction only, it is still a stranger's word in the other.
    metrics.declare_capability(Direction.OUTBOUND, "pay")
    metrics.request_ended(Direction.INBOUND, "pay", RequestStatus.SUCCESS, 0.001)
    assert 'capability="pay",direction="inbound"' not in exposed(metrics)


def test_decisions_are_counted_by_direction() -> None:
    metrics = Metrics.create()
    metrics.decided(Direction.INBOUND, allowed=True, standing=True)
    metrics.decided(Direction.INBOUND, allowed=False)
    metrics.decided(Direction.OUTBOUND, allowed=False)
    text = exposed(metrics)
    assert 'agentweave_authz_allowed_total{direction="inbound"} 1.0' in text
    assert 'agentweave_authz_allowed_total{direction="outbound"} 0.0' in text
    assert 'agentweave_authz_denied_total{direction="outbound"} 1.0' in text
    assert "agentweave_authz_standing_reused_total 1.0" in text


def breaker(metrics: Metrics) -> dict[str, float]:
    found = re.findall(
        r'^agentweave_authz_circuit_breaker_state\{state="(\w+)"\} (\S+)$', exposed(metrics), re.MULTILINE
    )
    return {state: float(value) for state, value in found}


def test_the_breaker_is_a_series_per_state_of_the_best_endpoint() -> None:
    metrics = Metrics.create()
    assert breaker(metrics) == {"closed": 1, "half_open": 0, "open": 0}
    metrics.breaker_changed("a", BreakerState.OPEN)
    assert breaker(metrics) == {"closed": 0, "half_open": 0, "open": 1}
    metrics.breaker_changed("b", BreakerState.HALF_OPEN)
    assert breaker(metrics) == {"closed": 0, "half_open": 1, "open": 0}
    metrics.breaker_changed("b", BreakerState.CLOSED)
    assert breaker(metrics) == {"closed": 1, "half_open": 0, "open": 0}
    text = exposed(metrics)
    assert 'agentweave_authz_endpoint_circuit_breaker_state{endpoint="a",state="open"} 1.0' in text
    assert 'agentweave_authz_endpoint_circuit_breaker_state{endpoint="b",state="half_open"} 0.0' in text


def test_what_is_counted_by_reason() -> None:
    metrics = Metrics.create()
    metrics.reply_dropped(DropReason.FORGED)
    metrics.admission_refused("signature", "proof")
    metrics.handshake_ended(accepted=False)
    text = exposed(metrics)
    assert 'agentweave_replies_dropped_total{reason="forged"} 1.0' in text
    assert 'agentweave_replies_dropped_total{reason="late"} 0.0' in text
    assert 'agentweave_admission_refusals_total{reason="proof",step="signature"} 1.0' in text
    assert 'agentweave_mtls_handshakes_total{result="refused"} 1.0' in text


def test_processes_do_not_share_counters() -> None:
    one, two = Metrics.create(), Metrics.create()
    one.svid_rotations.inc()
    assert "agentweave_svid_rotation_total 1.0" in exposed(one)
    assert "agentweave_svid_rotation_total 0.0" in exposed(two)


def test_every_metric_is_documented_as_it_is_declared() -> None:
    rows = re.findall(r"^\| `(agentweave_\w+)` \| (.*?) \| (.*?) \|$", DOCUMENT, re.MULTILINE)
    shown = [(name, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, labels, meaning in rows]
    assert shown == [(each.name, each.labels, each.meaning) for each in DECLARATIONS.values()]


def test_every_declaration_has_its_field() -> None:
    names = {each.name for each in fields(Metrics) if not each.name.startswith("_")}
    assert names - {"registry"} == set(DECLARATIONS)
