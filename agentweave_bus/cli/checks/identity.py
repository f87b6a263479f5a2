"""The identity: whether one is to be had, until when it lasts, and whether it is revoked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from agentweave_bus.cli.checks.finding import Finding, failed, ok, warning
from agentweave_bus.cli.checks.machine import open_to_others
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.identity import (
    IdentityProvider,
    RevocationWatch,
    SPIFFEIdentityProvider,
    StaticMTLSProvider,
    X509Svid,
)
from agentweave_bus.identity.workload_api import socket_path_of

__all__ = [
    "get_svid",
    "identity_files",
    "identity_findings",
    "provider_of",
    "revocation_findings",
    "svid_finding",
]

_USED_UP: Final = 2 / 3
_CLOCK: Final = "Set the clock of this machine (NTP), or that of the issuer."


def provider_of(config: AgentConfig, *, seconds: float) -> IdentityProvider:
    """Return the provider that a configuration names; it is asked for ``seconds`` at most."""
    identity = config.identity
    if identity.static is not None:
        files = identity.static
        return StaticMTLSProvider(files.cert_file, files.key_file, files.bundles)
    return SPIFFEIdentityProvider(identity.spiffe_endpoint, config.agent.spiffe_id, fetch_timeout=seconds)


async def get_svid(provider: IdentityProvider) -> X509Svid:
    """Ask for an SVID once. Raises IdentityError, whose message says what is wrong and the way out."""
    await provider.start()
    return await provider.get_svid()


def identity_findings(config: AgentConfig, svid: X509Svid) -> Iterator[Finding]:
    """Judge whose SVID it is."""
    wanted = config.agent.spiffe_id
    if svid.spiffe_id != wanted:
        yield failed(
            f"the SVID is of {svid.spiffe_id}, and this configuration is of {wanted}",
            "Register the workload under that ID, or correct agent.name, agent.path and agent.trust_domain.",
            ExitCode.DENIED,
        )
    else:
        yield ok(
            f"{config.identity.spiffe_endpoint if config.identity.static is None else 'files'}: {wanted}"
        )


def svid_finding(not_before: datetime, expiry: datetime, *, now_s: float | None = None) -> Finding:
    """Judge how long an SVID lasts still; ``now_s`` is in seconds since the epoch."""
    now = time.time() if now_s is None else now_s
    begins, ends = not_before.timestamp(), expiry.timestamp()
    left = _span(ends - now)
    if now > ends:
        return failed(
            f"the SVID expired at {expiry.isoformat()}, {_span(now - ends)} ago",
            "Is the issuer running, and may it renew this workload? A restart of the agent does not help.",
            ExitCode.UNREACHABLE,
        )
    if now < begins:
        return failed(
            f"the SVID is valid only from {not_before.isoformat()}, in {_span(begins - now)}", _CLOCK
        )
    if now - begins > (ends - begins) * _USED_UP:
        return warning(
            f"the SVID expires in {left}, and issuers renew at half of its life",
            "Look whether the issuer works: nothing is done without an SVID.",
        )
    return ok(f"the SVID is valid for {left}, until {expiry.astimezone(UTC).isoformat()}")


def identity_files(config: AgentConfig) -> Iterable[Finding]:
    """Judge who may take this identity from the disk, or put another in its place."""
    files = config.identity.static
    if files is not None:
        paths = [
            (files.key_file, True),
            (files.cert_file, False),
            *((one, False) for one in files.bundles.values()),
        ]
    else:
        paths = [(Path(socket_path_of(config.identity.spiffe_endpoint)).parent, False)]
    return [found for path, secret in paths if (found := open_to_others(path, secret=secret)) is not None]


def revocation_findings(file: Path | None, svid: X509Svid | None) -> Iterator[Finding]:
    """Read the file of revocations, and look whether this identity itself stands in it.

    A file that is missing or wrong is a finding: who follows it does not start.
    """
    if file is None:
        yield ok("no file of revocations is followed (identity.revocations)")
        return
    try:
        revocations = RevocationWatch(file).list
    except ConfigurationError as error:
        yield failed(str(error), _revocations_advice(file))
        return
    if (exposed := open_to_others(file)) is not None:
        yield exposed
    if svid is not None:
        issued_ms = int(svid.not_before.timestamp() * 1000)
        reason = revocations.reason_against(svid.spiffe_id, svid.x5t, (), issued_ms=issued_ms)
        if reason is not None:
            yield failed(
                f"{svid.spiffe_id} is refused by everybody who follows {file}: {reason}",
                "Take the entry out (agentweave authz revoke --undo), or renew the SVID if it is too old.",
                ExitCode.DENIED,
            )
            return
    yield ok(f"{file} is read, and this identity does not stand in it" if svid else f"{file} is read")


def _revocations_advice(file: Path) -> str:
    if not file.exists():
        return f"Where nobody is revoked, write the line `revoked: []` into {file}; or name another file."
    return "Correct the file; where nobody is revoked, it holds the line `revoked: []`."


def _span(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
