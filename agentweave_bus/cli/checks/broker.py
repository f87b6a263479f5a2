"""The broker: whether it is there, is who it must be, lets this identity in, and what time it has.

The clock is measured by what every identity may ask: the broker's answer about the identity's own claim
stream carries the broker's time. It was taken between question and answer, so the middle of the two is
compared with it, and half of the way is the error.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Final
from urllib.parse import urlsplit

import anyio
import nats.errors

from agentweave_bus.bus.connection import BusAddress, Keeper, Session
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.cli.checks.finding import Finding, failed, ok, warning
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.config import AgentConfig
from agentweave_bus.envelope.envelope import DEFAULT_LIMITS
from agentweave_bus.exceptions import BusError
from agentweave_bus.identity import ChainVerifier, IdentitySource, PeerRefusedError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "broker_time",
    "clock_finding",
    "connect_failure",
    "connected_session",
    "greeting",
    "server_version",
]

_UNSURE_S: Final = 1.0
_GREETING_SECONDS: Final = 0.3
_NOT_AUTHORIZED: Final = ("authorization", "authentication")


@asynccontextmanager
async def connected_session(
    config: AgentConfig, source: IdentitySource, server: str
) -> AsyncIterator[Session]:
    """Connect once to one server as the configuration says, for the length of the block.

    Raises:
        BusError: it did not work; :func:`connect_failure` says why.

    """
    known = config.bus.server_spiffe_id or SpiffeID.of(config.agent.trust_domain, "agentweave", "broker")
    address = BusAddress([server], SpiffeID(known), config.bus.connect_timeout)
    keeper = Keeper(source, ChainVerifier(source), address, name=f"{source.spiffe_id} (doctor)")
    async with keeper.open(deadline_s=0.0):
        yield await keeper.session(config.bus.connect_timeout)


async def greeting(server: str) -> bytes:
    """Return what a server says before anybody has said anything to it; a good broker is silent."""
    parts = urlsplit(server)
    with (
        anyio.move_on_after(_GREETING_SECONDS),
        suppress(OSError, anyio.EndOfStream, anyio.BrokenResourceError),
    ):
        async with await anyio.connect_tcp(parts.hostname or "", parts.port or 0) as stream:
            return await stream.receive(64)
    return b""


def connect_failure(server: str, error: BaseException, *, greeting: bytes = b"") -> Finding:
    """Say why a connection was not made, by what lies under the error and how the server greets."""
    if greeting:
        who = "a nats-server" if greeting.startswith(b"INFO ") else "something else"
        return failed(f"{server} is {who} that speaks before TLS", _HANDSHAKE_ENDED, ExitCode.UNREACHABLE)
    causes = list(_causes(error))
    for kind, found, advice, code in _FAILURES:
        cause = next((one for one in causes if isinstance(one, kind)), None)
        if cause is not None and (kind is not nats.errors.Error or _is_about_users(cause)):
            return failed(found.format(server=server, cause=cause), advice, code)
    return failed(f"{server}: {error}", _HANDSHAKE_ENDED, ExitCode.UNREACHABLE)


_HANDSHAKE_ENDED: Final = (
    "It ended the handshake: it may lack this domain's authority, or not speak TLS first (handshake_first)."
)
_OTHER_PEER: Final = (
    "bus.server_spiffe_id must name the broker's identity, and this machine must have its bundle; something"
    " else may listen there."
)
_NO_USER: Final = (
    "List the agent or client in the stack's file, or bring the broker's users in line with the grants; who"
    " is revoked has none either."
)
# The first that lies under the error decides.
_FAILURES: Final[tuple[tuple[type[BaseException], str, str, ExitCode], ...]] = (
    (
        PeerRefusedError,
        "{server}: {cause}",
        _OTHER_PEER,
        ExitCode.DENIED,
    ),
    (
        nats.errors.Error,
        "{server} has no user for this identity",
        _NO_USER,
        ExitCode.DENIED,
    ),
    (socket.gaierror, "{server}: no such host", "Correct bus.servers.", ExitCode.UNREACHABLE),
    (
        ConnectionRefusedError,
        "nothing listens at {server}",
        "Start the broker (agentweave up), or correct bus.servers.",
        ExitCode.UNREACHABLE,
    ),
    (
        ssl.SSLError,
        "{server} and this machine do not agree on TLS: {cause}",
        "The broker must speak TLS first (handshake_first), and have this domain's authority.",
        ExitCode.UNREACHABLE,
    ),
    (
        TimeoutError,
        "{server} does not answer in time",
        "Is it a broker, and not paused?",
        ExitCode.UNREACHABLE,
    ),
    (ConnectionResetError, "{server} hung up: {cause}", _HANDSHAKE_ENDED, ExitCode.UNREACHABLE),
)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_about_users(error: BaseException) -> bool:
    return any(word in str(error).lower() for word in _NOT_AUTHORIZED)


def server_version(session: Session) -> str:
    """Return the version that the broker named when it was connected to."""
    # The library's own, which a session hides; nobody else has a use for it.
    return str(session._client._server_info.get("version", ""))  # noqa: SLF001


# --- the clock -------------------------------------------------------------------------------------------


async def broker_time(
    session: Session, me: SpiffeID, *, timeout_s: float, clock: Callable[[], float] = time.time
) -> tuple[float, float]:
    """Return by how many seconds this clock is ahead of the broker's, and how far that may be off.

    Raises:
        BusError: the broker does not say its time.

    """
    asked = clock()
    answer = await session.ask(f"$JS.API.STREAM.INFO.{claim_stream_name(me)}", b"", timeout_s=timeout_s)
    came = clock()
    try:
        there = datetime.fromisoformat(json.loads(answer.data)["ts"]).timestamp()
    except (ValueError, KeyError, TypeError) as error:
        raise BusError(
            "the broker does not say its time (JetStream's answer about a stream has none)"
        ) from error
    return (asked + came) / 2 - there, (came - asked) / 2


def clock_finding(ahead_s: float, error_s: float) -> Finding:
    """Judge a difference between two clocks, in seconds."""
    slack = DEFAULT_LIMITS.clock_slack_ms / 1000
    way = "ahead of" if ahead_s >= 0 else "behind"
    said = f"this clock is {abs(ahead_s):.1f} s {way} the broker's (measured to {error_s:.1f} s)"
    if abs(ahead_s) - error_s > slack:
        return failed(
            said,
            f"Set both by NTP: what comes from more than {slack:g} s ahead is refused, and so is what is"
            f" {DEFAULT_LIMITS.max_age_ms / 1000:g} s old.",
        )
    if abs(ahead_s) > _UNSURE_S:
        return warning(said, f"Set both by NTP: beyond {slack:g} s calls are refused.")
    return ok(said)
