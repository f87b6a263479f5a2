"""An identity kept in files. For development: nobody renews them.

The files are read again when one of them has changed, so that a new certificate is taken up without a
restart.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from agentweave_bus.exceptions import BundleUnavailableError, IdentityError, SvidUnavailableError
from agentweave_bus.identity.bundle import X509Bundle
from agentweave_bus.identity.provider import IdentityProvider
from agentweave_bus.identity.svid import X509Svid
from agentweave_bus.regular_files import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["StaticMTLSProvider"]

_LOOK_EVERY_SECONDS: Final = 1.0  # files have no event that is portable


class StaticMTLSProvider(IdentityProvider):
    """An SVID in PEM files and a PEM bundle per trust domain.

    ``cert_file`` holds the chain, leaf first; ``key_file`` its unencrypted key, which other users must
    not be able to read; ``bundles`` names a file for each trust domain, the own one included.
    """

    def __init__(
        self, cert_file: Path | str, key_file: Path | str, bundles: Mapping[str, Path | str]
    ) -> None:
        self._cert_file = Path(cert_file)
        self._key_file = Path(key_file)
        self._bundles = MappingProxyType({domain: Path(path) for domain, path in bundles.items()})
        self._svid: X509Svid | None = None
        self._seen: object = None

    async def get_svid(self) -> X509Svid:
        """Read the SVID.

        Raises:
            SvidUnavailableError: a file is missing, unreadable or does not hold what it should.
            IdentityError: other users may read the key.
            ChainRefusedError: the certificate is no X.509-SVID.

        """
        self._seen = await anyio.to_thread.run_sync(self._stamp)
        self._svid = await anyio.to_thread.run_sync(self._read_svid)
        return self._svid

    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        """Read the bundle of ``trust_domain`` (see ``IdentityProvider``)."""
        path = self._bundles.get(trust_domain)
        if path is None:
            raise BundleUnavailableError(
                f"no bundle file is configured for the trust domain {trust_domain}", trust_domain=trust_domain
            )
        try:
            pem = await anyio.to_thread.run_sync(_bytes_of, path)
        except OSError as error:
            raise BundleUnavailableError(
                f"the bundle of {trust_domain} can't be read from {path}: {error.strerror}",
                trust_domain=trust_domain,
            ) from error
        return X509Bundle.from_pem(trust_domain, pem)

    def get_spiffe_id(self) -> str:
        """Return the ID of the SVID last read (see ``IdentityProvider``)."""
        if self._svid is None:
            raise SvidUnavailableError(f"{self._cert_file} was not read yet")
        return self._svid.spiffe_id

    async def wait_for_update(self) -> None:
        """Return when one of the files has changed since the SVID was last read."""
        while await anyio.to_thread.run_sync(self._stamp) == self._seen:  # noqa: ASYNC110 - no event to await
            await anyio.sleep(_LOOK_EVERY_SECONDS)

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        paths = (self._cert_file, self._key_file, *self._bundles.values())
        return tuple(_stamp_of(path) for path in paths)

    def _read_svid(self) -> X509Svid:
        _require_private(self._key_file)
        chain = _read(self._cert_file, "certificate chain")
        return X509Svid.from_pem(chain, _read(self._key_file, "private key"))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _bytes_of(path: Path) -> bytes:
    with open_regular(path) as file:  # it is read in a thread, which nothing could end while it waits
        return file.read()


def _read(path: Path, what: str) -> bytes:
    try:
        return _bytes_of(path)
    except OSError as error:
        raise SvidUnavailableError(f"the {what} can't be read from {path}: {error.strerror}") from error


def _require_private(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SvidUnavailableError(f"the private key can't be read from {path}: {error.strerror}") from error
    if mode & 0o077:
        raise IdentityError(f"other users may read the private key {path}; run: chmod 600 {path}")
