"""What the broker lets each identity do, generated from the grants.

The broker knows each client by the SPIFFE ID in its certificate (``verify_and_map``), one user per ID.
An agent may publish to the call subjects that the grants give it, to its own claims, and nothing else;
it answers by ``allow_responses``. It may subscribe to its own subjects only. Nobody is let in without a
user (there is no ``no_auth_user``), and no agent may create streams or consumers.

The broker is the second line: every envelope is verified and authorized by its receiver whatever the
broker lets pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agentweave_bus.authz import Grants
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["BrokerFiles", "broker_configuration", "broker_id", "broker_users", "permissions_of"]

_RESPONSES: Final = {"max": 2, "expires": "3630s"}
"""How often and how long an agent may answer what it received: the longest call and its slack."""

_MAX_STORE_BYTES: Final = 4 * 1024**3

_EVERYTHING: Final = {"publish": {"allow": [">"]}, "subscribe": {"allow": [">"]}}

_CONTROL_API: Final = ("$JS.API.INFO", "$JS.API.STREAM.>", "$JS.API.CONSUMER.>")


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


def broker_configuration(name: str, files: BrokerFiles, users: Iterable[Mapping[str, Any]]) -> str:
    """Return the configuration of the server ``name``, as JSON, which nats-server's format includes."""
    return json.dumps(
        {
            "server_name": name,
            "max_control_line": 8192,
            "write_deadline": "5s",
            "tls": {
                "cert_file": str(files.certificate),
                "key_file": str(files.key),
                "ca_file": str(files.authorities),
                "verify_and_map": True,
                "handshake_first": True,
                "min_version": "1.3",
                "timeout": 5,
            },
            "jetstream": {"store_dir": str(files.store), "max_file_store": _MAX_STORE_BYTES},
            "authorization": {"timeout": 5, "users": list(users)},
        },
        indent=2,
    )


def broker_users(
    grants: Grants,
    identities: Iterable[SpiffeID],
    *,
    control: Iterable[SpiffeID],
    unrestricted: Iterable[SpiffeID] = (),
) -> list[dict[str, Any]]:
    """Return the broker's users: every identity with what the grants give it, and the control roles.

    ``unrestricted`` may do anything at the broker; for tests that play a compromised one.
    """
    users = [_user(one, permissions_of(one, grants)) for one in sorted(set(identities))]
    users += [_user(one, _control_permissions(one)) for one in sorted(set(control))]
    return users + [_user(one, _EVERYTHING) for one in sorted(set(unrestricted))]


def permissions_of(identity: SpiffeID, grants: Grants) -> dict[str, Any]:
    """Return what the broker lets ``identity`` publish, subscribe to and answer."""
    publish = [
        f"$JS.API.STREAM.INFO.{claim_stream_name(identity)}",
        f"{agent_prefix(Family.CLAIM, identity)}.*",
    ]
    for reach in grants.callees_of(identity):
        if "call" in reach.kinds:
            callee = agent_prefix(Family.CALL, SpiffeID(reach.agent))
            publish += [f"{callee}.{capability}" for capability in reach.capabilities]
    return {
        "publish": {"allow": sorted(set(publish))},
        "subscribe": {"allow": [f"{agent_prefix(Family.CALL, identity)}.*", *_inboxes(identity)]},
        "allow_responses": _RESPONSES,
    }


def _control_permissions(identity: SpiffeID) -> dict[str, Any]:
    return {
        "publish": {"allow": list(_CONTROL_API)},
        "subscribe": {"allow": _inboxes(identity)},
    }


def _inboxes(identity: SpiffeID) -> list[str]:
    prefix = agent_prefix(Family.INBOX, identity)
    return [f"{prefix}.*.api.*", f"{prefix}.*.rpc.*"]


def _user(identity: SpiffeID, permissions: dict[str, Any]) -> dict[str, Any]:
    return {"user": str(identity), "permissions": permissions}
