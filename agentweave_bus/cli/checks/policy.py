"""Policy and grants: whether they load, whether an OPA server answers, and which grants are in vain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import anyio.to_thread

from agentweave_bus.authz import DEFAULT_POLICY_PATH, Grants
from agentweave_bus.authz.grants import Grant, pattern_matches
from agentweave_bus.authz.opa import OpaServerEngine, OpaSettings
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.authz.policy_source import SHIPPED
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.cli.checks.finding import Finding, failed, ok, warning
from agentweave_bus.cli.checks.machine import open_to_others
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import counted
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.identity import IdentitySource, client_context
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "Known",
    "grants_findings",
    "has_own_rego",
    "idle_grants",
    "opa_server_findings",
    "policy_findings",
]


def has_own_rego(source: Path | None) -> bool:
    """Say whether a policy directory holds Rego that has to be compiled."""
    if source is None or not source.is_dir() or source.resolve() == SHIPPED.resolve():
        return False
    return any(source.rglob("*.rego")) and not (source / "policy.lock").exists()


async def policy_findings(source: Path | None, package: str = DEFAULT_POLICY_PATH) -> list[Finding]:
    """Load a policy as an agent would, and look for its package. PolicyLoadErrors are findings."""
    if source is None:
        return [
            warning(
                "no policy and no grants are named: nobody may ask anybody for anything",
                "Set grants: grants.yaml in the stack's file, or authorization.bundle in the agent's.",
            )
        ]
    engine = EmbeddedEngine()
    try:
        await anyio.to_thread.run_sync(engine.load, source, abandon_on_cancel=True)
        if package not in engine.packages:
            close = get_close_matches(package, list(engine.packages), n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            return [
                failed(
                    f"{source} has no package {package}, so every answer is no",
                    f"Correct authorization.policy_path.{meant}",
                )
            ]
        found = ok(f"{source}: package {package}, revision {engine.revision}")
    finally:
        await engine.aclose()
    exposed = [open_to_others(path) for path in (source, grants_file(source)) if path is not None]
    return [found, *dict.fromkeys(one for one in exposed if one is not None)]


async def opa_server_findings(config: AgentConfig, source: IdentitySource | None) -> list[Finding]:
    """Ask the OPA servers for their revision."""
    settings = config.authorization
    if settings.provider != "opa":
        return [ok("decided in process: no OPA server is asked")]
    expected = settings.opa_spiffe_id
    if expected is not None and source is None:
        return [failed("an OPA server over HTTPS can't be asked without an identity", "See workload-api.")]
    tls = None
    if expected is not None and source is not None:
        known = source
        tls = lambda: client_context(known, SpiffeID(expected))  # noqa: E731
    findings = []
    for endpoint in settings.endpoints:
        wanted = OpaSettings(
            environment=config.environment, accepted_revisions=settings.opa_revisions or None
        )
        engine = OpaServerEngine([endpoint], wanted, tls=tls)
        try:
            await engine.refresh()
            findings.append(ok(f"{endpoint} answers"))
        except AgentWeaveError as error:
            advice = "Start OPA with a bundle that has a revision, or correct authorization.opa_endpoint."
            findings.append(failed(f"{endpoint}: {error}", advice, ExitCode.UNREACHABLE))
        finally:
            await engine.aclose()
    return findings


# --- grants ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of those whom grants are about.

    Attributes:
        domain: whose identities are all known; None if it can't be said who there is.
        identities: those of that domain.
        capabilities: what callees offer, by SPIFFE ID, where it is known.
        allowed: the trust domains that an agent accepts, by its SPIFFE ID.

    """

    domain: str | None = None
    identities: frozenset[str] = frozenset()
    capabilities: Mapping[str, list[str]] = field(default_factory=dict)
    allowed: Mapping[str, frozenset[str]] = field(default_factory=dict)


def grants_findings(source: Path | None, known: Known) -> Iterator[Finding]:
    """Judge the grants of a policy. A ConfigurationError is a finding."""
    file = grants_file(source)
    if file is None:
        yield ok("there are no grants to judge")
        return
    grants = Grants.load(file)
    idle = [*grants.warnings(known.capabilities), *idle_grants(grants, known)]
    for text in idle:
        yield warning(f"{file}: {text}", "Correct or remove the entry.")
    if not idle:
        number = len(grants.grants)
        each = "which can match" if number == 1 else "each of which can match"
        yield ok(f"{file}: {counted(number, 'grant')}, {each}")


def idle_grants(grants: Grants, known: Known) -> Iterator[str]:
    """Yield a sentence for each grant that can never match, or that another one makes needless."""
    for index, grant in enumerate(grants.grants):
        place = f"grants[{index}]"
        if known.domain is not None:
            yield from (f"{place}: {text}" for text in grant.strangers(known.domain, known.identities))
        yield from (f"{place}: {text}" for text in _shut_out(grant, known))
        for other, wider in enumerate(grants.grants):
            if other != index and wider != grant and _covers(wider, grant):
                lost = "; its limits never bite" if grant.limits and not wider.limits else ""
                yield f"{place} adds nothing to grants[{other}], which allows all of it{lost}"
                break


def _shut_out(grant: Grant, known: Known) -> Iterator[str]:
    """Find who can't reach whom because one does not accept the other's trust domain."""
    for caller in grant.caller:
        for callee in grant.callee:
            for one, other in ((callee, caller), (caller, callee)):
                domain = other.removeprefix("spiffe://").partition("/")[0]
                if one in known.allowed and domain not in known.allowed[one]:
                    yield f"{other} and {one} never meet: the latter's allowed_trust_domains lack {domain}"


def _covers(wider: Grant, grant: Grant) -> bool:
    """Say whether ``wider`` allows whatever ``grant`` does."""
    return (
        all(any(_as_wide(one, pattern) for one in wider.caller) for pattern in grant.caller)
        and set(grant.callee) <= set(wider.callee)
        and set(grant.kinds) <= set(wider.kinds)
        and all(wider.covers_capability(one) for one in grant.capabilities)
        and (not wider.limits or wider.limits == grant.limits)
        and (wider.on_behalf_of is None or wider.on_behalf_of == grant.on_behalf_of)
        and _as_free(wider.principals, grant.principals)
    )


def _as_wide(one: str, pattern: str) -> bool:
    return one == pattern or pattern_matches(one, pattern.removesuffix("/*") + "/x" * pattern.endswith("/*"))


def _as_free(wider: Iterable[str] | None, principals: Iterable[str] | None) -> bool:
    allowed = set(wider or ())
    return "*" in allowed or set(principals or ()) <= allowed
