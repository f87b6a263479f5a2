"""What happened, from two sides: the stored history, and the effects that handlers wrote down themselves.

Pure: it takes what was read and returns what is wrong. The lawful order of states is written here once more,
not taken from the package, so that a slip there shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentweave_bus.bus.subjects import step_subject
from agentweave_bus.envelope import claim_key
from tests.chaos.effects import Effect
from tests.chaos.history import History, Record, StepDone
from tests.chaos.plan import AGENT, ATTEMPTS, CLIENT, TERMINAL, UNDONE, expected_states

_NO_STATE = frozenset({"progress", "artifact", "gap"})
_LAWFUL = {
    None: TERMINAL - {"completed"} | {"working"},
    "working": TERMINAL | {"working", "submitted"},
    "submitted": TERMINAL - {"completed"} | {"working"},
}


class Accepted(NamedTuple):
    """A task that the broker took, as its submitter wrote it down."""

    number: int
    kind: str
    id: str
    reference: str

    @property
    def key(self) -> str:
        """Under which everything of it is stored."""
        return claim_key(CLIENT, AGENT, self.kind, self.id)


class Event(NamedTuple):
    """What a watcher saw of a task, in the order in which it was written down."""

    number: int
    what: str
    """A state, or another kind of event."""
    cursor: str
    attempt: int


class Finding(NamedTuple):
    """Something that must not be. ``task`` is the task's number, or its key where it has none."""

    task: int | str
    what: str

    def __str__(self) -> str:
        return f"task {self.task}: {self.what}"


@dataclass
class Reconciled:
    """What is wrong, and what is counted."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def reconcile(
    tasks: int,
    accepted: Iterable[Accepted],
    events: Iterable[Event],
    effects: Iterable[Effect],
    history: History,
) -> Reconciled:
    """Compare all that is known of ``tasks`` tasks."""
    made = Reconciled()
    known = _by_number(accepted, made)
    made.counts["accepted"] = len(known)
    seen: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        seen[event.number].append(event)
    done: dict[str, list[Effect]] = defaultdict(list)
    for effect in effects:
        done[effect.task].append(effect)
    for number in sorted(set(range(tasks)) - known.keys()):
        made.findings.append(Finding(number, "was never accepted"))
    for task in known.values():
        records, own = history.records.get(task.key, []), done.pop(task.id, [])
        for what in (
            *_history_faults(task, records),
            *_event_faults(records, seen.get(task.number, [])),
            *_effect_faults(records, own),
            *_step_faults(task, records, own, history),
            *_undo_faults(task, records, own, history),
            *_dead_letter_faults(task, records, history),
        ):
            made.findings.append(Finding(task.number, what))
        _count(made.counts, records, own)
    keys = {task.key for task in known.values()}
    for key in sorted((history.records.keys() | history.steps.keys()) - keys):
        made.findings.append(Finding(key, "is recorded, and nobody had it accepted"))
    for task_id in sorted(done):
        made.findings.append(Finding(task_id, "has effects, and nobody had it accepted"))
    made.findings[:0] = [Finding("?", f"no genuine record: {what}") for what in history.foreign]
    if history.queued:
        made.findings.append(Finding("?", f"{history.queued} messages are left in the queue"))
    made.counts["dead letters"] = len(history.dead)
    made.counts["events seen"] = sum(map(len, seen.values()))
    return made


def _by_number(accepted: Iterable[Accepted], made: Reconciled) -> dict[int, Accepted]:
    known: dict[int, Accepted] = {}
    for one in accepted:
        if known.setdefault(one.number, one) != one:
            made.findings.append(Finding(one.number, "was accepted twice under one idempotency key"))
    return known


# --- the stored history ----------------------------------------------------------------------------------


def _history_faults(task: Accepted, records: list[Record]) -> Iterator[str]:
    if not records:
        yield "was accepted and has no record at all"
        return
    slots = Counter(record.slot for record in records)
    if twice := [slot for slot, count in slots.items() if count > 1]:
        yield f"has more than one record in slot {', '.join(map(str, twice))}"
    if sorted(slots) != list(range(len(slots))):
        yield f"has records in slots {sorted(slots)}"
    ends = [record for record in records if record.state in TERMINAL]
    if not ends:
        yield f"has no terminal record; its last is {records[-1].state} of attempt {records[-1].epoch}"
    elif len(ends) > 1:
        yield f"has {len(ends)} terminal records"
    if ends and (after := [one for one in records if one.sequence > ends[0].sequence]):
        yield f"has {len(after)} records after its terminal one"
    yield from _order_faults(records)
    if len(ends) == 1:
        yield from _end_faults(task, ends[0])


def _order_faults(records: list[Record]) -> Iterator[str]:
    before: Record | None = None
    for number, record in enumerate(records):
        state, epoch = (None, 0) if before is None else (before.state, before.epoch)
        if record.state not in _LAWFUL.get(state, frozenset()):
            yield f"goes from {state} to {record.state}"
        if record.epoch != epoch + (record.state == "working"):
            yield f"goes from attempt {epoch} to {record.epoch} with {record.state}"
        if (record.slot, record.number) != (number, number):
            yield f"has record {record.number} in slot {record.slot} as the {number + 1}. one"
        if record.before != (None if before is None else before.digest):
            yield f"record {record.number} does not name the one before it"
        if before is not None and record.task != before.task:
            yield f"record {record.number} is of another head"
        before = record


def _end_faults(task: Accepted, end: Record) -> Iterator[str]:
    wanted = expected_states(task.number, task.kind)
    result = end.body.get("result") or {}
    if end.state not in wanted:
        # What was lost with its worker too often is given up; with nothing else a failure is excused.
        if end.state != "failed" or end.epoch < ATTEMPTS:
            yield f"({task.kind}) should be {' or '.join(sorted(wanted))}, is {end.state} in attempt {end.epoch}: {result}"
        return
    if end.state == "completed" and _data(result).get("number") != task.number:
        yield f"has a result of something else: {result}"


def _data(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a handler returned: the one part of its result's one message."""
    parts = [part for message in result.get("messages", ()) for part in message.get("parts", ())]
    data = parts[0].get("data") if len(parts) == 1 else None
    return data if isinstance(data, dict) else {}


def _event_faults(records: list[Record], seen: list[Event]) -> Iterator[str]:
    """Compare with what a watcher saw, who was killed in between: everything, in order, each once."""
    states = [(one.what, one.attempt) for one in seen if one.what not in _NO_STATE]
    if states != [(record.state, record.epoch) for record in records]:
        yield f"was seen as {states}, which is not how it is recorded"
    if twice := [cursor for cursor, count in Counter(one.cursor for one in seen).items() if count > 1]:
        yield f"was seen twice at {twice[0]}"
    if any(one.what == "gap" for one in seen):
        yield "was seen with a gap in its progress"


def _dead_letter_faults(task: Accepted, records: list[Record], history: History) -> Iterator[str]:
    end = next((record for record in records if record.state in TERMINAL), None)
    given_up = (
        end is not None and end.state == "failed" and "failed" not in expected_states(task.number, task.kind)
    )
    parts = history.dead.get(task.key, set())
    if given_up and parts != {"frame", "record"}:
        yield f"was given up, and its dead letter has {sorted(parts) or 'nothing'}"


# --- the effects -----------------------------------------------------------------------------------------


def _effect_faults(records: list[Record], effects: list[Effect]) -> Iterator[str]:
    begun = Counter(effect.attempt for effect in effects if effect.what == "begin")
    working = {record.epoch for record in records if record.state == "working"}
    for attempt, count in begun.items():
        if count > 1:
            yield f"attempt {attempt} was run {count} times"
        if attempt not in working:
            yield f"attempt {attempt} was run and nobody recorded that it began"
    for record in records:
        ended = [one for one in effects if one.what == "end" and one.attempt == record.epoch]
        if record.state == "completed" and not ended:
            yield f"attempt {record.epoch} is recorded as completed, and its handler did not end"


def _step_faults(
    task: Accepted, records: list[Record], effects: list[Effect], history: History
) -> Iterator[str]:
    stored = {one.place: one for one in history.steps.get(task.key, ())}
    began_at = {record.epoch: record.sequence for record in records if record.state == "working"}
    begun = {one.attempt: one.line for one in effects if one.what == "begin"}
    for name in sorted({one.name for one in effects if one.what in {"ran", "got"}}):
        record = _stored(stored, task, name)
        got = [one for one in effects if one.what == "got" and one.name == name]
        ran = [one for one in effects if one.what == "ran" and one.name == name]
        if got and record is None:
            yield f"step {name} returned and is not recorded"
        if len({one.token for one in got}) > 1:
            yield f"step {name} returned different things to different attempts"
        if not {one.token for one in got} <= {one.token for one in ran}:
            yield f"step {name} returned what it never did"
        if record is not None and got and got[0].token not in str(record.value):
            yield f"step {name} returned something else than what is recorded"
        for one in ran:
            if got and begun.get(one.attempt, 0) > got[0].line:
                yield f"step {name} had returned before attempt {one.attempt} began, and ran again in it"
            if record is not None and began_at.get(one.attempt, 0) > record.sequence:
                yield f"step {name} was recorded before attempt {one.attempt} began, and ran again in it"
        if again := [number for number, count in Counter(one.attempt for one in ran).items() if count > 1]:
            yield f"step {name} ran more than once in attempt {again[0]}"
    end = next((record for record in records if record.state == "completed"), None)
    if task.kind == "steps" and end is not None:
        told = {one.name: one.token for one in effects if one.what == "got"}
        if _data(end.body.get("result") or {}).get("tokens") != told:
            yield "its result says other things of its steps than they returned"


def _undo_faults(
    task: Accepted, records: list[Record], effects: list[Effect], history: History
) -> Iterator[str]:
    """What a task did that failed for good is undone, last first, and what is on record as undone not again."""
    if task.kind != "undo":
        return
    stored = {one.place: one for one in history.steps.get(task.key, ())}
    began_at = {record.epoch: record.sequence for record in records if record.state == "working"}
    first: dict[str, int] = {}
    for name in UNDONE:
        undone = [one for one in effects if one.what == "undid" and one.name == name]
        first |= {name: undone[0].line} if undone else {}
        if _stored(stored, task, name) is not None and not undone:
            yield f"step {name} is on record and was not undone"
        if not {one.token for one in undone} <= _tokens(effects, "got", name):
            yield f"another step {name} was undone than was done"
        over = _stored(stored, task, f"undo:{name}")
        if undone and over is None:
            yield f"step {name} was undone, and that is not on record"
        for one in undone:
            if over is not None and began_at.get(one.attempt, 0) > over.sequence:
                yield f"step {name} was undone before attempt {one.attempt} began, and again in it"
    if list(first) == list(UNDONE) and first[UNDONE[1]] > first[UNDONE[0]]:
        yield "its steps were undone in the order in which they were done"


def _stored(stored: dict[str, StepDone], task: Accepted, name: str) -> StepDone | None:
    return stored.get(step_subject(AGENT, task.key, f"{name} 0").rpartition(".")[2])


def _tokens(effects: list[Effect], what: str, name: str) -> set[str]:
    return {one.token for one in effects if one.what == what and one.name == name}


def _count(counts: Counter[str], records: list[Record], effects: list[Effect]) -> None:
    counts["records"] += len(records)
    for record in records:
        if record.state in TERMINAL:
            counts[record.state] += 1
    runs = sum(effect.what == "begin" for effect in effects)
    counts["handler runs"] += runs
    counts["tasks run more than once"] += runs > 1
    recorded = {record.epoch for record in records if record.state != "working"}
    over = {effect.attempt for effect in effects if effect.what == "end"}
    counts["attempts that ended and are not recorded"] += len(over - recorded)
    ran = Counter(effect.name for effect in effects if effect.what == "ran")
    counts["steps run"] += sum(ran.values())
    counts["steps undone"] += len({one.name for one in effects if one.what == "undid"})
    counts["steps run more than once, not recorded before"] += sum(count > 1 for count in ran.values())
