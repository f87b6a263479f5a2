"""The development authority."""

from __future__ import annotations

import os
import stat
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from agentweave_bus.exceptions import ChainRefusedError, IdentityError
from agentweave_bus.identity import Authority, SpiffeID, verify_chain

X = SpiffeID("spiffe://example.test/agent/x")


def verify(svid, bundle):
    return verify_chain(svid.cert_chain, bundle, at_ms=int(time.time() * 1000))


def test_svids_carry_key_identifiers_and_both_roles():
    authority = Authority("example.test")
    leaf = authority.issue(X).leaf
    root = authority.bundle.authorities[0]
    issuer = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert issuer == root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert len(list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)) == 2


def test_rotation_keeps_the_old_root_until_told():
    authority = Authority("example.test", intermediate=True)
    old = authority.issue(X)
    authority.rotate()
    new = authority.issue(X)
    assert verify(old, authority.bundle).authority != verify(new, authority.bundle).authority
    authority.retire()
    assert verify(new, authority.bundle).spiffe_id == X
    with pytest.raises(ChainRefusedError):
        verify(old, authority.bundle)


def test_it_speaks_for_its_own_domain_and_for_workloads():
    authority = Authority("example.test")
    with pytest.raises(IdentityError, match="does not issue"):
        authority.issue(SpiffeID("spiffe://other.test/x"))
    with pytest.raises(IdentityError, match="path"):
        authority.issue(SpiffeID("spiffe://example.test"))


def test_lifetime_counts_from_now_or_from_the_moment_given():
    authority = Authority("example.test")
    svid = authority.issue(X, lifetime=timedelta(seconds=30))
    left = (svid.expiry - datetime.now(UTC)).total_seconds()
    assert 27 < left <= 30
    start = datetime(2999, 1, 1, tzinfo=UTC)
    far = Authority("example.test", lifetime=timedelta(days=400_000)).issue(X, not_before=start)
    assert far.not_before == start
    assert far.expiry == start + timedelta(hours=1)


def test_no_svid_outlives_its_authority():
    authority = Authority("example.test", lifetime=timedelta(days=2))
    svid = authority.issue(X, lifetime=timedelta(days=9))
    assert svid.expiry == authority.bundle.authorities[0].not_valid_after_utc


def test_long_paths_get_a_short_common_name():
    authority = Authority("a" * 200 + ".test")
    spiffe_id = SpiffeID.of(authority.trust_domain, "agent", "x" * 300)
    assert verify(authority.issue(spiffe_id), authority.bundle).spiffe_id == spiffe_id


def test_it_is_kept_in_a_private_folder(tmp_path):
    folder = tmp_path / "state" / "authority"
    made = Authority.load_or_create(folder, "example.test")
    svid = made.issue(X)
    again = Authority.load_or_create(folder, "example.test")
    assert again.bundle == made.bundle
    assert verify(svid, again.bundle).spiffe_id == X
    assert verify(again.issue(X), made.bundle).spiffe_id == X
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_rotation_is_kept_too(tmp_path):
    made = Authority.load_or_create(tmp_path, "example.test")
    old = made.issue(X)
    made.rotate()
    made.save(tmp_path)
    again = Authority.load_or_create(tmp_path, "example.test")
    assert verify(old, again.bundle).spiffe_id == X
    assert verify(again.issue(X), again.bundle).authority == verify(made.issue(X), made.bundle).authority


def test_a_root_near_its_end_is_replaced_and_still_trusted(tmp_path):
    ending = Authority("example.test", lifetime=timedelta(days=20))
    old = ending.issue(X)
    ending.save(tmp_path)
    again = Authority.load_or_create(tmp_path, "example.test")
    assert len(again.bundle.authorities) == 2
    assert verify(old, again.bundle).authority != verify(again.issue(X), again.bundle).authority
    assert len(Authority.load_or_create(tmp_path, "example.test").bundle.authorities) == 2


def test_unusable_files_say_what_to_do(tmp_path):
    Authority.load_or_create(tmp_path, "example.test")
    with pytest.raises(IdentityError, match=r"not of other\.test.*Remove the folder"):
        Authority.load_or_create(tmp_path, "other.test")
    Authority("example.test").save(tmp_path / "second")
    (tmp_path / "authority.key").write_bytes((tmp_path / "second" / "authority.key").read_bytes())
    with pytest.raises(IdentityError, match="none of the authorities"):
        Authority.load_or_create(tmp_path, "example.test")
    (tmp_path / "authorities.pem").write_bytes(b"rubbish")
    with pytest.raises(IdentityError, match="can't be used"):
        Authority.load_or_create(tmp_path, "example.test")
    (tmp_path / "authorities.pem").unlink()
    with pytest.raises(IdentityError, match="can't be used"):
        Authority.load_or_create(tmp_path, "example.test")


STRANGER = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@as_root
@pytest.mark.parametrize("name", ["", "authority.key", "authorities.pem"])
def test_what_another_user_owns_is_not_believed(tmp_path, name):
    made = Authority.load_or_create(tmp_path, "example.test")
    os.chown(tmp_path / name, STRANGER, STRANGER)
    with pytest.raises(
        IdentityError, match=rf"belongs to user {STRANGER}, but .* user 0\. .*Remove the folder"
    ):
        Authority.load_or_create(tmp_path, "example.test")
    os.chown(tmp_path / name, 0, 0)
    assert Authority.load_or_create(tmp_path, "example.test").bundle == made.bundle


@as_root
def test_no_authority_is_made_in_the_folder_of_another_user(tmp_path):
    os.chown(tmp_path, STRANGER, STRANGER)
    with pytest.raises(IdentityError, match=f"belongs to user {STRANGER}"):
        Authority.load_or_create(tmp_path, "example.test")
    assert list(tmp_path.iterdir()) == []


@as_root
def test_a_link_to_a_key_of_another_user_is_not_believed(tmp_path):
    Authority.load_or_create(tmp_path / "mine", "example.test")
    elsewhere = (tmp_path / "mine" / "authority.key").rename(tmp_path / "key")
    (tmp_path / "mine" / "authority.key").symlink_to(elsewhere)
    os.chown(elsewhere, STRANGER, STRANGER)
    with pytest.raises(IdentityError, match=f"belongs to user {STRANGER}"):
        Authority.load_or_create(tmp_path / "mine", "example.test")


@pytest.mark.parametrize(
    ("name", "mode", "others", "way_out"),
    [
        ("", 0o770, "write", "700"),
        ("", 0o702, "write", "700"),
        ("authority.key", 0o640, "read or write", "600"),
        ("authority.key", 0o604, "read or write", "600"),
        ("authority.key", 0o620, "read or write", "600"),
        ("authority.key", 0o602, "read or write", "600"),
        ("authorities.pem", 0o664, "write", "600"),
    ],
)
def test_what_others_may_change_or_copy_is_not_believed(tmp_path, name, mode, others, way_out):
    made = Authority.load_or_create(tmp_path, "example.test")
    path = tmp_path / name
    path.chmod(mode)
    said = rf"others may {others} {path} \(mode {mode:o}\); .*`chmod {way_out} {path}` will do"
    with pytest.raises(IdentityError, match=said):
        Authority.load_or_create(tmp_path, "example.test")
    path.chmod(int(way_out, 8))
    assert Authority.load_or_create(tmp_path, "example.test").bundle == made.bundle


def test_others_may_look_into_the_folder_and_read_the_bundle(tmp_path):
    made = Authority.load_or_create(tmp_path, "example.test")
    tmp_path.chmod(0o755)
    (tmp_path / "authorities.pem").chmod(0o644)
    assert Authority.load_or_create(tmp_path, "example.test").bundle == made.bundle


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_it_makes_itself_is_believed_under_any_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        made = Authority.load_or_create(tmp_path / "state" / "authority", "example.test")
    finally:
        os.umask(before)
    assert Authority.load_or_create(tmp_path / "state" / "authority", "example.test").bundle == made.bundle
