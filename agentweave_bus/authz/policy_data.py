"""The data that policies read: ``grants.yaml`` and ``data.yaml`` or ``data.json``, as one document.

``grants.yaml`` becomes ``data.grants``, ``data.operators`` and, from its ``partners``,
``data.partner.registered_domains`` and ``data.partner.partner_limits``, through the same model that the
broker's permissions come from (:class:`agentweave_bus.authz.grants.Grants`), so that a misspelled limit
is an error and not a missing limit. A data file is taken as it is. What two files both say is an error.

Reads files; knows no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from agentweave_bus.authz.grants import Grants
from agentweave_bus.authz.policy_input import parse_strict, write_input
from agentweave_bus.config.document import Bounds, read_document
from agentweave_bus.exceptions import ConfigurationError, PayloadError, PolicyLoadError
from agentweave_bus.regular_files import open_regular

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DATA_FILES", "GRANTS_FILES", "MAX_FILE_BYTES", "grants_file", "read_bytes", "read_data"]

GRANTS_FILES: Final = ("grants.yaml", "grants.yml")
DATA_FILES: Final = ("data.yaml", "data.yml", "data.json")
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
_BOUNDS: Final = Bounds(MAX_FILE_BYTES, nodes=250_000, depth=40, dates=False)


def grants_file(source: Path | None) -> Path | None:
    """Return the grants file of ``source``: itself, unless it is a directory; None where there is none.

    Whoever reads grants asks here, so that agents, the broker and the command line take the same file.

    Raises:
        ConfigurationError: a directory has two.

    """
    if source is None or not source.is_dir():
        return source
    found = [source / name for name in GRANTS_FILES if (source / name).is_file()]
    if len(found) > 1:
        raise ConfigurationError(f"{found[0]} and {found[1].name} beside it both hold grants; keep one")
    return found[0] if found else None


def read_data(source: Path | None) -> bytes:
    """Return the data document of ``source`` as JSON bytes.

    ``source`` is a directory with any of ``GRANTS_FILES`` and ``DATA_FILES``, one grants file, or None
    for no data (and so no grant).

    Raises:
        PolicyLoadError: a file can't be read, is malformed, or contradicts another.

    """
    document: dict[str, Any] = {} if source is None else _read_grants(source)
    if source is not None and source.is_dir():
        for path in (source / name for name in DATA_FILES if (source / name).is_file()):
            _merge(document, _read_mapping(path), path)
    try:
        return write_input(document)
    except PayloadError as error:
        raise PolicyLoadError(f"the data of {source} can't be given to a policy: {error}") from error


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, bounded.

    Raises:
        PolicyLoadError: it can't be read, or has more than ``MAX_FILE_BYTES``.

    """
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PolicyLoadError(f"{path} can't be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise PolicyLoadError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return raw


def _read_grants(source: Path) -> dict[str, Any]:
    if not source.exists():
        raise PolicyLoadError(f"{source} does not exist; name a directory with grants.yaml, or such a file")
    try:
        path = grants_file(source)
        return {} if path is None else Grants.load(path).to_policy_data()
    except ConfigurationError as error:
        raise PolicyLoadError(str(error)) from error


def _read_mapping(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        return _read_yaml(path)
    raw = read_bytes(path)
    try:
        value = parse_strict(raw)
    except (PayloadError, ValueError, RecursionError) as error:
        raise PolicyLoadError(f"{path} is malformed: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PolicyLoadError(f"{path} must hold a mapping at its top")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_document(path, _BOUNDS).value
    except ConfigurationError as error:
        raise PolicyLoadError(str(error)) from error


def _merge(document: dict[str, Any], more: dict[str, Any], path: Path) -> None:
    for key, value in more.items():
        mine = document.get(key)
        if not mine:
            document[key] = value
        elif isinstance(mine, dict) and isinstance(value, dict):
            _merge(mine, value, path)
        else:
            raise PolicyLoadError(f"{path} says {key!r}, and so does another file beside it; keep one")
