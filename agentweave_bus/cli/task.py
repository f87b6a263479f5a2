"""``agentweave task``: where the tasks stand that one has submitted; watching and cancelling them."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread

from agentweave_bus.cli.client_config import add_identity_arguments, find_client_config
from agentweave_bus.cli.commands import add_command
from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import message, print_result, table, wants_json
from agentweave_bus.cli.task_drawing import Drawing, moment, pass_told, schedule_in_words
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import UnreachableError
from agentweave_bus.observability.printable import escape_json, escape_line
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.runtime.operators import Operator
from agentweave_bus.tasks.handle import TaskHandle, TaskReference
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.status import TaskStatus
from agentweave_bus.tasks.submitted import SubmittedTask, submission_of, submitted_tasks
from agentweave_bus.types import TaskState

__all__ = [
    "add_arguments",
    "run_approve",
    "run_cancel",
    "run_get",
    "run_list",
    "run_reject",
    "run_watch",
]

T = TypeVar("T")

_EXAMPLE: Final = "'spiffe://shop.test/agent/order#create_order/01890a5d-ac96-774b-bcce-b302099a8057'"
_GET_EPILOG: Final = f"Example:\n  agentweave task get {_EXAMPLE}\n"
_WATCH_EPILOG: Final = f"""\
Example:
  agentweave task watch {_EXAMPLE}

In a pipe, and with --json, each event is a line of JSON. The last one's cursor, given as --after, goes on
behind it. The exit code is the task's: 0 completed, 1 failed or cancelled, 3 rejected.
"""
_CANCEL_EPILOG: Final = f"""\
Example:
  agentweave task cancel {_EXAMPLE} --reason "ordered twice"

It waits until the task has ended. The exit code is 0 if it was cancelled, 1 if it ended otherwise.
"""
_DECIDE_EPILOG: Final = f"""\
Example:
  agentweave task {{0}} {_EXAMPLE[:-1]}@spiffe://shop.test/client/cli' --reason "{{1}}"

Of a task that somebody else has submitted the reference says who: @ and its SPIFFE ID behind it, as
`task get` prints it. Who may is named by the policy that asks for the approval, and is an operator who may
control:{{0}}.
"""
_LIST_EPILOG: Final = """\
Example:
  agentweave task list
  agentweave task list --limit 100 --json

It lists what was submitted as this identity from this machine, by its audit log; the newest last.
"""
_UNKNOWN: Final = (
    "no such task is known: nothing is recorded of it, and its submission is not in this identity's audit log"
    " here. Is the reference right? One that was submitted elsewhere and waits for a worker looks the same."
)
_AT_ONCE: Final = 16
_CODES: Final = {TaskState.COMPLETED: ExitCode.DONE, TaskState.REJECTED: ExitCode.DENIED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the commands."""
    parser.epilog = f"Example:\n  agentweave task get {_EXAMPLE}\n"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    get = add_command(commands, "get", "say where a task stands", _GET_EPILOG)
    watch = add_command(commands, "watch", "follow a task until it has ended", _WATCH_EPILOG)
    watch.add_argument("--after", metavar="CURSOR", help="only what comes behind this event")
    cancel = add_command(commands, "cancel", "cancel a task, queued or running", _CANCEL_EPILOG)
    cancel.add_argument("--reason", default="", metavar="TEXT", help="why; its record will say so")
    cancel.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="until it has ended (default: 60)"
    )
    approve = _add_decision(commands, "approve", "approve of a task that waits for it", "a good customer")
    reject = _add_decision(commands, "reject", "end a task that waits for approval", "too much")
    for command, run in (
        (get, run_get),
        (watch, run_watch),
        (cancel, run_cancel),
        (approve, run_approve),
        (reject, run_reject),
    ):
        command.add_argument("reference", metavar="REFERENCE", help="what `submit` printed")
        command.set_defaults(run=run)
    listing = add_command(commands, "list", "list the tasks submitted from here", _LIST_EPILOG)
    listing.add_argument(
        "--limit", type=int, default=20, metavar="COUNT", help="at most so many (default: 20)"
    )
    listing.set_defaults(run=run_list)
    for command in (get, watch, cancel, approve, reject, listing):
        command.add_argument("--json", action="store_true", help="as JSON also in a terminal")
        add_identity_arguments(command)


def _add_decision(commands: Any, verb: str, what: str, why: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = add_command(commands, verb, what, _DECIDE_EPILOG.format(verb, why))
    command.add_argument("--reason", default="", metavar="TEXT", help="why; its record will say so")
    command.add_argument(
        "--timeout", type=float, default=10.0, metavar="SECONDS", help="until it is heeded (default: 10)"
    )
    return command


def run_get(options: argparse.Namespace) -> int:
    """Print a task's status."""

    async def get(handle: TaskHandle) -> TaskStatus:
        return await handle.status()

    status = _with_handle(options, get)
    if not options.known and status.since_ms is None:
        facts = {"reference": options.reference, "state": "unknown", "message": _UNKNOWN}
        print_result(facts, "unknown", json_wanted=options.json)
        return ExitCode.FAILED
    _print_status(options, status)
    return ExitCode.DONE


def run_watch(options: argparse.Namespace) -> int:
    """Print a task's events as they come."""

    async def watch(handle: TaskHandle) -> TaskState | None:
        with suppress(UnreachableError):  # then it is waited for
            if not options.after and (waits := schedule_in_words(await handle.status())):
                message(escape_line(f"agentweave: {waits}"))
        drawing, last = None if wants_json(options.json) else Drawing(), None
        try:
            async for event in handle.events(after=options.after):
                last = event.state or last
                named = {} if event.approval is None else {"full_reference": handle.full_reference}
                if drawing is None:
                    print(escape_json(json.dumps(event.to_json() | named, ensure_ascii=False)), flush=True)
                else:
                    drawing.show(event)
                    if named:  # whoever may is somebody else, who has to name whose task it is
                        message(f"agentweave: {_how_to_approve(handle.full_reference)}")
        finally:
            if drawing is not None:
                drawing.end()
        # Whoever watches from behind the end sees no state, so it is asked for.
        return last if last is not None and last.terminal else (await handle.status()).state

    return _code(_with_handle(options, watch))


def run_cancel(options: argparse.Namespace) -> int:
    """Cancel a task and print how it ended."""

    async def cancel(handle: TaskHandle) -> TaskStatus:
        return await handle.cancel(options.reason, timeout=options.timeout)

    status = _cancelled_as_operator(options) if _is_of_another(options) else _with_handle(options, cancel)
    _print_status(options, status)
    if status.state is TaskState.CANCELED:
        return ExitCode.DONE
    message(f"agentweave: it was not cancelled: it had ended already ({status.state.value})")
    return ExitCode.FAILED


def _is_of_another(options: argparse.Namespace) -> bool:
    """Say whether it is somebody else's task, whose records the broker does not show to this identity."""
    sender = TaskReference.parse(options.reference).sender
    return sender is not None and sender != find_client_config(options).agent.spiffe_id


def _cancelled_as_operator(options: argparse.Namespace) -> TaskStatus:
    async def cancelled() -> TaskStatus:
        try:
            async with Operator(find_client_config(options)) as calls:
                return await calls.cancel(options.reference, options.reason, timeout=options.timeout)
        except BaseExceptionGroup as group:
            raise single_error(group) from group

    return asyncio.run(cancelled())


def run_approve(options: argparse.Namespace) -> int:
    """Approve of a task and print where it stands then."""

    async def approve(handle: TaskHandle) -> TaskStatus:
        return await handle.approve(options.reason, timeout=options.timeout)

    _print_status(options, _with_handle(options, approve))
    return ExitCode.DONE


def run_reject(options: argparse.Namespace) -> int:
    """Reject a task and print where it stands then."""

    async def reject(handle: TaskHandle) -> TaskStatus:
        return await handle.reject(options.reason, timeout=options.timeout)

    _print_status(options, _with_handle(options, reject))
    return ExitCode.DONE


def run_list(options: argparse.Namespace) -> int:
    """Print what was submitted, and where it stands."""
    rows = asyncio.run(_list(find_client_config(options), max(0, options.limit)))
    if not rows:
        message("agentweave: no task was submitted as this identity from here, by its audit log.")
    due = [_due(row) for row in rows]
    columns = [
        ("STATE", *(row["state"] for row in rows)),
        ("SUBMITTED", *(moment(row["submitted"]) for row in rows)),
        *([("DUE", *due)] if any(due) else []),  # most tasks are due at once
        ("REFERENCE", *(row.get("full_reference", row["reference"]) for row in rows)),
    ]
    lines = zip(*columns, strict=True)
    print_result(rows, table(lines, indent=""), json_wanted=options.json)
    return ExitCode.DONE


def _code(state: TaskState | None) -> ExitCode:
    return ExitCode.FAILED if state is None else _CODES.get(state, ExitCode.FAILED)


def _due(row: dict[str, Any]) -> str:
    """Say in a table when a task is due and how it comes again."""
    due = moment(row["due_at"]) if "due_at" in row else ""
    return escape_line(", ".join(filter(None, (due, f"every {row['every']}" if "every" in row else ""))))


def _print_status(options: argparse.Namespace, status: TaskStatus) -> None:
    said = f": {status.message}" if status.message else ""
    if status.since_ms is None:
        said = ": nothing is recorded of it yet"
    error = f": {status.result.error}" if status.result is not None and status.result.error else ""
    told = pass_told(status.attempt, undoing=status.undoing)
    attempt = f", {told}" if told else ""
    since = f", since {moment(status.since_ms)}" if status.since_ms is not None else ""
    again = f", tried again at {moment(status.retry_at)}" if status.retry_at is not None else ""
    text = escape_line(f"{status.state.value}{attempt}{since}{again}{said or error}")
    if waits := schedule_in_words(status):
        text += f"\n{escape_line(waits)}"
    if (last := status.last_occurrence) is not None:
        text += f"\nlast: {last.state.value}, that of {moment(last.at_ms)}: {last.reference}"
    if status.result is not None and status.result.data is not None:
        text += "\n" + json.dumps(status.result.data, indent=2, ensure_ascii=False, default=str)
    if status.approval is not None:
        who = " or ".join(status.approval["approvers"])
        text += "\n" + escape_line(f"until {moment(status.approval['until'])} {who} may say")
        text += f"\n  {_how_to_approve(options.full_reference)}"
        if "payload" in status.approval:
            asked = json.dumps(status.approval["payload"], indent=2, ensure_ascii=False, default=str)
            text += f"\nto {asked}"
    facts = {"reference": options.reference, **status.to_json()}
    if status.approval is not None:
        facts |= {"full_reference": options.full_reference}
    print_result(facts, text, json_wanted=options.json)


def _how_to_approve(full_reference: str) -> str:
    return f"agentweave task approve '{full_reference}'"


def _with_handle(options: argparse.Namespace, use: Callable[[TaskHandle], Awaitable[T]]) -> T:
    """Connect and do something with the handle of the task that is named."""
    TaskReference.parse(options.reference)  # before anything is connected
    config = find_client_config(options)

    async def used() -> T:
        async with _connected(config) as client:
            handle = client.task(options.reference)
            options.full_reference = handle.full_reference
            options.known = await _is_known(config, handle)
            return await use(handle)

    return asyncio.run(used())


async def _is_known(config: AgentConfig, handle: TaskHandle) -> bool:
    """Say whether there is anything to show of a task; if not, it is told that its reference may be wrong."""
    reference = TaskReference.parse(handle.full_reference)
    assert reference.sender is not None  # it is a full one
    ref = TaskRef(reference.target, reference.sender, reference.capability, reference.id)
    if await anyio.to_thread.run_sync(submission_of, config.authorization.audit.path, ref) is not None:
        return True
    known = (await handle.status()).since_ms is not None
    if not known:
        message(f"agentweave: {_UNKNOWN}")
    return known


@asynccontextmanager
async def _connected(config: AgentConfig) -> AsyncIterator[AgentWeaveClient]:
    try:
        async with AgentWeaveClient(config) as client:
            yield client
    except BaseExceptionGroup as group:
        raise single_error(group) from group


async def _list(config: AgentConfig, limit: int) -> list[dict[str, Any]]:
    async with _connected(config) as client:
        log = config.authorization.audit.path
        tasks = (await anyio.to_thread.run_sync(submitted_tasks, log, client.spiffe_id))[-limit:]
        places = asyncio.Semaphore(_AT_ONCE)
        return await asyncio.gather(*(_row(client, one, places) for one in tasks if limit))


async def _row(client: AgentWeaveClient, task: SubmittedTask, places: asyncio.Semaphore) -> dict[str, Any]:
    reference = str(TaskReference(task.ref.agent, task.ref.capability, task.ref.id))
    row: dict[str, Any] = {"reference": reference, "submitted": task.at_ms, "digest": task.digest.hex()}
    handle = client.task(reference)
    async with places:
        try:
            status = await handle.status()
        except UnreachableError as error:
            return row | {"state": "unknown", "message": str(error)}
    if status.approval is not None:
        row |= {"full_reference": handle.full_reference}
    return row | status.to_json()
