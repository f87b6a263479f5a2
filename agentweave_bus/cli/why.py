"""``agentweave why``: what became of a call, who refused it, and what would let it through."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, Final

from agentweave_bus.authz.audit_reading import Record, log_files, matching, on_behalf_of
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.cli.advice import Denial, advice_about, advice_lines
from agentweave_bus.cli.audit_records import audit_paths, describe
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import print_result
from agentweave_bus.cli.policy_choice import add_policy_arguments, choose_policy
from agentweave_bus.cli.stack_agents import unknown_agent
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.printable import escape_line

__all__ = ["add_arguments", "explain", "run"]

_EPILOG: Final = """\
Example:
  agentweave why cf0d4a9580a4f9c845664d34eba24102-1

ID is an audit id (errors name it), a task's id, or the digest of an envelope (8 digits of it suffice).
"""
_ID_KEYS: Final = ("audit_id", "id", "digest", "decision_id")
_SHORTEST: Final = 8
_CORRELATION_ID: Final = re.compile("[0-9a-f]{16}")
_OTHER_LOGS: Final = "Give the logs of the agent that refused with --audit."
_A_FAILURE: Final = (
    "If it came as a correlation id, nothing refused the call: its handler failed. The traceback stands"
    " under that id in the log of the agent that was called; `agentweave up` shows it on standard error."
)
_OUTBOUND_STEP: Final = 0
_AUTHORIZATION_STEP: Final = 11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("id", metavar="ID", help="an audit id, a task's id or a digest")
    parser.add_argument(
        "--audit",
        action="append",
        metavar="PATH",
        help="where the logs are (default: .agentweave/audit); may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    add_policy_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Find everything that the logs say about ``ID`` and explain it."""
    files = log_files(audit_paths(options.audit))
    records = _story(options.id, files)
    story = explain(records, options)
    tasks = {record["id"] for record in records if isinstance(record.get("id"), str)}
    nested = [record for record in on_behalf_of(files, tasks) if record not in records] if tasks else []
    story |= _because(nested) if story.get("status") == "failed" else {}
    text = _text(story, records, nested, _grants_name(options))
    print_result({**story, "records": records, "nested": nested}, text, json_wanted=options.json)
    return ExitCode.DONE


def explain(records: list[Record], options: argparse.Namespace) -> dict[str, Any]:
    """Return what happened, by the records of one call (in order): verdict, layer, rule, and the way on."""
    if all(record.get("event") == "malformed" for record in records):
        sentence = f"What the logs have of it is malformed: {records[-1].get('reason')}."
        return {"verdict": "malformed", "sentence": sentence}
    refusals = [record for record in records if record.get("event") == "refusal"]
    outcomes = [record for record in records if record.get("event") == "outcome"]
    if outcomes and not (refusals and refusals[-1].get("ts", 0) > outcomes[-1].get("ts", 0)):
        status, took = outcomes[-1].get("status"), outcomes[-1].get("ms")
        sentence = f"It was allowed and ran: {status} after {took} ms."
        return {"verdict": "ran", "status": status, "sentence": sentence}
    if refusals:
        return _refusal(refusals[-1], options)
    if any(record.get("event") == "admission" for record in records):
        return {
            "verdict": "admitted",
            "sentence": "It was let in, and no outcome is recorded: it still runs, or its worker died.",
        }
    return {
        "verdict": "sent",
        "sentence": "It was allowed on the caller's side and sent; no log here says that it arrived."
        " Nobody was there, the broker kept it back, or the callee's logs are elsewhere (--audit).",
    }


def _story(wanted: str, files: list[Path]) -> list[Record]:
    """Return the records that ``wanted`` names, with all others about the same envelope or task."""

    def named(value: str) -> bool:
        return value == wanted or (len(wanted) >= _SHORTEST and value.startswith(wanted))

    found = matching(files, named, _ID_KEYS)
    if not found:
        raise ConfigurationError(
            f"No record here is about {wanted!r} ({len(files)} log files were read).",
            key="ID",
            hint=_A_FAILURE if _CORRELATION_ID.fullmatch(wanted) else _OTHER_LOGS,
        )
    related = {record[key] for record in found for key in ("digest", "id") if key in record}
    if not related:
        return found
    return matching(files, lambda value: value in related or named(value), _ID_KEYS)


def _because(nested: list[Record]) -> dict[str, Any]:
    """Name the last of its own calls that was refused, which a failed handler often has failed by."""
    refusals = [record for record in nested if record.get("event") == "refusal" and record.get("audit_id")]
    if not refusals:
        return {}
    last = refusals[-1]
    callee = last.get("callee") or last.get("aud") or last["log"]
    return {
        "refused_within": last["audit_id"],
        "refused_within_sentence": f"While it ran, a call of it to {callee} was refused:"
        f" {last.get('reason')}.",
    }


def _grants_name(options: argparse.Namespace) -> str:
    """Return the file that advice is about."""
    try:
        choice = choose_policy(options)
    except ConfigurationError:
        if options.policy is not None:
            raise
        return "grants.yaml"
    return str(grants_file(choice.source) or "grants.yaml")


def _refusal(record: Record, options: argparse.Namespace) -> dict[str, Any]:
    step, by_policy = record.get("step"), "allowed" in record
    layer = _layer(record)
    story: dict[str, Any] = {
        "verdict": "denied" if by_policy else "refused",
        "layer": layer,
        "step": f"{step} ({record.get('step_name')})",
        "rule": record.get("reason"),
        "sentence": f"It was refused by {layer}: {record.get('reason')}.",
        "audit_id": record.get("audit_id"),
    }
    if by_policy and record.get("revision"):
        story["revision"] = record["revision"]
        denial = Denial.of(record)
        if (unknown := unknown_agent(denial.callee)) is not None:
            story["no_such_agent"] = unknown
        story |= advice_about(denial, options)
    return story


def _layer(record: Record) -> str:
    step, callee = record.get("step"), record.get("callee") or record.get("aud") or record["log"]
    if step == _OUTBOUND_STEP:
        return f"the policy on the caller's side, {record.get('caller')}, before anything was sent"
    if step == _AUTHORIZATION_STEP and record.get("revision"):
        return f"the policy of {callee}, before anything ran"
    if step == _AUTHORIZATION_STEP:
        return f"a restriction in the code of {callee} (@requires_peer or @requires_federated_peer)"
    return f"admission step {step} ({record.get('step_name')}) of {callee}, before any policy was asked"


def _text(story: dict[str, Any], records: list[Record], nested: list[Record], file: str) -> str:
    lines = [escape_line(story["sentence"])]
    if "step" in story:
        revision = f", policy revision {story['revision']}" if "revision" in story else ""
        lines.append(escape_line(f"  step {story['step']}{revision}, audit id {story['audit_id']}"))
    if "refused_within" in story:
        lines += [
            escape_line(story["refused_within_sentence"]),
            f"  agentweave why {story['refused_within']}",
        ]
    if "no_such_agent" in story:
        lines.append(story["no_such_agent"])
    lines += advice_lines(story, file)
    lines += ["What the logs say:", *(f"  {describe(record)}" for record in records)]
    if nested:
        lines += ["Of the calls made while it ran:", *(f"  {describe(record)}" for record in nested)]
    return "\n".join(lines)
