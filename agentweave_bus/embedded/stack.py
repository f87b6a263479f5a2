"""The embedded stack: everything that agents need, on one machine, without containers.

It starts, in this order: the development authority and its Workload API (a socket per identity), a real
nats-server with mutual TLS and users generated from the grants, and the control role, which makes the
streams. It is up when a call could be claimed. While it runs the control role stays connected and makes what
agents with durable tasks need when they announce themselves; the stack renews the broker's certificate and
brings the broker's users in line with the grants whenever their file changes; a removed grant takes
effect at the broker at once. Who is revoked loses the user there, and so every connection.

Workers can't tell it from SPIRE and a production broker: they use the Workload API, mutual TLS and the
policy like everywhere. Only the authority is for development, since its key lies on this disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from agentweave_bus.bus.claims import NEW_STREAM_S
from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.control.broker import (
    DEFAULT_SYNC,
    BrokerFiles,
    broker_configuration,
    broker_id,
    broker_users,
)
from agentweave_bus.control.composition import Cast, composed_role
from agentweave_bus.control.grants_watch import GrantsWatch
from agentweave_bus.control.role import ControlRole
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.embedded.revoked import Revoked
from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.envelope import EnvelopeVerifier, control_role
from agentweave_bus.exceptions import AgentWeaveError, BusError
from agentweave_bus.identity import (
    Authority,
    ChainVerifier,
    IdentitySource,
    RetiredAuthorities,
    SPIFFEIdentityProvider,
    X509Bundle,
)
from agentweave_bus.runtime.surroundings import REAL, Surroundings
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["EmbeddedStack", "StackSettings", "embedded_stack"]

_log = logging.getLogger(__name__)

_POLL_S: Final = 1.0
_CONNECT_S: Final = 15.0
_PATIENT_LIFETIME: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What the stack is to serve.

    ``state_dir`` keeps the authority and the streams over restarts. ``identities`` are the agents and
    clients that get an SVID and a user. ``grants`` is a grants file, or a policy directory with or
    without one; without one nothing is granted. ``unrestricted`` identities get an SVID, too, and the
    broker lets them do anything: they play the compromised broker in tests and demonstrations.
    ``svid_lifetime`` is that of every SVID; each is renewed at half of it.

    ``foreign`` are agents of other trust domains that use this broker: each gets a user and claims, and its
    SVID from its own domain, whose bundle is among ``federated``.

    ``revocations`` is a file of identities and certificates that are trusted no more. ``sync`` and
    ``patient`` are as of :func:`~agentweave_bus.control.broker.broker_configuration`; who is waited for so
    patiently may not renew its SVID in time either, so those of a patient stack live for a day.
    """

    trust_domain: str
    state_dir: Path
    identities: tuple[SpiffeID, ...]
    grants: Path | None = None
    port: int = 0
    svid_lifetime: timedelta = timedelta(hours=1)
    federated: tuple[X509Bundle, ...] = ()
    unrestricted: tuple[SpiffeID, ...] = ()
    foreign: tuple[SpiffeID, ...] = ()
    revocations: Path | None = None
    sync: str = DEFAULT_SYNC
    patient: bool = False

    @property
    def users(self) -> tuple[SpiffeID, ...]:
        """All whom the broker knows by the grants, of this domain and of others."""
        return (*self.identities, *self.foreign)


class EmbeddedStack:
    """A running stack. Made by :func:`embedded_stack`."""

    def __init__(self, settings: StackSettings, api: WorkloadApiServer, nats: NatsServer) -> None:
        self.settings = settings
        self.api = api
        self.nats = nats
        self._claimable_at = 0.0
        self._look = anyio.Event()
        self._waiting: list[anyio.Event] = []

    @property
    def bus_url(self) -> str:
        """The broker's address, ``tls://127.0.0.1:<port>``."""
        return f"tls://127.0.0.1:{self.nats.port}"

    @property
    def broker_id(self) -> SpiffeID:
        """The SPIFFE ID that the broker shows."""
        return broker_id(self.settings.trust_domain)

    async def settled(self) -> None:
        """Wait until calls can be claimed: a stream that was made just now may not be used at once."""
        await anyio.sleep(max(0.0, self._claimable_at - time.monotonic()))

    def claimable_from(self, monotonic_s: float) -> None:
        """Note when calls can be claimed, by the monotonic clock in seconds."""
        self._claimable_at = monotonic_s

    async def admit(self, *identities: SpiffeID) -> None:
        """Let more identities take part: each gets an SVID, a user and claims. Then :meth:`settled` holds.

        Raises:
            IdentityError: one is of another trust domain.

        """
        new = tuple(one for one in dict.fromkeys(identities) if one not in self.settings.users)
        if not new:
            return
        for one in new:
            await self.api.serve(one)
        self.settings = replace(self.settings, identities=(*self.settings.identities, *new))
        await self.in_line()

    async def in_line(self) -> None:
        """Return when the broker has the grants as their file says now, and a user for every identity.

        Raises:
            BusError: the broker could not be told in time.

        """
        done = anyio.Event()
        self._waiting.append(done)
        self.look_again()
        with anyio.move_on_after(_CONNECT_S):
            await done.wait()
        if not done.is_set():
            raise BusError("the broker does not take its new users")

    def look_again(self) -> None:
        """Have what the broker is made of looked at now, not within a second."""
        self._look.set()

    async def next_look(self) -> list[anyio.Event]:
        """Wait until it is time to look; return who waits for what comes of it. For who keeps the stack."""
        with anyio.move_on_after(_POLL_S):
            await self._look.wait()
        if self._look.is_set():
            self._look = anyio.Event()
        waiting, self._waiting = self._waiting, []
        return waiting

    def waits_on(self, waiting: list[anyio.Event]) -> None:
        """Have them told another time: the broker could not be told."""
        self._waiting += [one for one in waiting if one not in self._waiting]

    def environment(self, identity: SpiffeID) -> Mapping[str, str]:
        """Return the variables that point a process with ``identity`` at this stack.

        They override what its configuration says about the Workload API and the broker.
        """
        return {
            "AGENTWEAVE_IDENTITY__SPIFFE_ENDPOINT": self.api.endpoint(identity),
            "AGENTWEAVE_BUS__SERVERS": f'["{self.bus_url}"]',
            "AGENTWEAVE_BUS__SERVER_SPIFFE_ID": str(self.broker_id),
        }


@asynccontextmanager
async def embedded_stack(
    settings: StackSettings, *, settle: bool = True, surroundings: Surroundings = REAL
) -> AsyncIterator[EmbeddedStack]:
    """Start the stack, keep it in order for the length of the block, and leave nothing behind but its state.

    Without ``settle`` the block begins before calls can be claimed, for about 2 s with new streams; who
    has something to do meanwhile waits later, by :meth:`EmbeddedStack.settled`. The control role lives in
    ``surroundings``.

    Raises:
        ConfigurationError: no nats-server is to be had, the grants are wrong, or the state is unusable.
        BusError: the broker does not come up.

    """
    sockets = Path(tempfile.mkdtemp(prefix="agentweave-", dir=os.environ.get("XDG_RUNTIME_DIR")))
    try:
        async with _running(settings, sockets, surroundings) as stack:
            if settle:
                await stack.settled()
            yield stack
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


@asynccontextmanager
async def _running(
    settings: StackSettings, sockets: Path, surroundings: Surroundings
) -> AsyncIterator[EmbeddedStack]:
    revoked = await anyio.to_thread.run_sync(Revoked, settings.revocations)
    access = _Access(GrantsWatch(settings.grants), revoked)
    authority = await anyio.to_thread.run_sync(
        Authority.load_or_create, settings.state_dir / "authority", settings.trust_domain
    )
    control, broker = control_role(settings.trust_domain), broker_id(settings.trust_domain)
    lifetime = max(settings.svid_lifetime, _PATIENT_LIFETIME) if settings.patient else settings.svid_lifetime
    api = WorkloadApiServer(authority, sockets, lifetime=lifetime, federated=settings.federated)
    async with api:
        foreign = [bundle.trust_domain for bundle in settings.federated]
        for identity in (control, broker, *settings.identities, *settings.unrestricted):
            await api.serve(identity)
        revoked.begin(api)
        # What was parked weeks ago is verified by the authorities of that time.
        history = RetiredAuthorities(settings.state_dir / "authorities", control, revocations=revoked.list)
        async with (
            _source(api, broker, foreign) as broker_source,
            _source(api, control, foreign, history, clock=surroundings.wall_s) as control_source,
        ):
            files = _broker_files(settings.state_dir)
            await anyio.to_thread.run_sync(_write_identity, files, broker_source)
            nats = NatsServer(
                access.configuration(files, settings),
                settings.state_dir / "broker",
                port=settings.port or None,
            )
            async with nats:
                stack = EmbeddedStack(settings, api, nats)
                async with (
                    _connected_role(stack, control_source, access, history, surroundings) as role,
                    owned_tasks() as group,
                ):
                    group.start_soon(broker_source.run)
                    group.start_soon(control_source.run)
                    group.start_soon(role.run)
                    group.start_soon(_Keeper(stack, files, access, broker_source, role, history).run)
                    yield stack
                    group.cancel_scope.cancel()


@asynccontextmanager
async def _source(
    api: WorkloadApiServer,
    identity: SpiffeID,
    domains: Iterable[str],
    history: RetiredAuthorities | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[IdentitySource]:
    """Hold an identity as any workload would: from the Workload API."""
    source = IdentitySource(
        SPIFFEIdentityProvider(api.endpoint(identity), identity),
        allowed_trust_domains=domains,
        expected_id=identity,
        history=history,
        clock=clock,
    )
    await source.start(_CONNECT_S)
    try:
        yield source
    finally:
        await source.aclose()


@asynccontextmanager
async def _connected_role(
    stack: EmbeddedStack,
    source: IdentitySource,
    access: _Access,
    history: RetiredAuthorities,
    surroundings: Surroundings,
) -> AsyncIterator[ControlRole]:
    """Connect the control role, for the length of the block, and let it make the claims first of all."""
    chains = ChainVerifier(source, revocations=access.revoked.list, retired=history)
    address = BusAddress([stack.bus_url], stack.broker_id)
    keeper = Keeper(source, chains, address, name="control", new_client=surroundings.new_client)
    cast = Cast(lambda: stack.settings.users, lambda: access.grants.current, lambda: access.revoked.shut_out)
    async with (
        composed_role(
            source,
            keeper=keeper,
            verifier=EnvelopeVerifier(chains),
            cast=cast,
            policy=stack.settings.grants,
            audit=stack.settings.state_dir / "audit" / "control.jsonl",
            time_ns=surroundings.time_ns,
            monotonic=surroundings.monotonic_s,
        ) as role,
        keeper.open(deadline_s=_CONNECT_S),
    ):
        await _make_claims(stack, role)
        yield role


async def _make_claims(stack: EmbeddedStack, role: ControlRole) -> None:
    """Make the claim streams as the control role, and note when calls can be claimed in new ones."""
    began = time.monotonic()
    if await role.make_claims(stack.settings.users):
        stack.claimable_from(began + NEW_STREAM_S + 0.1)


@dataclass(slots=True)
class _Keeper:
    """Reloads the broker when its certificate was renewed, the grants changed or somebody was revoked."""

    stack: EmbeddedStack
    files: BrokerFiles
    access: _Access
    source: IdentitySource
    role: ControlRole
    history: RetiredAuthorities
    in_line: bool = True
    renewed: bool = False
    fault: str = ""

    async def run(self) -> None:
        """Keep the broker in line until cancelled. The caller owns this task."""
        unsubscribe = self.source.subscribe(self._note)
        try:
            while True:
                waiting = await self.stack.next_look()
                try:
                    await self._look(waiting)
                    self.fault = ""
                except Exception as error:  # noqa: BLE001 - the stack and its broker go on as they are
                    self._failed(error, waiting)
        finally:
            unsubscribe()

    def _note(self, _snapshot: object) -> None:
        self.renewed = True
        self.stack.look_again()

    async def _look(self, waiting: list[anyio.Event]) -> None:
        stack, files, access = self.stack, self.files, self.access
        if waiting:
            self.in_line = False
        if self.renewed:
            self.in_line = self.renewed = False
            await anyio.to_thread.run_sync(_write_identity, files, self.source)
        if await anyio.to_thread.run_sync(access.grants.changed):
            self.in_line = False
            self.role.grants_changed()
            await self.role.operators_changed()
        if await anyio.to_thread.run_sync(access.revoked.changed):
            access.revoked.note_owners(stack.api)
            self.history.drop_revoked()
            self.in_line = False
        if not self.in_line and stack.nats.running:
            self.in_line = await _reload(stack, files, access)
        if waiting:
            await _tell(stack, waiting, self.role, in_line=self.in_line)
        # Once their connections are gone they may come back, with new certificates.
        if self.in_line and access.revoked.let_in_again(stack.api):
            self.in_line = await _reload(stack, files, access)

    def _failed(self, error: Exception, waiting: list[anyio.Event]) -> None:
        """Have all of it done again at the next look, and tell it once."""
        self.in_line, self.renewed = False, True
        self.stack.waits_on([one for one in waiting if not one.is_set()])
        if (fault := repr(error)) != self.fault:
            self.fault = fault
            _log.error("the broker goes on as before, and is looked at again", exc_info=error)


async def _tell(
    stack: EmbeddedStack, waiting: list[anyio.Event], role: ControlRole, *, in_line: bool
) -> None:
    """Make the streams of whoever was admitted, and tell those who wait; later, if that can't be now."""
    try:
        if in_line:
            await _make_claims(stack, role)
    except AgentWeaveError as error:
        _log.warning("the streams will be made later: %s", error)
        in_line = False
    if not in_line:
        stack.waits_on(waiting)
        return
    for one in waiting:
        one.set()


async def _reload(stack: EmbeddedStack, files: BrokerFiles, access: _Access) -> bool:
    """Have the broker take its files anew; return whether it is done with. A broker that is down is not."""
    try:
        await stack.nats.reload(access.configuration(files, stack.settings))
    except BusError as error:
        _log.warning("the broker will be told again: %s", error)
        return False
    except AgentWeaveError as error:
        _log.error("the broker goes on as before: %s", error)
    else:
        _log.info("the broker has its certificate and users anew")
    return True


@dataclass(frozen=True, slots=True)
class _Access:
    """Who has a user at the broker, and what each may do there."""

    grants: GrantsWatch
    revoked: Revoked

    def configuration(self, files: BrokerFiles, settings: StackSettings) -> str:
        control = control_role(settings.trust_domain)
        users = broker_users(
            self.grants.current, settings.users, control=[control], unrestricted=settings.unrestricted
        )
        shut_out = self.revoked.shut_out
        return broker_configuration(
            "agentweave",
            files,
            (user for user in users if user["user"] not in shut_out),
            sync=settings.sync,
            patient=settings.patient,
        )


def _broker_files(state_dir: Path) -> BrokerFiles:
    folder = (state_dir / "broker").absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return BrokerFiles(
        folder / "svid.pem", folder / "key.pem", folder / "authorities.pem", folder / "streams"
    )


def _write_identity(files: BrokerFiles, source: IdentitySource) -> None:
    """Give the broker its SVID and the bundles of those who may connect; each file whole or not at all."""
    snapshot = source.current
    bundles = b"".join(bundle.to_pem() for bundle in snapshot.bundles.values())
    for path, content in (
        (files.certificate, snapshot.svid.chain_pem()),
        (files.key, snapshot.svid.key_pem()),
        (files.authorities, bundles),
    ):
        _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    draft.replace(path)
