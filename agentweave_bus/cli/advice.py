"""What to do about a denial: the grant that is missing or falls short, and commands that try again.

A command is printed only if it asks what was asked: with the same principal, delegation, package. What it
can't carry is named.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agentweave_bus.authz import DEFAULT_POLICY_PATH, AuthzContext, AuthzDecision, Grants
from agentweave_bus.authz.audit_reading import Record
from agentweave_bus.authz.grants import Grant
from agentweave_bus.cli.authz import decide_by
from agentweave_bus.cli.client_config import STATE_DIR
from agentweave_bus.cli.policy_choice import PolicyChoice, choose_policy
from agentweave_bus.cli.stack_agents import unknown_agent, unknown_capability
from agentweave_bus.config import StackConfig, load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.operator_acts import OBSERVE_ACT, REDRIVE_ACT

__all__ = ["Denial", "advice_about", "advice_lines"]

_CARRIED: Final = frozenset({"kind", "payload", "principal", "via"})
_OF_EVERY_REQUEST: Final = frozenset({"task_id", "transport", "caller_trust_domain", "evidence"})
_OPERATORS_COMMANDS: Final = {
    REDRIVE_ACT: ("agentweave dlq list", "dlq show", "dlq redrive", "dlq drop"),
    OBSERVE_ACT: ("agentweave console",),
    "control:cancel": ("agentweave task cancel",),
    "control:approve": ("agentweave task approve",),
    "control:reject": ("agentweave task reject",),
}
"""What does an operators' act; `agentweave call` can't, for it is no capability."""

_NO_GRANTS: Final = PolicyChoice(None, DEFAULT_POLICY_PATH, "")


@dataclass(frozen=True, slots=True)
class Denial:
    """A question that a policy denied, as the audit log has it."""

    caller: str
    callee: str
    action: str
    direction: str
    context: dict[str, Any]
    revision: str = ""

    @classmethod
    def of(cls, record: Record) -> Denial:
        """Read it from a record of a decision."""
        caller, callee, action = (str(record[key]) for key in ("caller", "callee", "action"))
        direction = str(record.get("direction", "inbound"))
        context, revision = record.get("input", {}).get("context", {}), str(record.get("revision", ""))
        return cls(caller, callee, action, direction, context, revision)

    @property
    def decides(self) -> str:
        """The SPIFFE ID of the agent whose policy said no."""
        return self.caller if self.direction == "outbound" else self.callee

    @property
    def kind(self) -> str:
        """The envelope's kind."""
        return str(self.context.get("kind", "call"))

    @property
    def payload(self) -> Any:
        """The arguments."""
        return self.context.get("payload") or {}

    @property
    def issuer(self) -> str | None:
        """Who vouches for the principal, where one is named."""
        principal = self.context.get("principal")
        return None if principal is None else str(principal.get("iss", ""))

    @property
    def origin(self) -> str | None:
        """With whom the delegation began; None for a call of the caller's own."""
        via = self.context.get("via") or [{}]
        issuer = via[0].get("iss")
        return None if issuer is None else str(issuer)

    @property
    def not_carried(self) -> list[str]:
        """Members of the context that a check from the command line has not."""
        present = {key for key, value in self.context.items() if value not in (None, False, [], {})}
        return sorted(present - _CARRIED - _OF_EVERY_REQUEST)

    def question(self) -> AuthzContext:
        """Return it as the policy was asked, as far as a command can."""
        return AuthzContext(
            caller=self.caller,
            callee=self.callee,
            action=self.action,
            direction="outbound" if self.direction == "outbound" else "inbound",
            payload=self.payload,
            kind=self.kind,
            principal=self.context.get("principal"),
            via=tuple(self.context.get("via") or ()),
        )


def advice_about(denial: Denial, options: argparse.Namespace) -> dict[str, Any]:
    """Return the way on: commands, and what the grants as they are now say."""
    choice = _choice(options, denial)
    advice: dict[str, Any] = {"try_the_policy": shlex.join(_check(denial, choice, options))}
    if denial.not_carried:
        advice["not_carried"] = denial.not_carried
    about = _about_grants(denial, choice)
    if ":" in denial.action:
        return {**advice, **about, **_about_act(denial, choice)}
    exists = "no_such_capability" not in about and unknown_agent(denial.callee) is None
    if exists and (again := _call(denial)) is not None:
        advice["try_again"] = shlex.join(again)
    return {**advice, **about}


def advice_lines(story: dict[str, Any], file: str) -> list[str]:
    """Say for people what :func:`advice_about` found."""
    lines = _verdict_lines(story, file)
    if "try_the_policy" in story:
        lines += ["Ask the policy again without calling:", f"  {story['try_the_policy']}"]
    if "not_carried" in story:
        lines.append(f"  That leaves out what the request also had: {', '.join(story['not_carried'])}.")
    if "operators_commands" in story:
        lines.append(f"It is an operators' act, done by `{'`, `'.join(story['operators_commands'])}`.")
    if "may_already" in story:
        who = " or ".join(f"--as {name}" for name in story["may_already"])
        lines.append(f"By the grants as they are now it may be done as another client: {who}.")
    if "try_again" in story:
        lines += ["Call again:", f"  {story['try_again']}"]
    return lines


def _verdict_lines(story: dict[str, Any], file: str) -> list[str]:
    if "allowed_now" in story:
        return [_allowed_now(story)]
    lines = []
    if "denied_by_package" in story:
        lines.append(f"The grants allow this; the package {story['denied_by_package']} denies it.")
    elif "package" in story:
        lines.append(
            f"The package {story['package']} denies it, and so do the grants: {story['grants_say']}."
        )
    if "package_says" in story:
        lines.append(f"  The package's reason, asked again: {story['package_says']}.")
    if "no_such_capability" in story:
        lines.append(f"{story['no_such_capability']}")
    elif "would_allow" in story:
        lines.append(f"No grant is about this. In {file}, this would allow it:")
        lines += ["  " + line for line in story["would_allow"].rstrip().splitlines()]
    elif "matching_grants" in story and "denied_by_package" not in story:
        lines.append(f"Grants of {file} are about this, but do not go as far:")
        lines += ["  " + json.dumps(grant) for grant in story["matching_grants"]]
        lines += [f"  Add to one of them: {text}" for text in story.get("add_to_a_grant", ())]
    return lines


def _allowed_now(story: dict[str, Any]) -> str:
    if story["changed_since"]:
        return (
            f"The policy as it is now allows this: it changed since (revision {story['revision']} then,"
            f" {story['revision_now']} now)."
        )
    left_out = ", or what the command below leaves out matters" if "not_carried" in story else ""
    return f"The same policy allows this now: a limit over time was used up{left_out}."


def _choice(options: argparse.Namespace, denial: Denial) -> PolicyChoice:
    try:
        return choose_policy(options, denial.decides)
    except ConfigurationError:
        if options.policy is not None:
            raise
        return _NO_GRANTS


def _about_grants(denial: Denial, choice: PolicyChoice) -> dict[str, Any]:
    """Ask the policy again as it is now, and the grants alone where an own package decides."""
    asked = (denial.caller, denial.callee, denial.action, denial.kind)
    about = list(choice.grants.find_all(*asked))
    facts: dict[str, Any] = {"matching_grants": [grant.to_data() for grant in about]} if about else {}
    own_package = choice.package != DEFAULT_POLICY_PATH
    may_operate = choice.grants.operator_may(denial.caller, denial.action)
    # Without an entry about it the shipped package denies, which needs no asking.
    now = _asked_again(denial, choice) if about or own_package or may_operate else {}
    package, grants = now.get(choice.package), now.get(DEFAULT_POLICY_PATH)
    if package is not None and package.allowed:
        changed = package.revision != denial.revision
        return facts | {"allowed_now": True, "changed_since": changed, "revision_now": package.revision}
    if package is not None and grants is not None and own_package:
        facts["package_says"] = package.reason
        if grants.allowed:
            return facts | {"denied_by_package": choice.package}
        facts |= {"package": choice.package, "grants_say": grants.reason}
    return facts | _missing_in(choice.grants, denial, about)


def _about_act(denial: Denial, choice: PolicyChoice) -> dict[str, Any]:
    """Say which commands do an operators' act, and which other clients of this directory's stack may."""
    commands = _OPERATORS_COMMANDS.get(denial.action)
    facts: dict[str, Any] = {} if commands is None else {"operators_commands": list(commands)}
    stack = _stack_here()
    clients = () if stack is None else stack.clients
    domain = "" if stack is None else stack.trust_domain
    others = {name: SpiffeID.of(domain, "client", name) for name in clients}
    may = [
        name
        for name, one in others.items()
        if one != denial.caller and choice.grants.operator_may(one, denial.action)
    ]
    return facts | ({"may_already": may} if may else {})


def _missing_in(grants: Grants, denial: Denial, about: list[Grant]) -> dict[str, Any]:
    """Say what the grants lack; of what does not exist only that, as granting it would help nobody."""
    if about:
        missing = _missing(denial, about)
        return {"add_to_a_grant": missing} if missing else {}
    if unknown_agent(denial.callee) is not None:
        return {}
    if (unknown := unknown_capability(denial.callee, denial.action)) is not None:
        return {"no_such_capability": unknown}
    return {"would_allow": _entry(grants, denial)}


def _entry(grants: Grants, denial: Denial) -> str:
    """Return the entry that would allow it, with the issuer where a principal is named."""
    text = grants.explain(denial.caller, denial.callee, denial.action, denial.kind).rstrip()
    if denial.issuer is not None and text.startswith("grants:"):
        text += f"\n  principals: {json.dumps([denial.issuer])}"
    return text + "\n"


def _missing(denial: Denial, about: list[Grant]) -> list[str]:
    """Say what none of the grants about it has."""
    missing = []
    if denial.issuer is not None and not any(one.permits_principal(denial.issuer) for one in about):
        missing.append(f"principals: {json.dumps([denial.issuer])}")
    if denial.origin is not None and not any(one.permits_origin(denial.origin) for one in about):
        missing.append(f"on_behalf_of: {json.dumps([denial.origin])}")
    return missing


def _asked_again(denial: Denial, choice: PolicyChoice) -> dict[str, AuthzDecision]:
    """Ask the package that decides, and the shipped one, which knows nothing but the grants."""
    try:
        return decide_by(choice, denial.question(), {choice.package, DEFAULT_POLICY_PATH})
    except AgentWeaveError:
        return {}  # it can't be asked here, so nothing is claimed


# --- commands --------------------------------------------------------------------------------------------


def _check(denial: Denial, choice: PolicyChoice, options: argparse.Namespace) -> list[str]:
    command = ["agentweave", "authz", "check", "--caller", denial.caller, "--target", denial.callee]
    command += ["--action", denial.action, "--direction", denial.direction]
    command += ["--payload", json.dumps(denial.payload)]
    if denial.kind != "call":
        command += ["--kind", denial.kind]
    command += _principal(denial)
    if via := denial.context.get("via"):
        command += ["--via", json.dumps(via)]
    if options.policy is not None:
        command += ["--policy", options.policy]
    if options.policy_path is not None or choice.package != DEFAULT_POLICY_PATH:
        command += ["--policy-path", choice.package]
    return [*command, "--trace"]


def _call(denial: Denial) -> list[str] | None:
    """Return the command that makes the same call; None where it is not a client here who made it."""
    client = _client_here(denial.caller)
    if client is None or denial.context.get("via") or denial.kind != "call":
        return None
    command = ["agentweave", "call", "--target", denial.callee, "--capability", denial.action]
    command += ["--data", json.dumps(denial.payload), *_principal(denial)]
    for entry in denial.context.get("scope") or ():
        command += ["--scope", entry]
    return command if client == "cli" else [*command, "--as", client]


def _principal(denial: Denial) -> list[str]:
    principal = denial.context.get("principal")
    return [] if principal is None else ["--principal", json.dumps(principal)]


def _client_here(caller: str) -> str | None:
    """Return the name of the client of this directory's stack that ``caller`` is."""
    identity = SpiffeID(caller)
    name = identity.path.removeprefix("/client/")
    if not Path(DEFAULT_STACK_FILE).exists():
        return name if (STATE_DIR / "clients" / f"{name}.yaml").is_file() else None
    stack = _stack_here()
    if stack is None:
        return None
    ours = identity.trust_domain == stack.trust_domain and identity.path == f"/client/{name}"
    return name if ours and name in stack.clients else None


def _stack_here() -> StackConfig | None:
    """Return the stack of this directory's file; None where there is none, or nothing that can be read."""
    if not Path(DEFAULT_STACK_FILE).exists():
        return None
    try:
        return load_stack()
    except ConfigurationError:
        return None
