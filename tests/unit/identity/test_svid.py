"""SVIDs and their memory files."""

from __future__ import annotations

import copy
import gc
import os
import ssl
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from agentweave_bus.exceptions import ChainRefusedError, SvidUnavailableError
from agentweave_bus.identity import Authority, SpiffeID, X509Svid
from agentweave_bus.identity.memory_file import MemoryFile

X = SpiffeID("spiffe://example.test/agent/x")


@pytest.fixture
def svid():
    return Authority("example.test", intermediate=True).issue(X)


def test_der_and_pem_give_the_same_svid(svid):
    assert X509Svid.from_der(svid.cert_chain, svid.key_der()) == svid
    assert X509Svid.from_der(list(svid.cert_chain), svid.private_key) == svid
    assert X509Svid.from_pem(svid.chain_pem(), svid.key_pem()) == svid
    assert hash(X509Svid.from_pem(svid.chain_pem(), svid.key_pem())) == hash(svid)
    assert svid != Authority("example.test").issue(X)


def test_what_it_tells(svid):
    assert svid.spiffe_id == X
    assert len(svid.x5t) == 32
    assert svid.not_before < datetime.now(UTC) < svid.expiry
    assert "example.test/agent/x" in repr(svid)
    assert "KEY" not in repr(svid)
    assert "private" not in repr(svid)


def test_the_paths_are_memory_of_this_process_alone(svid):
    assert Path(svid.cert_chain_path).read_bytes() == svid.chain_pem()
    assert Path(svid.private_key_path).read_bytes() == svid.key_pem()
    assert svid.private_key_path == svid.private_key_path
    assert svid.private_key_path.startswith("/proc/self/fd/")
    assert "memfd:" in Path(svid.private_key_path).readlink().name
    assert stat.S_IMODE(Path(svid.private_key_path).stat().st_mode) == 0o600
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(svid.cert_chain_path, svid.private_key_path)
    descriptor = int(svid.private_key_path.rpartition("/")[2])
    assert not os.get_inheritable(descriptor)
    with pytest.raises(OSError):
        os.write(descriptor, b"x")


def test_the_memory_goes_with_the_svid():
    svid = Authority("example.test").issue(X)
    shared = copy.copy(svid)
    descriptor = int(svid.private_key_path.rpartition("/")[2])
    inode = os.fstat(descriptor).st_ino
    del svid
    gc.collect()
    assert os.fstat(descriptor).st_ino == inode
    del shared
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_without_memory_files_a_private_file_is_removed(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with MemoryFile(b"secret") as file:
        path = Path(file.path)
        assert path.read_bytes() == b"secret"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == []
    file.close()


def test_another_key_is_refused(svid):
    with pytest.raises(SvidUnavailableError, match="does not belong"):
        X509Svid.from_der(svid.cert_chain, ec.generate_private_key(ec.SECP256R1()))


def test_unusable_keys_are_refused_without_a_word_of_their_content(svid):
    encrypted = svid.private_key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )
    foreign = rsa.generate_private_key(65537, 2048).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    for key in (b"", b"SECRET-RUBBISH", encrypted, foreign):
        with pytest.raises(SvidUnavailableError) as refusal:
            X509Svid.from_pem(svid.chain_pem(), key)
        assert "SECRET" not in str(refusal.value)


def test_no_certificate_no_svid(svid, hand_made_ca):
    with pytest.raises(SvidUnavailableError):
        X509Svid.from_der([], svid.private_key)
    with pytest.raises(SvidUnavailableError):
        X509Svid.from_pem(b"", svid.key_pem())
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(ChainRefusedError, match="CA certificate"):
        X509Svid.from_der([hand_made_ca().leaf(key=key, ca=True)], key)
    with pytest.raises(SvidUnavailableError, match="not of"):
        X509Svid(SpiffeID.of("example.test", "y"), svid.cert_chain, svid.private_key)
