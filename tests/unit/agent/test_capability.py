"""The decorators: what they accept, that they leave functions alone, and that order does not matter."""

from __future__ import annotations

import itertools

import pytest

from agentweave_bus.agent import capability, requires_federated_peer, requires_peer
from agentweave_bus.agent.capability import marks_of
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.tasks.retry import Retry


def test_the_function_is_returned_unchanged() -> None:
    def quote(item: str) -> str:
        return item

    assert capability("quote", safe=True, description="A price", timeout=2)(quote) is quote
    assert quote("x") == "x"
    spec = marks_of(quote).spec
    assert (spec.name, spec.safe, spec.description, spec.timeout) == ("quote", True, "A price", 2.0)


@pytest.mark.parametrize("name", ["a", "create_order", "x-1", "9lives", "a" * 64])
def test_names_of_the_grammar_are_accepted(name: str) -> None:
    assert marks_of(capability(name)(lambda: None)).spec.name == name


@pytest.mark.parametrize("name", ["", "Quote", "a.b", "_a", "-a", "a" * 65, "a\n", "é", "a b", None, 7])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ConfigurationError, match="can't name a capability"):
        capability(name)  # type: ignore[arg-type]


def test_the_refusal_offers_a_name() -> None:
    with pytest.raises(ConfigurationError, match="Try 'create_order'"):
        capability("Create Order")


def test_a_decorator_without_a_name_is_explained() -> None:
    with pytest.raises(ConfigurationError, match=r'Write @capability\("name"\)'):
        capability(lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), True, "5"])
def test_a_timeout_is_a_positive_number(timeout: object) -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        capability("x", timeout=timeout)  # type: ignore[arg-type]


def test_what_is_said_about_tasks_is_kept() -> None:
    rule = Retry(attempts=7)
    spec = marks_of(capability("x", concurrency=4, retry=rule)(lambda: None)).spec
    assert (spec.concurrency, spec.retry) == (4, rule)
    plain = marks_of(capability("x")(lambda: None)).spec
    assert (plain.concurrency, plain.retry) == (None, None)


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True, "4"])
def test_a_concurrency_is_a_number_from_one(concurrency: object) -> None:
    with pytest.raises(ConfigurationError, match="concurrency"):
        capability("x", concurrency=concurrency)  # type: ignore[arg-type]


@pytest.mark.parametrize("retry", [3, {"attempts": 3}, Retry])
def test_a_retry_is_a_retry(retry: object) -> None:
    with pytest.raises(ConfigurationError, match="retry is a Retry"):
        capability("x", retry=retry)  # type: ignore[arg-type]


def test_one_function_has_one_name() -> None:
    with pytest.raises(ConfigurationError, match="already capability 'a', not also 'b'"):

        @capability("b")
        @capability("a")
        def both() -> None: ...


@pytest.mark.parametrize("thing", [staticmethod(len), classmethod(len), property(len), object()])
def test_only_functions_are_decorated(thing: object) -> None:
    with pytest.raises(ConfigurationError, match="goes on a plain function"):
        capability("x")(thing)  # type: ignore[type-var]


def test_every_order_of_decorators_means_the_same() -> None:
    decorators = [
        capability("pay"),
        requires_federated_peer(trust_domains=["acme-corp.io"]),
        requires_peer("spiffe://acme-corp.io/agent/*"),
    ]
    for order in itertools.permutations(decorators):

        def pay() -> None: ...

        for decorate in order:
            assert decorate(pay) is pay
        assert marks_of(pay).spec.name == "pay"
        assert len(marks_of(pay).rules) == 2
