"""Each capability of the control role is decided on by its own act: by the operator's policy and by its own."""

from __future__ import annotations

from typing import Any

import pytest

from agentweave_bus.authz import AuthzDecision
from agentweave_bus.authz.grants import OPERATOR_ACTS
from agentweave_bus.exceptions import AgentCallError, AuthorizationError
from agentweave_bus.runtime.operators import OperatorCalls
from agentweave_bus.tasks.operator_acts import OBSERVE_ACT, OPERATOR_CAPABILITIES, REDRIVE_ACT, WATCHING
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio

KEY = "0" * 64


async def operators(bus: MemoryBus) -> dict[str, OperatorCalls]:
    """Two who may one act each."""
    entries = [
        {"who": str(bus.id("client/redriver")), "may": [REDRIVE_ACT]},
        {"who": str(bus.id("client/watcher")), "may": [OBSERVE_ACT]},
    ]
    await bus.set_grants({**bus.grants.model_dump(mode="json", exclude_none=True), "operators": entries})
    calls = {}
    for name in ("redriver", "watcher"):
        await bus.client(f"client/{name}")
        parts = bus._held[-1].parts
        assert parts is not None
        calls[name] = OperatorCalls(parts)
    return calls


def asked_of(calls: OperatorCalls) -> dict[str, Any]:
    """Every capability, as it is asked for."""
    letter = f"spiffe://x.test/agent/a#work/{KEY}.1"
    return {
        "dlq_list": calls.list,
        "dlq_show": lambda: calls.show(letter),
        "dlq_redrive": lambda: calls.redrive(letter),
        "dlq_drop": lambda: calls.drop(letter),
        "observe_queues": calls.observe_queues,
        "observe_records": calls.observe_records,
        "observe_task": lambda: calls.observe_task("spiffe://x.test/agent/a", "spiffe://x.test/agent/b", KEY),
    }


def test_every_act_is_one_that_grants_know() -> None:
    assert set(OPERATOR_CAPABILITIES.values()) <= set(OPERATOR_ACTS)
    assert {OPERATOR_CAPABILITIES[name] for name in WATCHING} == {OBSERVE_ACT}


async def test_who_may_one_act_may_not_the_other_by_the_policy_of_either_side(bus: MemoryBus) -> None:
    calls = await operators(bus)
    for who, act in (("redriver", REDRIVE_ACT), ("watcher", OBSERVE_ACT)):
        asks = asked_of(calls[who])
        assert set(asks) == set(OPERATOR_CAPABILITIES)
        for name, ask in asks.items():
            if OPERATOR_CAPABILITIES[name] != act:
                with pytest.raises(AuthorizationError) as denied:
                    await ask()
                assert denied.value.direction == "outbound"
        calls[who]._parts.authorizer.authorize = _allow  # type: ignore[method-assign]
        for name, ask in asks.items():
            if OPERATOR_CAPABILITIES[name] == act:
                continue
            with pytest.raises(AuthorizationError) as denied:
                await ask()
            # The broker's permissions are for what each may as well, so it is not even asked.
            assert denied.value.direction == "broker", name


async def test_who_may_is_answered(bus: MemoryBus) -> None:
    """The broker in memory does not tell of its streams, so this is as far as observing gets there."""
    calls = await operators(bus)
    assert (await calls["redriver"].list())["letters"] == []
    with pytest.raises(AgentCallError, match="which streams there are"):
        await calls["watcher"].observe_queues()


async def _allow(_context: object) -> AuthzDecision:
    return AuthzDecision(allowed=True, reason="patched")
