"""Loading, merging and refusing configuration."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

from agentweave_bus.config import AgentConfig, AuthorizationConfig, load_config
from agentweave_bus.config.document import MAX_FILE_BYTES
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID

MINIMAL = """
agent:
  name: billing
  trust_domain: acme-corp.io
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AGENTWEAVE_") or name == "SPIFFE_ENDPOINT_SOCKET":
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "agent.yaml") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def refused(write):
    """Load ``text`` and give the error."""

    def refused(text: str, **options) -> ConfigurationError:
        with pytest.raises(ConfigurationError) as caught:
            load_config(write(text), **options)
        return caught.value

    return refused


# What a minimal file becomes


def test_a_name_and_a_trust_domain_are_enough(write) -> None:
    config = load_config(write(MINIMAL))
    assert config.agent.spiffe_id == SpiffeID("spiffe://acme-corp.io/agent/billing")
    assert config.identity.allowed_trust_domains == ("acme-corp.io",)
    assert config.bus.server_spiffe_id == "spiffe://acme-corp.io/agentweave/broker"
    assert isinstance(config.bus.server_spiffe_id, SpiffeID)
    assert config.authorization.audit.path == Path(".agentweave/audit/billing.jsonl")
    assert config.authorization.default_action == "deny"
    assert config.environment == "production"
    assert config.warnings == ()
    assert config.agent.capabilities is None
    assert config.server is None


def test_class_names_what_to_serve(write) -> None:
    assert load_config(write(MINIMAL + "  class: shop.billing:BillingAgent\n")).agent.class_ == (
        "shop.billing:BillingAgent"
    )


def test_a_class_may_stand_in_a_file(write) -> None:
    text = MINIMAL + "  class: shop/billing.py:BillingAgent\n"
    assert load_config(write(text)).agent.class_ == "shop.billing:BillingAgent"


@pytest.mark.parametrize("path", ["/shop/billing.py:A", "../billing.py:A", "shop/billing:A", "bill-ing.py:A"])
def test_a_file_that_is_no_module_is_refused(write, path: str) -> None:
    with pytest.raises(ConfigurationError, match=r"folder/file\.py:Class"):
        load_config(write(MINIMAL + f"  class: {path}\n"))


def test_a_final_allow_is_not_part_of_the_policy_package(write) -> None:
    for text in ("acme/authz", "acme/authz/allow", "acme.authz.allow"):
        config = load_config(write(MINIMAL + f"authorization: {{policy_path: {text}}}\n"))
        assert config.authorization.policy_package == "acme/authz"


def test_a_bus_server_without_a_port_has_the_usual_one(write) -> None:
    config = load_config(write(MINIMAL + "bus: {servers: ['tls://nats.acme-corp.io']}\n"))
    assert config.bus.servers == ("tls://nats.acme-corp.io:4222",)


def test_the_path_makes_the_identity_of_a_client(write) -> None:
    config = load_config(write(MINIMAL + "  path: client/cli\n"))
    assert config.agent.spiffe_id == "spiffe://acme-corp.io/client/cli"


def test_the_configuration_can_not_be_changed(write) -> None:
    config = load_config(write(MINIMAL))
    with pytest.raises(ValidationError):
        config.authorization.default_action = "allow"


def test_the_reference_documents_file_loads(write) -> None:
    """The federation walk-through's billing file; its OPA speaks plain HTTP, so in development."""
    config = load_config(
        write(
            """
            agent:
              name: "billing"
              trust_domain: "acme-corp.io"
              description: "Billing agent with federated payment integration"
              capabilities:
                - name: "process_billing"
                  description: "Process billing and initiate payment"
                  input_modes: ["application/json"]
                  output_modes: ["application/json"]
            identity:
              provider: "spiffe"
              spiffe_endpoint: "unix:///run/spire/sockets/agent.sock"
              allowed_trust_domains: ["acme-corp.io", "partner.com"]
            authorization:
              provider: "opa"
              opa_endpoint: "http://opa-acme:8181"
              policy_path: "acme/authz"
              default_action: "deny"
              audit:
                enabled: true
                destination: "file:///var/log/agentweave/billing-audit.log"
                log_federated: true
            transport:
              tls_min_version: "1.3"
              peer_verification: "strict"
            server:
              host: "0.0.0.0"
              port: 8443
              protocol: "a2a"
            """
        ),
        environment="development",
    )
    assert config.agent.capabilities is not None
    assert config.agent.capabilities[0].name == "process_billing"
    assert config.authorization.audit.path == Path("/var/log/agentweave/billing-audit.log")
    assert config.authorization.endpoints == ("http://opa-acme:8181",)
    assert [text.split(":")[0] for text in config.warnings] == ["authorization", "server"]


# Which source wins


def test_an_explicit_path_beats_the_variable(write, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write(MINIMAL.replace("billing", "other"), "other.yaml")
    monkeypatch.setenv("AGENTWEAVE_CONFIG", str(other))
    assert load_config().agent.name == "other"
    assert load_config(write(MINIMAL)).agent.name == "billing"


@pytest.mark.parametrize(
    ("variable", "argument", "expected"),
    [
        (None, None, "production"),
        ("", None, "production"),
        ("development", None, "development"),
        ("development", "production", "production"),
        ("production", "development", "development"),
    ],
)
def test_the_argument_beats_the_variable_and_nothing_is_production(
    write, monkeypatch: pytest.MonkeyPatch, variable: str | None, argument: str | None, expected: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("AGENTWEAVE_ENV", variable)
    assert load_config(write(MINIMAL), environment=argument).environment == expected


def test_an_unknown_environment_is_refused(refused) -> None:
    error = refused(MINIMAL, environment="developement")
    assert error.key == "--env"
    assert "Did you mean 'development'?" in str(error)


def test_variables_beat_the_file_and_overrides_beat_variables(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(MINIMAL + "bus: {call_timeout: 10.0, max_in_flight: 7}\n")
    monkeypatch.setenv("AGENTWEAVE_BUS__CALL_TIMEOUT", "20")
    monkeypatch.setenv("AGENTWEAVE_AUTHORIZATION__CIRCUIT_BREAKER__TIMEOUT", "3.5")
    monkeypatch.setenv("AGENTWEAVE_BUS__SERVERS", "[tls://a:1, tls://b:2]")
    monkeypatch.setenv("AGENTWEAVE_TOOLS", "/not/a/setting")
    config = load_config(path)
    assert config.bus.call_timeout == 20
    assert config.bus.max_in_flight == 7
    assert config.bus.servers == ("tls://a:1", "tls://b:2")
    assert config.authorization.circuit_breaker.timeout == 3.5
    nested = load_config(path, overrides={"bus": {"call_timeout": 30}, "agent.path": "client/x"})
    assert nested.bus.call_timeout == 30
    assert nested.bus.max_in_flight == 7
    assert nested.agent.path == "client/x"


def test_everything_may_come_from_the_program() -> None:
    config = load_config(overrides={"agent": {"name": "a", "trust_domain": "b.io"}})
    assert config.agent.spiffe_id == "spiffe://b.io/agent/a"


def test_no_source_at_all_says_what_to_give() -> None:
    with pytest.raises(ConfigurationError, match="AGENTWEAVE_CONFIG"):
        load_config()


def test_a_problem_in_a_variable_names_the_variable(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTWEAVE_BUS__CALL_TIMOUT", "20")
    error = refused(MINIMAL)
    assert str(error) == (
        "AGENTWEAVE_BUS__CALL_TIMOUT: unknown key 'bus.call_timout'. Did you mean 'bus.call_timeout'?"
    )
    monkeypatch.delenv("AGENTWEAVE_BUS__CALL_TIMOUT")
    monkeypatch.setenv("AGENTWEAVE_BUS__SERVERS", "[")
    assert str(refused(MINIMAL)).startswith("AGENTWEAVE_BUS__SERVERS:1: not valid YAML")


def test_the_socket_variable_of_spiffe_fills_in_what_the_file_leaves_open(
    write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///tmp/from-variable.sock")
    assert load_config(write(MINIMAL)).identity.spiffe_endpoint == "unix:///tmp/from-variable.sock"
    path = write(MINIMAL + "identity: {spiffe_endpoint: 'unix:///tmp/from-file.sock'}\n")
    assert load_config(path).identity.spiffe_endpoint == "unix:///tmp/from-file.sock"
    monkeypatch.setenv("AGENTWEAVE_IDENTITY__SPIFFE_ENDPOINT", "unix:///tmp/override.sock")
    assert load_config(path).identity.spiffe_endpoint == "unix:///tmp/override.sock"


def test_files_to_read_are_relative_to_the_file_and_the_audit_log_is_not(write, tmp_path: Path) -> None:
    text = MINIMAL + textwrap.dedent(
        """
        identity:
          provider: static
          static: {cert_file: c.pem, key_file: /abs/k.pem, bundles: {acme-corp.io: b.pem}}
        authorization: {bundle: ../policies, audit: {destination: log.jsonl}}
        """
    )
    config = load_config(write(text), environment="development")
    static = config.identity.static
    assert static is not None
    assert static.cert_file == tmp_path / "c.pem"
    assert static.key_file == Path("/abs/k.pem")
    assert static.bundles == {"acme-corp.io": tmp_path / "b.pem"}
    assert config.authorization.bundle == tmp_path / "../policies"
    assert config.authorization.audit.path == Path("log.jsonl")


# What is refused, and what it says


def test_an_unknown_key_names_file_line_and_the_nearest(refused, tmp_path: Path) -> None:
    error = refused(MINIMAL + "authorization:\n  defualt_action: deny\n")
    assert error.key == "authorization.defualt_action"
    assert str(error) == (
        f"{tmp_path}/agent.yaml:6: unknown key 'authorization.defualt_action'."
        " Did you mean 'authorization.default_action'?"
    )


def test_a_key_in_the_wrong_section_names_the_right_one(refused) -> None:
    assert "Did you mean 'authorization.audit'?" in str(refused(MINIMAL + "audit: {}\n"))


def test_an_unknown_key_in_a_list_of_sections(refused) -> None:
    error = refused(MINIMAL + "  capabilities:\n    - name: a\n      desciption: x\n")
    assert error.key == "agent.capabilities[0].desciption"
    assert ":7:" in str(error)
    assert "Did you mean 'agent.capabilities[].description'?" in str(error)


def test_a_key_like_no_other_lists_what_there_is(refused) -> None:
    assert "Known here: name, trust_domain" in str(refused(MINIMAL + "  zzz: 1\n"))


def test_every_problem_is_listed(refused) -> None:
    error = refused(
        """
        agent: {name: "a b", trust_domain: Acme}
        transport: {peer_verification: none}
        authorization: {default_action: allow, polcy_path: x}
        bus: {call_timeout: soon}
        """
    )
    text = str(error)
    assert text.startswith("6 problems")
    for part in (
        "agent.name",
        "agent.trust_domain",
        "peer_verification",
        "'allow' mode",
        "polcy_path",
        "call_timeout",
    ):
        assert part in text
    assert "agent.yaml:5: bus.call_timeout" in text


@pytest.mark.parametrize("mode", ["log-only", "allow"])
def test_permissive_modes_are_for_development(refused, write, mode: str) -> None:
    text = MINIMAL + f"authorization:\n  default_action: {mode}\n"
    error = refused(text)
    assert error.key == "authorization.default_action"
    assert f"Security violation: '{mode}' mode not allowed in production environment" in str(error)
    assert "agent.yaml:6:" in str(error)
    assert "default_action: deny" in str(error)
    config = load_config(write(text), environment="development")
    assert config.authorization.default_action == mode
    assert "default_action" in config.warnings[0]


@pytest.mark.parametrize("value", ["none", "null", "false", "~", "off", "optional"])
@pytest.mark.parametrize("environment", ["production", "development"])
def test_peers_are_verified_always(refused, value: str, environment: str) -> None:
    error = refused(MINIMAL + f"transport: {{peer_verification: {value}}}\n", environment=environment)
    assert error.key == "transport.peer_verification"
    assert "strict" in str(error)


def test_tls_12_warns_in_development_only(refused, write) -> None:
    text = MINIMAL + "transport: {tls_min_version: 1.2}\n"
    assert "TLS 1.2 not allowed in production" in str(refused(text))
    assert "tls_min_version is 1.2" in load_config(write(text), environment="development").warnings[0]
    assert load_config(write(text.replace("1.2", "1.3"))).warnings == ()


@pytest.mark.parametrize("version", ["1.1", "1.0", "'SSLv3'"])
def test_older_tls_never(refused, version: str) -> None:
    error = refused(MINIMAL + f"transport: {{tls_min_version: {version}}}\n", environment="development")
    assert error.key == "transport.tls_min_version"


def test_the_audit_log_is_off_in_development_only(refused, write) -> None:
    text = MINIMAL + "authorization: {audit: {enabled: false}}\n"
    assert refused(text).key == "authorization.audit.enabled"
    assert "audit.enabled is false" in load_config(write(text), environment="development").warnings[0]


def test_static_identity_is_for_development(refused, write) -> None:
    static = "static: {cert_file: c, key_file: k, bundles: {acme-corp.io: b}}"
    text = MINIMAL + f"identity: {{provider: static, {static}}}\n"
    assert refused(text).key == "identity.provider"
    assert "identity.provider is 'static'" in load_config(write(text), environment="development").warnings[0]
    assert "needs identity.static" in str(
        refused(MINIMAL + "identity: {provider: static}\n", environment="development")
    )
    assert "remove it" in str(refused(MINIMAL + f"identity: {{{static}}}\n"))


def test_plain_http_to_opa(refused, write) -> None:
    def text(url: str) -> str:
        return MINIMAL + f"authorization: {{provider: opa, opa_endpoints: ['{url}']}}\n"

    for url in ("http://127.0.0.1:8181", "http://opa:8181"):
        assert "Security violation" in str(refused(text(url)))
    assert load_config(write(text("http://127.0.0.1:8181")), environment="development").warnings == ()
    assert load_config(write(text("http://localhost:8181")), environment="development").warnings == ()
    warned = load_config(write(text("http://opa:8181")), environment="development").warnings
    assert "http://opa:8181 is plain HTTP" in warned[0]
    assert load_config(write(text("unix:///run/opa/opa.sock"))).warnings == ()


def test_an_endpoint_that_nobody_asks_does_no_harm(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file written for an OPA server also works where the policies are embedded."""
    path = write(MINIMAL + "authorization: {provider: opa, opa_endpoint: 'http://opa:8181'}\n")
    monkeypatch.setenv("AGENTWEAVE_AUTHORIZATION__PROVIDER", "embedded")
    assert load_config(path).authorization.provider == "embedded"
    assert load_config(path).warnings == ()


def test_the_default_endpoint_of_opa_is_no_way_around(refused) -> None:
    assert "http://127.0.0.1:8181 not allowed" in str(refused(MINIMAL + "authorization: {provider: opa}\n"))


def test_https_to_opa_needs_its_identity(refused, write) -> None:
    text = MINIMAL + "authorization: {provider: opa, opa_endpoint: 'https://opa:8181'}\n"
    assert "opa_spiffe_id" in str(refused(text))
    with_id = text.replace("{provider", "{opa_spiffe_id: 'spiffe://acme-corp.io/opa', provider")
    assert load_config(write(with_id)).authorization.opa_spiffe_id == "spiffe://acme-corp.io/opa"


def test_own_and_broker_domain_must_be_allowed(refused) -> None:
    assert "own 'acme-corp.io'" in str(
        refused(MINIMAL + "identity: {allowed_trust_domains: [partner.com]}\n")
    )
    assert "bus.server_spiffe_id" in str(
        refused(MINIMAL + "bus: {server_spiffe_id: 'spiffe://else.io/nats'}\n")
    )


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("agent: {name: a}\n", "agent.trust_domain"),
        ("agent: {name: a, trust_domain: b.io, path: /x}\n", "agent.path"),
        ("agent: {name: a, trust_domain: b.io, path: 'x/../y'}\n", "agent.path"),
        ("agent: {name: a, trust_domain: b.io, class: 'no colon'}\n", "agent.class"),
        ("agent: {name: 7, trust_domain: b.io}\n", "agent.name"),
        (
            "agent: {name: a, trust_domain: b.io, capabilities: [{name: x}, {name: x}]}\n",
            "agent.capabilities",
        ),
        ("agent: {name: a, trust_domain: b.io, class_: 'a:B'}\n", "agent.class_"),
        (MINIMAL + "bus: {servers: ['nats://x:4222']}\n", "bus.servers[0]"),
        (MINIMAL + "bus: {servers: ['tls://user:pw@x:4222']}\n", "bus.servers[0]"),
        (MINIMAL + "bus: {servers: []}\n", "bus.servers"),
        (MINIMAL + "bus: {server_spiffe_id: 'spiffe://b.io/x/'}\n", "bus.server_spiffe_id"),
        (MINIMAL + "bus: {max_in_flight: true}\n", "bus.max_in_flight"),
        (MINIMAL + "bus: {max_in_flight: '5'}\n", "bus.max_in_flight"),
        (MINIMAL + "bus: {call_timeout: .inf}\n", "bus.call_timeout"),
        (MINIMAL + "bus: {call_timeout: 0}\n", "bus.call_timeout"),
        (MINIMAL + "bus: {call_timeout: 400}\n", "bus"),
        (MINIMAL + "bus: 7\n", "bus"),
        (MINIMAL + "  capabilities: [{name: Send.Mail}]\n", "agent.capabilities[0].name"),
        (MINIMAL + "identity: {spiffe_endpoint: /run/x.sock}\n", "identity.spiffe_endpoint"),
        (MINIMAL + "identity: {spiffe_endpoint: 'tcp://127.0.0.1:8081'}\n", "identity.spiffe_endpoint"),
        (MINIMAL + "authorization: {policy_path: 'a//b'}\n", "authorization.policy_path"),
        (MINIMAL + "authorization: {audit: {destination: 's3://x/y'}}\n", "authorization.audit.destination"),
        (MINIMAL + "authorization: {audit: {redact: ['a..b']}}\n", "authorization.audit.redact[0]"),
        (MINIMAL + "authorization: {failover_strategy: random}\n", "authorization.failover_strategy"),
        (MINIMAL + "observability: {metrics: {port: 70000}}\n", "observability.metrics.port"),
        (MINIMAL + "observability: {metrics: {path: /healthz}}\n", "observability.metrics.path"),
        (MINIMAL + "observability: {logging: {loggers: {x: LOUD}}}\n", "observability.logging.loggers.x"),
    ],
)
def test_malformed_values_name_their_key(refused, text: str, key: str) -> None:
    assert refused(text).key == key


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bus: 7", "bus: must be a mapping of keys and values, not 7."),
        ("bus: {servers: x}", "bus.servers: must be a list, not 'x'."),
        ("bus: {max_in_flight: x}", "bus.max_in_flight: must be a whole number, not 'x'."),
        (
            "authorization: {audit: {enabled: 1}}",
            "authorization.audit.enabled: must be true or false, not 1.",
        ),
        (
            "authorization: {policy_path: 1.5}",
            "authorization.policy_path: must be text; put it in quotes, not 1.5.",
        ),
    ],
)
def test_wrong_types_are_told_in_the_files_words(refused, text: str, says: str) -> None:
    assert str(refused(MINIMAL + text + "\n")).endswith(says)


def test_a_value_near_an_allowed_one_gets_a_hint(refused) -> None:
    assert "Did you mean 'spiffe'?" in str(refused(MINIMAL + "identity: {provider: spife}\n"))


# The file itself


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("agent: {name: a, name: b}", "'name' is written twice"),
        ("agent: [unclosed", "not valid YAML"),
        ("- a\n- b", "expected keys and values"),
        ("agent: !!python/object/apply:os.system ['true']", "tag"),
        ("agent: !!binary aGk=", "tag"),
        ("a: &a {x: 1}\nb:\n  <<: *a", "merge keys"),
        ("? [a]\n: b", "a key must be a word"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: &a [*a]", "refer to themselves"),
        ("a: " + "[" * 5000, "levels"),
        ("a: " + "9" * 5000, "number of more than 400"),
        ("a: 0x" + "f" * 100_000, "number of more than 400"),
        ("a: 1" + ":59" * 20_000, "number of more than 400"),
        ("a: 2026-02-30", "can't be read as the timestamp"),
        ("a: !!timestamp soon", "can't be read as the timestamp"),
        ("a: !!bool maybe", "can't be read as the bool"),
        ("a: !!int ''", "can't be read as the int"),
        ("a: 0b_", "can't be read as the int"),
        ('a: "\\U7fffffff"', "not valid YAML"),
        ('a: "\\ud800"', "half of a character"),
        ('"\\ud800": a', "half of a character"),
        ("a: " + "[" + "x," * 10_001 + "]", "values"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_unacceptable_yaml(refused, text: str, says: str) -> None:
    assert says in str(refused(text))


def test_aliases_can_not_expand_without_bound(refused) -> None:
    lines = ["l0: &l0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "aliases expand" in str(refused("\n".join(lines)))


def test_an_alias_is_an_ordinary_value(write) -> None:
    text = "agent: {name: &n billing, trust_domain: acme-corp.io, description: *n}"
    assert load_config(write(text)).agent.description == "billing"


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"missing\.yaml can't be read: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigurationError, match=r"No such file.*start `agentweave up`") as refusal:
        load_config(tmp_path / ".agentweave" / "clients" / "cli.yaml")
    assert refusal.value.hint is not None
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"agent: \xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        load_config(binary)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigurationError, match="larger than 256 KiB"):
        load_config(large)


# Built by a program


def test_built_directly_it_is_for_production() -> None:
    data = {"agent": {"name": "a", "trust_domain": "b.io"}}
    assert AgentConfig.model_validate(data).environment == "production"
    with pytest.raises(ValidationError, match="Security violation"):
        AgentConfig.model_validate({**data, "authorization": {"default_action": "allow"}})


def test_a_section_made_for_development_does_not_pass_into_production() -> None:
    lenient = AuthorizationConfig.model_validate(
        {"default_action": "allow"}, context={"environment": "development"}
    )
    with pytest.raises(ValidationError, match="Security violation"):
        AgentConfig.model_validate({"agent": {"name": "a", "trust_domain": "b.io"}, "authorization": lenient})
