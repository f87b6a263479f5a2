"""A development authority: issues X.509-SVIDs for one trust domain.

It is for one machine: tests, demonstrations and ``agentweave up``. Making one does no I/O and takes well
under a millisecond. In production SPIRE takes its place; nothing else changes.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agentweave_bus.exceptions import IdentityError
from agentweave_bus.identity.bundle import X509Bundle
from agentweave_bus.identity.svid import X509Svid
from agentweave_bus.regular_files import open_regular
from agentweave_bus.spiffe_id import SpiffeID, check_trust_domain

__all__ = ["Authority"]

_BACKDATE: Final = timedelta(seconds=10)  # a peer's clock may be behind
_AUTHORITY_BACKDATE: Final = timedelta(days=1)
_AUTHORITY_LIFETIME: Final = timedelta(days=365)
_RENEW_AUTHORITY_BEFORE: Final = timedelta(days=30)
_CURVES: Final = {"p256": ec.SECP256R1, "p384": ec.SECP384R1}
_KEY_FILE: Final = "authority.key"
_BUNDLE_FILE: Final = "authorities.pem"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_READ: Final = stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True, slots=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


class Authority:
    """The authority of ``trust_domain``.

    With ``intermediate`` SVIDs are signed by an intermediate that the root signed, and carry it in their
    chain. ``not_before`` (default: a day ago) and ``lifetime`` are the root's validity.
    """

    def __init__(
        self,
        trust_domain: str,
        *,
        intermediate: bool = False,
        not_before: datetime | None = None,
        lifetime: timedelta = _AUTHORITY_LIFETIME,
    ) -> None:
        self._trust_domain = check_trust_domain(trust_domain)
        self._with_intermediate = intermediate
        self._not_before = not_before
        self._lifetime = lifetime
        self._install(self._new_root(), retained=())

    @property
    def trust_domain(self) -> str:
        """The domain it speaks for."""
        return self._trust_domain

    @property
    def bundle(self) -> X509Bundle:
        """The active root first, then older ones that are still trusted."""
        return X509Bundle(self._trust_domain, (self._root.certificate, *self._retained))

    def issue(
        self,
        spiffe_id: SpiffeID,
        *,
        lifetime: timedelta = timedelta(hours=1),
        curve: Literal["p256", "p384"] = "p256",
        not_before: datetime | None = None,
        allow_foreign: bool = False,
    ) -> X509Svid:
        """Issue an SVID with a new key.

        ``lifetime`` counts from ``not_before``, by default from now (the certificate is then backdated
        by ten seconds). The SVID never outlives its authority. ``allow_foreign`` signs an ID of another
        trust domain, for tests of what verifiers refuse.

        Raises:
            IdentityError: the ID has no path, or is of another trust domain.

        """
        if not spiffe_id.path:
            raise IdentityError(f"{spiffe_id} names a trust domain; a workload's ID needs a path")
        if spiffe_id.trust_domain != self._trust_domain and not allow_foreign:
            raise IdentityError(f"the authority of {self._trust_domain} does not issue {spiffe_id}")
        key = ec.generate_private_key(_CURVES[curve]())
        start, end = _period(not_before, lifetime)
        builder = _builder(spiffe_id, spiffe_id.path, key, self._signer, (start, self._clamp(end)))
        leaf = _with_leaf_extensions(builder).sign(self._signer.key, hashes.SHA256())
        chain = [leaf.public_bytes(Encoding.DER), *(one.public_bytes(Encoding.DER) for one in self._chain)]
        return X509Svid.from_der(chain, key)

    def rotate(self) -> None:
        """Sign with a new root from now on. The older roots stay in the bundle until :meth:`retire`."""
        self._install(self._new_root(), retained=(self._root.certificate, *self._retained))

    def retire(self) -> None:
        """Take the older roots out of the bundle: what they signed is trusted no more."""
        self._retained: tuple[x509.Certificate, ...] = ()

    @classmethod
    def load_or_create(cls, directory: Path | str, trust_domain: str) -> Authority:
        """Load the authority kept in ``directory``, or make one and keep it there (0700, key 0600).

        A root that is about to expire is replaced, and stays in the bundle until it has expired.

        Folder and files are believed only if they belong to this process's user and nobody else may write
        them, or read the key: whoever has it can be anyone of the trust domain.

        Raises:
            IdentityError: the files can't be read, are incomplete or belong to another trust domain, or the
                folder or files are not this user's alone.

        """
        folder = Path(directory)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_own(folder.stat(), folder, folder, _OTHERS_WRITE)
        if not (folder / _KEY_FILE).exists():
            authority = cls(trust_domain)
            authority.save(folder)
            return authority
        authority = cls._load(folder, trust_domain)
        if datetime.now(UTC) > authority.bundle.authorities[0].not_valid_after_utc - _RENEW_AUTHORITY_BEFORE:
            authority.rotate()
            authority.save(folder)
        return authority

    def save(self, directory: Path | str) -> None:
        """Keep this authority in ``directory``, replacing what is there."""
        folder = Path(directory)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_private(folder / _BUNDLE_FILE, self.bundle.to_pem())
        pem = self._root.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_private(folder / _KEY_FILE, pem)

    @classmethod
    def _load(cls, folder: Path, trust_domain: str) -> Authority:
        try:
            key = load_pem_private_key(
                _read_own(folder, _KEY_FILE, _OTHERS_READ | _OTHERS_WRITE), password=None
            )
            certificates = x509.load_pem_x509_certificates(_read_own(folder, _BUNDLE_FILE, _OTHERS_WRITE))
        except (OSError, ValueError, TypeError) as error:
            raise _unusable(folder, str(error)) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise _unusable(folder, "the key is no elliptic curve key")
        # The bundle is written before the key, so a crash in between leaves a key that a later root has.
        roots = [one for one in certificates if one.public_key() == key.public_key()]
        if not roots:
            raise _unusable(folder, "the key belongs to none of the authorities")
        _check_domain(roots[0], trust_domain, folder)
        authority = cls(trust_domain)
        now = datetime.now(UTC)
        others = [one for one in certificates if one is not roots[0] and one.not_valid_after_utc > now]
        authority._install(_Signer(roots[0], key), retained=tuple(others))
        return authority

    def _install(self, root: _Signer, *, retained: tuple[x509.Certificate, ...]) -> None:
        self._root = root
        self._retained = retained
        self._signer = self._new_intermediate(root) if self._with_intermediate else root
        self._chain = (self._signer.certificate,) if self._with_intermediate else ()

    def _new_root(self) -> _Signer:
        start = self._not_before if self._not_before is not None else datetime.now(UTC) - _AUTHORITY_BACKDATE
        key = ec.generate_private_key(ec.SECP256R1())
        return _make_ca(self._trust_domain, "root", key, None, (start, start + self._lifetime), depth=None)

    def _new_intermediate(self, root: _Signer) -> _Signer:
        key = ec.generate_private_key(ec.SECP256R1())
        period = (root.certificate.not_valid_before_utc, root.certificate.not_valid_after_utc)
        return _make_ca(self._trust_domain, "intermediate", key, root, period, depth=0)

    def _clamp(self, end: datetime) -> datetime:
        return min(end, self._signer.certificate.not_valid_after_utc)


def _period(not_before: datetime | None, lifetime: timedelta) -> tuple[datetime, datetime]:
    if not_before is not None:
        return not_before, not_before + lifetime
    now = datetime.now(UTC)
    return now - _BACKDATE, now + lifetime


def _builder(
    uri: str,
    name: str,
    key: ec.EllipticCurvePrivateKey,
    signer: _Signer | None,
    period: tuple[datetime, datetime],
) -> x509.CertificateBuilder:
    subject = _subject(name)
    issuer = signer.certificate.subject if signer is not None else subject
    signing_key = signer.key if signer is not None else key
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), *period)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority_key, critical=False)
    )


def _subject(name: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "AgentWeave development authority")
    # X.520 bounds a common name to 64 characters; the URI name is the identity, this is for people.
    return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _with_leaf_extensions(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    roles = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(roles, critical=False)
    )


def _make_ca(
    trust_domain: str,
    role: str,
    key: ec.EllipticCurvePrivateKey,
    signer: _Signer | None,
    period: tuple[datetime, datetime],
    *,
    depth: int | None,
) -> _Signer:
    # A distinct name per CA: path building by name must not confuse a new root with an old one.
    name = f"{trust_domain[:40]} {role} {os.urandom(4).hex()}"
    certificate = (
        _builder(SpiffeID.of(trust_domain), name, key, signer, period)
        .add_extension(x509.BasicConstraints(ca=True, path_length=depth), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(signer.key if signer is not None else key, hashes.SHA256())
    )
    return _Signer(certificate, key)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _check_domain(root: x509.Certificate, trust_domain: str, folder: Path) -> None:
    names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if uris != [SpiffeID.of(trust_domain)]:
        raise _unusable(folder, f"it is the authority of {', '.join(uris)}, not of {trust_domain}")


def _read_own(folder: Path, name: str, refused: int) -> bytes:
    """Return what is in a file of ours, looking at the very file that is read: its name may be given anew."""
    path = folder / name
    with open_regular(path) as file:
        _check_own(os.fstat(file.fileno()), path, folder, refused)
        return file.read()


def _check_own(found: os.stat_result, path: Path, folder: Path, refused: int) -> None:
    """Refuse what is not this user's, or gives others a right among ``refused``."""
    if found.st_uid != os.geteuid():
        reason = f"{path} belongs to user {found.st_uid}, but this process runs as user {os.geteuid()}"
        raise _unusable(folder, f"{reason}. If it is no stranger's, run as that user")
    if found.st_mode & refused:
        verb = "read or write" if refused & _OTHERS_READ else "write"
        fix = "700" if stat.S_ISDIR(found.st_mode) else "600"
        reason = f"others may {verb} {path} (mode {stat.S_IMODE(found.st_mode):o})"
        raise _unusable(folder, f"{reason}; if nobody else has been there, `chmod {fix} {path}` will do")


def _unusable(folder: Path, reason: str) -> IdentityError:
    return IdentityError(
        f"the development authority in {folder} can't be used: {reason}. "
        "Remove the folder to make a new one; every SVID of the old one is void then."
    )


def _write_private(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with suppress(FileNotFoundError):
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
