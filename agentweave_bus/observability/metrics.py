"""Every metric, declared once.

A :class:`Metrics` belongs to one process (or one test) and is handed to whoever counts; nothing here
is global. Names keep the prefix and the spelling of the reference documents, so that their queries
and alerts work. Label values come from closed sets: a capability that was not declared is counted as
``other``, so that a stranger can't grow the exposition by inventing names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from agentweave_bus.observability.tallies import Spread, Tallied, Tally

__all__ = [
    "DECLARATIONS",
    "OTHER",
    "BreakerState",
    "DeadCause",
    "Declaration",
    "Direction",
    "DropReason",
    "Metrics",
    "ReadyPart",
    "RequestStatus",
]

OTHER: Final = "other"
"""The capability under which is counted what is of none that was declared."""

_REQUEST_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TASK_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)


class RequestStatus(StrEnum):
    """How a request ended: a failure is ``error``, whatever failed; a denial and a refusal are not."""

    SUCCESS = "success"
    ERROR = "error"
    DENIED = "denied"
    REFUSED = "refused"


class Direction(StrEnum):
    """Seen from this process: requests that it serves, or that it makes."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"


class BreakerState(StrEnum):
    """The states of a circuit breaker, from good to bad."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class DropReason(StrEnum):
    """Why a reply was thrown away without waking anybody."""

    LATE = "late"
    DUPLICATE = "duplicate"
    FORGED = "forged"


class DeadCause(StrEnum):
    """Why something became a dead letter: ``lost`` was given up between attempts, ``refused`` before one."""

    FAILED = "failed"
    LOST = "lost"
    REFUSED = "refused"
    UNVERIFIED = "unverified"


class ReadyPart(StrEnum):
    """What has to be well for a process to be sent work."""

    CONNECTED = "connected"
    IDENTITY = "identity"
    SUBSCRIBED = "subscribed"
    RECEIVING = "receiving"
    POLICY = "policy"


_QUEUED_STATES: Final = ("working", "completed", "failed", "canceled", "rejected")
"""The states of tasks that are counted from zero on; others come up where there are some."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """One metric: its name, what it counts, and its labels; ``buckets`` are a histogram's.

    What is ``tallied`` is changed by every call or task, on the event loop only; see :mod:`.tallies`.
    """

    kind: type[Counter | Gauge | Histogram]
    name: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    tallied: bool = False

    def in_registry(self, registry: CollectorRegistry) -> Any:
        """Make the metric in ``registry``."""
        if not self.tallied:
            return self._made(registry)
        make = partial(Spread, self.buckets) if issubclass(self.kind, Histogram) else Tally
        tallied = Tallied[Any](self._made(None), self.labels, make)
        registry.register(tallied)
        return tallied

    def _made(self, registry: CollectorRegistry | None) -> Counter | Gauge | Histogram:
        if issubclass(self.kind, Histogram):
            return Histogram(self.name, self.meaning, self.labels, buckets=self.buckets, registry=registry)
        return self.kind(self.name, self.meaning, self.labels, registry=registry)


DECLARATIONS: Final[Mapping[str, Declaration]] = {
    "requests": Declaration(
        Counter,
        "agentweave_requests_total",
        "Requests that ended, by how they ended.",
        ("direction", "capability", "status"),
        tallied=True,
    ),
    "request_duration": Declaration(
        Histogram,
        "agentweave_request_duration_seconds",
        "From a request's arrival (or sending) to its answer.",
        ("direction", "capability"),
        _REQUEST_BUCKETS,
        tallied=True,
    ),
    "task_duration": Declaration(
        Histogram,
        "agentweave_task_duration_seconds",
        "Time spent in handlers.",
        ("capability",),
        _TASK_BUCKETS,
        tallied=True,
    ),
    "calls_in_flight": Declaration(
        Gauge,
        "agentweave_calls_in_flight",
        "Requests that have not ended yet.",
        ("direction",),
        tallied=True,
    ),
    "queue_depth": Declaration(
        Gauge, "agentweave_queue_depth", "Tasks that no worker has been given yet.", ("capability",)
    ),
    "authz_allowed": Declaration(
        Counter, "agentweave_authz_allowed_total", "Decisions to allow.", ("direction",), tallied=True
    ),
    "authz_denied": Declaration(
        Counter,
        "agentweave_authz_denied_total",
        "Decisions to deny; that a task waits for an approval is one.",
        ("direction",),
        tallied=True,
    ),
    "authz_standing_reused": Declaration(
        Counter,
        "agentweave_authz_standing_reused_total",
        "Requests that an earlier, standing answer allowed.",
        tallied=True,
    ),
    "authz_breaker_state": Declaration(
        Gauge,
        "agentweave_authz_circuit_breaker_state",
        "1 for the state of the best policy endpoint, 0 for the others.",
        ("state",),
    ),
    "authz_endpoint_breaker_state": Declaration(
        Gauge,
        "agentweave_authz_endpoint_circuit_breaker_state",
        "1 for the state of this policy endpoint, 0 for the others.",
        ("endpoint", "state"),
    ),
    "opa_requests": Declaration(
        Counter,
        "agentweave_opa_requests_total",
        "Questions put to OPA servers. The embedded engine is not counted.",
    ),
    "opa_errors": Declaration(
        Counter,
        "agentweave_opa_errors_total",
        "Attempts at an OPA server without a trustworthy answer in time.",
    ),
    "policy_load_errors": Declaration(
        Counter, "agentweave_policy_load_errors_total", "Policy revisions refused; the one before stays."
    ),
    "revocation_load_errors": Declaration(
        Counter,
        "agentweave_revocation_load_errors_total",
        "Files of revocations refused; what was revoked before stays so.",
    ),
    "svid_rotations": Declaration(Counter, "agentweave_svid_rotation_total", "SVIDs taken into use."),
    "svid_rotation_errors": Declaration(
        Counter, "agentweave_svid_rotation_errors_total", "Attempts to get a new SVID that failed."
    ),
    "certificate_expiry": Declaration(
        Gauge,
        "agentweave_certificate_expiry_timestamp_seconds",
        "When the current SVID expires, in seconds since the epoch.",
    ),
    "mtls_handshakes": Declaration(
        Counter,
        "agentweave_mtls_handshakes_total",
        "TLS handshakes, by whether the peer was who it had to be.",
        ("result",),
    ),
    "federation_errors": Declaration(
        Counter,
        "agentweave_federation_errors_total",
        "Peers of a trust domain that is not allowed or has no bundle.",
    ),
    "foreign_records": Declaration(
        Counter,
        "agentweave_foreign_records_total",
        "Slots of tasks' logs that hold something else than a genuine record: somebody may write there.",
    ),
    "admission_refusals": Declaration(
        Counter,
        "agentweave_admission_refusals_total",
        "Envelopes refused before a handler ran, by admission step and class of reason.",
        ("step", "reason"),
    ),
    "replies_dropped": Declaration(
        Counter, "agentweave_replies_dropped_total", "Replies that nobody was woken for.", ("reason",)
    ),
    "bus_reconnects": Declaration(
        Counter, "agentweave_bus_reconnects_total", "Connections to the broker made anew."
    ),
    "call_retries": Declaration(
        Counter, "agentweave_call_retries_total", "Calls that were sent once more, for want of an answer."
    ),
    "task_states": Declaration(
        Counter,
        "agentweave_task_states_total",
        "Durable tasks that came to a state: each attempt is `working` once.",
        ("capability", "state"),
        tallied=True,
    ),
    "task_retries": Declaration(
        Counter,
        "agentweave_task_retries_total",
        "Attempts at durable tasks and events that failed and are made again later.",
        ("capability",),
    ),
    "redeliveries": Declaration(
        Counter,
        "agentweave_redeliveries_total",
        "Durable tasks and events that the broker gave out another time.",
        ("capability",),
    ),
    "dead_letters": Declaration(
        Counter,
        "agentweave_dead_letters_total",
        "Durable tasks and events that were given up, by why.",
        ("capability", "reason"),
    ),
    "event_loop_lag": Declaration(
        Gauge, "agentweave_event_loop_lag_seconds", "By how much the event loop is late."
    ),
    "svid_valid": Declaration(
        Gauge, "agentweave_svid_valid_seconds", "For how long the current SVID is still valid."
    ),
    "ready": Declaration(
        Gauge,
        "agentweave_ready",
        "1 for each part of this process that is as it must be to be sent work, 0 for the others.",
        ("part",),
    ),
    "audit_write_failures": Declaration(
        Counter, "agentweave_audit_write_failures_total", "Audit records that could not be written."
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The metrics of one process; :meth:`create` makes them in a registry of their own.

    Use the methods where there is one: they know the label values. The fields are for what is
    counted without labels, and for tests.
    """

    registry: CollectorRegistry
    requests: Tallied[Tally]
    request_duration: Tallied[Spread]
    task_duration: Tallied[Spread]
    calls_in_flight: Tallied[Tally]
    queue_depth: Gauge
    authz_allowed: Tallied[Tally]
    authz_denied: Tallied[Tally]
    authz_standing_reused: Tallied[Tally]
    authz_breaker_state: Gauge
    authz_endpoint_breaker_state: Gauge
    opa_requests: Counter
    opa_errors: Counter
    policy_load_errors: Counter
    revocation_load_errors: Counter
    svid_rotations: Counter
    svid_rotation_errors: Counter
    certificate_expiry: Gauge
    mtls_handshakes: Counter
    federation_errors: Counter
    foreign_records: Counter
    admission_refusals: Counter
    replies_dropped: Counter
    bus_reconnects: Counter
    call_retries: Counter
    task_states: Tallied[Tally]
    task_retries: Counter
    redeliveries: Counter
    dead_letters: Counter
    event_loop_lag: Gauge
    svid_valid: Gauge
    ready: Gauge
    audit_write_failures: Counter
    _capabilities: set[tuple[str, str]] = field(default_factory=set, repr=False)
    _series: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)
    """Series by what finds them, so that their labels are looked up once and not each time."""
    _ended: dict[tuple[str, str, str], tuple[Tally, Spread]] = field(default_factory=dict, repr=False)
    _handled: dict[str, Spread] = field(default_factory=dict, repr=False)
    """Likewise, those of what every call counts; only under names that are exposed."""
    _endpoint_states: dict[str, BreakerState] = field(default_factory=dict, repr=False)

    @classmethod
    def create(cls, registry: CollectorRegistry | None = None) -> Metrics:
        """Make every metric in ``registry``, by default a new one."""
        registry = CollectorRegistry() if registry is None else registry
        made: dict[str, Any] = {name: each.in_registry(registry) for name, each in DECLARATIONS.items()}
        metrics = cls(registry=registry, **made)
        metrics._start_at_zero()
        return metrics

    def declare_capability(self, direction: Direction, capability: str) -> None:
        """Give ``capability`` series of its own; others are counted as ``other``.

        Agents declare what they serve and what their grants let them call.
        """
        self._capabilities.add((direction, capability))
        for status in RequestStatus:
            self.requests.labels(direction, capability, status)

    def declare_refusals(self, steps: Iterable[str]) -> None:
        """Count from zero what is refused at the ``steps`` of admission."""
        for step in steps:
            self.admission_refusals.labels(step, "refused")

    def declare_queue(self, capability: str) -> None:
        """Count from zero what comes of the durable tasks of ``capability``, which was declared."""
        for state in _QUEUED_STATES:
            self.task_states.labels(capability, state)
        self.declare_deliveries(capability)

    def declare_deliveries(self, capability: str) -> None:
        """Count from zero what becomes of deliveries for ``capability``, or for a pattern of events."""
        self.task_retries.labels(capability)
        self.redeliveries.labels(capability)
        for cause in DeadCause:
            self.dead_letters.labels(capability, cause)

    def declares(self, direction: Direction, capability: str) -> bool:
        """Say whether ``capability`` was declared: only such names are told apart by those who watch."""
        return (direction, capability) in self._capabilities

    def request_ended(
        self, direction: Direction, capability: str, status: RequestStatus, seconds: float
    ) -> None:
        """Count a request that took ``seconds``."""
        ended = self._ended.get((direction, capability, status))
        if ended is None:
            ended = self._ended_as(direction, self._known(direction, capability), status)
        count, duration = ended
        count.inc()
        duration.observe(seconds)

    def in_flight(self, direction: Direction) -> Tally:
        """Return the series that counts requests which have not ended."""
        return self.calls_in_flight.labels(direction)

    def now_serving(self) -> int:
        """Return how many requests are being served."""
        return self.in_flight(Direction.INBOUND).value

    def handled(self) -> int:
        """Return how often a handler has run until now."""
        return sum(each.count() for each in self.task_duration.series())

    def handler_ended(self, capability: str, seconds: float) -> None:
        """Count the ``seconds`` that a handler ran."""
        duration = self._handled.get(capability)
        if duration is None:
            name = self._known(Direction.INBOUND, capability)
            duration = self._handled[name] = self.task_duration.labels(name)
        duration.observe(seconds)

    def decided(self, direction: Direction, *, allowed: bool, standing: bool = False) -> None:
        """Count a decision; ``standing`` when it reused an earlier answer."""
        (self.authz_allowed if allowed else self.authz_denied).labels(direction).inc()
        if standing:
            self.authz_standing_reused.labels().inc()

    def breaker_changed(self, endpoint: str, state: BreakerState) -> None:
        """Note the ``state`` of the breaker of a policy ``endpoint``."""
        self._endpoint_states[endpoint] = state
        for each in BreakerState:
            self.authz_breaker_state.labels(each).set(self.breaker_is(each))
            self.authz_endpoint_breaker_state.labels(endpoint, each).set(each is state)

    def breaker_is(self, state: BreakerState) -> bool:
        """Say whether the breaker of the best policy endpoint is in ``state``; without one it is closed."""
        order = list(BreakerState)
        return state is min(self._endpoint_states.values(), key=order.index, default=BreakerState.CLOSED)

    def handshake_ended(self, *, accepted: bool) -> None:
        """Count a TLS handshake."""
        self.mtls_handshakes.labels("accepted" if accepted else "refused").inc()

    def admission_refused(self, step: str, reason: str) -> None:
        """Count a refusal at ``step``; ``reason`` is a class of reasons, never a sentence."""
        self.admission_refusals.labels(step, reason).inc()

    def reply_dropped(self, reason: DropReason) -> None:
        """Count a reply that was thrown away."""
        self.replies_dropped.labels(reason).inc()

    def task_came_to(self, capability: str, state: str) -> None:
        """Count that a durable task is on record as being in ``state``, by this process's hand."""
        self.task_states.labels(self._known(Direction.INBOUND, capability), state).inc()

    def tried_again(self, capability: str) -> None:
        """Count an attempt at a durable task or an event that failed and is made again later."""
        self._one("task_retries", self._known(Direction.INBOUND, capability)).inc()

    def redelivered(self, capability: str) -> None:
        """Count what the broker gave out another time."""
        self._one("redeliveries", self._known(Direction.INBOUND, capability)).inc()

    def given_up(self, capability: str, cause: DeadCause) -> None:
        """Count a dead letter that was written."""
        self._one("dead_letters", self._known(Direction.INBOUND, capability), cause).inc()

    def svid_expires(self, at_s: float, now_s: Callable[[], float]) -> None:
        """Note when the SVID in use expires, in seconds since the epoch; ``now_s`` is the clock for that."""
        self.certificate_expiry.set(at_s)
        self.svid_valid.set_function(lambda: at_s - now_s())

    def _one(self, metric: str, *labels: str) -> Any:
        """Return a series of ``metric``. Labels come from closed sets, so these are few."""
        key = (metric, *labels)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = getattr(self, metric).labels(*labels)
        return series

    def _ended_as(self, direction: str, name: str, status: str) -> tuple[Tally, Spread]:
        series = self.requests.labels(direction, name, status), self.request_duration.labels(direction, name)
        self._ended[direction, name, status] = series
        return series

    def _known(self, direction: str, capability: str) -> str:
        return capability if (direction, capability) in self._capabilities else OTHER

    def _start_at_zero(self) -> None:
        """Expose every series of a closed label set from the start: ``rate()`` needs the zero."""
        for direction in Direction:
            self.authz_allowed.labels(direction)
            self.authz_denied.labels(direction)
            self.calls_in_flight.labels(direction)
            for status in RequestStatus:
                self.requests.labels(direction, OTHER, status)
        for state in BreakerState:
            self.authz_breaker_state.labels(state).set(state is BreakerState.CLOSED)
        for result in ("accepted", "refused"):
            self.mtls_handshakes.labels(result)
        for reason in DropReason:
            self.replies_dropped.labels(reason)
