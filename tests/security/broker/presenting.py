"""Showing any certificate chain in a TLS handshake, whatever rules it breaks."""

from __future__ import annotations

import ssl

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agentweave_bus.identity import X509Svid
from agentweave_bus.identity.memory_file import MemoryFile
from tests.security.certificates import Papers


def present(context: ssl.SSLContext, papers: X509Svid | Papers) -> None:
    """Have ``context`` show the chain of ``papers`` and sign with their key."""
    chain = "".join(ssl.DER_cert_to_PEM_cert(one) for one in papers.cert_chain).encode()
    key = papers.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with MemoryFile(chain) as one, MemoryFile(key) as other:
        context.load_cert_chain(one.path, other.path)
