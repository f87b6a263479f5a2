"""``agentweave doctor``: what keeps this configuration or stack from working, and what to do about it."""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio.to_thread

from agentweave_bus.authz import DEFAULT_POLICY_PATH
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.bus.connection import Session
from agentweave_bus.cli.checks import broker, identity, machine, policy, workers
from agentweave_bus.cli.checks.finding import (
    Check,
    Finding,
    Status,
    exit_code,
    failed,
    ok,
    run_checks,
    skipped,
    warning,
)
from agentweave_bus.cli.checks.patient import Patient, examine
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import counted, print_result, table
from agentweave_bus.cli.stack_check import capabilities_of
from agentweave_bus.config import AgentConfig
from agentweave_bus.embedded.assembly import noted_workers
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError
from agentweave_bus.identity import IdentitySource, X509Svid
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["CHECKS", "Doctor", "add_arguments", "run"]

CHECKS: Final = {
    "configuration": "the file, and what it allows that should be known",
    "versions": "Python, nats-py, nats-server, opa",
    "files": "files and folders that other users could read or change",
    "audit": "whether the audit log can be written, and how full the disk is",
    "ports": "whether the ports are free",
    "policy": "whether the policy is there, compiles, and has the package",
    "agents": "whether the classes of a stack's agents can be made",
    "grants": "grants that can never match, or add nothing",
    "stack": "whether the stack of this file is running, and each of its workers lives",
    "workload-api": "whether there is a Workload API, and an identity for this process",
    "svid": "whether the SVID is valid, and for how long",
    "broker": "whether the broker is there, is the right one, is recent enough, and lets this identity in",
    "clock": "how far this clock is from the broker's",
    "opa-server": "whether OPA servers answer, where they are asked",
    "revocations": "whether the file of revocations is right, and whether this identity stands in it",
}
"""Name of a check, in the order in which they run, and what it looks at."""

_CLOCK_SECONDS: Final = 2.0
_EPILOG: Final = """\
Example:
  agentweave doctor
  agentweave doctor order.yaml
  agentweave doctor shop/agentweave.yaml --json

FILE is an agent's, a client's or a stack's; by default agentweave.yaml of this directory, else what
AGENTWEAVE_CONFIG names, else what a running stack wrote here.
Exit codes: 0 nothing failed (warnings may be there), 2 something to correct here, 3 refused, 4 unreachable;
of several the smallest.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("file", nargs="?", metavar="FILE", help="the YAML of an agent, client or stack")
    parser.add_argument(
        "--env", choices=("production", "development"), help="instead of AGENTWEAVE_ENV; else production"
    )
    parser.add_argument(
        "--as", dest="client", metavar="NAME", default=None, help="as which client of a stack to connect"
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="for each check (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run every check and print what they find."""
    findings = asyncio.run(_diagnose(options))
    code = exit_code(finding for _, finding in findings)
    facts = {
        "ok": code is ExitCode.DONE,
        "checks": [_fact(name, finding) for name, finding in findings],
    }
    print_result(facts, _text(findings), json_wanted=options.json)
    return code


async def _diagnose(options: argparse.Namespace) -> list[tuple[str, Finding]]:
    try:
        patient = examine(options.file, options.env, options.client)
    except ConfigurationError as error:
        return [("configuration", failed(str(error), _way_out(error)))]
    async with Doctor.of(patient, seconds=options.timeout) as doctor:
        return [found async for found in run_checks(doctor.checks(), deadline_s=options.timeout)]


def _way_out(error: ConfigurationError) -> str:
    """Say what to correct: variables, a name on the command line (its own message says it), or a file."""
    said = str(error)
    if variables := dict.fromkeys(re.findall(r"^ *(AGENTWEAVE_\w+)", said, re.MULTILINE)):
        return f"Correct or unset {', '.join(variables)}."
    if error.key in {"FILE", "--as"}:
        return ""
    if "can't be read" in said:
        return "Name a file that is there and may be read, or begin with agentweave new hello."
    return "Correct the file; agentweave config check says more."


def _fact(name: str, finding: Finding) -> dict[str, Any]:
    return {
        "check": name,
        "status": finding.status.value,
        "found": finding.found,
        **({"advice": finding.advice} if finding.advice else {}),
    }


def _text(findings: list[tuple[str, Finding]]) -> str:
    marks = {Status.OK: "ok", Status.WARNING: "WARNING", Status.FAILED: "FAILED", Status.SKIPPED: "skipped"}
    rows: list[tuple[str, str, str]] = []
    for name, finding in findings:
        first, *more = finding.found.splitlines() or [""]
        rows.append((marks[finding.status], name, first))
        rows += [("", "", line) for line in more]
        rows += [("", "", f"-> {finding.advice}")] if finding.advice else []
    count = sum(finding.status is Status.FAILED for _, finding in findings)
    said = "Nothing failed." if count == 0 else f"{count} failed."
    return f"{table(rows, indent='')}\n{said}"


class Doctor:
    """Looks at one patient. What one check learns (identity, connection) the later ones use."""

    def __init__(self, patient: Patient, *, seconds: float) -> None:
        self._patient = patient
        self._seconds = seconds
        self._svid: X509Svid | None = None
        self._source: IdentitySource | None = None
        self._capabilities: dict[str, list[str]] = {}
        self._policy_loads = True
        self._clock_found = skipped("there is no connection to measure by")

    @classmethod
    @asynccontextmanager
    async def of(cls, patient: Patient, *, seconds: float) -> AsyncIterator[Doctor]:
        """Return a doctor for the block; ``seconds`` bounds what it waits for from others."""
        doctor = cls(patient, seconds=seconds)
        try:
            yield doctor
        finally:
            if doctor._source is not None:
                await doctor._source.aclose()

    def checks(self) -> list[Check]:
        """Return the checks in order."""
        looks = (
            self._configuration,
            self._versions,
            self._files,
            self._audit,
            self._ports,
            self._policy,
            self._agents,
            self._grants,
            self._stack,
            self._workload_api,
            self._svid_life,
            self._broker,
            self._clock,
            self._opa_server,
            self._revocations,
        )
        return [Check(name, look) for name, look in zip(CHECKS, looks, strict=True)]

    # --- what lies here ----------------------------------------------------------------------------------

    async def _configuration(self) -> Iterable[Finding]:
        found = [ok(f"{self._patient.name} is right")]
        for config in self._patient.configs:
            found += [warning(f"{config.agent.name}: {text}", "") for text in config.warnings]
        return found

    async def _versions(self) -> Iterable[Finding]:
        found = list(machine.version_findings())
        if self._patient.stack is not None:
            found += await anyio.to_thread.run_sync(lambda: list(machine.tool_findings()))
        needed = any(policy.has_own_rego(source) for source, _ in self._policies())
        return [*found, await anyio.to_thread.run_sync(lambda: machine.opa_finding(needed=needed))]

    async def _files(self) -> Iterable[Finding]:
        found: list[Finding] = []
        for config in self._patient.live:
            found += identity.identity_files(config)
        stack = self._patient.stack
        if stack is not None:
            state = stack.state_dir.absolute()
            keys = [state / "authority", state / "broker" / "key.pem"]
            found += [one for path in keys if (one := machine.open_to_others(path, secret=True)) is not None]
        return list(dict.fromkeys(found)) or [ok("keys, sockets and policies are closed to other users")]

    async def _audit(self) -> Iterable[Finding]:
        logs = [c.authorization.audit.path for c in self._patient.configs if c.authorization.audit.enabled]
        if self._patient.stack is not None:
            logs = [self._patient.stack.state_dir.absolute() / "audit" / log.name for log in logs]
            logs = logs or [self._patient.stack.state_dir.absolute() / "audit" / "any.jsonl"]
        return [finding for log in logs for finding in machine.audit_findings(log)]

    async def _ports(self) -> Iterable[Finding]:
        found = await anyio.to_thread.run_sync(lambda: list(self._port_findings()), abandon_on_cancel=True)
        return found or [ok("no fixed port is wanted")]

    def _port_findings(self) -> Iterable[Finding]:
        stack, running = self._patient.stack, self._patient.running
        if stack is not None and not running:
            yield machine.port_finding("bus.port", "127.0.0.1", stack.bus.port)
        if stack is not None and running:
            yield ok("the stack is running and has its ports")
            return
        for config in self._patient.configs:
            metrics = config.observability.metrics
            explicit = stack is None or "port" in metrics.model_fields_set
            if metrics.enabled and explicit:
                key = "observability.metrics.port"
                yield machine.port_finding(key, metrics.host, metrics.port, mine=str(config.agent.spiffe_id))

    # --- policy ------------------------------------------------------------------------------------------

    def _policies(self) -> list[tuple[Path | None, str]]:
        """Return each policy source and package that somebody here uses, once."""
        stack = self._patient.stack
        default = None if stack is None else stack.policy_source
        pairs = [
            (config.authorization.bundle or default, config.authorization.policy_package)
            for config in self._patient.configs
        ]
        return list(dict.fromkeys(pairs or [(default, DEFAULT_POLICY_PATH)]))

    async def _policy(self) -> Iterable[Finding]:
        found: list[Finding] = []
        for source, package in self._policies():
            try:
                found += await policy.policy_findings(source, package)
            except AgentWeaveError as error:
                found.append(failed(str(error), "", ExitCode.USAGE))
        found = list(dict.fromkeys(found))  # what is wrong with a source is so for each of its packages
        self._policy_loads = all(one.status is not Status.FAILED for one in found)
        return found

    async def _opa_server(self) -> Iterable[Finding]:
        if self._patient.stack is not None:
            return [ok("a stack decides in process: no OPA server is asked")]
        return await policy.opa_server_findings(self._patient.configs[0], self._source)

    async def _agents(self) -> Iterable[Finding]:
        if self._patient.stack is None:
            return [skipped("only the agents of a stack are tried")]
        faults: dict[str, list[str]] = {}
        for agent in self._patient.agents:
            who = str(agent.spiffe_id)
            try:
                self._capabilities[who] = await anyio.to_thread.run_sync(
                    capabilities_of, agent, self._patient.environment, abandon_on_cancel=True
                )
            except ConfigurationError as error:
                faults.setdefault(str(error), []).append(agent.config.agent.name)
        return [
            failed(f"{', '.join(names)}: {fault}", "Such a worker would not start.")
            for fault, names in faults.items()
        ] or [ok(f"{counted(len(self._capabilities), 'agent')} can be made")]

    async def _grants(self) -> Iterable[Finding]:
        files = {grants_file(source): source for source, _ in self._policies()}
        known = self._known()
        try:
            return [finding for source in files.values() for finding in policy.grants_findings(source, known)]
        except ConfigurationError:
            if self._policy_loads:
                raise
            return [skipped("the grants can't be judged: see policy")]

    def _known(self) -> policy.Known:
        stack = self._patient.stack
        allowed = {
            str(config.agent.spiffe_id): frozenset(config.identity.allowed_trust_domains)
            for config in self._patient.configs
        }
        if stack is None:
            return policy.Known(allowed=allowed)
        clients = [SpiffeID.of(stack.trust_domain, "client", name) for name in stack.clients]
        everyone = frozenset(str(one) for one in (*(a.spiffe_id for a in self._patient.agents), *clients))
        return policy.Known(stack.trust_domain, everyone, self._capabilities, allowed)

    async def _revocations(self) -> Iterable[Finding]:
        stack = self._patient.stack
        default = None if stack is None else stack.revocations_file
        files = {config.identity.revocations or default for config in self._patient.configs} or {default}
        return [
            finding
            for file in sorted(files, key=str)
            for finding in identity.revocation_findings(file, self._svid)
        ]

    # --- what others give --------------------------------------------------------------------------------

    async def _stack(self) -> Iterable[Finding]:
        stack = self._patient.stack
        if stack is None:
            return [skipped("this is no stack's file")]
        if self._patient.left_behind:
            text = "the stack ended without stopping, and left its clients' files behind"
            return [warning(text, "Start agentweave up again.")]
        if not self._patient.running:
            return [warning("the stack is not running, so nobody can be reached", "Start agentweave up.")]
        state = stack.state_dir.absolute()
        return workers.worker_findings(self._patient.agents, noted_workers(state), workers.holder_of(state))

    async def _workload_api(self) -> Iterable[Finding]:
        config = self._patient.caller
        if config is None:
            return [skipped("the stack is not running")]
        provider = identity.provider_of(config, seconds=self._seconds / 2)
        try:
            self._svid = await identity.get_svid(provider)
        finally:
            await provider.aclose()
        return identity.identity_findings(config, self._svid)

    async def _svid_life(self) -> Iterable[Finding]:
        if self._svid is None:
            return [skipped("there is no SVID")]
        finding = identity.svid_finding(self._svid.not_before, self._svid.expiry)
        if finding.status is not Status.FAILED:
            self._source = await self._followed()
        return [finding]

    async def _followed(self) -> IdentitySource:
        config = self._patient.caller
        assert config is not None  # there is an SVID
        source = IdentitySource(
            identity.provider_of(config, seconds=self._seconds / 2),
            allowed_trust_domains=config.identity.allowed_trust_domains,
        )
        await source.start(self._seconds)
        return source

    async def _broker(self) -> Iterable[Finding]:
        if self._source is None or self._patient.caller is None:
            return [skipped("the broker lets nobody in without an SVID")]
        return [await self._one_broker(self._patient.caller, one) for one in self._patient.caller.bus.servers]

    async def _one_broker(self, config: AgentConfig, server: str) -> Finding:
        assert self._source is not None
        try:
            async with broker.connected_session(config, self._source, server) as session:
                finding = machine.broker_version_finding(broker.server_version(session))
                await self._measure_clock(session)
        except AgentWeaveError as error:
            return broker.connect_failure(server, error, greeting=await broker.greeting(server))
        return ok(f"{server}: {finding.found}") if finding.status is Status.OK else finding

    async def _measure_clock(self, session: Session) -> None:
        """Compare the clocks while there is a connection; the check of the clock judges the result."""
        assert self._source is not None
        try:
            ahead, off = await broker.broker_time(
                session, self._source.spiffe_id, timeout_s=min(_CLOCK_SECONDS, self._seconds / 2)
            )
        except (AgentWeaveError, TimeoutError) as error:
            reason = (
                str(error) or "no answer; is JetStream on, and is there a claim stream for this identity?"
            )
            self._clock_found = skipped(f"the broker's time is not to be had: {reason}")
        else:
            self._clock_found = broker.clock_finding(ahead, off)

    async def _clock(self) -> Iterable[Finding]:
        return [self._clock_found]
