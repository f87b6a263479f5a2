"""A bundle for OPA servers, of the same sources that the embedded engine takes.

``build_bundle(source)`` checks and merges as ``EmbeddedEngine.load`` does, and packs the Rego, the data
and a manifest whose revision is a digest of both. In it, ``data.agentweave_bundle.standing`` names the
packages whose standing rules were checked; ``opa.OpaServerEngine`` asks no others for theirs.

    opa run --server --addr unix:///run/opa/opa.sock -b bundle.tar.gz
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Final

from agentweave_bus.authz.opa import CHECKED_DOCUMENT
from agentweave_bus.authz.policy_data import read_data
from agentweave_bus.authz.policy_input import write_input
from agentweave_bus.authz.policy_source import checked_sources

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["build_bundle"]

_REVISION_CHARACTERS: Final = 32


def build_bundle(source: Path | None) -> bytes:
    """Return a bundle (``.tar.gz``) of ``source``, the same bytes for the same content.

    Needs the ``opa`` binary, unless ``source`` brings no Rego of its own.

    Raises:
        PolicyLoadError: as for ``EmbeddedEngine.load``.

    """
    sources, standing = checked_sources(source)
    data = _with_checked(read_data(source), standing)
    digest = hashlib.sha256(data)
    for name, raw in sorted(sources.items()):
        digest.update(f"{len(name.encode())}:{name}{len(raw)}:".encode() + raw)
    manifest = json.dumps({"revision": digest.hexdigest()[:_REVISION_CHARACTERS], "roots": [""]})
    return _packed({".manifest": manifest.encode(), "data.json": data} | sources)


def _with_checked(data: bytes, standing: frozenset[str]) -> bytes:
    """Add the list without parsing the data again, which would cost its numbers their digits."""
    checked = write_input({CHECKED_DOCUMENT: {"standing": sorted(standing)}})
    return checked if data == b"{}" else data[:-1] + b"," + checked[1:]


def _packed(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return packed.getvalue()
