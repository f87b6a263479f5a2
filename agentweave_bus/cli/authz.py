"""``agentweave authz``: try a policy here, without asking or changing anything that runs; and revoke."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agentweave_bus.authz import Authorizer, AuthzContext, AuthzDecision, Grants, Standing
from agentweave_bus.authz.policy_input import write_input
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.cli import broker_users, revoke
from agentweave_bus.cli.arguments import parse_json, parse_principal, parse_via
from agentweave_bus.cli.authz_cases import Case, read_cases
from agentweave_bus.cli.commands import add_command
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import as_json, message, print_result
from agentweave_bus.cli.policy_choice import PolicyChoice, add_policy_arguments, choose_policy
from agentweave_bus.cli.stack_agents import unknown_capability, unknown_identity
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["add_arguments", "decide_by", "run_check", "run_test"]

_CHECK_EPILOG: Final = """\
Example:
  agentweave authz check --caller spiffe://shop.test/agent/order \\
      --target spiffe://shop.test/agent/payment --action process_payment \\
      --payload '{"amount": 2500}' --trace

Exit code 0: allowed, 3: denied. Limits a minute or a day are not counted here.
"""
_TEST_EPILOG: Final = """\
Example:
  agentweave authz test authz-tests.yaml

The file is a list of cases:
  cases:
    - {name: orders may be paid, caller: spiffe://shop.test/agent/order,
       target: spiffe://shop.test/agent/payment, action: process_payment,
       payload: {amount: 10}, expect: allow}
    - {name: not too much, caller: spiffe://shop.test/agent/order,
       target: spiffe://shop.test/agent/payment, action: process_payment,
       payload: {amount: 9999}, expect: deny, reason: max_amount}

Beside Rego with tests (*_test.rego), `opa test` runs, too, if opa is there. Exit code 1: a case failed.
"""
_OPA_SECONDS: Final = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the commands."""
    parser.epilog = "Example:\n  agentweave authz check --help\n"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _describe_check(add_command(commands, "check", "ask the policy one question", _CHECK_EPILOG))
    _describe_test(
        add_command(commands, "test", "ask it a table of questions with known answers", _TEST_EPILOG)
    )
    broker_users.add_arguments(
        add_command(commands, "broker", "print the broker's users, by the grants", broker_users.EPILOG)
    )
    revoke.add_arguments(
        add_command(commands, "revoke", "trust somebody no more, from now on", revoke.EPILOG)
    )


def _describe_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--caller", required=True, metavar="SPIFFE_ID", help="who asks")
    parser.add_argument("--target", required=True, metavar="SPIFFE_ID", help="who is asked")
    parser.add_argument("--action", required=True, metavar="NAME", help="a capability, or an operator's act")
    parser.add_argument("--payload", default="{}", metavar="JSON", help="the arguments (default: {})")
    parser.add_argument("--direction", choices=("inbound", "outbound"), default="inbound")
    parser.add_argument("--kind", choices=("call", "task", "event", "control"), default="call")
    parser.add_argument("--principal", metavar="JSON", help='for whom: {"iss": "...", "sub": "..."}')
    parser.add_argument(
        "--via", metavar="JSON", help='on whose behalf: [{"iss": "...", "aud": "...", "cap": "..."}, ...]'
    )
    parser.add_argument("--trace", action="store_true", help="also show input, matching grants and standing")
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    add_policy_arguments(parser)
    parser.set_defaults(run=run_check)


def _describe_test(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="authz-tests.yaml", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    add_policy_arguments(parser)
    parser.set_defaults(run=run_test)


# --- check -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    decision: AuthzDecision
    standing: Standing | None


def run_check(options: argparse.Namespace) -> int:
    """Ask one question and print the answer."""
    context = _question(options)
    choice = choose_policy(options, context.callee if context.direction == "inbound" else context.caller)
    answer = asyncio.run(_ask(choice, [context]))[0]
    facts = _facts(choice, context, answer, trace=options.trace)
    print_result(facts, _text(choice, answer, facts), json_wanted=options.json)
    return ExitCode.DONE if answer.decision.allowed else ExitCode.DENIED


def _question(options: argparse.Namespace) -> AuthzContext:
    return AuthzContext(
        caller=str(SpiffeID(options.caller)),
        callee=str(SpiffeID(options.target)),
        action=options.action,
        direction=options.direction,
        payload=parse_json(options.payload, "--payload"),
        kind=options.kind,
        principal=parse_principal(options.principal),
        via=parse_via(options.via),
    )


def decide_by(
    choice: PolicyChoice, question: AuthzContext, packages: Iterable[str]
) -> dict[str, AuthzDecision]:
    """Ask one question of several packages of a policy, here and now; the policy is loaded once.

    Raises:
        AgentWeaveError: it can't be loaded.

    """
    return asyncio.run(_ask_each(choice, question, packages))


async def _ask_each(
    choice: PolicyChoice, question: AuthzContext, packages: Iterable[str]
) -> dict[str, AuthzDecision]:
    engine = EmbeddedEngine()
    engine.load(choice.source)
    try:
        return {
            package: (await _ask_one(engine, replace(choice, package=package), question)).decision
            for package in packages
        }
    finally:
        await engine.aclose()


async def _ask(choice: PolicyChoice, questions: list[AuthzContext]) -> list[_Answer]:
    engine = EmbeddedEngine()
    engine.load(choice.source)
    try:
        return [await _ask_one(engine, choice, question) for question in questions]
    finally:
        await engine.aclose()


async def _ask_one(engine: EmbeddedEngine, choice: PolicyChoice, question: AuthzContext) -> _Answer:
    authorizer = Authorizer(engine, policy_path=choice.package)  # a new one: no limit is used up
    decision = await authorizer.authorize(question)
    standing = None
    if engine.has_standing(choice.package):
        standing = await engine.evaluate_standing(choice.package, write_input(question.standing_input()))
    return _Answer(decision, standing)


def _facts(choice: PolicyChoice, context: AuthzContext, answer: _Answer, *, trace: bool) -> dict[str, Any]:
    decision = answer.decision
    facts: dict[str, Any] = {
        "allowed": decision.allowed,
        "reason": decision.reason,
        "policy": {
            "source": None if choice.source is None else str(choice.source),
            "package": choice.package,
            "revision": decision.revision,
            "chosen_by": choice.chosen_by,
        },
    }
    if not decision.allowed:
        facts |= _way_on(choice.grants, context)
    if trace:
        standing = answer.standing
        facts["input"] = context.to_input()
        facts["matching_grants"] = [grant.to_data() for grant in _matching(choice.grants, context)]
        facts["standing"] = None if standing is None else {"cache_seconds": standing.cache_seconds}
        facts["limits"] = dict(decision.limits)
    return facts


def _matching(grants: Grants, context: AuthzContext) -> list[Any]:
    return list(grants.find_all(context.caller, context.callee, context.action, context.kind))


def _way_on(grants: Grants, context: AuthzContext) -> dict[str, Any]:
    """Return the grant that is missing; of who or what does not exist here, that instead."""
    missing = _missing_grant(grants, context)
    unknown = [unknown_identity(one) for one in dict.fromkeys((context.caller, context.callee))]
    if missing is not None and context.kind != "event" and not any(unknown):
        unknown.append(unknown_capability(context.callee, context.action))
    if not any(unknown):
        return {"would_allow": missing}
    return {"would_allow": None, "unknown": [one for one in unknown if one is not None]}


def _missing_grant(grants: Grants, context: AuthzContext) -> str | None:
    """Return the entry that would make a difference: none where one is there and does not suffice."""
    if _matching(grants, context) or grants.operator_may(context.caller, context.action):
        return None
    return grants.explain(context.caller, context.callee, context.action, context.kind)


def _text(choice: PolicyChoice, answer: _Answer, facts: dict[str, Any]) -> str:
    decision = answer.decision
    verdict = "allowed" if decision.allowed else "DENIED"
    source = f"{choice.source or 'nothing: no grants'} (chosen by {choice.chosen_by})"
    lines = [
        f"{verdict}: {decision.reason}",
        f"  by package {choice.package}, revision {decision.revision or '-'}, from {source}",
    ]
    lines += facts.get("unknown", ())
    if facts.get("would_allow"):
        lines += ["In grants.yaml, this would allow it:", _indented(facts["would_allow"])]
    if "input" in facts:
        lines += ["The policy was asked about:", _indented(as_json(facts["input"]))]
        grants = facts["matching_grants"]
        lines += [f"Grants about this: {len(grants) or 'none'}"]
        lines += [_indented(json.dumps(grant, default=str)) for grant in grants]
        lines += [_standing_text(answer.standing)]
    return "\n".join(lines)


def _standing_text(standing: Standing | None) -> str:
    if standing is None:
        return "Standing answer: none; every call is asked about in full."
    return f"Standing answer: it is allowed whatever the payload; kept for {standing.cache_seconds:g} s."


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.rstrip().splitlines())


# --- test ------------------------------------------------------------------------------------------------


def run_test(options: argparse.Namespace) -> int:
    """Run a table of cases, and ``opa test`` where there are Rego tests."""
    table = read_cases(Path(options.file))
    if options.policy is None and table.policy is not None:
        options.policy = str(table.policy)
    if options.policy_path is None:
        options.policy_path = table.policy_path
    failures, results = [], []
    for case in table.cases:
        choice = choose_policy(options, case.target if case.direction == "inbound" else case.caller)
        answer = asyncio.run(_ask(choice, [_case_question(case)]))[0]
        why = _mismatch(case, answer.decision)
        results.append({"name": case.name, "ok": why is None, "reason": answer.decision.reason})
        failures += [f"{case.name}: {why}"] if why else []
    opa = _opa_test(choose_policy(options))
    summary = f"{len(results) - len(failures)} of {len(results)} cases hold"
    text = "\n".join([*(f"FAILED {failure}" for failure in failures), summary])
    print_result({"cases": results, "failed": len(failures), "opa_test": opa}, text, json_wanted=options.json)
    return ExitCode.FAILED if failures or opa == "failed" else ExitCode.DONE


def _case_question(case: Case) -> AuthzContext:
    return AuthzContext(
        caller=case.caller,
        callee=case.target,
        action=case.action,
        direction=case.direction,
        payload=case.payload,
        kind=case.kind,
        principal=case.principal,
        via=tuple(case.via),
    )


def _mismatch(case: Case, decision: AuthzDecision) -> str | None:
    said = "allow" if decision.allowed else "deny"
    if said != case.expect:
        return f"expected {case.expect}, but: {said}, because {decision.reason}"
    if case.reason is not None and case.reason not in decision.reason:
        return f"expected a reason with {case.reason!r}, but: {decision.reason}"
    return None


def _opa_test(choice: PolicyChoice) -> str:
    """Run the Rego tests beside the policy; say ``passed``, ``failed`` or why there was nothing to run."""
    source = choice.source
    if source is None or not source.is_dir() or not any(source.glob("*_test.rego")):
        return "none"
    opa = find_opa()
    if opa is None:
        message("agentweave: the Rego tests were not run: there is no opa (make tools, or put it on PATH).")
        return "skipped"
    try:
        done = subprocess.run(  # noqa: S603 - the user's own opa, named by its path
            [opa, "test", str(source)], capture_output=True, text=True, timeout=_OPA_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        message(f"agentweave: opa test had not ended after {_OPA_SECONDS:g} s.")
        return "failed"
    message(done.stdout.rstrip() or done.stderr.rstrip())
    return "passed" if done.returncode == 0 else "failed"
