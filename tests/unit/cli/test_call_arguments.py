"""What can be wrong with a call is said before anything is connected to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentweave_bus.cli.arguments import parse_scope
from tests.unit.cli.conftest import Ran

ORDER = "spiffe://shop.test/agent/order"


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("scope", ["foo", ORDER, f"{ORDER}#", f"{ORDER}#Get", "order#get_order", ""])
def test_a_scope_that_is_none(run: Callable[..., Ran], scope: str) -> None:
    ran = run("call", "--target", ORDER, "--capability", "get_order", "--scope", scope)
    assert ran.code == 2
    assert f"--scope {scope!r} is no SPIFFE_ID#CAPABILITY. Write it like spiffe://" in ran.err


def test_scopes_that_are_some() -> None:
    good = [f"{ORDER}#get_order", f"{ORDER}#*", f"{ORDER}#order.created"]
    assert parse_scope(good) == good
    assert parse_scope(None) is None
