"""One task's story: what its records at the broker say, and what the audit logs of this machine have of it.

Both are laid beside each other by time. What is missing in one of them is missing here: a task of which no
log lies on this machine has its states, and nothing of who decided on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from agentweave_bus.authz.audit_reading import Record, context_of, via_of
from agentweave_bus.console.decisions import principal_of, refusal_verdict
from agentweave_bus.console.story_logs import TaskLogs
from agentweave_bus.console.task_book import TaskRow

__all__ = ["task_story"]

Entry = dict[str, Any]

_MOST_ENTRIES: Final = 2_000
_LONGEST: Final = 1_000
_SENT: Final = {"submit": "submitted", "call": "asked", "publish": "published", "control": "told"}


def task_story(row: TaskRow, told: Mapping[str, Any], logs: TaskLogs) -> dict[str, Any]:
    """Return the story of ``row``; ``told`` is what the control role answers to ``observe_task``."""
    entries = [
        *_states(row, told.get("records", ())),
        *_steps(row, told.get("steps", ())),
        *_progress(row, told.get("progress", ())),
        *(entry for record in _with_heads(logs.own) if (entry := _own(record)) is not None),
        *(entry for record in _with_heads(logs.nested) if (entry := _nested(record, row.id)) is not None),
    ]
    entries.sort(key=lambda entry: entry["at"])
    waits = row.approval_json() if row.waits_for_approval else None
    return {
        "row": row.to_json(),
        "chain": _chain(row, logs.own),
        "principal": next((one for one in map(principal_of, logs.own) if one is not None), None),
        "timeline": entries[-_MOST_ENTRIES:],
        "left_out": max(0, len(entries) - _MOST_ENTRIES) + int(told.get("left_out", 0)),
        "logs_whole": logs.whole,
        "approval": waits,
    }


def _chain(row: TaskRow, own: Iterable[Record]) -> list[dict[str, Any]]:
    """Return who asked whom for what until it came to this task, the origin first."""
    links = next((via for via in map(via_of, own) if via), [])
    chain = [
        {
            "who": _text(link.get("iss")),
            "asked": _text(link.get("cap")),
            "id": _text(link.get("id")),
            "agent": _text(link.get("aud")),
        }
        for link in links
    ]
    return [*chain, {"who": row.sender, "asked": row.capability, "id": row.id, "agent": row.agent}]


# --- what the broker's records say -----------------------------------------------------------------------


def _states(row: TaskRow, records: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
    for record in records:
        if not record.get("genuine"):
            yield _false(row, record)
            continue
        yield {
            "at": record["at"],
            "kind": "state",
            "who": record["writer"],
            "title": _state_title(record),
            "text": _state_text(record),
            "state": record["state"],
            "attempt": record["epoch"],
            "signed_by": record["writer"],
            "digest": record["digest"],
            "genuine": True,
        }


def _state_title(record: Mapping[str, Any]) -> str:
    state = str(record["state"]).replace("_", " ")
    if record.get("redrive"):
        return f"{state}, redriven by an operator"
    return f"{state}, only undoing what it did" if record.get("undoes") else state


def _state_text(record: Mapping[str, Any]) -> str:
    said = [_text(record.get("error") or record.get("message"))]
    if (step := record.get("step")) is not None:
        said.append(f"refused at admission: {step}")
    if (asked := record.get("asked")) is not None:
        said.append(f"who may approve: {', '.join(asked['approvers'])}")
    if (decided := record.get("decided")) is not None:
        said.append(
            f"decided by {decided['by']}" + (f": {decided['reason']}" if decided.get("reason") else "")
        )
    return "\n".join(one for one in said if one)


def _steps(row: TaskRow, steps: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
    for step in steps:
        if not step.get("genuine", True):
            yield _false(row, step)
            continue
        yield {
            "at": step["at"],
            "kind": "step",
            "who": row.agent,
            "title": f"step {step['name']} is on record" if step.get("name") else "a step is on record",
            "text": "",
            "attempt": step.get("epoch"),
            "signed_by": row.agent,
            "digest": step.get("digest"),
            "genuine": True,
        }


def _progress(row: TaskRow, progress: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
    for one in progress:
        share = f"{one['fraction']:.0%}" if "fraction" in one else ""
        text = _text(one.get("text"))
        yield {
            "at": one["at"],
            "kind": "progress",
            "who": row.agent,
            "title": text or share,
            "text": share if text else "",
            "signed_by": row.agent,
            "genuine": True,
        }


def _false(row: TaskRow, told: Mapping[str, Any]) -> Entry:
    return {
        "at": told["at"],
        "kind": "state",
        "who": row.agent,
        "title": "what stands in its log here is not genuine",
        "text": _text(told.get("why")),
        "genuine": False,
    }


# --- what the audit logs say -----------------------------------------------------------------------------


def _with_heads(records: Iterable[Record]) -> Iterator[Record]:
    """Add to outcomes what they are of: their records name it by its digest alone."""
    listed = list(records)
    heads = {one["digest"]: one for one in listed if "digest" in one and "aud" in one}
    # An event is addressed to nobody: who let it in is whose outcome it is.
    admitted = (one for one in listed if one.get("event") == "admission" and "digest" in one)
    let_in = {(one["log"], one["digest"]): one for one in admitted}
    for record in listed:
        digest = record.get("digest")
        if record.get("event") != "outcome" or digest not in heads:
            yield record
            continue
        head, admission = heads[digest], let_in.get((record["log"], digest), {})
        callee = admission.get("callee") or head["aud"]
        said = {name: head.get(name) for name in ("iss", "cap", "input")}
        yield {**record, **said, "aud": callee}


def _own(record: Record) -> Entry | None:
    entry = _entry(record)
    callee, event = _text(record.get("callee") or record.get("aud")), record.get("event")
    if event in _SENT:
        entry["kind"] = "submitted" if event == "submit" else "sent"
        entry["title"] = f"{_SENT[str(event)]} {entry['action']}"
    elif event == "admission":
        entry |= {"kind": "admitted", "title": "let in", "who": callee}
    elif event == "refusal":
        entry |= {"kind": refusal_verdict(record), "title": _refusal_title(record)}
        if _waits(record):
            entry |= {"kind": "waits", "title": "to be approved of first"}
        entry["who"] = entry["who"] if record.get("direction") == "outbound" else callee
    elif event == "outcome":
        entry |= {"kind": "outcome", "title": f"outcome: {_text(record.get('status'))}", "who": callee}
        entry["text"] = _took(record)
    elif event == "reissue":
        entry |= {"kind": "reissued", "title": f"to begin again, attempt {_text(record.get('attempt'))}"}
        entry["text"] = f"for {_text(record.get('operator'))}"
    else:
        return None
    return entry


def _nested(record: Record, task_id: str | None) -> Entry | None:
    """Say what was asked for on the task's behalf, by how many requests further on (``depth``, from 1)."""
    entry = _own(record)
    if entry is None:
        return None
    if entry["kind"] in {"sent", "submitted", "admitted", "outcome"}:
        callee = _text(record.get("callee") or record.get("aud"))
        target = f"{callee.rpartition('/')[2]}: {entry['action']}"
        entry["title"] = {
            "admitted": f"{target} let in",
            "outcome": f"{target} {_text(record.get('status'))}",
        }.get(entry["kind"], f"asked {target}")
        entry |= {"of": entry["kind"], "kind": "nested"}
    if record.get("event") == "publish":
        entry["title"] = f"published {entry['action']}"
    ids = [link.get("id") for link in via_of(record)]
    entry["depth"] = len(ids) - ids.index(task_id) if task_id in ids else 1
    return entry


def _entry(record: Record) -> Entry:
    chain, _, number = _text(record.get("audit_id")).rpartition("-")
    return {
        "at": int(record.get("ts", 0)),
        "kind": "sent",
        "who": _text(record.get("caller") or record.get("iss")),
        "title": "",
        "text": _text(record.get("reason")),
        "action": _text(record.get("action") or record.get("cap")),
        "digest": _text(record.get("digest")),
        "revision": _text(record.get("revision")),
        "audit": {
            "log": record["log"],
            "audit_id": _text(record.get("audit_id")),
            "chain": chain,
            "seq": int(number) if number.isdecimal() else None,
        },
    }


def _waits(record: Record) -> bool:
    """Say whether it is a task that waits for an approval; a call is refused at once."""
    return bool(record.get("approvers")) and context_of(record).get("kind") == "task"


def _refusal_title(record: Record) -> str:
    by = "denied by policy" if "allowed" in record else f"refused at step {_text(record.get('step'))}"
    return f"{by} ({_text(record.get('step_name'))})"


def _took(record: Record) -> str:
    took = record.get("ms")
    return f"after {took} ms" if isinstance(took, int | float) else ""


def _text(value: object) -> str:
    return "" if value is None else str(value)[:_LONGEST]
