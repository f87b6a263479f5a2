"""The SPIFFE Workload API as an identity provider (SPIRE's agent, or ``agentweave up``).

The ``spiffe`` package does the gRPC: one fetch, whose error says why there is no identity, and then a
stream of updates, read in a thread of its own. Everything it hands over is parsed again by this
package's strict rules. The package is imported on first use, because gRPC is heavy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread
from cryptography.hazmat.primitives.serialization import Encoding

from agentweave_bus.exceptions import (
    BundleUnavailableError,
    ConfigurationError,
    IdentityError,
    SvidUnavailableError,
    WorkloadApiUnavailableError,
)
from agentweave_bus.identity.bundle import X509Bundle
from agentweave_bus.identity.provider import IdentityProvider
from agentweave_bus.identity.svid import X509Svid

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["DEFAULT_ENDPOINT", "SPIFFEIdentityProvider", "socket_path_of"]

_logger = logging.getLogger(__name__)

DEFAULT_ENDPOINT: Final = "unix:///tmp/spire-agent/public/api.sock"
_CLOSE_SECONDS: Final = 2.0
_WAYS_OUT: Final = (
    "start SPIRE's agent, name its socket in identity.spiffe_endpoint, or list the agent in the file of"
    " `agentweave up`"
)


class SPIFFEIdentityProvider(IdentityProvider):
    """The identity that the Workload API at ``endpoint`` gives this process.

    ``endpoint`` is ``unix:///path`` or an absolute path. Where the API gives several SVIDs,
    ``expected_id`` chooses; without it the first one, the API's default, is taken.
    ``fetch_timeout`` (seconds) bounds each question to the API.

    Raises:
        ConfigurationError: ``endpoint`` is no unix socket address.

    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        expected_id: SpiffeID | None = None,
        *,
        fetch_timeout: float = 5.0,
    ) -> None:
        self._socket = socket_path_of(endpoint)
        self._endpoint = f"unix://{self._socket}"
        self._expected_id = expected_id
        self._fetch_timeout = fetch_timeout
        self._stream: _Stream | None = None
        self._svid: X509Svid | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Check that there is a Workload API.

        Raises:
            IdentityError: there is no socket at the endpoint; the message says what to start.

        """
        _require_socket(self._socket, self._endpoint)

    async def get_svid(self) -> X509Svid:
        """Return the SVID last received, asking the API when there is no live stream.

        Raises:
            SvidUnavailableError: the API gives none now, or can't be reached.
            IdentityError: none of the SVIDs is the expected one, or a rule of SVIDs is broken.

        """
        context = await self._current_context()
        self._svid = self._choose(context)
        return self._svid

    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        """Return the bundle of ``trust_domain`` as last received (see ``IdentityProvider``)."""
        context = await self._current_context()
        for bundle in context.x509_bundle_set.bundles:
            if bundle.trust_domain.name == trust_domain:
                der = sorted(one.public_bytes(Encoding.DER) for one in bundle.x509_authorities)
                return X509Bundle.from_der(trust_domain, der)
        raise BundleUnavailableError(
            f"the Workload API at {self._endpoint} gives no bundle for {trust_domain}",
            trust_domain=trust_domain,
        )

    def get_spiffe_id(self) -> str:
        """Return the ID last received, else the expected one (see ``IdentityProvider``)."""
        if self._svid is not None:
            return self._svid.spiffe_id
        if self._expected_id is not None:
            return self._expected_id
        raise SvidUnavailableError(f"nothing was received from the Workload API at {self._endpoint} yet")

    async def wait_for_update(self) -> None:
        """Return when the stream brought something, ended, or is not there."""
        if self._stream is not None:
            await self._changed.wait()
        self._changed.clear()

    async def restart(self) -> None:
        """Drop the stream and open a new one.

        Raises:
            IdentityError: the API is gone or gives nothing.

        """
        await self.aclose()
        await self.start()
        await self._open()

    async def aclose(self) -> None:
        """Close the stream. The last identity is forgotten; the next question opens a new stream."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await anyio.to_thread.run_sync(stream.close, abandon_on_cancel=True)

    async def _current_context(self) -> Any:
        stream = self._stream
        if stream is not None and stream.error is not None:
            _logger.warning("the stream of the Workload API at %s ended: %s", self._endpoint, stream.error)
            await self.aclose()
        if self._stream is None:
            await self._open()
        if self._stream is None:  # closed by another task meanwhile
            raise SvidUnavailableError("the identity provider was closed")
        return self._stream.context

    async def _open(self) -> None:
        _require_socket(self._socket, self._endpoint)
        loop = asyncio.get_running_loop()
        stream = _Stream(self._endpoint, partial(_wake, loop, self._changed))
        try:
            with anyio.fail_after(self._fetch_timeout + 1):
                fetch = partial(stream.fetch_and_follow, self._fetch_timeout)
                await anyio.to_thread.run_sync(fetch, abandon_on_cancel=True)
        except BaseException as error:
            stream.close()
            if isinstance(error, Exception):
                raise _no_svid(self._endpoint, error) from error
            raise
        self._stream = stream

    def _choose(self, context: Any) -> X509Svid:
        offered = context.x509_svids
        wanted = self._expected_id
        for svid in offered:
            if wanted is None or str(svid.spiffe_id) == wanted:
                chain = [one.public_bytes(Encoding.DER) for one in svid.cert_chain]
                return X509Svid.from_der(chain, svid.private_key)
        names = ", ".join(str(svid.spiffe_id) for svid in offered)
        raise IdentityError(
            f"the Workload API at {self._endpoint} gives {names}, but this process must be {wanted}; "
            "register the workload under that ID, or correct agent.name and agent.trust_domain"
        )


class _Stream:
    """One client of the Workload API with its stream. Its callbacks run in the package's thread."""

    def __init__(self, endpoint: str, changed: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._changed = changed
        self._client: Any = None
        self._cancel: Callable[[], None] = lambda: None
        self._closed = False
        self.context: Any = None
        self.error: Exception | None = None

    def fetch_and_follow(self, timeout: float) -> None:
        """Ask once, so that an error is seen, then follow updates. Blocks; for a worker thread."""
        from spiffe import WorkloadApiClient  # noqa: PLC0415 - gRPC is loaded only where it is used

        self._client = WorkloadApiClient(self._endpoint)
        try:
            self.context = self._client.fetch_x509_context(timeout=timeout)
            self._cancel = self._client.stream_x509_contexts(self._received, self._failed).cancel
        finally:
            if self._closed:  # given up meanwhile by who waited; nobody else would close it
                self.close()

    def close(self) -> None:
        """End the stream and the connection. Closing twice does no harm."""
        self._closed = True
        self._cancel()
        if self._client is not None:
            self._client.close()

    def _received(self, context: Any) -> None:
        self.context = context
        self._changed()

    def _failed(self, error: Exception) -> None:
        self.error = error
        self._changed()


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:
        # The loop has been closed, so nobody is left to be told.
        _logger.debug("an update of the Workload API came after the event loop had ended")


def socket_path_of(endpoint: str) -> str:
    """Return the path of a Workload API endpoint: ``unix:///run/x.sock`` or ``/run/x.sock``.

    Raises:
        ConfigurationError: it is neither.

    """
    path = endpoint.removeprefix("unix:")
    if not path.startswith("/"):
        raise ConfigurationError(
            f"{endpoint!r} is no Workload API endpoint:",
            key="identity.spiffe_endpoint",
            hint="write unix:///absolute/path/to/the.sock",
        )
    return "/" + path.lstrip("/")


def _require_socket(path: str, endpoint: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(Path(path).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise WorkloadApiUnavailableError(f"no Workload API at {endpoint}: {_WAYS_OUT}") from None
    except OSError as error:
        raise WorkloadApiUnavailableError(
            f"the Workload API at {endpoint} can't be reached: {error.strerror}"
        ) from error
    if not is_socket:
        raise WorkloadApiUnavailableError(f"{endpoint} is no socket: {_WAYS_OUT}")


def _no_svid(endpoint: str, error: Exception) -> SvidUnavailableError:
    if isinstance(error, TimeoutError):
        return SvidUnavailableError(f"the Workload API at {endpoint} did not answer in time")
    cause = error.__cause__
    code = getattr(getattr(cause, "code", lambda: None)(), "name", "")
    if code == "PERMISSION_DENIED":
        return SvidUnavailableError(
            f"the Workload API at {endpoint} has no identity for this process (uid {os.getuid()}): "
            "register the workload, or run it as the user that is registered"
        )
    if code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}:
        return SvidUnavailableError(f"the Workload API at {endpoint} does not answer ({code})")
    return SvidUnavailableError(f"the Workload API at {endpoint} gave no usable SVID: {error}")
