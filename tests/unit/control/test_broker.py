"""The broker's users: what the grants say, nothing beside, and one user for each identity."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from agentweave_bus.authz import Grants
from agentweave_bus.authz.grants import Operator
from agentweave_bus.bus.streams import (
    blob_stream_name,
    claim_stream_name,
    dead_stream_name,
    event_consumer_name,
    events_stream_name,
    progress_stream_name,
    state_stream_name,
    tasks_stream_name,
)
from agentweave_bus.bus.subjects import wakeup_subject
from agentweave_bus.control.broker import (
    BrokerFiles,
    broker_configuration,
    broker_id,
    broker_users,
    permissions_of,
)
from agentweave_bus.envelope import control_role
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.memory_subjects import matches_any

A, B, C = (SpiffeID(f"spiffe://x.test/agent/{name}") for name in "abc")


def grants(tmp_path: Path, *entries):
    path = tmp_path / "grants.yaml"
    path.write_text(yaml.safe_dump({"grants": list(entries)}))
    return Grants.load(path)


def entry(caller, callee, capabilities, **more):
    return {"caller": str(caller), "callee": str(callee), "capabilities": capabilities, **more}


GET = "$JS.API.DIRECT.GET"
REDRIVES = ("dlq_list", "dlq_show", "dlq_redrive", "dlq_drop")
OBSERVES = ("observe_queues", "observe_records", "observe_task")
ME, OTHER = "x=test.agent/a", "x=test.agent/b"


def own(identity, token):
    """What everyone may publish about itself, with or without a grant."""
    queue = tasks_stream_name(identity)
    return {
        f"$JS.API.STREAM.INFO.{claim_stream_name(identity)}",
        f"$JS.API.CONSUMER.MSG.NEXT.{queue}.*",
        f"$JS.API.CONSUMER.INFO.{queue}.*",
        f"$JS.ACK.{queue}.*.>",
        f"{GET}.{state_stream_name(identity)}.aw.state.{token}.>",
        f"{GET}.{progress_stream_name(identity)}.aw.progress.{token}.>",
        f"{GET}.{dead_stream_name(identity)}.aw.dead.{token}.>",
        f"{GET}.{blob_stream_name(identity)}.aw.blob.{token}.>",
        f"aw.blob.{token}.>",
        f"aw.claim.{token}.*",
        f"aw.control.{token}.announce",
        f"aw.dead.{token}.>",
        f"aw.progress.{token}.>",
        f"aw.state.{token}.>",
    }


def published(identity, grants, everyone):
    return set(permissions_of(identity, grants, everyone)["publish"]["allow"])


def test_without_a_grant_there_is_only_ones_own(tmp_path):
    given = grants(tmp_path, entry(C, B, ["y"]))
    allowed = permissions_of(A, given, [A, B, C])
    assert set(allowed) == {"publish", "subscribe"}
    assert set(allowed["publish"]) == set(allowed["subscribe"]) == {"allow"}
    assert published(A, given, [A, B, C]) == own(A, ME)
    assert set(allowed["subscribe"]["allow"]) == {
        f"aw.call.{ME}.*",
        f"aw.control.{ME}.approve",
        f"aw.control.{ME}.cancel",
        f"aw.control.{ME}.reject",
        f"aw.inbox.{ME}.*.api.*",
        f"aw.inbox.{ME}.*.api.pull.*",
        f"aw.inbox.{ME}.*.rpc.*",
        f"aw.progress.*.*.{ME}.>",
        f"aw.state.*.*.{ME}.>",
    }


def test_a_call_that_is_granted_may_be_published_and_answered(tmp_path):
    given = grants(
        tmp_path,
        entry(A, B, ["pay", "ship"], kinds=["call"]),
        entry(C, A, ["x"], kinds=["call"]),
        entry(B, C, ["y"]),
    )
    assert published(A, given, [A, B, C]) - own(A, ME) == {
        f"aw.call.{OTHER}.pay",
        f"aw.call.{OTHER}.ship",
        "aw.inbox.x=test.agent/c.*.rpc.*",
    }


def test_a_task_that_is_granted_may_be_submitted_cancelled_and_watched(tmp_path):
    """Of what its callee records, a sender reads its own tasks."""
    given = grants(tmp_path, entry(A, B, ["pay", "ship"], kinds=["task"]), entry(C, B, ["pay"]))
    assert published(A, given, [A, B, C]) - own(A, ME) == {
        *(
            f"aw.task.{OTHER}.{name}{urgency}"
            for name in ("pay", "ship")
            for urgency in ("", "=high", "=low")
        ),
        f"aw.park.{OTHER}.pay",
        f"aw.park.{OTHER}.ship",
        f"aw.control.{OTHER}.cancel",
        f"{GET}.{state_stream_name(B)}.aw.state.{OTHER}.{ME}.>",
        f"{GET}.{progress_stream_name(B)}.aw.progress.{OTHER}.{ME}.>",
        f"{GET}.{blob_stream_name(B)}.aw.blob.{OTHER}.{ME}.>",
    }
    assert published(B, given, [A, B, C]) - own(B, OTHER) == {
        "aw.inbox.x=test.agent/c.*.rpc.*",
        f"{GET}.{blob_stream_name(A)}.aw.blob.{ME}.{OTHER}.>",
        f"{GET}.{blob_stream_name(C)}.aw.blob.x=test.agent/c.{OTHER}.>",
    }


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
        text = json.dumps(user).replace("CONSUMER.MSG.NEXT.tasks-", "")
        text = text.replace("CONSUMER.INFO.tasks-", "")
        assert "CONSUMER" not in text
        assert '">"' not in text
        assert "_INBOX" not in text
    permissions = users[2]["permissions"]
    assert "$JS.API.CONSUMER.>" in permissions["publish"]["allow"]
    assert {one for one in permissions["publish"]["allow"] if one.startswith("aw.")} == {
        "aw.task.x=test.>",  # of its own domain only
        "aw.state.x=test.>",
        "aw.dead.x=test.>",
        "aw.wakeup.x=test.>",
    }
    assert set(permissions["subscribe"]["allow"]) == {
        "aw.control.*.*.announce",
        *(f"aw.call.x=test.agentweave/control.{name}" for name in (*REDRIVES, *OBSERVES)),
        "aw.inbox.x=test.agentweave/control.*.api.*",
        "aw.inbox.x=test.agentweave/control.*.api.pull.*",
        "aw.inbox.x=test.agentweave/control.*.rpc.*",
    }


def test_operators_may_ask_the_control_role_for_what_they_may_do_and_nothing_beside(tmp_path):
    """And it may answer them. Who may do an act that is none of the control role's gets nothing by it."""
    control = control_role("x.test")

    def allowed(*operators):
        given = Grants.model_validate({"operators": operators})
        users = broker_users(given, [A, B, C], control=[control])
        return {one["user"]: set(one["permissions"]["publish"]["allow"]) for one in users}

    def asks(names):
        return {f"aw.call.x=test.agentweave/control.{name}" for name in names}

    before = allowed()
    after = allowed(
        {"who": str(A), "may": ["control:redrive"]},
        {"who": str(B), "may": ["control:observe"]},
        {"who": str(C), "may": ["control:drain", "control:watch"]},
    )
    assert after[A] - before[A] == asks(REDRIVES)
    assert after[B] - before[B] == asks(OBSERVES)
    assert after[C] == before[C]
    answers = {f"aw.inbox.x=test.agent/{name}.*.rpc.*" for name in "ab"}
    assert after[control] - before[control] == answers
    for role in (A, B, C, control):
        assert not before[role] - after[role]
    everybody = allowed({"who": "spiffe://x.test/agent/*", "may": ["control:*"]})
    assert all(asks([*REDRIVES, *OBSERVES]) <= everybody[one] for one in (A, B, C))


def test_who_may_cancel_says_so_to_every_agent_and_reads_nothing_of_their_tasks(tmp_path):
    given = Grants.model_validate({"operators": [{"who": str(A), "may": ["control:cancel"]}]})
    everyone = [A, B, C]
    more = published(A, given, everyone) - published(A, Grants(), everyone)
    assert more == {f"aw.control.x=test.agent/{name}.cancel" for name in "abc"}
    assert published(B, given, everyone) == published(B, Grants(), everyone)


def test_only_the_control_role_publishes_what_wakes_it(tmp_path):
    control = control_role("x.test")
    users = broker_users(grants(tmp_path, entry(A, B, ["*"], kinds=["task"])), [A, B], control=[control])
    wakeup = wakeup_subject("x.test", "plan", "a", 1)
    allowed = {user["user"]: matches_any(user["permissions"]["publish"]["allow"], wakeup) for user in users}
    assert allowed == {str(A): False, str(B): False, str(control): True}


def test_the_configuration_insists_on_verified_clients(tmp_path):
    files = BrokerFiles(tmp_path / "c", tmp_path / "k", tmp_path / "a", tmp_path / "s")
    config = json.loads(broker_configuration("one", files, broker_users(Grants(), [A], control=[])))
    assert config["tls"]["verify_and_map"] is True
    assert config["tls"]["handshake_first"] is True
    assert config["tls"]["min_version"] == "1.3"
    assert "no_auth_user" not in json.dumps(config)
    assert broker_id("x.test") == "spiffe://x.test/agentweave/broker"


class TestEvents:
    """Who publishes and who subscribes, as the grants of kind ``event`` say."""

    def permissions(self, tmp_path: Path, identity: SpiffeID):
        given = grants(
            tmp_path,
            entry(A, B, ["order.*", "alone"], kinds=["event"]),
            entry("spiffe://x.test/client/*", B, ["*"], kinds=["event"]),
            entry(A, C, ["order.paid"], kinds=["call", "task"]),
        )
        everyone = [A, B, C, SpiffeID("spiffe://x.test/client/cli")]
        return permissions_of(identity, given, everyone)

    def test_a_publisher_publishes_what_somebody_may_receive(self, tmp_path: Path) -> None:
        publish = self.permissions(tmp_path, A)["publish"]["allow"]
        assert {one for one in publish if one.startswith("aw.event.")} == {
            f"aw.event.{ME}.order.>",
            f"aw.event.{ME}.alone",
        }
        assert [one for one in publish if "events-" in one] == [
            f"$JS.API.STREAM.INFO.{events_stream_name(A)}"
        ]

    def test_a_subscriber_pulls_by_its_own_consumers_only(self, tmp_path: Path) -> None:
        cli = SpiffeID("spiffe://x.test/client/cli")
        permissions = self.permissions(tmp_path, B)
        mine = [
            f"{events_stream_name(publisher)}.{event_consumer_name(B, ordered=ordered)}"
            for publisher in (A, cli)
            for ordered in (False, True)
        ]
        assert {one for one in permissions["publish"]["allow"] if "events-" in one} == {
            text
            for one in mine
            for text in (
                f"$JS.API.CONSUMER.MSG.NEXT.{one}",
                f"$JS.API.CONSUMER.INFO.{one}",
                f"$JS.ACK.{one}.>",
            )
        }
        assert {one for one in permissions["subscribe"]["allow"] if one.startswith("aw.event.")} == {
            f"aw.event.{ME}.order.>",
            f"aw.event.{ME}.alone",
            "aw.event.x=test.client/cli.>",
        }

    def test_others_have_nothing_to_do_with_events(self, tmp_path: Path) -> None:
        permissions = self.permissions(tmp_path, C)
        assert not any("event" in one for kind in permissions.values() for one in kind["allow"])


class TestApprovals:
    """An approver reads what is recorded of the tasks that it may decide on, and decides on those agents' tasks."""

    def decides(self, tmp_path: Path, identity: SpiffeID, *may: str) -> list[str]:
        by_c = {"by": [str(C)], "above": {"amount": 5}}
        text = grants(
            tmp_path,
            entry(A, B, ["pay"], approval=by_c),
            entry("spiffe://x.test/client/*", B, ["pay"], approval=by_c),
            entry(A, C, ["work"]),
        )
        held = text.model_copy(update={"operators": (Operator(who=[str(C)], may=may),)}) if may else text
        everyone = [A, B, C, SpiffeID("spiffe://x.test/client/cli")]
        allowed = permissions_of(identity, held, everyone)["publish"]["allow"]
        other = permissions_of(identity, text, everyone)["publish"]["allow"]
        return sorted(set(allowed) - set(other))

    def test_who_is_named_and_may_reads_those_tasks_and_decides(self, tmp_path: Path) -> None:
        state = f"$JS.API.DIRECT.GET.{state_stream_name(B)}.aw.state.x=test.agent/b"
        assert self.decides(tmp_path, C, "control:approve", "control:reject") == sorted(
            [
                f"{state}.x=test.agent/a.>",
                f"{state}.x=test.client/cli.>",
                "aw.control.x=test.agent/b.approve",
                "aw.control.x=test.agent/b.reject",
            ]
        )

    def test_each_act_is_granted_by_itself(self, tmp_path: Path) -> None:
        given = self.decides(tmp_path, C, "control:reject")
        assert [one for one in given if one.startswith("aw.")] == ["aw.control.x=test.agent/b.reject"]

    def test_who_is_named_only_or_may_only_gets_nothing(self, tmp_path: Path) -> None:
        assert self.decides(tmp_path, C, "control:drain") == []
        assert self.decides(tmp_path, A, "control:approve") == []


def test_what_is_stored_is_forced_to_the_disk_every_second_or_at_once() -> None:
    files = BrokerFiles(Path("/c"), Path("/k"), Path("/a"), Path("/s"))
    assert json.loads(broker_configuration("one", files, []))["jetstream"]["sync_interval"] == "1s"
    strict = json.loads(broker_configuration("one", files, [], sync="always"))
    assert strict["jetstream"]["sync_interval"] == "always"
