"""The composition root: from a configuration to wired objects, in one visible place.

:func:`connected` builds everything that one identity needs to call, in this order: identity, policy,
audit, chains and signing, bus. ``serving.py`` adds what an agent needs to be called. Nothing else in the
package chooses an implementation.
"""

from __future__ import annotations

import logging
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from agentweave_bus.authz import (
    AuditLog,
    AuthorizationProvider,
    Authorizer,
    AuthzContext,
    AuthzDecision,
    PolicyEngine,
    PolicyWatch,
)
from agentweave_bus.authz.authorizer import DEFAULT_TIMEOUT_S
from agentweave_bus.authz.circuit_breaker import BreakerSettings
from agentweave_bus.authz.frames import DEFAULT_MAX_BYTES
from agentweave_bus.authz.opa import OpaServerEngine, OpaSettings
from agentweave_bus.authz.traced_authorizer import TracedAuthorizer
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.bus.blobs import Blobs
from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.bus.requests import Requests, RetryRule
from agentweave_bus.bus.slots import Slots
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.bus.traced_admission import StepwiseVerifier
from agentweave_bus.client import CalleeBreakers, Client
from agentweave_bus.config import AgentConfig
from agentweave_bus.config.operation import RetryConfig
from agentweave_bus.envelope import EnvelopeVerifier, Sealer, control_role
from agentweave_bus.identity import (
    ChainVerifier,
    IdentityProvider,
    IdentitySource,
    RevocationWatch,
    client_context,
)
from agentweave_bus.observability.metrics import BreakerState, Direction, Metrics
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.runtime.identities import (
    followed_revocations,
    identity_source,
    remembered_authorities,
)
from agentweave_bus.runtime.surroundings import REAL, Surroundings
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.blob_announcing import BlobAnnouncer
from agentweave_bus.tasks.handle import Handles
from agentweave_bus.tasks.log import Desk
from agentweave_bus.tasks.publishing import Publisher, Publishing
from agentweave_bus.tasks.record import RecordBody
from agentweave_bus.tasks.submission import Submissions
from agentweave_bus.types import TaskState

__all__ = ["Connected", "clock_ms", "connected", "server_id"]

_LAST_SPANS_SECONDS: Final = 5.0

_log = logging.getLogger(__name__)


def clock_ms() -> int:
    """Return the time, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Connected:
    """One identity with everything that it needs to call and be called."""

    config: AgentConfig
    me: SpiffeID
    source: IdentitySource
    verifier: EnvelopeVerifier
    sealer: Sealer
    authorizer: Authorizer
    audit: AuditLog
    keeper: Keeper
    client: Client
    metrics: Metrics
    tracing: Tracing
    surroundings: Surroundings
    desk: Desk
    """What it takes to read the logs of tasks, and to continue those of its own."""
    handles: Handles
    """Makes the handles of tasks that this identity submitted."""
    publisher: Publisher


@asynccontextmanager
async def connected(
    config: AgentConfig,
    *,
    identity_provider: IdentityProvider | None = None,
    authz_provider: AuthorizationProvider | None = None,
    serve: Callable[[Connected], None] = lambda _parts: None,
    connect_deadline_s: float = 30.0,
    surroundings: Surroundings = REAL,
) -> AsyncIterator[Connected]:
    """Build everything and connect; take it all down at the end of the block.

    ``serve`` is called before the connection is made, so that what it subscribes stands with it.
    ``connect_deadline_s`` bounds the wait for an identity, and then that for the broker, in seconds.

    Raises:
        ConfigurationError: the file of revocations is missing or wrong.
        IdentityError: there is no identity, or not the configured one.
        PolicyError: the policy can't be loaded.
        AuditError: the audit log can't be written.
        BusError: the broker can't be reached.

    """
    metrics = Metrics.create()
    me = config.agent.spiffe_id
    revocations = await anyio.to_thread.run_sync(followed_revocations, config.identity, metrics)
    async with AsyncExitStack() as stack:
        history = remembered_authorities(config.identity, me, revocations)
        source = identity_source(
            config.identity, me, metrics, surroundings, provider=identity_provider, history=history
        )
        chains = ChainVerifier(source, revocations=revocations.list, retired=history)
        await source.start(connect_deadline_s)
        stack.push_async_callback(source.aclose)
        metrics.svid_expires(source.svid.expiry.timestamp(), surroundings.wall_s)
        tracing = _tracing(config, source.spiffe_id)
        stack.push_async_callback(_send_last_spans, tracing)
        authorizer = await _authorizer(
            config,
            source,
            authz_provider,
            stack,
            metrics,
            tracing=tracing,
            surroundings=surroundings,
            chains=chains,
            revocations=revocations,
        )
        revocations.on_change(authorizer.forget_standing)
        # It reads the names in a directory and the end of a file.
        audit = await anyio.to_thread.run_sync(_audit, config, source.spiffe_id, stack, surroundings)
        stack.push_async_callback(audit.aclose)
        parts = _wire(
            config,
            source,
            authorizer,
            audit,
            metrics,
            tracing=tracing,
            surroundings=surroundings,
            chains=chains,
        )
        surroundings.on_wired(parts)
        serve(parts)
        group = await stack.enter_async_context(owned_tasks())
        group.start_soon(source.run)
        group.start_soon(revocations.run)
        group.start_soon(authorizer.run)
        stack.callback(group.cancel_scope.cancel)
        await stack.enter_async_context(parts.keeper.open(deadline_s=connect_deadline_s))
        yield parts


async def _authorizer(
    config: AgentConfig,
    source: IdentitySource,
    provider: AuthorizationProvider | None,
    stack: AsyncExitStack,
    metrics: Metrics,
    *,
    tracing: Tracing,
    surroundings: Surroundings,
    chains: ChainVerifier,
    revocations: RevocationWatch,
) -> Authorizer:
    """Choose the engine; whatever it is, the grants beside the policy are followed, too."""
    settings = config.authorization
    engine: PolicyEngine | AuthorizationProvider
    load = refresh = None
    timeout_s = DEFAULT_TIMEOUT_S
    if provider is not None:
        engine = provider
    elif settings.provider == "opa":
        server = _opa_servers(config, source, chains, metrics, surroundings)
        engine = surroundings.around_engine(server)
        refresh = server.refresh
        timeout_s += server.longest_question_s  # its own budgets are what counts; this is for what hangs
        stack.push_async_callback(server.aclose)
        stack.callback(source.subscribe(lambda _snapshot: server.drop_connections()))
        revocations.on_change(server.drop_connections)
    else:
        embedded = EmbeddedEngine(now_ns=surroundings.time_ns)
        engine = surroundings.around_engine(embedded)
        load = embedded.load
        if settings.bundle is None:
            await anyio.to_thread.run_sync(embedded.load, None)
        stack.push_async_callback(embedded.aclose)
    watch = None
    if settings.bundle is not None:
        watch = await anyio.to_thread.run_sync(PolicyWatch, settings.bundle, load)
    kind = TracedAuthorizer if tracing.enabled else Authorizer
    return kind(
        engine,
        policy_path=settings.policy_path,
        watch=watch,
        environment=config.environment,
        default_action=settings.default_action,
        timeout_s=timeout_s,
        refresh=refresh,
        on_decision=_log_federated if settings.audit.log_federated else None,
        on_alarm=lambda _sentence: metrics.policy_load_errors.inc(),
        monotonic=surroundings.monotonic_s,
        wall=surroundings.wall_s,
    )


def _log_federated(context: AuthzContext, decision: AuthzDecision) -> None:
    """Say in the log, too, what crosses a trust domain; the audit log has it with its parameters."""
    caller, callee = SpiffeID(context.caller), SpiffeID(context.callee)
    if caller.trust_domain == callee.trust_domain:
        return
    _log.info(
        "federated %s of %s: %s",
        context.action,
        callee,
        "allowed" if decision.allowed else "denied",
        extra={
            "caller_domain": caller.trust_domain,
            "caller": str(caller),
            "callee_domain": callee.trust_domain,
            "direction": context.direction,
            "reason": decision.reason,
            "decision_id": decision.decision_id,
        },
    )


def _opa_servers(
    config: AgentConfig,
    source: IdentitySource,
    chains: ChainVerifier,
    metrics: Metrics,
    surroundings: Surroundings,
) -> OpaServerEngine:
    settings = config.authorization
    expected = settings.opa_spiffe_id
    breaker = settings.circuit_breaker
    return OpaServerEngine(
        settings.endpoints,
        OpaSettings(
            environment=config.environment,
            strategy=settings.failover_strategy,
            budget_ms=settings.timeout_ms,
            accepted_revisions=settings.opa_revisions or None,
            breaker=BreakerSettings(breaker.failure_threshold, breaker.success_threshold, breaker.timeout),
        ),
        tls=None
        if expected is None
        else lambda: client_context(
            source, SpiffeID(expected), verifier=chains, minimum_version=_minimum_tls(config)
        ),
        on_request=metrics.opa_requests.inc,
        on_error=lambda _endpoint: metrics.opa_errors.inc(),
        on_breaker=lambda endpoint, state: metrics.breaker_changed(endpoint, BreakerState(state.value)),
        monotonic_ms=surroundings.monotonic_ms,
    )


def _audit(config: AgentConfig, me: SpiffeID, stack: AsyncExitStack, surroundings: Surroundings) -> AuditLog:
    """Open the audit log. Switched off, which development alone allows, it is kept only while running."""
    settings = config.authorization.audit
    path = settings.path
    if not settings.enabled:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentweave-audit-"))) / "audit"
    return AuditLog(
        path,
        f"{me} pid {os.getpid()}",
        redact=settings.redact,
        max_file_bytes=settings.max_file_bytes,
        max_frames_bytes=DEFAULT_MAX_BYTES if settings.keep_frames else 0,
        clock_ms=surroundings.clock_ms,
    )


def _wire(
    config: AgentConfig,
    source: IdentitySource,
    authorizer: Authorizer,
    audit: AuditLog,
    metrics: Metrics,
    *,
    tracing: Tracing,
    surroundings: Surroundings,
    chains: ChainVerifier,
) -> Connected:
    me = source.spiffe_id
    verifier = StepwiseVerifier(chains) if tracing.enabled else EnvelopeVerifier(chains)
    sealer = Sealer(lambda: source.svid)
    address = BusAddress(
        config.bus.servers,
        server_id(config),
        config.bus.connect_timeout,
        config.bus.reconnect_wait,
    )
    keeper = Keeper(
        source, chains, address, metrics=metrics, name=str(me), new_client=surroundings.new_client
    )
    requests = Requests(
        keeper=keeper,
        sealer=sealer,
        verifier=verifier,
        retry=_retry_rule(config.bus.retry),
        metrics=metrics,
        clock_ms=surroundings.clock_ms,
        witness=audit.witness,
        max_pending=config.bus.max_pending_calls,
        monotonic=surroundings.monotonic_s,
    )
    submissions = Submissions(
        keeper=keeper,
        sealer=sealer,
        clock_ms=surroundings.clock_ms,
        witness=audit.witness,
        patience_s=config.bus.retry.patience,
        monotonic=surroundings.monotonic_s,
    )
    slots = Slots(keeper, surroundings.monotonic_s)
    blobs = _blobs(config, keeper, slots, sealer, surroundings)
    desk = Desk(
        slots=slots,
        sealer=sealer,
        verifier=verifier,
        clock_ms=surroundings.clock_ms,
        witness=audit.witness,
        on_foreign=metrics.foreign_records.inc,
        on_record=partial(_count_record, metrics),
        blobs=blobs,
    )
    _declare_granted(authorizer, me, metrics)
    breaker = config.bus.circuit_breaker
    client = Client(
        me=me,
        authorizer=authorizer,
        audit=audit,
        transport=requests,
        breakers=CalleeBreakers(
            BreakerSettings(breaker.failure_threshold, breaker.success_threshold, breaker.timeout)
        ),
        allowed_trust_domains=lambda: source.allowed_trust_domains,
        metrics=metrics,
        clock_ms=surroundings.clock_ms,
        max_timeout=config.bus.max_call_timeout,
        monotonic_ms=surroundings.monotonic_ms,
        tracing=tracing,
        submissions=submissions,
        blobs=blobs,
    )
    return Connected(
        config,
        me,
        source,
        verifier,
        sealer,
        authorizer,
        audit,
        keeper,
        client,
        metrics,
        tracing,
        surroundings,
        desk,
        Handles(desk=desk, keeper=keeper, me=me, audit=audit, log=config.authorization.audit.path),
        Publisher(
            Publishing(
                me=me,
                control=control_role(server_id(config).trust_domain),
                keeper=keeper,
                sealer=sealer,
                authorizer=authorizer,
                audit=audit,
                metrics=metrics,
                tracing=tracing,
                clock_ms=surroundings.clock_ms,
                patience_s=config.bus.retry.patience,
                monotonic=surroundings.monotonic_s,
            )
        ),
    )


def _blobs(
    config: AgentConfig, keeper: Keeper, slots: Slots, sealer: Sealer, surroundings: Surroundings
) -> Blobs:
    me = config.agent.spiffe_id
    announcer = BlobAnnouncer(
        me,
        control_role(server_id(config).trust_domain),
        sealer=sealer,
        clock_ms=surroundings.clock_ms,
        monotonic=surroundings.monotonic_s,
    )
    return Blobs(
        me,
        keeper,
        slots,
        announce=announcer.announce,
        max_bytes=config.bus.max_blob_bytes,
        patience_s=config.bus.retry.patience,
        monotonic=surroundings.monotonic_s,
    )


def _count_record(metrics: Metrics, capability: str, body: RecordBody) -> None:
    """Count what a task came to; a pass that only undoes what was done is no attempt at it."""
    if body.undoes is None or body.state is not TaskState.WORKING:
        metrics.task_came_to(capability, body.state)


def _declare_granted(authorizer: Authorizer, me: SpiffeID, metrics: Metrics) -> None:
    """Give each capability that the grants name a series; what only ``*`` covers is counted as ``other``."""
    if authorizer.grants is None:
        return
    for reach in authorizer.grants.callees_of(me):
        for capability in reach.capabilities:
            if not capability.endswith("*"):
                metrics.declare_capability(Direction.OUTBOUND, capability)


def _tracing(config: AgentConfig, me: SpiffeID) -> Tracing:
    return Tracing.create(config.observability.tracing, service=config.agent.name, spiffe_id=me)


async def _send_last_spans(tracing: Tracing) -> None:
    """Send what is left, also when cancelled; a collector that does not answer must not hold up the end."""
    with anyio.move_on_after(_LAST_SPANS_SECONDS, shield=True):
        await anyio.to_thread.run_sync(tracing.shutdown, abandon_on_cancel=True)


def _retry_rule(retry: RetryConfig) -> RetryRule:
    return RetryRule(retry.attempts, retry.base_delay, retry.max_delay, retry.patience)


def _minimum_tls(config: AgentConfig) -> ssl.TLSVersion:
    """Return the least for OPA; the bus speaks TLS 1.3 only."""
    wanted = config.transport.tls_min_version
    return ssl.TLSVersion.TLSv1_2 if wanted == "1.2" else ssl.TLSVersion.TLSv1_3


def server_id(config: AgentConfig) -> SpiffeID:
    """Return the SPIFFE ID that the broker must show."""
    if config.bus.server_spiffe_id is None:
        return SpiffeID.of(config.agent.trust_domain, "agentweave", "broker")
    return SpiffeID(config.bus.server_spiffe_id)
