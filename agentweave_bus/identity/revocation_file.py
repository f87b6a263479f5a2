"""The file of revocations: read strictly, followed while a process runs, and extended safely.

A file that can't be read, or holds one mistake, changes nothing: what was revoked stays so, and whoever is
told of alarms hears of it once. A file without the key ``revoked`` is a mistake, too, because one that was
cut short must not set everybody free.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import anyio.to_thread
import yaml
from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field, model_validator

from agentweave_bus.config.document import MAX_FILE_BYTES
from agentweave_bus.config.fields import ConfigModel, SpiffeIdText
from agentweave_bus.config.loading import validated
from agentweave_bus.config.sources import Settings
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.identity.revocation import RevocationList, RevokedSet
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "RevocationFile",
    "RevocationWatch",
    "RevokedEntry",
    "add_revocation",
    "load_revocations",
    "remove_revocations",
]

_log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.5
_SHA256_HEX: Final = 64
_HEAD: Final = "# Who is trusted no more; `agentweave authz revoke` adds to it.\n"

_Stamp = tuple[int, int, int]


def _fingerprint(text: str) -> str:
    plain = text.replace(":", "").lower()
    if len(plain) != _SHA256_HEX or set(plain) - set("0123456789abcdef"):
        raise ValueError(f"{text!r} must be the SHA-256 of a certificate: {_SHA256_HEX} hexadecimal digits")
    return plain


def _workload(spiffe_id: SpiffeID) -> SpiffeID:
    if not spiffe_id.path:
        raise ValueError(
            f"{spiffe_id} is a whole trust domain; take it out of identity.allowed_trust_domains,"
            " or revoke its authority"
        )
    return spiffe_id


def _a_time(value: Any) -> Any:
    if isinstance(value, str | datetime):
        return value
    shown = value.isoformat() if isinstance(value, date) else repr(value)
    raise ValueError(f"{shown} must be a time with its zone, such as 2026-01-31T12:00:00Z")


_Workload = Annotated[SpiffeIdText, AfterValidator(_workload)]
_Fingerprint = Annotated[str, AfterValidator(_fingerprint)]
_Time = Annotated[AwareDatetime, BeforeValidator(_a_time)]


class RevokedEntry(ConfigModel):
    """One revocation: of an identity, of one certificate, or of an authority; why, and since when.

    Attributes:
        spiffe_id: a workload's SPIFFE ID.
        issued_before: with ``spiffe_id``: only certificates whose validity begins before this are revoked.
        fingerprint: SHA-256 of a leaf's DER, in hexadecimal.
        authority: the same of an authority or intermediate.
        reason: for people.
        time: when it was revoked, for people.

    """

    spiffe_id: _Workload | None = None
    issued_before: _Time | None = None
    fingerprint: _Fingerprint | None = None
    authority: _Fingerprint | None = None
    reason: Annotated[str, Field(min_length=1)]
    time: _Time

    @model_validator(mode="after")
    def _one_subject(self) -> RevokedEntry:
        if sum(one is not None for one in (self.spiffe_id, self.fingerprint, self.authority)) != 1:
            raise ValueError("name one of spiffe_id, fingerprint and authority")
        if self.issued_before is not None and self.spiffe_id is None:
            raise ValueError("issued_before goes with spiffe_id only")
        return self

    @property
    def subject(self) -> tuple[str | None, str | None, str | None]:
        """What is revoked: identity, leaf or authority, two of which are None."""
        return self.spiffe_id, self.fingerprint, self.authority

    def covers(self, other: RevokedEntry) -> bool:
        """Say whether ``other`` would add nothing to this one."""
        if self.subject != other.subject:
            return False
        mine, others = self.issued_before, other.issued_before
        return mine is None or (others is not None and others <= mine)

    def to_data(self) -> dict[str, Any]:
        """Return it as YAML takes it."""
        return self.model_dump(mode="json", exclude_none=True)


class RevocationFile(ConfigModel):
    """The whole file."""

    revoked: tuple[RevokedEntry, ...]

    def to_set(self) -> RevokedSet:
        """Return what verification asks."""
        entries = self.revoked
        before: dict[str, int] = {}
        for one in entries:
            if one.spiffe_id is not None and one.issued_before is not None:
                ms = int(one.issued_before.timestamp() * 1000)
                before[one.spiffe_id] = max(before.get(one.spiffe_id, ms), ms)
        return RevokedSet(
            frozenset(str(e.spiffe_id) for e in entries if e.spiffe_id and e.issued_before is None),
            frozenset(bytes.fromhex(e.fingerprint) for e in entries if e.fingerprint),
            frozenset(bytes.fromhex(e.authority) for e in entries if e.authority),
            before,
        )


def load_revocations(path: Path) -> RevocationFile:
    """Read and check a file.

    Raises:
        ConfigurationError: it is not there, can't be read, or an entry is wrong; with every mistake's line.

    """
    settings = Settings()
    settings.read_file(path, ())
    return validated(RevocationFile, settings, "production")


# --- following it ----------------------------------------------------------------------------------------


class RevocationWatch:
    """The revocations of a process: read once by the constructor, then followed by :meth:`run`.

    Without ``path`` nothing is ever revoked. ``on_alarm`` gets a sentence when a changed file was refused.

    Raises:
        ConfigurationError: the file is not there, or is wrong: nobody may start without knowing it.

    """

    def __init__(
        self, path: Path | None, *, on_alarm: Callable[[str], None] = lambda _sentence: None
    ) -> None:
        self._path = path
        self._on_alarm = on_alarm
        self._listeners: list[Callable[[], None]] = []
        self._alarm = ""
        self._seen = _stamp(path)
        self.list = RevocationList(None if path is None else load_revocations(path).to_set())

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, on the event loop, after other revocations have come into force."""
        self._listeners.append(listener)

    def refresh(self) -> bool:
        """Look at the file; return whether other revocations are in force now. Reads files."""
        if self._path is None or (stamp := _stamp(self._path)) == self._seen:
            return False
        try:
            revoked = load_revocations(self._path).to_set()
        except Exception as error:  # noqa: BLE001 - a slip in the file must not end what runs
            self._seen = stamp
            self._raise_alarm(error)
            return False
        self._seen, self._alarm = stamp, ""
        if revoked == self.list.revoked:
            return False
        self.list.replace(revoked)
        return True

    async def run(self) -> None:
        """Follow the file until cancelled. The caller owns this task."""
        while self._path is not None:
            await anyio.sleep(_POLL_SECONDS)
            if await anyio.to_thread.run_sync(self.refresh):
                _log.warning("other revocations are in force: %s", _counted(self.list.revoked))
                for listener in self._listeners:
                    listener()

    def _raise_alarm(self, error: Exception) -> None:
        foreseen = isinstance(error, ConfigurationError)
        sentence = f"the revocations stay as they were: {error if foreseen else type(error).__name__}"
        if sentence != self._alarm:
            self._alarm = sentence
            _log.error("%s", sentence, exc_info=None if foreseen else error)
            self._on_alarm(sentence)


def _stamp(path: Path | None) -> _Stamp | None:
    try:
        found = None if path is None else path.stat()
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def _counted(revoked: RevokedSet) -> str:
    identities = len(revoked.spiffe_ids) + len(revoked.issued_before)
    return (
        f"{identities} identities, {len(revoked.certificates)} certificates,"
        f" {len(revoked.authorities)} authorities"
    )


# --- changing it -----------------------------------------------------------------------------------------


def add_revocation(path: Path, entry: RevokedEntry) -> bool:
    """Add ``entry`` to the file, which is made where there is none; return False if it stood there already.

    The file is replaced as a whole, its mode is kept, and others who do the same wait. Comments are lost.

    Raises:
        ConfigurationError: the file is wrong as it is, would become too large, or can't be written.

    """

    def change(entries: tuple[RevokedEntry, ...]) -> tuple[RevokedEntry, ...] | None:
        if any(one.covers(entry) for one in entries):
            return None
        return (*(one for one in entries if not entry.covers(one)), entry)

    return _change(path, change)


def remove_revocations(path: Path, subject: tuple[str | None, str | None, str | None]) -> bool:
    """Take every entry about ``subject`` out; return False if there was none. Raises as adding does."""

    def change(entries: tuple[RevokedEntry, ...]) -> tuple[RevokedEntry, ...] | None:
        left = tuple(one for one in entries if one.subject != subject)
        return None if len(left) == len(entries) else left

    return _change(path, change)


def _change(
    path: Path, change: Callable[[tuple[RevokedEntry, ...]], tuple[RevokedEntry, ...] | None]
) -> bool:
    try:
        with _exclusively(path):
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            entries = change(load_revocations(path).revoked if path.exists() else ())
            if entries is not None:
                _replace(path, entries, mode)
            return entries is not None
    except OSError as error:
        raise ConfigurationError(f"{path} can't be written: {error.strerror or error}.") from error


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """Keep others out who change the same file. The directory is locked: the file itself is replaced."""
    descriptor = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, entries: tuple[RevokedEntry, ...], mode: int) -> None:
    document = {"revoked": [one.to_data() for one in entries]}
    content = (_HEAD + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)).encode()
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError(
            f"{path} would be larger than {MAX_FILE_BYTES // 1024} KiB.",
            hint="Take out entries whose certificates have expired.",
        )
    target = path.resolve()  # behind a link
    draft = target.with_name(f".{target.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        load_revocations(draft)  # what would not be read must not be put in place
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
