"""What is exposed, minute by minute, when an alert is to fire, and when it is not to, in Prometheus' notation.

``0+60x20`` counts 60 a minute for twenty minutes. Each case is an agent's, so that all are evaluated at once.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CASES", "Case"]

WHO = 'instance="i", agent="AGENT"'


class Case(NamedTuple):
    """One alert, looked at after ``at``: ``trouble`` is the least that has to set it off, ``well`` nearly is."""

    alert: str
    trouble: dict[str, str]
    well: dict[str, str]
    at: str = "20m"


def requests(errors_a_minute: int) -> dict[str, str]:
    one = f'agentweave_requests_total{{{WHO}, direction="inbound", capability="say", status='
    return {one + '"error"}': f"0+{errors_a_minute}x30", one + '"success"}': f"0+{1000 - errors_a_minute}x30"}


def latency(slow_a_minute: int) -> dict[str, str]:
    one = f'agentweave_request_duration_seconds_bucket{{{WHO}, direction="inbound", capability="say", le='
    return {
        one + '"1"}': f"0+{1000 - slow_a_minute}x30",
        one + '"2.5"}': "0+1000x30",
        one + '"+Inf"}': "0+1000x30",
    }


def series(name: str, values: str, labels: str = "") -> dict[str, str]:
    return {f"agentweave_{name}{{{', '.join(filter(None, (WHO, labels)))}}}": values}


def counted(alert: str, name: str, labels: str = "", *, more_than: int = 0, at: str = "20m") -> Case:
    """Return the case of an alert on so many within its time; none, or just as many, are well."""
    jump = f"0x12 {more_than + 1}x20"
    return Case(alert, series(name, jump, labels), series(name, "0x12 " + f"{more_than // 2}x20", labels), at)


def parts(**values: str) -> dict[str, str]:
    named = {
        "connected": "1x30",
        "identity": "1x30",
        "subscribed": "1x30",
        "receiving": "1x30",
        "policy": "1x30",
    }
    return {
        key: value
        for part, said in {**named, **values}.items()
        for key, value in series("ready", said, f'part="{part}"').items()
    }


def places(ready: int, given_up: int, drained: int) -> dict[str, str]:
    return {
        **series("workers", f"{ready}x30", 'state="ready"'),
        **series("workers", f"{given_up}x30", 'state="given up"'),
        **series("workers", f"{drained}x30", 'state="drained"'),
    }


def queue(depth: str, begun: str) -> dict[str, str]:
    return {
        **series("queue_depth", depth, 'capability="work"'),
        **series("task_states_total", begun, 'capability="work", state="working"'),
    }


CASES = [
    Case("AgentErrors", requests(60), requests(40)),
    Case("AgentSlow", latency(20), latency(5)),
    Case(
        "AgentDenials",
        series("authz_denied_total", "0+700x30", 'direction="inbound"'),
        series("authz_denied_total", "0+500x30", 'direction="inbound"'),
    ),
    Case("WorkerGivenUp", places(1, 1, 0), places(2, 0, 0)),
    Case("NoWorkerReady", places(0, 2, 0), places(0, 0, 2)),
    counted("WorkersRestart", "worker_restarts_total", more_than=5),
    Case(
        "WorkerDeaf",
        parts(receiving="1x10 0x20"),
        parts(connected="1x10 0x20", subscribed="1x10 0x20", receiving="1x10 0x20"),
    ),
    Case(
        "EventLoopLate",
        series("event_loop_lag_seconds", "0.001x10 1.5x20"),
        series("event_loop_lag_seconds", "0.001x17 1.5 1.5 0.001x20"),  # not for two minutes
    ),
    Case(
        "MetricsGone",
        {f'up{{job="agentweave", {WHO}}}': "1x10 0x20"},
        {f'up{{job="agentweave", {WHO}}}': "1x30", f'up{{job="another", {WHO}}}': "0x30"},
    ),
    Case("TasksNobodyTakes", queue("5x40", "7x40"), queue("5x40", "0+1x40"), at="35m"),
    Case("QueueGrows", queue("900+50x100", "0+1x100"), queue("5000-40x100", "0+1x100"), at="90m"),
    counted("DeadLetters", "dead_letters_total", 'capability="work", reason="failed"'),
    Case(
        "SvidExpiresSoon",
        series("svid_valid_seconds", "1800-60x30"),
        series("svid_valid_seconds", "3600-60x30"),
        "25m",
    ),
    counted("SvidRotationFails", "svid_rotation_errors_total"),
    Case("BrokerUnreachable", parts(connected="1x10 0x20"), parts(connected="1x18 0 1x10")),
    counted("BrokerUnstable", "bus_reconnects_total", more_than=10),
    counted("BrokerImpersonated", "mtls_handshakes_total", 'result="refused"'),
    Case("PolicyEngineUnreachable", parts(policy="1x10 0x20"), parts(identity="1x10 0x20")),
    Case(
        "PolicyEngineFails",
        series("opa_errors_total", "0+360x30"),
        series("opa_errors_total", "0+240x30"),
    ),
    counted("PolicyRefused", "policy_load_errors_total"),
    counted("RevocationsRefused", "revocation_load_errors_total"),
    counted("AuditCannotBeWritten", "audit_write_failures_total", at="15m"),
    counted("ForgedReplies", "replies_dropped_total", 'reason="forged"'),
    counted("ForgedRequests", "admission_refusals_total", 'step="proof", reason="refused"', more_than=10),
    counted("ForeignRecords", "foreign_records_total"),
    counted("UnknownTrustDomain", "federation_errors_total", more_than=10),
    counted("ClocksDiffer", "admission_refusals_total", 'step="time", reason="refused"', more_than=10),
]
