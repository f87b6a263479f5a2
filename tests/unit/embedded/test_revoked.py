"""The embedded stack and its file of revocations: what its agents are told, and what its authority issues."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from agentweave_bus.config import load_config, load_stack
from agentweave_bus.embedded.assembly import _variables, plan_agents
from agentweave_bus.embedded.revoked import Revoked
from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.identity import Authority
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

ORDER, STOCK = (SpiffeID(f"spiffe://shop.test/agent/{name}") for name in ("order", "stock"))


@pytest.fixture
async def api(tmp_path: Path):
    async with WorkloadApiServer(Authority("shop.test"), tmp_path / "s") as server:
        (tmp_path / "s").mkdir(mode=0o700)
        for identity in (ORDER, STOCK):
            await server.serve(identity, lifetime=timedelta(seconds=60))
        yield server


def written(path: Path, *entries: dict[str, str]) -> Path:
    draft = path.with_suffix(".new")
    why = {"reason": "x", "time": "2026-01-31T12:00:00Z"}
    draft.write_text(
        yaml.safe_dump(
            {"revoked": [{key: str(value) for key, value in (one | why).items()} for one in entries]}
        )
    )
    draft.replace(path)
    return path


def test_agents_follow_the_stacks_file_unless_they_name_one(tmp_path: Path) -> None:
    about = {"name": "order", "trust_domain": "shop.test", "class": "order:Order"}
    (tmp_path / "order.yaml").write_text(yaml.safe_dump({"agent": about}))
    stack = {"trust_domain": "shop.test", "agents": [{"config": "order.yaml"}], "revocations": "revoked.yaml"}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(stack))
    config = load_stack(tmp_path / "stack.yaml")
    (agent,) = plan_agents(config)
    told = _variables(config, agent)["AGENTWEAVE_IDENTITY__REVOCATIONS"]
    assert yaml.safe_load(told) == str(tmp_path / "revoked.yaml")
    own = {"agent": about, "identity": {"revocations": "mine.yaml"}}
    (tmp_path / "order.yaml").write_text(yaml.safe_dump(own))
    (agent,) = plan_agents(config)
    assert "AGENTWEAVE_IDENTITY__REVOCATIONS" not in _variables(config, agent)
    assert load_config(tmp_path / "order.yaml").identity.revocations == tmp_path / "mine.yaml"


def test_a_stack_does_not_start_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gone\.yaml"):
        Revoked(tmp_path / "gone.yaml")
    assert Revoked(None).shut_out == frozenset()


async def test_what_is_issued_from_now_on_begins_no_earlier(api: WorkloadApiServer) -> None:
    """Now, and at each renewal, whatever is usually taken off for clocks that are behind."""
    floor = datetime.now(UTC).replace(microsecond=0)
    assert api.current_svid(ORDER).not_before < floor
    api.rotate(ORDER, not_before=floor)
    for _ in range(2):
        svid = api.current_svid(ORDER)
        assert floor <= svid.not_before <= datetime.now(UTC)
        assert timedelta(seconds=55) < svid.expiry - datetime.now(UTC) <= timedelta(seconds=60)
        api.rotate(ORDER)
    assert api.current_svid(STOCK).not_before < floor


async def test_whose_a_certificate_was_is_known(api: WorkloadApiServer) -> None:
    first = api.current_svid(ORDER)
    api.rotate(ORDER)
    assert api.owner_of(first.x5t) == api.owner_of(api.current_svid(ORDER).x5t) == ORDER
    assert api.owner_of(b"\0" * 32) is None


async def test_who_is_shut_out_for_how_long(api: WorkloadApiServer, tmp_path: Path) -> None:
    file = written(tmp_path / "revoked.yaml")
    revoked = Revoked(file)
    revoked.begin(api)
    assert (revoked.changed(), revoked.shut_out) == (False, frozenset())
    old = api.current_svid(STOCK)
    written(file, {"spiffe_id": ORDER}, {"fingerprint": old.x5t.hex()})
    assert revoked.changed()
    revoked.note_owners(api)
    assert revoked.shut_out == {ORDER, STOCK}
    assert revoked.let_in_again(api)
    assert revoked.shut_out == {ORDER}
    assert api.current_svid(STOCK) != old
    assert not revoked.let_in_again(api)
    written(file)
    assert revoked.changed()
    assert revoked.shut_out == frozenset()


async def test_who_is_revoked_as_of_later_stays_out_until_then(
    api: WorkloadApiServer, tmp_path: Path
) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    revoked = Revoked(
        written(tmp_path / "revoked.yaml", {"spiffe_id": ORDER, "issued_before": later.isoformat()})
    )
    revoked.begin(api)
    assert revoked.shut_out == {ORDER}
    assert not revoked.let_in_again(api)


async def test_at_the_start_older_certificates_are_replaced(api: WorkloadApiServer, tmp_path: Path) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    revoked = Revoked(
        written(tmp_path / "revoked.yaml", {"spiffe_id": ORDER, "issued_before": now.isoformat()})
    )
    assert api.current_svid(ORDER).not_before < now
    revoked.begin(api)
    assert api.current_svid(ORDER).not_before >= now
    assert revoked.shut_out == frozenset()
