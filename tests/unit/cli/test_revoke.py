"""``agentweave authz revoke``: what ends up in the file, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from agentweave_bus.identity import Authority
from agentweave_bus.identity.revocation_file import load_revocations
from agentweave_bus.spiffe_id import SpiffeID
from tests.unit.cli.conftest import Ran

ORDER = SpiffeID("spiffe://shop.test/agent/order")
WHY = ("--reason", "key in a log")
Run = Callable[..., Ran]


@pytest.fixture
def configured(place: Path) -> Path:
    """The stack here follows a file, which is not there yet."""
    with (place / "agentweave.yaml").open("a") as stack:
        stack.write("revocations: revoked.yaml\n")
    return place / "revoked.yaml"


def test_an_identity_goes_into_the_stacks_file_and_out_again(run: Run, configured: Path) -> None:
    done = run("authz", "revoke", "--spiffe-id", ORDER, *WHY)
    assert (done.code, done.err) == (0, "")
    assert done.json["changed"] is True
    (entry,) = load_revocations(configured).revoked
    assert (entry.spiffe_id, entry.reason) == (ORDER, "key in a log")
    assert abs(entry.time - datetime.now(UTC)) < timedelta(minutes=1)
    again = run("authz", "revoke", "--spiffe-id", ORDER, *WHY)
    assert (again.code, again.json["changed"]) == (0, False)
    undone = run("authz", "revoke", "--spiffe-id", ORDER, "--undo")
    assert (undone.code, undone.json["changed"], undone.json["revoked"]) == (0, True, False)
    assert load_revocations(configured).revoked == ()


def test_a_name_that_nobody_bears_is_revoked_with_a_warning(run: Run, configured: Path, place: Path) -> None:
    with (place / "agentweave.yaml").open("a") as stack:
        stack.write("agents: [{config: order.yaml}]\n")
    (place / "order.yaml").write_text("agent: {name: order, trust_domain: shop.test, class: 'a:B'}\n")
    for typo, meant in (("agent/oder", "agent oder; did you mean order?"), ("client/clo", "mean cli?")):
        done = run("authz", "revoke", "--spiffe-id", f"spiffe://shop.test/{typo}", *WHY)
        assert (done.code, done.json["changed"]) == (0, True)
        assert meant in done.err
        assert "It is revoked all the same" in done.err
    for known in (ORDER, "spiffe://shop.test/client/cli", "spiffe://other.test/agent/oder"):
        assert run("authz", "revoke", "--spiffe-id", known, *WHY).err == ""
    assert len(load_revocations(configured).revoked) == 5


@pytest.mark.usefixtures("terminal")
def test_people_read_a_sentence(run: Run, configured: Path) -> None:
    assert run("authz", "revoke", "--spiffe-id", ORDER, *WHY).out == f"{configured}: {ORDER} is revoked.\n"
    assert "revoked already" in run("authz", "revoke", "--spiffe-id", ORDER, *WHY).out
    assert "no longer revoked" in run("authz", "revoke", "--spiffe-id", ORDER, "--undo").out


def test_now_covers_what_was_issued_up_to_this_moment(run: Run, configured: Path) -> None:
    svid = Authority("shop.test").issue(ORDER, not_before=datetime.now(UTC))
    assert run("authz", "revoke", "--spiffe-id", ORDER, "--issued-before", "now", *WHY).code == 0
    (entry,) = load_revocations(configured).revoked
    assert entry.issued_before is not None
    assert svid.not_before < entry.issued_before <= datetime.now(UTC) + timedelta(seconds=1)


def test_a_certificate_is_found_by_its_file(run: Run, configured: Path, tmp_path: Path) -> None:
    svid = Authority("shop.test", intermediate=True).issue(ORDER)
    (tmp_path / "order.pem").write_bytes(svid.chain_pem())
    done = run("authz", "revoke", "--certificate", "order.pem", *WHY)
    assert f"order.pem is {ORDER}'s, until " in done.err
    assert load_revocations(configured).to_set().certificates == {svid.x5t}
    assert run("authz", "revoke", "--fingerprint", svid.x5t.hex(), *WHY).json["changed"] is False


def test_an_authority_by_its_file_or_fingerprint(run: Run, configured: Path, tmp_path: Path) -> None:
    authority = Authority("shop.test")
    (tmp_path / "ca.pem").write_bytes(authority.bundle.to_pem())
    (known,) = authority.bundle.authority_fingerprints
    assert run("authz", "revoke", "--authority", "ca.pem", *WHY).code == 0
    assert load_revocations(configured).to_set().authorities == {known}
    assert run("authz", "revoke", "--authority", known.hex(), *WHY).json["changed"] is False
    authority.rotate()
    (tmp_path / "ca.pem").write_bytes(authority.bundle.to_pem())
    several = run("authz", "revoke", "--authority", "ca.pem", *WHY)
    assert several.code == 2
    assert known.hex() in several.err


def test_a_file_that_nobody_here_follows_is_changed_with_a_warning(run: Run, place: Path) -> None:
    done = run("authz", "revoke", "--spiffe-id", ORDER, *WHY, "--file", "mine.yaml")
    assert (done.code, done.json["followed_by"]) == (0, None)
    assert "nothing here is known to follow mine.yaml" in done.err
    assert yaml.safe_load((place / "mine.yaml").read_text())["revoked"][0]["spiffe_id"] == ORDER


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--spiffe-id", ORDER], "needs a reason"),
        (["--spiffe-id", "order", *WHY], "spiffe://"),
        (["--spiffe-id", "spiffe://shop.test", *WHY], "whole trust domain"),
        (["--fingerprint", "abc", *WHY], "64 hexadecimal digits"),
        (["--fingerprint", "ab" * 32, "--issued-before", "now", *WHY], "goes with spiffe_id only"),
        (["--spiffe-id", ORDER, "--issued-before", "2026-01-31", *WHY], "timezone"),
        (["--certificate", "grants.yaml", *WHY], "holds no certificate"),
        (["--certificate", "nowhere.pem", *WHY], "can't be read"),
    ],
)
def test_what_is_no_revocation_changes_nothing(
    run: Run, configured: Path, arguments: list[str], said: str
) -> None:
    done = run("authz", "revoke", *arguments)
    assert done.code == 2
    assert said in done.err
    assert not configured.exists()


@pytest.mark.usefixtures("place")
def test_without_a_file_the_way_out_is_named(run: Run) -> None:
    done = run("authz", "revoke", "--spiffe-id", ORDER, *WHY)
    assert done.code == 2
    assert "agentweave.yaml names none. Set revocations: revoked.yaml there" in done.err


def test_config_check_reads_the_file(run: Run, configured: Path) -> None:
    assert "revoked.yaml can't be read" in run("config", "check", "agentweave.yaml").err
    configured.write_text("revoked: [nonsense]\n")
    refused = run("config", "check", "agentweave.yaml")
    assert (refused.code, "revoked[0]" in refused.err) == (2, True)
    configured.write_text("revoked: []\n")
    assert run("config", "check", "agentweave.yaml").code == 0
