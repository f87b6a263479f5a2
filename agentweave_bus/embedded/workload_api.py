"""A real SPIFFE Workload API for one machine: gRPC over unix sockets, one socket per identity.

SPIRE's agent tells workloads apart by asking the kernel who called. Here the socket is the identity: who
can open ``agent+order.sock`` is ``agent/order``. The sockets lie in a folder of mode 0700, so that means
this user's processes only; it is made for development. Workers can't tell it from the real thing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

# The stack starts processes, and gRPC would note each fork on standard error. No child uses gRPC before
# it has become another program, so its fork handlers have no work here. Read when gRPC is loaded.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import anyio
import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
from spiffe._proto import workload_pb2, workload_pb2_grpc

from agentweave_bus.exceptions import ConfigurationError, IdentityError
from agentweave_bus.spiffe_id import SpiffeID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from agentweave_bus.identity import Authority, X509Bundle, X509Svid

__all__ = ["WorkloadApiServer"]

_MAX_SOCKET_PATH: Final = 107  # bytes that fit a unix socket address
_METADATA: Final = ("workload.spiffe.io", "true")
_STOP_GRACE_SECONDS: Final = 0.2
_STOP_SECONDS: Final = 5.0


@dataclass(slots=True)
class _Served:
    """One identity with its socket, its current SVID and the timer of its next rotation."""

    spiffe_id: SpiffeID
    path: Path
    lifetime: timedelta
    svid: X509Svid
    not_before: datetime | None = None
    server: Any = None
    timer: asyncio.TimerHandle | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def announce(self) -> None:
        """Wake every stream; those that come later wait for the next change."""
        self.changed.set()
        self.changed = asyncio.Event()


class WorkloadApiServer:
    """Serves SVIDs of ``authority`` on sockets in ``directory``; an async context manager.

    ``lifetime`` is the default lifetime of an SVID; each is renewed at half of it. ``federated`` are the
    bundles of other trust domains that workloads get beside their own.
    """

    def __init__(
        self,
        authority: Authority,
        directory: Path | str,
        *,
        lifetime: timedelta = timedelta(hours=1),
        federated: Iterable[X509Bundle] = (),
    ) -> None:
        self._authority = authority
        self._directory = Path(directory).absolute()
        self._lifetime = lifetime
        self._federated = {bundle.trust_domain: bundle for bundle in federated}
        self._served: dict[SpiffeID, _Served] = {}
        self._issued: dict[bytes, tuple[SpiffeID, datetime]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        with anyio.CancelScope(shield=True):  # bounded by the time that stopping may take
            await self.aclose()

    @property
    def authority(self) -> Authority:
        """The authority that signs. After changing its roots call :meth:`announce` or :meth:`rotate`."""
        return self._authority

    @property
    def directory(self) -> Path:
        """Where the sockets are."""
        return self._directory

    @property
    def identities(self) -> tuple[SpiffeID, ...]:
        """The identities that are served."""
        return tuple(self._served)

    def endpoint(self, spiffe_id: SpiffeID) -> str:
        """Return the endpoint of an identity, ``unix:///…``, whether or not it is served yet."""
        return f"unix://{self._socket_path(spiffe_id)}"

    def current_svid(self, spiffe_id: SpiffeID) -> X509Svid:
        """Return the SVID that an identity is given now. Raises IdentityError when it is not served."""
        return self._find(spiffe_id).svid

    async def serve(self, spiffe_id: SpiffeID, *, lifetime: timedelta | None = None) -> str:
        """Open the socket of an identity and return its endpoint. Serving it twice changes nothing.

        Raises:
            IdentityError: the ID is of another trust domain.
            ConfigurationError: the folder is too deep for a socket's address, or can't be used.

        """
        if spiffe_id in self._served:
            return self.endpoint(spiffe_id)
        lasting = lifetime if lifetime is not None else self._lifetime
        path = self._socket_path(spiffe_id)
        svid = self._issue(spiffe_id, lasting)
        self._prepare(path)
        served = _Served(spiffe_id, path, lasting, svid)
        self._served[spiffe_id] = served
        try:
            await self._listen(served)
        except BaseException:
            await self.withdraw(spiffe_id)
            raise
        self._schedule(served)
        return self.endpoint(spiffe_id)

    async def withdraw(self, spiffe_id: SpiffeID) -> None:
        """Close the socket of an identity and remove it. SVIDs already given live until they expire."""
        served = self._served.pop(spiffe_id, None)
        if served is None:
            return
        if served.timer is not None:
            served.timer.cancel()
        if served.server is not None:
            async with asyncio.timeout(_STOP_SECONDS):
                await served.server.stop(_STOP_GRACE_SECONDS)
        served.path.unlink(missing_ok=True)

    def rotate(self, spiffe_id: SpiffeID | None = None, *, not_before: datetime | None = None) -> None:
        """Issue a new SVID now, for one identity or for all, and send it to every stream.

        Validity begins a little in the past, but from now on never before ``not_before``, where that is
        given: what was issued earlier may be revoked.

        Raises:
            IdentityError: ``spiffe_id`` is not served.

        """
        for served in [self._find(spiffe_id)] if spiffe_id is not None else list(self._served.values()):
            served.not_before = not_before or served.not_before
            self._renew(served)

    def owner_of(self, x5t: bytes) -> SpiffeID | None:
        """Return to whom a certificate was issued here that may still be valid; None if it was to nobody."""
        issued = self._issued.get(x5t)
        return None if issued is None else issued[0]

    def announce(self) -> None:
        """Send every stream what is current: the authority's bundle has changed."""
        for served in self._served.values():
            served.announce()

    def federate(self, bundles: Iterable[X509Bundle]) -> None:
        """Replace the bundles of other trust domains and send them to every stream."""
        self._federated = {bundle.trust_domain: bundle for bundle in bundles}
        self.announce()

    async def aclose(self) -> None:
        """Close and remove every socket."""
        async with anyio.create_task_group() as group:  # each waits a moment for its open streams
            for spiffe_id in list(self._served):
                group.start_soon(self.withdraw, spiffe_id)

    def _find(self, spiffe_id: SpiffeID) -> _Served:
        try:
            return self._served[spiffe_id]
        except KeyError:
            raise IdentityError(f"{spiffe_id} is not served by this Workload API") from None

    def _socket_path(self, spiffe_id: SpiffeID) -> Path:
        # '+' can't occur in a SPIFFE ID, so two identities never share a name.
        name = spiffe_id.path.lstrip("/").replace("/", "+")
        path = self._directory / f"{name}.sock"
        if len(bytes(path)) > _MAX_SOCKET_PATH:
            short = hashlib.sha256(spiffe_id.encode()).hexdigest()[:16]
            path = self._directory / f"{short}.sock"
        if len(bytes(path)) > _MAX_SOCKET_PATH:
            raise ConfigurationError(
                f"the folder {self._directory} is too deep for a unix socket",
                hint=f"(at most {_MAX_SOCKET_PATH} bytes). Use a shorter one.",
            )
        return path

    def _prepare(self, path: Path) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_own_folder(self._directory)
            path.unlink(missing_ok=True)  # left behind by a process that was killed
        except OSError as error:
            raise ConfigurationError(
                f"the folder {self._directory} can't hold the Workload API's sockets: {error.strerror}"
            ) from error

    async def _listen(self, served: _Served) -> None:
        server = grpc.aio.server()
        workload_pb2_grpc.add_SpiffeWorkloadAPIServicer_to_server(_Servicer(self, served), server)
        try:
            server.add_insecure_port(f"unix:{served.path}")
        except RuntimeError as error:
            raise ConfigurationError(f"can't listen on {served.path}: {error}") from error
        served.server = server
        await server.start()
        served.path.chmod(0o600)

    def _schedule(self, served: _Served) -> None:
        # Certificates count whole seconds, so half of what is left, not of the lifetime asked for.
        left = served.svid.expiry.timestamp() - time.time()
        served.timer = asyncio.get_running_loop().call_later(max(left / 2, 0.1), self._renew, served)

    def _renew(self, served: _Served) -> None:
        if served.timer is not None:
            served.timer.cancel()
        served.svid = self._issue(served.spiffe_id, served.lifetime, served.not_before)
        served.announce()
        self._schedule(served)

    def _issue(
        self, spiffe_id: SpiffeID, lifetime: timedelta, not_before: datetime | None = None
    ) -> X509Svid:
        """Issue an SVID that lives for ``lifetime`` from now; remember whose it is until it has expired."""
        now = datetime.now(UTC)
        svid = self._authority.issue(spiffe_id, lifetime=lifetime)
        if not_before is not None and svid.not_before < not_before <= now:
            svid = self._authority.issue(
                spiffe_id, not_before=not_before, lifetime=now - not_before + lifetime
            )
        self._issued = {x5t: one for x5t, one in self._issued.items() if one[1] > now}
        self._issued[svid.x5t] = (spiffe_id, svid.expiry)
        return svid

    def svid_response(self, served: _Served) -> Any:
        """Build the message that a stream of SVIDs gets (Workload API section 5.2.1)."""
        svid = served.svid
        one = workload_pb2.X509SVID(
            spiffe_id=svid.spiffe_id,
            x509_svid=b"".join(svid.cert_chain),
            x509_svid_key=svid.key_der(),
            bundle=b"".join(self._authority.bundle.to_der()),
        )
        return workload_pb2.X509SVIDResponse(svids=[one], federated_bundles=self._foreign_bundles())

    def bundles_response(self) -> Any:
        """Build the message that a stream of bundles gets (Workload API section 5.2.2)."""
        own = {SpiffeID.of(self._authority.trust_domain): b"".join(self._authority.bundle.to_der())}
        return workload_pb2.X509BundlesResponse(bundles=own | self._foreign_bundles())

    def _foreign_bundles(self) -> dict[str, bytes]:
        return {
            SpiffeID.of(domain): b"".join(bundle.to_der())
            for domain, bundle in self._federated.items()
            if domain != self._authority.trust_domain
        }


class _Servicer(workload_pb2_grpc.SpiffeWorkloadAPIServicer):  # type: ignore[misc]
    """The API on one socket. JWT-SVIDs are not offered: the base class answers UNIMPLEMENTED."""

    def __init__(self, api: WorkloadApiServer, served: _Served) -> None:
        self._api = api
        self._served = served

    async def FetchX509SVID(self, _request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream the SVID with its bundles, now and after each change."""
        await _require_metadata(context)
        while True:
            changed = self._served.changed  # taken first: a change during the write is not missed
            yield self._api.svid_response(self._served)
            await changed.wait()

    async def FetchX509Bundles(self, _request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream the bundles, now and after each change."""
        await _require_metadata(context)
        while True:
            changed = self._served.changed
            yield self._api.bundles_response()
            await changed.wait()


def _require_own_folder(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        # Not repaired: a folder that others use, such as /tmp, must not be closed to them.
        raise ConfigurationError(
            f"the folder {folder} is open to other users, who could take identities from it.",
            hint=f"Name one of your own, or run: chmod 700 {folder}",
        )


async def _require_metadata(context: Any) -> None:
    """Refuse a call without the header that keeps browsers and proxies out (Workload API section 3)."""
    if _METADATA not in tuple(context.invocation_metadata() or ()):
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"the metadata {_METADATA[0]}: {_METADATA[1]} is required"
        )
