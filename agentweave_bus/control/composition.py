"""The control role put together, in one place, for whoever runs it.

``agentweave control`` runs it at brokers of one's own, ``agentweave up`` and the testing tools at theirs.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from agentweave_bus.authz import Grants
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.stream_limits import DEFAULT_STREAM_LIMITS, StreamLimits
from agentweave_bus.control.events import EventPlaces
from agentweave_bus.control.operators import operator_service
from agentweave_bus.control.role import ControlRole
from agentweave_bus.control.scheduler import Scheduler
from agentweave_bus.envelope import EnvelopeVerifier, Sealer
from agentweave_bus.identity import IdentitySource
from agentweave_bus.observability.metrics import DeadCause
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Cast", "composed_role"]


@dataclass(frozen=True, slots=True)
class Cast:
    """Who takes part at a broker; each is asked whenever it matters, so the answers may change.

    Attributes:
        everyone: the identities that have a user there.
        grants: what they may ask of each other.
        shut_out: SPIFFE IDs of those among them who are not to be heard now.

    """

    everyone: Callable[[], Collection[SpiffeID]]
    grants: Callable[[], Grants]
    shut_out: Callable[[], Collection[str]] = frozenset

    def knows(self, one: SpiffeID) -> bool:
        """Say whether ``one`` is to be heard."""
        return one in self.everyone() and str(one) not in self.shut_out()


@asynccontextmanager
async def composed_role(
    source: IdentitySource,
    *,
    keeper: Keeper,
    verifier: EnvelopeVerifier,
    cast: Cast,
    policy: Path | None,
    audit: Path,
    limits: StreamLimits = DEFAULT_STREAM_LIMITS,
    sealer_of: Callable[[SpiffeID], Sealer | None] | None = None,
    is_me: Callable[[SpiffeID], bool] | None = None,
    time_ns: Callable[[], int] = time.time_ns,
    monotonic: Callable[[], float] = time.monotonic,
    on_given_up: Callable[[str, DeadCause], None] = lambda _capability, _cause: None,
) -> AsyncIterator[ControlRole]:
    """Make the control role as the identity of ``source``, before ``keeper`` opens; take it down at the end.

    ``policy`` is a policy directory or a grants file, by which operators are answered, and ``audit`` the file
    of its audit log. ``sealer_of`` returns with what to sign for an agent as the control role of its trust
    domain; by default it is this one, for those of its own. ``is_me`` is as of :class:`ControlRole`.
    ``on_given_up`` is told of each delayed task that became a dead letter, by its capability.

    Raises:
        PolicyLoadError: the policy can't be loaded.
        ConfigurationError: the grants are wrong.
        AuditError: the audit log can't be written.

    """
    me, sealer = source.spiffe_id, Sealer(lambda: source.svid)

    def own_sealer(agent: SpiffeID) -> Sealer | None:
        return sealer if agent.trust_domain == me.trust_domain else None

    def clock_ms() -> int:
        return time_ns() // 1_000_000

    signs_for = own_sealer if sealer_of is None else sealer_of
    async with operator_service(
        me,
        keeper=keeper,
        sealer=sealer,
        verifier=verifier,
        sealer_of=signs_for,
        everyone=cast.everyone,
        policy=policy,
        audit=audit,
        time_ns=time_ns,
        monotonic=monotonic,
    ) as operators:
        yield ControlRole(
            me,
            keeper=keeper,
            verifier=verifier,
            known=cast.knows,
            limits=limits,
            is_me=is_me,
            clock_ms=clock_ms,
            events=EventPlaces(cast.grants, cast.everyone, limits=limits),
            scheduler=Scheduler(
                me,
                keeper=keeper,
                verifier=verifier,
                sealer_of=signs_for,
                clock_ms=clock_ms,
                monotonic=monotonic,
                limits=limits,
                on_given_up=on_given_up,
            ),
            operators=operators,
        )
