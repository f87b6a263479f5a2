"""What an agent can be sent, as an AsyncAPI 3.0 document: its subjects, and the schemas of what is sent.

Everything stands in the code and the configuration; no broker and no identity is needed. Events are those
that the agent hears: which ones a handler publishes can't be seen from outside. An address is a NATS subject,
so where a pattern is heard, it ends in ``>``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from inspect import cleandoc
from typing import Any, Final
from urllib.parse import urlsplit

from agentweave_bus.agent.agent import SecureAgent
from agentweave_bus.agent.asyncapi_schemas import Schemas
from agentweave_bus.agent.dispatch import BoundCapability
from agentweave_bus.agent.events import EventHandler
from agentweave_bus.bus.responder import QUEUE_GROUP
from agentweave_bus.bus.subjects import Family, Priority, agent_prefix, call_subject, task_subject
from agentweave_bus.config import BusConfig
from agentweave_bus.envelope.envelope import JSON_CONTENT_TYPE
from agentweave_bus.tasks.approving import APPROVE, REJECT
from agentweave_bus.tasks.controls import CANCEL

__all__ = ["describe_agent"]

_BINDING: Final = "0.1.0"  # of NATS
_DIGITS: Final = 12
_PACKAGE: Final = __name__.partition(".")[0]
_NUMBER: Final = {"description": "counted from 0"}
_SUBMITTER: Final = {
    "domain": {
        "description": "the submitter's trust domain, '=' for '.'",
        "location": "$message.header#/aud",
    },
    "submitter": {"description": "the path of its SPIFFE ID without the first '/', '=' for '.'"},
    "key": {"description": "SHA-256 of submitter, agent, capability and task id: 64 hexadecimal digits"},
    "number": _NUMBER,
}


def describe_agent(agent: SecureAgent) -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document of an agent, as JSON values.

    Its version is a digest of the rest: it changes when what can be sent, or where, does.
    """
    body = _Document(agent).to_json()
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:_DIGITS]
    about = agent.config.agent
    info = {
        "title": about.name,
        "version": digest,
        "description": about.description or _docstring(type(agent)) or f"Agent {about.name}.",
    }
    return {"asyncapi": "3.0.0", "id": str(about.spiffe_id), "info": info, **body}


class _Document:
    def __init__(self, agent: SecureAgent) -> None:
        self._agent = agent
        self._me = agent.config.agent.spiffe_id
        self._schemas = Schemas()
        self._messages: dict[str, Any] = {}
        self._channels: dict[str, Any] = {}
        self._operations: dict[str, Any] = {}

    def to_json(self) -> dict[str, Any]:
        self._add_shared()
        for bound in self._agent.capability_table.values():
            self._add_capability(bound)
        for handler in self._agent.event_handlers:
            self._add_event(handler)
        return {
            "defaultContentType": JSON_CONTENT_TYPE,
            "servers": dict(_servers(self._agent.config.bus)),
            "channels": self._channels,
            "operations": self._operations,
            "components": {
                "messages": self._messages,
                "schemas": self._schemas.all,
                "securitySchemes": {
                    "svid": {
                        "type": "X509",
                        "description": "The client's X.509-SVID, in TLS; what the broker permits follows from"
                        " it. Each envelope is signed with the same key.",
                    }
                },
            },
        }

    # --- what all agents have -----------------------------------------------------------------------

    def _add_shared(self) -> None:
        for name, kind in (("result", "reply"), ("refusal", "refusal"), ("progress", "progress")):
            self._message(name, kind, name)
        self._message("record", "record", "record", title="a state of a task")
        self._message("cancel", "control", "cancel")
        self._message("decision", "control", "decision", title="yes or no to a task that waits for it")
        self._channel(
            "answers",
            f"aw.{Family.INBOX}.{{domain}}.{{caller}}.{{instance}}.rpc.{{id}}",
            ("result", "refusal"),
            description="Where the answer to a call goes: a subject of the caller's for each.",
            parameters={
                "domain": {"description": "the caller's trust domain, '=' for '.'"},
                "caller": {"description": "the path of its SPIFFE ID without the first '/', '=' for '.'"},
                "instance": {"location": "$message.header#/reply"},
                "id": {"location": "$message.header#/id"},
            },
        )
        slots = "{domain}.{submitter}.{key}.{number}"
        self._channel(
            "records",
            f"{agent_prefix(Family.STATE, self._me)}.{slots}",
            ("record",),
            description="The log of each task: one record for each state. The first final one counts.",
            parameters=_SUBMITTER,
        )
        self._channel(
            "progress",
            f"{agent_prefix(Family.PROGRESS, self._me)}.{slots}",
            ("progress",),
            description="How far a task is, and parts of its result.",
            parameters=_SUBMITTER,
        )
        self._operation("tell.progress", "send", "progress", ("progress",))
        self._control(CANCEL, "cancel", "Cancels a task; every replica hears it.")
        self._control(APPROVE, "decision", "Lets a task go on that waits for an approval.")
        self._control(REJECT, "decision", "Ends a task that waits for an approval.")

    def _control(self, verb: str, message: str, summary: str) -> None:
        name = f"control.{verb}"
        self._channel(name, f"{agent_prefix(Family.CONTROL, self._me)}.{verb}", (message,))
        self._operation(name, "receive", name, (message,), summary=summary)

    # --- what this one has --------------------------------------------------------------------------

    def _add_capability(self, bound: BoundCapability) -> None:
        schema = f"arguments.{bound.name}"
        self._schemas.add(schema, bound.schema)
        about: dict[str, Any] = {"summary": bound.description} if bound.description else {}
        for kind in ("call", "task"):
            self._message(f"{kind}.{bound.name}", kind, schema, content_type=bound.content_type, **about)
        call, task = f"call.{bound.name}", f"task.{bound.name}"
        self._channel(call, call_subject(self._me, bound.name), (call,))
        binding = {"nats": {"queue": QUEUE_GROUP, "bindingVersion": _BINDING}}
        answers = ("answers", "result", "refusal")
        self._operation(call, "receive", call, (call,), reply=answers, bindings=binding, **about)
        queues = [task_subject(self._me, bound.name, one).rpartition(".")[2] for one in Priority]
        self._channel(
            task,
            f"{agent_prefix(Family.TASK, self._me)}.{{queue}}",
            (task,),
            description="Durable tasks: stored when the broker has acknowledged them.",
            parameters={
                "queue": {
                    "description": "priority 7 to 9, 4 to 6 (and none), 0 to 3",
                    "enum": queues,
                    "default": bound.name,
                }
            },
        )
        self._operation(task, "receive", task, (task,), **about, reply=("records", "record"))

    def _add_event(self, handler: EventHandler) -> None:
        pattern, bound = handler.spec.pattern, handler.bound
        name = f"event.{pattern.replace('*', 'all')}"
        while name in self._channels:  # one pattern may be heard twice: durably and live
            name += "-live"
        schema = f"data.{name}"
        self._schemas.add(schema, bound.schema)
        about: dict[str, Any] = {"summary": bound.description} if bound.description else {}
        self._message(name, "event", schema, content_type=bound.content_type, **about)
        heard = f"{pattern[:-1]}>" if pattern.endswith("*") else pattern
        self._channel(
            name,
            f"aw.{Family.EVENT}.{{domain}}.{{publisher}}.{heard}",
            (name,),
            description=f"Events {pattern}, of publishers that the grants name; {_how(handler)}.",
            parameters={
                "domain": {"description": "the publisher's trust domain, '=' for '.'"},
                "publisher": {"description": "the path of its SPIFFE ID without the first '/', '=' for '.'"},
            },
        )
        self._operation(name, "receive", name, (name,), **about)

    # --- parts --------------------------------------------------------------------------------------

    def _message(
        self, name: str, kind: str, schema: str, *, content_type: str = JSON_CONTENT_TYPE, **about: Any
    ) -> None:
        head = {"$ref": "#/components/schemas/head"}
        self._messages[name] = {
            "name": name,
            **about,
            "contentType": content_type,
            "headers": {"allOf": [head, {"type": "object", "properties": {"kind": {"const": kind}}}]},
            "payload": {"$ref": f"#/components/schemas/{schema}"},
        }

    def _channel(self, name: str, address: str, messages: Iterable[str], **more: Any) -> None:
        refs = {one: {"$ref": f"#/components/messages/{one}"} for one in messages}
        self._channels[name] = {"address": address, "messages": refs, **more}

    def _operation(
        self,
        name: str,
        action: str,
        channel: str,
        messages: Iterable[str],
        *,
        reply: tuple[str, ...] = (),
        **more: Any,
    ) -> None:
        made: dict[str, Any] = {"action": action, **_in_channel(channel, messages), **more}
        if reply:
            made["reply"] = _in_channel(reply[0], reply[1:])
        self._operations[name] = made


def _in_channel(channel: str, messages: Iterable[str]) -> dict[str, Any]:
    return {
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{one}"} for one in messages],
    }


def _how(handler: EventHandler) -> str:
    if handler.spec.durable:
        return "durable, one at a time in their order" if handler.spec.ordered else "durable"
    return "while it runs, by every replica" if handler.spec.every else "while it runs"


def _docstring(agent: type[SecureAgent]) -> str:
    """Return what an agent's class says of itself; of what this package says of its own classes nothing."""
    for one in agent.__mro__:
        if issubclass(one, SecureAgent) and one.__module__.partition(".")[0] != _PACKAGE and one.__doc__:
            return cleandoc(one.__doc__)
    return ""


def _servers(bus: BusConfig) -> Iterable[tuple[str, Mapping[str, Any]]]:
    default = "" if "servers" in bus.model_fields_set else " The configuration names none: it is the default."
    for number, url in enumerate(bus.servers, 1):
        yield (
            f"broker-{number}",
            {
                "host": urlsplit(url).netloc,
                "protocol": "nats",
                "description": f"TLS, with SVIDs on both sides.{default}",
                "security": [{"$ref": "#/components/securitySchemes/svid"}],
            },
        )
