"""Attack: a configuration, or a program, that would let calls by without anybody deciding."""

from __future__ import annotations

import pytest

from agentweave_bus.authz import AllowAllProvider
from agentweave_bus.config import load_config
from agentweave_bus.exceptions import ConfigurationError
from tests.integration.probes import ECHO, Probe
from tests.integration.processes import worker_process
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio


def weakened(what, key, value):
    mark = refused_by(Layer.CONFIGURATION, what, by=Adversary.INTRUDER)
    return pytest.param(key, value, id=what, marks=mark)


WEAKENED = [
    weakened("a policy whose denials are only logged, in production", "authorization.default_action", "log-only"),
    weakened("a policy that allows what it does not know, in production", "authorization.default_action", "allow"),
    weakened("peers that are not verified", "transport.peer_verification", "none"),
    weakened("peers that are not verified, said otherwise", "transport.peer_verification", False),
    weakened("TLS 1.2 in production", "transport.tls_min_version", "1.2"),
    weakened("no audit log in production", "authorization.audit.enabled", False),
    weakened("an identity from files in production", "identity.provider", "static"),
]  # fmt: skip


@pytest.fixture
def runs_on(attack):
    """The agent with the honest configuration has run, and runs on."""

    async def check():
        await attack.cli.ask(ECHO, "say", {"text": "x"})
        assert attack.echo.ran == ["work", "say"]

    return check


@pytest.mark.parametrize(("key", "value"), WEAKENED)
async def test_a_setting_that_weakens_a_promise(attack, runs_on, key, value, monkeypatch):
    monkeypatch.delenv("AGENTWEAVE_ENV", raising=False)
    settings = attack.world.settings(ECHO)
    for environment in ("production", None):  # one that nobody named is production
        load_config(overrides=settings, environment=environment)
        with pytest.raises(ConfigurationError, match="Security violation") as refused:
            load_config(overrides=settings | {key: value}, environment=environment)
        assert refused.value.key == key
    await runs_on()


@refused_by(Layer.CONFIGURATION, "plain HTTP to the policy server, in production", by=Adversary.INTRUDER)
@pytest.mark.parametrize("key", ["opa_endpoint", "opa_endpoints"])
async def test_a_policy_server_that_anybody_could_be(attack, runs_on, key):
    url = "http://127.0.0.1:8181"
    endpoint = {f"authorization__{key}": url if key == "opa_endpoint" else [url]}
    with pytest.raises(ConfigurationError, match="whoever can answer in OPA's place decides"):
        await attack.world.start(ECHO, authorization__provider="opa", **endpoint)
    await runs_on()


@refused_by(
    Layer.CONFIGURATION, "an environment that is neither production nor development", by=Adversary.INTRUDER
)
@pytest.mark.parametrize("name", ["Development", "dev", "staging", "development "])
async def test_an_environment_that_is_nearly_development(attack, runs_on, name, monkeypatch):
    monkeypatch.setenv("AGENTWEAVE_ENV", name)
    settings = attack.world.settings(ECHO) | {"authorization.default_action": "allow"}
    with pytest.raises(ConfigurationError, match="is no environment"):
        load_config(overrides=settings)
    await runs_on()


@refused_by(Layer.CONFIGURATION, "an engine that allows everything, in production", by=Adversary.INTRUDER)
@pytest.mark.parametrize("options", [{}, {"environment": "production"}, {"environment": "staging"}], ids=str)
async def test_an_engine_that_allows_everything(attack, runs_on, options):
    class Open(Probe):
        def __init__(self, config, **more):
            super().__init__(config, authz_provider=AllowAllProvider(**options), **more)

    with pytest.raises(ConfigurationError, match="AllowAllProvider not allowed"):
        await attack.world.start(ECHO, Open)
    await runs_on()


@refused_by(
    Layer.CONFIGURATION, "a worker that is started with its policy switched off", by=Adversary.INTRUDER
)
async def test_a_worker_does_not_start(attack, runs_on):
    async with worker_process(attack.world, ECHO, authorization__default_action="allow") as worker:
        assert worker.ready == ""  # it never said so
        assert await worker.wait() == 2
        log = worker.log.read_text()
    assert "authorization.default_action" in log
    assert "'allow' mode not allowed in production environment" in log
    await runs_on()
