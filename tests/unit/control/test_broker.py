"""The broker's users: what the grants say, nothing beside, and one user for each identity."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from agentweave_bus.authz import Grants
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.control.broker import (
    BrokerFiles,
    broker_configuration,
    broker_id,
    broker_users,
    permissions_of,
)
from agentweave_bus.envelope import control_role
from agentweave_bus.spiffe_id import SpiffeID

A, B, C = (SpiffeID(f"spiffe://x.test/agent/{name}") for name in "abc")


def grants(tmp_path: Path, *entries):
    path = tmp_path / "grants.yaml"
    path.write_text(yaml.safe_dump({"grants": list(entries)}))
    return Grants.load(path)


def entry(caller, callee, capabilities, **more):
    return {"caller": str(caller), "callee": str(callee), "capabilities": capabilities, **more}


def test_what_is_granted_may_be_published_and_nothing_else(tmp_path):
    given = grants(tmp_path, entry(A, B, ["pay", "ship"]), entry(C, A, ["x"]), entry(B, C, ["y"]))
    allowed = permissions_of(A, given, [A, B, C])
    assert set(allowed) == {"publish", "subscribe"}
    assert allowed["publish"] == {
        "allow": [
            f"$JS.API.STREAM.INFO.{claim_stream_name(A)}",
            "aw.call.x=test.agent/b.pay",
            "aw.call.x=test.agent/b.ship",
            "aw.claim.x=test.agent/a.*",
            "aw.inbox.x=test.agent/c.*.rpc.*",
        ]
    }
    assert allowed["subscribe"] == {
        "allow": [
            "aw.call.x=test.agent/a.*",
            "aw.inbox.x=test.agent/a.*.api.*",
            "aw.inbox.x=test.agent/a.*.rpc.*",
        ]
    }


def test_a_grant_for_tasks_gives_no_calls(tmp_path):
    given = grants(tmp_path, entry(A, B, ["pay"], kinds=["task"]))
    assert not [one for one in permissions_of(A, given, [A, B])["publish"]["allow"] if ".call." in one]
    assert not [one for one in permissions_of(B, given, [A, B])["publish"]["allow"] if ".inbox." in one]


def test_a_prefix_grant_holds_for_those_below_it(tmp_path):
    given = grants(tmp_path, entry("spiffe://x.test/agent/*", B, ["*"]))
    other = SpiffeID("spiffe://x.test/client/a")
    everyone = [A, B, other]
    assert "aw.call.x=test.agent/b.*" in permissions_of(A, given, everyone)["publish"]["allow"]
    assert "aw.call.x=test.agent/b.*" not in permissions_of(other, given, everyone)["publish"]["allow"]
    answers = [one for one in permissions_of(B, given, everyone)["publish"]["allow"] if ".inbox." in one]
    assert answers == ["aw.inbox.x=test.agent/a.*.rpc.*", "aw.inbox.x=test.agent/b.*.rpc.*"]


def test_one_user_each_and_nobody_may_create_consumers_but_the_control_role(tmp_path):
    control = control_role("x.test")
    users = broker_users(grants(tmp_path, entry(A, B, ["*"])), [B, A, A], control=[control])
    assert [one["user"] for one in users] == [str(A), str(B), str(control)]
    for user in users[:2]:
        text = json.dumps(user)
        assert "CONSUMER" not in text
        assert '">"' not in text
        assert "_INBOX" not in text
    assert "$JS.API.CONSUMER.>" in users[2]["permissions"]["publish"]["allow"]
    assert not [one for one in users[2]["permissions"]["publish"]["allow"] if one.startswith("aw.")]


def test_the_configuration_insists_on_verified_clients(tmp_path):
    files = BrokerFiles(tmp_path / "c", tmp_path / "k", tmp_path / "a", tmp_path / "s")
    config = json.loads(broker_configuration("one", files, broker_users(Grants(), [A], control=[])))
    assert config["tls"]["verify_and_map"] is True
    assert config["tls"]["handshake_first"] is True
    assert config["tls"]["min_version"] == "1.3"
    assert "no_auth_user" not in json.dumps(config)
    assert broker_id("x.test") == "spiffe://x.test/agentweave/broker"
