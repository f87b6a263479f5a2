"""The file of a control role."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from agentweave_bus.bus.stream_limits import StreamLimits
from agentweave_bus.bus.streams import STATE_MAX_AGE_S
from agentweave_bus.config import ControlConfig, StreamsConfig, load_config, load_control
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.runtime.control_service import _limits


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AGENTWEAVE_") or name == "SPIFFE_ENDPOINT_SOCKET":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def loaded(tmp_path: Path, **keys: object) -> ControlConfig:
    path = tmp_path / "etc" / "control.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"trust_domain": "shop.test", "grants": "grants.yaml", **keys}))
    return load_control(path)


def test_two_keys_are_enough(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert config.grants == tmp_path / "etc" / "grants.yaml"
    assert str(config.broker) == "spiffe://shop.test/agentweave/broker"
    assert config.identity.allowed_trust_domains == ("shop.test",)
    assert config.state_dir == Path(".agentweave")
    assert config.identity.authority_history == Path(".agentweave/authorities")


def test_what_it_remembers_lies_in_its_state(tmp_path: Path) -> None:
    config = loaded(tmp_path, state_dir="/var/lib/agentweave")
    assert config.identity.authority_history == Path("/var/lib/agentweave/authorities")
    named = loaded(tmp_path, state_dir="/var/lib/agentweave", identity={"authority_history": "/other"})
    assert named.identity.authority_history == Path("/other")


def test_variables_beat_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTWEAVE_BUS__SERVERS", "['tls://nats-1', 'tls://nats-2:4333']")
    monkeypatch.setenv("AGENTWEAVE_STREAMS__REPLICAS", "3")
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///run/agent.sock")
    config = loaded(tmp_path)
    assert config.bus.servers == ("tls://nats-1:4222", "tls://nats-2:4333")
    assert config.streams.replicas == 3
    assert config.identity.spiffe_endpoint == "unix:///run/agent.sock"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"streams": {"replicas": 2}}, "streams.replicas"),
        ({"streams": {"record_age": STATE_MAX_AGE_S - 1}}, "streams.record_age"),
        ({"identities": ["spiffe://partner.test/agent/a"]}, "partner.test/agent/a is of a trust domain"),
        ({"bus": {"servers": ["nats://nats-1:4222"]}}, "never spoken to without TLS"),
        ({"agents": []}, "agents"),
        ({"identity": {"provider": "static"}}, "not allowed in production"),
    ],
)
def test_what_is_refused(tmp_path: Path, keys: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        loaded(tmp_path, **keys)


def test_streams_are_by_default_as_they_are_declared() -> None:
    assert _limits(StreamsConfig()) == StreamLimits()
    assert len(fields(StreamLimits)) == len(StreamsConfig.model_fields)


def test_each_limit_arrives() -> None:
    chosen = StreamsConfig(
        replicas=3,
        queue_tasks=1,
        queue_bytes=2**24,
        record_age=STATE_MAX_AGE_S + 1,
        dead_bytes=2**25,
        event_bytes=2**26,
    )
    assert _limits(chosen) == StreamLimits(3, 1, 2**24, STATE_MAX_AGE_S + 1, 2**25, 2**26)


def test_the_files_of_the_page_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    control, streams, agent = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "control.yaml"
    path.write_text(control + streams)
    assert load_control(path).streams.replicas == 3
    path = tmp_path / "order.yaml"
    path.write_text(agent)
    assert len(load_config(path, environment="production").bus.servers) == 3
