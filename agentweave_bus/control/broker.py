"""What the broker lets each identity do, generated from the grants.

The broker knows each client by the SPIFFE ID in its certificate (``verify_and_map``), one user per ID.
An agent may publish to the call and task subjects that the grants give it, to the answer inboxes of those
who may call it, and to its own claims, states, progress and dead letters; nothing else. It may pull from its
own queue only. It may subscribe to its own subjects only, and read what is recorded of the tasks that are
its own by either end: those that it does, and those that it submitted. It may publish those of its own events
that somebody may receive, and receive, live or by its own consumers, those that it was granted. Nobody is let
in without a user (there is no ``no_auth_user``), and no agent may make, change or remove a stream or a
consumer.

The broker's own way of permitting answers, ``allow_responses``, is not used: it lets whoever received a
message publish to that message's reply subject, and the sender chose that freely. Two agents that work
together could so reach any subject, JetStream's API among them. Inboxes can't be guessed instead
(``bus/subjects.py``), and answers are signed.

The broker is the second line: every envelope is verified and authorized by its receiver whatever the
broker lets pass.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from agentweave_bus.authz import Grants
from agentweave_bus.authz.grants import pattern_matches
from agentweave_bus.bus.streams import (
    PARKED_CONSUMER,
    blob_stream_name,
    claim_stream_name,
    dead_stream_name,
    event_consumer_name,
    events_stream_name,
    progress_stream_name,
    state_stream_name,
    tasks_stream_name,
    wakeups_stream,
)
from agentweave_bus.bus.subjects import (
    ANNOUNCEMENTS,
    Family,
    Priority,
    agent_prefix,
    announce_subject,
    api_inbox,
    blobs_of,
    call_subject,
    control_subject,
    event_pattern_subject,
    progress_of_sender,
    pull_inbox,
    records_of_sender,
    reply_inbox,
    task_subject,
    wakeups_prefix,
)
from agentweave_bus.names import CAPABILITY_NAME
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.operator_acts import OPERATOR_CAPABILITIES, capabilities_of

__all__ = [
    "BrokerFiles",
    "broker_configuration",
    "broker_id",
    "broker_users",
    "event_publishers",
    "permissions_of",
    "users_configuration",
]

_MAX_STORE_BYTES: Final = 4 * 1024**4
"""What all queues together may reserve; each reserves all that it may ever hold, and most never do."""

_MAX_SUBSCRIPTIONS: Final = 1024
"""For each connection: one a capability, and a few inboxes."""

DEFAULT_SYNC: Final = "1s"

_PING_INTERVAL: Final = "15s"
_PINGS_UNANSWERED: Final = 2
"""A client that says nothing, and answers none of so many pings, is dropped after a minute at most. Until
then a replica that hangs, or that a partition cut off, gets its share of the calls."""

_PATIENCE: Final = "12h"

_EVERYTHING: Final = {"publish": {"allow": [">"]}, "subscribe": {"allow": [">"]}}

_CONTROL_API: Final = ("$JS.API.INFO", "$JS.API.STREAM.>", "$JS.API.CONSUMER.>", "$JS.API.DIRECT.GET.*")
_CONTROL_FAMILIES: Final = (Family.TASK, Family.STATE, Family.DEAD)
"""What it publishes about tasks that were parked: when they are due, and what became of those it refuses."""
_HEEDED: Final = ("cancel", "approve", "reject")
"""What an agent can be told to do with a task of its own."""


@dataclass(frozen=True, slots=True)
class BrokerFiles:
    """Where a broker finds its certificate chain, key and peers' authorities (PEM), and keeps its streams."""

    certificate: Path
    key: Path
    authorities: Path
    store: Path


def broker_id(trust_domain: str) -> SpiffeID:
    """Return the identity that the brokers of a trust domain must show."""
    return SpiffeID.of(trust_domain, "agentweave", "broker")


def broker_configuration(
    name: str,
    files: BrokerFiles,
    users: Iterable[Mapping[str, Any]],
    *,
    sync: str = DEFAULT_SYNC,
    patient: bool = False,
) -> str:
    """Return the configuration of the server ``name``, as JSON, which nats-server's format includes.

    ``sync`` is how often what was stored is forced to the disk (``1s``), or ``always``, before it is
    acknowledged. It matters when the machine loses its power, not when the server is killed. A ``patient``
    server waits hours for a client that says nothing and takes nothing: a debugger may be holding it.
    """
    return json.dumps(
        {
            "server_name": name,
            "max_control_line": 8192,
            "max_subscriptions": _MAX_SUBSCRIPTIONS,
            "write_deadline": _PATIENCE if patient else "5s",
            "ping_interval": _PATIENCE if patient else _PING_INTERVAL,
            "ping_max": _PINGS_UNANSWERED,
            "tls": {
                "cert_file": str(files.certificate),
                "key_file": str(files.key),
                "ca_file": str(files.authorities),
                "verify_and_map": True,
                "handshake_first": True,
                "min_version": "1.3",
                "timeout": 5,
            },
            "jetstream": {
                "store_dir": str(files.store),
                "max_file_store": _MAX_STORE_BYTES,
                "sync_interval": sync,
            },
            "authorization": {"timeout": 5, "users": list(users)},
        },
        indent=2,
    )


def users_configuration(users: Iterable[Mapping[str, Any]], *, comment: str = "") -> str:
    """Return the users alone, as a file that a server's own configuration includes; a line for each user.

    The same users give the same text.
    """
    head = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines = (f"    {json.dumps(user)}" for user in users)
    body = "authorization {\n  timeout: 5\n  users: [\n" + ",\n".join(lines) + "\n  ]\n}\n"
    return "\n".join((*head, body))


def broker_users(
    grants: Grants,
    identities: Iterable[SpiffeID],
    *,
    control: Iterable[SpiffeID],
    unrestricted: Iterable[SpiffeID] = (),
    controlled: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Return the broker's users: every identity with what the grants give it, and the control roles.

    ``controlled`` are trust domains beside their own for which those bring tasks back.

    ``unrestricted`` may do anything at the broker; for tests that play a compromised one.
    """
    everyone = sorted(set(identities))
    users = []
    operators = set()
    roles = sorted(set(control))
    for one in everyone:
        allowed = permissions_of(one, grants, everyone)
        if asks := capabilities_of(partial(grants.operator_may, one)):
            operators.add(one)
            allowed["publish"]["allow"] += _asked(roles, asks)
        users.append(_user(one, allowed))
    domains = set(controlled)
    users += [_user(one, _control_permissions(one, domains, operators)) for one in roles]
    return users + [_user(one, _EVERYTHING) for one in sorted(set(unrestricted))]


def permissions_of(identity: SpiffeID, grants: Grants, everyone: Iterable[SpiffeID]) -> dict[str, Any]:
    """Return what the broker lets ``identity`` publish and subscribe to.

    ``everyone`` are the identities that have a user: a caller prefix in a grant means those below it.
    """
    publish = {
        f"$JS.API.STREAM.INFO.{claim_stream_name(identity)}",
        f"{agent_prefix(Family.CLAIM, identity)}.*",
    }
    for reach in grants.callees_of(identity):
        callee = SpiffeID(reach.agent)
        if "call" in reach.kinds:
            publish.update(_each(Family.CALL, callee, reach.capabilities))
        if "task" in reach.kinds:
            publish.update(_queues(callee, reach.capabilities))
            publish.update(_each(Family.PARK, callee, reach.capabilities))
            publish.update(_about_submitted_to(callee, identity))
        if "event" in reach.kinds:
            publish.update(event_pattern_subject(identity, one) for one in reach.capabilities)
            publish.add(f"$JS.API.STREAM.INFO.{events_stream_name(identity)}")
    publish.update(_about_approvals(identity, grants, everyone))
    if grants.operator_may(identity, "control:cancel"):
        publish.update(control_subject(one, "cancel") for one in everyone)
    publish.update(reply_inbox(caller, "*") + ".*" for caller in _callers(identity, grants, everyone))
    publish.update(_about_own_tasks(identity))
    publish.update(_blobs_for(identity, one) for one in _callers(identity, grants, everyone, "task"))
    events: set[str] = set()
    for publisher, patterns in event_publishers(identity, grants, everyone):
        publish.update(_about_events_of(publisher, identity))
        events.update(event_pattern_subject(publisher, one) for one in patterns)
    subscribe = [
        f"{agent_prefix(Family.CALL, identity)}.*",
        *(control_subject(identity, verb) for verb in _HEEDED),
        records_of_sender(identity),
        progress_of_sender(identity),
        *events,
        *_inboxes(identity),
        pull_inbox(identity, "*") + ".*",
    ]
    return {"publish": {"allow": sorted(publish)}, "subscribe": {"allow": sorted(subscribe)}}


def _each(family: Family, callee: SpiffeID, capabilities: Iterable[str]) -> Iterator[str]:
    prefix = agent_prefix(family, callee)
    return (f"{prefix}.{capability}" for capability in capabilities)


def _queues(callee: SpiffeID, capabilities: Iterable[str]) -> Iterator[str]:
    """Yield the subjects on which tasks are queued, of every priority; all of them have one token more."""
    for capability in capabilities:
        if capability == "*":
            yield f"{agent_prefix(Family.TASK, callee)}.*"
        elif CAPABILITY_NAME.fullmatch(capability):  # a grant may name events, too
            yield from (task_subject(callee, capability, priority) for priority in Priority)


def _about_own_tasks(me: SpiffeID) -> Iterator[str]:
    """Yield where a worker pulls, acknowledges and records, and where it reads what it recorded."""
    queue = tasks_stream_name(me)
    yield f"$JS.API.CONSUMER.MSG.NEXT.{queue}.*"
    yield f"$JS.API.CONSUMER.INFO.{queue}.*"  # how many tasks wait
    # Not the longer form with domain and account in front ($JS.ACK.*.*.<stream>…): a pattern for that covers
    # acknowledgements of anybody's tasks in the short form, and so lets them be thrown away.
    yield f"$JS.ACK.{queue}.*.>"
    for family in (Family.STATE, Family.PROGRESS, Family.DEAD, Family.BLOB):
        yield f"{agent_prefix(family, me)}.>"
    yield announce_subject(me)
    yield f"$JS.API.DIRECT.GET.{state_stream_name(me)}.{agent_prefix(Family.STATE, me)}.>"
    yield f"$JS.API.DIRECT.GET.{progress_stream_name(me)}.{agent_prefix(Family.PROGRESS, me)}.>"
    yield f"$JS.API.DIRECT.GET.{blob_stream_name(me)}.{agent_prefix(Family.BLOB, me)}.>"
    yield f"$JS.API.DIRECT.GET.{dead_stream_name(me)}.{agent_prefix(Family.DEAD, me)}.>"


def _about_submitted_to(callee: SpiffeID, sender: SpiffeID) -> Iterator[str]:
    """Yield where a submitter cancels, and reads what ``callee`` recorded of its tasks and no others'."""
    yield control_subject(callee, "cancel")
    yield _blobs_for(sender, callee)
    for name, family in (
        (state_stream_name(callee), Family.STATE),
        (progress_stream_name(callee), Family.PROGRESS),
    ):
        mine = agent_prefix(family, sender).removeprefix(f"aw.{family}.")
        yield f"$JS.API.DIRECT.GET.{name}.{agent_prefix(family, callee)}.{mine}.>"


def _about_approvals(approver: SpiffeID, grants: Grants, everyone: Iterable[SpiffeID]) -> Iterator[str]:
    """Yield where an approver decides, and reads what is recorded of the tasks that it may decide on."""
    verbs = [verb for verb in ("approve", "reject") if grants.operator_may(approver, f"control:{verb}")]
    for grant in grants.approvals_by(approver) if verbs else ():
        senders = [one for one in everyone if any(pattern_matches(item, one) for item in grant.caller)]
        for callee in map(SpiffeID, grant.callee):
            yield from (control_subject(callee, verb) for verb in verbs)
            state = f"$JS.API.DIRECT.GET.{state_stream_name(callee)}.{agent_prefix(Family.STATE, callee)}"
            for sender in senders:
                yield f"{state}.{agent_prefix(Family.STATE, sender).removeprefix('aw.state.')}.>"


def event_publishers(
    subscriber: SpiffeID, grants: Grants, everyone: Iterable[SpiffeID]
) -> Iterator[tuple[SpiffeID, tuple[str, ...]]]:
    """Yield whose events ``subscriber`` may receive, and which; one may come more than once."""
    for reach in grants.callers_of(subscriber):
        if "event" not in reach.kinds:
            continue
        if not reach.agent.endswith("/*"):
            yield SpiffeID(reach.agent), reach.capabilities
        else:
            yield from ((one, reach.capabilities) for one in everyone if pattern_matches(reach.agent, one))


def _about_events_of(publisher: SpiffeID, subscriber: SpiffeID) -> Iterator[str]:
    """Yield where a subscriber pulls and acknowledges, and where it sees which consumers it has."""
    stream = events_stream_name(publisher)
    for ordered in (False, True):
        mine = f"{stream}.{event_consumer_name(subscriber, ordered=ordered)}"
        yield f"$JS.API.CONSUMER.MSG.NEXT.{mine}"
        yield f"$JS.API.CONSUMER.INFO.{mine}"
        yield f"$JS.ACK.{mine}.>"


def _blobs_for(reader: SpiffeID, writer: SpiffeID) -> str:
    """Return where ``reader`` reads what ``writer`` has stored apart for it, and nothing for others."""
    return f"$JS.API.DIRECT.GET.{blob_stream_name(writer)}.{blobs_of(writer, reader)}.>"


def _callers(
    callee: SpiffeID, grants: Grants, everyone: Iterable[SpiffeID], kind: str = "call"
) -> set[SpiffeID]:
    patterns = [reach.agent for reach in grants.callers_of(callee) if kind in reach.kinds]
    named = {SpiffeID(pattern) for pattern in patterns if not pattern.endswith("/*")}
    return named | {one for one in everyone if any(pattern_matches(pattern, one) for pattern in patterns)}


def _asked(control: Iterable[SpiffeID], capabilities: Collection[str]) -> list[str]:
    """Return where operators ask the control roles for ``capabilities``."""
    return [call_subject(role, one) for role in control for one in capabilities]


def _control_permissions(
    identity: SpiffeID, domains: Iterable[str], operators: Iterable[SpiffeID]
) -> dict[str, Any]:
    """Return what the control role may; ``domains`` are those whose tasks it brings back."""
    wakeups = wakeups_stream(identity.trust_domain).name
    publish = [*_CONTROL_API, "$JS.API.DIRECT.GET.*.aw.state.>", "$JS.API.DIRECT.GET.*.aw.dead.>"]
    publish += [f"$JS.ACK.{wakeups}.*.>", f"$JS.ACK.*.{PARKED_CONSUMER}.>"]
    publish.append(f"{wakeups_prefix(identity.trust_domain)}.>")
    for domain in sorted({identity.trust_domain, *domains}):
        token = domain.replace(".", "=")
        publish += [f"aw.{family}.{token}.>" for family in _CONTROL_FAMILIES]
    publish += [reply_inbox(one, "*") + ".*" for one in sorted(operators)]
    subscribe = [ANNOUNCEMENTS, *_asked([identity], OPERATOR_CAPABILITIES)]
    subscribe += [*_inboxes(identity), pull_inbox(identity, "*") + ".*"]
    return {"publish": {"allow": publish}, "subscribe": {"allow": subscribe}}


def _inboxes(identity: SpiffeID) -> list[str]:
    return [api_inbox(identity, "*") + ".*", reply_inbox(identity, "*") + ".*"]


def _user(identity: SpiffeID, permissions: dict[str, Any]) -> dict[str, Any]:
    return {"user": str(identity), "permissions": permissions}
