"""The folder in which a host remembers authorities: who may have written it, and how several share it.

In the directory that is configured each identity has a folder of its own, with one file for each trust
domain: its authorities, and when those that have left did so. A second file beside it holds nothing but when
the others were last seen; it is rewritten every few minutes, and what a crash does to it costs no more than
that time. All processes of an identity on a host share the folder, under a lock.

Folder and files are believed only if they belong to this process's user and nobody else may write the folder,
or read or write the files: whoever may write them decides whose old signatures count here.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentweave_bus.exceptions import ChainRefusedError
from agentweave_bus.identity.chain import MAX_CERTIFICATE_BYTES, load_certificate
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["MAX_AUTHORITIES", "AuthorityFolder", "Kept", "KnownAuthority", "Rule", "bounded"]

MAX_AUTHORITIES: Final = 64
"""How many authorities of one trust domain are remembered; the ones that left last stay."""

_MAX_FILE_BYTES: Final = 512 * 1024
_MAX_SEEN_BYTES: Final = 32
_LOCK_SECONDS: Final = 2.0
_LOCK_PAUSE: Final = 0.01
_SEEN: Final = re.compile(rb"[0-9]{1,16}\n")
_NOT_A_NAME: Final = re.compile(r"[^A-Za-z0-9.-]+")


@dataclass(frozen=True, slots=True)
class KnownAuthority:
    """An authority of ``trust_domain``; ``left_at_ms`` is ``None`` while it is in the bundle.

    ``since_ms`` is since when this process has had it in the bundle without a break. Both times are in
    milliseconds since the epoch.
    """

    trust_domain: str
    certificate: x509.Certificate
    der: bytes
    left_at_ms: int | None
    since_ms: int = 0


Authorities = Mapping[bytes, KnownAuthority]
"""By SHA-256 of their DER."""

Rule = Callable[[bytes, KnownAuthority], bool]
"""Whether an authority, under its fingerprint, may be remembered at all."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is remembered of a trust domain. ``alarm`` says what was not believed; empty if all was."""

    authorities: dict[bytes, KnownAuthority]
    alarm: str = ""


class _NotBelievedError(Exception):
    """What lies in the folder is not believed; the message says why."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    certificate: Annotated[str, Field(max_length=MAX_CERTIFICATE_BYTES * 2)]
    left_at: Annotated[int, Field(ge=0, le=2**53)] | None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    v: Literal[1]
    identity: str
    trust_domain: str
    seen_at: Annotated[int, Field(ge=0, le=2**53)]
    authorities: Annotated[tuple[_Entry, ...], Field(max_length=MAX_AUTHORITIES)]


class AuthorityFolder:
    """The folder of one identity. Everything here reads or writes files, so it is for a thread."""

    def __init__(self, directory: Path, identity: SpiffeID) -> None:
        self._identity = identity
        self.path = directory.absolute() / _named(identity.path, identity)

    def load(self, trust_domain: str) -> Kept:
        """Return what is remembered. What was in the bundle counts as left when it was last seen.

        Raises:
            OSError: it can't be read, or somebody has had the lock for seconds.

        """
        if not self.path.is_dir():
            return Kept({})
        try:
            with self._locked() as folder:
                known, seen_ms, alarm = self._stored(folder, trust_domain)
        except _NotBelievedError as error:
            return Kept({}, str(error))
        return Kept({key: _left(one, seen_ms) for key, one in known.items()}, alarm)

    def merge(self, trust_domain: str, mine: Authorities, *, seen_ms: int, rule: Rule) -> Kept:
        """Put together what this process and others remember, write it down, and return it.

        ``seen_ms`` is when those in the bundle were last seen there. Raises as :meth:`load`.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked() as folder:
                theirs, last_ms, alarm = self._stored(folder, trust_domain)
                merged = _merged(mine, theirs, last_ms)
                merged = {key: one for key, one in merged.items() if rule(key, one)}
                merged = bounded(merged)
                if _essence(merged) != _essence(theirs) or not theirs:
                    self._write(folder, trust_domain, merged, seen_ms)
                _replace(folder, _seen_name(trust_domain), b"%d\n" % seen_ms, lasting=False)
        except _NotBelievedError as error:
            return Kept(dict(mine), str(error))
        return Kept(merged, alarm)

    def forget(self, trust_domain: str) -> Kept:
        """Remove all that is remembered of a trust domain. Raises as :meth:`load`."""
        if not self.path.is_dir():
            return Kept({})
        try:
            with self._locked() as folder:
                for name in (_file_name(trust_domain), _seen_name(trust_domain)):
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
        except _NotBelievedError as error:
            return Kept({}, str(error))
        return Kept({})

    @contextmanager
    def _locked(self) -> Iterator[int]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(self.path, flags)
        try:
            found = os.fstat(folder)
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise _NotBelievedError(
                    f"{self.path} is not believed: it must belong to the user of this process, and nobody"
                    f" else may write it; give it back (chown), and chmod 700 {self.path}"
                )
            _lock(folder)
            yield folder
        finally:
            os.close(folder)

    def _stored(self, folder: int, trust_domain: str) -> tuple[dict[bytes, KnownAuthority], int, str]:
        """Return what lies there, when it was last seen, and what is wrong with it. Then it is put aside."""
        name = _file_name(trust_domain)
        try:
            data = _read(folder, name, _MAX_FILE_BYTES)
            if data is None:
                return {}, 0, ""
            known, seen_ms = self._parsed(data, trust_domain)
        except _NotBelievedError as error:
            os.replace(name, f"{name}.refused", src_dir_fd=folder, dst_dir_fd=folder)
            return {}, 0, f"{self.path / name} is not believed, and was put aside: {error}"
        return known, _last_seen(folder, _seen_name(trust_domain), seen_ms), ""

    def _parsed(self, data: bytes, trust_domain: str) -> tuple[dict[bytes, KnownAuthority], int]:
        try:
            document = _Document.model_validate_json(data)
        except ValidationError as error:
            raise _NotBelievedError(
                f"it is no list of authorities ({error.error_count()} mistakes)"
            ) from None
        if (document.identity, document.trust_domain) != (self._identity, trust_domain):
            raise _NotBelievedError(f"it is that of {document.identity!r} about {document.trust_domain!r}")
        known: dict[bytes, KnownAuthority] = {}
        for entry in document.authorities:
            try:
                der = base64.b64decode(entry.certificate, validate=True)
                certificate = load_certificate(der)
            except (ValueError, ChainRefusedError):
                raise _NotBelievedError("it holds what is no certificate") from None
            one = KnownAuthority(trust_domain, certificate, der, entry.left_at)
            known[hashlib.sha256(der).digest()] = one
        return known, document.seen_at

    def _write(self, folder: int, trust_domain: str, known: Authorities, seen_ms: int) -> None:
        document = _Document(
            v=1,
            identity=str(self._identity),
            trust_domain=trust_domain,
            seen_at=seen_ms,
            authorities=tuple(
                _Entry(certificate=base64.b64encode(one.der).decode(), left_at=one.left_at_ms)
                for one in known.values()
            ),
        )
        _replace(folder, _file_name(trust_domain), document.model_dump_json(indent=1).encode(), lasting=True)


# --- putting together what several processes have seen ------------------------------------------------


def _merged(mine: Authorities, theirs: Authorities, last_ms: int) -> dict[bytes, KnownAuthority]:
    """Put both together; ``last_ms`` is when theirs were last seen in the bundle. In doubt, sooner."""
    merged = {key: _left(one, last_ms) for key, one in theirs.items() if key not in mine}
    for key, one in mine.items():
        other = theirs.get(key)
        merged[key] = one if other is None else _agreed(one, other)
    return merged


def _agreed(mine: KnownAuthority, other: KnownAuthority) -> KnownAuthority:
    if other.left_at_ms is None:
        return mine
    if mine.left_at_ms is None:
        # It has come back, or else this process is the one to which the news has not come yet.
        return mine if mine.since_ms > other.left_at_ms else other
    return mine if mine.left_at_ms <= other.left_at_ms else other


def _left(one: KnownAuthority, at_ms: int) -> KnownAuthority:
    return one if one.left_at_ms is not None else replace(one, left_at_ms=at_ms)


def bounded(known: Authorities) -> dict[bytes, KnownAuthority]:
    """Leave out, of too many, those that left first."""
    newest = sorted(known.items(), key=lambda item: _order(item[1]), reverse=True)[:MAX_AUTHORITIES]
    room, kept = _MAX_FILE_BYTES - 4096, {}
    for key, one in newest:
        room -= len(one.der) * 4 // 3 + 128
        if room < 0:
            break
        kept[key] = one
    return kept


def _order(one: KnownAuthority) -> float:
    return float("inf") if one.left_at_ms is None else one.left_at_ms


def _essence(known: Authorities) -> dict[bytes, int | None]:
    return {key: one.left_at_ms for key, one in known.items()}


# --- files ------------------------------------------------------------------------------------------------


def _named(text: str, whole: str) -> str:
    """Return a file's name for ``whole`` that people recognise by ``text``."""
    readable = _NOT_A_NAME.sub("-", text).strip("-.")[:60]
    return f"{readable}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def _file_name(trust_domain: str) -> str:
    return f"{_named(trust_domain, trust_domain)}.json"


def _seen_name(trust_domain: str) -> str:
    return f"{_named(trust_domain, trust_domain)}.seen"


def _lock(folder: int) -> None:
    give_up = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise
            time.sleep(_LOCK_PAUSE)
        else:
            return


def _read(folder: int, name: str, limit: int) -> bytes | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:  # a link, or not for this process
        raise _NotBelievedError(f"it can't be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise _NotBelievedError("it is no file of its own")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise _NotBelievedError("it belongs to somebody else, or others may read or write it")
        if found.st_size > limit:
            raise _NotBelievedError(f"it has more than {limit} bytes")
        return file.read(limit)


def _last_seen(folder: int, name: str, otherwise: int) -> int:
    try:
        data = _read(folder, name, _MAX_SEEN_BYTES)
    except _NotBelievedError:
        return otherwise  # it is earlier
    return int(data) if data is not None and _SEEN.fullmatch(data) else otherwise


def _replace(folder: int, name: str, data: bytes, *, lasting: bool) -> None:
    draft = f".{name}.new"
    with suppress(FileNotFoundError):
        os.unlink(draft, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(draft, flags, 0o600, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        if lasting:
            file.flush()
            os.fsync(descriptor)
    os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
