"""Serving the control role at brokers of one's own: its identity, its connection, its files, its end.

The order of starting: grants and revocations; the identity; connect; make the claims of everybody, and
change streams whose limits changed; say ready.
While it runs it follows its files. The order of stopping: answer no more operators; let what they asked for
finish; disconnect. What it was making for workers is made by another replica, or at their next announcement.

Several of one trust domain may run at once. What they make is made once, by whoever comes first. Each
announcement, wake-up and operator's request goes to one of them.
"""

from __future__ import annotations

import logging
from typing import Final

import anyio
import anyio.to_thread

from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.bus.stream_limits import StreamLimits
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.config import ControlConfig, StreamsConfig
from agentweave_bus.control.composition import Cast, composed_role
from agentweave_bus.control.grants_watch import GrantsWatch, participants
from agentweave_bus.control.role import ControlRole
from agentweave_bus.envelope import EnvelopeVerifier, control_role
from agentweave_bus.exceptions import AgentWeaveError, BusError, UnreachableError
from agentweave_bus.identity import ChainVerifier
from agentweave_bus.observability.metrics import OTHER, Metrics
from agentweave_bus.runtime import lifecycle
from agentweave_bus.runtime.identities import followed_revocations, identity_source, remembered_authorities
from agentweave_bus.runtime.readiness import Readiness, base_parts
from agentweave_bus.runtime.surroundings import REAL
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["serve_control"]

_log = logging.getLogger(__name__)

_START_S: Final = 30.0
_AGAIN_S: Final = 0.5
_POLL_S: Final = 1.0
_DRAIN_S: Final = 10.0
_BROKERS: Final = (
    "the brokers go by the users that they have until they are given them anew (agentweave authz broker)"
)


async def serve_control(config: ControlConfig) -> None:
    """Be the control role until cancelled, or until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: a file is missing or wrong, or a stream at the broker can't be what it must be.
        IdentityError: there is no identity, or not the control role's.
        AuditError: the audit log can't be written.
        BusError: the broker can't be reached, or does not make the first streams.

    """
    with lifecycle.logging_of(config.observability.logging):
        for warning in config.warnings:
            _log.warning("%s", warning)
        me, metrics = control_role(config.trust_domain), Metrics.create()
        grants = await anyio.to_thread.run_sync(GrantsWatch, config.grants)
        revocations = await anyio.to_thread.run_sync(followed_revocations, config.identity, metrics)
        history = remembered_authorities(config.identity, me, revocations)
        revocations.on_change(lambda: _log.warning("the revocations changed; %s", _BROKERS))
        source = identity_source(config.identity, me, metrics, REAL, history=history)
        await source.start(_START_S)
        metrics.svid_expires(source.svid.expiry.timestamp(), REAL.wall_s)
        metrics.declare_deliveries(OTHER)
        try:
            chains = ChainVerifier(source, revocations=revocations.list, retired=history)
            bus = config.bus
            address = BusAddress(bus.servers, config.broker, bus.connect_timeout, bus.reconnect_wait)
            keeper = Keeper(source, chains, address, metrics=metrics, name=str(me))
            everyone = _Everyone(config, grants)
            cast = Cast(
                everyone=everyone,
                grants=lambda: grants.current,
                shut_out=lambda: revocations.list.revoked.spiffe_ids,
            )
            async with (
                composed_role(
                    source,
                    keeper=keeper,
                    verifier=EnvelopeVerifier(chains),
                    cast=cast,
                    policy=config.grants,
                    audit=config.state_dir / "audit" / "control.jsonl",
                    limits=_limits(config.streams),
                    on_given_up=metrics.given_up,
                ) as role,
                owned_tasks() as group,
            ):
                group.start_soon(source.run)
                group.start_soon(revocations.run)
                async with keeper.open(deadline_s=_START_S):
                    await _make_first_streams(role, cast)
                    with (
                        lifecycle.stop_signals() as stop_signal,
                        lifecycle.health_listener(
                            config.observability.metrics, metrics, me, Readiness(base_parts(source, keeper))
                        ) as url,
                    ):
                        group.start_soon(role.run)
                        group.start_soon(_follow, role, cast, grants)
                        lifecycle.say_ready(me, url)
                        await stop_signal()
                        await keeper.drain(_DRAIN_S)
                        group.cancel_scope.cancel()
        finally:
            await source.aclose()


class _Everyone:
    """Tells who has a user at the broker; worked out once for each set of grants."""

    def __init__(self, config: ControlConfig, grants: GrantsWatch) -> None:
        self._config = config
        self._grants = grants
        self._of = grants.current
        self._found = self._look()

    def __call__(self) -> frozenset[SpiffeID]:
        if self._grants.current is not self._of:
            self._of = self._grants.current
            self._found = self._look()
        return self._found

    def _look(self) -> frozenset[SpiffeID]:
        return participants(self._of, self._config.identity.allowed_trust_domains, self._config.identities)


def _limits(streams: StreamsConfig) -> StreamLimits:
    return StreamLimits(
        replicas=streams.replicas,
        queue_tasks=streams.queue_tasks,
        queue_bytes=streams.queue_bytes,
        record_age_s=streams.record_age,
        dead_bytes=streams.dead_bytes,
        event_bytes=streams.event_bytes,
    )


async def _make_first_streams(role: ControlRole, cast: Cast) -> None:
    """Make everybody's claims, and bring what there is in line with the limits that are configured now.

    A broker that is starting, too, has some time to be able to.
    """
    give_up = anyio.current_time() + _START_S
    while True:
        try:
            await role.make_claims(sorted(cast.everyone()))
            await role.bring_in_line(sorted(cast.everyone()))
        except (BusError, UnreachableError) as error:
            if anyio.current_time() > give_up:
                raise
            _log.warning("the broker does not make streams yet: %s", error)
        else:
            return
        await anyio.sleep(_AGAIN_S)


async def _follow(role: ControlRole, cast: Cast, grants: GrantsWatch) -> None:
    """Go by the grants as their file says, until cancelled. Who is new in them gets claims."""
    told, in_line = "", True
    while True:
        await anyio.sleep(_POLL_S)
        if await anyio.to_thread.run_sync(grants.changed):
            in_line = False
            role.grants_changed()
            await role.operators_changed()
            _log.warning("the grants changed; %s", _BROKERS)
        if in_line:
            continue
        try:
            await role.make_claims(sorted(cast.everyone()))
        except AgentWeaveError as error:
            if (said := str(error)) != told:
                told = said
                _log.error("the claims of whoever is new are made later: %s", error)
        else:
            told, in_line = "", True
