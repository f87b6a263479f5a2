"""Configurations are checked, and new agents written, from the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

AGENT = "agent: {name: payment, trust_domain: shop.test, class: 'a:B'}\n"


def test_an_agent_s_effective_configuration(run: Callable, place: Path) -> None:
    (place / "payment.yaml").write_text(AGENT)
    ran = run("config", "check", "payment.yaml")
    assert ran.code == 0
    assert ran.json["effective"]["bus"]["server_spiffe_id"] == "spiffe://shop.test/agentweave/broker"
    assert ran.json["effective"]["agent"]["class"] == "a:B"


@pytest.mark.usefixtures("terminal")
def test_for_people_it_is_yaml(run: Callable, place: Path) -> None:
    (place / "payment.yaml").write_text(AGENT)
    assert "  default_action: deny" in run("config", "check", "payment.yaml").out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (AGENT + "authorisation: {}\n", "authorization"),
        (AGENT + "transport: {peer_verification: none}\n", "never allowed"),
        (AGENT + "authorization: {default_action: log-only}\n", "change it to default_action: deny"),
        ("agent: {name: payment, trust_domain: 'Shop Test'}\n", "trust_domain"),
    ],
)
def test_what_is_wrong_is_named(run: Callable, place: Path, text: str, says: str) -> None:
    (place / "payment.yaml").write_text(text)
    ran = run("config", "check", "payment.yaml")
    assert ran.code == 2
    assert says in ran.err
    assert "Traceback" not in ran.err


def test_warnings_are_told(run: Callable, place: Path) -> None:
    (place / "payment.yaml").write_text(AGENT + "authorization: {default_action: log-only}\n")
    ran = run("config", "check", "payment.yaml", "--env", "development")
    assert ran.code == 0
    assert "warning: " in ran.err
    assert len(ran.json["warnings"]) == 1


def test_a_stack_is_checked_with_its_agents_and_grants(run: Callable, place: Path) -> None:
    with (place / "agentweave.yaml").open("a") as file:
        file.write("agents: [{config: payment.yaml}]\n")
    assert "payment.yaml" in run("config", "check", "agentweave.yaml").err
    (place / "payment.yaml").write_text(AGENT)
    assert run("config", "check", "agentweave.yaml").json["effective"]["trust_domain"] == "shop.test"
    (place / "payment.yaml").write_text(AGENT.replace("shop.test", "other.test"))
    ran = run("config", "check", "agentweave.yaml")
    assert ran.code == 2
    assert "other.test, the stack's is shop.test" in ran.err
    (place / "payment.yaml").write_text(AGENT.replace(", class: 'a:B'", ""))
    assert "which class to run" in run("config", "check", "agentweave.yaml").err
    (place / "payment.yaml").write_text(AGENT)
    (place / "grants.yaml").write_text("grants: []\n")
    assert "nobody may ask anybody" in run("config", "check", "agentweave.yaml").err
    (place / "grants.yaml").write_text("grants: [{calller: x}]\n")
    assert run("config", "check", "agentweave.yaml").code == 2


def test_a_control_roles_file_is_checked_with_its_grants(run: Callable, place: Path) -> None:
    control = "trust_domain: shop.test\ngrants: grants.yaml\nstreams: {replicas: 3}\n"
    (place / "control.yaml").write_text(control)
    callee = "callee: 'spiffe://shop.test/agent/a', capabilities: ['*']"
    (place / "grants.yaml").write_text(f"grants: [{{caller: 'spiffe://shop.test/desk/*', {callee}}}]\n")
    ran = run("config", "check", "control.yaml")
    assert ran.json["effective"]["streams"]["replicas"] == 3
    assert "nobody below spiffe://shop.test/desk/* has a user" in ran.err
    (place / "control.yaml").write_text(control + "identities: ['spiffe://shop.test/desk/eve']\n")
    assert "nobody" not in run("config", "check", "control.yaml").err
    (place / "control.yaml").write_text(control.replace("3", "2"))
    assert "streams.replicas" in run("config", "check", "control.yaml").err


SHOP = "trust_domain: shop.test\ngrants: grants.yaml\nagents: [{config: payment.yaml}]\n"
TILL = """
import nothing_of_this_kind
from agentweave_bus import SecureAgent, capability

class Till(SecureAgent):
    @capability("pay")
    async def pay(self, amount: int) -> dict:
        return {}
"""
GRANT = "  - {caller: 'spiffe://shop.test/%s', callee: 'spiffe://shop.test/%s', capabilities: [%s]}\n"


@pytest.fixture
def shop(place: Path) -> Path:
    """A stack that is right."""
    (place / "agentweave.yaml").write_text(SHOP)
    (place / "payment.yaml").write_text(AGENT.replace("a:B", "till:Till"))
    (place / "till.py").write_text(TILL.replace("import nothing_of_this_kind\n", "print('hello there')\n"))
    return place


def warned(run: Callable) -> list[str]:
    ran = run("config", "check", "agentweave.yaml")
    assert ran.code == 0, ran.err
    assert "hello there" not in ran.out
    return ran.json["warnings"]


def test_a_stack_that_is_right_has_no_warning(run: Callable, shop: Path) -> None:
    assert warned(run) == []


@pytest.mark.parametrize(
    ("grant", "says"),
    [
        (
            ("client/cli", "agent/paymnet", "pay"),
            "the callee 'spiffe://shop.test/agent/paymnet' is nobody here; did you mean",
        ),
        (
            ("agent/order", "agent/payment", "pay"),
            "grants[2]: the caller 'spiffe://shop.test/agent/order' is nobody here",
        ),
        (("client/bob", "agent/payment", "pay"), "the caller 'spiffe://shop.test/client/bob' is nobody here"),
        (("team/*", "agent/payment", "pay"), "the caller 'spiffe://shop.test/team/*' is nobody here"),
        (("client/cli", "agent/payment", "pya"), "has no capability 'pya'; did you mean 'pay'?"),
    ],
)
def test_grants_about_what_the_stack_lacks(
    run: Callable, shop: Path, grant: tuple[str, ...], says: str
) -> None:
    with (shop / "grants.yaml").open("a") as file:
        file.write(GRANT % grant)
    (warning,) = warned(run)
    assert says in warning


def test_a_class_that_can_t_be_imported(run: Callable, shop: Path) -> None:
    (shop / "till.py").write_text(TILL)
    (warning,) = warned(run)
    assert "payment: " in warning
    assert "imports what is not: No module named 'nothing_of_this_kind'" in warning
    (shop / "till.py").unlink()
    (warning,) = warned(run)
    assert "can't be imported" in warning


def test_a_package_that_is_not_there(run: Callable, shop: Path) -> None:
    with (shop / "payment.yaml").open("a") as file:
        file.write("authorization: {policy_path: agentweave/grant}\n")
    (warning,) = warned(run)
    assert "authorization.policy_path names no package" in warning
    assert warning.endswith("did you mean agentweave/grants?")


def test_two_agents_of_one_name(run: Callable, place: Path) -> None:
    for name in ("one.yaml", "two.yaml"):
        (place / name).write_text(AGENT)
    with (place / "agentweave.yaml").open("a") as file:
        file.write("agents: [{config: one.yaml}, {config: two.yaml}]\n")
    ran = run("config", "check", "agentweave.yaml")
    assert ran.code == 2
    assert "Several agents are called payment" in ran.err


def test_a_new_agent_is_right_in_every_respect(run: Callable, place: Path) -> None:
    ran = run("new", "order-desk", "--dir", "desk", "--trust-domain", "shop.test")
    assert ran.code == 0
    assert ran.json["agent"] == "spiffe://shop.test/agent/order-desk"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "desk"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert run("config", "check", "desk/agentweave.yaml").code == 0
    ran = run("authz", "test", "desk/authz-tests.yaml")
    assert (ran.code, len(ran.json["cases"])) == (0, 2)


def test_nothing_is_overwritten(run: Callable, place: Path) -> None:
    (place / "agentweave.yaml").unlink()
    ran = run("new", "hello", "--dir", ".")
    assert ran.code == 2
    assert "grants.yaml: there already" in ran.err
    assert sorted(path.name for path in place.iterdir()) == ["grants.yaml"]


def test_one_more_agent_for_a_stack(run: Callable, place: Path) -> None:
    before = {path.name: path.read_text() for path in place.iterdir()}
    ran = run("new", "stock", "--dir", ".")
    assert ran.code == 0, ran.err
    assert ran.json["agent"] == "spiffe://shop.test/agent/stock"  # the stack's trust domain
    assert ran.json["files"] == ["stock.py", "test_stock.py", "stock.yaml"]
    assert {name: (place / name).read_text() for name in before} == before
    add = ran.json["add"]
    with (place / "agentweave.yaml").open("a") as file:
        file.write("agents:\n" + add["agentweave.yaml"] + "\n")
    with (place / "grants.yaml").open("a") as file:
        file.write(add["grants.yaml"] + "\n")
    ran = run("config", "check", "agentweave.yaml")
    assert ran.code == 0, ran.err
    assert ran.json["effective"]["agents"][0]["config"] == str(place / "stock.yaml")
    asked = ("--caller", "spiffe://shop.test/client/cli", "--target", "spiffe://shop.test/agent/stock")
    assert run("authz", "check", *asked, "--action", "greet").code == 0
    ran = run("new", "stock", "--dir", ".")
    assert ran.code == 2
    assert "stock.py, test_stock.py, stock.yaml: there already" in ran.err
    ran = run("new", "other", "--dir", ".", "--trust-domain", "other.test")
    assert ran.code == 2
    assert "The stack there is of shop.test" in ran.err


@pytest.mark.usefixtures("terminal")
def test_one_more_agent_says_what_to_add(run: Callable, place: Path) -> None:
    text = run("new", "stock", "--dir", ".").out
    assert "Add to agentweave.yaml, under agents:\n  - config: stock.yaml\n" in text
    assert "Add to grants.yaml, under grants:\n  - caller: spiffe://shop.test/client/cli\n" in text


@pytest.mark.parametrize("name", ["Hello", "1st", "../up", "", "a" * 49])
def test_names_that_can_t_be(run: Callable, place: Path, name: str) -> None:
    ran = run("new", name)
    assert ran.code == 2
    assert "can't be an agent's name" in ran.err


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("class", "'class' is a word of the Python language"),
        ("calendar", "calendar.py would hide the module calendar of Python's standard library"),
        ("json", "would hide the module json"),
        ("asyncio", "would hide the module asyncio"),
        ("pydantic", "would hide the installed package pydantic"),
        ("yaml", "would hide the installed package yaml"),
        ("pydantic-core", "would hide the installed package pydantic_core"),
        ("agentweave_bus", "would hide this package"),
        ("agentweave-bus", "would hide this package"),
        ("agentweave", "would hide this package"),
    ],
)
def test_names_that_would_hide_a_module(run: Callable, place: Path, name: str, why: str) -> None:
    ran = run("new", name)
    assert ran.code == 2
    assert why in ran.err
    assert f"Call it {name}-agent." in ran.err
    assert not (place / name).exists()
    assert run("new", f"{name}-agent").code == 0


def test_a_module_of_the_working_directory_hides_nothing(
    run: Callable, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "desk_of_this_test.py").write_text("")
    monkeypatch.syspath_prepend(str(place))
    assert run("new", "desk_of_this_test").code == 0


@pytest.mark.usefixtures("terminal")
def test_new_says_what_to_do_next(run: Callable) -> None:
    text = run("new", "hello").out
    assert "cd hello && agentweave up" in text
    assert "--target spiffe://agentweave.local/agent/hello --capability greet" in text


def test_call_without_a_stack_says_the_way_out(run: Callable, place: Path) -> None:
    ran = run("call", "--target", "spiffe://shop.test/agent/payment", "--capability", "pay")
    assert ran.code == 2
    assert "agentweave up" in ran.err
    clients = place / ".agentweave" / "clients"
    clients.mkdir(parents=True)
    (clients / "alice.yaml").write_text("")
    ran = run("ping", "spiffe://shop.test/agent/payment")
    assert "The stack here has no client 'cli'." in ran.err
    assert "It has: alice." in ran.err
    ran = run(
        "submit", "--as", "alcie", "--target", "spiffe://shop.test/agent/payment", "--capability", "pay"
    )
    assert (ran.code, "Did you mean 'alice'? It has: alice." in ran.err) == (2, True)
