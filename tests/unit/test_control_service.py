"""What the control role follows while it runs, with a role that only notes what it is told."""

from __future__ import annotations

import anyio
import pytest
import yaml

from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.config import ControlConfig
from agentweave_bus.control.composition import Cast
from agentweave_bus.control.grants_watch import GrantsWatch
from agentweave_bus.exceptions import BusError, ConfigurationError, UnreachableError
from agentweave_bus.runtime import control_service
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

CLI, A, B, EVE = (
    SpiffeID(f"spiffe://x.test/{path}") for path in ("client/cli", "agent/a", "agent/b", "desk/eve")
)


class Role:
    """Fails as often as it is told, and says what it was told when it does not."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.claims = []
        self.in_line = []
        self.told = []
        self.made = anyio.Event()

    async def make_claims(self, identities):
        if self.errors:
            raise self.errors.pop(0)
        self.claims.append(list(identities))
        self.made.set()

    async def bring_in_line(self, identities):
        self.in_line.append(list(identities))

    def grants_changed(self):
        self.told.append("role")

    async def operators_changed(self):
        self.told.append("operators")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(control_service, "_POLL_S", 0.01)
    monkeypatch.setattr(control_service, "_AGAIN_S", 0.01)


def grant(path, *callees):
    draft = path.with_suffix(".new")
    draft.write_text(
        yaml.safe_dump(
            {
                "grants": [
                    {"caller": str(CLI), "callee": [str(one) for one in callees], "capabilities": ["*"]},
                    {"caller": "spiffe://x.test/desk/*", "callee": str(A), "capabilities": ["*"]},
                ]
            }
        )
    )
    draft.replace(path)


@pytest.fixture
def stage(tmp_path):
    path = tmp_path / "grants.yaml"
    grant(path, A)
    config = ControlConfig(trust_domain="x.test", grants=path, identities=(str(EVE),))
    grants = GrantsWatch(path)
    everyone = control_service._Everyone(config, grants)
    return path, grants, Cast(everyone, lambda: grants.current, lambda: {str(B)})


async def test_who_is_new_in_the_grants_gets_claims_though_the_broker_is_away_at_first(stage):
    path, grants, cast = stage
    role = Role(UnreachableError("away"), BusError("not now"))
    async with owned_tasks() as group:
        group.start_soon(control_service._follow, role, cast, grants)
        grant(path, A, B)
        with anyio.fail_after(30):
            await role.made.wait()
        group.cancel_scope.cancel()
    assert role.claims == [[A, B, CLI, EVE]]
    assert role.told == ["role", "operators"]


async def test_who_is_revoked_is_not_heard(stage):
    path, grants, cast = stage
    grant(path, A, B)
    assert grants.changed()
    assert [one for one in (CLI, A, B, EVE) if not cast.knows(one)] == [B]


async def test_a_broker_that_is_starting_is_asked_again(stage):
    _, _, cast = stage
    role = Role(BusError("nobody leads"), UnreachableError("away"))
    await control_service._make_first_streams(role, cast)
    assert role.claims == role.in_line == [[A, CLI, EVE]]


@pytest.mark.parametrize("error", [ConfigurationError("that can't be changed"), BusError("never")])
async def test_what_can_not_be_made_keeps_it_from_starting(stage, error, monkeypatch):
    monkeypatch.setattr(control_service, "_START_S", -1.0)
    with pytest.raises(type(error), match=str(error)):
        await control_service._make_first_streams(Role(error), stage[2])
