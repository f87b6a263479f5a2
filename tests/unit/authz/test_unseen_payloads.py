"""What is decided of a payload that is too large for a policy: what its standing answer says, and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agentweave_bus.authz import Authorizer, AuthzContext, PolicyWatch
from agentweave_bus.authz.policy_input import MAX_INPUT_BYTES
from agentweave_bus.authz.wasm import EmbeddedEngine

pytestmark = pytest.mark.anyio

CALLER, CALLEE = "spiffe://x.test/agent/a", "spiffe://x.test/agent/b"
LARGE = {"text": "x" * (MAX_INPUT_BYTES + 1), "amount": 5}

GRANTS = f"""
grants:
  - caller: {CALLER}
    callee: {CALLEE}
    capabilities: [plain]
  - caller: {CALLER}
    callee: {CALLEE}
    capabilities: [limited]
    limits: {{max_amount: 10}}
  - caller: {CALLER}
    callee: {CALLEE}
    capabilities: [counted]
    limits: {{max_per_minute: 2}}
"""


@pytest.fixture
async def authorizer(tmp_path: Path) -> AsyncIterator[Authorizer]:
    grants = tmp_path / "grants.yaml"
    grants.write_text(GRANTS)
    engine = EmbeddedEngine()
    watch = PolicyWatch(grants, engine.load)
    yield Authorizer(engine, policy_path="agentweave/grants", watch=watch, environment="production")
    await engine.aclose()


def about(action: str) -> AuthzContext:
    return AuthzContext(
        caller=CALLER, callee=CALLEE, action=action, direction="inbound", payload=LARGE, kind="task"
    )


async def test_a_grant_without_conditions_lets_it_pass(authorizer: Authorizer) -> None:
    decision = await authorizer.authorize(about("plain"))
    assert (decision.allowed, decision.standing) == (True, True)
    assert decision.revision == authorizer.revision


async def test_what_depends_on_the_payload_is_denied_and_not_asked_again(authorizer: Authorizer) -> None:
    decision = await authorizer.authorize(about("limited"))
    assert not decision.allowed
    assert decision.answered  # so that a task is rejected, and does not come again and again
    assert "no standing answer" in decision.reason
    assert not (await authorizer.authorize(about("nothing"))).allowed


async def test_limits_of_the_standing_answer_are_counted(authorizer: Authorizer) -> None:
    decided = [(await authorizer.authorize(about("counted"))).allowed for _ in range(3)]
    assert decided == [True, True, False]
